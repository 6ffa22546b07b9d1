"""What a step costs the host: Python and launches, per layer, with tensors so small that computing takes no time.

    OMP_NUM_THREADS=1 python benchmarks/host.py

A layer is as on GPUs: sharded by FSDP2 (8 ranks of a process group without a network), bfloat16, FlashAttention's one
operation (with a kernel that does nothing). Seconds are CPU time of the process, the median of some steps. Compiled
layers are compiled without code generation (`aot_eager`) or by Inductor. `broken` is compiled with the graph break at
attention that there once was.

Launches are those of the layers themselves, without FSDP2's copies: operations that are neither views nor allocations.
Of compiled layers they are the kernels that Inductor generates, fused as for CPUs, and what it leaves to libraries.

The host is the bottleneck where a GPU is done with a layer sooner. The last column says how many tokens of a
micro-batch keep an A100 busy, at plan.py's MFU, for as long as the host takes.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch._inductor.config
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import varlen
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from notus import distributed
from notus.attention import PackedAttention
from notus.cost import DEVICES, num_parameters
from notus.dims import MistralConfig
from notus.distributed import World
from notus.model import RECOMPUTE, Mistral, pair_logps
from notus.packing import pack_pairs
from notus.plan import MISTRAL_7B
from notus.tokens import Pair

LAYERS, RANKS, STEPS = 32, 8, 7
CONFIG = MistralConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, rms_norm_eps=1e-5, rope_theta=10000.0, sliding_window=None,
    tie_word_embeddings=False, initializer_range=0.02,
)  # fmt: skip
NO_KERNEL = (
    "view", "t", "transpose", "unsqueeze", "squeeze", "expand", "slice", "split", "select", "detach", "alias",
    "permute", "as_strided", "_unsafe_view", "_reshape_alias", "unflatten", "chunk", "empty", "empty_like",
    "empty_strided", "new_empty",
)  # fmt: skip


def is_launch(name: str) -> bool:
    """Whether an operation of this name is a kernel on a GPU: neither a view nor an allocation."""
    return name.rpartition("::")[2].partition(".")[0] not in NO_KERNEL


class Launches(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += is_launch(op.name())
        return op(*args, **kwargs or {})


def launches_in_graphs(step: Callable[[], None]) -> int:
    """Of a step whose layers Inductor has compiled; its kernels write themselves into the profile, see `main`."""
    with torch.profiler.profile() as profiler:
        step()
    names = (event.name for event in profiler.events() if "CompiledFxGraph" in getattr(event.cpu_parent, "name", ""))
    return sum(map(is_launch, names))


def flash_without_computing() -> None:
    def forward(query, *_, **__):
        lse = torch.empty(query.shape[1], len(query))
        return torch.empty_like(query), lse, torch.empty(2, dtype=torch.uint64)

    varlen._varlen_attn.register_kernel("cpu")(forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(
        lambda _grad, *inputs, **__: tuple(torch.empty_like(x) for x in inputs[:3])
    )
    init = PackedAttention.__init__
    PackedAttention.__init__ = lambda *arguments: init(*arguments, flash=True)


def measure(level: str, way: str) -> tuple[float, float, int, float]:
    """(milliseconds of the host a layer in forward and backward, launches a layer, graphs, seconds to compile)."""
    torch._dynamo.reset()
    counters.clear()
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    model = Mistral(CONFIG)
    model.initialize(0)
    model.model.recompute = level
    attention = PackedAttention.__call__
    if way != "eager":
        torch.compile = partial(torch_compile, backend="inductor" if way == "inductor" else "aot_eager")
        if way == "broken":
            PackedAttention.__call__ = torch.compiler.disable(attention)
        model.model.compile_layers()
    distributed.shard(model, model.model.layers, World(0, RANKS, torch.device("cpu"), mesh), torch.bfloat16)
    rng = np.random.default_rng(0)
    stream = pack_pairs([Pair("", *(rng.integers(0, 64, n).astype(np.int32) for n in (3, 4, 5)))])

    def step(model: Mistral = model) -> None:
        pair_logps(model, stream).sum().backward()
        model.zero_grad()

    started = time.process_time()
    step()
    first = time.process_time() - started
    seconds = []
    for _ in range(STEPS):
        started = time.process_time()
        step()
        seconds.append(time.process_time() - started)
    launches = launches_in_graphs(step) if way == "inductor" else 0
    if way == "eager":
        plain = Mistral(CONFIG).to(torch.bfloat16)
        plain.model.recompute = level
        with Launches() as mode:
            step(plain)
        launches = mode.count
    PackedAttention.__call__ = attention
    milliseconds = 1e3 * statistics.median(seconds) / LAYERS
    return milliseconds, launches / LAYERS, counters["stats"]["unique_graphs"], first


def main() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    flash_without_computing()
    torch._inductor.config.cpp.enable_kernel_profile = True
    layer_flops = 6 * num_parameters(MISTRAL_7B)[0] / MISTRAL_7B.num_hidden_layers  # a token, forward and backward
    a100 = DEVICES["A100-80GB"]
    tokens = a100.peak_flops * a100.mfu / layer_flops  # a second
    print("| level | way | host ms a layer | launches a layer | graphs | first step s | an A100's tokens |")
    print("|---|---|---|---|---|---|---|")
    ways = sys.argv[1:] or ["eager", "aot_eager", "inductor", "broken"]
    for way in ways:
        for level in RECOMPUTE if way != "broken" else RECOMPUTE[:1]:
            ms, launches, graphs, first = measure(level, way)
            row = (
                level,
                way,
                f"{ms:.2f}",
                f"{launches:.0f}" if launches else "-",
                graphs,
                f"{first:.0f}",
                f"{ms / 1e3 * tokens:,.0f}",
            )
            print("|", " | ".join(map(str, row)), "|", flush=True)


if __name__ == "__main__":
    torch_compile = torch.compile
    main()
