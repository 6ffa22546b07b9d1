"""Win rates against judges whose taste is known, against published figures, and against scipy."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from notus.answers import Answer, Request
from notus.judge import (
    bootstrap,
    by_subset,
    describe_annotations,
    describe_judged,
    judge_pairs,
    length_controlled,
    read_annotations,
    read_outputs,
    sections,
    verdict,
    win_rate,
)


class Judge:
    """`taste(first answer, second answer)` -> its reply."""

    def __init__(self, taste: Callable[[str, str], str]):
        self.taste, self.identity, self.asked = taste, {"model": "judge"}, []

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        self.asked += requests
        for i, request in enumerate(requests):
            text = request.messages[1]["content"]
            first, second = (
                text.partition(f"Assistant {name}'s Answer]\n")[2].partition(f"\n[The End of Assistant {name}")[0]
                for name in "AB"
            )
            yield i, Answer(self.taste(first, second), False)


def longer(first: str, second: str) -> str:
    return f"Because. [[{'C' if len(first) == len(second) else 'AB'[len(second) > len(first)]}]]"


def outputs(path: Path, *answers: str, instructions: Sequence[str] | None = None) -> Path:
    asked = instructions or [f"question {i}" for i in range(len(answers))]
    rows = [{"instruction": a, "output": b, "generator": "g"} for a, b in zip(asked, answers, strict=True)]
    path.write_text(json.dumps(rows))
    return path


# --- pairwise --------------------------------------------------------------------------------------------------------


def test_a_judge_that_likes_long_answers(tmp_path):
    first = outputs(tmp_path / "a.json", "aa", "aa", "aa", "same", "a")
    second = outputs(tmp_path / "b.json", "bbb", "b", "bb", "same", "bbbbbb")
    judge = Judge(longer)
    judged = judge_pairs(judge, first, second, tmp_path / "verdicts.jsonl")
    assert sorted(judged.scores.tolist()) == [0, 0.5, 0.5, 1, 1]
    assert judged.extra.tolist() == [1, -1, 0, 5, 0]  # the equal ones come last
    assert (judged.agree, judged.first, judged.equal, judged.unclear) == (1, 0.5, 1, 0)
    assert len(judge.asked) == 8 and {request.temperature for request in judge.asked} == {0}
    system, user = judge.asked[0].messages
    assert system["role"] == "system" and '"[[C]]" for a tie' in system["content"]
    assert user["content"] == (
        "[User Question]\nquestion 0\n\n[The Start of Assistant A's Answer]\naa\n[The End of Assistant A's Answer]\n\n"
        "[The Start of Assistant B's Answer]\nbbb\n[The End of Assistant B's Answer]"
    )
    rows = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and rows[0]["text"] == "Because. [[B]]" and rows[0]["messages"] == judge.asked[0].messages
    lines = describe_judged(judged, "a.json", "b.json")
    assert lines[0] == "b.json against a.json"
    assert lines[1].split()[:3] == ["win", "rate", "60.0%"]
    assert lines[3].endswith("5  2 won, 2 tied (1 with equal answers, not asked), 1 lost, 0 left out (no verdict)")
    swapped = judge_pairs(judge, second, first, tmp_path / "other.jsonl")
    assert swapped.scores.mean() == pytest.approx(1 - judged.scores.mean())


def test_a_judge_that_likes_the_first_place_makes_every_question_a_tie(tmp_path):
    first, second = outputs(tmp_path / "a.json", *"abcd"), outputs(tmp_path / "b.json", *"efgh")
    judged = judge_pairs(Judge(lambda *_: "[[A]]"), first, second, tmp_path / "v")
    assert judged.scores.tolist() == [0.5] * 4 and (judged.agree, judged.first) == (0, 1)


def test_a_tie_in_one_order_is_half_of_a_half(tmp_path):
    first, second = outputs(tmp_path / "a.json", "a"), outputs(tmp_path / "b.json", "b")
    judged = judge_pairs(Judge(lambda x, _: "[[B]]" if x == "a" else "[[C]]"), first, second, tmp_path / "v")
    assert judged.scores.tolist() == [0.75] and judged.agree == 0


def test_a_reply_without_a_verdict_leaves_its_question_out(tmp_path):
    first, second = outputs(tmp_path / "a.json", *"abcd"), outputs(tmp_path / "b.json", *"efgh")
    judge = Judge(lambda x, y: "Both are fine." if (x, y) == ("f", "b") else "[[A]]" if x in "efgh" else "[[B]]")
    judged = judge_pairs(judge, first, second, tmp_path / "v")
    assert judged.scores.tolist() == [1, 1, 1] and judged.unclear == 1
    with pytest.raises(ValueError, match="the judge gave no verdict"):
        judge_pairs(Judge(lambda *_: "A is better."), first, second, tmp_path / "w")


def test_the_last_verdict_counts():
    assert verdict("[[A]] would be wrong, so [[B]].") == "B"
    assert verdict("[[D]] [A] [[a]] [[AB]]") is None


def test_questions_may_stand_in_another_order_and_repeat(tmp_path):
    first = outputs(tmp_path / "a.json", "1", "2", "3", instructions=["x", "y", "x"])
    second = outputs(tmp_path / "b.json", "22", "11", "33", instructions=["y", "x", "x"])
    judge = Judge(longer)
    judge_pairs(judge, first, second, tmp_path / "v")
    pairs = {tuple(request.messages[1]["content"].split("\n")[i] for i in (1, 4, 8)) for request in judge.asked}
    assert pairs == {("x", "1", "11"), ("x", "11", "1"), ("y", "2", "22"), ("y", "22", "2"), ("x", "3", "33"),
                     ("x", "33", "3")}  # fmt: skip
    odd = outputs(tmp_path / "c.json", "1", "2", instructions=["y", "z"])
    with pytest.raises(ValueError, match="lacks an answer to 'x'"):
        judge_pairs(judge, first, odd, tmp_path / "v")


@pytest.mark.parametrize(
    "text, message",
    [("[]", "no answers in it"), ("[5]", "rows look like"), ('[{"instruction": "a"}]', "output must be a string"),
     ('[{"instruction": 1, "output": "b"}]', "instruction must be a string, not 1")],
)  # fmt: skip
def test_bad_outputs(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=f"a.json: .*{message}"):
        read_outputs(tmp_path / "a.json")


# --- intervals and lengths -------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_normal_distribution_where_that_is_good():
    scores = np.array([1.0] * 300 + [0.0] * 500)
    deviation = math.sqrt(0.375 * 0.625 / 800)

    def mean(rows: np.ndarray) -> float:
        return scores[rows].mean()

    found = bootstrap(mean, len(scores))
    assert found == pytest.approx((0.375 - 1.96 * deviation, 0.375 + 1.96 * deviation), abs=0.003)
    assert found == bootstrap(mean, len(scores)) != bootstrap(mean, len(scores), seed=1)
    assert bootstrap(lambda rows: float(len(rows)), 5) == (5, 5)


def simulate(advantage: float, taste: float, longer_by: float, count: int = 40_000) -> tuple[np.ndarray, np.ndarray]:
    """Verdicts of a judge with P(win) = sigmoid(advantage + taste * tanh(extra / std))."""
    rng = np.random.default_rng(0)
    extra = rng.normal(longer_by, 300, count)
    logits = advantage + taste * np.tanh(extra / extra.std())
    return (rng.random(count) < 1 / (1 + np.exp(-logits))).astype(float), extra


@pytest.mark.parametrize(
    "advantage, taste, longer_by", [(0.4, 1.5, 400), (-0.5, 2.0, 300), (0.0, 0.0, 400), (1.0, -1.0, 0)]
)
def test_length_control_finds_the_truth_that_made_the_verdicts(advantage, taste, longer_by):
    scores, extra = simulate(advantage, taste, longer_by)
    truth = 1 / (1 + math.exp(-advantage))
    assert length_controlled(scores, extra) == pytest.approx(truth, abs=0.02)
    if taste > 0:
        assert scores.mean() > truth + 0.1  # what length alone brought


def scipys(scores: np.ndarray, extra: np.ndarray) -> float:
    length = np.tanh(extra / (extra.std() or 1))

    def loss(weights: np.ndarray) -> float:
        logits = weights[0] + weights[1] * length
        return float(np.sum(np.logaddexp(0, logits) - scores * logits) + 0.05 * weights @ weights)

    return 1 / (1 + math.exp(-minimize(loss, np.zeros(2)).x[0]))


@pytest.mark.parametrize("kind", ["mixed", "wins", "separated"])
def test_length_control_is_scipys_optimum(kind):
    rng = np.random.default_rng(1)
    extra = rng.normal(200, 300, 500)
    scores = {"mixed": rng.choice([0, 0.25, 0.5, 0.75, 1], 500), "wins": np.ones(500), "separated": (extra > 100) * 1.0}
    assert length_controlled(scores[kind], extra) == pytest.approx(scipys(scores[kind], extra), abs=1e-5)


def test_length_control_without_a_difference_is_the_win_rate():
    scores = np.array([1, 1, 0.5, 0] * 100)
    assert length_controlled(scores, np.zeros(400)) == pytest.approx(0.625, abs=1e-3)


def test_length_control_settles_on_samples_of_every_kind():
    """Few questions that length divides are hard on Newton's method."""
    rng = np.random.default_rng(2)
    for count in (1, 2, 3, 5, 50, 2000):
        for _ in range(40):
            extra = rng.normal(rng.normal(0, 300), 10 ** rng.uniform(0, 3), count).round()
            scores = rng.choice([0, 0.5, 1], count) if rng.random() < 0.5 else (extra > np.median(extra)) * 1.0
            rate = length_controlled(scores, extra)
            assert rate == pytest.approx(scipys(scores, extra), abs=1e-4)


# --- AlpacaEval's annotations ----------------------------------------------------------------------------------------


def annotations(path: Path, *rows) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_notus_7b_v1s_own_figures(tmp_path):
    """735 wins, 69 losses, 0 draws and 1 null are the counts behind the published 91.42."""
    rows = [{"preference": value} for value, count in ((2, 735), (1, 69), (None, 1)) for _ in range(count)]
    assert describe_annotations(annotations(tmp_path / "annotations.json", *rows)) == [
        "win rate        91.41791044776119 %",
        "standard error  0.9884492893847528 %",
        "735 won, 0 drawn, 69 lost, 1 left out (null)",
    ]


def test_draws_and_weights():
    assert win_rate([2, 2, 1, 0]) == win_rate([2, 2, 1, 1.5]) == (62.5, pytest.approx(23.9357, abs=1e-4))
    assert win_rate([1.9, 1.2])[0] == pytest.approx(55)
    assert win_rate([2])[0] == 100 and math.isnan(win_rate([2])[1])


def test_win_rates_by_subset(tmp_path):
    rows = [{"preference": 2, "dataset": "koala"}, {"preference": 1, "dataset": "koala"}, {"preference": 0.0},
            {"preference": float("nan"), "dataset": "vicuna"}]  # fmt: skip
    assert describe_annotations(annotations(tmp_path / "a.json", *rows))[2:] == [
        "1 won, 1 drawn, 1 lost, 1 left out (null)",
        "win rate by subset, 95 % interval",
        "  koala                    50.0%    9.5% to  90.5%  of 2",
        "  no dataset               50.0%    5.5% to  94.5%  of 1",
    ]


@pytest.mark.parametrize("value", [3, 0.5, -1, "2", True, [2]])
def test_a_preference_that_is_none(tmp_path, value):
    path = annotations(tmp_path / "a.json", {"preference": 2}, {"preference": value})
    with pytest.raises(ValueError, match="row 2: preference must be 0, null or a number from 1 to 2"):
        read_annotations(path)


@pytest.mark.parametrize(
    "rows, message",
    [([5], "rows look like"), ([{}], "rows look like"), ([{"preference": None}], "no row has"), ([], "no row")],
)
def test_annotations_without_a_preference(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        describe_annotations(annotations(tmp_path / "a.json", *rows))


# --- RewardBench -----------------------------------------------------------------------------------------------------

COUNTS = {  # pairs of each subset in allenai/reward-bench
    "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28, "mt-bench-med": 40,
    "mt-bench-hard": 37, "math-prm": 447, "refusals-dangerous": 100, "refusals-offensive": 100, "llmbar-natural": 100,
    "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92, "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    "xstest-should-refuse": 154, "xstest-should-respond": 250, "donotanswer": 136, "hep-cpp": 164, "hep-go": 164,
    "hep-java": 164, "hep-js": 164, "hep-python": 164, "hep-rust": 164,
}  # fmt: skip


def test_the_sections_are_rewardbenchs():
    """Its utils.calculate_scores_per_section: weights are the counts above, and 984 for math-prm."""
    rng = np.random.default_rng(0)
    subsets = {name: (rng.random(count) < rng.random()).astype(float) for name, count in COUNTS.items()}
    weights = COUNTS | {"math-prm": 984}
    members = {
        "Chat": list(COUNTS)[:5], "Chat Hard": ["mt-bench-hard", *(name for name in COUNTS if "llmbar" in name)],
        "Safety": ["refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond",
                   "donotanswer"],
        "Reasoning": ["math-prm", *(name for name in COUNTS if "hep-" in name)],
    }  # fmt: skip
    expected = {
        section: sum(weights[name] * subsets[name].mean() for name in names) / sum(weights[name] for name in names)
        for section, names in members.items()
    }
    assert sections(subsets) == pytest.approx(expected)
    names = [name for name, count in COUNTS.items() for _ in range(count)]
    lines = by_subset(names, np.concatenate(list(subsets.values())), "accuracy")
    assert len(lines) == 1 + 23 + 1 + 4 + 1
    assert lines[-1].split() == ["mean", "of", "the", "sections", f"{sum(expected.values()) / 4:.1%}"]


def test_other_subsets_have_no_sections():
    assert by_subset(["a", "b", "a"], np.array([1.0, 0.0, 0.0]), "accuracy") == [
        "accuracy by subset, 95 % interval",
        "  a                        50.0%    9.5% to  90.5%  of 2",
        "  b                         0.0%    0.0% to  79.3%  of 1",
    ]
