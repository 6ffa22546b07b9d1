"""Mistral-7B (Jiang et al. 2023, arXiv:2310.06825): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Parameters have the names of the Hugging Face checkpoint, so loading and export rename nothing. The model knows nothing
of batches, ranks or padding: it reads a flat stream of tokens, and `attend` knows who sees whom (attention.py).

Legend: T tokens of the stream, R rows that are scored, D model dimension, F feed-forward dimension, V vocabulary,
H query heads, K key/value heads, d head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from notus.attention import PackedAttention
from notus.chat import read_json
from notus.logprobs import sequence_logps, token_logps
from notus.packing import Stream

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # (layer, (T, H, d), (T, K, d), (T, K, d)) -> (T, H, d)


@dataclass(frozen=True)
class MistralConfig:
    """The dimensions of a checkpoint, by the names of its own config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    initializer_range: float = 0.02

    @classmethod
    def read(cls, model_dir: str | Path) -> "MistralConfig":
        """From config.json, in the spelling of transformers 4 or 5. ValueError names the file and the value."""
        path = Path(model_dir) / "config.json"
        if not path.is_file():
            raise ValueError(f"{path}: no such file; a model is a directory in Hugging Face layout")
        raw = read_json(path)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        needs = {
            "model_type": (raw.get("model_type"), "mistral"),
            "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
            "attention_bias": (raw.get("attention_bias", False), False),
            "rope type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        }
        for name, (value, supported) in needs.items():
            if value != supported:
                raise ValueError(f"{path}: {name} is {value!r}; this model needs {supported!r}")

        def number(name: str, kind: type, value: float | None) -> int | float:
            if value is None:
                raise ValueError(f"{path}: {name} is missing")
            if type(value) not in (int, kind) or value <= 0:
                what = "whole number" if kind is int else "number"
                raise ValueError(f"{path}: {name} is {value!r}; it must be a positive {what}")
            return kind(value)

        def whole(name: str) -> int:
            return number(name, int, raw.get(name))

        heads, window = whole("num_attention_heads"), raw.get("sliding_window")
        config = cls(
            vocab_size=whole("vocab_size"),
            hidden_size=whole("hidden_size"),
            intermediate_size=whole("intermediate_size"),
            num_hidden_layers=whole("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=number("num_key_value_heads", int, raw.get("num_key_value_heads") or heads),
            head_dim=number("head_dim", int, raw.get("head_dim") or whole("hidden_size") // heads),
            rms_norm_eps=number("rms_norm_eps", float, raw.get("rms_norm_eps", 1e-5)),
            rope_theta=number("rope_theta", float, rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            sliding_window=window and number("sliding_window", int, window),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            initializer_range=number("initializer_range", float, raw.get("initializer_range", 0.02)),
        )
        if heads % config.num_key_value_heads:
            raise ValueError(f"{path}: {heads} heads cannot share {config.num_key_value_heads} key/value heads evenly")
        if config.head_dim % 2:
            raise ValueError(f"{path}: head_dim is {config.head_dim}; rotary positions need an even one")
        return config


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


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/d) -> two (T, 1, d/2), float32 or wider: in bfloat16 the angles alone would
    be off by 0.6 rad at position 512. Su et al. 2021 (arXiv:2104.09864), equation 15."""
    wide = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, head_dim, 2, dtype=wide, device=positions.device) / head_dim  # (d/2,)
    angles = positions[:, None].to(wide) * theta**-exponents  # (T, d/2)
    return angles.cos()[:, None], angles.sin()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (T, heads, d) by its positions. Dimension i is paired with i + d/2, as Hugging Face checkpoints have it."""
    first, second = _wide(x).chunk(2, dim=-1)  # (T, heads, d/2) each
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: MistralConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, layer: int, rows: Tensor | None
    ) -> Tensor:
        query = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, H, d)
        key = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (T, K, d)
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


class DecoderLayer(nn.Module):
    def __init__(self, config: MistralConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend, layer: int, rows: Tensor | None = None
    ) -> Tensor:
        """(T, D) -> (T, D); with `rows` only those of the stream (R, D): of the others just keys and values matter."""
        out = self.self_attn(self.input_layernorm(x), rotary, attend, layer, rows)
        x = out + (x if rows is None else x[rows])
        return x + self.mlp(self.post_attention_layernorm(x))


# Activation checkpointing, from the least work done twice to the least memory. `elementwise`: norms, rotary positions
# and SwiGLU are computed again in backward; what matrix products and attention gave is kept. `half`: of every second
# layer only the input is kept, the others are as before. `full`: of every layer.
RECOMPUTE = ("none", "elementwise", "half", "full")


def is_product(op: torch._ops.OpOverload) -> bool:
    """A matrix product or attention, by whichever kernel: worth its memory."""
    return op.name() == "aten::mm" or "attention" in op.name() or "attn" in op.name()


def keep_products() -> tuple:
    """What torch.utils.checkpoint asks of its `context_fn`: keep products, recompute the rest."""

    def policy(_context, op, *_arguments, **_named) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if is_product(op) else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Decoder(nn.Module):
    """Token ids -> normalized hidden states of the wanted tokens."""

    def __init__(self, config: MistralConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute, self.compiled = "none", False

    def forward(self, input_ids: Tensor, positions: Tensor, attend: Attend, rows: Tensor) -> Tensor:
        """(T,), (T,), rows (R,) -> (R, D)"""
        x = self.embed_tokens(input_ids)  # (T, D)
        rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta, x.dtype)
        for index, layer in enumerate(self.layers):
            inputs = x, rotary, attend, index, rows if index == len(self.layers) - 1 else None
            if not torch.is_grad_enabled() or self.recompute == "none":
                x = layer(*inputs)
            elif self.recompute == "full" or (self.recompute == "half" and index % 2 == 0):
                x = checkpoint(layer, *inputs, use_reentrant=False)
            elif self.compiled:
                x = layer(*inputs)  # the compiler has seen to it
            else:
                x = checkpoint(layer, *inputs, use_reentrant=False, context_fn=keep_products)
        return self.norm(x)

    def compile_layers(self) -> None:
        """torch.compile each layer in place: no name changes, and streams of any length are one compilation. What is to
        be recomputed must be known by now."""
        torch._functorch.config.aggressive_recomputation = self.recompute != "none"  # its name for `elementwise`
        for layer in self.layers:
            layer.compile(dynamic=True)
        self.compiled = True


class Mistral(nn.Module):
    """What training needs of a language model: log-probabilities of the response tokens, never a (T, V) matrix."""

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

        With targets: log p(target | all that `source` sees), (R,) in nats. Without: logits (R, V). float32 or wider.
        """
        hidden = self.model(input_ids, positions, attend, source)  # (R, D)
        head = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight  # (V, D)
        if target is None:
            return _wide(hidden @ head.T)
        return token_logps(hidden, head, target)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Random weights for training from scratch: normal with `initializer_range`, norms at 1."""
        generator = torch.Generator(device=next(self.parameters()).device).manual_seed(seed)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, self.config.initializer_range, generator=generator)


def pair_logps(model: Mistral, stream: Stream) -> Tensor:
    """A packed micro-batch of P pairs -> (P, 2): log-probabilities of the chosen and the rejected answers, in nats."""
    attend = PackedAttention(stream.segments, model.config.sliding_window, stream.input_ids.device)
    logps = model(stream.input_ids, stream.positions, attend, stream.source, stream.target)  # (R,)
    return sequence_logps(logps, stream.sequence, stream.num_sequences).view(-1, 2)
