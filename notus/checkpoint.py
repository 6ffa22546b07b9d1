"""The run that cannot be lost: model, optimizer and step, complete on disk or not there at all.

    checkpoints / step-00000200 /
        shard-*.safetensors     each rank's trained weights and optimizer state, by torch.distributed.checkpoint
        checkpoint.json         the step, the run's identity, its log so far, and size and CRC-32 of every file

A checkpoint is written under a temporary name while training continues, synced to disk and then renamed, so only
complete ones ever have their final name. The files are safetensors and JSON: loading one cannot run code. They can be
read on any number of ranks. All ranks must see the same folder.
"""

import errno
import json
import os
import queue
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    SavePlanner,
)
from torch.distributed.checkpoint._hf_utils import (
    CUSTOM_METADATA_KEY,
    DCP_VERSION_KEY,
    FORMAT_KEY,
    FORMAT_VALUE,
    HF_DCP_VERSION,
)
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import WriteResult

from notus.distributed import World, from_rank_zero, on_rank_zero, sum_over_ranks
from notus.files import checksum, fsync, read_json, set_aside, text_digest, write_atomically
from notus.weights import safetensors_header

MANIFEST = "checkpoint.json"
FIELDS = {"step": int, "identity": dict, "window": list, "lines": list, "stall_seconds": float, "files": dict}


class Checkpoints:
    """The checkpoints of one run. All ranks make one and call its methods together."""

    def __init__(
        self, directory: str | Path, keep: int, world: World, say: Callable[[str], None], timeout_minutes: float = 10.0
    ):
        self.directory, self.keep, self.world, self.say = Path(directory), keep, world, say
        self.on_complete: Callable[[], None] = lambda: None  # called by rank 0's writing thread
        self._writer = ThreadPoolExecutor(max_workers=1)
        # Its own process group: the writing thread's collectives must not mix with those of training.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))
        self._stager = HostCopy()
        self._pending: Future | None = None  # the checkpoint that is being completed
        self._full = False  # whether one could not be written for want of space, be it the disk's or a quota's

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int, facts: dict[str, Any]) -> float:
        """Begin a checkpoint; the seconds for which training had to stop. Only the copy to host memory is waited for.
        `facts` holds the FIELDS that are the run's own: identity, window, lines.

        A failure (a full disk, say) is reported and training continues; the checkpoints before it stay as they are.
        """
        started = time.monotonic()
        self.wait()
        name = self.directory / f"step-{step:08d}"
        building = name.with_name(name.name + ".tmp")

        def prepare() -> None:
            for left in self.directory.glob("*.tmp"):  # by a kill, perhaps at another step
                shutil.rmtree(left, ignore_errors=True)
            building.mkdir(parents=True)
            self._make_room()

        try:
            on_rank_zero(self.world, prepare)
            writer = StreamingWriter(str(building), save_distributed=True)
            state = state_of(model, optimizer)
            writing = cast(
                Future,
                dcp.async_save(state, storage_writer=writer, async_stager=self._stager, process_group=self._group),
            )
        except OSError as error:
            self._give_up(error, building)
            return time.monotonic() - started
        stall = time.monotonic() - started
        manifest = {"step": step, "stall_seconds": round(stall, 3)} | facts
        # torch's future is done on rank 0 when it is on all ranks; the others only wait for their own part
        self._pending = self._writer.submit(self._complete, writing, building, name, manifest)
        return stall

    def _make_room(self) -> None:
        """Where there is no room for one more, the oldest goes first, as long as another whole one remains."""
        whole = self.complete()
        if len(whole) > 1 and (self._full or shutil.disk_usage(self.directory).free < size_of(whole[0])):
            shutil.rmtree(whole[-1])
            self.say(f"checkpoint  {whole[-1].name} was deleted first, because the disk has no room for one more")

    def _complete(self, writing: Future, building: Path, name: Path, manifest: dict[str, Any]) -> None:
        try:
            writing.result()
            if self.world.rank != 0:
                return
            files = sorted(building.iterdir())
            with ThreadPoolExecutor() as pool:
                manifest["files"] = dict(zip((path.name for path in files), pool.map(checksum, files), strict=True))
            for path in files:
                fsync(path)
            text = json.dumps(manifest)
            write_atomically(building / MANIFEST, json.dumps(manifest | {"sha256": text_digest(text)}))
            shutil.rmtree(name, ignore_errors=True)  # of a run that went back before this step
            building.replace(name)
            fsync(self.directory)
            self.on_complete()
            self.prune()
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            self._give_up(error, building)

    def _give_up(self, error: BaseException, building: Path) -> None:
        """Of whatever kind the failure is: a run of hours does not end for one checkpoint."""
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]  # without the traceback in its text
        self._full |= isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if self.world.rank == 0:
            self.say(f"checkpoint  {building.stem} could not be saved, training continues: {error}")
            shutil.rmtree(building, ignore_errors=True)

    def wait(self) -> None:
        """Until the checkpoint that is being written is there, or has failed."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def complete(self) -> list[Path]:
        """Newest first."""
        return sorted(self.directory.glob("step-????????"), reverse=True)

    def newest_step(self) -> int:
        """Of the newest whole checkpoint; 0 if there is none."""
        return next((int(path.name.removeprefix("step-")) for path in self.complete()), 0)

    def prune(self) -> None:
        for old in self.complete()[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)  # one that stays is tried again after the next

    def find(self) -> dict[str, Any] | None:
        """The manifest of the newest whole checkpoint, None if there is none. Every file is checked. A damaged
        checkpoint is reported and renamed out of the way, and the one before it is tried."""
        for name in from_rank_zero(self.world, self.complete):
            manifest, fault = from_rank_zero(self.world, partial(read_manifest, name))
            if not fault:
                mine = sorted(manifest["files"].items())[self.world.rank :: self.world.size]  # checked in parallel
                faults = torch.tensor([sum(checksum(name / file) != expected for file, expected in mine)])
                if wrong := int(sum_over_ranks(faults.to(self.world.device))):
                    fault = f"{wrong} of {len(manifest['files'])} files fail their checksum"
            if not fault:
                on_rank_zero(self.world, self.prune)  # what a kill between renaming and pruning left
                return manifest | {"directory": str(name)}
            self.say(f"checkpoint  {name} is damaged ({fault}); it is set aside, and the one before it is tried")
            on_rank_zero(self.world, partial(set_aside, name))
        self.say("checkpoint  there is no whole one: the run begins at step 0")
        return None

    def load(self, manifest: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Bit for bit what was saved, each rank its own shards, whatever the number of ranks was."""
        make_state(optimizer)
        try:
            dcp.load(state_of(model, optimizer), storage_reader=HuggingFaceStorageReader(manifest["directory"]))
        except CheckpointException as error:  # no Exception, and its text is a traceback
            reason = next(iter(error.failures.values()))[0]
            raise OSError(f"{manifest['directory']}: cannot be read: {reason}") from error


class HostCopy(AsyncStager):
    """A checkpoint's copy in host memory, whose pages the next one takes again. torch's DefaultStager would do, but in
    torch 2.11 and 2.12 it is closed after one copy. It is not pinned: registering 7 GB a rank can fail, and would save
    a second of the minutes between two checkpoints."""

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._stager = StateDictStager(pin_memory=False, share_memory=False)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return cast(dict[str, Any], self._stager.stage(state_dict))

    def synchronize_staging(self) -> None: ...

    def close(self) -> None: ...


class StreamedFiles(FileSystemWriter):
    """Files in the format of safetensors, written tensor by tensor. torch's own way makes two more copies of all
    tensors in host memory, and keeps the interpreter's lock meanwhile, so that training would stand still while a
    checkpoint is written. `write` and `fsync` release it."""

    def _write_data(self, planner: SavePlanner, file_queue: queue.Queue) -> torch.futures.Future[list[WriteResult]]:
        done: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        results = []
        while not file_queue.empty():
            path, name, items = file_queue.get_nowait()
            found = ((item.index.fqn, cast(Tensor, planner.resolve_data(item))) for item in items)
            tensors = {name: tensor.detach().contiguous() for name, tensor in found}
            # Where in the whole tensor each begins, as torch's reader looks for it.
            offsets = {item.index.fqn: {"saved_offsets": list(item.tensor_data.chunk.offsets)} for item in items}
            metadata = {
                CUSTOM_METADATA_KEY: json.dumps(offsets), DCP_VERSION_KEY: str(HF_DCP_VERSION),
                FORMAT_KEY: FORMAT_VALUE,
            }  # fmt: skip
            with open(path, "wb") as file:
                file.write(safetensors_header(((n, t.dtype, t.shape) for n, t in tensors.items()), metadata))
                for tensor in tensors.values():
                    file.write(tensor.view(-1).view(torch.uint8).numpy().data)
                file.flush()
                os.fsync(file.fileno())
            for item in items:
                size = tensors[item.index.fqn].nbytes
                results.append(WriteResult(item.index, size, _StorageInfo(name, 0, size)))
        done.set_result(results)
        return done


class StreamingWriter(HuggingFaceStorageWriter, StreamedFiles):
    """torch's writer, whose `write_data` calls `_write_data` of the class that comes next: the one above."""


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of a run that is trained, by name: `model.<parameter>`, `optimizer.<parameter>.<state>`. No copies.
    What LoRA leaves frozen is in the base."""
    state = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
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


def size_of(directory: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in directory.iterdir())


def read_manifest(directory: Path) -> tuple[dict[str, Any], str]:
    """(manifest, "") or ({}, what is wrong with it)."""
    try:
        manifest = read_json(directory / MANIFEST)
    except ValueError as error:
        return {}, str(error)
    if not manifest:
        return {}, f"{MANIFEST} is missing"
    digest = manifest.pop("sha256", None)
    if digest != text_digest(json.dumps(manifest)):
        return {}, f"{MANIFEST} fails its checksum"
    if not all(isinstance(manifest.get(name), kind) for name, kind in FIELDS.items()):
        return {}, f"{MANIFEST} was written by another version of notus"
    files = {path.name for path in directory.glob("*.safetensors")}
    if directory.name != f"step-{manifest['step']:08d}" or manifest["files"].keys() != files:
        return {}, f"{MANIFEST} does not describe its folder"
    return manifest, ""
