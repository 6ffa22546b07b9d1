"""The run that cannot be lost: model, optimizer and step, complete on disk or not there at all.

    checkpoints / step-00000200 /
        shard-*.safetensors     each rank's float32 weights and optimizer state, by torch.distributed.checkpoint
        checkpoint.json         the step, what identifies the run, and size and CRC-32 of every file

A checkpoint is written under a temporary name while training goes on, synced to disk and then renamed: only whole ones
ever have their name. The files are safetensors and JSON, so that loading one cannot run code. They can be read on any
number of ranks. All ranks must see the same folder.
"""

import json
import os
import shutil
import signal
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from notus.distributed import World, from_rank_zero, on_rank_zero, sum_over_ranks
from notus.weights import fsync

MANIFEST = "checkpoint.json"


class Checkpoints:
    """The checkpoints of one run. All ranks make one and call its methods together."""

    def __init__(
        self, directory: str | Path, keep: int, world: World, say: Callable[[str], None], timeout_minutes: float = 10.0
    ):
        self.directory, self.keep, self.world, self.say = Path(directory), keep, world, say
        self._writer = ThreadPoolExecutor(max_workers=1)
        # Its own process group: the writing thread's collectives must not mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self._pending: Future | None = None  # rank 0: the checkpoint that is being completed

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, facts: dict) -> float:
        """Begin a checkpoint; the seconds for which training had to stop. Only the copy to host memory is waited for.

        A failure (a full disk, say) is reported and training goes on; the checkpoints before it stay as they are.
        """
        started = time.monotonic()
        self.wait()
        name = self.directory / f"step-{step:08d}"
        building = name.with_name(name.name + ".tmp")

        def prepare() -> None:
            for left in self.directory.glob("*.tmp"):  # by a kill, perhaps at another step
                shutil.rmtree(left, ignore_errors=True)
            building.mkdir(parents=True)

        try:
            on_rank_zero(self.world, prepare)
            writing = dcp.async_save(
                state_of(model, optimizer),
                storage_writer=HuggingFaceStorageWriter(str(building), save_distributed=True),
                process_group=self._group,
            )
        except OSError as error:
            self._give_up(error, building)
            return time.monotonic() - started
        # torch's future is done on rank 0 when it is on all ranks; the others only wait for their own part
        self._pending = self._writer.submit(self._complete, writing, building, name, {"step": step} | facts)
        return time.monotonic() - started

    def _complete(self, writing: Future, building: Path, name: Path, manifest: dict) -> None:
        try:
            writing.result()
            if self.world.rank != 0:
                return
            files = sorted(building.iterdir())
            with ThreadPoolExecutor() as pool:
                manifest["files"] = dict(zip((path.name for path in files), pool.map(checksum, files), strict=True))
            (building / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for path in (*files, building / MANIFEST, building):
                fsync(path)
            shutil.rmtree(name, ignore_errors=True)  # of a run that went back before this step
            building.replace(name)
            fsync(self.directory)
            for old in self.complete()[self.keep :]:
                shutil.rmtree(old)
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            self._give_up(error, building)

    def _give_up(self, error: BaseException, building: Path) -> None:
        """Of whatever kind the failure is: a run of hours does not end for one checkpoint."""
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]  # without the traceback in its text
        if self.world.rank == 0:
            self.say(f"checkpoint  {building.stem} could not be saved, training goes on: {error}")
            shutil.rmtree(building, ignore_errors=True)

    def wait(self) -> None:
        """Until the checkpoint that is being written is there, or has failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def complete(self) -> list[Path]:
        """Newest first."""
        return sorted(self.directory.glob("step-????????"), reverse=True)

    def find(self) -> dict | None:
        """The manifest of the newest whole checkpoint, None if there is none. Every file is checked; a damaged one is
        reported and renamed out of the way, and the one before it is tried."""
        for name in from_rank_zero(self.world, self.complete):
            manifest, fault = from_rank_zero(self.world, lambda name=name: read_manifest(name))
            if not fault:
                mine = sorted(manifest["files"].items())[self.world.rank :: self.world.size]  # checked in parallel
                faults = torch.tensor([sum(checksum(name / file) != expected for file, expected in mine)])
                if wrong := int(sum_over_ranks(faults.to(self.world.device))):
                    fault = f"{wrong} of {len(manifest['files'])} files fail their checksum"
            if not fault:
                return manifest | {"directory": str(name)}
            self.say(f"checkpoint  {name} is damaged ({fault}); it is set aside, and the one before it is tried")
            on_rank_zero(self.world, lambda name=name: set_aside(name))
        self.say("checkpoint  there is no whole one: the run begins at step 0")
        return None

    def load(self, manifest: dict, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Bit for bit what was saved, each rank its own shards, whatever the number of ranks was."""
        make_state(optimizer)
        try:
            dcp.load(state_of(model, optimizer), storage_reader=HuggingFaceStorageReader(manifest["directory"]))
        except CheckpointException as error:  # no Exception, and its text is a traceback
            reason = next(iter(error.failures.values()))[0]
            raise OSError(f"{manifest['directory']}: cannot be read: {reason}") from error


class StopSignal:
    """SIGTERM and SIGUSR1, from Slurm or torchrun, ask a run to stop: the first at the end of its step, with a
    checkpoint; another one at once. What comes within ECHO_SECONDS of the first is its echo: Slurm signals every
    process of a job, and torchrun hands on what it gets."""

    ECHO_SECONDS = 3.0

    def __init__(self) -> None:
        self.received = False
        self._first = 0.0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.received and time.monotonic() - self._first > self.ECHO_SECONDS:
            os._exit(128 + number)
        if not self.received:
            self.received, self._first = True, time.monotonic()


class Preempted(Exception):
    """The run was asked to stop, and can go on from what it saved."""


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a run by name: `model.<parameter>`, `optimizer.<parameter>.<state>`. No copies."""
    state = {}
    for name, parameter in model.named_parameters():
        state[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            state[f"optimizer.{name}.{key}"] = value
    return state


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """torch's optimizers make their state in their first step: take one that changes nothing."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def set_aside(directory: Path) -> None:
    """Under the name .damaged, .damaged-2, ..."""
    number = 1 + len(list(directory.parent.glob(f"{directory.name}.damaged*")))
    directory.replace(directory.with_name(f"{directory.name}.damaged" + (f"-{number}" if number > 1 else "")))


def read_manifest(directory: Path) -> tuple[dict, str]:
    """(manifest, "") or ({}, what is wrong with it)."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        whole = directory.name == f"step-{manifest['step']:08d}" and manifest["files"].keys() == {
            path.name for path in directory.glob("*.safetensors")
        }
        return manifest, "" if whole else f"{MANIFEST} does not describe it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"{MANIFEST}: {error}"


def checksum(path: Path) -> list[int]:
    """[bytes, CRC-32]; [-1, 0] if it cannot be read."""
    size = crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 24):  # zlib lets other threads run meanwhile
                size, crc = size + len(block), zlib.crc32(block, crc)
    except OSError:
        return [-1, 0]
    return [size, crc]
