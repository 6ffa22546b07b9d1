"""How fast is a training step, and what is each technique worth?

    python benchmarks/step.py                                    on what there is, a GPU or a CPU; a minute
    python benchmarks/step.py --ablate                           as it is, then each technique off in turn
    torchrun --nproc-per-node 8 benchmarks/step.py --shape 7b:32

Random weights, random tokens, lengths as UltraFeedback has them: a step costs what it costs, whatever the weights say.
The step is train.py's own, `train.train_step`, with streams packed a step ahead as there. A variant gives it other
micro-batches, or puts another function in the place of `train.pair_logps`. A step is timed from one loss to the next;
the first two are left out, and the median of the others counts. The reference pass is timed as a whole. The share of
the peak is of useful FLOPs (cost.py: prompts once, nothing recomputed), against a plain matrix product in the same
process. Beside the measured memory stands what notus.plan says of the longest micro-batch.

Legend: P pairs, T tokens of a stream, S answers in it, R response tokens, V vocabulary.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.py

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # where train.py is

import train
from notus import distributed, weights
from notus.attention import PackedAttention, sdpa, visible
from notus.cost import GIB, Job, forward_flops, memory_gib, num_parameters, scored_share
from notus.dims import MistralConfig
from notus.distributed import World, sum_over_ranks
from notus.logprobs import sequence_logps
from notus.losses import PreferenceLoss
from notus.metrics import peak_memory_gib
from notus.model import RECOMPUTE, Attend, Mistral, pair_logps
from notus.optim import lr_at, make_optimizer
from notus.packing import MicroBatch, Stream, ahead, deal, pack, pack_pairs
from notus.plan import MISTRAL_7B, cpu_flops, engineering
from notus.tokens import Pair, PairSet

BETA, LEARNING_RATE, MAX_GRAD_NORM, SEED = 0.1, 1e-5, 1.0, 42
LEFT_OUT = 2  # first steps: kernels are chosen, the optimizer makes its state
SWITCHES = {
    "--no-prefix-sharing": "each answer with a copy of its prompt",
    "--no-packing": "one sequence at a time",
    "--full-head": "log_softmax of all scored rows at once, by plain torch",
    "--dense-mask": "one SDPA over the whole stream, with a (T, T) mask",
    "--no-flash": "on a GPU: one SDPA for each piece of the stream",
    "--no-reshard": "on a GPU: layers stay gathered between forward and backward, for 2 bytes a parameter",
}


def shape(name: str) -> tuple[str, MistralConfig]:
    """`tiny`: mostly head and embedding, like small models; `bal`: mostly blocks, like large ones; `7b:N`: Mistral-7B
    with N of its 32 layers."""
    rest = {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False}
    shapes = {
        "tiny": MistralConfig(32000, 256, 896, 4, 4, 2, 64, **rest),
        "bal": MistralConfig(2048, 384, 1344, 6, 6, 3, 64, **rest),
    }
    kind, _, layers = name.partition(":")
    if kind == "7b" and layers.isdecimal() and int(layers) > 0:
        shapes[name] = replace(MISTRAL_7B, num_hidden_layers=int(layers))
    if name not in shapes:
        raise argparse.ArgumentTypeError(f"{name!r} is not tiny, bal or 7b:N")
    return name, shapes[name]


def draw_pairs(count: int, vocab_size: int, scale: float) -> PairSet:
    """Random ids. Lengths are lognormal, cut as the recipe cuts them (1024, prompts 512), then `scale`d. Their means at
    scale 1 are UltraFeedback's: 161 tokens of prompt, 298 chosen, 283 rejected."""
    rng = np.random.default_rng(SEED)
    length, both, *own = rng.standard_normal((4, count))
    prompt = 110 * np.exp(0.99 * length)
    answers = [
        median * np.exp(0.6 * (0.4**0.5 * both + 0.6**0.5 * z)) for median, z in zip((262, 247), own, strict=True)
    ]
    prompt = np.where(prompt + np.maximum(*answers) > 1024, np.minimum(prompt, 512), prompt)
    cut = prompt + np.maximum(*answers) > 1024
    lengths = [prompt, *(np.where(cut, np.minimum(answer, 512), answer) for answer in answers)]
    pairs = []
    for number, sizes in enumerate(np.maximum(2, np.stack(lengths, axis=1) * scale).astype(int)):
        ids = [rng.integers(3, vocab_size, size, dtype=np.int32) for size in sizes]
        ids[0][0], ids[1][-1], ids[2][-1] = 1, 2, 2  # BOS, EOS, EOS
        pairs.append(Pair(f"pair {number}", *ids))
    return PairSet.of(pairs, Counter())


def learning_rate_at(step: int, steps: int) -> float:
    return lr_at(step, steps, math.ceil(0.1 * steps), LEARNING_RATE)


def run_steps(
    model: Mistral,
    pairs: PairSet,
    steps: np.ndarray,
    reference: Tensor,
    world: World,
    budget: int,
    off: Sequence[str] = (),
    optimizer: str = "rmsprop",
) -> tuple[list[float], list[float]]:
    """All `steps` (steps, pairs a step). reference (P, 2) on the CPU. The losses, and when each step was
    over, after when the first began."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimize = make_optimizer(trained, optimizer, LEARNING_RATE, weight_decay=0.0)
    packed = ahead(micro_batches(pairs, rows, model.config, world, budget, off) for rows in steps)
    losses, ends = [], [time.perf_counter()]
    for step, batches in enumerate(packed):
        for group in optimize.param_groups:
            group["lr"] = learning_rate_at(step, len(steps))
        num_pairs = steps.shape[1]
        result = train.train_step(
            model,
            optimize,
            batches,
            reference,
            num_pairs,
            world,
            preference_loss=PreferenceLoss("dpo", BETA),
            max_grad_norm=MAX_GRAD_NORM,
        )
        losses.append(result.sums[0] / num_pairs)
        ends.append(time.perf_counter())
    return losses, ends


# --- the techniques, and how it goes without them --------------------------------------------------------------------


@dataclass(frozen=True)
class OneByOne:
    """A micro-batch of several streams, each of which goes through the model alone."""

    streams: list[Stream]

    @property
    def tokens(self) -> Tensor:
        return torch.cat([stream.tokens for stream in self.streams])

    def to(self, device: torch.device) -> "OneByOne":
        return OneByOne([stream.to(device) for stream in self.streams])


def micro_batches(
    pairs: PairSet, rows: np.ndarray, dims: MistralConfig, world: World, budget: int, off: Sequence[str] = ()
) -> list[MicroBatch]:
    """This rank's share of the pairs `rows`, laid as `off` has it."""
    shared = not {"--no-prefix-sharing", "--no-packing"} & set(off)
    tokens = pairs.num_tokens[rows] + (0 if shared else pairs.lengths[rows, 0])
    costs = forward_flops(dims, pairs.lengths[rows])
    plan = deal(tokens, costs, world.size, 1 if "--no-packing" in off else budget)[world.rank]

    def lay(members: Sequence[Pair]) -> Stream | OneByOne:
        if shared:
            return pack_pairs(members)
        answers = [(pair.prompt, [answer]) for pair in members for answer in (pair.chosen, pair.rejected)]
        return OneByOne([pack([answer]) for answer in answers]) if "--no-packing" in off else pack(answers)

    return [(rows[part], lay([pairs[i] for i in rows[part]])) for part in plan]


def variant_logps(model: Mistral, micro_batch: Stream | OneByOne, off: Sequence[str]) -> Tensor:
    """In the place of `pair_logps`: P pairs -> (P, 2), without what is `off`."""
    streams = micro_batch.streams if isinstance(micro_batch, OneByOne) else [micro_batch]
    return torch.cat([answer_logps(model, stream, off) for stream in streams]).view(-1, 2)


def answer_logps(model: Mistral, stream: Stream, off: Sequence[str]) -> Tensor:
    """(S,)"""
    window = model.config.sliding_window
    attend = PackedAttention(
        stream.segments, window, stream.input_ids.device, flash=False if "--no-flash" in off else None
    )
    if "--dense-mask" in off:
        attend = dense_attention(stream, window)
    if "--full-head" in off:
        logits = model(stream.input_ids, stream.positions, attend, stream.source)  # (R, V)
        logps = logits.log_softmax(-1).gather(1, stream.target[:, None]).squeeze(1)  # (R,)
    else:
        logps = model(stream.input_ids, stream.positions, attend, stream.source, stream.target)
    return sequence_logps(logps, stream.sequence, stream.num_sequences)


def dense_attention(stream: Stream, window: int | None) -> Attend:
    """The mask that packing.py draws, written out."""
    parts = [
        (n, k, size) for n, (prompt, answers) in enumerate(stream.segments) for k, size in enumerate((prompt, *answers))
    ]
    sizes = torch.tensor([size for *_, size in parts])
    segment, answer = (
        torch.tensor(numbers).repeat_interleave(sizes).to(stream.input_ids.device)  # (T,); answer 0 is the prompt
        for numbers in ([n for n, *_ in parts], [k for _, k, _ in parts])
    )
    mask = (segment[:, None] == segment) & ((answer == 0) | (answer[:, None] == answer))
    mask &= visible(stream.positions, stream.positions, window)  # (T, T)
    return lambda _layer, query, key, value: sdpa(query, key, value, mask=mask)


# --- one measurement -------------------------------------------------------------------------------------------------


@torch.no_grad()
def initialize(model: Mistral, std: float) -> None:
    """The same weights on any number of ranks: each rank draws a tensor whole and keeps its part."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(SEED)
    for parameter in model.parameters():
        whole = torch.empty(parameter.shape, device=parameter.device)
        whole.normal_(float(parameter.ndim == 1), std, generator=generator)
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(whole)


def gpu_flops(device: torch.device, size: int = 8192, products: int = 50) -> float:
    """bfloat16 matmul rate, on random numbers (zeros are faster): the best of three runs."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(products):
            a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 * products / min(seconds)


def profile_steps(run: Callable[[], object]) -> str:
    """The dearest operations and kernels of what `run` does, and the time in which the GPU had any."""
    with torch.profiler.profile() as profiler:
        run()
    kernels = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    )
    busy, until = 0.0, kernels[0][0]
    for start, end in kernels:
        busy, until = busy + max(0.0, end - max(start, until)), max(until, end)
    whole = until - kernels[0][0]
    table = profiler.key_averages().table("self_device_time_total", row_limit=14, max_name_column_width=90)
    return f"{table}\nGPU busy {busy / 1e3:.1f} ms of {whole / 1e3:.1f} ms, {len(kernels):,} kernels"


def measure(arguments: argparse.Namespace, world: World, level: str, off: Sequence[str]) -> dict:
    cuda, (name, dims) = world.device.type == "cuda", arguments.shape
    budget, scale = arguments.budget or (16384 if cuda else 2048), arguments.scale or (1.0 if cuda else 0.25)
    per_step = (arguments.pairs or (8 if cuda else 4)) * world.size
    pairs = draw_pairs(per_step * arguments.steps, dims.vocab_size, scale)
    steps = np.arange(len(pairs)).reshape(-1, per_step)
    dtype = torch.bfloat16 if cuda else torch.float32
    train.pair_logps = partial(variant_logps, off=off) if off else pair_logps
    torch.compiler.reset()
    if cuda:
        distributed.free_memory()
        torch.cuda.reset_peak_memory_stats()

    model = weights.meta_model(dims)
    model.model.recompute = level
    if arguments.compile:
        model.model.compile_layers()
    reshard = "--no-reshard" not in off
    distributed.shard(model, model.model.layers, world, dtype, reshard_after_forward=reshard)
    model.to_empty(device=world.device)
    initialize(model, dims.initializer_range)
    matmul = gpu_flops(world.device) if cuda else cpu_flops(seconds=1.0)

    reference = torch.zeros(len(pairs), 2, device=world.device)
    with torch.no_grad():
        for _, stream in micro_batches(pairs, steps[0], dims, world, budget, off):
            train.pair_logps(model, stream.to(world.device))  # warm up
        sum_over_ranks(reference).cpu()  # wait for the device and for each other
        start = time.perf_counter()
        for members, stream in micro_batches(pairs, np.arange(len(pairs)), dims, world, budget, off):
            reference[members] = train.pair_logps(model, stream.to(world.device)).float()
        reference = sum_over_ranks(reference).cpu()
        reference_seconds = time.perf_counter() - start
    distributed.reshard(model)

    losses, ends = run_steps(model, pairs, steps, reference, world, budget, off)
    seconds = np.diff(ends)[LEFT_OUT:]
    flops, tokens = forward_flops(dims, pairs.lengths)[steps].sum(axis=1), pairs.num_tokens[steps].sum(axis=1)
    if not cuda:
        matmul = max(matmul, cpu_flops(seconds=1.0))  # others may have been at work the first time
    peak = matmul * world.size
    longest = max(
        len(stream.input_ids)
        for rows in steps
        for _, batch in micro_batches(pairs, rows, dims, world, budget, off)
        for stream in (batch.streams if isinstance(batch, OneByOne) else [batch])
    )
    job = Job(
        num_gpus=world.size, replicate=1, dtype=dtype, optimizer="rmsprop", micro_batch_tokens=longest,
        activation_checkpointing=level, compile=arguments.compile, cpu_offload=False, num_train_epochs=1,
        pairs_per_step=per_step, eval_steps=1, reshard_after_forward=reshard,
    )  # fmt: skip
    planned = sum(memory_gib(dims, job, scored_share(pairs.lengths), level).values())
    memory = peak_memory_gib(world.device)
    if cuda:
        free, whole = torch.cuda.mem_get_info()
        alive, outside = torch.cuda.max_memory_allocated() / GIB, (whole - free - torch.cuda.memory_reserved()) / GIB
    if arguments.profile:
        world.say(profile_steps(lambda: run_steps(model, pairs, steps[:3], reference, world, budget, off)))
    flops_per_second = np.median(3 * flops[LEFT_OUT:] / seconds)
    return {
        "shape": name, "variant": " ".join(off) or "as it is", "recompute": level,
        "compile": arguments.compile, "parameters": sum(num_parameters(dims)),
        "device": torch.cuda.get_device_name(world.device) if cuda else f"CPU, {torch.get_num_threads()} threads",
        "dtype": str(dtype).removeprefix("torch."), "ranks": world.size, "matmul_flops": matmul,
        "pairs_per_step": per_step, "mean_lengths": pairs.lengths.mean(axis=0).round().tolist(),
        "pairs_per_second": np.median(per_step / seconds),
        "tokens_per_second": np.median(tokens[LEFT_OUT:] / seconds),
        "flops_per_second": flops_per_second, "peak_share": flops_per_second / peak,
        "reference_pairs_per_second": len(pairs) / reference_seconds,
        "reference_peak_share": flops.sum() / reference_seconds / peak,
        "memory_gib": max(distributed.gather(world, memory)), "planned_gib": planned, "longest": longest,
        **({"alive_gib": alive, "outside_gib": outside} if cuda else {}),
        "last_loss": losses[-1], "losses": losses, "seconds": np.diff(ends).tolist(),
    }  # fmt: skip


def markdown(rows: list[dict], columns: list[tuple[str, str]]) -> str:
    """columns: heading, and the format of a row's values."""
    lines = [[heading for heading, _ in columns], ["---"] * len(columns)]
    lines += [[text.format(**row) for _, text in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(results: list[dict]) -> str:
    r = results[0]
    matmul = engineering(r["matmul_flops"], "FLOP/s")
    lengths = " + ".join(f"{mean:.0f}" for mean in r["mean_lengths"])
    lines = [
        f"{r['shape']}: {r['parameters']:,} parameters, {r['dtype']}; {r['ranks']} x {r['device']}, peak {matmul}",
        f"{r['pairs_per_step']} pairs a step, of {lengths} tokens on average\n",
    ]
    columns = [
        ("", "{variant}"), ("recomputing", "{recompute}"), ("pairs/s", "{pairs_per_second:.2f}"),
        ("unique tokens/s", "{tokens_per_second:,.0f}"),
        ("of peak", "{peak_share:.0%}"), ("reference pairs/s", "{reference_pairs_per_second:.2f}"),
        ("of peak", "{reference_peak_share:.0%}"), ("peak GiB", "{memory_gib:.2f}"), ("planned", "{planned_gib:.2f}"),
        ("last loss", "{last_loss:.5f}"),
    ]  # fmt: skip
    return "\n".join([*lines, markdown(results, columns)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=shape, default="bal", help="tiny, bal (the default) or 7b:N")
    parser.add_argument("--scale", type=float, help="of the lengths (default: 0.25 on a CPU, 1 on GPUs)")
    parser.add_argument("--pairs", type=int, help="a step and rank (default: 4 on a CPU, 8 on GPUs)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--budget", type=int, help="tokens of a micro-batch (default: 2048 on a CPU, 16384 on GPUs)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--recompute", nargs="+", default=["none"], choices=RECOMPUTE, help="as train.activation_checkpointing"
    )
    parser.add_argument("--compile", action="store_true", help="as train.compile")
    parser.add_argument("--profile", action="store_true", help="on a GPU: the dearest kernels of three more steps")
    parser.add_argument("--ablate", action="store_true", help="one row as it is, and one for each of these:")
    for switch, text in SWITCHES.items():
        parser.add_argument(switch, dest="off", action="append_const", const=switch, default=[], help=text)
    arguments = parser.parse_args()
    if arguments.steps <= LEFT_OUT:
        parser.error(f"--steps is {arguments.steps}; the first {LEFT_OUT} do not count")
    world = distributed.start(arguments.device)
    cuda = world.device.type == "cuda"
    if arguments.profile and not cuda:
        parser.error("--profile needs a GPU")
    switches = [switch for switch, text in SWITCHES.items() if cuda or "on a GPU" not in text]
    ablated = [[switch] for switch in switches] if arguments.ablate else []
    variants = [(level, [*arguments.off, *off]) for off in ([], *ablated) for level in arguments.recompute]
    if cuda or len(variants) == 1:
        results = [measure(arguments, world, level, off) for level, off in variants]
    else:  # a process each, or the memory of one would count for the next
        command = [argument for argument in sys.orig_argv if argument not in ("--ablate", *SWITCHES)]
        outputs = [
            subprocess.run([*command, *off, "--recompute", level], stdout=subprocess.PIPE, text=True, check=True).stdout
            for level, off in variants
        ]
        results = [json.loads(output.splitlines()[-1])[0] for output in outputs]
    distributed.stop()
    if distributed.rank() == 0:
        print(table(results))
        print(json.dumps(results))


if __name__ == "__main__":
    main()
