"""Mistral-7B (Jiang et al. 2023, arXiv:2310.06825): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Llama, Qwen 2 and Qwen 3 are this model too. Three fields of its dimensions (dims.py) say where they differ:
`rope_scaling` is Llama 3's, `qkv_bias` Qwen 2's, `qk_norm` Qwen 3's.

Parameters have the names of the Hugging Face checkpoint, so loading and export rename nothing. The model does not know
about batches, ranks or padding. It reads a flat stream of tokens, and `attend` decides which token sees which
(attention.py).

Legend: T tokens of the stream, R rows that are scored, D model dimension, V vocabulary, H query heads, K key/value
heads, d head dimension.
"""

import logging
import math
from collections.abc import Callable, Iterable
from typing import cast

import torch
import torch.fx.experimental._config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from notus.attention import PackedAttention
from notus.dims import Llama3Rope, MistralConfig
from notus.logprobs import sequence_logps, token_logps
from notus.packing import Stream

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, (T, H, d), (T, K, d), (T, K, d)) -> (T, H, d)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the statistics in float32 (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: Llama3Rope | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/d), two (T, 1, d/2). Su et al. 2021 (arXiv:2104.09864), equation 15.

    They are float32 or wider. In bfloat16 an angle near position 512 would be wrong by 0.6 rad. `scaling` is Llama
    3.1's, for longer texts (`apply_scaling` in meta-llama/llama-models): frequencies that turn less than
    `low_freq_factor` times in the original context are divided by `factor`, those that turn more than
    `high_freq_factor` times stay, and those between are interpolated.
    """
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim  # (d/2,)
    frequencies = theta**-exponents  # (d/2,) rad a token
    if scaling is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = positions[:, None, None].to(wide) * frequencies  # (T, 1, d/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (T, heads, d) by its positions. Dimension i is paired with i + d/2, as in Hugging Face checkpoints."""
    first, second = _wide(x).chunk(2, dim=-1)  # (T, heads, d/2) each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: MistralConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, layer: int, rows: Tensor | None = None
    ) -> Tensor:
        query = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, H, d)
        key = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))  # (T, K, d)
        value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)
        out = attend(layer, rotate(query, *rotary), rotate(key, *rotary), value)  # (T, H, d)
        out = out.flatten(-2)  # (T, H * d)
        return self.o_proj(out if rows is None else out[rows])


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# Activation checkpointing, from the least recomputation to the least memory. `elementwise` keeps the results of matrix
# products and attention, and recomputes norms, rotary positions and SwiGLU in backward. `half` does so in every second
# layer, and keeps only the input of the others. `full` keeps only the input of every layer.
RECOMPUTE = ("none", "elementwise", "half", "full")


def is_product(op: torch._ops.OpOverload) -> bool:
    """Whether `op` is a matrix product or attention, whichever kernel computes it. These are worth their memory."""
    return op.name() in ("aten::mm", "aten::addmm") or "attention" in op.name() or "attn" in op.name()


def keep_products() -> tuple:
    """A `context_fn` for torch.utils.checkpoint that keeps products and recomputes the rest."""

    def policy(_context, op, *_arguments, **_named) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if is_product(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class DecoderLayer(nn.Module):
    recompute = "none"  # or "elementwise" or "full"

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, layer: int) -> Tensor:
        """(T, D) -> (T, D)"""

        def block(x: Tensor) -> Tensor:
            x = x + self.self_attn(self.input_layernorm(x), rotary, attend, layer)
            return x + self.mlp(self.post_attention_layernorm(x))

        return self.run(block, x)

    def run(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """block(x), recomputed in backward as far as `recompute` says. Nothing in a layer is random."""
        if not torch.is_grad_enabled() or self.recompute == "none":
            return block(x)
        if self.recompute == "full":
            return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
        return checkpoint(block, x, use_reentrant=False, preserve_rng_state=False, context_fn=keep_products)


class LastLayer(DecoderLayer):
    """It computes the scored rows alone: it needs the other tokens for their keys and values only. A class of its own,
    because the compiler would otherwise compile one function twice, with and without `rows`."""

    def forward(  # type: ignore[override]
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, layer: int, rows: Tensor
    ) -> Tensor:
        """(T, D), rows (R,) -> (R, D)"""

        def block(x: Tensor) -> Tensor:
            x = x[rows] + self.self_attn(self.input_layernorm(x), rotary, attend, layer, rows)
            return x + self.mlp(self.post_attention_layernorm(x))

        return self.run(block, x)


class Decoder(nn.Module):
    """Token ids -> normalized hidden states of the requested tokens."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers - 1)]
        self.layers = nn.ModuleList([*layers, LastLayer(config)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self._recompute = "none"

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor) -> Tensor:
        """(T,), (T,), rows (R,) -> (R, D)"""
        x = self.embed_tokens(input_ids)  # (T, D)
        config = self.config
        rotary = rotary_table(positions, config.head_dim, config.rope_theta, x.dtype, config.rope_scaling)
        *layers, last = self.layers
        for index, layer in enumerate(layers):
            x = layer(x, rotary, attend, index)
        return self.norm(last(x, rotary, attend, len(layers), rows))

    @property
    def recompute(self) -> str:
        """One of RECOMPUTE."""
        return self._recompute

    @recompute.setter
    def recompute(self, level: str) -> None:
        self._recompute = level
        for index, layer in enumerate(cast(Iterable[DecoderLayer], self.layers)):
            layer.recompute = ("full", "elementwise")[index % 2] if level == "half" else level

    def compile_layers(self) -> None:
        """torch.compile each layer in place. No parameter changes its name. Layers of a kind and streams of all lengths
        share one compilation, so there are as many as tests/test_compile.py says. Past torch's limit of 8 for one
        function it would go on uncompiled, and the other ranks would wait for this one: here that is an error."""
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Otherwise a first stream with as many tokens as a layer has columns, say, would be taken to have them always.
        torch.fx.experimental._config.use_duck_shape = False
        # It warns of in-place operations in what is recomputed. A layer has none.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        for layer in self.layers:  # what FSDP2 does before and after a layer stays outside
            vars(layer)["forward"] = torch.compile(layer.forward, dynamic=True)


class Mistral(nn.Module):
    """The language model. Training asks it for log-probabilities of the response tokens, never for a (T, V) matrix."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, positions: Tensor, attend: Attend, source: Tensor, target: Tensor | None = None
    ) -> Tensor:
        """input_ids (T,), positions (T,), source (R,) indices into the stream, target (R,) token ids.

        With targets it returns log p(target | everything that `source` sees), (R,) in nats, without them logits (R, V).
        Both are float32 or wider.
        """
        hidden = self.model(input_ids, positions, attend, source)  # (R, D)
        head = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight  # (V, D)
        if target is None:
            return _wide(hidden @ head.T)
        return token_logps(hidden, head, target)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Random weights for training from scratch: normal with `initializer_range`, norms at 1, biases at 0."""
        generator = torch.Generator(device=next(self.parameters()).device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith(".bias") else 1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)


def stream_logps(model: Mistral, stream: Stream) -> Tensor:
    """A packed micro-batch -> (S,): the log-probability of each of its answers, in nats."""
    attend = PackedAttention(stream.segments, model.config.sliding_window, stream.input_ids.device)
    logps = model(stream.input_ids, stream.positions, attend, stream.source, stream.target)  # (R,)
    return sequence_logps(logps, stream.sequence, stream.num_sequences)


def pair_logps(model: Mistral, stream: Stream) -> Tensor:
    """A packed micro-batch of P pairs -> (P, 2): log-probabilities of the chosen and the rejected answers, in nats."""
    return stream_logps(model, stream).view(-1, 2)
