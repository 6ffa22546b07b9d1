"""What a run says: metrics.jsonl for machines, one progress bar or plain lines for people.

Names are TRL's: loss, rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen,
logps/rejected, grad_norm, learning_rate, epoch, step; `eval_` in front for the held-out pairs, and eval_runtime in
seconds. notus adds tokens_per_second (stream tokens, all GPUs), mfu (0 to 1), memory_gib, and for each checkpoint
checkpoint_stall_seconds. Rewards and log-probs are in nats.
"""

import json
import math
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

import notus
from notus.data import file_digest
from notus.weights import write_atomically


class MetricsLog:
    """Append-only JSONL, one object a line, on disk as soon as written. With `enabled=False` (every rank but 0) it does
    nothing.

    A run that goes on after `last_step` keeps the lines up to that step, in `kept`, and writes those after it anew: the
    file then reads as if nothing had happened.
    """

    def __init__(self, path: str | Path, enabled: bool = True, last_step: int | None = None):
        self.file, self.kept = None, []
        if enabled:
            path = Path(path)
            if last_step is not None and path.exists():
                whole_lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()  # a kill may tear one
                self.kept = [record for record in map(json.loads, whole_lines) if record["step"] <= last_step]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in self.kept))
            self.file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        """Values are numbers or scalar tensors."""
        if self.file:
            self.file.write(json.dumps({name: plain(value) for name, value in metrics.items()}, allow_nan=False) + "\n")
            self.file.flush()

    def close(self) -> None:
        if self.file:
            self.file.close()


def plain(value: Any) -> Any:
    """A Python number; NaN and infinity as None, for JSON has neither."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """Progress of a run of `total_steps`, continuing after `first_step`. On a terminal one bar that redraws itself,
    elsewhere (files, CI, Slurm logs) a plain line whenever another share `every` of the steps is done. No colours.
    With `enabled=False` it does nothing."""

    def __init__(
        self, total_steps: int, enabled: bool = True, first_step: int = 0, stream: TextIO | None = None,
        unit: str = "step", every: float = 0.0,
    ):  # fmt: skip
        self.total_steps, self.enabled, self.stream = total_steps, enabled, stream or sys.stderr
        self.unit, self.line_gap, self.last_line = unit, every * total_steps, first_step
        self.since: tuple[int, float] | None = None  # step and time of the first report: it has paid for warming up
        self.bar = None
        if enabled and self.stream.isatty():
            self.bar = tqdm(
                total=total_steps,
                initial=first_step,
                file=self.stream,
                dynamic_ncols=True,
                bar_format=unit + " {n_fmt}/{total_fmt} |{bar:16}| {desc}",
            )

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Report after `step` steps are done. `metrics`: numbers by the names above; what is absent is left out."""
        if not self.enabled:
            return
        eta = self.seconds_left(step)
        if self.bar is not None:
            short = {name: value for name, value in metrics.items() if name not in ON_LINES_ONLY}
            self.bar.set_description_str(summary(short, eta), refresh=False)
            self.bar.update(step - self.bar.n)
        elif step - self.last_line >= self.line_gap or step == self.total_steps:
            self.last_line, width = step, len(str(self.total_steps))
            print(
                f"{self.unit} {step:{width}}/{self.total_steps}  {summary(metrics, eta)}", file=self.stream, flush=True
            )

    def seconds_left(self, step: int) -> float | None:
        now = time.monotonic()
        if self.since is None:
            self.since = step, now
        first, start = self.since
        return (self.total_steps - step) * (now - start) / (step - first) if step > first else None

    def say(self, text: str) -> None:
        """Print `text` above the bar."""
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        elif self.enabled:
            print(text, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


FORMATS = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "acc {:.2f}",
    "rewards/margins": "margin {:.2f}",
    "learning_rate": "lr {:.1e}",
    "grad_norm": "grad {:.1f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "{:.1%} MFU",
    "memory_gib": "{:.1f} GiB",
}
ON_LINES_ONLY = {"learning_rate", "grad_norm", "mfu", "memory_gib"}  # a bar has to fit 100 columns


def summary(metrics: dict[str, float], eta: float | None) -> str:
    parts = [text.format(metrics[name]) for name, text in FORMATS.items() if name in metrics]
    return "  ".join(parts + ([f"eta {duration(eta)}"] if eta is not None else []))


def duration(seconds: float) -> str:
    """1h02m, 3m20s or 45s."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}h{m:02}m" if hours else f"{m}m{s:02}s" if m else f"{s}s"


def peak_memory_gib(device: torch.device) -> float:
    """Peak of this process: what PyTorch has reserved on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of one unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def environment(files: Sequence[str | Path]) -> dict[str, Any]:
    """What it takes to run this again: commit, versions, devices, command line, and the sha256 of each data file."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if shutil.which("git") else None
    changed = commit and git("status", "--porcelain", "--untracked-files=no")
    packages = ("torch", "numpy", "safetensors", "tokenizers")
    return {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": f"{commit} with changes" if changed else commit or "unknown",
        "versions": {
            "notus": notus.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in packages},
            **({"cuda": torch.version.cuda} if torch.version.cuda else {}),
        },
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [platform.machine()],
        "data_sha256": {str(path): file_digest(path) for path in files},
    }
