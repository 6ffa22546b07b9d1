"""One process or many: the process group, the sharding, the sums over ranks. The model knows nothing of it.

torchrun's environment variables are read here and nowhere else.
"""

import ctypes
import gc
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None  # None: one process without a process group

    def say(self, text: str) -> None:
        """Print on one rank. On a terminal long lines that begin with a name are folded behind it; commands are not."""
        if self.rank == 0:
            width = shutil.get_terminal_size().columns
            if sys.stdout.isatty():
                fold = textwrap.TextWrapper(width, subsequent_indent=" " * 12, break_long_words=False)
                lines = text.split("\n")
                text = "\n".join(line if line[:1] in ("", " ") else fold.fill(line) for line in lines)
            print(text, flush=True)


def rank() -> int:
    """0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int | None:
    """None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def start(device: str = "auto", replicate: int = 1, timeout_minutes: float = 10.0) -> World:
    """Join torchrun's process group. Without torchrun, make a group of one. `device`: "cpu", "cuda" or "auto".

    `replicate` > 1 makes a mesh of replicate x shard ranks (HSDP). Parameters are sharded inside a group of neighbours,
    such as a node, and the groups hold copies, so that only gradients cross between nodes. A rank that does not answer
    for `timeout_minutes` ends the run. ValueError if the ranks cannot be divided so, or if a rank has no GPU.
    """
    size, local_rank = world_size() or 1, int(os.environ.get("LOCAL_RANK", 0))
    if size % replicate:
        raise ValueError(f"distributed.replicate = {replicate} does not divide the {size} ranks evenly")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} found")
        torch.cuda.set_device(local_rank)
    else:
        keep_freed_memory()
    if world_size():
        end_with_parent()
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # checkpoints are written from host memory
    timeout = timedelta(minutes=timeout_minutes)
    if world_size():
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    if replicate > 1:
        mesh = init_device_mesh(kind, (replicate, size // replicate), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return World(rank(), size, torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind), mesh)


def end_with_parent() -> None:
    """From now on the end of torchrun's agent, however it ends, is SIGTERM for this process. Without that a kill of the
    agent alone would leave ranks that train on, unknown to the scheduler. Linux only."""
    parent, pdeathsig = os.getppid(), 1  # sys/prctl.h: PR_SET_PDEATHSIG
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(pdeathsig, signal.SIGTERM.value)
        if os.getppid() != parent:  # it ended just before
            os.kill(os.getpid(), signal.SIGTERM)


def keep_freed_memory() -> None:
    """Keep freed memory for the next step. By default glibc returns large blocks to the kernel as soon as they are
    freed, and each step must fault its pages in again. That takes up to a fifth of a small model's step on a CPU."""
    trim_threshold, mmap_max = -1, -4  # malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # not on macOS, nor with musl
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, -1)


def free_memory() -> None:
    """Give back what a deleted model held: FSDP modules are cycles, and the GPU's allocator keeps what it has."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def stop() -> None:
    if dist.is_initialized():
        gc.collect()  # FSDP modules are cycles that hold on to the group: alive at exit, they abort the process
        dist.destroy_process_group()


def shard(
    model: nn.Module, layers: nn.ModuleList, world: World, compute_dtype: torch.dtype, cpu_offload: bool = False,
    reshard_after_forward: bool = True,
) -> None:  # fmt: skip
    """FSDP2 (ZeRO-3), in place: each rank keeps 1/N of every parameter, its gradient and its optimizer state, in the
    parameter's dtype. A layer's weights are gathered, in `compute_dtype`, just before it runs and freed after it
    (without `reshard_after_forward`, after its backward pass only).

    One process whose weights are in `compute_dtype` has nothing to split or cast, and is left as it is: FSDP2 would
    only cost 7 to 15 % of a step. LoRA's matrices are float32 and cast themselves. `cpu_offload` keeps shards,
    gradients and optimizer state in host memory, which fits a 7B on one small card.
    """
    cast_here = (p for name, p in model.named_parameters() if "lora_" not in name and p.dtype != compute_dtype)
    if world.size == 1 and not cpu_offload and next(cast_here, None) is None:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,  # a sum over ranks in bfloat16 would lose what small gradients add
        cast_forward_inputs=False,  # the rotary tables are inputs of each layer, and stay float32
    )
    pinned = world.device.type == "cuda"  # copies to the GPU then overlap with its work
    offload = CPUOffloadPolicy(pin_memory=pinned) if cpu_offload else OffloadPolicy()
    for layer in layers:
        # Freed after forward and gathered again for backward, the layers of a 7B take 14 GB less on each GPU, and the
        # traffic overlaps with compute.
        fully_shard(
            layer, mesh=world.mesh, mp_policy=policy, offload_policy=offload,
            reshard_after_forward=reshard_after_forward,
        )  # fmt: skip
    # The rest (embedding, last norm and head) is needed at both ends of a pass, so it stays gathered in between.
    fully_shard(model, mesh=world.mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=False)
    sharded = [cast(FSDPModule, layer) for layer in layers]  # fully_shard has changed their class
    for before, current, after in zip((None, *sharded[:-1]), sharded, (*sharded[1:], None), strict=True):
        # While a layer runs, the next one is gathered; in backward, the previous one.
        current.set_modules_to_forward_prefetch([after] if after else [])
        current.set_modules_to_backward_prefetch([before] if before else [])
    for module in (*sharded, cast(FSDPModule, model)):
        # Gradients are summed over ranks, not averaged, because the loss is already divided by the step's pairs. They
        # are reduced after every micro-batch: keeping them whole until the last would take 29 GB a GPU for a 7B.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward left gathered. Until then `model.parameters()` are copies in the
    compute dtype and not the float32 shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def silent_ranks(seconds: float = 10.0) -> str:
    """After a collective failed: which ranks do not answer; "" if all do. All live ranks call. It asks through the
    store, because the connections between processes are broken."""
    deadline = time.monotonic() + seconds
    silent = []
    try:
        store = dist.distributed_c10d._get_default_store()  # there is no public way to get it
        store.set(f"alive/{rank()}", "")
        for other in range(dist.get_world_size()):
            while not store.check([f"alive/{other}"]) and time.monotonic() < deadline:
                time.sleep(0.1)
            if not store.check([f"alive/{other}"]):
                silent.append(f"rank {other}")
    except RuntimeError:  # the store was in a process that is gone: rank 0, without torchrun
        silent = silent or ["rank 0"]
    return f"{', '.join(silent)}: no answer" if silent else ""


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; a plain tensor as it is. All ranks call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(parameter: Tensor) -> tuple[Tensor, slice]:
    """The part of a parameter that this rank holds, and which rows of the whole it is."""
    if not isinstance(parameter, DTensor):
        return parameter, slice(None)
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local(), slice(offset[0], offset[0] + shape[0])


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place, and return it."""
    dist.all_reduce(tensor)
    return tensor


def broadcast(tensor: Tensor) -> None:
    """Rank 0's values on every rank, in place."""
    dist.broadcast(tensor, src=0)


def gather(world: World, value: Any) -> list[Any]:
    """The `value` of every rank, on every rank."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def on_rank_zero(world: World, work: Callable[[], Any]) -> None:
    """Run `work` on rank 0 while the others wait for it."""

    def silently() -> None:
        work()

    from_rank_zero(world, silently)


def from_rank_zero(world: World, work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank. If it fails there, every rank raises the same error."""
    box: list[Any] = [None, None]
    if world.rank == 0:
        try:
            box = [work(), None]
        except Exception as error:  # passed on below, on every rank
            box = [None, error]
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
