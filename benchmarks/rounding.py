"""How far two bfloat16 passes of a real model lie apart that differ as kernels differ, on a CPU.

    python tests/smollm2.py models/smollm2
    OMP_NUM_THREADS=1 python benchmarks/rounding.py models/smollm2 170 README.md docs/*.md

Sums are float32 and what is stored is rounded to bfloat16. `split` sums each product in two parts; `all` also rounds
attention as FlashAttention does, and keeps wide what a fused kernel keeps. Both are compared with the plain way, over
pieces of the texts, for so many seconds. In units of eps sqrt(n), in which notus/reference.py bounds a sum of n tokens.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from notus.base import load_model, read_base
from notus.model import Mistral, rotary_table, rotate

EPS = torch.finfo(torch.bfloat16).eps


def stored(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def product(weight: Tensor, x: Tensor, split: bool) -> Tensor:
    x, cut = stored(x), weight.shape[1] // 3
    if split:
        return stored(x[:, :cut] @ weight[:, :cut].T + x[:, cut:] @ weight[:, cut:].T)
    return stored(x @ weight.T)


def attention(query: Tensor, key: Tensor, value: Tensor, flash: bool) -> Tensor:
    """One causal sequence, (n, heads, d). FlashAttention stores the weights before they are divided by their sum."""
    group = query.shape[1] // key.shape[1]
    query, key, value = (x.transpose(0, 1) for x in (query, *(x.repeat_interleave(group, 1) for x in (key, value))))
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool).triu(1), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    out = stored(weights) @ value / total if flash else (weights / total) @ value
    return stored(out).transpose(0, 1)


@torch.no_grad()
def logps(model: Mistral, ids: Tensor, start: int, split: bool, fused: bool) -> Tensor:
    """Log-probabilities of ids[start:]."""
    config, x = model.config, model.model.embed_tokens.weight[ids]
    rotary = rotary_table(torch.arange(len(ids)), config.head_dim, config.rope_theta, x.dtype)
    for layer in model.model.layers:
        mixer, mlp = layer.self_attn, layer.mlp
        normed = stored(layer.input_layernorm(x))
        query, key, value = (
            product(part.weight, normed, split).unflatten(-1, (-1, config.head_dim))
            for part in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        mixed = attention(stored(rotate(query, *rotary)), stored(rotate(key, *rotary)), value, fused)
        x = x + product(mixer.o_proj.weight, mixed.flatten(1), split)
        x = x if fused else stored(x)
        normed = stored(layer.post_attention_layernorm(x))
        gate, up = (product(part.weight, normed, split) for part in (mlp.gate_proj, mlp.up_proj))
        inner = F.silu(gate) if fused else stored(F.silu(gate))
        x = stored(x + product(mlp.down_proj.weight, inner * up, split))
    hidden = stored(model.model.norm(x[start - 1 : -1]))
    scores = stored(hidden @ model.model.embed_tokens.weight.T).log_softmax(-1)
    return scores.gather(1, ids[start:, None]).squeeze(1)


def main() -> None:
    base = read_base(Path(sys.argv[1]))
    model = load_model(base, torch.device("cpu"), torch.float32)
    for parameter in model.parameters():
        parameter.copy_(stored(parameter))
    text = "\n".join(Path(name).read_text(encoding="utf-8") for name in sys.argv[3:])
    ids, rng = torch.tensor(list(base.tokenizer.encode(text))), np.random.default_rng(0)
    ways = {"split": (True, False), "all": (True, True)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    tokens, until = [], time.monotonic() + float(sys.argv[2])
    while time.monotonic() < until:
        prompt, answer = int(rng.integers(20, 200)), int(np.clip(rng.lognormal(5.3, 0.8), 8, 700))
        at = int(rng.integers(0, len(ids) - prompt - answer))
        piece = ids[at : at + prompt + answer]
        plain = logps(model, piece, prompt, False, False)
        for name, way in ways.items():
            difference = (logps(model, piece, prompt, *way) - plain).double() / EPS
            found[name].append(float(difference.sum()) / answer**0.5)
            tokens.append(float(difference.std()))
    print(f"a token's log-prob: standard deviation {np.mean(tokens):.1f} eps")
    for name, values in found.items():
        print(f"{name}: {len(values)} sums, root mean square {np.sqrt(np.mean(np.square(values))):.1f}, "
              f"largest {np.abs(values).max():.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
