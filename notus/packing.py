"""Pairs -> streams: no padding, no batch dimension, and every prompt stored and computed once.

A micro-batch is one flat stream of T tokens. Each pair is one segment of it:

    tokens     p0 p1 p2 | c0 c1 | r0 r1 r2          prompt, chosen answer, rejected answer
    positions   0  1  2    3  4    3  4  5          both answers continue the prompt

                     key:  p p p c c r r r
      prompt    p p p      lower triangle
      chosen    c c        1 1 1 | lower | 0 0 0    an answer sees the prompt and its own past,
      rejected  r r r      1 1 1 | 0 0   | lower    never the other answer, never another pair

The last prompt token predicts the first token of BOTH answers, so the targets are no shift of the input by one. Each
response token instead names the place that predicts it:

    target      c0 c1 | r0 r1 r2
    source      p2 c0 | p2 r0 r1                    an index into the stream
    sequence     0  0 |  1  1  1                    which answer the token belongs to

A segment may hold any number of answers: two for a pair, one for a plain sequence, none for a prompt to be continued.

Legend: T tokens of the stream, R response tokens, S answers (sequences) in the stream, P pairs.
"""

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from notus.data import Pair


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
    sequence: Tensor  # (R,) in [0, S)
    segments: tuple[Segment, ...]
    num_sequences: int

    def to(self, device: torch.device) -> "Stream":
        names = ("input_ids", "positions", "source", "target", "sequence")
        return replace(self, **{name: to_device(getattr(self, name), device) for name in names})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy that nobody waits for: to a GPU it goes from pinned memory, beside whatever the GPU is doing."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def pack(segments: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> Stream:
    """Lay `(prompt_ids, [answer_ids, ...])` one after another. Answers are numbered in the order given, so that for
    pairs `logps.view(P, 2)` has the chosen answers in column 0 and the rejected ones in column 1.

    No segments at all give a stream of one token and no response: what a rank with nothing to do feeds its model, so
    that it takes part in every collective and adds exactly nothing.
    """
    ids, positions, source, target, sequence, layout = [], [], [], [], [], []
    start = answer_count = 0
    for prompt, answers in segments or [([0], [])]:
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

    return Stream(*map(flat, (ids, positions, source, target, sequence)), tuple(layout), answer_count)


def pack_pairs(pairs: Sequence[Pair]) -> Stream:
    """Sequences 2i and 2i + 1 are the chosen and the rejected answer of pair i."""
    return pack([(pair.prompt, (pair.chosen, pair.rejected)) for pair in pairs])


def deal(tokens: Sequence[int], costs: Sequence[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Deal a step's pairs, of `tokens` (P,) and `costs` (P,), to ranks and micro-batches: `plan[rank][micro_batch]` is
    a list of indices into both.

    Every rank gets the same number of micro-batches, the fewest for which `spread` lets none exceed `budget` tokens (a
    single pair longer than that gets one of its own). Ranks wait for each other in every micro-batch, so the dearest of
    them sets the pace, and all are to cost the same. What `spread` leaves uneven, trades mend: the dearest micro-batch
    gives a pair for a cheaper one, until no trade helps.

    Costs are whole numbers in any unit (FLOPs, or the tokens again). So sums are exact, the trades come to an end, and
    every rank computes the same plan. Which pairs make up the step is not decided here: the plan changes speed and
    memory, never the result.
    """
    tokens, costs = (list(map(int, numbers)) for numbers in (tokens, costs))
    per_rank = max(1, -(-sum(min(n, budget) for n in tokens) // (budget * num_ranks)))
    while (bins := spread(tokens, costs, per_rank * num_ranks, budget)) is None:
        per_rank += 1
    while trade := find_trade(bins, tokens, costs, budget):
        *both, i, j = trade
        for b in both:
            b.pairs ^= {i, j}  # who has a pair gives it, who has it not takes it
            b.tokens, b.cost = (sum(numbers[k] for k in b.pairs) for numbers in (tokens, costs))
        bins.sort(key=by_cost)
    # Micro-batches that run together are of neighbouring costs; and who has the dearest of one round has the cheapest
    # of the next.
    dearest_first = [sorted(b.pairs) for b in reversed(bins)]
    rounds = [dearest_first[m * num_ranks : (m + 1) * num_ranks][:: -1 if m % 2 else 1] for m in range(per_rank)]
    return [list(micro_batches) for micro_batches in zip(*rounds, strict=True)]


@dataclass
class Bin:
    """A micro-batch that pairs are being dealt to."""

    pairs: set[int] = field(default_factory=set)
    tokens: int = 0
    cost: int = 0


by_cost = attrgetter("cost")


def spread(tokens: list[int], costs: list[int], num_bins: int, budget: int) -> list[Bin] | None:
    """Dearest pair first, each to the cheapest bin with room for it (Graham 1969) -> bins, the cheapest first; None if
    a pair finds no room."""
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


def find_trade(bins: list[Bin], tokens: list[int], costs: list[int], budget: int) -> tuple[Bin, Bin, int, int] | None:
    """(dearest, other, i, j): both bins will cost less than the dearest does now if it gives pair i for pair j. The
    other is the cheapest with which that can be done, and the pairs are those that leave the smallest gap."""
    dearest = bins[-1]
    for other in bins:
        gap = dearest.cost - other.cost
        trades = [
            (abs(gap - 2 * (costs[i] - costs[j])), i, j)
            for i in dearest.pairs
            for j in other.pairs
            if 0 < costs[i] - costs[j] < gap
            and max(dearest.tokens - tokens[i] + tokens[j], other.tokens - tokens[j] + tokens[i]) <= budget
        ]
        if trades:
            return dearest, other, *min(trades)[1:]
    return None
