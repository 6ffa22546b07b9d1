"""What a run costs: FLOPs, GiB of a GPU by part, bytes of traffic. Arithmetic on shapes alone, no weights, no data.

Training uses it to deal pairs evenly over ranks, to report MFU and to choose what to recompute. `python -m notus.plan`
prints it.

FLOPs count each useful multiplication once (no credit for recomputation): 2 a parameter and token forward, 4 backward
(2 for a frozen one, which needs no gradient of its own), plus attention, on unique tokens. A prompt counts once for
both answers.

Legend: T tokens of a stream, R response tokens, P pairs, D model dimension, V vocabulary, H query heads, K key/value
heads.
"""

import functools
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from notus.dims import MistralConfig
from notus.logprobs import CHUNK_ROWS, KEEP_BYTES
from notus.lora import LoRA, add_lora
from notus.model import RECOMPUTE, DecoderLayer, RMSNorm, is_product, rotary_table

GIB = 2**30

# Of a GPU's memory, for what memory_gib does not count. CUDA's context, kernels and NCCL: 1.3 on one H200
# (benchmarks/RESULTS.md); NCCL's buffers for 8 GPUs take 1.1 to 1.6 by bug reports (nccl#1685, nccl#864). With the
# growing segments that train.py asks for, up to 1.1 more was reserved than planned, on that H200.
RESERVE_GIB = 3.0


@dataclass(frozen=True)
class Device:
    """One GPU. From its data sheet: dense bfloat16 FLOP/s with sums in float32, and bytes/s in one direction, to the
    other GPUs (NVLink, or PCIe where there is none) and to the host (PCIe). From torch's out-of-memory errors in public
    bug reports: its memory. Assumed: the MFU that a step reaches."""

    peak_flops: float
    memory_gib: float
    link_bytes: float
    mfu: float
    host_bytes: float = 32e9  # PCIe 4.0 x16


# Published MFU of pre-training in bfloat16. A100: 51 % (7B, 8 x 40GB, all recomputed) and 58 to 64 % (7B, 8 x 80GB) in
# MosaicML llm-foundry, scripts/train/benchmarking; 57 to 68 % (7B) in PyTorch's blog, "Maximizing training throughput".
# H100: 46 % (7B, llm-foundry); 33 %, compiled 39 % (8B, torchtitan, benchmarks/llama3_h100_202412). H200: 48 %,
# measured on one, with the recipe's step (benchmarks/RESULTS.md); an H100 has its chip and slower memory. The others:
# no figure found, a guess. Published DPO stacks reach 6 to 29 %.
# Peaks of GeForce cards: NVIDIA's architecture white papers (GA102, Ada, RTX Blackwell).
DEVICES = {
    "A10": Device(125e12, 22.0, 32e9, 0.40),
    "RTX-3090": Device(71e12, 23.6, 32e9, 0.40),
    "RTX-4090": Device(165.2e12, 23.5, 32e9, 0.40),
    "RTX-5090": Device(209.5e12, 31.3, 64e9, 0.40, 64e9),
    "L40S": Device(362e12, 44.4, 32e9, 0.40),
    "A100-40GB": Device(312e12, 39.4, 300e9, 0.50),
    "A100-80GB": Device(312e12, 79.1, 300e9, 0.50),
    "H100-80GB": Device(989e12, 79.1, 450e9, 0.45, 64e9),
    "H200": Device(989e12, 139.7, 450e9, 0.48, 64e9),
    "B200": Device(2250e12, 178.3, 900e9, 0.35, 64e9),
}

# What cpu_offload costs: clipping and the optimizer work in host memory, which the GPUs of a host share. Bytes a
# parameter: their measured time on a CPU, times the rate at which it copies memory (benchmarks/RESULTS.md).
GPUS_PER_HOST = 8
HOST_MEMORY_BYTES = 50e9  # a second; assumed: two channels of DDR5
OPTIMIZER_BYTES = {"rmsprop": 70, "adamw": 114}

# A checkpoint's copy into host memory, bytes a second: what a CPU measures where the pages are there already. From an
# H200 the first one has 1.5e9 and the others 15e9 (benchmarks/RESULTS.md). Training waits for it, and not for the disk.
STAGING_BYTES = 2.5e9


def peak_flops(device_name: str) -> float | None:
    """By the name that torch.cuda.get_device_name gives; None for a device that is not in the table."""
    words = [] if "Laptop" in device_name else re.split(r"[ -]", device_name)
    model = next(
        (w for w in words if w in ("A10", "3090", "4090", "5090", "L40S", "A100", "H100", "H200", "B200")), None
    )
    return next((d.peak_flops for name, d in DEVICES.items() if model in name.split("-")), None)


@functools.cache
def num_parameters(dims: MistralConfig) -> tuple[int, int]:
    """(of all decoder layers, of embedding, last norm and head)."""
    with torch.device("meta"):
        layer = sum(p.numel() for p in DecoderLayer(dims).parameters())
    tables = dims.vocab_size * dims.hidden_size * (1 if dims.tie_word_embeddings else 2)
    return layer * dims.num_hidden_layers, tables + dims.hidden_size


@functools.cache
def num_adapter_parameters(dims: MistralConfig, lora: LoRA | None) -> int:
    """What LoRA trains, in all layers; 0 without it."""
    if lora is None:
        return 0
    with torch.device("meta"):
        layer = DecoderLayer(dims)
    add_lora(layer, lora, torch.float32)
    return dims.num_hidden_layers * sum(p.numel() for p in layer.parameters() if p.requires_grad)


def forward_flops(dims: MistralConfig, lengths: np.ndarray) -> np.ndarray:
    """One forward pass over pairs of `lengths` (P, 3), prompts shared -> (P,)."""
    weights, attention = _forward_flops(dims, lengths)
    return weights + attention


def training_flops(dims: MistralConfig, lengths: np.ndarray, lora: LoRA | None = None) -> np.ndarray:
    """Forward and backward over pairs of `lengths` (P, 3) -> (P,): three times the forward pass, and with LoRA two
    times for the frozen weights."""
    weights, attention = _forward_flops(dims, lengths)
    adapter = 2 * num_adapter_parameters(dims, lora) * lengths.sum(axis=1)
    return (2 if lora else 3) * weights + 3 * (attention + adapter)


def _forward_flops(dims: MistralConfig, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(with weights, of attention), (P,) each."""
    layer_parameters, _ = num_parameters(dims)
    heads, hidden = dims.num_attention_heads * dims.head_dim, dims.hidden_size
    skipped = heads * hidden + 3 * hidden * dims.intermediate_size + hidden  # by prompts in the last layer
    attention = 4 * dims.num_attention_heads * dims.head_dim * dims.num_hidden_layers  # a query-key meeting
    head = 2 * dims.vocab_size * dims.hidden_size  # a scored token
    prompt, *answers = lengths.T.astype(np.float64)
    meetings = prompt * (prompt + 1) / 2 + sum(length * prompt + length * (length + 1) / 2 for length in answers)
    layers = 2 * (layer_parameters * lengths.sum(axis=1) - skipped * prompt)
    return layers + head * sum(answers), attention * meetings


@functools.cache
def activation_bytes(
    dims: MistralConfig, dtype: torch.dtype, recompute: str, compiled: bool, lora: LoRA | None = None
) -> int:
    """Bytes that a decoder layer keeps for backward, per token of the stream: counted, on the meta device, by asking
    autograd what it saves (`none`), or which results are kept (`elementwise`); `full` is the layer's input alone.

    As on a GPU: there RMSNorm is one kernel, which keeps its input and a float32 a row (elsewhere more), and attention
    is one, which keeps query, key, value, its output, and a float32 for each head. A compiled layer keeps the norms'
    results even with `elementwise`, but not what down_proj gave; with `none` it keeps less than said here.
    """
    if recompute == "full":
        return dims.hidden_size * dtype.itemsize
    tokens = 64
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in shared:
            kept[storage._cdata] = storage  # held, so that no other storage takes its name
        return tensor

    def attend(_layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.clone()
        for tensor in (query, key, value, out) if recompute == "none" else (out,):
            keep(tensor)
        return out

    class KeepProducts(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **kwargs or {})
            return keep(out) if is_product(op) else out

    with torch.device("meta"):
        layer = DecoderLayer(dims)
        if lora:
            add_lora(layer, lora, dtype)
        layer.to(dtype)
        for norm in (module for module in layer.modules() if isinstance(module, RMSNorm)):
            norm.weight.requires_grad_()  # frozen or not, the kernel saves its input
            vars(norm)["forward"] = functools.partial(torch.mul, norm.weight)
        x = torch.empty(tokens, dims.hidden_size, dtype=dtype, requires_grad=True)
        rotary = rotary_table(torch.arange(tokens), dims.head_dim, dims.rope_theta, dtype)
        shared = {tensor.untyped_storage()._cdata for tensor in (*layer.parameters(), *rotary)}
        if recompute == "elementwise":
            keep(x)
            with KeepProducts():
                layer(x, rotary, attend, 0)
        else:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                layer(x, rotary, attend, 0)
    more = dims.hidden_size * dtype.itemsize if compiled and recompute == "elementwise" else 0
    rows = dims.num_attention_heads  # float32: attention's, and those that the norms keep
    if recompute == "none":
        rows += 2 + dims.qk_norm * (dims.num_attention_heads + dims.num_key_value_heads)
    return sum(storage.nbytes() for storage in kept.values()) // tokens + 4 * rows + more


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the cost of a run depends on, besides the model and the data. Fields are named as the settings are."""

    num_gpus: int
    replicate: int
    dtype: torch.dtype  # of matmuls and activations
    optimizer: str
    micro_batch_tokens: int
    activation_checkpointing: str  # one of RECOMPUTE, or "auto"
    compile: bool
    cpu_offload: bool
    num_train_epochs: int
    pairs_per_step: int
    eval_steps: int
    lora: LoRA | None = None
    reference: bool = True  # whether the loss has one
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        if self.num_gpus < 1 or self.num_gpus % self.replicate:
            raise ValueError(
                f"{self.num_gpus} GPUs cannot hold distributed.replicate = {self.replicate} equal copies of the model"
            )

    @property
    def shards(self) -> int:
        return self.num_gpus // self.replicate

    @property
    def times_gathered(self) -> int:
        """A layer, in one micro-batch."""
        return 2 if self.reshard_after_forward else 1


def scored_share(lengths: np.ndarray) -> float:
    """Pairs of `lengths` (P, 3): the share of their tokens that meet the head."""
    return float(lengths[:, 1:].sum() / max(1, lengths.sum()))


def memory_gib(dims: MistralConfig, job: Job, scored: float, recompute: str) -> dict[str, float]:
    """GiB per GPU, by part, at the peak of a training step; `scored` is the data's `scored_share`. A slight
    overestimate, since the parts do not all peak at once. Excludes the CUDA context and fragmentation (RESERVE_GIB)."""
    layers, rest = num_parameters(dims)
    adapter = num_adapter_parameters(dims, job.lora)
    size, held = job.dtype.itemsize, 0 if job.cpu_offload else 1 / job.shards  # bytes; share of what is sharded
    trained, frozen, stored = (adapter, layers + rest, size) if job.lora else (layers + rest, 0, 4)
    one_layer, one_adapter = layers / dims.num_hidden_layers, adapter / dims.num_hidden_layers
    if not job.lora:  # in the compute dtype, beside a layer's gradients in float32
        gathered = size * (2 * rest + 3 * one_layer) + 4 * one_layer
    elif job.num_gpus == 1 and not job.cpu_offload:  # distributed.shard has nothing to gather
        gathered = size * adapter + (size + 4) * one_adapter  # copies of A and B in the compute dtype
    else:
        gathered = size * (rest + 2 * one_layer) + (2 * size + 4) * one_adapter
    levels = [recompute] * dims.num_hidden_layers
    if recompute == "half":
        levels = ["full" if index % 2 == 0 else "elementwise" for index in range(dims.num_hidden_layers)]
    kept = {level: activation_bytes(dims, job.dtype, level, job.compile, job.lora) for level in {*levels, "none"}}
    # Backward begins with the last layer: everything it saves, recomputed if need be, is alive beside what the others
    # keep.
    activations = kept["none"] + sum(kept[level] for level in levels[:-1])  # bytes a token
    rows = scored * job.micro_batch_tokens  # rows of the head, R
    name = str(job.dtype).removeprefix("torch.")
    stay = 0.0  # of the layers that are not counted as gathered
    if not job.reshard_after_forward and (job.num_gpus > 1 or job.cpu_offload or not job.lora):
        stay = size * (layers + adapter - 2 * (one_layer + one_adapter))
    parts = {
        **({f"frozen weights, {name} shard": size * frozen * held} if job.lora else {}),
        "weights, fp32 shard": 4 * trained * held,
        "gradients, fp32 shard": 4 * trained * held,
        f"{job.optimizer} state, fp32 shard": (8 if job.optimizer == "adamw" else 4) * trained * held,
        "gathered weights and gradients": gathered,
        **({"layers that stay gathered": stay} if stay else {}),
        **(
            {"copies that come from the host": stored * max(rest, 2 * one_layer) / job.shards}
            if job.cpu_offload
            else {}
        ),
        "activations": activations * job.micro_batch_tokens,
        "head, scored rows and softmax": 3 * rows * dims.hidden_size * size
        + min(rows * dims.vocab_size * size, KEEP_BYTES)
        + CHUNK_ROWS * dims.vocab_size * (4 + size),
    }
    # When backward has freed its parts, embedding and head are reduced in float32, and then the optimizer's
    # multi-tensor step makes one temporary of every trained shard. With few tokens a GPU either may take more.
    backward = sum(size for name, size in parts.items() if "shard" not in name)
    after = max(4 * trained * held, 0 if job.lora or job.num_gpus == 1 else gathered + 4 * rest)
    if after > backward:
        parts["the optimizer's temporaries, beyond backward's peak"] = after - backward
    return {name: size / GIB for name, size in parts.items()}


def least_recomputation(dims: MistralConfig, job: Job, scored: float, device_gib: float | None) -> str:
    """What a run recomputes: the level it names, or with "auto" the first level of RECOMPUTE that fits `device_gib`,
    and `full` if none does. Without a GPU (None) nothing is recomputed."""
    if job.activation_checkpointing != "auto":
        return job.activation_checkpointing
    if device_gib is None:
        return "none"
    needed = {level: sum(memory_gib(dims, job, scored, level).values()) + RESERVE_GIB for level in RECOMPUTE}
    return next((level for level in RECOMPUTE if needed[level] <= device_gib), "full")


def traffic_bytes(dims: MistralConfig, job: Job) -> float:
    """What a GPU receives in one micro-batch, as distributed.shard has it: layers gathered for forward and, where they
    were freed, again for backward, the rest once, in the compute dtype; all gradients reduced in float32."""
    layers, rest = num_parameters(dims)
    adapter = num_adapter_parameters(dims, job.lora)
    gathered = job.dtype.itemsize * (job.times_gathered * (layers + adapter) + rest)
    return (gathered + 4 * (adapter if job.lora else layers + rest)) * (job.shards - 1) / job.shards


def offload_bytes(dims: MistralConfig, job: Job) -> float:
    """What crosses PCIe for one GPU in one micro-batch, with cpu_offload: its shards, each time they are gathered, in
    the dtype they are kept in, and the float32 gradients on their way back."""
    if not job.cpu_offload:
        return 0.0
    layers, rest = num_parameters(dims)
    adapter = num_adapter_parameters(dims, job.lora)
    stored = job.dtype.itemsize if job.lora else 4
    trained = adapter if job.lora else layers + rest
    return (stored * (job.times_gathered * layers + rest) + 4 * job.times_gathered * adapter + 4 * trained) / job.shards


def checkpoint_bytes(dims: MistralConfig, optimizer: str, lora: LoRA | None = None) -> int:
    """Of one checkpoint: what is trained and its optimizer state, in float32. A GPU's share of it is in host memory."""
    trained = num_adapter_parameters(dims, lora) or sum(num_parameters(dims))
    return trained * (12 if optimizer == "adamw" else 8)


def host_seconds(dims: MistralConfig, job: Job) -> float:
    """The optimizer's step on the CPU, with cpu_offload. Nothing overlaps it."""
    if not job.cpu_offload:
        return 0.0
    trained = num_adapter_parameters(dims, job.lora) or sum(num_parameters(dims))
    on_a_host = trained / job.shards * min(job.num_gpus, GPUS_PER_HOST)
    return on_a_host * OPTIMIZER_BYTES[job.optimizer] / HOST_MEMORY_BYTES
