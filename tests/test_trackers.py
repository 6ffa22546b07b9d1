"""Trackers have every step once, after a resume too. One that fails is dropped, and the run does not notice."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from forked import assert_same, fill_the_disk, finish, launch, read_metrics, step_strike
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from notus import trackers
from notus.trackers import KINDS, Trackers

LINE = {"step": 3, "epoch": 0.5, "loss": 0.25, "rewards/margins": 1.5, "eval_loss": None, "eval_rewards/margins": 2.0}
NAMED = {"train/epoch": 0.5, "train/loss": 0.25, "train/rewards/margins": 1.5, "eval/rewards/margins": 2.0}


class Fake(ModuleType):
    """wandb and trackio, as far as they are used: both have `init`, which gives a run with `log` and `finish`."""

    def __init__(self, name: str, next_step: int = 0):
        super().__init__(name)
        self.step = self._next_step = next_step
        self.logged: list[tuple[dict, int]] = []
        self.options: dict = {}
        self.finished = False
        self.Html = self.Markdown = lambda text: ("shown", text)

    def init(self, **options) -> "Fake":
        self.options = options
        return self

    def log(self, values: dict, step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    def install(name: str, **options) -> Fake:
        monkeypatch.setitem(sys.modules, name, made := Fake(name, **options))
        return made

    return install


def events(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def test_tensorboard_reads_every_number_of_an_interrupted_run_once(home: Path, truth: Path, tmp_path: Path):
    """It is stopped in step 5, and has then logged a step that no checkpoint has."""
    out = tmp_path / "out"
    assert launch(out, home, "log.to=tensorboard", strikes=(step_strike(15, 5),)).code == 75
    finish(out, home, "log.to=tensorboard")
    read = events(out)
    for line in read_metrics(truth):
        for name, value in line.items():
            if name not in ("step", "samples"):
                tag = f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"
                found = [event.value for event in read.Scalars(tag) if event.step == line["step"]]
                assert found == pytest.approx([value], rel=1e-6), (tag, line["step"])
    texts = read.Tensors("samples/text_summary")
    assert [event.step for event in texts] == [0, 4, 8, 9]
    assert all(b"prompt  " in event.tensor_proto.string_val[0] for event in texts)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_line_and_its_samples_by_their_names(name: str, fake, tmp_path: Path):
    module = fake(name)
    tracker = Trackers([name], tmp_path, "run-1a", {"dpo.beta": 0.1}, pytest.fail)
    tracker.log(LINE, "prompt  <b>\nnow     c")
    tracker.log(LINE | {"step": 4, "skipped_pairs": ["a:1"]})
    tracker.close()
    assert module.options.items() >= {"project": "notus", "name": "run-1a", "resume": "allow"}.items()
    assert module.options["config"] == {"dpo.beta": 0.1}
    (first, at), (second, then) = module.logged
    kind, text = first.pop("samples")
    assert kind == "shown" and ("prompt  &lt;b&gt;" if name == "wandb" else "prompt  <b>") in text
    assert (first, at, second, then) == (NAMED, 3, NAMED, 4)
    assert module.finished


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_what_a_tracker_has_from_before_is_not_sent_again(name: str, fake, tmp_path: Path):
    module = fake(name, next_step=4)
    tracker = Trackers([name], tmp_path, "run", {}, pytest.fail)
    for step in range(1, 7):
        tracker.log({"step": step, "loss": 0.5})
    assert [step for _, step in module.logged] == [4, 5, 6]


def test_trackio_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path)
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path)
    for steps in (range(1, 4), range(1, 6)):  # the second time it is resumed
        tracker = Trackers(["trackio"], tmp_path, "run-1a", {"dpo.beta": 0.1}, pytest.fail)
        for step in steps:
            tracker.log(LINE | {"step": step}, "now     x" if step == 2 else "")
        tracker.close()
    found = SQLiteStorage.get_logs("notus", "run-1a")
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5] and trackio.__version__
    assert all(line.items() >= NAMED.items() for line in found)


@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_one_that_fails_is_said_once_and_the_others_go_on(moment: str, fake, tmp_path: Path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no network")

    broken, works, said = fake("wandb"), fake("trackio"), []
    monkeypatch.setattr(broken, moment, fail)
    tracker = Trackers(["wandb", "trackio"], tmp_path, "run", {}, said.append)
    for step in range(3):
        tracker.log({"step": step, "loss": 0.5})
    tracker.close()
    assert said == ["log         wandb failed and is dropped, training continues: no network"]
    assert len(works.logged) == 3 and works.finished


def test_a_run_whose_tracker_fails_is_the_same_run(home: Path, truth: Path, tmp_path: Path):
    out = tmp_path / "out"
    said = finish(out, home, "log.to=tensorboard", deeds=(no_folder,))
    assert "tensorboard failed and is dropped, training continues: " in said
    assert_same(out, truth)


def no_folder() -> None:
    KINDS["tensorboard"] = lambda *_: fill_the_disk()


def test_one_that_is_not_installed_is_refused_before_weights_are_read(home: Path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr("notus.run.read_base", pytest.fail)
    assert train.main(["run.toml", f"train.output_dir={tmp_path / 'out'}", 'log.to=["wandb"]']) == 2
    assert "log.to: wandb is not installed: pip install -e '.[wandb]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
