"""Win rates: two models before a judge that the user chooses, and AlpacaEval's annotations counted again.

A judge reads each question twice, with either answer first, since judges prefer a place as well as an answer. The
score of the second model for a question is the mean of both verdicts: 1 a win, 0.5 a tie, 0 a loss.

Legend: Q questions.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from notus.answers import Request, Source, answer_all
from notus.rows import check_text, read_records
from notus.slices import wilson

# MT-Bench's prompt for pairs (Zheng et al. 2023, arXiv:2306.05685, figure 5).
SYSTEM = (
    "Please act as an impartial judge and evaluate the quality of the responses provided by two AI assistants to the "
    "user question displayed below. You should choose the assistant that follows the user's instructions and answers "
    "the user's question better. Your evaluation should consider factors such as the helpfulness, relevance, accuracy, "
    "depth, creativity, and level of detail of their responses. Begin your evaluation by comparing the two responses "
    "and provide a short explanation. Avoid any position biases and ensure that the order in which the responses were "
    "presented does not influence your decision. Do not allow the length of the responses to influence your "
    "evaluation. Do not favor certain names of the assistants. Be as objective as possible. After providing your "
    'explanation, output your final verdict by strictly following this format: "[[A]]" if assistant A is better, '
    '"[[B]]" if assistant B is better, and "[[C]]" for a tie.'
)
USER = (
    "[User Question]\n{}\n\n[The Start of Assistant A's Answer]\n{}\n[The End of Assistant A's Answer]\n\n"
    "[The Start of Assistant B's Answer]\n{}\n[The End of Assistant B's Answer]"
)
RESAMPLES = 2000


class Judged(NamedTuple):
    """Q questions that the judge answered in both orders."""

    scores: np.ndarray  # (Q,) of the second model: 0, 0.25, ..., 1
    extra: np.ndarray  # (Q,) characters that its answer has more
    agree: float  # share of the questions asked on which both orders give the same verdict
    first: float  # share of verdicts for the answer that stands first, ties apart
    equal: int  # questions with equal answers: ties that no judge was asked about
    unclear: int  # questions left out: a reply without a verdict


def read_outputs(path: Path) -> dict[tuple[str, int], str]:
    """model_outputs.json -> answers by (instruction, how many times it was there before)."""
    seen: Counter[str] = Counter()
    outputs = {}
    for where, row in read_records(path):
        if not isinstance(row, dict):
            raise ValueError(f'{where}: rows look like {{"instruction": "...", "output": "..."}}, not {row!r:.80}')
        instruction, output = (check_text(where, name, row.get(name)) for name in ("instruction", "output"))
        outputs[instruction, seen[instruction]] = output
        seen[instruction] += 1
    if not outputs:
        raise ValueError(f"{path}: no answers in it")
    return outputs


def judge_pairs(
    judge: Source, first: Path, second: Path, verdicts: Path, max_new_tokens: int = 2048, temperature: float = 0.0,
    seed: int = 0,
) -> Judged:  # fmt: skip
    """Ask the judge about the answers in two files of the same questions. `verdicts` keeps prompts and replies."""
    ours, theirs = read_outputs(second), read_outputs(first)
    if odd := ours.keys() ^ theirs.keys():
        question = min(odd)[0]
        raise ValueError(f"{second if min(odd) in theirs else first}: lacks an answer to {question!r:.80}")
    asked = [key for key in ours if ours[key] != theirs[key]]
    requests = [
        Request(f"{number} {order}", [{"role": "system", "content": SYSTEM},
                {"role": "user", "content": USER.format(key[0], *answers)}], max_new_tokens, temperature, seed=seed)
        for number, key in enumerate(asked, 1)
        for order, answers in (("AB", (theirs[key], ours[key])), ("BA", (ours[key], theirs[key])))
    ]  # fmt: skip
    letters = [verdict(answer.text) for answer in answer_all(judge, requests, verdicts)]
    score = {"A": 0.0, "B": 1.0, "C": 0.5}
    scores, extra, agree, unclear = [], [], 0, 0
    for key, before, after in zip(asked, letters[::2], letters[1::2], strict=True):
        if before is None or after is None:
            unclear += 1
            continue
        scores.append((score[before] + 1 - score[after]) / 2)
        extra.append(len(ours[key]) - len(theirs[key]))
        agree += score[before] == 1 - score[after]
    equal = len(ours) - len(asked)
    if not scores and not equal:
        raise ValueError(f"{verdicts}: the judge gave no verdict: no reply holds [[A]], [[B]] or [[C]]")
    decided = Counter(letters)
    return Judged(
        np.array(scores + [0.5] * equal), np.array(extra + [0] * equal, dtype=float), agree / max(len(scores), 1),
        decided["A"] / max(decided["A"] + decided["B"], 1), equal, unclear,
    )  # fmt: skip


def verdict(text: str) -> str | None:
    """The last [[A]], [[B]] or [[C]] of a reply."""
    found = re.findall(r"\[\[([ABC])\]\]", text)
    return found[-1] if found else None


def bootstrap(figure: Callable[[np.ndarray], float], count: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a figure of `count` questions: percentiles over RESAMPLES samples of their indices, with
    replacement (Efron 1979)."""
    rng = np.random.default_rng(seed)
    low, high = np.percentile([figure(rng.integers(0, count, count)) for _ in range(RESAMPLES)], [2.5, 97.5])
    return float(low), float(high)


def length_controlled(scores: np.ndarray, extra: np.ndarray, ridge: float = 0.1) -> float:
    """The win rate that equally long answers would have: sigmoid(a) of the logistic regression

        P(win) = sigmoid(a + b * tanh(extra / std(extra)))

    over scores (Q,), after Dubois et al. 2024 (arXiv:2404.04475). They have one more term, the difficulty of each
    instruction, which takes the judgements of many models. The penalty ridge / 2 * (a^2 + b^2) keeps both finite where
    one model, or the longer answer, always wins.
    """
    features = np.stack([np.ones_like(extra), np.tanh(extra / (extra.std() or 1))], axis=1)  # (Q, 2)

    def loss(weights: np.ndarray) -> float:
        logits = features @ weights
        return float((np.logaddexp(0, logits) - scores * logits).sum() + ridge / 2 * weights @ weights)

    weights = np.zeros(2)
    for _ in range(50):  # Newton's method, with half the step where a whole one would go too far
        probs = 1 / (1 + np.exp(-features @ weights))  # (Q,)
        gradient = features.T @ (probs - scores) + ridge * weights
        hessian = (features * (probs * (1 - probs))[:, None]).T @ features + ridge * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        while loss(weights - step) > loss(weights) and abs(step).max() > 1e-12:
            step /= 2
        weights = weights - step
        if abs(step).max() < 1e-9:
            break
    return float(1 / (1 + np.exp(-weights[0])))


def describe_judged(judged: Judged, first: str, second: str) -> list[str]:
    scores, extra = judged.scores, judged.extra
    low, high = bootstrap(lambda rows: scores[rows].mean(), len(scores))
    least, most = bootstrap(lambda rows: length_controlled(scores[rows], extra[rows]), len(scores))
    wins, losses = int((scores > 0.5).sum()), int((scores < 0.5).sum())
    return [
        f"{second} against {first}",
        f"win rate           {scores.mean():6.1%}  95 % interval {low:.1%} to {high:.1%}",
        f"length-controlled  {length_controlled(scores, extra):6.1%}  95 % interval {least:.1%} to {most:.1%}, if both "
        "answers were equally long",
        f"questions          {len(scores):6,}  {wins:,} won, {len(scores) - wins - losses:,} tied "
        f"({judged.equal:,} with equal answers, not asked), {losses:,} lost, {judged.unclear:,} left out (no verdict)",
        f"both orders agree  {judged.agree:6.1%}  of the questions asked",
        f"first place won    {judged.first:6.1%}  of the verdicts that are no tie",
        f"longer by          {extra.mean():6.0f}  characters on average, {second}",
    ]


# --- AlpacaEval's annotations ----------------------------------------------------------------------------------------


def win_rate(preferences: Sequence[float]) -> tuple[float, float]:
    """AlpacaEval's win rate and its standard error, both in percent. preferences: 1 the reference wins, 2 the model
    wins, 1.5 or 0 a draw. AlpacaEval 2's judge gives numbers in between."""
    points = np.array([preference or 1.5 for preference in preferences]) - 1
    error = 100 * points.std(ddof=1) / math.sqrt(len(points)) if len(points) > 1 else math.nan
    return float((100 * points).mean()), float(error)


def read_annotations(path: Path) -> list[tuple[float | None, str]]:
    """annotations.json -> (preference, dataset) of each row; None where the judge's reply could not be read."""
    found = []
    for where, row in read_records(path):
        if not isinstance(row, dict) or "preference" not in row:
            raise ValueError(f'{where}: rows look like {{"instruction": "...", "preference": 2}}, not {row!r:.80}')
        preference = row["preference"]
        if isinstance(preference, float) and math.isnan(preference):
            preference = None
        number = isinstance(preference, int | float) and not isinstance(preference, bool)
        if not (preference is None or (number and (preference == 0 or 1 <= preference <= 2))):
            raise ValueError(f"{where}: preference must be 0, null or a number from 1 to 2, not {preference!r:.80}")
        found.append((preference, str(row.get("dataset", "no dataset"))))
    return found


def describe_annotations(path: Path) -> list[str]:
    rows = read_annotations(path)
    kept = [(preference, dataset) for preference, dataset in rows if preference is not None]
    if not kept:
        raise ValueError(f"{path}: no row has a preference")
    values = [preference or 1.5 for preference, _ in kept]
    rate, error = win_rate(values)
    wins, losses = sum(value > 1.5 for value in values), sum(value < 1.5 for value in values)
    lines = [
        f"win rate        {rate} %",
        f"standard error  {error} %",
        f"{wins:,} won, {len(kept) - wins - losses:,} drawn, {losses:,} lost, "
        f"{len(rows) - len(kept):,} left out (null)",
        *by_subset([dataset for _, dataset in kept], np.array(values) - 1, "win rate"),
    ]
    return lines


# --- subsets ---------------------------------------------------------------------------------------------------------

# RewardBench's sections (Lambert et al. 2024, arXiv:2403.13787, table 1).
REWARDBENCH = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": ("mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst",
                  "llmbar-adver-GPTOut", "llmbar-adver-manual"),
    "Safety": ("refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond",
               "donotanswer"),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}  # fmt: skip


def by_subset(names: Sequence[str], values: np.ndarray, what: str) -> list[str]:
    """Lines with the mean of values (N,) for each name. RewardBench's subsets get the means of its sections as well:
    over the pairs of a section, but mathematics counts as much as code, and over the four sections."""
    subsets = {name: values[[i for i, other in enumerate(names) if other == name]] for name in sorted(set(names))}
    lines = [f"{what} by subset, 95 % interval"] if len(subsets) > 1 else []
    for name, mine in subsets.items() if lines else ():
        low, high = wilson(mean := mine.mean(), len(mine))
        lines.append(f"  {name:22}  {mean:6.1%}  {low:6.1%} to {high:6.1%}  of {len(mine):,}")
    if subsets.keys() <= {name for section in REWARDBENCH.values() for name in section}:
        means = sections(subsets)
        lines += [f"{what} by section", *(f"  {name:22}  {mean:6.1%}" for name, mean in means.items())]
        if len(means) == len(REWARDBENCH):
            lines.append(f"  {'mean of the sections':22}  {sum(means.values()) / len(means):6.1%}")
    return lines


def sections(subsets: dict[str, np.ndarray]) -> dict[str, float]:
    code = sum(len(mine) for name, mine in subsets.items() if name.startswith("hep-"))
    found = {}
    for section, members in REWARDBENCH.items():
        here = {name: subsets[name] for name in members if name in subsets}
        weights = {name: (name == "math-prm" and code) or len(mine) for name, mine in here.items()}
        if here:
            total = sum(weights[name] * float(mine.mean()) for name, mine in here.items())
            found[section] = total / sum(weights.values())
    return found
