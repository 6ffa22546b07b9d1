"""Whole training steps on a pretended GPU, rank 0 of 8, in a process of its own:

    python tests/pretend_gpu.py LEVEL WAY ...      WAY: eager, compiled, offload, replicate, stay, lora, or a+b

Tensors have device, dtype and shape and no numbers (FakeTensorMode), collectives have no network. So what is on the
wrong device or of the wrong dtype fails here as it would on 8 GPUs. For each pair of LEVEL and WAY a line of JSON is
printed. Needs g++.
"""

import json
import sys
from functools import partial

import numpy as np
import pretend_library  # noqa: F401  before torch
import torch
import torch.distributed as dist
from tiny import random_pairs, tiny_config
from torch._dynamo.utils import counters
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from notus import attention, distributed
from notus.distributed import World
from notus.lora import TARGETS, LoRA, add_lora
from notus.losses import PreferenceLoss
from notus.model import pair_logps
from notus.optim import make_optimizer
from notus.packing import pack_pairs
from notus.weights import meta_model

CONFIG = tiny_config(head_dim=8, num_hidden_layers=2)
RANKS, GPU = 8, torch.device("cuda", 0)


class Nothing:
    """A stream or an event: every method does nothing."""

    stream_id, device_index, device_type = 0, 0, 1

    def __init__(self, *_, **__): ...

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: Nothing()

    def __enter__(self): ...

    def __exit__(self, *_): ...


READ = torch.ops.aten._local_scalar_dense.default  # Tensor.item, and Tensor.tolist for each number
WAITS = []  # each number that the host reads from the GPU, for which it waits


def read(mode: FakeTensorMode, op: torch._ops.OpOverload, tensor: torch.Tensor) -> object:
    if mode.shape_env is not None:  # the compiler's
        return compilers_read(mode, op, tensor)
    WAITS.append(str(tensor.device))
    return 0.5


compilers_read = fake_impls.op_implementations_dict[READ]


def pretend() -> None:
    for name in ("Stream", "Event", "current_stream", "default_stream", "stream"):
        setattr(torch.cuda, name, Nothing)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.backends.cudnn.version = lambda: 92400
    torch.accelerator.is_available = lambda: False  # otherwise the compiler looks for its streams
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # there is no fake of it
    fake_impls.op_implementations_dict[READ] = read
    attention.flash_works = lambda _: True


def one(level: str, ways: list[str]) -> dict[str, object]:
    """Two training steps, the second for a rank without pairs, and an evaluation."""
    torch._dynamo.reset()
    counters.clear()
    if "replicate" in ways:
        mesh = init_device_mesh("cuda", (2, RANKS // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cuda", (RANKS,), mesh_dim_names=("shard",))
    world, offload = World(0, RANKS, GPU, mesh), "offload" in ways
    model = meta_model(CONFIG)
    if "lora" in ways:
        add_lora(model, LoRA(2, 4.0, TARGETS), torch.bfloat16)
    model.model.recompute = level
    if "compiled" in ways:
        torch.compile = partial(torch_compile, backend="aot_eager" if level == "elementwise" else "eager")
        model.model.compile_layers()
    with FakeTensorMode(allow_non_fake_inputs=True):
        streams = [pack_pairs(random_pairs(np.random.default_rng(0), 3, CONFIG.vocab_size)), pack_pairs([])]
        distributed.shard(model, model.model.layers, world, torch.bfloat16, offload, "stay" not in ways)
        model.to_empty(device="cpu" if offload else GPU)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trained, "rmsprop", 1e-6, 0.0)
        WAITS.clear()
        for stream in streams:
            members = np.arange(stream.num_sequences // 2)
            step = train.train_step(
                model,
                optimizer,
                [(members, stream)],
                torch.zeros(3, 2),
                3,
                world,
                preference_loss=PreferenceLoss("dpo", 0.1),
                max_grad_norm=1.0,
            )
            assert step.finite
        waits = list(WAITS)
        with torch.no_grad():
            logps = pair_logps(model, streams[0].to(GPU))
        distributed.reshard(model)
        state = optimizer.state[trained[0]]["square_avg"]
    return {
        "level": level, "ways": ways, "logps": [str(logps.device), str(logps.dtype), list(logps.shape)],
        "weights": sorted({f"{p.device} {p.dtype}" for p in model.parameters()}),
        "state": f"{state.device} {state.dtype}", "waits": waits, "graphs": counters["stats"]["unique_graphs"],
        "breaks": len(counters["graph_break"]),
    }  # fmt: skip


if __name__ == "__main__":
    pretend()
    torch_compile = torch.compile
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    for level, way in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        print(json.dumps(one(level, way.split("+"))), flush=True)
