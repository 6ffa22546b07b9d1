"""How much of a GPU's memory PyTorch's allocator takes beyond what lives, when every step has streams of other lengths.

    PYTHONPATH=tests python benchmarks/fragmentation.py [TOKENS [STEPS]]      6656 tokens a micro-batch, 16 steps

Whole steps of a 7B, rank 0 of 8, on the pretended GPU of tests/pretend_gpu.py: tensors have a size and no numbers. What
they allocate and free, and on which stream, is replayed through the rules of c10/cuda/CUDACachingAllocator.cpp: sizes
rounded, pools by stream and size, best fit, blocks split and merged. `default` asks the GPU for segments that never
grow. `expandable` is PYTORCH_ALLOC_CONF=expandable_segments:True. What is reserved beyond what lives is fragmentation;
of `default` both what it takes from an empty GPU, and what it still needs when it gives back all that is unused. It
needs g++.
"""

import bisect
import sys
import weakref
from typing import ClassVar

import pretend_library  # noqa: F401  before torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pretend_gpu import GPU, RANKS, pretend
from step import draw_pairs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from notus import distributed
from notus.cost import GIB, Job, memory_gib, scored_share, training_flops
from notus.distributed import World
from notus.losses import PreferenceLoss
from notus.model import RECOMPUTE
from notus.optim import make_optimizer
from notus.packing import training_steps
from notus.plan import MISTRAL_7B
from notus.weights import meta_model

PAIRS = 64  # a step
MIB = 2**20


class Block:
    """Of a segment: a list from left to right, as the allocator splits it."""

    def __init__(self, size: int, left: "Block | None" = None, right: "Block | None" = None):
        self.size, self.left, self.right, self.free = size, left, right, True
        if left:
            left.right = self
        if right:
            right.left = self


class Allocator:
    """Segments are 2 MiB for blocks up to 1 MiB, 20 MiB for those below 10 MiB, and of the block's own size, rounded to
    2 MiB, for others. An expandable segment is one for each pool, and grows at its end by pages of 2 or 20 MiB."""

    def __init__(self, expandable: bool):
        self.expandable, self.reserved, self.unused, self.most, self.least = expandable, 0, 0, 0, 0  # bytes
        self.free: dict[tuple[int, bool], list[tuple[int, int, Block]]] = {}  # by stream and kind; sorted by size
        self.end: dict[tuple[int, bool], Block] = {}  # the last block of an expandable segment
        self.used: dict[int, tuple[tuple[int, bool], Block]] = {}

    def allocate(self, key: int, size: int, stream: int) -> None:
        size = -(-max(size, 1) // 512) * 512
        pool = stream, size <= MIB
        free = self.free.setdefault(pool, [])
        fit = bisect.bisect_left(free, (size, 0))
        block = self._take(pool, free[fit][2]) if fit < len(free) else self._grow(pool, size)
        if block.size - size >= (512 if pool[1] else MIB + 1):
            rest = Block(block.size - size, block, block.right)
            block.size = size
            if self.end.get(pool) is block:
                self.end[pool] = rest
            self._give(pool, rest)
        block.free = False
        self.used[key] = pool, block
        self.most, self.least = max(self.most, self.reserved), max(self.least, self.reserved - self.unused)

    def release(self, key: int) -> None:
        pool, block = self.used.pop(key)
        for other in (block.left, block.right):
            if other and other.free:
                self._take(pool, other)
                left, right = (other, block) if other is block.left else (block, other)
                block = Block(left.size + right.size, left.left, right.right)
                if self.end.get(pool) in (left, right):
                    self.end[pool] = block
        self._give(pool, block)

    def _grow(self, pool: tuple[int, bool], size: int) -> Block:
        page = 2 * MIB if pool[1] or (size >= 10 * MIB and not self.expandable) else 20 * MIB
        end = self.end.get(pool)
        if end and end.free:
            self._take(pool, end)
            size -= end.size
        grown = -(-size // page) * page
        self.reserved += grown
        if end and end.free:
            end.size += grown
            return end
        block = Block(grown, end)
        if self.expandable:
            self.end[pool] = block
        return block

    def _take(self, pool: tuple[int, bool], block: Block) -> Block:
        free = self.free[pool]
        free.pop(bisect.bisect_left(free, (block.size, id(block))))
        self.unused -= block.size * self._whole(block)
        return block

    def _give(self, pool: tuple[int, bool], block: Block) -> None:
        block.free = True
        bisect.insort(self.free[pool], (block.size, id(block), block))
        self.unused += block.size * self._whole(block)

    def _whole(self, block: Block) -> bool:
        """Whether the segment is free from end to end, and so can be given back."""
        return block.left is None and block.right is None


class Stream:
    """In place of torch.cuda.stream: which stream is current."""

    current: ClassVar = [0]

    def __init__(self, stream: object):
        self.stream = id(stream)

    def __enter__(self) -> None:
        self.current.append(self.stream)

    def __exit__(self, *_: object) -> None:
        self.current.pop()


class Ledger(TorchDispatchMode):
    """Hands every storage on the GPU to the allocators, when it is made, when FSDP2 resizes it, and when it is gone."""

    def __init__(self, allocators: list[Allocator]):
        super().__init__()
        self.allocators, self.sizes, self.now, self.peak = allocators, {}, 0, 0
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            if storage._cdata in self.sizes:
                self._set(storage._cdata, size)

        torch.UntypedStorage.resize_ = resized

    def _set(self, key: int, size: int) -> None:
        before = self.sizes.pop(key, 0)
        for allocator in self.allocators:
            if before:
                allocator.release(key)
            if size:
                allocator.allocate(key, size, Stream.current[-1])
        self.sizes[key] = size
        self.now += size - before
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int) -> None:
        self._set(key, 0)
        del self.sizes[key]

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            tensor = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    weakref.finalize(storage, self._gone, storage._cdata)
                    self._set(storage._cdata, storage.nbytes())
        return out


class FusedNorm(torch.autograd.Function):
    """RMSNorm on a GPU is one kernel. FakeTensorMode would run it operation by operation."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):  # noqa: ARG004
        ctx.save_for_backward(x, weight, x.new_empty(len(x), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):  # noqa: ARG004
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), None, torch.empty_like(weight), None


def measure(level: str, tokens: int, steps: int) -> None:
    """Print a line of the table."""
    allocators = [Allocator(expandable=False), Allocator(expandable=True)]
    ledger, dtype = Ledger(allocators), torch.bfloat16
    pairs, optimizer = draw_pairs(PAIRS * steps, 1000, 1.0), "rmsprop"
    world = World(0, RANKS, GPU, init_device_mesh("cuda", (RANKS,), mesh_dim_names=("shard",)))
    model = meta_model(MISTRAL_7B)
    model.model.recompute = level
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, ledger:
        distributed.shard(model, model.model.layers, world, dtype)
        model.to_empty(device=GPU)
        optimize = make_optimizer(model.parameters(), optimizer, 1e-6, 0.0)
    longest = 0
    for _, rows, batches in training_steps(
        pairs, training_flops(MISTRAL_7B, pairs.lengths), range(steps), pairs_per_step=PAIRS, seed=0, budget=tokens,
        rank=0, num_ranks=RANKS,
    ):  # fmt: skip
        longest = max(longest, *(len(stream.input_ids) for _, stream in batches))
        with fake, ledger:
            loss = PreferenceLoss("dpo", 0.1)
            train.train_step(
                model, optimize, batches, torch.zeros(len(pairs), 2), len(rows), world, preference_loss=loss
            )
    job = Job(
        num_gpus=RANKS, replicate=1, dtype=dtype, optimizer=optimizer, micro_batch_tokens=longest,
        activation_checkpointing=level, compile=False, cpu_offload=False, num_train_epochs=1, pairs_per_step=PAIRS,
        eval_steps=100,
    )  # fmt: skip
    planned = sum(memory_gib(MISTRAL_7B, job, scored_share(pairs.lengths), level).values())
    default, expandable = allocators
    found = (ledger.peak, planned * GIB, default.most, default.least, expandable.most)
    print(f"{level:<12}{longest:>8,}" + "".join(f"{size / GIB:>12.2f}" for size in found), flush=True)


def main(tokens: int = 6656, steps: int = 16) -> None:
    pretend()
    torch.cuda.stream, F.rms_norm = Stream, FusedNorm.apply
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    print("recomputing   tokens       alive     planned     default  given back  expandable   (GiB)")
    for level in RECOMPUTE:
        measure(level, tokens, steps)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
