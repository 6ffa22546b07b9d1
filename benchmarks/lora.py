"""What LoRA saves: the memory and the time of a real step, beside full tuning of the same shape.

    python benchmarks/lora.py [--rank 16] [--layers 4]
    python benchmarks/lora.py --offload          the optimizer's step on the CPU, which cpu_offload waits for

Random weights and random tokens, with lengths as UltraFeedback has them, a quarter as long. Each variant trains in a
process of its own, by train.train_step, twice, alternating. The peak is the process's own, less what it had before the
model was made. The last line is what the adapter's file takes on disk, beside the merged model's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from step import LEFT_OUT, draw_pairs, run_steps

from notus import distributed
from notus.cost import num_adapter_parameters, num_parameters
from notus.dims import MistralConfig
from notus.lora import TARGETS, LoRA, add_lora, initialize, peft_tensors
from notus.metrics import peak_memory_gib
from notus.model import Mistral
from notus.optim import make_optimizer
from notus.weights import write_file, write_weights

STEPS, PER_STEP = 6, 4
VARIANTS = {"full": (), "LoRA, q k v o": TARGETS[:4], "LoRA, all seven": TARGETS}


def dims_of(layers: int) -> MistralConfig:
    return MistralConfig(2048, 1024, 3584, layers, 16, 8, 64, 1e-5, 10000.0, 4096, False)


def measure(variant: str, layers: int, rank: int, optimizer: str) -> dict:
    world = distributed.start("cpu")
    dims = dims_of(layers)
    pairs = draw_pairs(STEPS * PER_STEP, dims.vocab_size, 0.25)
    before = peak_memory_gib(world.device)
    model = Mistral(dims)
    model.initialize(0)
    lora = LoRA(rank, float(rank), VARIANTS[variant]) if VARIANTS[variant] else None
    if lora:
        add_lora(model, lora, torch.float32)
        initialize(model, 0)
    steps = np.arange(len(pairs)).reshape(STEPS, PER_STEP)
    losses, ends = run_steps(model, pairs, steps, torch.zeros(len(pairs), 2), world, 100_000, optimizer=optimizer)
    assert all(np.isfinite(losses))
    peak = peak_memory_gib(world.device) - before
    sizes = {}
    with tempfile.TemporaryDirectory() as folder:
        if lora:
            write_file(Path(folder) / "adapter.safetensors", peft_tensors(model), torch.float32, 0)
            sizes["adapter"] = (Path(folder) / "adapter.safetensors").stat().st_size
        write_weights(model, Path(folder), torch.float32, 0, 10**12)
        sizes["model"] = (Path(folder) / "model.safetensors").stat().st_size
    trained = num_adapter_parameters(dims, lora) or sum(num_parameters(dims))
    seconds = float(np.median(np.diff(ends)[LEFT_OUT:]))
    held = 4 * sum(num_parameters(dims)) + (4 * trained if lora else 0)  # weights
    held += (8 if optimizer == "rmsprop" else 12) * trained  # gradients and the optimizer's state
    return {"variant": variant, "trained": trained, "gib": peak, "held": held / 2**30, "seconds": seconds, **sizes}


def offload(number: int = 50_000_000) -> None:
    """Seconds for clipping and a step, by parameter, and the same in bytes that a copy would move meanwhile."""
    from_here, to = torch.randn(number), torch.empty(number)

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(4):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    rate = 2 * 4 * number / best(lambda: to.copy_(from_here))  # bytes/s, read and written
    print(f"{torch.get_num_threads()} threads; a copy moves {rate / 1e9:.1f} GB/s")
    for name in ("rmsprop", "adamw"):
        weight = torch.nn.Parameter(torch.randn(number))
        weight.grad = torch.randn(number)
        optimizer = make_optimizer([weight], name, 1e-6, weight_decay=0.0)

        def step(weight: torch.nn.Parameter = weight, optimizer: torch.optim.Optimizer = optimizer) -> None:
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()

        seconds = best(step)
        print(f"{name}: {seconds / number * 1e9:.1f} s for 1e9 parameters, {seconds * rate / number:.0f} bytes each")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4, help="of width 1024")
    parser.add_argument("--optimizer", choices=["rmsprop", "adamw"], default="adamw")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--offload", action="store_true", help="time the optimizers on the CPU instead")
    arguments = parser.parse_args()
    if arguments.offload:
        offload()
        return
    if arguments.variant:
        print(json.dumps(measure(arguments.variant, arguments.layers, arguments.rank, arguments.optimizer)))
        return
    results: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
    for variant in [*VARIANTS] * 2:
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[variant].append(json.loads(done.stdout.splitlines()[-1]))
    base = sum(num_parameters(dims_of(arguments.layers)))
    print(f"{base:,} parameters, rank {arguments.rank}, {arguments.optimizer}, {PER_STEP} pairs a step\n")
    print("| | trained | peak GiB | of which weights, gradients, state | s a step | file of what was learned |")
    print("|---|---|---|---|---|---|")
    for variant, (first, second) in results.items():
        size = first.get("adapter", first["model"])
        print(
            f"| {variant} | {first['trained']:,} | {first['gib']:.2f} | {first['held']:.2f} | "
            f"{min(first['seconds'], second['seconds']):.2f} | {size / 1e6:.1f} MB |"
        )


if __name__ == "__main__":
    main()
