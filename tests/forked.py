"""Small runs of train.py, in forked processes, for the tests of kills and of damaged files.

To be killed at a chosen moment a process strikes itself: at the n-th call of a chosen function it does something else,
and mostly that is SIGKILL.
"""

import errno
import functools
import gc
import importlib
import itertools
import json
import multiprocessing.forkserver
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch._dynamo  # torch's optimizers import it in their first step
from safetensors.torch import load_file
from tiny import save_checkpoint, tiny_config, tiny_model

import train
from notus.chat import ZEPHYR_TEMPLATE
from notus.run import StopSignal

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["forked"])  # torch is imported once: a run starts in a fraction of a second
gc.freeze()  # and no run's garbage collector looks through it again

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
optimizer = "rmsprop"
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
TIMINGS = {"tokens_per_second", "memory_gib", "checkpoint_stall_seconds", "sample_seconds", "eval_runtime"}
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


def start_server() -> None:
    """Of the processes that runs are forked from."""
    before = Path.cwd()
    os.chdir(ROOT / "tests")  # where Python before 3.13 looks for what to preload
    multiprocessing.forkserver.ensure_running()
    os.chdir(before)


def make_home(home: Path) -> Path:
    """The folder that every run is started in: a base, its data and a configuration."""
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
    train.report.plot = no_curves  # they take longer than the run, and so do long answers
    train.sample_answers = partial(train.sample_answers, max_new_tokens=3)
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
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"the run hangs: {log.read_text()[before:]}")
    return Outcome(process.exitcode, log.read_text()[before:], out)


def finish(out: Path, home: Path, *overrides: str, strikes: tuple[Strike, ...] = (), deeds: tuple = ()) -> str:
    """One process that must come to the end of its run; what it said."""
    outcome = launch(out, home, *overrides, strikes=strikes, deeds=deeds)
    assert outcome.code == 0, outcome.text
    return outcome.text


def no_curves(_output: Path) -> None:
    raise ImportError("by the test")


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
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def read_status(out: Path) -> dict:
    return json.loads((out / "status.json").read_text())


def read_summary(out: Path) -> dict:
    """Without how long things took."""
    summary = json.loads((out / "summary.json").read_text())
    del summary["seconds"]
    for name in ("first", "last"):
        summary[name].pop("eval_runtime", None)
    return summary


def is_finished(out: Path) -> bool:
    return (out / "status.json").exists() and read_status(out)["state"] == "finished"


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-????????"))


def tensors_in(checkpoint: Path) -> dict[str, torch.Tensor]:
    """By file and name."""
    files = checkpoint.glob("*.safetensors")
    return {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_same(out: Path, truth: Path) -> None:
    """Every number of the log and the summary, the exported model and the last checkpoints: the same bits."""
    assert read_status(out) == {"state": "finished", "step": STEPS}
    mine, other = read_metrics(out), read_metrics(truth)
    assert [line["step"] for line in mine if "loss" in line] == list(range(1, STEPS + 1))
    assert mine == other
    assert (out / "samples.jsonl").read_bytes() == (truth / "samples.jsonl").read_bytes()
    assert read_summary(out) == read_summary(truth)
    ours, theirs = ({path.name: path.read_bytes() for path in (run / "final").iterdir()} for run in (out, truth))
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name] and name != "README.md"] == []  # it names its run
    for step in set(steps_of(out)) & set(steps_of(truth)):
        name = f"checkpoints/step-{step:08d}"
        assert same_tensors(tensors_in(out / name), tensors_in(truth / name)), name
    assert not list(out.rglob("*.tmp"))


# --- deeds ---


def die(*_, **__) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # in a thread the end may take a moment


def do_and_die(original: Callable, *args, **kwargs) -> None:
    original(*args, **kwargs)
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


def step_strike(number: int, step: int, times: int = 1) -> Strike:
    return Strike("train:lr_at", Signal(number, times), step)


def take_no_echoes() -> None:
    StopSignal.ECHO_SECONDS = dict.fromkeys(StopSignal.ECHO_SECONDS, 0.0)


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
