"""slices.py beside plain loops over the pairs, and scipy."""

import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from notus.slices import FEWEST, MOST, fold, slices, table, wilson


@pytest.fixture
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[str]]:
    """rewards, policy, tokens, sources of 100 pairs, some with equal rewards, lengths or log-probs."""
    rng = np.random.default_rng(0)
    rewards, policy = rng.normal(size=(100, 2)), rng.normal(-9, 1, size=(100, 2))
    rewards[:9] = policy[5:8] = 0.0
    return rewards, policy, rng.integers(1, 9, (100, 2)), [*rng.choice(["wiki", "a, b", "code"], 100)]


def test_every_slice_is_a_plain_count(pairs):
    rewards, _, tokens, sources = pairs
    expected: dict[tuple[str, str], list] = {}
    totals = sorted(chosen + rejected for chosen, rejected in tokens)
    for (good, bad), (n, m), source in zip(rewards, tokens, sources, strict=True):
        third = sum(n + m > totals[33 * k] for k in (1, 2))  # no value of these totals ends at a third of them
        longer = "chosen" if n > m else "rejected" if m > n else "neither"
        for key in (("all", "all"), ("source", source), ("longer", longer), ("tokens", third)):
            expected.setdefault(key, []).append((good > bad, n, m))
    found = [each for each in slices(*pairs) if each.by != "baseline"]
    thirds = iter(range(3))
    assert len(found) == len(expected) == 1 + 3 + 3 + 3
    for each in found:
        rows = expected[each.by, next(thirds) if each.by == "tokens" else each.name]
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        assert each.pairs == len(rows)
        assert [each.accuracy, each.tokens_chosen, each.tokens_rejected] == pytest.approx(means, abs=1e-12)
        if each.by == "tokens":
            assert each.name == f"{min(n + m for _, n, m in rows)} to {max(n + m for _, n, m in rows)}"


def test_baselines_are_plain_counts(pairs):
    _, policy, tokens, _ = pairs
    longer = sum(1.0 if n > m else 0.5 if n == m else 0.0 for n, m in tokens)
    likelier = sum(good > bad for good, bad in policy)
    per_token = sum(good / n > bad / m for (good, bad), (n, m) in zip(policy, tokens, strict=True))
    found = {each.name: each.accuracy for each in slices(*pairs) if each.by == "baseline"}
    counts = {"longer wins": longer, "likelier wins": likelier, "likelier per token wins": per_token}
    assert found == pytest.approx({name: count / 100 for name, count in counts.items()})


@pytest.mark.parametrize(("right", "count"), [(0, 1), (1, 1), (3, 7), (40, 40), (1713, 2000)])
def test_the_interval_is_scipys(right: int, count: int):
    expected = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    assert wilson(right / count, count) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_too_many_sources_are_folded_by_their_size():
    sizes = {f"s{k:02}": 3 + k for k in range(MOST + 5)}
    folded = Counter(fold([name for name, size in sizes.items() for _ in range(size)]))
    kept = dict(list(sizes.items())[6:])  # MOST - 1 of them, and the six smallest in one
    assert folded == kept | {"others": sum(sizes.values()) - sum(kept.values())} and len(folded) == MOST
    assert set(fold([f"s{k}" for k in range(MOST)])) == {f"s{k}" for k in range(MOST)}


def test_few_pairs_and_one_source_say_nothing(pairs):
    few = [part[: FEWEST - 1] for part in pairs]
    assert slices(*few) == [] == table([])
    rewards, policy, tokens, _ = pairs
    assert slices(rewards, policy, tokens, ["one"] * 100) == slices(rewards, policy, tokens)
    same = slices(rewards, policy, np.full((100, 2), 4))  # all answers as long: one third holds all pairs
    assert [each.name for each in same] == [
        *("all", "neither", "8 to 8", "longer wins", "likelier wins", "likelier per token wins"),
    ]
    assert same[3].accuracy == 0.5


def test_the_table_fits_a_terminal(pairs):
    rewards, policy, tokens, sources = pairs
    lines = table(slices(rewards, policy, 1000 * tokens, ["a long name, " * 9 if s == "wiki" else s for s in sources]))
    assert max(map(len, lines)) <= 78  # report.py indents by 2
    assert lines[1].split()[:2] == ["all", "100"] and math.isclose(
        float(lines[1].split()[2]), 100 * (rewards[:, 0] > rewards[:, 1]).mean(), abs_tol=0.05
    )
