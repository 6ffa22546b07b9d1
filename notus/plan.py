"""What a run will cost, before it starts: GiB per GPU by part, traffic, hours.

    python -m notus.plan configs/notus-7b-v1.toml --gpus 8 --device A100-40GB       needs no data, weights or GPU
    python -m notus.plan configs/notus-7b-v1-lora.toml --gpus 1 --memory 16 --flops 80e12   a GPU that it does not know
    python train.py configs/notus-7b-v1.toml --dry-run                              the same, for the real data

The arithmetic is in cost.py. benchmarks/RESULTS.md compares it with what one H200 took.
"""

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from notus import config as configuration
from notus.cost import (
    DEVICES,
    GIB,
    RESERVE_GIB,
    STAGING_BYTES,
    Device,
    Job,
    checkpoint_bytes,
    forward_flops,
    host_seconds,
    least_recomputation,
    memory_gib,
    num_adapter_parameters,
    num_parameters,
    offload_bytes,
    scored_share,
    traffic_bytes,
    training_flops,
)  # fmt: skip
from notus.dims import MistralConfig
from notus.files import sentence
from notus.lora import TARGETS, LoRA
from notus.metrics import duration
from notus.model import RECOMPUTE
from notus.packing import steps_per_epoch
from notus.run import job_of

CPU_SHARE = 0.6  # of the matmul rate; measured, 54 to 69 %: benchmarks/RESULTS.md
RUN_AGAIN = {"none": 0.0, "elementwise": 0.0, "half": 0.5, "full": 1.0}  # share of forward's products


# What `python -m notus.plan` takes for granted. Lengths: UltraFeedback's means in Mistral tokens, cut at 512 / 1024.
MISTRAL_7B = MistralConfig(32000, 4096, 14336, 32, 32, 8, 128, 1e-5, 10000.0, 4096, False)
LENGTHS, PAIRS, HELD_OUT_PAIRS = (161, 298, 281), 61_619, 2_000


def describe_cost(
    dims: MistralConfig, job: Job, train: np.ndarray, test: np.ndarray, devices: Mapping[str, Device] = DEVICES
) -> str:
    """The report of `train.py --dry-run`. train, test: lengths (P, 3) of the pairs, in tokens."""
    epochs, budget, on_cpu = job.num_train_epochs, job.micro_batch_tokens, job.dtype == torch.float32
    steps = steps_per_epoch(len(train), job.pairs_per_step) * epochs
    tokens, busy = train.sum() / len(train), min(job.num_gpus, job.pairs_per_step)  # the other GPUs have no pair
    tokens_each = tokens * job.pairs_per_step / busy
    micro_batches = math.ceil(tokens_each / budget)

    # FLOPs, of which only those of training grow with recomputation.
    forward, forward_test = (forward_flops(dims, lengths).sum() for lengths in (train, test))
    training_once = training_flops(dims, train, job.lora).sum()
    flops = {"training": training_once * epochs}
    if job.reference:
        flops["reference, if nothing is cached"] = forward + forward_test
    if len(test):
        evaluations = 2 + (steps - 1) // job.eval_steps
        flops[f"{evaluations} evaluations"] = forward_test * evaluations
    total = sum(flops.values())

    # GiB: with `auto` the table below picks a level for each GPU, so all of them are shown.
    scored = scored_share(train)
    auto = job.activation_checkpointing == "auto"
    levels = (job.activation_checkpointing,) if not auto else ("none",) if on_cpu else RECOMPUTE
    memory = {level: memory_gib(dims, job, scored, level) for level in levels}
    needed = {level: sum(parts.values()) for level, parts in memory.items()}

    lines = [
        f"steps       {steps:,}: {epochs} epochs of {len(train):,} pairs, {job.pairs_per_step} each",
        f"parameters  {sum(num_parameters(dims)):,}"
        + (f" frozen; LoRA trains {num_adapter_parameters(dims, job.lora):,} more" if job.lora else ""),
        f"tokens      {tokens:.0f} unique a pair, on average, {scored:.0%} of them scored; {tokens_each:,.0f} a GPU "
        f"and step, in {micro_batches} micro-batch{'es' if micro_batches > 1 else ''}",
        f"compute     {engineering(total, 'FLOP')}",
        *(f"  {engineering(value, 'FLOP'):>14}  {name}" for name, value in flops.items()),
        f"memory      {needed[levels[0]]:.2f} GiB a GPU, estimated, with {plural(job.num_gpus)} and {budget:,} tokens "
        f"each, recomputing {levels[0]}",
        *(f"  {size:>10.2f} GiB  {name}" for name, size in memory[levels[0]].items()),
        *(f"  {needed[level]:>10.2f} GiB  in all, recomputing {level}" for level in levels[1:]),
    ]
    if job.cpu_offload:
        on_gpus = memory_gib(dims, replace(job, cpu_offload=False), scored, "full")
        in_host = job.num_gpus * sum(gib for name, gib in on_gpus.items() if "shard" in name)
        lines.append(f"  {in_host:>10.2f} GiB  in host memory: weights, gradients and optimizer state of all GPUs")
    saved = checkpoint_bytes(dims, job.optimizer, job.lora)
    lines.append(
        f"checkpoint  {saved / GIB:.2f} GiB; training waits {saved / job.shards / STAGING_BYTES:.1f} s while "
        f"{saved / job.shards / GIB:.2f} of them are copied from each GPU to its host, which keeps the copy"
    )
    if on_cpu:
        rate = cpu_flops()
        speed = len(train) / training_once * rate * CPU_SHARE  # pairs/s
        lines += [
            f"time        {duration(total / (rate * CPU_SHARE))}, training at {speed:.3g} pairs/s, on this CPU",
            f"  Measured now: its matmul rate, {engineering(rate, 'FLOP/s')}. Measured before, on one machine: a step",
            f"  runs at 54 to 69 % of that (benchmarks/RESULTS.md), taken as {CPU_SHARE:.0%}.",
        ]
        return "\n".join(lines)

    # Hours on each GPU: a step takes the longest of its compute and its transfers; then the CPU's optimizer, if any.
    moved = micro_batches * traffic_bytes(dims, job)  # bytes a step
    offloaded, on_host = micro_batches * offload_bytes(dims, job), host_seconds(dims, job)
    lines.append(
        "time        recomputing   GiB of   at MFU     time  pairs/s   s a step: compute, GPU links, host link, CPU"
    )
    for name, device in devices.items():
        level = least_recomputation(dims, job, scored, device.memory_gib)
        rate, again = device.peak_flops * device.mfu, RUN_AGAIN[level] * forward * epochs  # FLOP/s; FLOPs for no credit
        compute = (flops["training"] + again) / (rate * busy * steps)  # s a step
        links, host = moved / device.link_bytes, offloaded / device.host_bytes  # s a step
        training = (max(compute, links, host) + on_host) * steps  # s
        speed = epochs * len(train) / training  # pairs/s
        in_all = training + (total - flops["training"]) / (rate * job.num_gpus)
        fits = needed[level] + RESERVE_GIB <= device.memory_gib
        lines.append(
            f"  {name:<10}{level:<12}{needed[level]:>6.1f} {device.memory_gib:>5.1f} {device.mfu:>7.0%} "
            f"{duration(in_all):>8} {speed:>8.3g} {compute:>19.3f} {links:>10.3f} {host:>10.3f} {on_host:>6.3f}"
        )
        if not fits:
            lines.append(f"            does not fit; it would with {cures(dims, job, train, device.memory_gib)}")
    return "\n".join([*lines, NOTES])


NOTES = f"""\
  Data sheets: FLOP/s (an MFU of 100 %), NVLink, PCIe. Assumed: the MFU (for A100 and H100 from what
  pre-training of 7B models has published, sources in notus/cost.py), and the rate of host memory. Estimated from
  shapes: GiB; {RESERVE_GIB:.0f} of a GPU's are left free. Counted: FLOPs, the traffic of FSDP2 inside a node, and what
  cpu_offload moves over PCIe. They overlap, so a step takes the longest of the three; then the CPU's optimizer follows.
  Measured: on one H200, a compiled step of this 7B: its MFU, and GiB within 4 % (benchmarks/RESULTS.md). On several
  GPUs nothing."""


def plural(gpus: int) -> str:
    return f"{gpus} GPU{'s' if gpus > 1 else ''}"


def cures(dims: MistralConfig, job: Job, lengths: np.ndarray, device_gib: float) -> str:
    """What makes a job fit: smaller micro-batches if they do, because they change no result; else each of LoRA, host
    memory and more GPUs that does. lengths: (P, 3) of the pairs."""
    longest, scored = int(lengths.sum(axis=1).max()), scored_share(lengths)  # a micro-batch has at least one pair

    def with_budget(changed: Job, what: str) -> str:
        """`what`, and the micro-batch it takes; "" if it does not help."""
        changed = replace(changed, activation_checkpointing="auto")
        while True:
            level = least_recomputation(dims, changed, scored, device_gib)
            if sum(memory_gib(dims, changed, scored, level).values()) + RESERVE_GIB <= device_gib:
                break
            if changed.micro_batch_tokens <= longest:
                return ""
            changed = replace(changed, micro_batch_tokens=max(longest, changed.micro_batch_tokens // 2))
        words = [what] * bool(what)
        if changed.micro_batch_tokens != job.micro_batch_tokens:
            words.append(f"train.micro_batch_tokens={changed.micro_batch_tokens}")
        if job.activation_checkpointing not in ("auto", level):
            words.append("train.activation_checkpointing=auto")
        return " with ".join(words)

    if cure := with_budget(job, ""):
        return cure
    if not job.reshard_after_forward:
        job = replace(job, reshard_after_forward=True)
        if cure := with_budget(job, "distributed.reshard_after_forward=true"):
            return cure
    offload = replace(job, cpu_offload=True)
    found = [with_budget(offload, "distributed.cpu_offload=true")]
    if not job.lora:
        lora = LoRA(16, 16.0, TARGETS[:4])
        found = [
            with_budget(replace(job, lora=lora), "lora.rank=16"), *found,
            with_budget(replace(offload, lora=lora), "lora.rank=16 distributed.cpu_offload=true"),
        ]  # fmt: skip
    counts = (job.num_gpus * 2**doubled for doubled in range(1, 8))
    more = (with_budget(replace(job, num_gpus=count), f"{count} GPUs") for count in counts)
    found.insert(2, next(filter(None, more), ""))
    helps = list(filter(None, found))[:3]
    return ", or ".join(helps) if helps else "none of notus's means"


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


def device_of(memory_gib: float, flops: float) -> dict[str, Device]:
    """A GPU that is not in the list, by its memory and its dense bfloat16 FLOP/s. ValueError names the wrong number."""
    for name, value, low, high in (("--memory", memory_gib, 1, 2000), ("--flops", flops, 1e12, 1e17)):
        if not low <= value <= high:
            raise ValueError(
                f"{name} {value:g}: must be from {low:g} to {high:g} ({'GiB' if high == 2000 else 'FLOP/s'})"
            )
    return {"this GPU": Device(flops, memory_gib, 32e9, 0.40)}


def plan(
    config: configuration.Config, gpus: int, devices: Mapping[str, Device], lengths: Sequence[int], num_pairs: int
) -> str:
    """The report for `num_pairs` pairs that all have these lengths (prompt, chosen, rejected), in tokens."""
    for name, value, highest in (
        ("--gpus", gpus, configuration.MAX_GPUS), ("--pairs", num_pairs, 10**8), ("--lengths", min(lengths), 10**7),
        ("--lengths", max(lengths), 10**7),
    ):  # fmt: skip
        if not 1 <= value <= highest:
            raise ValueError(f"{name} {value}: must be from 1 to {highest:,}")
    path = Path(config.model.path) / "config.json"
    dims = MistralConfig.read(path.parent) if path.is_file() else MISTRAL_7B
    train = np.tile(lengths, (num_pairs, 1))  # (P, 3)
    test = np.tile(lengths, (HELD_OUT_PAIRS if config.data.test or config.data.test_size else 0, 1))
    prompt, chosen, rejected = lengths
    means = ", UltraFeedback's means at 512 / 1024" if tuple(lengths) == LENGTHS else ""
    lines = [
        f"model       {path if dims is not MISTRAL_7B else f'Mistral-7B; there is no {path}'}",
        f"pairs       {len(train):,} and {len(test):,} held out, of {prompt} + {chosen} + {rejected} tokens{means}",
        describe_cost(dims, job_of(config, gpus), train, test, devices),
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m notus.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="CONFIG section.key=value",
                        help="a TOML file, as for train.py (default: configs/notus-7b-v1.toml), and settings that "
                        "replace the file's")  # fmt: skip
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--device", nargs="+", default=list(DEVICES), choices=DEVICES, metavar="NAME",
                        help=f"of {', '.join(DEVICES)}")  # fmt: skip
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a GPU that is not in the list; with --flops")
    parser.add_argument("--flops", type=float, metavar="FLOP/S", help="its dense bfloat16 peak, e.g. 80e12")
    parser.add_argument("--lengths", type=int, nargs=3, default=LENGTHS, metavar=("PROMPT", "CHOSEN", "REJECTED"),
                        help="tokens of every pair (default: UltraFeedback's means, cut at 512 / 1024)")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help=f"to train on (default: {PAIRS:,})")
    arguments = parser.parse_intermixed_args(argv)
    try:
        path, overrides = configuration.split_words(arguments.words)
        config = configuration.load(path or configuration.CONFIGS / "notus-7b-v1.toml", overrides)
        if (arguments.memory is None) != (arguments.flops is None):
            raise ValueError("--memory and --flops describe a GPU together: give both")
        devices = {name: DEVICES[name] for name in arguments.device}
        if arguments.memory is not None:
            devices = device_of(arguments.memory, arguments.flops)
        print(plan(config, arguments.gpus, devices, arguments.lengths, arguments.pairs))
    except (ValueError, OSError) as error:
        print(f"notus.plan: error: {sentence(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
