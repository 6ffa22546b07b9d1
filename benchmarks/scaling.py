"""How does the cost of a step grow: with processes, lengths, pairs, and the rows that the head scores?

    python benchmarks/scaling.py                        all four parts; seven minutes on a CPU with two cores
    python benchmarks/scaling.py --parts lengths head   some of them

Every figure but the head's is step.py's, run here as a process of its own, under torchrun if it needs several. The
settings of a part alternate, round by round; a figure is the median over rounds, a ratio the median over rounds of the
ratio within a round. On GPUs `processes` takes 1, 2, 4, ... of them, and the other parts take one.

processes  The same pairs a step on more ranks. On a CPU they share the same cores, so 100 % is the best they can do;
           more of them than cores wait for each other, and a lone float32 process goes without FSDP2. Exits with 1 if
           a loss of any step is not one process's: weights and pairs are the same for all.
lengths    Longer pairs, and fewer of them, so that a step has about as many tokens: one should cost the same, but for
           attention, whose share is counted: the FLOPs that grow with the square of the length.
pairs      More pairs a step, in micro-batches of a fixed budget of tokens: pairs/s should only rise, for the optimizer
           works once a step, and the memory stay within what the budget needs.
head       Forward and backward of token_logps, and of a plain log_softmax of all rows: peak memory beyond inputs and
           gradients, each in a process of its own. Exits with 1 if token_logps needs more than logprobs.py says.

Legend: R response tokens (rows of the head), D model dimension, V vocabulary.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
import torch
from step import LEFT_OUT, draw_pairs, markdown, shape
from torch import Tensor

from notus.cost import forward_flops
from notus.logprobs import CHUNK_ROWS, KEEP_BYTES, token_logps

MIB = 2**20
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}  # of a step's loss: other micro-batches round otherwise
VOCAB_SIZE, HEAD_ROWS = 32000, [512, 1024, 2048, 4096, 8192, 16384]
CHUNKS_ALIVE, SLACK_MIB = 2, 32  # of logits, as logprobs.py says; libraries
DEFAULTS = {
    "cpu": {"shape": shape("bal"), "pairs": 4, "scales": [0.125, 0.25, 0.5], "budget": 768},
    "cuda": {"shape": shape("7b:4"), "pairs": 16, "scales": [0.25, 0.5, 1.0], "budget": 8192},
}
HEADS = {"cpu": (256, torch.float32), "cuda": (4096, torch.bfloat16)}  # D, dtype


def run_step(arguments: argparse.Namespace, processes: int = 1, **settings: float) -> dict:
    """step.py once, in so many processes; on a CPU they share the cores that this process would use."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] * (processes > 1)
    settings |= {"shape": arguments.shape[0], "steps": arguments.steps, "device": arguments.device}
    step = [str(Path(__file__).with_name("step.py")), *(f"--{name}={value}" for name, value in settings.items())]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    command = [sys.executable, *launcher, *step]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])[0]


def alternate(arguments: argparse.Namespace, part: str, all_settings: dict[float, dict]) -> list[dict]:
    """A row for each: its settings, medians over rounds, and against the first one `ratio` (of pairs/s) and
    `token_cost` (of s/token). `losses` (rounds, steps)."""
    runs = {name: [] for name in all_settings}
    for number in range(arguments.rounds):
        for name, settings in all_settings.items():
            runs[name].append(run_step(arguments, **settings))
            print(f"{part} {name}, round {number + 1}: {runs[name][-1]['pairs_per_second']:.2f} pairs/s", flush=True)
    first = next(iter(runs.values()))

    def ratio(key: str, ours: list[dict]) -> float:
        return median(our[key] / other[key] for our, other in zip(ours, first, strict=True))

    return [
        {**all_settings[name], **{key: ours[0][key] for key in ("device", "dtype", "pairs_per_step")}}
        | {key: median(one[key] for one in ours) for key in ours[0] if key.endswith(("_second", "_share", "_gib"))}
        | {"ratio": ratio("pairs_per_second", ours), "token_cost": 1 / ratio("tokens_per_second", ours)}
        | {"losses": [one["losses"] for one in ours]}
        for name, ours in runs.items()
    ]


def table(title: str, rows: list[dict], columns: dict[str, str]) -> None:
    """columns: heading -> format of a row's values."""
    print(f"\n{title}\n\n{markdown(rows, list(columns.items()))}\n", flush=True)


# --- the parts: what each prints; rows for JSON; an error or "" -------------------------------------------------------


def processes(arguments: argparse.Namespace) -> tuple[list[dict], str]:
    cuda, counts = arguments.device == "cuda", arguments.processes
    batch = math.lcm(*counts) * arguments.pairs // 2
    rows = alternate(arguments, "processes", {n: {"processes": n, "pairs": batch // n} for n in counts})
    for row in rows:
        row["efficiency"] = row["ratio"] / (row["processes"] / counts[0] if cuda else 1)
        row["loss_difference"] = float(np.abs(np.subtract(row["losses"], rows[0]["losses"])).max())
    table(
        f"{arguments.shape[0]}, {batch} pairs a step whatever the number of processes",
        rows,
        {
            "processes": "{processes} x {device}", "pairs/s": "{pairs_per_second:.2f}",
            "efficiency": "{efficiency:.0%}", "reference pairs/s": "{reference_pairs_per_second:.2f}",
            "peak GiB of a rank": "{memory_gib:.2f}", "losses differ at most": "{loss_difference:.1e}",
        },
    )  # fmt: skip
    tolerance = TOLERANCE[rows[0]["dtype"]]
    agree = all(row["loss_difference"] <= tolerance for row in rows)  # not with NaN
    return rows, "" if agree else f"losses of some processes differ by more than {tolerance}"


def lengths(arguments: argparse.Namespace) -> tuple[list[dict], str]:
    scales, dims = arguments.scales, arguments.shape[1]
    counts = {scale: round(arguments.pairs * max(scales) / scale) for scale in scales}
    rows = alternate(arguments, "scale", {scale: {"scale": scale, "pairs": counts[scale]} for scale in scales})
    for row in rows:
        drawn = draw_pairs(row["pairs"] * arguments.steps, dims.vocab_size, row["scale"]).lengths  # as step.py does
        once, twice = (forward_flops(dims, n * drawn).sum() for n in (1, 2))  # linear + square, 2 linear + 4 square
        row["tokens_per_pair"], row["attention_share"] = drawn.sum(axis=1).mean(), (twice - 2 * once) / 2 / once
        row["gflops_per_second"] = row["flops_per_second"] / 1e9
    table(
        f"{arguments.shape[0]}, about as many tokens a step whatever their lengths",
        rows,
        {
            "scale": "{scale}", "tokens a pair": "{tokens_per_pair:.0f}", "pairs a step": "{pairs}",
            "tokens/s": "{tokens_per_second:,.0f}", "a token costs": "{token_cost:.2f}x",
            "GFLOP/s": "{gflops_per_second:,.0f}", "of peak": "{peak_share:.0%}",
            "attention's share": "{attention_share:.1%}",
        },
    )  # fmt: skip
    return rows, ""


def pairs(arguments: argparse.Namespace) -> tuple[list[dict], str]:
    budget, counts = arguments.budget, [arguments.pairs * n for n in (1, 2, 4)]
    rows = alternate(arguments, "pairs", {n: {"pairs": n, "budget": budget} for n in counts})
    table(
        f"{arguments.shape[0]}, micro-batches of at most {budget} tokens",
        rows,
        {
            "pairs a step": "{pairs}", "pairs/s": "{pairs_per_second:.2f}", "of the first": "{ratio:.2f}x",
            "of peak": "{peak_share:.0%}", "peak GiB": "{memory_gib:.2f}",
        },
    )  # fmt: skip
    return rows, ""


def head(arguments: argparse.Namespace) -> tuple[list[dict], str]:
    width, dtype = HEADS[arguments.device]
    # Every tensor is given back to the system at once, so that the resident set is what is alive.
    environment, rows = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}, []
    for count in arguments.rows:
        kept = count * VOCAB_SIZE * dtype.itemsize
        row = {"rows": count, "kept_mib": kept / MIB if kept <= KEEP_BYTES else 0.0}
        # And whatever the rows: a chunk's share of the gradient by the weight, and in bfloat16 their sum in float32.
        weight = VOCAB_SIZE * width * (4 if dtype == torch.float32 else 4 + dtype.itemsize)
        logits = CHUNKS_ALIVE * min(count, CHUNK_ROWS) * VOCAB_SIZE * 4
        row["bound_mib"] = row["kept_mib"] + (logits + weight) / MIB + SLACK_MIB
        for way in ("token_logps", "plain"):
            command = [sys.executable, __file__, "--device", arguments.device, "--head", way, str(count)]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            row[f"{way}_mib"] = int(done.stdout) / MIB
        rows.append(row)
    table(
        f"head, vocabulary {VOCAB_SIZE} x {width}, {str(dtype).removeprefix('torch.')}: peak MiB beyond inputs and "
        "gradients",
        rows,
        {
            "rows": "{rows:,}", "token_logps": "{token_logps_mib:,.0f}", "of it softmax kept": "{kept_mib:,.0f}",
            "allowed": "{bound_mib:,.0f}", "plain log_softmax": "{plain_mib:,.0f}",
        },
    )  # fmt: skip
    over = [row["rows"] for row in rows if row["token_logps_mib"] > row["bound_mib"]]
    return rows, f"token_logps needs more memory than allowed for {over} rows" if over else ""


def head_bytes(way: str, rows: int, device: torch.device) -> int:
    """Peak of forward and backward beyond the inputs and their gradients, in this process."""
    width, dtype = HEADS[device.type]
    weight = torch.randn(VOCAB_SIZE, width, dtype=dtype, device=device).requires_grad_()  # (V, D)
    hidden = torch.randn(rows, width, dtype=dtype, device=device).requires_grad_()  # (R, D)
    target = torch.randint(VOCAB_SIZE, (rows,), device=device)

    def forward_backward(hidden: Tensor, target: Tensor) -> None:
        if way == "token_logps":
            logps = token_logps(hidden, weight, target)
        else:
            log_softmax = (hidden @ weight.T).log_softmax(-1, dtype=torch.float32)  # (R, V)
            logps = log_softmax.gather(1, target[:, None]).squeeze(1)
        logps.sum().backward()

    forward_backward(hidden[:16].detach().requires_grad_(), target[:16])  # libraries take what they need
    weight.grad = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, back to VmRSS
        start = status_bytes("VmRSS")
    forward_backward(hidden, target)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else status_bytes("VmHWM")
    return peak - start - hidden.grad.nbytes - weight.grad.nbytes


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


PARTS = {"processes": processes, "lengths": lengths, "pairs": pairs, "head": head}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shape", type=shape, help="as for step.py (default: bal on a CPU, 7b:4 on GPUs)")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", metavar="N", help="how many (default: 1, 2, 4, ...)")
    parser.add_argument("--scales", type=float, nargs="+", metavar="SCALE", help="of the lengths, as for step.py")
    parser.add_argument("--rows", type=int, nargs="+", default=HEAD_ROWS, metavar="R", help="of the head")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--head", nargs=2, metavar=("WAY", "R"), help="one measurement alone, by the parent process")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name, None) is None:
            setattr(arguments, name, value)
    if arguments.head:
        print(head_bytes(arguments.head[0], int(arguments.head[1]), torch.device(arguments.device)))
        return 0
    if arguments.steps <= LEFT_OUT:
        parser.error(f"--steps is {arguments.steps}; the first {LEFT_OUT} do not count")
    if arguments.processes is None:
        most = torch.cuda.device_count() if arguments.device == "cuda" else min(4, 2 * torch.get_num_threads())
        arguments.processes = [n for n in (1, 2, 4, 8) if n <= most]

    results = {part: PARTS[part](arguments) for part in arguments.parts}
    print(json.dumps({part: rows for part, (rows, _) in results.items()}))
    errors = [error for _, error in results.values() if error]
    for error in errors:
        print(f"scaling.py: error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
