"""Law 7: killed at any moment and resumed = never interrupted, bit for bit on the same layout, to rounding on another.

Runs are real ones, of train.main, in forked processes (forked.py).
"""

import functools
import itertools
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # torch's optimizers import it in their first step
import torch.distributed.checkpoint as dcp
from forked import (
    FORKS,
    ROOT,
    TRAIN_PAIRS,
    Signal,
    Strike,
    assert_same,
    die,
    do_and_die,
    fill_the_disk,
    finish,
    is_finished,
    join,
    last_step,
    launch,
    log_of,
    no_curves,
    own_caches,
    read_metrics,
    read_status,
    same_tensors,
    start,
    start_ranks,
    step_strike,
    steps_of,
    take_no_echoes,
    torchrun,
    wait_until,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_pairs, tiny_config, tiny_model
from torch.distributed.checkpoint import HuggingFaceStorageWriter

import train
from notus import config as configuration
from notus import distributed
from notus.checkpoint import Checkpoints, StreamingWriter, read_manifest, state_of
from notus.distributed import World, full_tensor
from notus.files import checksum
from notus.optim import make_optimizer
from notus.packing import Stream, batch
from notus.reference import RECORD, ReferenceCache, reference_logps
from notus.run import Preempted, Run
from notus.tokens import PairSet
from notus.weights import DTYPE_NAMES


@pytest.fixture
def world():
    """A process group of one."""
    yield distributed.start("cpu")
    distributed.stop()


# --- deeds ---------------------------------------------------------------------------------------------------------


def append_half(original: Callable, cache, *arguments) -> None:
    original(cache, *arguments)
    os.truncate(cache._file.name, os.stat(cache._file.name).st_size - RECORD.itemsize // 3)
    die()


def write_half_a_line(original: Callable, lines, *arguments) -> None:
    original(lines, *arguments)
    os.truncate(lines._file.fileno(), os.fstat(lines._file.fileno()).st_size - 7)
    die()


def write_half_a_shard(original: Callable, writer, *args, **kwargs) -> None:
    original(writer, *args, **kwargs)
    for path in Path(writer.path).iterdir():
        os.truncate(path, path.stat().st_size // 2)
    die()


def delete_half(_original: Callable, directory: Path, **_kwargs) -> None:
    min(Path(directory).iterdir()).unlink()
    die()


# --- the kill test -------------------------------------------------------------------------------------------------

REPLACE, RMTREE = "pathlib:Path.replace", "shutil:rmtree"
MOMENTS = [  # in the order of a run; which call it is, is drawn
    ("environment.json", REPLACE, die, 1, r"environment\.json\.tmp$"),
    ("config.toml", REPLACE, die, 1, r"config\.toml\.tmp$"),
    ("tokens made", REPLACE, die, 2, r"tokens/\w+\.tmp$"),
    ("reference header", REPLACE, die, 1, r"header.*\.tmp$"),
    ("reference pass", "notus.reference:pair_logps", die, 5, ""),
    ("reference, before an append", "notus.reference:ReferenceCache.append", die, 4, ""),
    ("reference, amid an append", "notus.reference:ReferenceCache.append", append_half, 4, ""),
    ("reference, after an append", "notus.reference:ReferenceCache.append", do_and_die, 4, ""),
    ("log rewritten", REPLACE, die, 1, r"metrics\.jsonl\.tmp$"),
    ("evaluation", "notus.evaluate:score_pairs", die, 2, ""),
    ("amid evaluation", "notus.evaluate:summarize", die, 3, ""),
    ("evaluation not yet logged", "notus.evaluate:score_pairs", do_and_die, 2, ""),
    ("amid a line of the log", "notus.metrics:Lines.add", write_half_a_line, 7, ""),
    ("line written", "notus.metrics:Lines.add", do_and_die, 7, ""),
    ("forward", "train:pair_logps", die, 8, ""),
    ("before the optimizer's step", "torch.optim:RMSprop.step", die, 4, ""),
    ("after the optimizer's step", "torch.optim:RMSprop.step", do_and_die, 4, ""),
    ("copy to host memory", "notus.checkpoint:state_of", die, 3, ""),
    ("before writing a checkpoint", "torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", die, 2, ""),
    ("amid a shard", "torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", write_half_a_shard, 2, ""),
    ("shards written", "torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", do_and_die, 2, ""),
    ("amid checksums", "notus.checkpoint:checksum", die, 2, r"step-\d+\.tmp"),
    ("before the manifest is on disk", REPLACE, die, 2, r"checkpoint\.json\.tmp$"),
    ("before the rename", REPLACE, die, 2, r"step-\d+\.tmp$"),
    ("between rename and deletion", REPLACE, do_and_die, 2, r"step-\d+\.tmp$"),
    ("before an old one is deleted", RMTREE, die, 1, r"step-\d+$"),
    ("amid deletion of an old one", RMTREE, delete_half, 1, r"step-\d+$"),
    ("status", REPLACE, die, 3, r"status\.json\.tmp$"),
    ("export begins", "notus.report:model_card", die, 1, ""),
    ("amid the exported file", "notus.weights:full_tensor", die, 9, ""),
    ("export not renamed", REPLACE, die, 1, r"final\.tmp$"),
    ("export renamed", REPLACE, do_and_die, 1, r"final\.tmp$"),
    ("summary", REPLACE, die, 1, r"summary\.json\.tmp$"),
    ("finished but for the word", "notus.report:finish", do_and_die, 1, ""),
]  # fmt: skip


def test_a_run_survives_kills_at_any_moment(home: Path, truth: Path) -> None:
    rng = random.Random(7)
    started = time.monotonic()
    launch(home / "timed", home, *own_caches(home / "timed"))
    duration = time.monotonic() - started

    waiting = [*range(len(MOMENTS)), *[len(MOMENTS)] * 6]  # the last six: at any time
    rng.shuffle(waiting)
    kills, runs, tries = [], 0, 0
    while waiting:
        out = home / f"killed-{runs}"
        runs += 1
        finished, coming, waiting = False, sorted(waiting[:7]), waiting[7:]
        while coming and not finished:
            moment = coming.pop(0)
            tries += 1
            assert tries < 150, f"never reached: {MOMENTS[moment][0]}"
            if moment == len(MOMENTS):
                name = "any time"
                process = start(home, log_of(out), [f"train.output_dir={out}", *own_caches(out)])
                process.join(rng.uniform(0, duration))
                process.kill()
                process.join()
                code = process.exitcode
            else:
                name, target, deed, most, about = MOMENTS[moment]
                strike = Strike(target, deed, rng.randint(1, most), about)
                code = launch(out, home, *own_caches(out), strikes=(strike,)).code
            assert code in (0, -signal.SIGKILL), f"{name}: {log_of(out).read_text()}"
            assert_status_is_true(out)
            finished = code == 0 or is_finished(out)  # or killed in its last breath
            if code:
                kills.append(name)
            elif moment < len(MOMENTS):  # that moment did not come; it must, in another run
                waiting.append(moment)
        waiting += coming
        if not finished:
            finish(out, home, *own_caches(out))
        assert_same(out, truth)
    assert len(kills) >= 20
    assert {name for name, *_ in MOMENTS} <= set(kills)
    print(f"{len(kills)} kills in {runs} runs, {time.monotonic() - started:.0f} s")


def assert_status_is_true(out: Path) -> None:
    """The step that it names can be resumed from, or is none."""
    if (out / "status.json").exists() and not is_finished(out):
        assert read_status(out)["step"] in [0, *steps_of(out)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_at_random_times(home: Path, tmp_path: Path, ranks: int) -> None:
    """With `KILLS=100` in the environment, a hundred. Of two ranks the second lives a moment longer."""
    rng, wanted, kills, runs = random.Random(ranks), int(os.environ.get("KILLS", 2)), 0, 0
    truth, started = tmp_path / "truth", time.monotonic()
    assert join(start_ranks(truth, home, ranks, *own_caches(truth))) == [0] * ranks
    duration = time.monotonic() - started
    while kills < wanted:
        out = tmp_path / f"killed-{runs}"
        runs += 1
        for _ in range(4):
            processes = start_ranks(out, home, ranks, *own_caches(out))
            join(processes, rng.uniform(0, duration))
            for process in rng.sample(processes, ranks):
                process.kill()
                time.sleep(rng.uniform(0, 0.02))
            kills += -signal.SIGKILL in join(processes)
            assert_status_is_true(out)
            if is_finished(out):
                break
        else:
            assert join(start_ranks(out, home, ranks, *own_caches(out))) == [0] * ranks, log_of(out, 0).read_text()
        assert_same(out, truth)
        shutil.rmtree(out)
    print(f"{ranks} ranks: {kills} kills in {runs} runs, {time.monotonic() - started:.0f} s")


def test_kills_between_lines_of_a_log_that_averages(home: Path, tmp_path: Path) -> None:
    """A line of several steps has the steps from before the checkpoint in it."""
    setup = ("train.log_steps=4", "train.save_steps=3")
    finish(tmp_path / "whole", home, *setup)
    killed = launch(tmp_path / "killed", home, *setup, strikes=(Strike("train:lr_at", die, 8),))
    assert killed.code == -signal.SIGKILL and steps_of(killed.out)
    finish(killed.out, home, *setup)
    assert read_metrics(killed.out) == read_metrics(tmp_path / "whole")


def test_a_pass_over_pairs_that_occur_twice(world: World, tmp_path: Path, monkeypatch) -> None:
    """What goes through the model together, and so the last bit of a log-prob, must not depend on how far an earlier
    pass came; here such a bit is all that there is."""
    monkeypatch.setattr("notus.reference.pair_logps", lambda _, stream: stream_bits(stream))
    once = random_pairs(np.random.default_rng(0), 40, 30)
    pairs = PairSet.of(once * 2, Counter())

    def stop(_: int) -> None:
        raise Preempted(0)

    def scored(name: str, progress: Callable | None = None) -> torch.Tensor:
        return reference_logps(torch.nn.Module(), pairs, ReferenceCache(tmp_path / name, {}), world, 60, progress)[0]

    for _ in range(3):
        with pytest.raises(Preempted):
            scored("cut short", stop)
    assert torch.equal(scored("cut short"), scored("whole"))


def stream_bits(stream: Stream) -> torch.Tensor:
    return torch.full((stream.num_sequences // 2, 2), -float(stream.input_ids.sum()))


def sleep_before(original: Callable, *args, **kwargs):
    time.sleep(0.5)
    return original(*args, **kwargs)


def test_runs_at_one_time_share_their_caches(home: Path, truth: Path, tmp_path: Path) -> None:
    """One makes the other's files while that is about to put them in place."""
    strikes = [Strike(REPLACE, sleep_before, 1, name).arm for name in (r"tokens/\w+\.tmp$", r"header.*tmp$")]
    processes = [
        start(
            home,
            log_of(tmp_path / name),
            [f"train.output_dir={tmp_path / name}", *own_caches(tmp_path / "all")],
            *deeds,
        )
        for name, deeds in (("slow", strikes), ("quick", []))
    ]
    assert join(processes) == [0, 0], log_of(tmp_path / "slow").read_text()
    assert_same(tmp_path / "slow", truth)
    assert_same(tmp_path / "quick", truth)


# --- other numbers of ranks ----------------------------------------------------------------------------------------


def test_a_run_goes_on_with_other_numbers_of_ranks(home: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "elastic"
    two = start_ranks(out, home, 2, *own_caches(out), strikes=dict.fromkeys(range(2), Strike("train:lr_at", die, 5)))
    assert join(two) == [-signal.SIGKILL] * 2
    one = launch(out, home, *own_caches(out), strikes=(Strike("train:lr_at", die, 4),))
    assert one.code == -signal.SIGKILL and "resuming    after step" in one.text
    assert join(start_ranks(out, home, 3, *own_caches(out))) == [0, 0, 0], log_of(out, 0).read_text()
    assert "resuming    after step" in log_of(out, 0).read_text()

    mine, other = read_metrics(out), read_metrics(truth)
    assert [line.keys() for line in mine] == [line.keys() for line in other]
    furthest = max(
        abs(line[name] - same[name]) / max(1, abs(same[name]))
        for line, same in zip(mine, other, strict=True)
        for name in line
    )
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (out, truth))
    weights = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    print(f"2 -> 1 -> 3 ranks: metrics within {furthest:.1e}, weights within {weights:.1e}")
    assert furthest < 1e-5
    assert weights < 1e-5
    assert not list(out.rglob("*.tmp"))


FACTS = {"identity": {"seed": 1}, "window": [0.5, 1.0], "lines": [{"step": 1, "loss": 0.7}]}
LAYOUTS = ((1, 1), (3, 1), (4, 2))  # ranks, and copies among them


def made(world: World, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model after two steps of AdamW."""
    model = tiny_model(tiny_config(), seed, torch.float32)
    distributed.shard(model, model.model.layers, world, torch.float32)
    optimizer = make_optimizer(model.parameters(), "adamw", 0.01, 0.1)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()
    return model, optimizer


def whole_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: full_tensor(tensor).clone() for name, tensor in state_of(model, optimizer).items()}


def save_one(world: World, directory: Path) -> None:
    model, optimizer = made(world, seed=world.size)
    checkpoints = Checkpoints(directory, 1, world, print)
    checkpoints.save(model, optimizer, 2, FACTS)
    checkpoints.wait()
    state = whole_state(model, optimizer)
    if world.rank == 0:
        save_file(state, directory / "truth.safetensors")


def load_all(world: World, directories: list[Path]) -> None:
    for directory in directories:
        model, optimizer = made(world, seed=9)
        checkpoints = Checkpoints(directory, 1, world, print)
        checkpoints.load(checkpoints.find(), model, optimizer)
        truth, state = load_file(directory / "truth.safetensors"), whole_state(model, optimizer)
        assert len(state) == 4 * len(list(model.parameters()))  # with exp_avg, exp_avg_sq and step
        assert same_tensors(state, truth), f"{directory} on {world.size} ranks"


def as_ranks(size: int, replicate: int, work: Callable, *arguments) -> list[int | None]:
    processes = [
        FORKS.Process(target=as_rank, args=(environment, replicate, work, arguments)) for environment in torchrun(size)
    ]
    for process in processes:
        process.start()
    return join(processes)


def as_rank(environment: dict[str, str], replicate: int, work: Callable, arguments: tuple) -> None:
    os.environ |= environment
    work(distributed.start("cpu", replicate), *arguments)
    distributed.stop()


@pytest.mark.usefixtures("home")  # its server of processes
def test_a_checkpoint_loads_bit_for_bit_on_any_layout(tmp_path: Path) -> None:
    directories = []
    for size, replicate in LAYOUTS:
        directories.append(tmp_path / f"{size}-{replicate}")
        assert as_ranks(size, replicate, save_one, directories[-1]) == [0] * size
    for size, replicate in ((1, 1), (2, 1), (4, 2)):
        assert as_ranks(size, replicate, load_all, directories) == [0] * size


def test_a_file_is_the_one_that_torch_would_write(world: World, tmp_path: Path) -> None:
    """The same tensors, read by safetensors, and the same metadata, for torch's reader. Scalars, empty tensors, every
    dtype that a run may have."""
    state = {str(dtype): torch.randn(5, 3).to(dtype) for dtype in DTYPE_NAMES} | {"step": torch.tensor(7.0)}
    state["empty"] = torch.empty(0, 4)
    files = []
    for kind in (StreamingWriter, HuggingFaceStorageWriter):
        directory = tmp_path / kind.__name__
        writer = kind(str(directory), save_distributed=True)
        dcp.save(state, storage_writer=writer, process_group=world.mesh.get_group())
        (path,) = directory.iterdir()
        with safe_open(path, "pt") as file:
            files.append((file.metadata(), {name: file.get_tensor(name) for name in file.keys()}))  # noqa: SIM118
            assert same_tensors(files[-1][1], state)
        assert (int.from_bytes(path.read_bytes()[:8], "little") + 8) % 8 == 0  # the tensors are aligned
    (ours, _), (theirs, _) = files
    names = {name: json.loads(metadata.pop("DCP_SHARDING_INFO")) for name, metadata in (("o", ours), ("t", theirs))}
    assert names["o"] == names["t"]
    assert ours == theirs


# --- writing beside training ---------------------------------------------------------------------------------------


def test_what_is_written_is_the_state_at_the_call(world: World, tmp_path: Path, monkeypatch) -> None:
    model, optimizer = made(world, seed=1)
    expected = whole_state(model, optimizer)
    spoiled, write_data = threading.Event(), HuggingFaceStorageWriter.write_data

    def write_late(*arguments):
        assert spoiled.wait(10)
        return write_data(*arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_late)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1, world, print)
    checkpoints.save(model, optimizer, 2, FACTS)
    for tensor in state_of(model, optimizer).values():
        tensor.add_(1.0)
    assert not checkpoints.complete()
    spoiled.set()
    checkpoints.wait()

    manifest = checkpoints.find()
    assert {name: manifest[name] for name in ("step", *FACTS)} == {"step": 2, **FACTS}
    model, optimizer = made(world, seed=2)
    checkpoints.load(manifest, model, optimizer)
    assert same_tensors(whole_state(model, optimizer), expected)


# --- damage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(home: Path) -> Path:
    """Killed when it began to save after step 8: it has the checkpoints of steps 4 and 6."""
    out = home / "interrupted"
    outcome = launch(out, home, strikes=(Strike("notus.checkpoint:state_of", die, 4),))
    assert outcome.code == -signal.SIGKILL, outcome.text
    assert steps_of(out) == [4, 6]
    return out


@pytest.fixture
def spoiled(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return shutil.copytree(interrupted, tmp_path / "spoiled")


def shard_of(checkpoint: Path) -> Path:
    (shard,) = checkpoint.glob("*.safetensors")
    return shard


def flip_a_bit(checkpoint: Path) -> None:
    content = bytearray(shard_of(checkpoint).read_bytes())
    content[-1000] ^= 1
    shard_of(checkpoint).write_bytes(content)


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "a short file": lambda checkpoint: os.truncate(shard_of(checkpoint), 5000),
    "an empty file": lambda checkpoint: os.truncate(shard_of(checkpoint), 0),
    "a lost file": lambda checkpoint: shard_of(checkpoint).unlink(),
    "a short manifest": lambda checkpoint: os.truncate(checkpoint / "checkpoint.json", 60),
    "an empty manifest": lambda checkpoint: (checkpoint / "checkpoint.json").write_text("{}"),
    "no manifest": lambda checkpoint: (checkpoint / "checkpoint.json").unlink(),
    "an empty folder": lambda checkpoint: [path.unlink() for path in checkpoint.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside(damage: str, home: Path, spoiled: Path, truth: Path) -> None:
    newest = spoiled / "checkpoints" / "step-00000006"
    DAMAGES[damage](newest)
    said = finish(spoiled, home)
    assert f"{newest} is damaged" in said
    assert "resuming    after step 4" in said
    assert newest.with_name("step-00000006.damaged").is_dir()
    assert_same(spoiled, truth)


def test_without_a_whole_checkpoint_a_run_begins_anew(home: Path, spoiled: Path, truth: Path) -> None:
    for checkpoint in (spoiled / "checkpoints").glob("step-????????"):
        flip_a_bit(checkpoint)
    said = finish(spoiled, home)
    assert said.count("is damaged") == 2
    assert "resuming" not in said
    assert_same(spoiled, truth)


def test_a_checkpoint_may_be_damaged_twice(home: Path, spoiled: Path, truth: Path) -> None:
    aside = spoiled / "checkpoints" / "step-00000006.damaged"
    aside.mkdir()
    (aside / "shard").write_text("of the first time")
    flip_a_bit(spoiled / "checkpoints" / "step-00000006")
    finish(spoiled, home)
    assert_same(spoiled, truth)


def test_a_flipped_bit_anywhere_in_a_manifest(spoiled: Path) -> None:
    """It is damage, or it changes nothing that is used."""
    newest = spoiled / "checkpoints" / "step-00000006"
    content = (newest / "checkpoint.json").read_bytes()
    whole, _ = read_manifest(newest)
    rng = random.Random(0)
    bits = [*itertools.product(range(40), range(8))]  # of the step, and then of anything
    bits += [(rng.randrange(len(content)), rng.randrange(8)) for _ in range(2000)]
    for place, bit in bits:
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        (newest / "checkpoint.json").write_bytes(flipped)
        manifest, fault = read_manifest(newest)
        assert fault or manifest == whole, bytes(flipped)


def test_what_a_killed_save_left_is_removed(home: Path, spoiled: Path, truth: Path) -> None:
    """Also that of a step at which the run, this time, does not save."""
    assert [path.name for path in (spoiled / "checkpoints").glob("*.tmp")] == ["step-00000008.tmp"]
    left = spoiled / "checkpoints" / "step-00000005.tmp"
    left.mkdir()
    (left / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
    finish(spoiled, home)
    assert_same(spoiled, truth)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_are_kept(keep: int, home: Path, tmp_path: Path) -> None:
    finish(tmp_path / "out", home, f"train.keep_checkpoints={keep}")
    assert steps_of(tmp_path / "out") == [2, 4, 6, 8, 9][-keep:]


def test_a_checkpoint_too_many_goes_when_the_run_is_resumed(home: Path, tmp_path: Path) -> None:
    """A kill between the making of one and the deletion of another leaves it."""
    out = tmp_path / "out"
    launch(out, home, "train.keep_checkpoints=3", strikes=(Strike("notus.checkpoint:state_of", die, 4),))
    assert steps_of(out) == [2, 4, 6]
    launch(out, home, strikes=(Strike("notus.checkpoint:state_of", die, 1),))  # when it loads
    assert steps_of(out) == [4, 6]


# --- a full disk ---------------------------------------------------------------------------------------------------


def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(home: Path, spoiled: Path, truth: Path) -> None:
    """Files may be as large as the exported model, which shards with optimizer state are not."""
    largest = (truth / "final" / "model.safetensors").stat().st_size * 3 // 2
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
    said = finish(spoiled, home, deeds=(limit,))
    assert re.findall(r"step-0000000(\d) could not be saved, training continues: .+", said) == ["8", "9"]
    assert_same(spoiled, truth)
    assert steps_of(spoiled) == [4, 6]
    for step in (4, 6):
        checkpoint = spoiled / "checkpoints" / f"step-{step:08d}"
        manifest, fault = read_manifest(checkpoint)
        assert not fault and {name: checksum(checkpoint / name) for name in manifest["files"]} == manifest["files"]


@pytest.mark.parametrize(
    "strike",
    [
        Strike("torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", fill_the_disk, 2),
        Strike("notus.checkpoint:fsync", fill_the_disk, 2, r"step-\d+\.tmp"),
        Strike("notus.checkpoint:state_of", fill_the_disk, 2),
    ],
    ids=["shards", "sync", "copy"],
)
def test_a_disk_that_is_full_once(strike: Strike, home: Path, truth: Path, tmp_path: Path) -> None:
    said = finish(tmp_path / "out", home, strikes=(strike,))
    assert "step-00000004 could not be saved, training continues: " in said
    assert "No space left on device" in said
    assert_same(tmp_path / "out", truth)


def room_for_two() -> None:
    """A quota: the disk itself has room."""
    write_data = HuggingFaceStorageWriter.write_data

    def write(writer, *arguments):
        if len(list(Path(writer.path).parent.glob("step-????????"))) == 2:
            fill_the_disk()
        return write_data(writer, *arguments)

    HuggingFaceStorageWriter.write_data = write


def no_room() -> None:
    usage = shutil.disk_usage("/")
    shutil.disk_usage = lambda _: usage._replace(free=1000)


@pytest.mark.parametrize(
    ("deed", "deleted", "failed"), [(no_room, [2, 4, 6], []), (room_for_two, [2, 4], [6])], ids=["disk", "quota"]
)
def test_without_room_for_one_more_the_oldest_goes_first(
    deed: Callable, deleted: list[int], failed: list[int], home: Path, truth: Path, tmp_path: Path
) -> None:
    said = finish(tmp_path / "out", home, deeds=(deed, watch_status))
    steps = [int(step) for step in re.findall(r"step-0*(\d) was deleted first, because the disk has no room", said)]
    assert steps == deleted
    assert [int(step) for step in re.findall(r"step-0*(\d) could not be saved", said)] == failed
    assert steps_of(tmp_path / "out") == [8, 9]
    assert_same(tmp_path / "out", truth)


def watch_status() -> None:
    """From now on the run fails where status.json names a step that no whole checkpoint holds."""
    status, prune = Run.status, Checkpoints.prune

    def checked_status(run: Run, *arguments) -> None:
        status(run, *arguments)
        assert_status_is_true(run.output)

    def checked_prune(checkpoints: Checkpoints) -> None:
        prune(checkpoints)
        assert_status_is_true(checkpoints.directory.parent)

    Run.status, Checkpoints.prune = checked_status, checked_prune


@pytest.mark.parametrize("keep", [1, 2])
def test_status_names_a_checkpoint_at_every_moment(keep: int, home: Path, tmp_path: Path) -> None:
    finish(tmp_path / "out", home, f"train.keep_checkpoints={keep}", deeds=(watch_status,))


def test_a_run_that_fails_keeps_the_checkpoint_that_is_being_written(home: Path, tmp_path: Path) -> None:
    """And its state: the thread that writes checkpoints also writes status.json."""
    late = Strike("torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", sleep_before, 2)
    outcome = launch(tmp_path / "out", home, strikes=(late, Strike("train:lr_at", fail, 5)))
    assert outcome.code == 1
    assert read_status(tmp_path / "out") == {"state": "failed", "step": 4}, outcome.text


def fail(*_, **__) -> None:
    raise RuntimeError("made to fail")


def test_curves_that_cannot_be_written_fail_no_run(home: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "No space left on device" in finish(out, home, strikes=(Strike("notus.report:plot", fill_the_disk),))
    assert_same(out, truth)


def test_a_checkpoint_that_cannot_be_read_ends_the_run_with_a_reason(home: Path, spoiled: Path, truth: Path) -> None:
    """And is not lost: the disk may only be out of reach."""
    strike = Strike("torch.distributed.checkpoint:HuggingFaceStorageReader.read_data", fill_the_disk)
    outcome = launch(spoiled, home, strikes=(strike,))
    assert outcome.code == 1
    assert re.search(r"train\.py: error: .*No space left on device", outcome.text), outcome.text
    assert read_status(spoiled)["state"] == "failed"
    assert "resuming    after step 6" in finish(spoiled, home)
    assert_same(spoiled, truth)


# --- nothing can run code ------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def forbid_pickles() -> None:
    def forbidden(*_, **__):
        raise AssertionError("something is unpickled")

    for module, names in ((pickle, ("load", "loads", "Unpickler", "_Unpickler")), (torch, ("load",))):
        for name in names:
            setattr(module, name, forbidden)


def test_no_file_of_a_run_can_run_code(home: Path, truth: Path, spoiled: Path, tmp_path: Path) -> None:
    folders = [truth, *(Path(setting.partition("=")[2]) for setting in own_caches(truth))]
    suffixes = set()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        suffixes.add(path.suffix)
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                assert file.keys()
        elif path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        elif path.suffix == ".records":
            assert path.stat().st_size % RECORD.itemsize == 0
        elif path.suffix == ".json":
            json.loads(path.read_text())
        else:
            assert path.suffix in {".jsonl", ".toml", ".md", ".lock"}, path
            path.read_text()
    assert {".safetensors", ".npy", ".records", ".json", ".jsonl", ".toml", ".md"} <= suffixes

    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    for folder in (spoiled, *(spoiled / "checkpoints").iterdir()):
        for name in (".metadata", "__0_0.distcp", "optimizer.pt"):
            (folder / name).write_bytes(bomb)
    said = finish(spoiled, home, deeds=(forbid_pickles,))
    assert "resuming    after step 6" in said
    assert not (tmp_path / "exploded").exists()


# --- signals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_stops_a_run_after_its_step(number: int, home: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = launch(out, home, strikes=(step_strike(number, 5),))
    assert first.code == 75, first.text
    assert read_status(out) == {"state": "preempted", "step": 5}
    assert steps_of(out) == [4, 5]
    assert [line["step"] for line in read_metrics(out) if "loss" in line] == [1, 2, 3, 4, 5]
    assert "stopped after step 5, as asked; the newest checkpoint is of step 5, and the same command" in first.text
    assert first.text.count("stopping after this step") == (number == signal.SIGINT)
    assert "Traceback" not in first.text and "Error" not in first.text
    finish(out, home)
    assert_same(out, truth)


@pytest.mark.parametrize("call", [1, 2, 4])
def test_a_signal_stops_the_reference_pass(call: int, home: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    strike = Strike("notus.reference:pair_logps", Signal(signal.SIGTERM), call)
    first = launch(out, home, *own_caches(out), strikes=(strike,))
    assert first.code == 75, first.text
    assert read_status(out) == {"state": "preempted", "step": 0}
    (records,) = Path(f"{out}.reference").glob("*/*.records")
    appends = int((np.fromfile(records, RECORD)["follow"] == 0).sum())
    assert appends == call  # what was being computed is kept
    said = finish(out, home, *own_caches(out))
    assert sum(map(int, re.findall(r"(\d+) found in", said))) > 0
    assert_same(out, truth)


def test_a_signal_in_an_evaluation_and_in_the_last_step(home: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    strike = Strike("notus.evaluate:score_pairs", Signal(signal.SIGTERM), 2)  # after step 4
    first = launch(out, home, strikes=(strike,))
    assert (first.code, read_status(out)) == (75, {"state": "preempted", "step": 5})
    finish(out, home, strikes=(step_strike(signal.SIGTERM, 4),))  # in step 9: there is nothing left to do
    assert_same(out, truth)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_second_signal_ends_a_run_at_once(number: int, home: Path, truth: Path, tmp_path: Path) -> None:
    """Not one that comes on the heels of the first: that is the same request by another road."""
    out = tmp_path / "out"
    echo = launch(out, home, strikes=(step_strike(number, 5, times=2),))
    assert (echo.code, read_status(out)) == (75, {"state": "preempted", "step": 5})
    first = launch(out, home, strikes=(step_strike(number, 2, times=2),), deeds=(take_no_echoes,))
    assert first.code == 128 + number
    assert first.text.rstrip().endswith("left at once; the newest checkpoint is what is kept")
    assert [line["step"] for line in read_metrics(out) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    finish(out, home)
    assert_same(out, truth)


def test_ctrl_c_before_there_is_a_run(home: Path, tmp_path: Path) -> None:
    """While torch is imported the process just ends; while inputs are read it says so in one line."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    importing = subprocess.run(
        [sys.executable, ROOT / "train.py", "run.toml"], cwd=home, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )  # fmt: skip
    assert (importing.returncode, importing.stdout, importing.stderr) == (-signal.SIGINT, "", "")

    out = tmp_path / "out"
    reading = launch(out, home, strikes=(Strike("notus.run:load_pairs", Signal(signal.SIGINT), 1),))
    assert reading.code == 130 and not out.exists()
    assert reading.text == "train.py: error: interrupted before the first step; nothing is lost\n"


def no_checkpoint_of_step_4() -> None:
    write_data = HuggingFaceStorageWriter.write_data

    def write(writer, *arguments):
        return fill_the_disk() if "step-00000004" in str(writer.path) else write_data(writer, *arguments)

    HuggingFaceStorageWriter.write_data = write


def test_a_stopped_run_names_the_checkpoint_that_there_is(home: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = launch(out, home, "--fresh", strikes=(step_strike(signal.SIGTERM, 4),), deeds=(no_checkpoint_of_step_4,))
    assert (first.code, read_status(out)) == (75, {"state": "preempted", "step": 2})
    assert "step-00000004 could not be saved" in first.text
    assert (
        "stopped after step 4, as asked; the newest checkpoint is of step 2, and the same command without --fresh "
        "resumes from there"
    ) in first.text
    assert "resuming    after step 2" in finish(out, home)
    assert_same(out, truth)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_torchrun_hands_signals_on_and_no_rank_outlives_it(home: Path, tmp_path: Path) -> None:
    """Two ranks, asked by way of torchrun's agent, agree on the step. They go on, and the agent alone is killed, by the
    kernel's OOM killer, say: that is a preemption for its ranks."""
    out, stopped = tmp_path / "out", 0
    for end in (lambda agent: agent.send_signal(signal.SIGUSR1), lambda agent: agent.kill()):
        with (tmp_path / "log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            agent = subprocess.Popen(endless(out), cwd=home, stdout=log, stderr=log, env=environment)
        wait_until(lambda stopped=stopped: last_step(out) > stopped + 2, agent)
        ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
        assert len(ranks) == 2
        end(agent)
        agent.wait(60)
        deadline = time.monotonic() + 60
        try:
            while any(map(is_alive, ranks)):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.1)
        finally:
            for pid in filter(is_alive, ranks):
                os.kill(int(pid), signal.SIGKILL)
        status, text = read_status(out), (tmp_path / "log").read_text()
        assert status["state"] == "preempted" and 'Traceback (most recent call last):\n  File "/' not in text, text
        assert status["step"] == steps_of(out)[-1] == last_step(out) > stopped, text
        stopped = status["step"]
        assert read_manifest(out / "checkpoints" / f"step-{stopped:08d}")[1] == ""
        assert f"stopped after step {stopped:,}, as asked" in text
    assert "resuming    after step" in text and "Traceback" not in text, text


def is_alive(pid: str) -> bool:
    """Neither gone nor a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def endless(out: Path) -> list[str]:
    """Two ranks that train until they are stopped."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", str(ROOT / "train.py"), "run.toml"]
    command += [f"train.output_dir={out}", "train.num_train_epochs=10000", "train.eval_steps=100000"]
    return [*command, "train.save_steps=100000", "train.learning_rate=1e-6"]


# --- which run it is -----------------------------------------------------------------------------------------------

OTHER = {
    "data.max_length": 40, "data.max_prompt_length": 20, "data.bos": False, "data.drop_bad_pairs": True,
    "data.insert_system": False, "data.system_prompt": "a b", "dpo.loss": "ipo", "dpo.beta": 0.2,
    "dpo.label_smoothing": 0.1, "dpo.nll_weight": 0.5,
    "train.learning_rate": 2e-3, "train.optimizer": "adamw", "train.weight_decay": 0.1, "train.warmup_ratio": 0.5,
    "train.num_train_epochs": 2, "train.pairs_per_step": 9, "train.max_grad_norm": 0.5, "train.seed": 43,
    "train.compute_dtype": "bfloat16", "train.schedule": "cosine", "lora.rank": 2, "lora.alpha": 4.0,
    "lora.targets": ["q_proj"], "data.test_size": 0.5,
}  # fmt: skip
BESIDE = {"dpo.loss": ["dpo.beta=0.1"], "data.test_size": ["data.test="]}  # which these need


def refused(home: Path, out: Path, capsys, monkeypatch, *arguments: str) -> str:
    """What is said; the folder stays as it is."""
    monkeypatch.chdir(home)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train.main(["run.toml", f"train.output_dir={out}", *arguments]) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    return capsys.readouterr().err


def test_every_setting_that_makes_another_run_is_tried():
    """But dpo.margin, which needs another loss."""
    settings = configuration.identity(configuration.load(ROOT / "configs" / "demo.toml"))
    assert settings.keys() == OTHER.keys() | {"dpo.margin"}


@pytest.mark.parametrize("name", OTHER)
def test_another_setting_is_another_run(name: str, home: Path, interrupted: Path, capsys, monkeypatch) -> None:
    setting = f"{name}={json.dumps(OTHER[name])}"
    more = [f"data.cache_dir={home / 'others'}", *BESIDE.get(name, [])]
    said = refused(home, interrupted, capsys, monkeypatch, setting, *more)
    assert re.search(rf"{re.escape(name)} was .* and is {re.escape(repr(OTHER[name]))}", said), said
    assert str(interrupted) in said
    assert said.count(" was ") == (2 if name == "data.test_size" else 1)  # it holds out other pairs


def test_other_data_or_another_base_is_another_run(
    home: Path, interrupted: Path, capsys, monkeypatch, tmp_path
) -> None:
    fewer = tmp_path / "fewer.jsonl"
    lines = (home / "train.jsonl").read_text().splitlines(keepends=True)
    fewer.write_text("".join(lines[1:]))
    (tmp_path / "turned.jsonl").write_text("".join(reversed(lines)))
    base = shutil.copytree(home / "base", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for setting, name in (
        (f"data.train={fewer}", "sha256 of data.train"),
        (f"data.train={tmp_path / 'turned.jsonl'}", "sha256 of data.train"),
        (f"data.test={fewer}", "sha256 of data.test"),
        ("data.test=", "sha256 of data.test"),
        (f"model.path={base}", "sha256 of the weights"),
    ):
        said = refused(home, interrupted, capsys, monkeypatch, setting)
        assert f"{name} was " in said and said.count(" was ") == 1, said


def test_files_of_two_runs_in_one_folder(home: Path, spoiled: Path, truth: Path, capsys, monkeypatch, tmp_path) -> None:
    """Only what is this run's own is resumed, and what can be written again is."""
    strike = Strike("notus.checkpoint:state_of", die, 4)
    other = launch(tmp_path / "other", home, "dpo.beta=0.2", strikes=(strike,)).out
    theirs, mine = other / "checkpoints", spoiled / "checkpoints"
    kept = shutil.copytree(mine, tmp_path / "kept")

    def put(source: Path, step: int) -> None:
        shutil.rmtree(mine / f"step-{step:08d}", ignore_errors=True)
        shutil.copytree(source / f"step-{step:08d}", mine / f"step-{step:08d}")

    put(theirs, 6)
    said = refused(home, spoiled, capsys, monkeypatch)
    assert f"{mine / 'step-00000006'}: is a checkpoint of another run: dpo.beta was 0.2 and is 0.1" in said

    shutil.rmtree(mine / "step-00000006")
    put(theirs, 4)
    assert "step-00000004: is a checkpoint of another run" in refused(home, spoiled, capsys, monkeypatch)

    put(kept, 6)  # and step 4 is still of the other run
    shutil.copy(other / "environment.json", spoiled)
    said = refused(home, spoiled, capsys, monkeypatch)
    assert f"{spoiled}: holds an unfinished run of another kind: dpo.beta was 0.2 and is 0.1" in said

    (spoiled / "environment.json").unlink()
    for name in ("config.toml", "status.json", "metrics.jsonl"):
        shutil.copy(other / name, spoiled)
    assert "resuming    after step 6" in finish(spoiled, home)
    assert_same(spoiled, truth)


def test_what_does_not_change_the_result_may_change(home: Path, spoiled: Path, truth: Path, tmp_path: Path) -> None:
    """Files that moved, other intervals, other micro-batches."""
    moved = shutil.copytree(home / "base", tmp_path / "moved")
    shutil.copy(home / "train.jsonl", tmp_path / "moved.jsonl")
    said = finish(
        spoiled, home, f"model.path={moved}", f"data.train={tmp_path / 'moved.jsonl'}", "train.save_steps=1",
        "train.keep_checkpoints=5", "train.micro_batch_tokens=60", "train.activation_checkpointing=full",
        f"data.cache_dir={tmp_path / 'tokens'}", "train.export_dtype=bfloat16", "train.max_skipped_steps=9",
    )  # fmt: skip
    assert "resuming    after step 6" in said
    assert steps_of(spoiled) == [4, 6, 7, 8, 9]
    for mine, other in zip(read_metrics(spoiled), read_metrics(truth), strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_fresh_moves_a_run_aside(home: Path, spoiled: Path, truth: Path) -> None:
    before = (spoiled / "metrics.jsonl").read_text()
    finish(spoiled, home, "--fresh", "dpo.beta=0.1")
    (aside,) = spoiled.parent.glob("spoiled.before-*")
    assert (aside / "metrics.jsonl").read_text() == before and steps_of(aside) == [4, 6]
    assert_same(spoiled, truth)


def test_a_finished_run_and_a_foreign_folder_are_refused(home, truth: Path, capsys, monkeypatch, tmp_path) -> None:
    assert "holds a finished run" in refused(home, truth, capsys, monkeypatch)
    (tmp_path / "holiday.jpg").touch()
    for arguments in ((), ("--fresh",)):
        said = refused(home, tmp_path, capsys, monkeypatch, *arguments)
        assert f"{tmp_path}: is not empty and holds no run" in said
    said = refused(home, tmp_path / "holiday.jpg", capsys, monkeypatch)
    assert "holiday.jpg" in said


# --- losses and gradients that are not finite ----------------------------------------------------------------------


def poison_loss(original: Callable, *arguments) -> torch.Tensor:
    return original(*arguments) * float("nan")


def poison_gradient(original: Callable, *arguments) -> torch.Tensor:
    policy = original(*arguments)
    policy.register_hook(lambda gradient: gradient * float("inf"))
    return policy


@pytest.mark.parametrize("poison", [poison_loss, poison_gradient])
def test_a_step_that_is_not_finite_is_skipped(poison: Callable, home: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    """Step 4: neither weights nor the optimizer's state change, and its pairs are named."""
    calls, poisoned, pair_logps = [], [], train.pair_logps
    states, optimizers = [], []

    def lr_at(step: int, *arguments):
        calls.append(step)
        (optimizer,) = optimizers
        states.append([tensor.clone() for tensor in tensors_of(optimizer)])
        return original_lr(step, *arguments)

    def struck(*arguments):
        if calls[-1] == 3 and not poisoned:
            poisoned.append(True)
            return poison(pair_logps, *arguments)
        return pair_logps(*arguments)

    def make(*arguments):
        optimizers.append(make_optimizer(*arguments))
        return optimizers[-1]

    original_lr = train.lr_at
    monkeypatch.setattr(train, "lr_at", lr_at)
    monkeypatch.setattr(train, "pair_logps", struck)
    monkeypatch.setattr(train, "make_optimizer", make)
    monkeypatch.setattr(train.report, "plot", no_curves)
    monkeypatch.chdir(home)
    out = tmp_path / "out"
    assert train.main(["run.toml", f"train.output_dir={out}"]) == 0
    changed = [not all(map(torch.equal, before, after)) for before, after in itertools.pairwise(states[1:])]
    assert changed == [True, True, False, True, True, True, True]  # by steps 2 to 8

    lines = read_metrics(out)
    (skipped,) = [line for line in lines if "skipped_pairs" in line]
    rows = batch(TRAIN_PAIRS, 8, 42, 3)
    assert (skipped["step"], skipped["skipped_pairs"]) == (4, [f"train.jsonl:{row + 1}" for row in rows])
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 5, 6, 7, 8, 9]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert "skipped     step 4" in capfd.readouterr().err


def tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Its parameters and its state."""
    parameters = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    return parameters + [tensor for parameter in optimizer.state.values() for tensor in parameter.values()]


def poison_every_step_from(step: int) -> None:
    lr_at, pair_logps, steps = train.lr_at, train.pair_logps, []
    train.lr_at = lambda step, *arguments: steps.append(step) or lr_at(step, *arguments)
    train.pair_logps = lambda *arguments: pair_logps(*arguments) * (float("nan") if steps[-1] >= step - 1 else 1)


def test_too_many_steps_that_are_not_finite_end_the_run(home: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    poison = functools.partial(poison_every_step_from, 5)
    outcome = launch(out, home, "train.max_skipped_steps=2", deeds=(poison,))
    assert outcome.code == 1
    assert "error: loss or gradient was not finite in 2 steps in a row, up to step 6" in outcome.text
    assert read_status(out)["state"] == "failed"
    assert steps_of(out) == [2, 4]
    assert "resuming    after step 4" in finish(out, home)
    assert_same(out, truth)


# --- a rank that is gone -------------------------------------------------------------------------------------------


def freeze(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def test_a_rank_that_is_gone_is_named(home: Path, tmp_path: Path) -> None:
    """One killed, one stopped: the others do not wait for ever, and say which it was."""
    gone = {
        "killed": Strike("train:pair_logps", die, 8),
        "stopped": Strike("train:pair_logps", freeze, 8),
        "stopped-saving": Strike("torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", freeze, 2),
    }
    runs = {}
    for name, strike in gone.items():
        setup = ("distributed.timeout_minutes=0.1", *own_caches(tmp_path / name))
        runs[name] = start_ranks(tmp_path / name, home, 3, *setup, strikes={1: strike})
    started = time.monotonic()
    try:
        for name, processes in runs.items():
            codes = join([processes[0], processes[2]], 45 - (time.monotonic() - started))
            said = log_of(tmp_path / name, 0).read_text()
            print(f"{name}: {codes} after {time.monotonic() - started:.0f} s")
            assert codes == [1, 1], f"{name}: {said}"
            assert re.search(r"error: .*[Rr]anks? 1\b", said), f"{name}: {said}"
            assert read_status(tmp_path / name)["state"] == "failed"
    finally:
        for process in (process for processes in runs.values() for process in processes):
            process.kill()
            process.join()
