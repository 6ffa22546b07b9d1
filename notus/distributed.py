"""One process or many: the process group, the sharding, the sums over ranks. The model knows of none of it.

torchrun's environment variables are read here and nowhere else.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh


def rank() -> int:
    """0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int | None:
    """None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None


def start(device: str = "auto") -> World:
    """Join torchrun's process group; without torchrun, be a group of one. `device`: "cpu", "cuda" or "auto"."""
    size, local_rank = world_size() or 1, int(os.environ.get("LOCAL_RANK", 0))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} found")
        torch.cuda.set_device(local_rank)
    backend = "nccl" if kind == "cuda" else "gloo"
    if world_size():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    return World(rank(), size, torch.device(kind, local_rank if kind == "cuda" else None), mesh)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, layers: nn.ModuleList, world: World, compute_dtype: torch.dtype) -> None:
    """FSDP2 (ZeRO-3), in place: each rank keeps 1/N of every parameter, its gradient and its optimizer state, in
    float32. A layer's weights are gathered, in `compute_dtype`, just before it runs and freed after it.

    Gradients are reduced in float32 and summed, not averaged: the loss is already divided by the step's pairs.
    One process in float32 has nothing to split or cast, and is left as it is: there FSDP2 only costs (7 % measured).
    """
    if world.size == 1 and compute_dtype == torch.float32:
        return
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables are inputs of each layer, and stay float32
    )
    for layer in layers:
        fully_shard(layer, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)  # the rest: embedding, last norm, head
    for module in (*layers, model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward left gathered: until then `model.parameters()` are not the float32
    shards but their copies in the compute dtype."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank (all ranks must call); a plain tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """In place; the tensor itself is returned."""
    dist.all_reduce(tensor)
    return tensor


def on_rank_zero(world: World, work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0, on every rank; the others wait for it."""
    box = [work() if world.rank == 0 else None]
    dist.broadcast_object_list(box, src=0, device=world.device)
    return box[0]
