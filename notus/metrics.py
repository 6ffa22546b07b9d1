"""What a run says while it trains: metrics.jsonl for machines, one progress bar or plain lines for people.

Names are TRL's: loss, rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen,
logps/rejected, grad_norm, learning_rate, epoch, step; `eval_` in front for the held-out pairs, and eval_runtime in
seconds. notus adds tokens_per_second (stream tokens, all GPUs), mfu (0 to 1), memory_gib, and for each checkpoint
checkpoint_stall_seconds. Rewards and log-probs are in nats.
"""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import torch
from tqdm import tqdm

from notus.cost import peak_flops
from notus.distributed import World
from notus.files import write_atomically
from notus.losses import METRICS


class Log:
    """Everything a run says while it trains: metrics.jsonl for machines, the console for people. With `enabled=False`
    (every rank but 0) it keeps count and says nothing.

    lines, window: those of the checkpoint that a run resumes from. The lines come from there and not from the file,
    which is not synced and may have lost some: the log then reads as if nothing had happened.
    """

    def __init__(
        self, path: Path, world: World, total_steps: int, epoch_steps: int, first_step: int = 0,
        lines: Sequence[dict[str, Any]] = (), window: Sequence[float] = (),
    ):  # fmt: skip
        self.world, self.epoch_steps, self.lines = world, epoch_steps, list(lines)
        # Since the last line of a step: sums of METRICS, and pairs. A checkpoint keeps them.
        self._window = np.array(window) if len(window) else np.zeros(len(METRICS) + 1)
        # Of this process alone, which gives the speed: stream tokens and FLOPs, and since when they count.
        self._work, self._since = np.zeros(2), time.monotonic()
        self._peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
        self._path, self._file = path, self._open(path) if world.rank == 0 else None
        self._console = Console(total_steps, enabled=world.rank == 0, first_step=first_step, every=0.01)

    def _open(self, path: Path) -> TextIO:
        """All lines so far, and then more."""
        write_atomically(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.lines))
        return path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """A line of metrics.jsonl. Values are numbers or scalar tensors; NaN and infinity are written as null.

        A failure (a full disk, say) is reported and training continues. A later line brings those that are missing.
        """
        values = {name: plain(value) for name, value in metrics.items()}
        self.lines.append({"step": step, "epoch": step / self.epoch_steps} | values)
        if self.world.rank == 0:
            try:
                if self._file:
                    self._file.write(json.dumps(self.lines[-1], allow_nan=False) + "\n")
                    self._file.flush()
                else:
                    self._file = self._open(self._path)
            except OSError as error:
                if self._file:
                    self._console.say(
                        f"log         {self._path} cannot be written, training continues: {error.strerror}"
                    )
                self._file = None

    def add(self, sums: Sequence[float], num_pairs: int, num_tokens: int, flops: float) -> None:
        """Count a step in. sums (M,) of METRICS over its pairs."""
        self._window += [*sums, num_pairs]
        self._work += [num_tokens, flops]

    def step(self, step: int, more: dict[str, float]) -> None:
        """Report means over the pairs since the last report, with the speed and `more`."""
        *sums, num_pairs = self._window.tolist()
        num_tokens, flops = self._work.tolist()
        seconds = time.monotonic() - self._since
        line = {name: total / num_pairs for name, total in zip(METRICS, sums, strict=True)} | more
        line |= {"tokens_per_second": num_tokens / seconds, "memory_gib": peak_memory_gib(self.world.device)}
        if self._peak:
            line["mfu"] = flops / seconds / (self._peak * self.world.size)
        self.write(step, line)
        self._console.step(step, line)
        self._window[:], self._work[:], self._since = 0.0, 0.0, time.monotonic()

    def evaluated(self, step: int, line: dict[str, float]) -> None:
        self.write(step, line)
        self._console.say(
            f"held out    step {step}  loss {line['eval_loss']:.4f}  acc {line['eval_rewards/accuracies']:.3f}  "
            f"margin {line['eval_rewards/margins']:.3f}"
        )

    def skipped(self, step: int, places: Sequence[str]) -> None:
        self.write(step, {"skipped_pairs": list(places)})
        self._console.say(f"skipped     step {step}: loss or gradient is not finite; its pairs are in metrics.jsonl")

    def state(self) -> dict[str, list]:
        """What a checkpoint keeps of the log."""
        return {"window": self._window.tolist(), "lines": list(self.lines)}

    def evaluations(self) -> list[dict[str, float | None]]:
        return [
            {name: value for name, value in line.items() if name.startswith("eval_")}
            for line in self.lines
            if "eval_loss" in line
        ]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as time of a step."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def close(self) -> None:
        self._console.close()
        if self.world.rank == 0:
            with suppress(OSError):
                (self._file or self._open(self._path)).close()


def plain(value: Any) -> Any:
    """A Python number; NaN and infinity as None, for JSON has neither."""
    value = value.item() if isinstance(value, torch.Tensor) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Console:
    """Progress of a run of `total_steps`, continuing after `first_step`. On a terminal it is one bar that redraws
    itself. Elsewhere (files, CI, Slurm logs) it is a plain line whenever another share `every` of the steps is done. No
    colours. With `enabled=False` it does nothing."""

    def __init__(
        self, total_steps: int, enabled: bool = True, first_step: int = 0, stream: TextIO | None = None,
        unit: str = "step", every: float = 0.0,
    ):  # fmt: skip
        self.total_steps, self.enabled, self.stream = total_steps, enabled, stream or sys.stderr
        self.unit, self.line_gap, self.last_line = unit, every * total_steps, first_step
        self.since: tuple[int, float] | None = None  # step and time of the first report, which includes warming up
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
        """Report that `step` steps are done. `metrics`: numbers by the names above; absent ones are left out."""
        if not self.enabled:
            return
        eta = self.seconds_left(step)
        if self.bar is not None:
            short = {name: value for name, value in metrics.items() if name not in ON_LINES_ONLY}
            self.bar.set_description_str(short_line(short, eta), refresh=False)
            self.bar.update(step - self.bar.n)
        elif step - self.last_line >= self.line_gap or step == self.total_steps:
            self.last_line, width = step, len(str(self.total_steps))
            print(
                f"{self.unit} {step:{width}}/{self.total_steps}  {short_line(metrics, eta)}",
                file=self.stream,
                flush=True,
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


def short_line(metrics: dict[str, float], eta: float | None) -> str:
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


class Lasting:
    """A stream that may be closed at its other end (`train.py | head`, a terminal that is gone): from then on it writes
    to nowhere, and the run goes on with its files."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._try(self._stream.write, text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, work: Callable, *arguments: Any) -> Any:
        try:
            return work(*arguments)
        except OSError:
            with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())  # or Python's own flush at its exit would fail too
            return 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_console() -> Iterator[None]:
    """stdout and stderr that cannot end a run, nor change its exit code."""
    stdout, stderr = (cast(TextIO, Lasting(stream)) for stream in (sys.stdout, sys.stderr))
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            yield
        finally:  # what is still buffered is tried here, where a closed end does no harm
            stdout.flush()
            stderr.flush()
