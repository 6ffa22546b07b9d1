"""What a run says while it trains: metrics.jsonl and samples.jsonl for machines, one progress bar or plain lines for
people.

Names are TRL's: loss, rewards/chosen, rewards/rejected, rewards/accuracies, rewards/margins, logps/chosen,
logps/rejected, grad_norm, learning_rate, epoch, step; `eval_` in front for the held-out pairs, and eval_runtime in
seconds. notus adds tokens_per_second (stream tokens, all GPUs), mfu (0 to 1) and memory_gib. A step has one line. What
was done after it stands there too: sample_seconds, checkpoint_stall_seconds. Rewards and log-probs are in nats.
"""

import json
import math
import os
import resource
import shutil
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
from notus.trackers import Trackers


class Log:
    """Everything a run says while it trains: metrics.jsonl and samples.jsonl for machines, the console for people, and
    trackers. On every rank but 0 it keeps count and says nothing.

    lines, window: those of the checkpoint that a run resumes from. The lines come from there and not from the files,
    which are not synced and may have lost some: the log then reads as if nothing had happened.
    """

    def __init__(
        self, folder: Path, world: World, total_steps: int, epoch_steps: int, first_step: int = 0,
        lines: Sequence[dict[str, Any]] = (), window: Sequence[float] = (),
        track: Callable[[Callable[[str], None]], Trackers] | None = None,
    ):  # fmt: skip
        self.world, self.epoch_steps, self.lines = world, epoch_steps, list(lines)
        self._line: dict[str, Any] = {}  # of the step that is not over yet
        # Since the last line of a step: sums of METRICS, and pairs. A checkpoint keeps them.
        self._window = np.array(window) if len(window) else np.zeros(len(METRICS) + 1)
        # Of this process alone, which gives the speed: stream tokens and FLOPs, and since when they count.
        self._work, self._since = np.zeros(2), time.monotonic()
        self._peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
        main = world.rank == 0
        self._console = Console(total_steps, enabled=main, first_step=first_step, every=0.01)
        self._files = [
            Lines(folder / name, part, self.lines, self._console.say)
            for name, part in ((("metrics.jsonl", metrics_of), ("samples.jsonl", samples_of)) if main else ())
        ]
        self._trackers = track(self._console.say) if main and track else None
        for line in self.lines:
            self._track(line)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Add to the line of `step`. Values are numbers or scalar tensors; NaN and infinity are written as null."""
        if self._line.get("step", step) != step:
            self._end_step()
        values = {name: plain(value) for name, value in metrics.items()}
        self._line = {"step": step, "epoch": step / self.epoch_steps} | self._line | values

    def _end_step(self) -> None:
        """All is known of the step: write its line, if it has one."""
        if self._line:
            self.lines.append(self._line)
            for file in self._files:
                file.add(self._line)
            self._track(self._line)
            self._line = {}

    def _track(self, line: dict[str, Any]) -> None:
        if self._trackers:
            text = "\n\n".join(describe_sample(sample) for sample in line.get("samples", ()))
            self._trackers.log(metrics_of(line)[0], text)

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
        evaluations = self.evaluations()
        falls = [*map(chosen_falls, evaluations, evaluations[1:])]
        if falls[-1:] == [True] and falls.count(True) == 1:
            self._console.say(
                "note        the reward of the chosen answers falls while the margin grows. That is\n"
                "            usual: see README.md, 'Why does the reward of the chosen answers fall?'"
            )

    def sampled(self, step: int, samples: Sequence[dict[str, str]], seconds: float) -> None:
        """Answers to some prompts, each {"prompt", "answer"}; those of step 0 stay beside all later ones."""
        if samples:
            first = next(iter(self._all()), {})
            before = {s["prompt"]: s["answer"] for s in first.get("samples", ()) if first["step"] == 0}
            kept = [{"prompt": s["prompt"], "before": before.get(s["prompt"]), "answer": s["answer"]} for s in samples]
            self.write(step, {"samples": kept, "sample_seconds": round(seconds, 3)})
            self._console.say("\n".join(f"sample      {describe_sample(sample, 68)}" for sample in kept))

    def skipped(self, step: int, places: Sequence[str]) -> None:
        self.write(step, {"skipped_pairs": list(places)})
        self._console.say(f"skipped     step {step}: loss or gradient is not finite; its pairs are in metrics.jsonl")

    def state(self) -> dict[str, list]:
        """What a checkpoint keeps of the log."""
        return {"window": self._window.tolist(), "lines": self._all()}

    def _all(self) -> list[dict[str, Any]]:
        return [*self.lines, *([self._line] if self._line else [])]

    def evaluations(self) -> list[dict[str, float | None]]:
        return [
            {name: value for name, value in line.items() if name.startswith("eval_")}
            for line in self._all()
            if "eval_loss" in line
        ]

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """What happens inside does not count as time of a step. Then the step's line is complete, and is written."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._since += time.monotonic() - began
            self._end_step()

    def close(self) -> None:
        self._end_step()
        self._console.close()
        for file in self._files:
            file.close()
        if self._trackers:
            self._trackers.close()


class Lines:
    """A file of JSON lines: `part` of all `lines` of a log. A failure (a full disk, say) is said once, and training
    continues. A later line brings those that are missing."""

    def __init__(
        self, path: Path, part: Callable[[dict[str, Any]], list[dict[str, Any]]], lines: Sequence[dict[str, Any]],
        say: Callable[[str], None],
    ):  # fmt: skip
        self._path, self._part, self._lines, self._say = path, part, lines, say
        self._file, self._failed = self._open(), False

    def _open(self) -> TextIO | None:
        """All lines so far, and then more. There is no file as long as there is nothing in it."""
        text = "".join(map(self._dump, self._lines))
        if not text and not self._path.exists():
            return None
        write_atomically(self._path, text)
        return self._path.open("a", encoding="utf-8")

    def _dump(self, line: dict[str, Any]) -> str:
        return "".join(json.dumps(part, ensure_ascii=False, allow_nan=False) + "\n" for part in self._part(line))

    def add(self, line: dict[str, Any]) -> None:
        """The newest of `lines`."""
        try:
            if self._file:
                self._file.write(self._dump(line))
                self._file.flush()
            else:
                self._file, self._failed = self._open(), False
        except OSError as error:
            if not self._failed:
                self._say(f"log         {self._path} cannot be written, training continues: {error.strerror}")
            self._file, self._failed = None, True

    def close(self) -> None:
        with suppress(OSError):
            if file := self._file or self._open():
                file.close()


def metrics_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    """What of a line of the log is in metrics.jsonl."""
    return [{name: value for name, value in line.items() if name not in ("samples", "eval_slices")}]


def samples_of(line: dict[str, Any]) -> list[dict[str, Any]]:
    """What of it is in samples.jsonl."""
    return [{"step": line["step"]} | sample for sample in line.get("samples", ())]


def describe_sample(sample: dict[str, Any], width: int | None = None) -> str:
    """Three lines, each cut to `width` characters, the prompt at its beginning."""
    prompt = one_line(sample["prompt"])
    prompt = prompt if width is None or len(prompt) <= width else f"...{prompt[3 - width :]}"
    rows = [f"prompt  {prompt}", f"now     {one_line(sample['answer'], width)}"]
    if sample["before"] is not None:
        rows.insert(1, f"before  {one_line(sample['before'], width)}")
    return "\n            ".join(rows)


def one_line(text: str, width: int | None = None) -> str:
    text = " ".join(text.split())
    return text if width is None or len(text) <= width else f"{text[: width - 3]}..."


def chosen_falls(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Between two evaluations: whether the reward of the chosen answers fell below 0 while the margin grew."""
    chosen, margin = (
        [math.nan if line[f"eval_rewards/{name}"] is None else line[f"eval_rewards/{name}"] for line in (before, after)]
        for name in ("chosen", "margins")
    )
    return chosen[1] < min(chosen[0], 0) and margin[1] > margin[0]


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
        self.first_step = first_step
        self.bar: tqdm | None = None  # none before there is something to show

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Report that `step` steps are done. `metrics`: numbers by the names above; absent ones are left out."""
        if not self.enabled:
            return
        eta = self.seconds_left(step)
        if self.stream.isatty():
            start = f"{self.unit} {step}/{self.total_steps} |{'':10}| "
            if self.bar is None:
                self.bar = tqdm(
                    total=self.total_steps, initial=self.first_step, file=self.stream, dynamic_ncols=True,
                    bar_format=self.unit + " {n_fmt}/{total_fmt} |{bar:10}| {desc}",
                )  # fmt: skip
            room = shutil.get_terminal_size().columns - len(start) - 1
            self.bar.set_description_str(short_line(metrics, eta, room), refresh=False)
            self.bar.update(step - self.bar.n)
        elif step - self.last_line >= self.line_gap or step == self.total_steps:
            self.last_line, width = step, len(str(self.total_steps))
            start = f"{self.unit} {step:{width}}/{self.total_steps}  "
            print(start + short_line(metrics, eta, 80 - len(start)), file=self.stream, flush=True)

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
SPARED = ("learning_rate", "grad_norm", "memory_gib", "mfu", "tokens_per_second", "rewards/margins",
          "rewards/accuracies", "loss")  # in this order, where a line has no room  # fmt: skip


def short_line(metrics: dict[str, float], eta: float | None, room: int) -> str:
    """What fits in `room` characters, the time left before all else."""
    parts = {name: text.format(metrics[name]) for name, text in FORMATS.items() if name in metrics}
    parts |= {"eta": f"eta {duration(eta)}"} if eta is not None else {}
    for name in SPARED:
        if len("  ".join(parts.values())) > room:
            parts.pop(name, None)
    return "  ".join(parts.values())


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
