"""What a run will cost, before it starts: FLOPs, GiB per GPU by part, hours. Arithmetic on shapes alone.

FLOPs count each useful multiplication once (no credit for recomputation): 2 a parameter and token forward, 4 backward,
plus attention, on unique tokens: a prompt counts once for both answers.

Legend: T tokens of a stream, R response tokens, D model dimension, V vocabulary, H query heads, K key/value heads.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from notus.logprobs import CHUNK_ROWS, KEEP_BYTES
from notus.metrics import duration
from notus.model import DecoderLayer, MistralConfig, rotary_table

GIB = 2**30
ASSUMED_MFU = 0.40  # what pre-training stacks publish for 7B models on H100s; DPO stacks publish 0.06 to 0.29


@dataclass(frozen=True)
class Device:
    """A data sheet: dense bfloat16 FLOP/s and memory."""

    peak_flops: float
    memory_gib: float


DEVICES = {
    "A100-40GB": Device(312e12, 40),
    "A100-80GB": Device(312e12, 80),
    "H100-80GB": Device(989e12, 80),
    "H200": Device(989e12, 141),
    "B200": Device(2250e12, 180),
}


def peak_flops(device_name: str) -> float | None:
    """By the name that torch.cuda.get_device_name gives; None for a device that is not in the table."""
    family = next((f for f in ("A100", "H100", "H200", "B200") if f in device_name), None)
    return next((d.peak_flops for name, d in DEVICES.items() if family and name.startswith(family)), None)


def num_parameters(config: MistralConfig) -> tuple[int, int]:
    """(of all decoder layers, of embedding, last norm and head)."""
    with torch.device("meta"):
        layer = sum(p.numel() for p in DecoderLayer(config).parameters())
    tables = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    return layer * config.num_hidden_layers, tables + config.hidden_size


def forward_flops(config: MistralConfig, lengths: np.ndarray) -> np.ndarray:
    """One forward pass over pairs of `lengths` (P, 3), prompts shared -> (P,). With backward it is three times this."""
    layer_parameters, _ = num_parameters(config)
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers  # a query-key meeting
    head = 2 * config.vocab_size * config.hidden_size  # a scored token
    prompt, *answers = lengths.T.astype(np.float64)
    meetings = prompt * (prompt + 1) / 2 + sum(length * prompt + length * (length + 1) / 2 for length in answers)
    return 2 * layer_parameters * lengths.sum(axis=1) + attention * meetings + head * sum(answers)


def activation_bytes(config: MistralConfig, dtype: torch.dtype) -> int:
    """Bytes that one decoder layer keeps for backward, per token of the stream: counted, on the meta device, by asking
    autograd what it saves. Attention itself, whose kernels differ, is added by hand: query, key, value, the output
    before the pieces of the stream are put together, and a float32 normalizer for each head."""
    tokens, saved = 64, {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage  # held, so that no other storage takes its name
        return tensor

    with torch.device("meta"):
        layer = DecoderLayer(config).to(dtype)
        parameters = {p.untyped_storage()._cdata for p in layer.parameters()}
        x = torch.empty(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        rotary = rotary_table(torch.arange(tokens), config.head_dim, config.rope_theta, dtype)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            layer(x, rotary, lambda _layer, query, _key, _value: query * 1, 0)
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads)
    attention = heads * config.head_dim * dtype.itemsize + 4 * config.num_attention_heads
    return sum(storage.nbytes() for storage in saved.values()) // tokens + attention


def memory_gib(
    config: MistralConfig,
    num_gpus: int,
    dtype: torch.dtype,
    optimizer: str,
    micro_batch_tokens: int,
    recompute_every: int,
) -> dict[str, float]:
    """GiB per GPU, by part, at the height of a training step. Not in it: the CUDA context and
    fragmentation, 1 to 3 GiB."""
    layers, rest = num_parameters(config)
    share = (layers + rest) / num_gpus
    one_layer = layers / config.num_hidden_layers
    if recompute_every:
        recomputed = len(range(0, config.num_hidden_layers, recompute_every))
        kept = (config.num_hidden_layers - recomputed + 1) * activation_bytes(config, dtype)
        kept += recomputed * config.hidden_size * dtype.itemsize
    else:
        kept = config.num_hidden_layers * activation_bytes(config, dtype)
    scored = 0.8 * micro_batch_tokens  # UltraFeedback: 579 of a pair's 740 tokens are scored
    parts = {
        "weights, fp32 shard": 4 * share,
        "gradients, fp32 shard": 4 * share,
        f"{optimizer} state, fp32 shard": (8 if optimizer == "adamw" else 4) * share,
        "gathered weights and gradients": dtype.itemsize * (2 * rest + 3 * one_layer) + 4 * one_layer,
        "activations": kept * micro_batch_tokens,
        "head, scored rows and softmax": 3 * scored * config.hidden_size * dtype.itemsize
        + min(scored * config.vocab_size * dtype.itemsize, KEEP_BYTES)
        + CHUNK_ROWS * config.vocab_size * (4 + dtype.itemsize),
    }
    return {name: size / GIB for name, size in parts.items()}


def describe_cost(
    config: MistralConfig, train: np.ndarray, test: np.ndarray, *, epochs: int, evaluations: int, num_gpus: int,
    dtype: torch.dtype, optimizer: str, micro_batch_tokens: int, recompute_every: int,
) -> str:  # fmt: skip
    """The report of `train.py --dry-run`; train, test: lengths (P, 3) of the pairs."""
    forward, forward_test = (forward_flops(config, lengths).sum() for lengths in (train, test))
    flops = {
        "training": 3 * forward * epochs,
        "reference, if nothing is cached": forward + forward_test,
        f"{evaluations} evaluations": forward_test * evaluations,
    }
    total = sum(flops.values())
    memory = memory_gib(config, num_gpus, dtype, optimizer, micro_batch_tokens, recompute_every)
    needed = sum(memory.values())
    lines = [
        f"parameters  {sum(num_parameters(config)):,}",
        f"tokens      {train.sum() / len(train):.0f} unique a pair, on average",
        f"compute     {engineering(total, 'FLOP')}",
        *(f"  {engineering(value, 'FLOP'):>14}  {name}" for name, value in flops.items()),
        f"memory      {needed:.2f} GiB a GPU, estimated, with {num_gpus} GPUs and {micro_batch_tokens:,} tokens each",
        *(f"  {size:>10.2f} GiB  {name}" for name, size in memory.items()),
    ]
    if dtype == torch.float32:
        rate = cpu_flops()
        lines.append(
            f"time        {duration(total / rate)} at this CPU's matmul rate, {engineering(rate, 'FLOP/s')}, measured"
        )
    else:
        lines.append(f"time        on {num_gpus} GPUs at {ASSUMED_MFU:.0%} of the data sheet's FLOP/s, an assumption")
        for name, device in DEVICES.items():
            fits = "" if needed + 3 <= device.memory_gib else "  (does not fit: lower train.micro_batch_tokens)"
            lines.append(f"  {duration(total / (device.peak_flops * num_gpus * ASSUMED_MFU)):>14}  {name}{fits}")
    return "\n".join(lines)


def cpu_flops(size: int = 1024, seconds: float = 0.2) -> float:
    """float32 matmul rate of this machine, as it is now: the best of a few products."""
    a = torch.ones(size, size)
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def engineering(value: float, unit: str) -> str:
    """6.53e18 -> `6.53 EFLOP`."""
    exponent = max(0, min(6, int(f"{value:.2e}".partition("e")[2]) // 3))
    return f"{value / 1000**exponent:.3g} {' kMGTPE'[exponent].strip()}{unit}"
