"""A run's folder: who may work in it, what the run is, how far it got, and when it was asked to stop.

    output_dir /
        run.lock            held by the process at work
        environment.json    the facts: settings, versions, commit, digests of data and base, the run's identity
        status.json         {"state": "running" | "preempted" | "finished" | "failed", "step": newest whole checkpoint}
        checkpoints/        each with the identity of its run: what decides whether it may be resumed

This is the last file that knows of Config, besides train.py and the commands' own `main`.
"""

import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

import notus
from notus import config as configuration
from notus.base import Base, Frame, read_base
from notus.checkpoint import Checkpoints
from notus.config import Config
from notus.cost import (
    GIB,
    Job,
    checkpoint_bytes,
    least_recomputation,
    num_adapter_parameters,
    num_parameters,
    scored_share,
)
from notus.distributed import World, from_rank_zero, on_rank_zero, rank, world_size
from notus.files import file_digest, lock, make_folder, read_json, text_digest, write_atomically
from notus.lora import LoRA
from notus.losses import PreferenceLoss
from notus.metrics import Log
from notus.optim import schedule_notes
from notus.packing import steps_per_epoch
from notus.tokens import PairSet, describe_counts, load_pairs
from notus.trackers import Trackers, check_installed
from notus.weights import digest

FILES = ("run.lock", "environment.json", "config.toml", "status.json", "metrics.jsonl", "samples.jsonl",
         "summary.json")  # fmt: skip


@dataclass
class Run:
    """An output folder that this process owns: new, or being resumed."""

    output: Path
    facts: dict[str, Any]  # environment.json
    checkpoints: Checkpoints
    manifest: dict[str, Any] | None  # of the checkpoint to resume from
    stop: "StopSignal"
    rank: int
    state: str = "running"
    _writing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def first_step(self) -> int:
        return self.manifest["step"] if self.manifest else 0

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Bring both to where the checkpoint left them, if there is one."""
        if self.manifest:
            self.checkpoints.load(self.manifest, model, optimizer)

    @property
    def lora(self) -> LoRA | None:
        return lora_of(self.facts["settings"])

    @property
    def epoch_steps(self) -> int:
        return self.facts["steps"] // self.facts["settings"]["train.num_train_epochs"]

    def open_log(self, world: World) -> Log:
        """A new log, or that of the checkpoint to resume from. How long that checkpoint took could not be in it yet."""
        settings = self.facts["settings"]
        lines: list[dict[str, Any]] = []
        if self.manifest:
            step, lines = self.manifest["step"], list(self.manifest["lines"])
            last = lines.pop() if lines and lines[-1]["step"] == step else {}
            stall = {"checkpoint_stall_seconds": self.manifest["stall_seconds"]}
            lines.append({"step": step, "epoch": step / self.epoch_steps} | last | stall)
        window = self.manifest["window"] if self.manifest else ()
        track = partial(Trackers, settings["log.to"], self.output, run_name(self.facts), settings)
        return Log(self.output, world, self.facts["steps"], self.epoch_steps, self.first_step, lines, window, track)

    def disk_notes(self, inputs: "Inputs") -> list[str]:
        """Whether the disk has room for what the run will write: one more checkpoint than are kept, and the result."""
        settings, dims = self.facts["settings"], inputs.base.dims
        checkpoint = checkpoint_bytes(dims, settings["train.optimizer"], self.lora)
        result = sum(num_parameters(dims)) * (2 if settings["train.export_dtype"] == "bfloat16" else 4)
        if settings["lora.export"] == "adapter":
            result = 4 * num_adapter_parameters(dims, self.lora)
        kept = len(self.checkpoints.complete())
        needed = checkpoint * max(1, settings["train.keep_checkpoints"] + 1 - kept) + result
        free = shutil.disk_usage(self.output).free
        if free >= needed:
            return []
        return [
            f"the disk of {self.output} has {free / 2**30:.3g} GiB free, and the run needs {needed / 2**30:.3g}: a "
            f"checkpoint takes {checkpoint / 2**30:.3g} and the model {result / 2**30:.3g}. Free some space, or lower "
            "train.keep_checkpoints"
        ]

    def describe_stop(self, step: int, fresh: bool) -> str:
        """What to do after a run was asked to stop in `step`, and was."""
        saved = self.checkpoints.newest_step()
        command = "the same command" + (" without --fresh" if fresh else "")
        then = f"{command} resumes from there" if saved else f"{command} starts from the beginning"
        kept = f"the newest checkpoint is of step {saved:,}" if saved else "there is no checkpoint yet"
        return f"stopped after step {step:,}, as asked; {kept}, and {then}"

    def status(self, state: str | None = None) -> None:
        """Write status.json: the state, or the last one again, and the step of the newest whole checkpoint, because
        nothing later can be resumed. A finished run has all its steps in the exported model."""
        if self.rank == 0:
            path = self.output / "status.json"
            with self._writing:  # also called by the thread that writes checkpoints
                self.state = state or self.state
                step = self.facts["steps"] if self.state == "finished" else self.checkpoints.newest_step()
                text = json.dumps({"state": self.state, "step": step}) + "\n"
                try:
                    write_atomically(path, text)
                except OSError:  # a full disk: there is still room in the file itself
                    with suppress(OSError), path.open("r+") as file:
                        file.write(text)
                        file.truncate()


class Inputs(NamedTuple):
    """Everything that is known before a weight is read."""

    base: Base
    frame: Frame
    train: PairSet
    test: PairSet  # may be empty
    notes: list[str]  # what the user should know, a sentence each
    reference: Base  # `base` itself, unless dpo.reference names another


def read_inputs(config: Config, fresh: bool = False, need_weights: bool = True) -> Inputs:
    """Everything a user can have got wrong in output folder, data, tokenizer or checkpoint is refused here, with file,
    line and value: ValueError. Of the weights only the headers are read, and with `need_weights=False` they may be
    missing. Nothing is written but the token cache."""
    find_run(config.train.output_dir, fresh)
    check_installed(config.log.to)
    data = config.data
    base = read_base(config.model.path, need_weights)
    reference = base
    if config.dpo.reference and os.path.realpath(config.dpo.reference) != os.path.realpath(config.model.path):
        reference = read_base(config.dpo.reference, need_weights)
        check_same_ids(base, reference)
    system_prompt = data.system_prompt if data.insert_system else None
    dpo = config.dpo
    frame = Frame(
        data.bos, system_prompt, data.max_length, data.max_prompt_length, dpo.beta, dpo.loss, dpo.label_smoothing,
        dpo.margin, dpo.nll_weight,
    )  # fmt: skip
    notes = [*base.notes, *base.frame_notes(frame)]

    def pairs(paths: Sequence[str], held_out: bool) -> PairSet:
        return load_pairs(
            paths, base.encoder(frame), max_length=data.max_length, max_prompt_length=data.max_prompt_length,
            drop_bad_pairs=data.drop_bad_pairs, test_size=data.test_size, held_out=held_out, cache_dir=data.cache_dir,
        )  # fmt: skip

    train, test = pairs(data.train, held_out=False), pairs(data.train if data.test_size else data.test, held_out=True)
    trained_on = set(train.keys)
    if both := sum(key in trained_on for key in test.keys):
        notes.append(f"{both:,} of {len(test):,} held-out pairs are also trained on, so held-out figures say less")
    steps = total_steps(config, train)
    notes += schedule_notes(config.train.optimizer, math.ceil(config.train.warmup_ratio * steps), steps)
    return Inputs(base, frame, train, test, notes, reference)


def check_same_ids(base: Base, reference: Base) -> None:
    """The reference reads the ids that the policy's tokenizer made, so they must mean the same to it: ValueError."""
    if base.tokenizer.vocab_size > reference.dims.vocab_size:
        raise ValueError(
            f"{reference.path}: as dpo.reference it must read the ids of {base.path}, whose tokenizer has "
            f"{base.tokenizer.vocab_size:,}, but its embedding has {reference.dims.vocab_size:,} rows"
        )
    if base.tokenizer.identity == reference.tokenizer.identity:
        return
    for i in range(base.tokenizer.vocab_size):
        texts = [b.tokenizer.decode([i, i], skip_special_tokens=False) for b in (base, reference)]  # twice: with spaces
        if texts[0] != texts[1]:
            raise ValueError(
                f"{reference.path}: as dpo.reference it must read the ids of {base.path}, but id {i} twice is "
                f"{texts[1]!r} here and {texts[0]!r} there: the two have different tokenizers"
            )


def total_steps(config: Config, pairs: PairSet) -> int:
    return steps_per_epoch(len(pairs), config.train.pairs_per_step) * config.train.num_train_epochs


def open_run(config: Config, inputs: Inputs, world: World, fresh: bool, held: ExitStack) -> Run:
    """Claim a new folder, or that of an unfinished run of the same identity. ValueError says what differs for any
    other. All ranks call."""
    output = Path(config.train.output_dir)
    unfinished = from_rank_zero(world, lambda: claim(output, fresh, held))
    facts = from_rank_zero(world, lambda: environment([*config.data.train, *config.data.test])) | {
        "settings": configuration.flat(config),
        "model_sha256": digest(inputs.base.path, world),
        "processes": world.size,
        "train_pairs": len(inputs.train),
        "test_pairs": len(inputs.test),
        "train_rows": describe_counts(inputs.train.counts),
        "test_rows": describe_counts(inputs.test.counts) if len(inputs.test) else "none",
        "steps": total_steps(config, inputs.train),
    }
    facts["reference_sha256"] = facts["model_sha256"]
    if inputs.reference is not inputs.base:
        facts["reference_sha256"] = digest(inputs.reference.path, world)
        facts["reference_dims"] = asdict(inputs.reference.dims)
    facts["identity"] = identity = json.loads(json.dumps(identity_of(config, inputs.base, facts)))
    facts["identity_sha256"] = text_digest(json.dumps(identity))
    facts["run_id"] = uuid.uuid4().hex[:8]
    if unfinished:
        # A damaged environment.json tells nothing. The checkpoints carry the identity as well.
        found = from_rank_zero(world, lambda: read_quietly(output / "environment.json"))
        facts["run_id"] = found.get("run_id") or facts["run_id"]
        old = found.get("identity")
        if old != identity and found.get("identity_sha256") == text_digest(json.dumps(old)):
            raise ValueError(f"{output}: holds an unfinished run of another kind: {describe_difference(old, identity)}")

    checkpoints = Checkpoints(
        output / "checkpoints", config.train.keep_checkpoints, world, world.say, config.distributed.timeout_minutes
    )
    manifest = checkpoints.find() if unfinished else None
    if manifest and manifest["identity"] != identity:
        raise ValueError(
            f"{manifest['directory']}: is a checkpoint of another run: "
            f"{describe_difference(manifest['identity'], identity)}"
        )

    def write_facts() -> None:
        make_folder(Path(config.reference.cache_dir))
        write_atomically(output / "environment.json", json.dumps(facts, indent=1) + "\n")
        write_atomically(output / "config.toml", configuration.to_toml(config))

    on_rank_zero(world, write_facts)
    run = Run(output, facts, checkpoints, manifest, held.enter_context(StopSignal()), world.rank)
    checkpoints.on_complete = run.status
    run.status("running")
    return run


def identity_of(config: Config, base: Base, facts: dict[str, Any]) -> dict[str, Any]:
    """By name, everything that decides the numbers of a run. A run is resumed only while all of it stays as it is."""
    data = facts["data_sha256"]
    another = ("sha256", "dims") if "reference_dims" in facts else ()
    return {
        **configuration.identity(config),
        "sha256 of data.train": [data[path] for path in config.data.train],
        "sha256 of data.test": [data[path] for path in config.data.test],
        "sha256 of the weights": facts["model_sha256"],
        **base.identity,
        **{f"{name} of another reference": facts[f"reference_{name}"] for name in another},
    }


def describe_difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    def value(values: dict[str, Any], name: str) -> str:
        return f"{values[name]!r:.200}" if name in values else "missing"

    names = [name for name in {**old, **new} if old.get(name, ...) != new.get(name, ...)]
    differs = "; ".join(f"{name} was {value(old, name)} and is {value(new, name)}" for name in names)
    return f"{differs}. Choose another train.output_dir, or start again with --fresh, which moves the old run aside"


def find_run(output: str | Path, fresh: bool) -> bool:
    """Whether `output` holds an unfinished run, or with `fresh`, which moves it aside, any run. ValueError if it holds
    something else, or if its run is finished. Files left by a run killed at startup do not count."""
    output, left_over = Path(output), {"run.lock", "environment.json.tmp"}
    if not output.exists() or (output.is_dir() and {path.name for path in output.iterdir()} <= left_over):
        return False
    if not output.is_dir():
        raise ValueError(f"{output}: is a file; choose another train.output_dir")
    if not (output / "environment.json").exists() and not (output / "checkpoints").is_dir():
        raise ValueError(f"{output}: is not empty and holds no run; choose another train.output_dir")
    for path in () if fresh else map(output.joinpath, FILES):
        if path.exists() and not path.is_file():  # opening a pipe would wait forever
            raise ValueError(f"{path}: not a regular file, which a run would have made; move it away")
    if not fresh and read_quietly(output / "status.json").get("state") == "finished":
        raise ValueError(
            f"{output}: holds a finished run; choose another train.output_dir, or start again with --fresh, which "
            "moves the old run aside"
        )
    return True


def read_quietly(path: Path) -> dict[str, Any]:
    """A JSON object that can be had elsewhere, or done without: {} if it is damaged."""
    with suppress(ValueError):
        return read_json(path)
    return {}


def claim(output: Path, fresh: bool, held: ExitStack) -> bool:
    """Take possession of `output`, with an old run in it moved aside if `fresh`; whether there is a run to resume.

    Two processes in one folder (a requeued job beside its old self) would spoil each other's files, so the second one
    gets a ValueError."""
    found = find_run(output, fresh)
    try:
        output.mkdir(parents=True, exist_ok=True)
        held.enter_context(lock(output / "run.lock", wait=False))
    except BlockingIOError:
        raise ValueError(f"{output}: another process is at work in it") from None
    except OSError as error:
        raise ValueError(f"{output}: cannot be used as train.output_dir: {error.strerror}") from None
    if not (found and fresh):
        return found
    output = output.resolve()  # a symbolic link stays, and what it points to is moved
    aside = output.with_name(f"{output.name}.before-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    output.replace(aside)
    print(f"the run in {output} was moved to {aside}")
    return claim(output, False, held)


def environment(files: Sequence[str | Path]) -> dict[str, Any]:
    """What it takes to run this again: commit, versions, devices, command line, and the sha256 of each data file."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if shutil.which("git") else None
    changed = commit and git("status", "--porcelain", "--untracked-files=no")
    versions = {"notus": notus.__version__, "python": platform.python_version()}
    for name in ("torch", "numpy", "safetensors", "tokenizers"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return {
        "command": sys.argv,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": f"{commit} with changes" if changed else commit or "unknown",
        "versions": versions,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [platform.machine()],
        "threads": torch.get_num_threads(),
        "data_sha256": {str(path): file_digest(path) for path in files},
    }


def run_name(facts: dict[str, Any]) -> str:
    """In trackers: the folder's, and what tells it from another run in the same folder."""
    return f"{Path(facts['settings']['train.output_dir']).resolve().name}-{facts['run_id']}"


def loss_of(settings: dict[str, Any]) -> PreferenceLoss:
    """From settings by name. Those that a run of an earlier version did not have are the defaults."""
    names = [f"dpo.{name}" for name in ("loss", "beta", "label_smoothing", "margin", "nll_weight")]
    return PreferenceLoss(*(settings.get(name, configuration.SETTINGS[name].default) for name in names))


def lora_of(settings: dict[str, Any]) -> LoRA | None:
    """From settings by name. None where all weights are trained."""
    rank, alpha, targets = (settings[f"lora.{name}"] for name in LoRA._fields)
    return LoRA(rank, alpha, tuple(targets)) if rank else None


def job_of(config: Config, num_gpus: int) -> Job:
    """The settings that decide what a run costs."""
    setup = config.train
    return Job(
        num_gpus=num_gpus, replicate=config.distributed.replicate, dtype=getattr(torch, setup.compute_dtype),
        optimizer=setup.optimizer, micro_batch_tokens=setup.micro_batch_tokens,
        activation_checkpointing=setup.activation_checkpointing, compile=setup.compile,
        cpu_offload=config.distributed.cpu_offload,
        reshard_after_forward=config.distributed.reshard_after_forward, num_train_epochs=setup.num_train_epochs,
        pairs_per_step=setup.pairs_per_step, eval_steps=setup.eval_steps, lora=lora_of(configuration.flat(config)),
        reference=loss_of(configuration.flat(config)).member.reference,
    )  # fmt: skip


def recomputation(config: Config, inputs: Inputs, world: World) -> str:
    """train.activation_checkpointing, with `auto` resolved to one of model.RECOMPUTE."""
    memory = None
    if world.device.type == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory / GIB
    scored = scored_share(inputs.train.lengths)
    return least_recomputation(inputs.base.dims, job_of(config, world.size), scored, memory)


class Preempted(Exception):
    """The run was asked to stop after `step`, and can be resumed from its newest checkpoint."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class StopSignal:
    """SIGTERM, SIGUSR1 (from Slurm or torchrun) and SIGINT (Ctrl-C) ask a run to stop. The first one stops it at the
    end of its step, with a checkpoint; another one at once. Signals within ECHO_SECONDS of the first are treated as
    duplicates: Slurm signals every process of a job, and torchrun passes on what it receives.

    A terminal that closes (SIGHUP) does not stop a run; torchrun, which ends itself then, does. Used as a context.
    """

    ECHO_SECONDS: ClassVar = {signal.SIGTERM: 3.0, signal.SIGUSR1: 3.0, signal.SIGINT: 1.0, signal.SIGHUP: 3.0}

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():  # elsewhere (a notebook's thread) Python allows none
            for number in self.ECHO_SECONDS:
                ignored = number == signal.SIGHUP and world_size() is None
                self._before[number] = signal.signal(number, signal.SIG_IGN if ignored else self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        if not self.received:
            self.received, self._first = True, time.monotonic()
            if number == signal.SIGINT and rank() == 0:
                say_at_once("stopping after this step, with a checkpoint; Ctrl-C again leaves at once")
        elif time.monotonic() - self._first > self.ECHO_SECONDS[signal.Signals(number)]:
            say_at_once("left at once; the newest checkpoint is what is kept")
            os._exit(128 + number)


def say_at_once(sentence: str) -> None:
    """From a signal handler, which must not wait for a buffer. The same Ctrl-C may have ended who reads this, as in
    `train.py 2>&1 | tee log`."""
    with suppress(OSError):
        os.write(2, f"\n{sentence}\n".encode())
