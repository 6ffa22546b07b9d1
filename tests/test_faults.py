"""Law 11: a damaged file never gives another result.

Every file that a run, a cache or a base consists of is cut, emptied, filled with NULs, flipped in one bit, deleted, or
replaced by a folder or a pipe. Then the run ends as if nothing had happened, or it is refused: exit code 2, one
sentence on one screen, and the file is named.

`FAULTS=all pytest tests/test_faults.py` tries every file with every fault, and several bits of it. Otherwise it is a
sample that has each file and each fault.
"""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from forked import Outcome, Strike, assert_same, die, finish, launch, steps_of
from safetensors.torch import load_file, save_file

from notus import evaluate, generate
from notus.chat import ZEPHYR_TEMPLATE

BASE = (
    "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "chat_template.jinja",
)  # fmt: skip
RUN = (
    "environment.json", "config.toml", "status.json", "metrics.jsonl", "run.lock",
    "checkpoints/step-00000002/checkpoint.json", "checkpoints/step-00000002/*.safetensors",
    "checkpoints/step-00000004/checkpoint.json", "checkpoints/step-00000004/*.safetensors",
)  # fmt: skip
CACHES = (
    "tokens/*/ids.npy", "tokens/*/bounds.npy", "tokens/*/where.npy", "tokens/*/counts.json", "tokens/*.lock",
    "reference/*/header.json", "reference/*/header.lock", "reference/*/*.records",
)  # fmt: skip
INPUTS = (*(f"base/{name}" for name in BASE), "train.jsonl", "test.jsonl")
FINAL = (
    "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
    "chat_template.jinja", "notus.json",
)  # fmt: skip


# --- faults --------------------------------------------------------------------------------------------------------


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def replace(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)


FAULTS: dict[str, Callable[[Path, random.Random], None]] = {
    "truncated": lambda path, _: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path, _: os.truncate(path, 0),
    "nuls": lambda path, _: path.write_bytes(bytes(path.stat().st_size)) and None,
    "bit": flip,
    "deleted": lambda path, _: path.unlink(),
    "folder": lambda path, _: replace(path, Path.mkdir),
    "pipe": lambda path, _: replace(path, os.mkfifo),
}


def sample(files: tuple[str, ...], seed: int) -> list[tuple[str, str]]:
    """(file, fault): all of them, or each file once and each fault at least once."""
    if os.environ.get("FAULTS") == "all":
        return [(file, fault) for file in files for fault in (*FAULTS, "bit 2", "bit 3", "bit 4")]
    rng = random.Random(seed)
    faults = rng.sample(list(FAULTS), len(FAULTS))
    return [(file, faults[i % len(faults)]) for i, file in enumerate(rng.sample(files, len(files)))]


def spoil(folder: Path, file: str, fault: str) -> None:
    """Every file that the pattern matches."""
    paths = sorted(folder.glob(file))
    assert paths, f"{folder} has no {file}"
    for path in paths:
        FAULTS[fault.split()[0]](path, random.Random(f"{path.relative_to(folder)} {fault}"))


# What a refusal may name instead of the file: the part of the run's identity that the file decides.
PARTS = {
    "model-0": "sha256 of the weights was", "model.safetensors.index": "the weights ",
    "tokenizer": "tokenizer: ", "chat_template": "chat template: ", "config.json": "config.json: ",
    "train.jsonl": "sha256 of data.train was", "test.jsonl": "sha256 of data.test was",
}  # fmt: skip


def assert_one_sentence(text: str, file: str) -> None:
    """A refusal on one screen that names the file."""
    assert "Traceback" not in text and len(text) < 2500, text
    (error,) = re.findall(r"^\S+: error: (.*)", text, re.M)
    name = file.rpartition("/")[2]
    parts = [part for key, part in PARTS.items() if name.startswith(key)]
    named = name.lstrip("*") in error or any(part in error for part in parts)
    assert named and not error.startswith("["), error  # [Errno 21] is no sentence


# --- a world with a run that was interrupted -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in two shards, data, full caches, a finished run and one that was killed with the checkpoints of steps 2
    and 4."""
    world = tmp_path_factory.mktemp("faults") / "world"
    shutil.copytree(home / "base", world / "base")
    for name in ("train.jsonl", "test.jsonl", "run.toml"):
        shutil.copy(home / name, world)
    base = world / "base"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {BASE[2]: names[: len(names) // 2], BASE[3]: names[len(names) // 2 :]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (base / BASE[1]).write_text(json.dumps(index))
    tokenizer_config = json.loads((base / "tokenizer_config.json").read_text())
    del tokenizer_config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (base / "chat_template.jinja").write_text(ZEPHYR_TEMPLATE)
    (base / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))

    finish(world / "truth", world)
    outcome = launch(world / "out", world, strikes=(Strike("notus.checkpoint:state_of", die, 3),))
    assert outcome.code == -signal.SIGKILL and steps_of(world / "out") == [2, 4], outcome.text
    return world


@pytest.fixture
def copy(world: Path, tmp_path: Path) -> Iterator[Path]:
    """One to spoil. It goes when the test is done: there may be hundreds."""
    yield shutil.copytree(world, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")


def judge(outcome: Outcome, truth: Path, file: str) -> None:
    print(f"outcome: {outcome.code}")
    if outcome.code == 0:
        assert "Traceback" not in outcome.text, outcome.text
        assert_same(outcome.out, truth)
    else:
        assert outcome.code == 2, outcome.text
        assert_one_sentence(outcome.text, file)


RESUMED = (*INPUTS, *(f"out/{name}" for name in RUN), *CACHES)


@pytest.mark.parametrize(("file", "fault"), sample(RESUMED, seed=0))
def test_a_fault_between_start_and_resume(file: str, fault: str, copy: Path, world: Path) -> None:
    spoil(copy, file, fault)
    judge(launch(copy / "out", copy), world / "truth", file)


@pytest.mark.parametrize(("file", "fault"), sample((*CACHES, *INPUTS), seed=1))
def test_a_fault_before_a_new_run(file: str, fault: str, copy: Path, world: Path) -> None:
    """A new run cannot know what its inputs were. Where a fault makes another valid input of them, it is only sure that
    the run ends in good order."""
    before = [path.read_bytes() for name in INPUTS for path in [copy / name]]
    spoil(copy, file, fault)
    outcome = launch(copy / "new", copy)
    intact = file in CACHES or [(copy / name).is_file() and (copy / name).read_bytes() for name in INPUTS] == before
    if outcome.code == 0 and not intact:
        assert "Traceback" not in outcome.text, outcome.text
    else:
        judge(outcome, world / "truth", file)


@pytest.mark.parametrize(("file", "fault"), sample(FINAL, seed=2))
def test_a_fault_in_what_a_run_made(file: str, fault: str, copy: Path, capsys) -> None:
    """generate and evaluate say what they would have said, or that the file is not as the run left it."""
    final = copy / "truth" / "final"

    def answers() -> tuple[list[int], str, str]:
        codes = [
            generate.main(["--model", str(final), "--prompt", "a b", "--max-new-tokens", "20", "--device", "cpu"]),
            evaluate.main(
                ["preferences", "--model", str(final), "--base", str(copy / "base"), "--data", str(copy / "test.jsonl")]
            ),
        ]
        said = capsys.readouterr()
        return codes, said.out, said.err

    before = answers()
    assert before[0] == [0, 0], before
    spoil(final, file, fault)
    after = answers()
    print(f"outcome: {max(after[0])}")
    if after[0] == [0, 0]:
        assert after[:2] == before[:2]
    else:
        assert after[0] == [2, 2], after
        for line in after[2].strip().splitlines():
            assert_one_sentence(line, file)
