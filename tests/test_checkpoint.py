"""Law 7: killed at any moment and resumed = never interrupted, bit for bit on the same layout, to rounding on another.

Runs are real ones, of train.main, in forked processes. To be killed at a chosen moment a process strikes itself: at
the n-th call of a chosen function it does something else, and mostly that is SIGKILL.
"""

import errno
import functools
import importlib
import itertools
import json
import multiprocessing.forkserver
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import tokenizers
import torch
import torch._dynamo  # torch's optimizers import it in their first step
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_pairs, save_checkpoint, tiny_config, tiny_model
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from notus import config as configuration
from notus import distributed
from notus.chat import ZEPHYR_TEMPLATE
from notus.checkpoint import Checkpoints, Preempted, StopSignal, checksum, read_manifest, state_of
from notus.data import PairSet, batch
from notus.distributed import World, full_tensor
from notus.optim import make_optimizer
from notus.packing import Stream
from notus.reference import RECORD, ReferenceCache, reference_logps

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])  # torch is imported once: a run starts in a fraction of a second

TRAIN_PAIRS, TEST_PAIRS, STEPS = 19, 5, 9  # 3 epochs of 8 + 8 + 3 pairs, each step in 2 or 3 micro-batches
CONFIG = """
[model]
path = "base"
[data]
train = "train.jsonl"
test = "test.jsonl"
max_length = 48
max_prompt_length = 24
cache_dir = "tokens"
[train]
output_dir = "out"
learning_rate = 1e-3
num_train_epochs = 3
pairs_per_step = 8
micro_batch_tokens = 100
compute_dtype = "float32"
export_dtype = "float32"
device = "cpu"
eval_steps = 4
save_steps = 2
[reference]
cache_dir = "reference"
"""
TIMINGS = {"tokens_per_second", "memory_gib", "checkpoint_stall_seconds", "eval_runtime"}
WORDS = [*"abcdefghijklmno"]


# --- small runs ----------------------------------------------------------------------------------------------------


def write_tokenizer(directory: Path) -> None:
    """One id a word: enough for Zephyr's template."""
    words = ["<unk>", "<s>", "</s>", "<|", "|>", "user", "system", "assistant", *WORDS]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": ZEPHYR_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def rows(rng: random.Random, count: int) -> str:
    def conversation(user: str, most: int) -> list[dict]:
        answer = " ".join(rng.choices(WORDS, k=rng.randint(2, most)))
        return [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]

    made = []
    for _ in range(count):
        user = " ".join(rng.choices(WORDS, k=rng.randint(1, 9)))
        made.append({"chosen": conversation(user, 12), "rejected": conversation(user, 9)})
    return "".join(json.dumps(row) + "\n" for row in made)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that every run is started in: a base, its data and a configuration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT / "tests")  # where Python before 3.13 looks for what to preload
        multiprocessing.forkserver.ensure_running()
    home = tmp_path_factory.mktemp("home")
    save_checkpoint(tiny_model(tiny_config(vocab_size=30, initializer_range=0.2)), home / "base")
    write_tokenizer(home / "base")
    rng = random.Random(0)
    (home / "train.jsonl").write_text(rows(rng, TRAIN_PAIRS))
    (home / "test.jsonl").write_text(rows(rng, TEST_PAIRS))
    (home / "run.toml").write_text(CONFIG)
    return home


class Strike(NamedTuple):
    """At the `call`-th call of `target`, "module:attribute", do `deed(original, *arguments)` instead. With `about`, a
    pattern, only calls count whose first argument is an existing path that matches."""

    target: str
    deed: Callable
    call: int = 1
    about: str = ""

    def arm(self) -> None:
        module, _, attribute = self.target.partition(":")
        *owners, name = attribute.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        original, calls = getattr(owner, name), itertools.count(1)

        @functools.wraps(original)
        def struck(*args, **kwargs):
            counts = not self.about or (re.search(self.about, str(args[0])) and Path(args[0]).exists())
            if counts and next(calls) == self.call:
                return self.deed(original, *args, **kwargs)
            return original(*args, **kwargs)

        setattr(owner, name, struck)


def start(home: Path, log: Path, arguments: list[str], *deeds: Callable[[], None], **environment: str):
    """A process that is prepared by `deeds` and then runs train.py."""
    process = FORKS.Process(target=run_here, args=(home, log, environment, deeds, arguments))
    process.start()
    return process


def run_here(home: Path, log: Path, environment: dict, deeds: tuple, arguments: list[str]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    os.chdir(home)
    train.plot = lambda output: output  # curves take longer than the run
    for deed in deeds:
        deed()
    sys.exit(train.main(["run.toml", *arguments]))


class Outcome(NamedTuple):
    code: int  # negative: of the signal that ended it
    text: str  # what it said
    out: Path


def launch(out: Path, home: Path, *overrides: str, strikes: tuple[Strike, ...] = (), deeds: tuple = ()) -> Outcome:
    """One process, to its end."""
    log = log_of(out)
    before = log.stat().st_size if log.exists() else 0
    process = start(home, log, [f"train.output_dir={out}", *overrides], *(strike.arm for strike in strikes), *deeds)
    process.join(60)
    assert process.exitcode is not None, "the run hangs"
    return Outcome(process.exitcode, log.read_text()[before:], out)


def finish(out: Path, home: Path, *overrides: str, strikes: tuple[Strike, ...] = (), deeds: tuple = ()) -> str:
    """One process that must come to the end of its run; what it said."""
    outcome = launch(out, home, *overrides, strikes=strikes, deeds=deeds)
    assert outcome.code == 0, outcome.text
    return outcome.text


def torchrun(size: int) -> list[dict[str, str]]:
    """Its environment variables, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    same = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [same | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]


def start_ranks(out: Path, home: Path, size: int, *overrides: str, strikes: dict[int, Strike] | None = None) -> list:
    """`strikes` by rank."""
    arguments, strikes = [f"train.output_dir={out}", *overrides], strikes or {}
    return [
        start(home, log_of(out, rank), arguments, *([strikes[rank].arm] if rank in strikes else []), **environment)
        for rank, environment in enumerate(torchrun(size))
    ]


def join(processes: list, seconds: float = 60) -> list[int | None]:
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def log_of(out: Path, rank: int | None = None) -> Path:
    return out.with_name(f"{out.name}.log" + ("" if rank is None else f"-{rank}"))


def own_caches(out: Path) -> list[str]:
    """So that the run makes its tokens and its reference itself."""
    return [f"data.cache_dir={out}.tokens", f"reference.cache_dir={out}.reference"]


def read_metrics(out: Path) -> list[dict]:
    """Without what differs from one run to the next anyway."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in TIMINGS}
        for line in lines
        if "checkpoint_stall_seconds" not in line
    ]


def read_status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def is_finished(out: Path) -> bool:
    return (out / "status.json").exists() and read_status(out)["state"] == "finished"


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-????????"))


def tensors_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of one process."""
    return {name: tensor for file in checkpoint.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_same(out: Path, truth: Path) -> None:
    """The log's every number, the exported weights and the last checkpoints: the same bits."""
    assert read_status(out) == {"state": "finished", "step": STEPS}
    mine, other = read_metrics(out), read_metrics(truth)
    assert [line["step"] for line in mine if "loss" in line] == list(range(1, STEPS + 1))
    assert mine == other
    for path in sorted((truth / "final").glob("*.safetensors")):
        assert (out / "final" / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(path.name for path in (out / "final").iterdir()) == sorted(
        path.name for path in (truth / "final").iterdir()
    )
    for step in set(steps_of(out)) & set(steps_of(truth)):
        name = f"checkpoints/step-{step:08d}"
        assert same_tensors(tensors_in(out / name), tensors_in(truth / name)), name
    assert not list(out.rglob("*.tmp"))


@pytest.fixture
def world():
    """A process group of one."""
    yield distributed.start("cpu")
    distributed.stop()


@pytest.fixture(scope="module")
def truth(home: Path) -> Path:
    """The run that nothing interrupts."""
    out = home / "truth"
    finish(out, home, *own_caches(out))
    return out


# --- deeds ---------------------------------------------------------------------------------------------------------


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # in a thread the end may take a moment


def do_and_die(original: Callable, *args, **kwargs) -> None:
    original(*args, **kwargs)
    die()


def append_half(original: Callable, cache, pairs, logps) -> None:
    original(cache, pairs, logps)
    os.truncate(cache.file.name, os.stat(cache.file.name).st_size - RECORD.itemsize // 3)
    die()


def write_half_a_line(original: Callable, log, metrics) -> None:
    original(log, metrics)
    os.truncate(log.file.fileno(), os.fstat(log.file.fileno()).st_size - 7)
    die()


def write_half_a_shard(original: Callable, writer, *args, **kwargs) -> None:
    original(writer, *args, **kwargs)
    for path in Path(writer.path).iterdir():
        os.truncate(path, path.stat().st_size // 2)
    die()


def delete_half(_original: Callable, directory: Path, **_kwargs) -> None:
    min(Path(directory).iterdir()).unlink()
    die()


def fill_the_disk(*_, **__) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Signal(NamedTuple):
    number: int
    times: int = 1

    def __call__(self, original: Callable, *args, **kwargs):
        for _ in range(self.times):
            os.kill(os.getpid(), self.number)
        return original(*args, **kwargs)


# --- the kill test -------------------------------------------------------------------------------------------------

REPLACE, RMTREE = "pathlib:Path.replace", "shutil:rmtree"
MOMENTS = [  # in the order of a run; which call it is, is drawn
    ("environment.json", REPLACE, die, 1, r"environment\.json\.tmp$"),
    ("config.toml", REPLACE, die, 1, r"config\.toml\.tmp$"),
    ("digests", REPLACE, die, 1, r"digests.*\.tmp$"),
    ("tokens made", REPLACE, die, 2, r"tokens/\w+\.tmp$"),
    ("reference header", REPLACE, die, 1, r"header.*\.tmp$"),
    ("reference pass", "notus.reference:pair_logps", die, 5, ""),
    ("reference, before an append", "notus.reference:ReferenceCache.append", die, 4, ""),
    ("reference, amid an append", "notus.reference:ReferenceCache.append", append_half, 4, ""),
    ("reference, after an append", "notus.reference:ReferenceCache.append", do_and_die, 4, ""),
    ("log rewritten", REPLACE, die, 1, r"metrics\.jsonl\.tmp$"),
    ("evaluation", "train:score_pairs", die, 2, ""),
    ("amid evaluation", "train:sums", die, 7, ""),
    ("evaluation not yet logged", "train:score_pairs", do_and_die, 2, ""),
    ("amid a line of the log", "notus.metrics:MetricsLog.write", write_half_a_line, 7, ""),
    ("line written", "notus.metrics:MetricsLog.write", do_and_die, 7, ""),
    ("forward", "train:pair_logps", die, 8, ""),
    ("before the optimizer's step", "torch.optim:RMSprop.step", die, 4, ""),
    ("after the optimizer's step", "torch.optim:RMSprop.step", do_and_die, 4, ""),
    ("copy to host memory", "notus.checkpoint:state_of", die, 3, ""),
    ("before writing a checkpoint", "torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", die, 2, ""),
    ("amid a shard", "torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", write_half_a_shard, 2, ""),
    ("shards written", "torch.distributed.checkpoint:HuggingFaceStorageWriter.write_data", do_and_die, 2, ""),
    ("amid checksums", "notus.checkpoint:checksum", die, 2, r"step-\d+\.tmp"),
    ("before the manifest is on disk", "notus.checkpoint:fsync", die, 4, r"step-\d+\.tmp"),
    ("before the rename", REPLACE, die, 2, r"step-\d+\.tmp$"),
    ("between rename and deletion", REPLACE, do_and_die, 2, r"step-\d+\.tmp$"),
    ("before an old one is deleted", RMTREE, die, 1, r"step-\d+$"),
    ("amid deletion of an old one", RMTREE, delete_half, 1, r"step-\d+$"),
    ("status", REPLACE, die, 3, r"status\.json\.tmp$"),
    ("export begins", "train:model_card", die, 1, ""),
    ("amid the exported file", "notus.weights:full_tensor", die, 9, ""),
    ("export not renamed", REPLACE, die, 1, r"final\.tmp$"),
    ("export renamed", REPLACE, do_and_die, 1, r"final\.tmp$"),
    ("summary", REPLACE, die, 1, r"summary\.json\.tmp$"),
    ("finished but for the word", "train:summary", do_and_die, 1, ""),
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
        raise Preempted

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
    strikes = [Strike(REPLACE, sleep_before, 1, name).arm for name in (r"digests.*tmp$", r"header.*tmp$")]
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
    checkpoints.save(model, optimizer, 2, {})
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
    checkpoints.save(model, optimizer, 2, {"more": "facts"})
    for tensor in state_of(model, optimizer).values():
        tensor.add_(1.0)
    assert not checkpoints.complete()
    spoiled.set()
    checkpoints.wait()

    manifest = checkpoints.find()
    assert (manifest["step"], manifest["more"]) == (2, "facts")
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
        if fault or any(checksum(newest / name) != expected for name, expected in manifest["files"].items()):
            continue
        assert (manifest["step"], manifest["files"]) == (6, whole["files"]), bytes(flipped)


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


# --- a full disk ---------------------------------------------------------------------------------------------------


def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(home: Path, spoiled: Path, truth: Path) -> None:
    """Files may be as large as the exported model, which shards with optimizer state are not."""
    largest = (truth / "final" / "model.safetensors").stat().st_size * 3 // 2
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (largest, largest))
    said = finish(spoiled, home, deeds=(limit,))
    assert re.findall(r"step-0000000(\d) could not be saved, training goes on: .+", said) == ["8", "9"]
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
        Strike("notus.checkpoint:fsync", fill_the_disk, 5, r"step-\d+\.tmp"),
        Strike("notus.checkpoint:state_of", fill_the_disk, 2),
    ],
    ids=["shards", "sync", "copy"],
)
def test_a_disk_that_is_full_once(strike: Strike, home: Path, truth: Path, tmp_path: Path) -> None:
    said = finish(tmp_path / "out", home, strikes=(strike,))
    assert "step-00000004 could not be saved, training goes on: " in said
    assert "No space left on device" in said
    assert_same(tmp_path / "out", truth)


def test_curves_that_cannot_be_written_fail_no_run(home: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "No space left on device" in finish(out, home, strikes=(Strike("train:plot", fill_the_disk),))
    assert_same(out, truth)


def test_a_checkpoint_that_cannot_be_read_ends_the_run_with_a_reason(home: Path, spoiled: Path, truth: Path) -> None:
    """And is not lost: the disk may only be out of reach."""
    strike = Strike("torch.distributed.checkpoint:HuggingFaceStorageReader.read_data", fill_the_disk)
    outcome = launch(spoiled, home, strikes=(strike,))
    assert outcome.code == 1
    assert re.search(r"train\.py: error: rank 0: .*No space left on device", outcome.text), outcome.text
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_a_run_after_its_step(number: int, home: Path, truth: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = launch(out, home, strikes=(step_strike(number, 5),))
    assert first.code == 75, first.text
    assert read_status(out) == {"state": "preempted", "step": 5}
    assert steps_of(out) == [4, 5]
    assert [line["step"] for line in read_metrics(out) if "loss" in line] == [1, 2, 3, 4, 5]
    assert "stopped after step 5, as asked" in first.text
    finish(out, home)
    assert_same(out, truth)


def step_strike(number: int, step: int, times: int = 1) -> Strike:
    return Strike("train:lr_at", Signal(number, times), step)


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
    first = launch(out, home, strikes=(Strike("train:score_pairs", Signal(signal.SIGTERM), 2),))  # after step 4
    assert (first.code, read_status(out)) == (75, {"state": "preempted", "step": 5})
    finish(out, home, strikes=(step_strike(signal.SIGTERM, 4),))  # in step 9: there is nothing left to do
    assert_same(out, truth)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_a_run_at_once(number: int, home: Path, truth: Path, tmp_path: Path) -> None:
    """Not one that comes on the heels of the first: that is the same request by another road."""
    out = tmp_path / "out"
    echo = launch(out, home, strikes=(step_strike(number, 5, times=2),))
    assert (echo.code, read_status(out)) == (75, {"state": "preempted", "step": 5})
    first = launch(out, home, strikes=(step_strike(number, 2, times=2),), deeds=(take_no_echoes,))
    assert first.code == 128 + number
    assert [line["step"] for line in read_metrics(out) if "loss" in line] == [1, 2, 3, 4, 5, 6]
    finish(out, home)
    assert_same(out, truth)


def take_no_echoes() -> None:
    StopSignal.ECHO_SECONDS = 0.0


def test_torchrun_hands_signals_on(home: Path, tmp_path: Path) -> None:
    """Two ranks, asked by way of torchrun's agent, agree on the step; and again, when they went on."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", str(ROOT / "train.py"), "run.toml"]
    command += [f"train.output_dir={out}", "train.num_train_epochs=10000", "train.eval_steps=100000"]
    command += ["train.save_steps=100000", "train.learning_rate=1e-6"]
    stopped = 0
    for number in (signal.SIGUSR1, signal.SIGTERM):
        with (tmp_path / "log").open("w") as log:
            agent = subprocess.Popen(
                command, cwd=home, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        wait_until(lambda stopped=stopped: last_step(out) > stopped + 2, agent)
        agent.send_signal(number)
        agent.wait(60)
        text = (tmp_path / "log").read_text()
        status = read_status(out)
        assert status["state"] == "preempted", text
        assert status["step"] > stopped
        stopped = status["step"]
        assert steps_of(out)[-1] == stopped == last_step(out)
        assert read_manifest(out / "checkpoints" / f"step-{stopped:08d}")[1] == ""
        assert f"stopped after step {stopped:,}, as asked" in text
        print(f"torchrun ended with {agent.returncode} after {number.name}")
    assert "resuming    after step" in text


def last_step(out: Path) -> int:
    try:
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().rpartition("\n")[0].splitlines()]
    except OSError:
        return 0
    return max([line["step"] for line in lines], default=0)


def wait_until(reached: Callable[[], bool], process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


# --- which run it is -----------------------------------------------------------------------------------------------

OTHER = {
    "data.max_length": 40, "data.max_prompt_length": 20, "data.bos": False, "data.drop_bad_pairs": True,
    "data.insert_system": False, "data.system_prompt": "a b", "dpo.beta": 0.2, "dpo.label_smoothing": 0.1,
    "train.learning_rate": 2e-3, "train.optimizer": "adamw", "train.weight_decay": 0.1, "train.warmup_ratio": 0.5,
    "train.num_train_epochs": 2, "train.pairs_per_step": 9, "train.max_grad_norm": 0.5, "train.seed": 43,
    "train.compute_dtype": "bfloat16",
}  # fmt: skip


def refused(home: Path, out: Path, capsys, monkeypatch, *arguments: str) -> str:
    """What is said; the folder stays as it is."""
    monkeypatch.chdir(home)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert train.main(["run.toml", f"train.output_dir={out}", *arguments]) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    return capsys.readouterr().err


@pytest.mark.parametrize("name", configuration.identity(configuration.load(ROOT / "configs" / "demo.toml")))
def test_another_setting_is_another_run(name: str, home: Path, interrupted: Path, capsys, monkeypatch) -> None:
    setting = f"{name}={json.dumps(OTHER[name])}"
    said = refused(home, interrupted, capsys, monkeypatch, setting, f"data.cache_dir={home / 'others'}")
    assert re.search(rf"{re.escape(name)} was .* and is {re.escape(repr(OTHER[name]))}", said), said
    assert str(interrupted) in said and said.count(" was ") == 1


def test_other_data_or_another_base_is_another_run(
    home: Path, interrupted: Path, capsys, monkeypatch, tmp_path
) -> None:
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("".join((home / "train.jsonl").read_text().splitlines(keepends=True)[1:]))
    base = shutil.copytree(home / "base", tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for setting, name in (
        (f"data.train={fewer}", "sha256 of data.train"),
        (f"data.test={fewer}", "sha256 of data.test"),
        ("data.test=", "sha256 of data.test"),
        (f"model.path={base}", "sha256 of model.path"),
    ):
        said = refused(home, interrupted, capsys, monkeypatch, setting)
        assert f"{name} was " in said and said.count(" was ") == 1, said


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
        assert f"{tmp_path}: is not empty, and holds no run" in said
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
    monkeypatch.setattr(train, "plot", lambda output: output)
    monkeypatch.setattr(train, "StopSignal", lambda: SimpleNamespace(received=False))  # this process keeps its handlers
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
    assert "FloatingPointError: loss or gradient was not finite in 2 steps in a row, up to 6" in outcome.text
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
