"""What a run will cost, before it starts: FLOPs, GiB per GPU by part, traffic, hours. Arithmetic on shapes alone:

    python -m notus.plan configs/notus-7b-v1.toml --gpus 8 --device A100-40GB       needs neither data, weights nor GPU
    python train.py configs/notus-7b-v1.toml --dry-run                              the same, of the real data

FLOPs count each useful multiplication once (no credit for recomputation): 2 a parameter and token forward, 4 backward,
plus attention, on unique tokens: a prompt counts once for both answers. Nothing here has been measured on a GPU.

Legend: T tokens of a stream, R response tokens, D model dimension, V vocabulary, H query heads, K key/value heads.
"""

import argparse
import functools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from notus import config as configuration
from notus.config import Config
from notus.data import steps_per_epoch
from notus.logprobs import CHUNK_ROWS, KEEP_BYTES
from notus.metrics import duration
from notus.model import RECOMPUTE, DecoderLayer, MistralConfig, is_product, rotary_table

GIB = 2**30
RESERVE_GIB = 3.0  # of a GPU's memory, for CUDA itself and for fragmentation
CPU_SHARE = 0.6  # of the matmul rate; measured, 54 to 69 %: benchmarks/RESULTS.md
RUN_AGAIN = {"none": 0.0, "elementwise": 0.0, "half": 0.5, "full": 1.0}  # share of forward's products


@dataclass(frozen=True)
class Device:
    """One GPU: dense bfloat16 FLOP/s and NVLink bytes/s in one direction, from its data sheet; memory, from torch's
    out-of-memory errors in public bug reports; and the MFU that a step is assumed to reach."""

    peak_flops: float
    memory_gib: float
    link_bytes: float
    mfu: float


# Published MFU of pre-training in bfloat16. A100: 51 % (7B, 8 x 40GB, all recomputed) and 58 to 64 % (7B, 8 x 80GB) in
# MosaicML llm-foundry, scripts/train/benchmarking; 57 to 68 % (7B) in PyTorch's blog, "Maximizing training throughput".
# H100: 46 % (7B, llm-foundry); 33 %, compiled 39 % (8B, torchtitan, benchmarks/llama3_h100_202412). H200: as the H100,
# whose chip it has. B200: no figure found, a guess. Published DPO stacks reach 6 to 29 %.
DEVICES = {
    "A100-40GB": Device(312e12, 39.4, 300e9, 0.50),
    "A100-80GB": Device(312e12, 79.1, 300e9, 0.50),
    "H100-80GB": Device(989e12, 79.1, 450e9, 0.40),
    "H200": Device(989e12, 139.7, 450e9, 0.40),
    "B200": Device(2250e12, 178.3, 900e9, 0.35),
}
# What `python -m notus.plan` takes for granted. Lengths: UltraFeedback's means in Mistral tokens, cut at 512 / 1024.
MISTRAL_7B = MistralConfig(32000, 4096, 14336, 32, 32, 8, 128, 1e-5, 10000.0, 4096, False)
LENGTHS, PAIRS, HELD_OUT_PAIRS = (161, 298, 281), 61_619, 2_000


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
    heads, hidden = config.num_attention_heads * config.head_dim, config.hidden_size
    skipped = heads * hidden + 3 * hidden * config.intermediate_size + hidden  # by prompts in the last layer
    attention = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers  # a query-key meeting
    head = 2 * config.vocab_size * config.hidden_size  # a scored token
    prompt, *answers = lengths.T.astype(np.float64)
    meetings = prompt * (prompt + 1) / 2 + sum(length * prompt + length * (length + 1) / 2 for length in answers)
    layers = 2 * (layer_parameters * lengths.sum(axis=1) - skipped * prompt)
    return layers + attention * meetings + head * sum(answers)


@functools.cache
def activation_bytes(config: MistralConfig, dtype: torch.dtype, recompute: str, compiled: bool) -> int:
    """Bytes that a decoder layer keeps for backward, per token of the stream: counted, on the meta device, by asking
    autograd what it saves (`none`), or which results are kept (`elementwise`); `full` is the layer's input alone.

    As on a GPU: there RMSNorm is one kernel, which keeps its input and a float32 a row (elsewhere more), and attention
    is one, which keeps query, key, value, its output, and a float32 for each head. A compiled layer keeps the norms'
    results even with `elementwise`, but not what down_proj gave; with `none` it keeps less than said here.
    """
    if recompute == "full":
        return config.hidden_size * dtype.itemsize
    tokens, kept = 64, {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in shared:
            kept[storage._cdata] = storage  # held, so that no other storage takes its name
        return tensor

    def attend(_layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.clone()
        for tensor in (query, key, value, out) if recompute == "none" else (out,):
            keep(tensor)
        return out

    class KeepProducts(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **kwargs or {})
            return keep(out) if is_product(op) else out

    with torch.device("meta"):
        layer = DecoderLayer(config).to(dtype)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = lambda x, weight=norm.weight: x * weight
        x = torch.empty(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        rotary = rotary_table(torch.arange(tokens), config.head_dim, config.rope_theta, dtype)
        shared = {tensor.untyped_storage()._cdata for tensor in (*layer.parameters(), *rotary)}
        if recompute == "elementwise":
            keep(x)
            with KeepProducts():
                layer(x, rotary, attend, 0)
        else:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                layer(x, rotary, attend, 0)
    more = config.hidden_size * dtype.itemsize if compiled and recompute == "elementwise" else 0
    rows = config.num_attention_heads + (2 if recompute == "none" else 0)  # float32: attention's, and the two norms'
    return sum(storage.nbytes() for storage in kept.values()) // tokens + 4 * rows + more


def memory_gib(
    config: MistralConfig,
    num_gpus: int,
    dtype: torch.dtype,
    optimizer: str,
    micro_batch_tokens: int,
    cpu_offload: bool,
    compiled: bool,
    recompute: str,
) -> dict[str, float]:
    """GiB per GPU, by part, at the height of a training step of a model in `num_gpus` shards: a little too much, for
    not all parts are at their height together. Not in it: the CUDA context and fragmentation (RESERVE_GIB)."""
    layers, rest = num_parameters(config)
    share = 0 if cpu_offload else (layers + rest) / num_gpus
    one_layer = layers / config.num_hidden_layers
    levels = ["full" if index % 2 == 0 else "elementwise" for index in range(config.num_hidden_layers)]
    if recompute != "half":
        levels = [recompute] * config.num_hidden_layers
    kept = {level: activation_bytes(config, dtype, level, compiled) for level in {*levels, "none"}}
    # Backward begins with the last layer: all that it saves, if need be again, is there beside what the others keep.
    activations = kept["none"] + sum(kept[level] for level in levels[:-1])  # bytes a token
    scored = 0.8 * micro_batch_tokens  # UltraFeedback: 579 of a pair's 740 tokens are scored
    parts = {
        "weights, fp32 shard": 4 * share,
        "gradients, fp32 shard": 4 * share,
        f"{optimizer} state, fp32 shard": (8 if optimizer == "adamw" else 4) * share,
        "gathered weights and gradients": dtype.itemsize * (2 * rest + 3 * one_layer) + 4 * one_layer,
        "activations": activations * micro_batch_tokens,
        "head, scored rows and softmax": 3 * scored * config.hidden_size * dtype.itemsize
        + min(scored * config.vocab_size * dtype.itemsize, KEEP_BYTES)
        + CHUNK_ROWS * config.vocab_size * (4 + dtype.itemsize),
    }
    return {name: size / GIB for name, size in parts.items()}


def memory_arguments(config: Config, dims: MistralConfig, num_gpus: int) -> tuple:
    """What `memory_gib` asks for, but the last."""
    setup, parallel, dtype = config.train, config.distributed, getattr(torch, config.train.compute_dtype)
    shards = num_gpus // parallel.replicate
    return dims, shards, dtype, setup.optimizer, setup.micro_batch_tokens, parallel.cpu_offload, setup.compile


def least_recomputation(device_gib: float, *run: Any) -> str:
    """The first level of RECOMPUTE with which a run (the arguments of `memory_gib`, but the last) fits a GPU of
    `device_gib`; `full` if none does."""
    return next((r for r in RECOMPUTE if sum(memory_gib(*run, r).values()) + RESERVE_GIB <= device_gib), "full")


def traffic_bytes(config: MistralConfig, num_gpus: int, dtype: torch.dtype) -> float:
    """What a GPU receives in one micro-batch, as distributed.shard has it: layers gathered for forward and again for
    backward, the rest once, in the compute dtype; all gradients reduced in float32."""
    layers, rest = num_parameters(config)
    return (dtype.itemsize * (2 * layers + rest) + 4 * (layers + rest)) * (num_gpus - 1) / num_gpus


def describe_cost(
    config: Config, dims: MistralConfig, train: np.ndarray, test: np.ndarray, num_gpus: int,
    devices: Sequence[str] = tuple(DEVICES),
) -> str:  # fmt: skip
    """The report of `train.py --dry-run`; train, test: lengths (P, 3) of the pairs. ValueError if the GPUs do not make
    `distributed.replicate` equal groups."""
    setup, replicate, dtype = config.train, config.distributed.replicate, getattr(torch, config.train.compute_dtype)
    if num_gpus < 1 or num_gpus % replicate:
        raise ValueError(f"{num_gpus} GPUs cannot hold distributed.replicate = {replicate} equal copies of the model")
    epochs, budget, on_cpu = setup.num_train_epochs, setup.micro_batch_tokens, dtype == torch.float32
    steps = steps_per_epoch(len(train), setup.pairs_per_step) * epochs
    tokens, busy = train.sum() / len(train), min(num_gpus, setup.pairs_per_step)  # the other GPUs have no pair
    tokens_each = tokens * setup.pairs_per_step / busy
    micro_batches = math.ceil(tokens_each / budget)

    forward, forward_test = (forward_flops(dims, lengths).sum() for lengths in (train, test))
    flops = {"training": 3 * forward * epochs, "reference, if nothing is cached": forward + forward_test}
    if len(test):
        evaluations = 2 + (steps - 1) // setup.eval_steps
        flops[f"{evaluations} evaluations"] = forward_test * evaluations
    total = sum(flops.values())

    run = memory_arguments(config, dims, num_gpus)
    auto = setup.activation_checkpointing == "auto"
    levels = (setup.activation_checkpointing,) if not auto else ("none",) if on_cpu else RECOMPUTE
    memory = {level: memory_gib(*run, level) for level in levels}
    needed = {level: sum(parts.values()) for level, parts in memory.items()}

    lines = [
        f"steps       {steps:,}: {epochs} epochs of {len(train):,} pairs, {setup.pairs_per_step} each",
        f"parameters  {sum(num_parameters(dims)):,}",
        f"tokens      {tokens:.0f} unique a pair, on average; {tokens_each:,.0f} a GPU and step, in "
        f"{micro_batches} micro-batch{'es' if micro_batches > 1 else ''}",
        f"compute     {engineering(total, 'FLOP')}",
        *(f"  {engineering(value, 'FLOP'):>14}  {name}" for name, value in flops.items()),
        f"memory      {needed[levels[0]]:.2f} GiB a GPU, estimated, with {num_gpus} GPUs and {budget:,} tokens each, "
        f"recomputing {levels[0]}",
        *(f"  {size:>10.2f} GiB  {name}" for name, size in memory[levels[0]].items()),
        *(f"  {needed[level]:>10.2f} GiB  in all, recomputing {level}" for level in levels[1:]),
    ]
    if on_cpu:
        rate = cpu_flops()
        speed = len(train) / (3 * forward) * rate * CPU_SHARE  # pairs/s
        lines += [
            f"time        {duration(total / (rate * CPU_SHARE))}, training at {speed:.3g} pairs/s, on this CPU",
            f"  Measured now: its matmul rate, {engineering(rate, 'FLOP/s')}. Measured before, on one machine: a step",
            f"  runs at 54 to 69 % of that (benchmarks/RESULTS.md), taken as {CPU_SHARE:.0%}.",
        ]
        return "\n".join(lines)

    moved = micro_batches * traffic_bytes(dims, num_gpus // replicate, dtype)  # bytes a step
    lines.append(
        "time        recomputing   GiB of   at MFU     time  pairs/s  90 min: MFU   s a step: compute, traffic"
    )
    for name in devices:
        device = DEVICES[name]
        level = least_recomputation(device.memory_gib, *run) if auto else levels[0]
        rate, again = device.peak_flops * device.mfu, RUN_AGAIN[level] * forward * epochs  # FLOP/s; FLOPs for no credit
        compute, traffic = (flops["training"] + again) / (rate * busy * steps), moved / device.link_bytes  # s a step
        training = max(compute, traffic) * steps  # s
        speed = epochs * len(train) / training  # pairs/s
        in_all = training + (total - flops["training"]) / (rate * num_gpus)
        mfu = (total + again) / (device.peak_flops * num_gpus * 90 * 60)
        fits = "" if needed[level] + RESERVE_GIB <= device.memory_gib else "  does not fit: lower micro_batch_tokens"
        lines.append(
            f"  {name:<10}{level:<12}{needed[level]:>6.1f} {device.memory_gib:>5.1f} {device.mfu:>7.0%} "
            f"{duration(in_all):>8} {speed:>8.3g} {mfu:>12.0%} {compute:>19.3f} {traffic:>8.3f}{fits}"
        )
    return "\n".join([*lines, NOTES])


NOTES = f"""\
  Data sheets: FLOP/s (an MFU of 100 %) and NVLink. Assumed: the MFU, from what pre-training of 7B models has published
  (sources in notus/plan.py; none for the B200). Estimated from shapes: GiB; {RESERVE_GIB:.0f} of a GPU's are left free.
  Counted: FLOPs, and the traffic of FSDP2 inside a node; it overlaps, so a step takes the longer of the two. Measured:
  nothing; notus has not run on a GPU yet."""


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


def main(argv: list[str] | None = None) -> int:
    default = "configs/notus-7b-v1.toml"
    parser = argparse.ArgumentParser(
        prog="python -m notus.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default=default, help=f"a TOML file, as for train.py (default: {default})")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--device", nargs="+", default=list(DEVICES), choices=DEVICES, metavar="NAME",
                        help=f"of {', '.join(DEVICES)}")  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs=3, default=LENGTHS, metavar=("PROMPT", "CHOSEN", "REJECTED"),
                        help="tokens of every pair (default: UltraFeedback's means, cut at 512 / 1024)")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help=f"to train on (default: {PAIRS:,})")
    arguments = parser.parse_intermixed_args(argv)
    if "=" in arguments.config:  # no file given, only settings
        arguments.overrides.insert(0, arguments.config)
        arguments.config = default
    try:
        if min(arguments.pairs, *arguments.lengths) < 1:
            raise ValueError("--pairs and --lengths must be positive")
        config = configuration.load(arguments.config, arguments.overrides)
        path = Path(config.model.path) / "config.json"
        dims = MistralConfig.read(path.parent) if path.is_file() else MISTRAL_7B
        train = np.tile(arguments.lengths, (arguments.pairs, 1))  # (P, 3)
        test = np.tile(arguments.lengths, (HELD_OUT_PAIRS if config.data.test else 0, 1))
        report = describe_cost(config, dims, train, test, arguments.gpus, arguments.device)
    except ValueError as error:
        print(f"notus.plan: error: {error}", file=sys.stderr)
        return 2
    prompt, chosen, rejected = arguments.lengths
    means = ", UltraFeedback's means at 512 / 1024" if tuple(arguments.lengths) == LENGTHS else ""
    print(f"model       {path if dims is not MISTRAL_7B else f'Mistral-7B; there is no {path}'}")
    print(f"pairs       {len(train):,} and {len(test):,} held out, of {prompt} + {chosen} + {rejected} tokens{means}")
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
