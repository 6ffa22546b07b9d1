"""Pairs -> streams, and the order of training: no padding, no batch dimension, every prompt stored and computed once.

A micro-batch is one flat stream of T tokens. Each pair is one segment of it:

    tokens     p0 p1 p2 | c0 c1 | r0 r1 r2          prompt, chosen answer, rejected answer
    positions   0  1  2    3  4    3  4  5          both answers continue the prompt

                     key:  p p p c c r r r
      prompt    p p p      lower triangle
      chosen    c c        1 1 1 | lower | 0 0 0    an answer sees the prompt and its own past,
      rejected  r r r      1 1 1 | 0 0   | lower    never the other answer, never another pair

The last prompt token predicts the first token of BOTH answers, so the targets are not the input shifted by one.
Instead, each response token names the place that predicts it:

    target      c0 c1 | r0 r1 r2
    source      p2 c0 | p2 r0 r1                    an index into the stream
    sequence     0  0 |  1  1  1                    which answer the token belongs to

A segment may hold any number of answers: two for a pair, one for a plain sequence, none for a prompt alone.

Legend: T tokens of the stream, R response tokens, S answers (sequences) in the stream, P pairs.
"""

from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from notus.tokens import Pair, PairSet

T = TypeVar("T")
Ids = Sequence[int] | np.ndarray


class Segment(NamedTuple):
    """Lengths, in tokens, of a prompt and of the answers that share it."""

    prompt: int
    answers: tuple[int, ...]


@dataclass(frozen=True)
class Stream:
    """One micro-batch, as drawn at the top of this file."""

    input_ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    source: Tensor  # (R,) index into the stream of the token that predicts `target`
    target: Tensor  # (R,) token ids
    sequence: Tensor  # (R,) in [0, S); S for a token that belongs to no answer
    tokens: Tensor  # (S,) how many response tokens each answer has
    segments: tuple[Segment, ...]
    num_sequences: int

    def to(self, device: torch.device) -> "Stream":
        names = ("input_ids", "positions", "source", "target", "sequence", "tokens")
        moved: dict[str, Any] = {name: to_device(getattr(self, name), device) for name in names}
        return replace(self, **moved)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """An asynchronous copy. To a GPU it goes from pinned memory, while the GPU computes."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pack(segments: Sequence[tuple[Ids, Sequence[Ids]]]) -> Stream:
    """Lay segments `(prompt_ids, [answer_ids, ...])` one after another. Answers are numbered in the order given, so for
    pairs `logps.view(P, 2)` has the chosen answers in column 0 and the rejected ones in column 1.

    No segments at all give a stream of a pair that belongs to no one. A rank that has no pair feeds it to its model, so
    that it takes part in every collective and adds exactly nothing. It has some tokens and rows, because the compiler
    makes functions of their own for sizes 0 and 1.
    """
    if not segments:
        one, of_no_one = pack([([0] * 2, [[0] * 3, [0] * 4])]), torch.zeros(7, dtype=torch.int64)
        return replace(one, sequence=of_no_one, tokens=of_no_one[:0], num_sequences=0)
    ids, positions, source, target, sequence, layout = [], [], [], [], [], []
    start = answer_count = 0
    for prompt, answers in segments:
        if len(prompt) == 0:
            raise ValueError("a prompt needs at least one token (BOS, say) to predict the first token of an answer")
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        end = start + len(prompt)  # where the next answer is laid
        for answer in answers:
            ids.append(answer)
            positions.append(np.arange(len(prompt), len(prompt) + len(answer)))
            source.append(np.r_[start + len(prompt) - 1, end : end + len(answer) - 1][: len(answer)])
            target.append(answer)
            sequence.append(np.full(len(answer), answer_count))
            end += len(answer)
            answer_count += 1
        layout.append(Segment(len(prompt), tuple(len(answer) for answer in answers)))
        start = end

    def flat(parts: list) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64)) if parts else torch.empty(0, dtype=torch.int64)

    tokens = torch.tensor([length for segment in layout for length in segment.answers], dtype=torch.int64)
    return Stream(
        flat(ids), flat(positions), flat(source), flat(target), flat(sequence), tokens, tuple(layout), answer_count
    )


def pack_pairs(pairs: Sequence[Pair]) -> Stream:
    """Sequences 2i and 2i + 1 are the chosen and the rejected answer of pair i."""
    return pack([(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs])


def deal(tokens: Sequence[int], costs: Sequence[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Deal a step's pairs, with their `tokens` (P,) and `costs` (P,), to ranks and micro-batches:
    `plan[rank][micro_batch]` is a list of indices into both.

    Every rank gets the same number of micro-batches: the fewest for which `spread` exceeds `budget` tokens in none (a
    single pair longer than that gets one of its own). Ranks wait for each other in every micro-batch, so the most
    expensive one sets the pace, and all should cost the same. Swaps even out what `spread` left unbalanced: the most
    expensive micro-batch gives a pair for a cheaper one, until no swap helps.

    Costs are whole numbers in any unit (FLOPs, or the tokens again). So sums are exact, the swaps come to an end, and
    every rank computes the same plan. Which pairs make up the step is not decided here. The plan changes speed and
    memory, never the result.
    """
    tokens, costs = (list(map(int, numbers)) for numbers in (tokens, costs))
    per_rank = max(1, -(-sum(min(n, budget) for n in tokens) // (budget * num_ranks)))
    while (bins := spread(tokens, costs, per_rank * num_ranks, budget)) is None:
        per_rank += 1
    while swap := find_swap(bins, tokens, costs, budget):
        *both, i, j = swap
        for b in both:
            b.pairs ^= {i, j}  # whichever bin holds a pair hands it over
            b.tokens, b.cost = (sum(numbers[k] for k in b.pairs) for numbers in (tokens, costs))
        bins.sort(key=by_cost)
    # Micro-batches that run at the same time have similar costs. The rank with the most expensive one of a round gets
    # the cheapest one of the next.
    costly_first = [sorted(b.pairs) for b in reversed(bins)]
    rounds = [costly_first[m * num_ranks : (m + 1) * num_ranks][:: -1 if m % 2 else 1] for m in range(per_rank)]
    return [list(micro_batches) for micro_batches in zip(*rounds, strict=True)]


@dataclass
class Bin:
    """A micro-batch that pairs are being dealt to."""

    pairs: set[int] = field(default_factory=set)
    tokens: int = 0
    cost: int = 0


by_cost = attrgetter("cost")


def spread(tokens: list[int], costs: list[int], num_bins: int, budget: int) -> list[Bin] | None:
    """The most expensive pair first, each to the cheapest bin with room for it (Graham 1969) -> bins, the cheapest
    first. None if there is no room for some pair."""
    bins = [Bin() for _ in range(num_bins)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        roomy = (place for place, b in enumerate(bins) if not b.pairs or b.tokens + tokens[i] <= budget)
        if (place := next(roomy, None)) is None:
            return None
        b = bins.pop(place)
        b.pairs.add(i)
        b.tokens += tokens[i]
        b.cost += costs[i]
        insort(bins, b, key=by_cost)
    return bins


def find_swap(bins: list[Bin], tokens: list[int], costs: list[int], budget: int) -> tuple[Bin, Bin, int, int] | None:
    """(costliest, other, i, j): if the costliest bin gives pair i to the other one for pair j, both will cost less than
    the costliest does now. The other is the cheapest bin for which that is possible, and the two pairs are those that
    leave the smallest gap."""
    costliest = bins[-1]
    for other in bins:
        gap = costliest.cost - other.cost
        swaps = [
            (abs(gap - 2 * (costs[i] - costs[j])), i, j)
            for i in costliest.pairs
            for j in other.pairs
            if 0 < costs[i] - costs[j] < gap
            and max(costliest.tokens - tokens[i] + tokens[j], other.tokens - tokens[j] + tokens[i]) <= budget
        ]
        if swaps:
            return costliest, other, *min(swaps)[1:]
    return None


# --- the order of training -------------------------------------------------------------------------------------------


def steps_per_epoch(num_pairs: int, pairs_per_step: int) -> int:
    """The last step of an epoch may be smaller. No pair is left out."""
    return -(-num_pairs // pairs_per_step)


def batch(num_pairs: int, pairs_per_step: int, seed: int, step: int) -> np.ndarray:
    """Indices of the pairs of training step `step` (from 0): a function of the seed and the step alone, whatever the
    number of ranks, so resuming needs nothing but the step. Each epoch is a new permutation. RandomState is used
    because its stream is frozen for good (NumPy's NEP 19)."""
    epoch, place = divmod(step, steps_per_epoch(num_pairs, pairs_per_step))
    order = np.random.RandomState([seed, epoch]).permutation(num_pairs)
    return order[place * pairs_per_step : (place + 1) * pairs_per_step]


MicroBatch = tuple[np.ndarray, Stream]  # which pairs (none, if there are fewer than ranks), and their packed stream


def training_steps(
    pairs: PairSet, costs: np.ndarray, steps: range, *, pairs_per_step: int, seed: int, budget: int, rank: int,
    num_ranks: int,
) -> Iterator[tuple[int, np.ndarray, list[MicroBatch]]]:  # fmt: skip
    """(step, indices of all its pairs, the micro-batches of this rank). costs: (all pairs,), in any unit. A thread
    packs one step ahead."""

    def one(step: int) -> tuple[int, np.ndarray, list[MicroBatch]]:
        rows = batch(len(pairs), pairs_per_step, seed, step)
        plan = deal(pairs.num_tokens[rows], costs[rows], num_ranks, budget)[rank]
        return step, rows, [(rows[part], pack_pairs([pairs[i] for i in rows[part]])) for part in plan]

    return ahead(map(one, steps))


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made by a thread while the one before it is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, iterator, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, iterator, end)
            yield item  # type: ignore[misc]  # not `end`
