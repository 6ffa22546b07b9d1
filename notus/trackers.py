"""TensorBoard, Weights & Biases, trackio: the lines of metrics.jsonl in a dashboard as well, by `log.to`.

Names are those of Hugging Face's integrations: train/loss, train/grad_norm, eval/loss, eval/rewards/accuracies. A
resumed run continues in the tracker, where every step stands once. A tracker that fails is dropped with a sentence: the
training never depends on one. Where they send what they get, and as whom, their own environment variables decide.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, Protocol

from notus.files import sentence

PROJECT = "notus"


def check_installed(names: Sequence[str]) -> None:
    """ValueError for a tracker that is not there."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"log.to: {name} is not installed: pip install -e '.[{name}]'")


class Tracker(Protocol):
    next_step: int  # what is before it, the tracker has from before

    def log(self, step: int, values: dict[str, float], text: str) -> None:
        """`text`: samples of that step, or ""."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`/tensorboard. A resumed run begins a new one, which stands for all of the run."""

    next_step = 0

    def __init__(self, folder: Path, _name: str, _settings: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        for old in (folder / "tensorboard").glob("events.out.tfevents.*"):
            old.unlink()
        self._writer = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)

    def log(self, step: int, values: dict[str, float], text: str) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if text:
            self._writer.add_text("samples", f"```\n{text}\n```", step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    def __init__(self, folder: Path, name: str, settings: dict[str, Any]):
        import wandb

        self._run = wandb.init(project=PROJECT, name=name, id=name, resume="allow", config=settings, dir=str(folder))
        self._text, self.next_step = wandb.Html, self._run.step

    def log(self, step: int, values: dict[str, float], text: str) -> None:
        self._run.log(values | ({"samples": self._text(f"<pre>{escape(text)}</pre>")} if text else {}), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    def __init__(self, _folder: Path, name: str, settings: dict[str, Any]):
        import trackio

        self._run = trackio.init(project=PROJECT, name=name, resume="allow", config=settings, embed=False)
        self._text, self.next_step = trackio.Markdown, self._run._next_step  # there is no public name of it

    def log(self, step: int, values: dict[str, float], text: str) -> None:
        self._run.log(values | ({"samples": self._text(f"```\n{text}\n```")} if text else {}), step=step)

    def close(self) -> None:
        self._run.finish()


KINDS: dict[str, Callable[[Path, str, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio,
}  # fmt: skip


class Trackers:
    """Those of `names`, for the run called `name` with output `folder` and `settings`. say: what is told of one that
    fails."""

    def __init__(
        self, names: Sequence[str], folder: Path, name: str, settings: dict[str, Any], say: Callable[[str], None]
    ):
        self._say = say
        self._open: dict[str, Tracker] = {}
        for kind in names:
            with self._guard(kind):
                self._open[kind] = KINDS[kind](folder, name, settings)

    def log(self, line: dict[str, Any], text: str = "") -> None:
        """A line of metrics.jsonl, and what was sampled in that step."""
        values = {
            f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in line.items()
            if name != "step" and isinstance(value, int | float)
        }
        for kind, tracker in list(self._open.items()):
            with self._guard(kind):
                if line["step"] >= tracker.next_step:
                    tracker.log(line["step"], values, text)

    def close(self) -> None:
        for kind, tracker in list(self._open.items()):
            with self._guard(kind):
                tracker.close()

    @contextmanager
    def _guard(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker may raise
            self._open.pop(kind, None)
            self._say(f"log         {kind} failed and is dropped, training continues: {sentence(error)}")
