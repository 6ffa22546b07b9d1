"""run.py: whose a folder is, which run it is, what its status says, how it is asked to stop, and in what order inputs
are refused."""

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import pair_set, save_base

from notus import config as configuration
from notus import distributed, run
from notus.base import Frame, read_base
from notus.checkpoint import Checkpoints
from notus.config import FREE_ON_RESUME, SETTINGS, Config
from notus.distributed import World
from notus.files import lock
from notus.run import (
    Inputs,
    Run,
    StopSignal,
    claim,
    describe_difference,
    environment,
    find_run,
    identity_of,
    job_of,
    open_run,
    read_inputs,
    recomputation,
)

ROWS = [{"instruction": "a b", "chosen_response": "c", "rejected_response": word} for word in "defg"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Config:
    for name, rows in (("train", ROWS), ("test", ROWS[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.toml").write_text(
        f"""
        model.path = "{base}"
        [data]
        train = "{tmp_path / "train.jsonl"}"
        test = "{tmp_path / "test.jsonl"}"
        cache_dir = "{tmp_path / "tokens"}"
        [train]
        output_dir = "{tmp_path / "out"}"
        pairs_per_step = 2
        compute_dtype = "float32"
        """
    )
    return configuration.load(tmp_path / "run.toml")


@pytest.fixture(scope="module")
def world():
    world = distributed.start("cpu")
    yield world
    distributed.stop()


# --- inputs --------------------------------------------------------------------------------------------------------


FEW_STEPS = "6 steps are few to learn from, and the first one has a learning rate of 0"
TRAINED_ON = "1 of 1 held-out pairs are also trained on, so held-out figures say less"


def test_all_is_read(settings: Config):
    read = read_inputs(replace(settings, data=replace(settings.data, bos=False, system_prompt="d")))
    assert read.base.dims.hidden_size == 20 and read.base.tokenizer.vocab_size == 15
    assert read.frame == Frame(False, "d", 1024, 512, 0.1) and read.notes == [TRAINED_ON, FEW_STEPS]
    assert len(read.train) == 4 and len(read.test) == 1
    assert read.base.tokenizer.decode(read.train[0].chosen.tolist()) == "c"
    assert read.base.tokenizer.decode(read.train[0].prompt.tolist()[3:4]) == "d"  # <| system |> d
    read = read_inputs(replace(settings, data=replace(settings.data, insert_system=False, test=())))
    assert read.frame.system_prompt is None and len(read.test) == 0


def test_weights_are_checked_before_data_is_read(settings: Config, base: Path, monkeypatch: pytest.MonkeyPatch):
    """Tokenizing takes a minute; a missing file of weights is known in a moment."""
    (base / "model.safetensors").unlink()
    monkeypatch.setattr(run, "load_pairs", lambda *_, **__: pytest.fail("data were read"))
    with pytest.raises(ValueError, match="no weights"):
        read_inputs(settings)


def test_the_output_folder_is_checked_before_anything_is_read(settings: Config, monkeypatch: pytest.MonkeyPatch):
    Path(settings.train.output_dir).write_text("a file")
    monkeypatch.setattr(run, "read_base", lambda *_: pytest.fail("the base was read"))
    with pytest.raises(ValueError, match="out: is a file"):
        read_inputs(settings)


def test_a_dry_run_needs_no_weights(settings: Config, base: Path):
    (base / "model.safetensors").unlink()
    assert len(read_inputs(settings, need_weights=False).train) == 4


def test_what_a_user_should_know_is_said_once(settings: Config, monkeypatch: pytest.MonkeyPatch):
    save_base(Path(settings.model.path), vocab_size=64)  # room for more ids: nothing to say
    assert read_inputs(settings).notes == [TRAINED_ON, FEW_STEPS]
    save_base(Path(settings.model.path), words="a b c d e f g h")
    save_base(Path(settings.model.path).parent / "smaller", vocab_size=15)
    for name in ("config.json", "model.safetensors"):
        (Path(settings.model.path) / name).write_bytes(
            (Path(settings.model.path).parent / "smaller" / name).read_bytes()
        )
    monkeypatch.setattr("notus.base.check_template", lambda *_: ["a note about the template"])
    (larger, template, *others) = read_inputs(settings).notes
    assert larger.startswith("the tokenizer has 16 ids and the embedding 15 rows")
    assert (template, others) == ("a note about the template", [TRAINED_ON, FEW_STEPS])


def test_held_out_pairs_that_are_trained_on_are_said(settings: Config, tmp_path: Path):
    """A copy under another name is not the same file, which config.py refuses."""
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(settings.data.train[0]).read_bytes())
    both = replace(settings.data, test=(*settings.data.test, str(copy)))
    said, _ = read_inputs(replace(settings, data=both)).notes
    assert said == "5 of 5 held-out pairs are also trained on, so held-out figures say less"


# --- the folder ----------------------------------------------------------------------------------------------------


def fill(folder: Path, *names: str, status: str = "") -> Path:
    """A folder with empty files, and with folders where a name ends in a slash."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()
    if status:
        (folder / "status.json").write_text(status)
    return folder


FINISHED = '{"state": "finished", "step": 9}'


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_without_a_run_is_free(tmp_path: Path, fresh: bool):
    assert not find_run(tmp_path / "absent", fresh)
    assert not find_run(fill(tmp_path / "empty"), fresh)
    assert not find_run(fill(tmp_path / "killed at startup", "run.lock", "environment.json.tmp"), fresh)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("status", ["", '{"state": "preempted", "step": 4}', '{"state": "fin', "[]", '{"state": 7}'])
def test_an_unfinished_run_is_found_even_if_its_status_is_damaged(tmp_path: Path, status: str, fresh: bool):
    assert find_run(fill(tmp_path / "a", "environment.json", "run.lock", status=status), fresh)
    assert find_run(fill(tmp_path / "b", "checkpoints/", status=status), fresh)


def test_a_finished_run_is_refused_unless_it_is_to_be_moved(tmp_path: Path):
    folder = fill(tmp_path / "out", "environment.json", "final/", status=FINISHED)
    with pytest.raises(ValueError) as caught:
        find_run(folder, fresh=False)
    assert str(caught.value) == (
        f"{folder}: holds a finished run; choose another train.output_dir, or start again with --fresh, which moves "
        "the old run aside"
    )
    assert find_run(str(folder), fresh=True)


@pytest.mark.parametrize("fresh", [False, True])
def test_what_is_no_run_is_refused(tmp_path: Path, fresh: bool):
    (tmp_path / "file").touch()
    for name, message in {
        "file": "is a file; choose another train.output_dir",
        "photos": "is not empty and holds no run; choose another train.output_dir",
        "checkpoints is a file": "is not empty and holds no run; choose another train.output_dir",
    }.items():
        if name != "file":
            fill(tmp_path / name, "checkpoints" if name != "photos" else "holiday.jpg", "run.lock")
        with pytest.raises(ValueError) as caught:
            find_run(tmp_path / name, fresh)
        assert str(caught.value) == f"{tmp_path / name}: {message}"


def test_a_folder_has_one_owner(tmp_path: Path):
    folder = tmp_path / "deep" / "out"
    with ExitStack() as held:
        assert not claim(folder, False, held)
        for fresh in (False, True):
            with pytest.raises(ValueError) as caught, ExitStack() as second:
                claim(folder, fresh, second)
            assert str(caught.value) == f"{folder}: another process is at work in it"
    fill(folder, "environment.json")
    with ExitStack() as held:
        assert claim(folder, False, held)
    with lock(folder / "run.lock", wait=False):  # it ends with the process, and with `held`
        pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    for folder, reason in ((tmp_path / "file" / "out", "Not a directory"), (tmp_path / "dangling", "File exists")):
        with pytest.raises(ValueError) as caught, ExitStack() as held:
            claim(folder, False, held)
        assert str(caught.value) == f"{folder}: cannot be used as train.output_dir: {reason}"


def test_a_planted_lock_file_is_not_followed(tmp_path: Path):
    (fill(tmp_path / "out") / "run.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(ValueError, match="cannot be used as"), ExitStack() as held:
        claim(tmp_path / "out", False, held)
    assert not (tmp_path / "victim").exists()


def test_fresh_moves_an_old_run_aside(tmp_path: Path, capsys):
    folder = fill(tmp_path / "out", "environment.json", status=FINISHED)
    with ExitStack() as held:
        assert not claim(folder, True, held)
        (aside,) = tmp_path.glob("out.before-????????-??????")
        assert capsys.readouterr().out == f"the run in {folder} was moved to {aside}\n"
        assert (aside / "status.json").read_text() == FINISHED
        assert [path.name for path in folder.iterdir()] == ["run.lock"]
        with pytest.raises(BlockingIOError), lock(folder / "run.lock", wait=False):
            pass
    with ExitStack() as held:
        assert not claim(folder, True, held)  # there is nothing to move
    assert len(list(tmp_path.iterdir())) == 2


def test_fresh_leaves_a_symbolic_link_and_moves_what_it_points_to(tmp_path: Path):
    target = fill(tmp_path / "scratch" / "run", "environment.json")
    (tmp_path / "out").symlink_to(target)
    with ExitStack() as held:
        assert not claim(tmp_path / "out", True, held)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "out").resolve() == target
        (aside,) = (tmp_path / "scratch").glob("run.before-*")
        assert (aside / "environment.json").exists()
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.lock"]
        with pytest.raises(ValueError, match="another process"), ExitStack() as second:
            claim(target, False, second)


# --- which run it is -----------------------------------------------------------------------------------------------


def with_setting(config: Config, name: str, value: object) -> Config:
    section, _, key = name.partition(".")
    return replace(config, **{section: replace(getattr(config, section), **{key: value})})


def another(value: object) -> object:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return tuple(f"{path}.moved" for path in value)
    return value + 1 if isinstance(value, int | float) else f"{value}x"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_part_of_the_identity_or_free(settings: Config, name: str):
    """A file that moved is the same file: its content is what counts."""
    facts = {"data_sha256": dict.fromkeys([*settings.data.train, *settings.data.test], "d"), "model_sha256": "w"}
    facts["data_sha256"] |= {f"{path}.moved": digest for path, digest in facts["data_sha256"].items()}
    base = read_base(settings.model.path)
    old, value = configuration.flat(settings)[name], another(configuration.flat(settings)[name])
    before, after = (identity_of(c, base, facts) for c in (settings, with_setting(settings, name, value)))
    if name in FREE_ON_RESUME:
        assert before == after
    else:
        assert describe_difference(before, after) == (
            f"{name} was {old!r} and is {value!r}. Choose another train.output_dir, or start again with --fresh, which "
            "moves the old run aside"
        )


@pytest.mark.parametrize("name", ["data.train", "data.test", "weights"])
def test_data_and_weights_are_part_of_the_identity(settings: Config, name: str):
    digests = {settings.data.train[0]: "0a", settings.data.test[0]: "0b"}
    path = {"data.train": settings.data.train[0], "data.test": settings.data.test[0]}.get(name)
    base = read_base(settings.model.path)
    old = identity_of(settings, base, {"data_sha256": digests, "model_sha256": "0c"})
    new = identity_of(settings, base, {
        "data_sha256": digests | ({path: "1a"} if path else {}), "model_sha256": "0c" if path else "1a",
    })  # fmt: skip
    said = describe_difference(old, new)
    assert re.match(rf"sha256 of (the )?{re.escape(name)} was .*0.* and is .*1a.*\. Choose another", said), said
    assert said.count(" was ") == 1


def test_another_reference_is_part_of_the_identity_by_its_content(settings: Config):
    base = read_base(settings.model.path)
    digests = {settings.data.train[0]: "0a", settings.data.test[0]: "0b"}
    own = {"data_sha256": digests, "model_sha256": "0c", "reference_sha256": "0c"}
    other = own | {"reference_sha256": "1d", "reference_dims": {"rope_theta": 1e4}}
    moved = with_setting(settings, "dpo.reference", "pi_0")
    assert identity_of(moved, base, own) == identity_of(settings, base, own)
    for changes, said in (
        ({"reference_sha256": "2e"}, "sha256 of another reference was '1d' and is '2e'. Choose"),
        ({"reference_dims": {"rope_theta": 1e6}}, "dims of another reference was {'rope_theta': 10000.0} and is {"),
    ):
        new = identity_of(moved, base, other | changes)
        assert describe_difference(identity_of(moved, base, other), new).startswith(said)
    assert "is missing" in describe_difference(identity_of(moved, base, other), identity_of(moved, base, own))


def test_a_difference_names_what_is_there_and_what_is_not():
    said = describe_difference({"a": 1, "b": 2, "gone": None}, {"a": 1, "b": 3, "new": None})
    assert said.startswith("b was 2 and is 3; gone was None and is missing; new was missing and is None. Choose")
    assert len(describe_difference({"template": "x" * 9999}, {"template": "y" * 9999})) < 600


def run_once(settings: Config, world: World) -> Run:
    with ExitStack() as held:
        return open_run(settings, read_inputs(settings), world, False, held)


def test_a_new_run_leaves_its_facts(settings: Config, world: World):
    opened = run_once(settings, world)
    assert (opened.output, opened.first_step, opened.epoch_steps, opened.manifest) == (
        Path(settings.train.output_dir), 0, 2, None,
    )  # fmt: skip
    assert opened.open_log(world).state() == {"window": [0.0] * 8, "lines": []}
    facts = json.loads((opened.output / "environment.json").read_text())
    assert facts == json.loads(json.dumps(opened.facts))
    assert {name: facts[name] for name in ("processes", "train_pairs", "test_pairs", "steps")} == {
        "processes": 1, "train_pairs": 4, "test_pairs": 1, "steps": 6,
    }  # fmt: skip
    assert facts["settings"]["train.pairs_per_step"] == 2
    assert facts["identity"]["sha256 of the weights"] == facts["model_sha256"]
    assert facts["identity"]["sha256 of data.train"] == [facts["data_sha256"][settings.data.train[0]]]
    assert configuration.load(opened.output / "config.toml") == settings


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_weights(base: Path, _settings: Config) -> None:
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def other_tokenizer(base: Path, _settings: Config) -> None:
    path = base / "tokenizer.json"
    path.write_text(path.read_text().replace('"f": 13', '"f": 14').replace('"g": 14', '"g": 13'))


def fewer_rows(_base: Path, settings: Config) -> None:
    path = Path(settings.data.train[0])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))


CHANGES = {
    "config.json: rope_theta": lambda base, _: change_json(base / "config.json", rope_theta=5e5),
    "config.json: rms_norm_eps": lambda base, _: change_json(base / "config.json", rms_norm_eps=1e-6),
    "config.json: sliding_window": lambda base, _: change_json(base / "config.json", sliding_window=8),
    "tokenizer": other_tokenizer,
    "template": lambda base, _: (base / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ' ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    ),
    "sha256 of the weights": other_weights,
    "sha256 of data.train": fewer_rows,
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_run_is_resumed_only_over_the_same_files(settings: Config, base: Path, world: World, what: str):
    out = run_once(settings, world).output
    assert run_once(settings, world).output == out  # nothing changed
    CHANGES[what](base, settings)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError) as caught:
        run_once(settings, world)
    said = str(caught.value)
    assert said.startswith(f"{out}: holds an unfinished run of another kind: ")
    assert what in said.partition(" was ")[0] and said.count(" was ") == 1, said
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def save_a_checkpoint(opened: Run, world: World, identity: dict, step: int = 4) -> None:
    model = torch.nn.Linear(2, 2)
    checkpoints = Checkpoints(opened.output / "checkpoints", 2, world, print)
    facts = {"identity": identity, "window": [1.0, 2.0], "lines": [{"step": step, "loss": 0.5}]}
    checkpoints.save(model, torch.optim.SGD(model.parameters()), step, facts)
    checkpoints.wait()


def test_a_run_resumes_from_its_newest_checkpoint_with_its_log(settings: Config, world: World):
    opened = run_once(settings, world)
    save_a_checkpoint(opened, world, opened.facts["identity"])
    resumed = run_once(settings, world)
    assert resumed.first_step == resumed.manifest["step"] == 4
    last = {"step": 4, "epoch": 2.0, "loss": 0.5, "checkpoint_stall_seconds": resumed.manifest["stall_seconds"]}
    assert resumed.open_log(world).state() == {"lines": [last], "window": [1.0, 2.0]}
    assert resumed.facts["run_id"] == opened.facts["run_id"]  # by which trackers know it


def test_checkpoints_carry_the_identity_too(settings: Config, world: World):
    """environment.json can be lost, or damaged."""
    opened = run_once(settings, world)
    written = (opened.output / "environment.json").read_text()
    flipped = written.replace('"dpo.beta": 0.1', '"dpo.beta": 0.3')  # in the settings and in the identity
    assert flipped.count('"dpo.beta": 0.3') == 2
    for content in ("{", "[]", '{"identity": 7}', flipped):
        (opened.output / "environment.json").write_text(content)
        run_once(settings, world)
    save_a_checkpoint(opened, world, opened.facts["identity"] | {"dpo.beta": 0.7})
    with pytest.raises(ValueError) as caught:
        run_once(settings, world)
    checkpoint = opened.output / "checkpoints" / "step-00000004"
    assert str(caught.value).startswith(
        f"{checkpoint}: is a checkpoint of another run: dpo.beta was 0.7 and is 0.1. Choose another"
    )


def test_the_environment_is_what_it_takes_to_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.jsonl").write_bytes(b"rows")
    monkeypatch.setattr(run.sys, "argv", ["train.py", "run.toml"])
    answers = {"rev-parse": "0123abcd\n", "status": " M train.py\n"}
    monkeypatch.setattr(run.shutil, "which", lambda _: "git")

    def git(command: list[str], **_: object) -> subprocess.CompletedProcess:
        answer = answers.get(command[1])
        return subprocess.CompletedProcess(command, 128 if answer is None else 0, answer or "")

    monkeypatch.setattr(run.subprocess, "run", git)
    found = environment([tmp_path / "a.jsonl"])
    assert found["command"] == ["train.py", "run.toml"] and found["git_commit"] == "0123abcd with changes"
    assert found["data_sha256"] == {str(tmp_path / "a.jsonl"): hashlib.sha256(b"rows").hexdigest()}
    assert found["versions"].keys() >= {"notus", "python", "torch", "numpy", "safetensors", "tokenizers"}
    assert found["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert found["devices"] and found["threads"] >= 1
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", found["started"])
    answers["status"] = ""
    assert environment([])["git_commit"] == "0123abcd"
    answers.clear()  # no repository
    assert environment([])["git_commit"] == "unknown"
    monkeypatch.setattr(run.shutil, "which", lambda _: None)
    assert environment([])["git_commit"] == "unknown"


def test_the_cost_of_a_run_is_that_of_its_settings(settings: Config):
    changed = settings
    for name in (
        "train.micro_batch_tokens", "train.pairs_per_step", "train.compile", "distributed.cpu_offload",
        "distributed.reshard_after_forward",
    ):  # fmt: skip
        changed = with_setting(changed, name, another(configuration.flat(settings)[name]))
    job = job_of(with_setting(changed, "distributed.replicate", 2), 8)
    assert (job.num_gpus, job.replicate, job.dtype, job.optimizer) == (8, 2, torch.float32, "adamw")
    assert (job.micro_batch_tokens, job.pairs_per_step, job.compile, job.cpu_offload) == (16385, 3, True, True)
    assert not job.reshard_after_forward
    alone, inputs = World(0, 1, torch.device("cpu"), None), read_inputs(settings)
    assert recomputation(settings, inputs, alone) == "none"  # without a GPU there is no need
    asked = with_setting(settings, "train.activation_checkpointing", "half")
    assert recomputation(asked, inputs, alone) == "half"


# --- how far it got ------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(tmp_path: Path, world: World) -> Run:
    """A run of 9 steps with two whole checkpoints and one that is being written."""
    for name in ("step-00000004", "step-00000006", "step-00000008.tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    facts = {"steps": 9, "settings": {
        "train.num_train_epochs": 3, "train.optimizer": "adamw", "train.export_dtype": "bfloat16",
        "train.keep_checkpoints": 3, "lora.rank": 0, "lora.alpha": 16.0, "lora.targets": ["q_proj"],
        "lora.export": "merged",
    }}  # fmt: skip
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3, world, print)
    return Run(tmp_path, facts, checkpoints, None, StopSignal(), rank=0)


def status_of(opened: Run) -> dict:
    return json.loads((opened.output / "status.json").read_text())


def test_status_says_what_can_be_resumed(opened: Run, tmp_path: Path):
    for state in ("running", "preempted", "failed"):
        opened.status(state)
        assert status_of(opened) == {"state": state, "step": 6}
    opened.status("finished")
    assert status_of(opened) == {"state": "finished", "step": 9}  # they are all in the exported model
    for name in ("step-00000004", "step-00000006"):
        (tmp_path / "checkpoints" / name).rmdir()
    opened.status("running")
    assert status_of(opened) == {"state": "running", "step": 0}
    replace(opened, rank=1).status("failed")  # one rank speaks
    assert status_of(opened) == {"state": "running", "step": 0}


def test_status_is_written_on_a_full_disk(opened: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    opened.status("preempted")
    monkeypatch.setattr(run, "write_atomically", full)
    (tmp_path / "checkpoints" / "step-00000006").rmdir()
    opened.status("failed")  # a shorter text, in place
    assert status_of(opened) == {"state": "failed", "step": 4}
    (tmp_path / "status.json").unlink()
    opened.status("failed")  # nothing to write it into, and no reason to end a run
    assert not (tmp_path / "status.json").exists()


def test_a_stop_says_what_is_kept_and_what_to_do(opened: Run, tmp_path: Path):
    assert opened.describe_stop(1007, fresh=False) == (
        "stopped after step 1,007, as asked; the newest checkpoint is of step 6, and the same command resumes from "
        "there"
    )
    assert opened.describe_stop(7, fresh=True).endswith("the same command without --fresh resumes from there")
    for name in ("step-00000004", "step-00000006"):
        (tmp_path / "checkpoints" / name).rmdir()
    assert opened.describe_stop(0, fresh=False) == (
        "stopped after step 0, as asked; there is no checkpoint yet, and the same command starts from the beginning"
    )


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("keep", [1, 3])
@pytest.mark.parametrize("trained", ["all", "adapter", "merged"])
def test_too_little_room_on_the_disk_is_said(opened: Run, base: Path, monkeypatch, optimizer, dtype, keep, trained):
    tensors = load_file(base / "model.safetensors")
    parameters = checkpointed = sum(tensor.numel() for tensor in tensors.values())
    if trained != "all":
        opened.facts["settings"] |= {"lora.rank": 3, "lora.export": trained}
        checkpointed = sum(3 * sum(tensor.shape) for name, tensor in tensors.items() if "q_proj" in name)
    inputs = Inputs(read_base(base), Frame(), pair_set([]), pair_set([]), [], read_base(base))
    names = ("train.optimizer", "train.export_dtype", "train.keep_checkpoints")
    opened.facts["settings"] |= dict(zip(names, (optimizer, dtype, keep), strict=True))
    more = {1: 1, 3: 2}[keep]  # two of keep + 1 are there; at least one more is written
    checkpoint = checkpointed * {"adamw": 12, "rmsprop": 8}[optimizer]
    exported = 4 * checkpointed if trained == "adapter" else parameters * {"bfloat16": 2, "float32": 4}[dtype]
    needed = more * checkpoint + exported
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    assert opened.disk_notes(inputs) == []
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    (note,) = opened.disk_notes(inputs)
    assert note.startswith(f"the disk of {opened.output} has {(needed - 1) / 2**30:.3g} GiB free, and the run needs ")
    assert f"a checkpoint takes {checkpoint / 2**30:.3g}" in note


# --- signals -------------------------------------------------------------------------------------------------------

ASKING = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch):
    """Exit codes come into `stop.left` instead of ending this process."""
    left: list[int] = []
    monkeypatch.setattr(run.os, "_exit", left.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with StopSignal() as stop:
        stop.left = left
        yield stop


def time_passes(stop: StopSignal, seconds: float) -> None:
    stop._first -= seconds


@pytest.mark.parametrize("number", ASKING)
def test_a_signal_asks_once_and_a_second_one_leaves(stop: StopSignal, number: int, capfd):
    assert not stop.received
    os.kill(os.getpid(), number)
    assert stop.received and stop.left == []
    said = capfd.readouterr().err
    assert ("Ctrl-C again leaves at once" in said) == (number == signal.SIGINT)  # to a person
    os.kill(os.getpid(), number)  # the same request by another road
    time_passes(stop, StopSignal.ECHO_SECONDS[number] - 0.5)
    os.kill(os.getpid(), number)
    assert stop.left == [] and capfd.readouterr().err == ""
    time_passes(stop, 1.0)
    os.kill(os.getpid(), number)
    assert stop.left == [128 + number]
    assert "left at once; the newest checkpoint is what is kept" in capfd.readouterr().err


def test_each_kind_of_signal_counts_as_the_second(stop: StopSignal):
    for number in ASKING:
        os.kill(os.getpid(), number)
    time_passes(stop, 10)
    for number in ASKING:
        os.kill(os.getpid(), number)
    assert stop.left == [128 + number for number in ASKING]


def test_only_the_first_rank_answers_a_person(stop: StopSignal, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.received and capfd.readouterr().err == ""


def test_a_closed_terminal_stops_a_run_only_under_torchrun(stop: StopSignal, monkeypatch):
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.received
    monkeypatch.setenv("WORLD_SIZE", "1")
    with StopSignal() as other:
        os.kill(os.getpid(), signal.SIGHUP)
        assert other.received


def test_handlers_are_put_back_and_threads_set_none():
    def handlers() -> list:
        return [signal.getsignal(number) for number in StopSignal.ECHO_SECONDS]

    before = handlers()
    with StopSignal():
        assert all(now != then for now, then in zip(handlers(), before, strict=True))
    assert handlers() == before

    def elsewhere() -> None:  # a notebook's thread, say
        with StopSignal() as stop:
            seen.append((handlers() == before, stop.received))

    seen: list = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(True, False)]


@pytest.mark.parametrize("number", ASKING)
def test_a_process_leaves_with_the_code_of_its_signal(number: int):
    """Even if the same Ctrl-C ended who reads its stderr."""
    child = os.fork()
    if child == 0:
        try:
            os.close(2)
            with StopSignal() as stop:
                os.kill(os.getpid(), number)
                assert stop.received
                time_passes(stop, 10)
                os.kill(os.getpid(), number)
        finally:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + number
