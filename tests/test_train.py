"""train.py, the whole of it: the run is that of a plain loop over transformers' model, its papers are complete, and
whatever a user can get wrong is refused before a weight is read."""

import fcntl
import json
import math
import os
import random
import re
import resource
import runpy
import shutil
import subprocess
import sys
import time
import weakref
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import small_vocabulary, write_mistral_tokenizer
from forked import join, log_of, no_curves, start_ranks, start_server
from safetensors.torch import load_file, save_file
from tiny import config_json, hf_load, hf_logps, random_pairs, save_checkpoint, tiny_config, tiny_model
from torch import Tensor

from notus import base as base_module
from notus import config as configuration
from notus import distributed, evaluate, metrics, report, weights
from notus.base import Frame, load_model, read_base
from notus.chat import ZEPHYR_TEMPLATE
from notus.checkpoint import Checkpoints
from notus.distributed import World
from notus.generate import generate
from notus.losses import METRICS, PreferenceLoss
from notus.model import RECOMPUTE
from notus.optim import make_optimizer
from notus.packing import pack_pairs
from notus.plan import MISTRAL_7B
from notus.reference import RECORD, check_same
from notus.tokens import PairSet, load_pairs, pair_key

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

LOG2 = math.log(2)
LOSS = PreferenceLoss("dpo", 0.1)
SHARD = "shard-00001-model-00001-of-00001.safetensors"
WORDS = [
    "a",
    "red",
    "blue",
    "fish",
    "boat",
    "runs",
    "swims",
    "over",
    "under",
    "quick",
    "dog",
    "sea",
    "sun",
    "is",
    "not",
]
VOCABULARY = small_vocabulary("\n".join(f"Yes, {' '.join(WORDS)}.\n{word}, {word}! {word}." for word in WORDS))
CONFIG_OF_BASE = tiny_config(
    vocab_size=VOCABULARY.vocab_size(), hidden_size=16, intermediate_size=36, initializer_range=0.1
)
TRAIN_PAIRS, TEST_PAIRS, PAIRS_PER_STEP, STEPS, EVALUATIONS = 40, 9, 12, 8, (0, 3, 6, 8)
CONFIG = """
[model]
path = "base"
[data]
train = "train.jsonl"
test = "test.jsonl"
max_length = 128
max_prompt_length = 64
cache_dir = "tokens"
[train]
output_dir = "out"
learning_rate = 1e-3
optimizer = "rmsprop"
warmup_ratio = 0.2
num_train_epochs = 2
pairs_per_step = 12
micro_batch_tokens = 200
max_grad_norm = 0.3
compute_dtype = "float32"
export_dtype = "float32"
device = "cpu"
eval_steps = 3
sample_prompts = 0
[reference]
cache_dir = "reference"
[distributed]
timeout_minutes = 2
"""


def rows(rng: random.Random, count: int) -> list[dict]:
    """Chosen answers have a word of their own, so that there is something to learn."""

    def words(most: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))

    made = []
    for _ in range(count):
        user = {"role": "user", "content": words(8)}
        chosen, rejected = f"Yes, {words(9)}.", f"{words(9)}!"
        answers = {"chosen": chosen, "rejected": rejected}
        made.append({name: [user, {"role": "assistant", "content": text}] for name, text in answers.items()})
    return made


def pairs_of(base: Path, path: Path) -> PairSet:
    """The pairs of a file as the run of CONFIG reads them."""
    return load_pairs([path], read_base(base).encoder(Frame()), max_length=128, max_prompt_length=64)


def write(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def world_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a vocabulary of Mistral's kind, data and a configuration. Runs add to its reference cache only."""
    directory = tmp_path_factory.mktemp("world")
    write_mistral_tokenizer(save_checkpoint(tiny_model(CONFIG_OF_BASE), directory / "base"), VOCABULARY)
    rng = random.Random(0)
    write(directory / "train.jsonl", rows(rng, TRAIN_PAIRS))
    write(directory / "test.jsonl", rows(rng, TEST_PAIRS))
    (directory / "run.toml").write_text(CONFIG)
    return directory


def copy_world(world_dir: Path, to: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(
        world_dir, to, dirs_exist_ok=True, ignore=shutil.ignore_patterns("out*", "reference*", "tokens*")
    )


@pytest.fixture(scope="module")
def finished(world_dir: Path) -> Path:
    """The output of one run, which many tests read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world_dir)
        assert train.main(["run.toml"]) == 0
    assert not dist.is_initialized()
    return world_dir / "out"


@pytest.fixture
def run(finished: Path, monkeypatch, tmp_path: Path) -> Callable[..., Path]:
    """Run again with other settings, into another folder -> that folder."""
    monkeypatch.chdir(finished.parent)
    monkeypatch.setattr(train.report, "plot", no_curves)  # they take longer than the run

    def run(*overrides: str) -> Path:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        assert train.main(["run.toml", f"train.output_dir={out}", *overrides]) == 0
        return out

    yield run
    distributed.stop()


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def training(out: Path) -> list[dict]:
    return [line for line in read_metrics(out) if "loss" in line]


def evaluations(out: Path) -> list[dict]:
    return [line for line in read_metrics(out) if "eval_loss" in line]


def exported(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "final" / "model.safetensors")


def assert_same_run(ours: Path, theirs: Path, tolerance: float) -> None:
    """Every number of both logs, and every exported weight."""
    timings = {"tokens_per_second", "memory_gib", "checkpoint_stall_seconds", "eval_runtime", "sample_seconds"}
    for mine, other in zip(read_metrics(ours), read_metrics(theirs), strict=True):
        assert mine.keys() - timings == other.keys() - timings
        for name in mine.keys() - timings:
            assert mine[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), (mine["step"], name)
    mine, other = exported(ours), exported(theirs)
    assert mine.keys() == other.keys()
    assert max(float((mine[name] - other[name]).abs().max()) for name in mine) <= tolerance


# --- the numbers ---------------------------------------------------------------------------------------------------


def logistic(x: Tensor) -> Tensor:
    return (1 + (-x).exp()).log()


FORMULAS = {  # settings -> the loss of a pair, of log-ratios, log-probs and tokens, each (chosen, rejected)
    ("dpo.loss=dpo", "dpo.beta=0.2", "dpo.label_smoothing=0.1"): lambda d, _logp, _n: (
        0.9 * logistic(0.2 * (d[0] - d[1])) + 0.1 * logistic(-0.2 * (d[0] - d[1]))
    ),
    ("dpo.loss=dpo_norm", "dpo.beta=5"): lambda d, _logp, n: logistic(5 * (d[0] / n[0] - d[1] / n[1])),
    ("dpo.loss=ipo", "dpo.beta=0.4"): lambda d, _logp, n: (d[0] / n[0] - d[1] / n[1] - 1.25) ** 2,
    ("dpo.loss=simpo", "dpo.beta=2", "dpo.margin=0.6"): lambda _d, logp, n: logistic(
        2 * (logp[0] / n[0] - logp[1] / n[1]) - 0.6
    ),
    ("dpo.loss=apo_zero", "dpo.beta=0.1"): lambda d, _logp, _n: (
        1 - 1 / (1 + (-0.1 * d[0]).exp()) + 1 / (1 + (-0.1 * d[1]).exp())
    ),
    ("dpo.nll_weight=0.5",): lambda d, logp, n: logistic(0.1 * (d[0] - d[1])) - 0.5 * logp[0] / n[0],
}
START = {"dpo": LOG2, "dpo_norm": LOG2, "ipo": 1.25**2, "apo_zero": 1.0}


def replay(
    directory: Path,
    formula: Callable = lambda d, _logp, _n: logistic(0.1 * (d[0] - d[1])),
    count: int = TRAIN_PAIRS,
    per_step: int = 12,
    steps: int = 8,
) -> tuple[list[tuple[float, float]], torch.nn.Module]:
    """The run of `CONFIG` once more, with nothing of notus but the template's text: transformers' model and tokenizer,
    a second, live model as the reference, one pair at a time, full log-softmax -> (loss, grad norm) by step, policy."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "base" / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )

    def ids(messages: list[dict], prompt: bool) -> list[int]:
        messages = [{"role": "system", "content": ""}, *messages]
        options = {"chat_template": ZEPHYR_TEMPLATE, "add_generation_prompt": prompt, "return_dict": False}
        found = tokenizer.apply_chat_template(messages, **options)
        return [1, *found] if prompt else [1, *found[:-2]]  # without the line end after </s>

    pairs = [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()][:count]
    policy, reference = hf_load(directory / "base").train(), hf_load(directory / "base")
    optimizer = torch.optim.RMSprop(policy.parameters(), alpha=0.99, eps=1e-8)
    history = []
    warmup = math.ceil(0.2 * steps)
    for step in range(steps):
        epoch, place = divmod(step, math.ceil(count / per_step))  # of 40 pairs the last step has 4
        batch = np.random.RandomState([42, epoch]).permutation(count)[place * per_step : (place + 1) * per_step]
        total = 0.0
        for row in (pairs[i] for i in batch):
            prompt = ids(row["chosen"][:-1], True)
            ratios, logps, lengths = [], [], []
            for side in ("chosen", "rejected"):
                answer = ids(row[side], False)[len(prompt) :]
                with torch.no_grad():
                    old = hf_logps(reference, np.array(prompt), np.array(answer))
                logps.append(hf_logps(policy, np.array(prompt), np.array(answer)))
                ratios.append(logps[-1] - old)
                lengths.append(len(answer))
            loss = formula(ratios, logps, lengths) / len(batch)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.3).item()
        rate = step / warmup if step < warmup else (steps - step) / (steps - warmup)
        optimizer.param_groups[0]["lr"] = 1e-3 * rate
        optimizer.step()
        optimizer.zero_grad()
        history.append((total, norm))
    return history, policy


def test_a_plain_loop_over_transformers_model_is_the_same_run(world_dir: Path, finished: Path):
    history, policy = replay(world_dir)
    assert len(history) == len(training(finished)) == STEPS
    assert max(norm for _, norm in history) > 0.3  # clipping took part
    for (loss, norm), line in zip(history, training(finished), strict=True):
        assert line["loss"] == pytest.approx(loss, rel=3e-6), line["step"]
        assert line["grad_norm"] == pytest.approx(norm, rel=3e-6), line["step"]
    theirs = dict(policy.named_parameters())
    for name, tensor in exported(finished).items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=3e-6), name


@pytest.mark.parametrize("settings", FORMULAS, ids=" ".join)
def test_every_loss_is_a_plain_loop_and_begins_at_its_known_value(
    run, world_dir: Path, settings: tuple[str, ...], tmp_path: Path, capsys, monkeypatch
):
    """Law 1 for all. Without a reference none is scored. The model is asked by the loss that trained it."""
    history, policy = replay(world_dir, FORMULAS[settings], count=18, per_step=6, steps=3)
    few = tmp_path / "few.jsonl"
    few.write_text("".join((world_dir / "train.jsonl").read_text().splitlines(keepends=True)[:18]))
    monkeypatch.setattr(report, "plot", lambda _: "")
    if "dpo.loss=simpo" in settings:
        monkeypatch.setattr(train, "score_reference", lambda *_, **__: pytest.fail("a reference was scored"))
    out = run(f"data.train={few}", "train.pairs_per_step=6", "train.num_train_epochs=1", *settings)
    said = capsys.readouterr().out
    for (loss, norm), line in zip(history, training(out), strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5), line["step"]
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5), line["step"]
    theirs = dict(policy.named_parameters())
    assert all(torch.allclose(tensor, theirs[name], rtol=0, atol=1e-5) for name, tensor in exported(out).items())

    loss = read_base(out / "final").frame.preference_loss
    assert f"; {loss}, rmsprop" in said and f"| preference loss | {loss} |" in (out / "final" / "README.md").read_text()
    last = evaluations(out)[-1]
    if loss.start is not None:
        assert loss.start == pytest.approx(START[loss.name], rel=1e-12)
        assert training(out)[0]["loss"] == pytest.approx(loss.start, abs=1e-5)
        assert evaluations(out)[0]["eval_loss"] == pytest.approx(loss.start, abs=1e-5)
        assert last["eval_loss"] < loss.start
    assert ("reference   simpo has none" in said) == (loss.name == "simpo")
    command = ["preferences", "--model", str(out / "final"), "--base", "base", "--data", "test.jsonl", "--dtype"]
    loaded, load_model = [], evaluate.load_model
    monkeypatch.setattr(evaluate, "load_model", lambda base, *rest: loaded.append(base.path) or load_model(base, *rest))
    assert evaluate.main([*command, "float32"]) == 0
    assert len(loaded) == (1 if loss.name == "simpo" else 2)
    figures = capsys.readouterr().out
    for name in ("loss", "rewards/margins", "rewards/chosen"):
        assert float(re.search(rf"^{name} +(\S+)", figures, re.M)[1]) == pytest.approx(last[f"eval_{name}"], abs=6e-5)


def test_the_loss_begins_at_log_2_and_falls(finished: Path):
    losses = [line["loss"] for line in training(finished)]
    assert losses[0] == pytest.approx(LOG2, abs=1e-5)
    assert losses[1] == pytest.approx(LOG2, abs=1e-5)  # the first step's rate is 0
    assert losses[-1] < 0.9 * LOG2
    first, *_, last = evaluations(finished)
    assert first["eval_loss"] == pytest.approx(LOG2, abs=1e-5)
    assert last["eval_loss"] < 0.95 * LOG2
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["eval_rewards/accuracies"] > 0.8


def test_the_exported_model_has_the_log_probs_of_the_last_evaluation(world_dir: Path, finished: Path):
    final = finished / "final"
    pairs = pairs_of(final, world_dir / "test.jsonl")
    policy, reference = hf_load(final), hf_load(world_dir / "base")
    with torch.no_grad():
        logps = torch.stack(
            [hf_logps(m, pair.prompt, a) for m in (policy, reference) for pair in pairs for a in pair[2:]]
        ).view(2, TEST_PAIRS, 2)
    last = evaluations(finished)[-1]
    chosen, rejected = logps[0].mean(0).tolist()
    assert last["eval_logps/chosen"] == pytest.approx(chosen, rel=1e-6)
    assert last["eval_logps/rejected"] == pytest.approx(rejected, rel=1e-6)
    rewards = 0.1 * (logps[0] - logps[1])
    margins = rewards[:, 0] - rewards[:, 1]
    expected = [-torch.nn.functional.logsigmoid(margins).mean(), *rewards.mean(0), (margins > 0).float().mean()]
    assert [last[f"eval_{name}"] for name in METRICS[:4]] == pytest.approx([x.item() for x in expected], rel=1e-4)


@pytest.mark.parametrize("tokens", [30, 90, 100_000])
def test_micro_batches_change_nothing(run, finished: Path, tokens: int):
    """From a pair in each, for none is as short as 30, to a step in one."""
    assert_same_run(run(f"train.micro_batch_tokens={tokens}"), finished, tolerance=1e-5)


@pytest.mark.parametrize("level", RECOMPUTE[1:])
def test_recomputation_changes_nothing(run, finished: Path, level: str):
    assert_same_run(run(f"train.activation_checkpointing={level}"), finished, tolerance=0)


def test_compiled_layers_are_the_same_run(run, finished: Path, tmp_path: Path):
    """Compiled once for streams of any length, and here to machine code; test_compile.py has all levels without it."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    settings = "train.compile=true", "train.activation_checkpointing=elementwise", f"reference.cache_dir={tmp_path}"
    assert_same_run(run(*settings, "train.sample_prompts=1"), finished, tolerance=1e-5)
    # With and without gradients; the last layer, of which only some rows are wanted, and the others. The streams of the
    # run have some 30 different lengths. Samples are generated without the compiler.
    assert counters["stats"]["unique_graphs"] == 4


def test_two_processes_are_one(world_dir: Path, finished: Path, tmp_path: Path):
    """As a user starts them; with another micro-batch and a reference of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    overrides = [f"train.output_dir={tmp_path / 'out'}", f"reference.cache_dir={tmp_path / 'reference'}"]
    overrides.append("train.micro_batch_tokens=90")
    done = subprocess.run(
        [*command, str(ROOT / "train.py"), "run.toml", *overrides],
        cwd=world_dir, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("40 pairs scored") == 1  # one rank speaks
    assert_same_run(tmp_path / "out", finished, tolerance=1e-5)
    facts = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert facts["processes"] == 2
    assert len(list((tmp_path / "reference").rglob("*.records"))) == 2


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (4, ["train.micro_batch_tokens=90"]),  # more micro-batches; in an epoch's last step of 4 pairs a pair a rank
        (4, ["distributed.replicate=2", "train.activation_checkpointing=elementwise"]),  # HSDP: 2 copies of 2 shards
        (3, ["train.micro_batch_tokens=100000"]),  # 4 pairs on 3 ranks; rows that 3 does not divide
    ],
)  # fmt: skip
def test_one_two_and_four_processes_are_one_run(
    world_dir: Path, finished: Path, tmp_path: Path, ranks: int, overrides: list[str]
):
    """Law 6: losses, every logged metric, gradient norms, the exported weights."""
    out = tmp_path / "out"
    start_server()
    assert join(start_ranks(out, world_dir, ranks, *overrides), 300) == [0] * ranks, log_of(out, 0).read_text()
    assert_same_run(out, finished, tolerance=1e-5)


def test_a_bfloat16_run_starts_at_log_2_within_its_rounding(run, finished: Path):
    out = run("train.compute_dtype=bfloat16", "train.num_train_epochs=1", "train.export_dtype=bfloat16")
    lines = training(out)
    assert len(lines) == 4
    # The check of the first step lets 64 eps sqrt(24 tokens) = 2.4 nats a sum pass.
    assert lines[0]["loss"] == pytest.approx(LOG2, abs=0.01)
    assert lines[-1]["loss"] < 0.99 * LOG2
    for mine, other in zip(lines[:2], training(finished)[:2], strict=True):
        assert mine["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=0.01)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
    assert {tensor.dtype for tensor in exported(out).values()} == {torch.bfloat16}


@pytest.mark.gpu
@pytest.mark.parametrize(
    "setting",
    [
        "train.compile=false", "train.compile=true", "distributed.cpu_offload=true",
        "distributed.reshard_after_forward=false",
    ],
)  # fmt: skip
def test_a_run_on_a_gpu_is_the_run_on_the_cpu_to_the_rounding_of_bfloat16(run, finished: Path, setting: str):
    out = run("train.device=cuda", "train.compute_dtype=bfloat16", setting)
    assert training(out)[0]["loss"] == pytest.approx(LOG2, abs=0.05)
    for mine, other in zip(training(out), training(finished), strict=True):
        assert mine["logps/chosen"] == pytest.approx(other["logps/chosen"], rel=0.02)
    assert training(out)[-1]["loss"] == pytest.approx(training(finished)[-1]["loss"], abs=0.1)
    assert (out / "checkpoints" / "step-00000008" / "checkpoint.json").is_file()


@pytest.mark.gpu
@pytest.mark.parametrize("level", RECOMPUTE)
def test_nothing_in_a_micro_batch_makes_the_host_wait_for_the_gpu(monkeypatch, level: str):
    device = torch.device("cuda")
    model = tiny_model(tiny_config(head_dim=16), dtype=torch.bfloat16).to(device)
    model.model.recompute = level
    pairs = random_pairs(np.random.default_rng(0), 6, model.config.vocab_size)
    optimizer = make_optimizer(model.parameters(), "rmsprop", 1e-5, 0.0)
    alone, micro_batch = World(0, 1, device, None), (np.arange(2, 8), pack_pairs(pairs))

    def end_of_step(totals: torch.Tensor) -> torch.Tensor:
        """What follows is where train_step waits, once."""
        torch.cuda.set_sync_debug_mode("default")
        return totals

    monkeypatch.setattr(distributed, "sum_over_ranks", end_of_step)
    for mode in ("default", "error"):  # in the first step kernels are chosen and the optimizer makes its state
        torch.cuda.set_sync_debug_mode(mode)
        try:
            train.train_step(model, optimizer, [micro_batch], torch.zeros(10, 2), 6, alone, preference_loss=LOSS)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_run_without_held_out_pairs(run, capsys):
    out = run("data.test=", "train.num_train_epochs=1")
    assert evaluations(out) == [] and len(training(out)) == 4
    assert "held out" not in capsys.readouterr().out
    assert "nothing was evaluated" in (out / "final" / "README.md").read_text()
    assert json.loads((out / "summary.json").read_text())["last"] == {}


# --- the reference -------------------------------------------------------------------------------------------------


def test_another_run_over_the_same_base_and_text_scores_nothing_anew(run, capsys):
    other = ("train.learning_rate=1e-5", "train.seed=7", "dpo.beta=0.2", "train.pairs_per_step=5")
    run(*other, "train.num_train_epochs=1", "data.train=test.jsonl", "data.test=train.jsonl")
    text = capsys.readouterr().out
    assert "0 pairs scored, 9 found in " in text and "0 held-out pairs scored, 40 found in " in text


def test_pairs_cut_otherwise_are_scored_anew_and_only_they(run, capsys):
    shorter = ("data.max_length=34", "data.max_prompt_length=25", "train.num_train_epochs=1")

    def scored() -> tuple[int, int]:
        run(*shorter)
        return tuple(map(int, re.search(r"(\d+) pairs scored, (\d+) found", capsys.readouterr().out).groups()))

    anew, found = scored()
    assert anew > 10 and found > 10
    assert scored() == (0, anew + found)


def test_a_reference_that_is_not_the_policys_is_refused_with_the_pair(
    finished: Path, tmp_path: Path, monkeypatch, capsys
):
    """A valid record, checksum and all, of another model: off by 0.01 nats in one answer of one pair."""
    world_dir = finished.parent
    monkeypatch.chdir(world_dir)
    shutil.copytree(world_dir / "reference", tmp_path / "reference")
    pairs = pairs_of(world_dir / "base", Path("train.jsonl"))
    victim = pairs[np.random.RandomState([42, 0]).permutation(TRAIN_PAIRS)[3]]  # of the first step
    (header,) = (path for path in tmp_path.rglob("header.json") if "float32" in path.read_text())
    path = header.with_name("rank-00000.records")
    records = np.fromfile(path, dtype=RECORD)
    (index,) = (i for i, record in enumerate(records) if record["key"].tobytes() == pair_key(victim))
    records[index]["logps"][1] += 0.01
    records[index]["crc"] = zlib.crc32(records[index].tobytes()[:-4])
    path.write_bytes(records.tobytes())

    out = tmp_path / "out"
    assert train.main(["run.toml", f"train.output_dir={out}", f"reference.cache_dir={tmp_path / 'reference'}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "in 1 of " in error and f"most in {victim.where}: policy [" in error
    assert "Delete reference.cache_dir" in error
    assert not dist.is_initialized()
    # The rows that are computed again at each start are random: if the victim was one, there is not even a log yet.
    assert not (out / "metrics.jsonl").exists() or training(out) == []
    assert not list(out.glob("final*"))


@pytest.fixture(scope="module")
def first_model(world_dir: Path) -> Path:
    """pi_0, of which the policy begins at a distance: the base with other weights."""
    path = shutil.copytree(world_dir / "base", world_dir / "pi_0")
    model = tiny_model(CONFIG_OF_BASE)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    save_file({name: p.detach().float() for name, p in model.named_parameters()}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("lora", [(), ("lora.rank=2",)], ids=["full", "lora"])
def test_another_reference_is_scored_by_its_own_weights(run, world_dir: Path, first_model: Path, capsys, lora):
    """The first evaluation, by transformers' models of both: neither log 2, nor margins of 0."""
    out = run("dpo.reference=pi_0", "train.num_train_epochs=1", *lora)
    pairs = pairs_of(world_dir / "base", world_dir / "test.jsonl")
    models = hf_load(world_dir / "base"), hf_load(first_model)
    with torch.no_grad():
        policy, old = (
            torch.stack([hf_logps(model, pair.prompt, a) for pair in pairs for a in pair[2:]]).view(-1, 2)
            for model in models
        )
    margins = 0.1 * ((policy - old) @ torch.tensor([1.0, -1.0]))
    first = evaluations(out)[0]
    assert first["eval_loss"] == pytest.approx(float(-torch.nn.functional.logsigmoid(margins).mean()), rel=1e-5)
    assert first["eval_rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-3)
    assert abs(training(out)[0]["loss"] - LOG2) > 1e-3  # law 1 is not asked
    facts = json.loads((out / "environment.json").read_text())
    assert facts["reference_sha256"] != facts["model_sha256"]

    # The cache is keyed by the reference: a run that begins at pi_0 finds its pairs there.
    capsys.readouterr()
    assert abs(training(run("model.path=pi_0", "train.num_train_epochs=1"))[0]["loss"] - LOG2) < 1e-5
    assert "0 pairs scored, 40 found in " in capsys.readouterr().out


def test_the_base_named_as_reference_is_the_same_run(run, world_dir: Path, finished: Path, monkeypatch):
    """By its name or as a copy; law 1 is asked."""
    shutil.copytree(world_dir / "base", world_dir / "copy", dirs_exist_ok=True)
    for name in ("./base", "copy"):
        assert_same_run(run(f"dpo.reference={name}"), finished, tolerance=0)
    calls = []
    monkeypatch.setattr(train, "check_same", lambda *_: calls.append(1))
    run("dpo.reference=copy", "train.num_train_epochs=1")
    assert calls


@pytest.mark.usefixtures("first_model")
def test_there_is_never_a_second_model(run, monkeypatch):
    """The reference is gone before the policy is loaded."""
    alive, load = [], train.load_sharded

    def load_sharded(*arguments, **named):
        assert not [ref for ref in alive if ref() is not None]
        model = load(*arguments, **named)
        alive.append(weakref.ref(model))
        return model

    monkeypatch.setattr(train, "load_sharded", load_sharded)
    run("dpo.reference=pi_0", "train.num_train_epochs=1", "distributed.cpu_offload=true")  # with FSDP2's cycles
    assert len(alive) == 2


def test_the_check_of_the_reference_allows_rounding_and_no_more(world_dir: Path):
    pairs = pairs_of(world_dir / "base", world_dir / "test.jsonl")
    reference = torch.tensor([[-300.0, -20.0], [-50.0, -60.0], [-7.0, -8.0]])
    for dtype, allowed, refused in ((torch.float32, 5e-6, 1e-3), (torch.bfloat16, 0.1, 4.0)):
        for sign in (1, -1):
            check_same(pairs, dtype, range(3), reference + sign * allowed, reference)
            policy = reference.clone()
            policy[1, 0] += sign * refused
            with pytest.raises(ArithmeticError, match=f"in 1 of 3 pairs, most in {pairs[1].where}"):
                check_same(pairs, dtype, range(3), policy, reference)
    policy = reference.clone()
    policy[0, 1] += 1
    policy[2, 1] = math.nan
    with pytest.raises(ArithmeticError, match=f"in 2 of 3 pairs, most in {pairs[2].where}"):
        check_same(pairs, torch.float32, range(3), policy, reference)


def test_a_run_that_diverges_stops_and_names_its_pairs(finished: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(finished.parent)
    assert train.main(["run.toml", f"train.output_dir={tmp_path / 'out'}", "train.learning_rate=1e30"]) == 1
    assert "loss or gradient was not finite in 3 steps in a row" in capsys.readouterr().err
    skipped = [line for line in read_metrics(tmp_path / "out") if "skipped_pairs" in line]
    assert len(skipped) == 3 and all(
        where.startswith("train.jsonl:") for line in skipped for where in line["skipped_pairs"]
    )
    assert not list((tmp_path / "out").glob("final*"))
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "failed"


# --- the papers ----------------------------------------------------------------------------------------------------


def test_the_output_is_complete_and_nothing_else(world_dir: Path, finished: Path):
    def tree(directory: Path) -> set[str]:
        return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}

    final = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"}
    final |= {"tokenizer_config.json", "notus.json", "curves.png"}
    papers = {"config.toml", "environment.json", "metrics.jsonl", "status.json", "summary.json"}
    papers |= {"curves.png", "run.lock"}
    saved = {f"checkpoints/step-00000008/{name}" for name in ("checkpoint.json", SHARD)}
    assert tree(finished) == papers | saved | {f"final/{name}" for name in final}
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        assert (finished / "final" / name).read_bytes() == (world_dir / "base" / name).read_bytes()


@pytest.mark.parametrize("exported", ["merged", "adapter"])
def test_the_lines_of_the_model_card_ask_in_the_frame_of_the_training(
    world_dir: Path, finished: Path, run: Callable, capsys, exported: str
):
    final = (finished if exported == "merged" else run("lora.rank=2", "lora.export=adapter")) / "final"
    code = re.search(r"```python\n(.*?)```", (final / "README.md").read_text(), re.DOTALL)[1]
    found: dict = {}
    capsys.readouterr()
    exec(code.replace('path = "."', f"path = {str(final)!r}").replace("=256", "=8"), found)
    base = read_base(world_dir / "base")
    prompt = base.encoder(Frame()).prompt([{"role": "user", "content": "Why is the sky blue?"}])
    assert found["inputs"]["input_ids"].tolist() == [prompt]
    assert capsys.readouterr().out == base.tokenizer.decode(found["answer"].tolist()) + "\n"


def test_config_toml_is_the_configuration_of_the_run(world_dir: Path, finished: Path):
    assert configuration.load(finished / "config.toml") == configuration.load(world_dir / "run.toml")


def test_environment_json_says_what_it_takes_to_run_again(world_dir: Path, finished: Path):
    facts = json.loads((finished / "environment.json").read_text())
    assert facts.keys() == {
        "command", "started", "git_commit", "versions", "devices", "threads", "data_sha256", "model_sha256",
        "reference_sha256", "identity", "identity_sha256", "processes", "settings", "train_pairs", "test_pairs",
        "steps", "run_id", "train_rows", "test_rows",
    }  # fmt: skip
    alone = distributed.World(0, 1, torch.device("cpu"), None)
    assert facts["reference_sha256"] == facts["model_sha256"] == weights.digest(world_dir / "base", alone)
    assert facts["data_sha256"].keys() == {"train.jsonl", "test.jsonl"}
    assert (facts["processes"], facts["settings"]["train.seed"]) == (1, 42)
    assert (facts["train_pairs"], facts["test_pairs"], facts["steps"]) == (TRAIN_PAIRS, TEST_PAIRS, STEPS)


def test_metrics_have_every_step_by_trls_names(finished: Path):
    lines = read_metrics(finished)
    assert all("NaN" not in line for line in (finished / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in training(finished)] == list(range(1, STEPS + 1))
    assert [line["step"] for line in evaluations(finished)] == list(EVALUATIONS)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))  # one a step, with all that is known of it
    for line in lines:
        step, names = line["step"], {"step", "epoch"}
        if step:
            names |= {*METRICS, "grad_norm", "learning_rate", "tokens_per_second", "memory_gib"}
            margin = pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-6)
            assert line["rewards/margins"] == margin
        if step in EVALUATIONS:
            names |= {f"eval_{name}" for name in (*METRICS, "runtime", "logratios/chosen", "logratios/rejected")}
            assert line["eval_logratios/chosen"] == pytest.approx(10 * line["eval_rewards/chosen"], rel=1e-9)
        if step and step in EVALUATIONS:  # at first all rewards are 0, which correlates with nothing
            names |= {"eval_rewards/length_correlation"}
        assert line.keys() == names | ({"checkpoint_stall_seconds"} if step == STEPS else set())
    assert [line["epoch"] for line in training(finished)] == [k / 4 for k in range(1, STEPS + 1)]
    rates = [1e-3 * factor for factor in (0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)]
    assert [line["learning_rate"] for line in training(finished)] == pytest.approx(rates)


def test_samples_are_the_greedy_answers_of_the_model_and_change_nothing(world_dir: Path, finished: Path, run: Callable):
    out = run("train.sample_prompts=2")
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [step for step in EVALUATIONS for _ in range(2)]
    for directory, found in ((world_dir / "base", samples[:2]), (out / "final", samples[-2:])):
        base = read_base(directory)
        prompts = [pair.prompt.tolist() for pair in (pairs_of(directory, world_dir / "test.jsonl")[i] for i in (0, 4))]
        model = load_model(base, torch.device("cpu"), torch.float32)
        texts = [base.tokenizer.decode(ids) for ids in generate(model, prompts, 64, base.stop_ids)]
        assert [sample["answer"] for sample in found] == texts
        assert [sample["prompt"] for sample in found] == [base.tokenizer.decode(prompt) for prompt in prompts]
    assert samples[0]["before"] is None and samples[-1]["before"] == samples[1]["answer"] != samples[-1]["answer"]
    assert_same_run(out, finished, 0)


def test_summary_json_has_the_first_and_the_last_evaluation(finished: Path):
    summary = json.loads((finished / "summary.json").read_text())
    first, *_, last = evaluations(finished)
    assert summary.keys() == {"steps", "seconds", "first", "last"}
    assert summary["steps"] == STEPS and summary["seconds"] > 0
    for ours, line in ((summary["first"], first), (summary["last"], last)):
        assert ours == {name: value for name, value in line.items() if name.startswith("eval_")}


def test_the_model_card_has_the_last_evaluation(finished: Path):
    card = (finished / "final" / "README.md").read_text()
    last = evaluations(finished)[-1]
    assert f"| loss | {last['eval_loss']:.4f} |" in card
    assert f"| rewards/accuracies | {last['eval_rewards/accuracies']:.4f} |" in card
    assert "`base` tuned by" in card and "base_model" not in card and "](curves.png)" in card
    assert "| pairs | 40 |" in card and "Trained on 40 pairs of 40 rows" in card


def test_log_steps_averages_over_the_pairs_between(run, finished: Path):
    out = run("train.log_steps=3")
    lines = training(out)
    assert [line["step"] for line in lines] == [3, 6, 8]
    sizes = [12, 12, 12, 4] * 2
    every = [line["loss"] for line in training(finished)]
    for line, steps in zip(lines, (range(3), range(3, 6), range(6, 8)), strict=True):
        expected = sum(every[k] * sizes[k] for k in steps) / sum(sizes[k] for k in steps)
        assert line["loss"] == pytest.approx(expected, rel=1e-6)
    assert [line["step"] for line in evaluations(out)] == list(EVALUATIONS)


def test_neither_evaluating_nor_saving_is_time_of_a_step(run, monkeypatch: pytest.MonkeyPatch):
    """The one before the first step too. A clock that they put forward by hours leaves a step its speed."""
    hours = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * len(hours))
    monkeypatch.setattr(metrics, "time", clock)

    def slow(work: Callable) -> Callable:
        def worked(*arguments, **named):
            hours.append(work)
            return work(*arguments, **named)

        return worked

    monkeypatch.setattr(train, "held_out_metrics", slow(train.held_out_metrics))
    monkeypatch.setattr(Checkpoints, "save", slow(Checkpoints.save))
    lines = training(run("train.save_steps=4", "train.num_train_epochs=1"))
    assert len(hours) == 4 and len(lines) == 4  # evaluations at 0, 3 and 4, a checkpoint at 4
    assert all(line["tokens_per_second"] > 1 for line in lines)  # a step has some hundred tokens


# --- what is refused -----------------------------------------------------------------------------------------------


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(directory: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(directory / "base" / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "base" / "model.safetensors")


def edit(number: int, change: Callable[[dict], object], name: str = "train.jsonl") -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        lines = [json.loads(line) for line in (directory / name).read_text().splitlines()]
        lines[number - 1] = change(lines[number - 1])
        write(directory / name, lines)

    return spoil


def fewer_rows(directory: Path) -> None:
    """A consistent checkpoint of 97 tokens, beside a tokenizer of more."""
    change_json(directory / "base" / "config.json", vocab_size=97)
    names = ("lm_head.weight", "model.embed_tokens.weight")
    change_weights(directory, lambda tensors: tensors.update({name: tensors[name][:97].clone() for name in names}))


def answered(row: dict, text: str) -> dict:
    return row | {"rejected": [row["rejected"][0], {"role": "assistant", "content": text}]}


def other_words(directory: Path) -> None:
    """A reference whose tokenizer has two pieces the other way round."""
    path = shutil.copytree(directory / "base", directory / "elsewhere")
    (path / "tokenizer.model").unlink()
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    names = {i: piece for piece, i in vocab.items()}
    vocab[names[300]], vocab[names[301]] = 301, 300
    tokenizer["model"]["merges"] = []
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))


def fewer_rows_of_the_reference(directory: Path) -> None:
    path = shutil.copytree(directory / "base", directory / "elsewhere")
    save_checkpoint(tiny_model(tiny_config(hidden_size=16, intermediate_size=36)), path)


RAW = {"instruction": "Hi", "source": "flan", "completions": []}
NORM = "model.norm.weight"
BAD = {
    "malformed JSONL": (lambda d: (d / "train.jsonl").write_text('{"chosen"\n'), [], "train.jsonl:1: not JSON"),
    "empty JSONL": (lambda d: (d / "train.jsonl").write_text(""), [], "train.jsonl: no rows in it"),
    "no such JSONL": (lambda d: (d / "train.jsonl").unlink(), [], "train.jsonl: no such file"),
    "missing field": (edit(7, lambda row: {"chosen": row["chosen"]}), [], "train.jsonl:7: 'rejected' is missing"),
    "held-out missing field": (edit(3, lambda _row: {}, "test.jsonl"), [], "test.jsonl:3: 'chosen' is missing"),
    "raw UltraFeedback": (edit(1, lambda _row: RAW), [], "train.jsonl:1: a raw UltraFeedback record; make pairs of it"),
    "equal answers": (
        edit(40, lambda row: row | {"rejected": row["chosen"]}),
        [],
        "train.jsonl:40: the chosen and the",
    ),
    "empty answer": (edit(2, lambda row: answered(row, "")), [], "train.jsonl:2: the rejected answer is empty"),
    "unknown setting": (
        None,
        ["data.max_lenght=5"],
        "command line: unknown setting data.max_lenght; did you mean data.",
    ),
    "unknown section": (
        None,
        ["optim.learning_rte=5"],
        "unknown setting optim.learning_rte; did you mean train.learni",
    ),
    "unknown setting in the file": (
        lambda d: (d / "run.toml").write_text(CONFIG + "chache_dir = 'x'\n"),
        [],
        "run.toml:28: unknown setting distributed.chache_dir; did you mean data.cache_dir or reference.cache_dir?",
    ),
    "mistyped": (None, ["train.seed=true"], "command line: train.seed must be a whole number, not True"),
    "out of range": (None, ["dpo.beta=0"], "command line: dpo.beta = 0.0 is outside (0, inf)"),
    "contradiction": (
        None,
        ["data.max_prompt_length=128"],
        "data.max_prompt_length = 128 must be below data.max_length",
    ),
    "not a setting": (None, ["beta"], "'beta' is not of the form section.key=value"),
    "unknown flag": (None, ["--resume"], "'--resume' is not of the form section.key=value"),
    "not TOML": (lambda d: (d / "run.toml").write_text("[model"), [], "run.toml: "),
    "no such TOML": (lambda d: (d / "run.toml").unlink(), [], "run.toml: cannot be read: No such file"),
    "no config.json": (lambda d: (d / "base" / "config.json").unlink(), [], "config.json: no such file"),
    "malformed config.json": (lambda d: (d / "base" / "config.json").write_text("{"), [], "config.json:1: not JSON"),
    "not of a known family": (
        lambda d: change_json(d / "base" / "config.json", model_type="mixtral"),
        [],
        "config.json: model_type is 'mixtral'; supported are mistral, llama, qwen2, qwen3 (the nearest is mistral)",
    ),
    "no weights": (lambda d: (d / "base" / "model.safetensors").unlink(), [], "base: no weights in safetensors format"),
    "missing tensor": (lambda d: change_weights(d, lambda t: t.pop(NORM)), [], f"1 missing tensors, e.g. {NORM}"),
    "extra tensor": (
        lambda d: change_weights(d, lambda t: t.update(extra=torch.zeros(1))),
        [],
        "1 unexpected tensors, e.g. extra",
    ),
    "wrong shape": (
        lambda d: change_weights(d, lambda t: t.update({NORM: torch.zeros(17)})),
        [],
        f"model.safetensors: {NORM} is (17,), but config.json makes it (16,)",
    ),
    "no tokenizer": (
        lambda d: [(d / "base" / name).unlink() for name in ("tokenizer.json", "tokenizer.model")],
        [],
        "base: no tokenizer: neither tokenizer.json nor tokenizer.model",
    ),
    "vocabulary smaller than the ids": (fewer_rows, [], "but the model's embedding has only 97 rows"),
    "no such reference": (None, ["dpo.reference=elsewhere"], "elsewhere: no such folder"),
    "a reference with another tokenizer": (
        other_words,
        ["dpo.reference=elsewhere"],
        "elsewhere: as dpo.reference it must read the ids of base, but id 300 twice is ",
    ),
    "a reference with fewer rows": (
        fewer_rows_of_the_reference,
        ["dpo.reference=elsewhere"],
        "elsewhere: as dpo.reference it must read the ids of base, whose tokenizer has "
        f"{VOCABULARY.vocab_size()}, but its embedding has 97 rows",
    ),
    "output is a file": (None, ["train.output_dir=test.jsonl"], "test.jsonl: is a file"),
    "output not empty": (
        None,
        ["train.output_dir=."],
        ".: is not empty and holds no run; choose another",
    ),
    "no such GPU": (None, ["train.device=cuda"], "local rank 0 has no GPU"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_on_one_screen_before_any_weight_is_read(
    world_dir: Path, tmp_path: Path, monkeypatch, capsys, case: str
):
    spoil, overrides, message = BAD[case]
    if case == "no such GPU" and torch.cuda.is_available():
        pytest.skip("has a GPU")
    copy_world(world_dir, tmp_path)
    monkeypatch.chdir(tmp_path)
    if spoil:
        spoil(tmp_path)

    def files() -> list[Path]:
        return sorted(path for path in tmp_path.rglob("*") if "tokens" not in path.parts)  # of good data, cached

    before = files()
    monkeypatch.setattr(base_module, "load_weights", lambda *_: pytest.fail("weights were read"))
    code = train.main(["run.toml", *overrides])
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("train.py: error: ") and message in err
    assert "Traceback" not in err and len(err.splitlines()) <= 5 and len(err) < 1000
    assert out == ""
    assert files() == before  # no output_dir, no reference
    assert not dist.is_initialized()


def test_bad_pairs_can_be_left_out(run, world_dir: Path, tmp_path: Path, capsys):
    lines = [json.loads(line) for line in (world_dir / "train.jsonl").read_text().splitlines()]
    lines[3]["rejected"] = lines[3]["chosen"]
    lines[5] = answered(lines[5], " ")
    write(tmp_path / "pairs.jsonl", lines)
    out = run(f"data.train={tmp_path / 'pairs.jsonl'}", "data.drop_bad_pairs=true", "train.num_train_epochs=1")
    counts = "38 pairs of 40 rows (dropped: answers are equal 1, dropped: an answer is empty 1)"
    assert counts in capsys.readouterr().out
    assert json.loads((out / "environment.json").read_text())["train_pairs"] == 38


def test_only_the_first_of_many_ranks_complains(world_dir: Path, monkeypatch, capsys):
    monkeypatch.chdir(world_dir)
    for rank, spoken in ((0, True), (1, False)):
        monkeypatch.setenv("RANK", str(rank))
        assert train.main(["run.toml", "dpo.beta=0"]) == 2
        assert bool(capsys.readouterr().err) == spoken


def test_two_processes_cannot_share_an_output_folder(world_dir: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(world_dir)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert train.main(["run.toml", f"train.output_dir={tmp_path / 'out'}"]) == 2
    assert "another process is at work in it" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.lock"]


def test_an_empty_output_folder_is_fine(world_dir: Path, tmp_path: Path, monkeypatch):
    """Schedulers make them."""
    monkeypatch.chdir(world_dir)
    (tmp_path / "made").mkdir()
    assert train.main(["run.toml", f"train.output_dir={tmp_path / 'made'}", "--dry-run"]) == 0
    assert list((tmp_path / "made").iterdir()) == []


# --- the command line ----------------------------------------------------------------------------------------------

CONFIGS = sorted((ROOT / "configs").glob("*.toml"))


def test_settings_without_a_file_change_the_demo(capsys):
    assert train.main(["dpo.beta=0.25", "--print-config", "--train.seed=3"]) == 0
    text = capsys.readouterr().out
    demo = configuration.load(ROOT / "configs" / "demo.toml", ["dpo.beta=0.25", "train.seed=3"])
    assert text == configuration.to_toml(demo)


def test_without_the_demos_data_the_error_says_what_is_missing(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main([]) == 2
    assert "runs/demo/base: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_print_config_round_trips(path: Path, tmp_path: Path, capsys):
    assert train.main([str(path), "--print-config", "dpo.beta=0.3"]) == 0
    (tmp_path / "printed.toml").write_text(capsys.readouterr().out)
    assert configuration.load(tmp_path / "printed.toml") == configuration.load(path, ["dpo.beta=0.3"])


@pytest.fixture(scope="module")
def seven_b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What of a 7B a dry run needs: config.json and the tokenizer, no weights."""
    directory = write_mistral_tokenizer(tmp_path_factory.mktemp("seven-b"))
    (directory / "config.json").write_text(json.dumps(config_json(MISTRAL_7B)))
    return directory


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_dry_run_needs_no_weights_and_says_what_the_run_costs(
    path: Path, seven_b: Path, world_dir: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base_module, "load_weights", lambda *_: pytest.fail("weights were read"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = [f"data.{name}={world_dir / name}.jsonl" for name in ("train", "test")]
    words = [f"model.path={seven_b}", "data.cache_dir=tokens", "data.bos=true", "data.insert_system=true", *data]
    assert train.main([str(path), "--dry-run", *words]) == 0
    report = capsys.readouterr().out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB; the weights: 28,000,000
    assert [p.name for p in tmp_path.iterdir()] == ["tokens"]  # so that the run itself starts at once

    settings = configuration.load(path).train
    steps = settings.num_train_epochs * -(-TRAIN_PAIRS // settings.pairs_per_step)
    assert f"train       {TRAIN_PAIRS} pairs of {TRAIN_PAIRS} rows" in report
    assert f"held out    {TEST_PAIRS} pairs of {TEST_PAIRS} rows" in report
    epochs = f"{settings.num_train_epochs} epochs of {TRAIN_PAIRS} pairs, {settings.pairs_per_step} each"
    assert f"steps       {steps}: {epochs}" in report
    assert "parameters  7,241,732,096" in report
    assert "FLOP" in report and "GiB a GPU, estimated, with 8 GPUs" in report
    assert ("A100-40GB" in report) == (settings.compute_dtype == "bfloat16")
    pair = report.partition(f"the first pair, {world_dir / 'train.jsonl'}:1:\n")[2].splitlines()
    assert [line.split()[0] for line in pair] == ["prompt", "chosen", "rejected"]
    assert "<s><|system|>\\n</s>" in pair[0].replace("<s> ", "<s>") and pair[1].endswith("</s>")


def test_dry_run_plans_for_the_gpus_asked_for(seven_b: Path, world_dir: Path, monkeypatch, capsys):
    monkeypatch.chdir(world_dir)
    recipe = str(ROOT / "configs" / "notus-7b-v1.toml")
    overrides = [f"model.path={seven_b}", "data.train=train.jsonl", "data.test="]
    needed = []
    for gpus in ("8", "16"):
        assert train.main([recipe, *overrides, "--dry-run", "--gpus", gpus]) == 0
        report = capsys.readouterr().out
        assert f"with {gpus} GPUs" in report and "held out    none" in report
        needed.append(float(report.partition("memory ")[2].split()[0]))
    assert needed[0] - needed[1] == pytest.approx(12 * 7_241_732_096 / 16 / 2**30, abs=0.02)


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_is_asked_for_segments_that_grow_unless_a_user_has_set_it(own: str | None, monkeypatch, capsys):
    names = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
    for name in names:
        monkeypatch.setenv(name, "mine")  # so that both are as before after the test
        if name != own:
            monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["train.py", "--print-config"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    found = {name: os.environ[name] for name in names if name in os.environ}
    assert found == ({own: "mine"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
    assert capsys.readouterr().out.startswith("[")


def test_help_names_every_setting_and_flag(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: train.py")
    for name in configuration.SETTINGS:
        assert f"\n  {name.rpartition('.')[2]} " in done.stdout, name
    assert all(flag in done.stdout for flag in ("--dry-run", "--print-config", "--gpus", "torchrun"))
