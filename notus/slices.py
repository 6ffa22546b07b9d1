"""Where a model is right: the accuracy by source and by length of the answers, beside simpler rules.

Legend: P pairs, n pairs of a slice.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

FEWEST = 20  # pairs. With fewer, the intervals of their slices say nothing
MOST = 20  # sources that get a line of their own


class Slice(NamedTuple):
    """A part of the held-out pairs, and how often its chosen answers win. summary.json holds these fields."""

    by: str  # "all", "source", "longer", "tokens" or "baseline"
    name: str
    pairs: int
    accuracy: float
    low: float  # of its 95 % interval
    high: float
    tokens_chosen: float  # on average
    tokens_rejected: float


def wilson(mean: float, count: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927). A bootstrap would give a slice that is all right an interval of no width.
    Where ties count half, the interval is a little too wide."""
    z2 = 1.959964**2
    middle, half = mean + z2 / (2 * count), math.sqrt(z2 * mean * (1 - mean) / count + z2**2 / (4 * count**2))
    return max(0.0, (middle - half) / (1 + z2 / count)), min(1.0, (middle + half) / (1 + z2 / count))


def slices(
    rewards: np.ndarray, policy: np.ndarray, tokens: np.ndarray, sources: Sequence[str] | None = None
) -> list[Slice]:
    """rewards, policy, tokens (P, 2): of the chosen and the rejected answers. The first two are in nats, and policy is
    log pi(y|x). sources: P names, or None. Equal rewards count as wrong. [] for fewer than FEWEST pairs.

    The baselines are the accuracy of three other rules on the same pairs: the answer with more tokens wins (a tie
    counts half), the one with the higher log pi(y|x) wins, or the one with the higher log pi(y|x) per token."""
    if len(rewards) < FEWEST:
        return []
    accurate = (rewards[:, 0] > rewards[:, 1]) * 1.0
    extra, total = tokens[:, 0] - tokens[:, 1], tokens.sum(1)
    parts = [("all", "all", total > 0)]
    if sources is not None and len(set(sources)) > 1:
        names = np.array(fold(sources))
        parts += [("source", name, names == name) for name in dict.fromkeys([*sorted(set(sources)), OTHERS])]
    parts += [("longer", "chosen", extra > 0), ("longer", "rejected", extra < 0), ("longer", "neither", extra == 0)]
    third = np.searchsorted(np.quantile(total, [1 / 3, 2 / 3]), total)  # (P,) 0, 1 or 2
    for inside in (third == k for k in range(3)):
        if inside.any():
            parts.append(("tokens", f"{total[inside].min()} to {total[inside].max()}", inside))
    found = [one(by, name, accurate[inside], tokens[inside]) for by, name, inside in parts if inside.any()]
    likelier, per_token = ((each[:, 0] > each[:, 1]) * 1.0 for each in (policy, policy / tokens))
    rules = {"longer wins": (1 + np.sign(extra)) / 2, "likelier wins": likelier, "likelier per token wins": per_token}
    return found + [one("baseline", name, values, tokens) for name, values in rules.items()]


def one(by: str, name: str, values: np.ndarray, tokens: np.ndarray) -> Slice:
    """values (n,), tokens (n, 2)."""
    mean = float(values.mean())
    chosen, rejected = tokens.mean(0).tolist()
    return Slice(by, name, len(values), mean, *wilson(mean, len(values)), chosen, rejected)


OTHERS = "others"


def fold(sources: Sequence[str]) -> list[str]:
    """The same names, but with more than MOST of them the rarest are OTHERS."""
    common = sorted(Counter(sources).items(), key=lambda item: (-item[1], item[0]))
    kept = {name for name, _ in common[: MOST if len(common) <= MOST else MOST - 1]}
    return [name if name in kept else OTHERS for name in sources]


def table(found: Sequence[Slice]) -> list[str]:
    """Lines of at most 78 columns."""
    if not found:
        return []
    said = {"longer": "longer answer: {}", "tokens": "both answers: {} tokens", "baseline": "baseline: {}"}
    lines = [f"{'slice':33}{'pairs':>7}{'accuracy':>10}{'95 % interval':>16}{'tokens':>12}"]
    for each in found:
        name = said.get(each.by, "{}" if each.by == "all" else each.by + ": {}").format(each.name)
        name = name if len(name) <= 33 else f"{name[:30]}..."
        interval = f"{100 * each.low:.1f} to {100 * each.high:.1f}"
        lengths = "" if each.by == "baseline" else f"{each.tokens_chosen:.0f}, {each.tokens_rejected:.0f}"
        lines.append(f"{name:33}{each.pairs:7,}{100 * each.accuracy:8.1f} %{interval:>16}{lengths:>12}".rstrip())
    return [*lines, "tokens: mean of chosen, rejected. longer: a tie counts half. likelier: log pi"]
