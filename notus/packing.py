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

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


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


def deal(lengths: Sequence[int], num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Deal a step's pairs to ranks and micro-batches: `plan[rank][micro_batch]` is a list of indices into `lengths`.

    Every rank gets the same number of micro-batches, the fewest for which none exceeds `budget` tokens (a single pair
    longer than that gets one of its own), and about the same number of tokens: longest first, each to the emptiest
    micro-batch (Graham 1969). Which pairs make up the step is not decided here, so the plan changes speed and memory,
    never the result. Deterministic: every rank computes the same plan.
    """
    lengths = [int(length) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    per_rank = max(1, -(-sum(min(length, budget) for length in lengths) // (budget * num_ranks)))
    while True:
        bins: list[list[int]] = [[] for _ in range(per_rank * num_ranks)]
        fill = [(0, b) for b in range(len(bins))]  # a heap of (tokens, bin)
        for i in order:
            tokens, b = heapq.heappop(fill)
            bins[b].append(i)
            heapq.heappush(fill, (tokens + lengths[i], b))
        if all(tokens <= budget or len(bins[b]) == 1 for tokens, b in fill):
            break
        per_rank += 1
    # Ranks wait for each other in every micro-batch, so those that run together are of neighbouring sizes; and who has
    # the largest of one round has the smallest of the next.
    largest_first = [sorted(bins[b]) for _, b in sorted(fill, key=lambda item: (-item[0], item[1]))]
    rounds = [largest_first[m * num_ranks : (m + 1) * num_ranks][:: -1 if m % 2 else 1] for m in range(per_rank)]
    return [list(micro_batches) for micro_batches in zip(*rounds, strict=True)]
