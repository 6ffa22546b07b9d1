"""Look at preference data before training on it: what is wrong with it, in a table, a file, and a page to curate it on.

    python audit.py ultrafeedback/*.jsonl --output audit/

    audit/audit.jsonl     one finding a line, with its record and its reason
          index.html      a page that needs no network: sort, filter, read side by side, mark with the keyboard
          records/        what the page shows of each record, if it is too much for one file

Raw records are read and judged by binarize.py's own reader and rules, so the page shows the pairs that binarize.py
would write, and `binarize.py --curation marks.jsonl` applies the marks that were made on it. Files of pairs are audited
as well, in every shape that train.py reads. Only for those is notus imported, because notus/rows.py defines the shapes.
Nothing here imports torch.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from binarize import (
    ASKED_FOR,
    RULES,
    Completion,
    Drop,
    Record,
    check_paths,
    choose,
    choose_by_overall_score,
    choose_by_ratings,
    compare_rules,
    layout,
    located,
    pair_id,
    parse_record,
    prompt_id_of,
    read_json,
    read_values,
    repair,
    rows_of_the_rules,
    show,
)

NEAR = 0.8  # Jaccard similarity of two texts' word 3-grams from which they count as nearly the same
INLINE_BYTES = 8 << 20  # records of up to this size go into index.html itself
CHUNK = 100  # records in a file of records/
PAGE = Path(__file__).resolve().parent / "page"

# The reasons, in the order of the table. {name: what it means}, which the page shows as well.
RAW_REASONS = {
    "score contradicts ratings": "an answer has overall_score 10 and a mean rating of at most 2: UltraFeedback's bug",
    "rank gap": "an answer's ranks by overall_score and by ratings are at least half as many places apart as there are "
    "answers (equal ones share the mean of their ranks)",
    "rules differ": "the mean rating and the overall_score choose different answers",
    "tie for the best": "several answers have the best mean rating, and the first of them is chosen",
    "N/A rating": "an aspect of an answer has the rating N/A",
    "unrated answer": "an answer has no rating at all",
} | {f"no pair: {drop}": f"binarize.py drops the record: {drop}" for drop in Drop if drop not in ASKED_FOR}
PAIR_REASONS = {"not preferred": "the score of the chosen answer is not above the score of the rejected one"}
TEXT_REASONS = {
    "empty answer": "an answer holds nothing but white space",
    "identical answers": "two answers are the same text",
    "near-identical answers": f"two answers share {NEAR:.0%} of their word 3-grams (Jaccard)",
    "refusal": "an answer begins by refusing, apologizing or calling itself an AI",
    "boilerplate opening": "an answer begins with a phrase that says nothing, such as 'Sure!' or 'Great question'",
    "repeated prompt": "another record has this prompt (letter case and white space aside)",
}
TEST_REASONS = {
    "in the test set": "the test file has this prompt (letter case and white space aside)",
    "near the test set": f"a prompt of the test file shares {NEAR:.0%} of its word 3-grams with this one (Jaccard)",
}
BENCHMARK_REASONS = {
    "benchmark overlap": "more than half of a benchmark question's words lie in 8-grams that the prompt has too (the "
    "rule of Tülu 3, arXiv:2411.15124)",
}

REFUSAL = re.compile(
    r"\W*(as an? (ai|artificial|language model|large language)|(sorry|apologies)\b"
    r"|(unfortunately,? )?(i['’]m|i am) (\w+ )?(sorry|afraid|unable)"
    r"|(unfortunately,? )?i (cannot|can['’]t|can not|won['’]t|will not|apologi[sz]e))\b",
    re.IGNORECASE,
)
BOILERPLATE = re.compile(
    r"\W*((sure|certainly|absolutely|of course|definitely)\b[!,.]"
    r"|(what an? )?(great|good|excellent|interesting) question|thank(s| you) for (your|the|asking)"
    r"|i(['’]d be| would be|['’]m| am) (happy|glad) to)",
    re.IGNORECASE,
)
WORD = re.compile(r"\w+")


class Answer(NamedTuple):
    model: str
    response: str
    rating: float | None  # mean rating; of a pair, the score that its file gives
    overall_score: float | None
    aspects: dict[str, tuple[str, str]]  # {aspect: (rating as written, rationale)}
    critique: str


class Entry(NamedTuple):
    """A raw record or a pair, ready to be looked at."""

    where: str
    source: str
    prompt: str
    question: str  # the prompt without a system turn, by which it is found elsewhere
    prompt_id: str
    answers: list[Answer]
    chosen: int | None  # places in `answers`; None if there is no pair
    rejected: int | None
    findings: list[tuple[str, str]]  # (reason, detail): those that only this shape of data can have
    disagreement: float | None  # mean rating of the answer that the ratings choose, minus that of the score's choice
    counts: Counter[str]  # of binarize.py's `compare_rules`

    @property
    def pair(self) -> str:
        """What a mark calls the pair."""
        if self.chosen is None or self.rejected is None:
            return ""
        return pair_id(self.prompt_id, self.answers[self.chosen].response, self.answers[self.rejected].response)


# ---- reading --------------------------------------------------------------------------------------------------------


def holds_pairs(path: Path) -> bool:
    """Whether a file holds pairs, by its first row. CSV is left to notus/rows.py."""
    if path.name.lower().removesuffix(".gz").endswith(".csv"):
        return True
    with open(path, "rb") as packed:
        _, first = next(read_values(packed, path))
    return (
        isinstance(first, dict)
        and "completions" not in first
        and any(key.startswith(("chosen", "rejected", "preferred")) for key in first)
    )


def read_entries(path: Path, by: str = "ratings", seed: int = 42) -> Iterator[Entry]:
    """The records or pairs of a file. ValueError names file, line and value, as in binarize.py and train.py."""
    if holds_pairs(path):
        yield from read_pair_entries(path)
        return
    for where, value in read_json([path]):
        try:
            yield raw_entry(where, value, by, seed)
        except ValueError as error:
            raise located(where, error) from None


def raw_entry(where: str, value: Any, by: str, seed: int) -> Entry:
    record = parse_record(value)
    choice = choose(record, by, seed)
    chosen = rejected = None
    if not isinstance(choice, Drop):
        chosen, rejected = (place(record.completions, answer) for answer in choice)
    notes = [aspects(raw.get("annotations") or {}) for raw in value["completions"]]
    critiques = [text(raw.get("critique")) for raw in value["completions"]]
    answers = [Answer(*c, note, why) for c, note, why in zip(record.completions, notes, critiques, strict=True)]
    findings = [(f"no pair: {choice}", "")] if isinstance(choice, Drop) else []
    findings += scores_against_ratings(answers) + rating_gaps(answers)
    counts, disagreement = Counter[str](), None
    compare_rules(record, counts)
    by_ratings, by_score = choose_by_ratings(record.completions), None
    if counts["compared"]:
        by_score = choose_by_overall_score(record.completions)
    if not isinstance(by_ratings, Drop) and by_score and not isinstance(by_score, Drop):
        best, other = by_ratings[0], by_score[0]
        if best.rating is not None and other.rating is not None:
            disagreement = best.rating - other.rating
        if counts["differ"]:
            findings.append(("rules differ", f"ratings choose {best.model}, overall_score chooses {other.model}"))
    prompt_id = prompt_id_of(record.instruction)
    for completion in () if isinstance(choice, Drop) else choice:  # binarize.py refuses half of a surrogate pair there
        "".join((record.source, completion.model, completion.response)).encode()
    return Entry(
        where, record.source, record.instruction, record.instruction, prompt_id, answers, chosen, rejected, findings,
        disagreement, counts,
    )  # fmt: skip


def place(completions: list[Completion], wanted: Completion) -> int:
    return next(i for i, completion in enumerate(completions) if completion is wanted)


def text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else show(value)


def aspects(annotations: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The ratings as they are written, with their reasons. In the authors' intermediate files an aspect is a list."""
    notes = {name: note[0] if isinstance(note, list) and note else note for name, note in annotations.items()}
    return {
        name: (text(note.get("Rating")), text(note.get("Rationale For Rating") or note.get("Rationale")))
        for name, note in notes.items()
        if isinstance(note, dict)
    }


SIDES = ("chosen", "rejected")
SCORE_FIELDS = ("score_{}", "{}_score", "{}_rating", "{}-rating", "{}_avg_rating")  # with a side in it
MODEL_FIELDS = ("{}_model", "{}-model")


def read_pair_entries(path: Path) -> Iterator[Entry]:
    try:
        from notus.rows import parse_row, read_records  # the one place that knows the shapes; needs no torch
    except ImportError:
        raise ValueError(f"{path}: holds pairs, which notus reads; pip install -e . in its repository") from None
    for where, value in read_records(path):
        row = parse_row(where, value)
        turns = [turn for turn in row.prompt if turn["content"] or turn["role"] != "system"]
        single = [turn["role"] for turn in row.prompt if turn["role"] != "system"] == ["user"]
        prompt = "\n\n".join(turn["content"] if single else f"{turn['role']}: {turn['content']}" for turn in turns)
        instruction = row.prompt[-1]["content"] if single else prompt
        question = "\n\n".join(turn["content"] for turn in turns if turn["role"] != "system")
        scores, models = (
            [next((value[key] for name in names if (key := name.format(side)) in value), None) for side in SIDES]
            for names in (SCORE_FIELDS, MODEL_FIELDS)
        )
        points = [finite(score) for score in scores]
        answers = [
            Answer(text(model), response, point, None, {}, "")
            for model, response, point in zip(models, (row.chosen, row.rejected), points, strict=True)
        ]
        best, other = points
        worse = best is not None and other is not None and best <= other
        findings = [("not preferred", f"{best:g} and {other:g}")] if worse else []
        source = text(value.get("source"))
        prompt_id = prompt_id_of(instruction)
        yield Entry(where, source, prompt, question, prompt_id, answers, 0, 1, findings, None, Counter())


def finite(score: Any) -> float | None:
    """A score that can be compared and shown. Files of pairs hold anything there, and train.py reads none of it."""
    number = isinstance(score, int | float) and not isinstance(score, bool) and abs(score) < 1e9
    return float(score) if number else None


# ---- findings within a record: functions that return [(reason, detail)] ----------------------------------------------


def scores_against_ratings(answers: list[Answer]) -> list[tuple[str, str]]:
    """Where overall_score and mean rating contradict each other, in value or in rank."""
    found = [
        ("score contradicts ratings", f"{answer.model}: overall_score 10, mean rating {answer.rating:.2f}")
        for answer in answers
        if answer.overall_score == 10 and answer.rating is not None and answer.rating <= 2
    ]
    judged = [answer for answer in answers if answer.overall_score is not None and answer.rating is not None]
    by_score = ranks([answer.overall_score or 0 for answer in judged])
    by_rating = ranks([answer.rating or 0 for answer in judged])
    found += [
        ("rank gap", f"{answer.model}: rank {score:g} by overall_score, {rating:g} by ratings, of {len(judged)}")
        for answer, score, rating in zip(judged, by_score, by_rating, strict=True)
        if abs(score - rating) >= max(len(judged) / 2, 1)
    ]
    return found


def ranks(values: list[float]) -> list[float]:
    """1 for the highest. Equal values share the mean of their ranks."""
    return [sum(other > value for other in values) + (values.count(value) + 1) / 2 for value in values]


def rating_gaps(answers: list[Answer]) -> list[tuple[str, str]]:
    """Ratings that are missing, and ties for the best."""
    ratings = [answer.rating for answer in answers if answer.rating is not None]
    best = [answer.model for answer in answers if ratings and answer.rating == max(ratings)]
    found = [("tie for the best", ", ".join(best))] if len(best) > 1 and min(ratings) < max(ratings) else []
    for answer in answers:
        absent = [name for name, (rating, _) in answer.aspects.items() if rating == "N/A"]
        found += [("N/A rating", f"{answer.model}: {', '.join(absent)}")] if absent else []
        found += [("unrated answer", answer.model)] if answer.rating is None else []
    return found


def text_findings(answers: list[Answer]) -> list[tuple[str, str]]:
    """What the texts of the answers show, each and beside each other."""
    found = []
    for answer in answers:
        if not answer.response.strip():
            found.append(("empty answer", answer.model))
        elif REFUSAL.match(answer.response):
            found.append(("refusal", f"{answer.model}: {answer.response.strip()[:60]}"))
        elif BOILERPLATE.match(answer.response):
            found.append(("boilerplate opening", f"{answer.model}: {answer.response.strip()[:60]}"))
    grams = [ngrams(words(answer.response), 3) for answer in answers]
    for (a, grams_a), (b, grams_b) in combinations(zip(answers, grams, strict=True), 2):
        if a.response == b.response:
            found.append(("identical answers", f"{a.model} and {b.model}"))
        elif (similarity := jaccard(grams_a, grams_b)) >= NEAR:
            found.append(("near-identical answers", f"{a.model} and {b.model}: {similarity:.2f}"))
    return found


def words(string: str) -> list[str]:
    return WORD.findall(string.lower())


def ngrams(tokens: list[str], n: int) -> set[tuple[str, ...]]:
    """The n-grams, or all words at once if there are fewer than n."""
    return set(zip(*(tokens[i:] for i in range(min(n, len(tokens)))), strict=False))


def jaccard(a: set[Any], b: set[Any]) -> float:
    """|a & b| / |a | b|, or 0 where the sizes alone say that it is below NEAR."""
    small, large = sorted((len(a), len(b)))
    if not small or small < NEAR * large:
        return 0.0
    shared = len(a & b)
    return shared / (small + large - shared)


# ---- findings across records and files ------------------------------------------------------------------------------


def normal(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


class Heldout:
    """The prompts of a test set, to be found again. Near ones are proposed by MinHash LSH and confirmed exactly."""

    def __init__(self, paths: Sequence[Path]):
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise ValueError("--test looks for near-duplicates with datasketch; pip install datasketch") from None
        self.minhash = MinHash(num_perm=128)
        # Proposed from 0.6 on, so that a pair at NEAR is missed less than once in 10,000 times.
        self.lsh = MinHashLSH(threshold=NEAR - 0.2, num_perm=128)
        self.exact: dict[str, str] = {}
        self.grams: dict[str, set[tuple[str, ...]]] = {}
        for path in paths:
            for entry in read_entries(path):
                if normal(entry.question) not in self.exact and (grams := ngrams(words(entry.question), 3)):
                    self.grams[entry.where] = grams
                    self.lsh.insert(entry.where, self.signature(grams))
                self.exact.setdefault(normal(entry.question), entry.where)

    def signature(self, grams: set[tuple[str, ...]]) -> Any:
        minhash = self.minhash.copy()
        minhash.update_batch([" ".join(gram).encode(errors="surrogatepass") for gram in grams])
        return minhash

    def findings(self, prompt: str) -> list[tuple[str, str]]:
        if where := self.exact.get(normal(prompt)):
            return [("in the test set", where)]
        grams = ngrams(words(prompt), 3)
        proposed = self.lsh.query(self.signature(grams)) if grams else []
        near = max(((jaccard(grams, self.grams[where]), where) for where in proposed), default=(0.0, ""))
        return [("near the test set", f"{near[1]}: {near[0]:.2f}")] if near[0] >= NEAR else []


QUESTION_FIELDS = ("question", "prompt", "instruction", "problem", "turns", "Question")


class Benchmarks:
    """The questions of benchmark files, to be found in prompts by the rule of Tülu 3.

    Lambert et al. 2024, arXiv:2411.15124, section 3.2: a word of a question matches a prompt if it lies in an 8-gram
    that both have, and the question overlaps with the prompt if more than half of its words match that one prompt.
    Words are runs of letters and digits, in lower case. A question of fewer than 8 words has no 8-gram. It overlaps
    with a prompt that has the same words.
    """

    N = 8

    def __init__(self, paths: Sequence[Path]):
        self.questions: list[tuple[str, int]] = []  # (FILE:LINE, number of words)
        self.places: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)  # 8-gram -> (question, position)
        self.short: dict[tuple[str, ...], int] = {}
        for where, value in read_json(paths):
            found = next((value[key] for key in QUESTION_FIELDS if isinstance(value, dict) and key in value), None)
            for question in found if isinstance(found, list) and found else [found]:
                if not isinstance(question, str):
                    wanted = ", ".join(QUESTION_FIELDS)
                    raise ValueError(f"{where}: no question in {show(value)}; expected text in one of {wanted}")
                tokens = words(question)
                for position, gram in enumerate(zip(*(tokens[i:] for i in range(self.N)), strict=False)):
                    self.places[gram].append((len(self.questions), position))
                if 0 < len(tokens) < self.N:
                    self.short.setdefault(tuple(tokens), len(self.questions))
                self.questions.append((where, len(tokens)))

    def findings(self, prompt: str) -> list[tuple[str, str]]:
        tokens = words(prompt)
        matched: dict[int, set[int]] = defaultdict(set)
        for gram in zip(*(tokens[i:] for i in range(self.N)), strict=False):
            for question, position in self.places.get(gram, ()):
                matched[question].update(range(position, position + self.N))
        shares = {question: len(places) / self.questions[question][1] for question, places in matched.items()}
        if (question := self.short.get(tuple(tokens), -1)) >= 0:
            shares[question] = 1.0
        return [
            ("benchmark overlap", f"{self.questions[question][0]}: {share:.0%} of its words")
            for question, share in sorted(shares.items())
            if share > 0.5
        ]


# ---- what the labels are worth --------------------------------------------------------------------------------------

JACKKNIFE = 20  # groups; an interval is +- 2.09 standard errors, Student's t at 19 degrees of freedom
LABELS = ("mean rating", "overall_score", "overall_score, repaired")
CAVEAT = (
    "share of truth: 0 is noise, 1 the truth; noise / truth: standard deviations. Both assume that the aspects err",
    "independently. What they have in common counts as truth, and an error that they share favours the ratings.",
)


class Labels:
    """How the mean rating and overall_score agree, and how much truth each holds if they err independently.

    One factor: within a record, each of an answer's k ratings is its truth plus an error, and its score is a multiple
    of the truth plus an error. All errors are independent of each other and of the truth. Then two aspects covary by
    the variance of the truth, and the share of truth in a label (its squared correlation with it) is

        mean rating       var(truth) / var(mean rating)   Cronbach's alpha (Psychometrika 16, 1951)
        overall_score     r^2 / alpha                     Spearman's correction for attenuation (1904)

    where r is the correlation of the two, and all values are deviations from their mean over a record's answers. Errors
    that aspects share pass for truth, so the ratings look better than they are, and the score worse. What one aspect
    alone measures passes for an error, which has the reverse effect.

    The repair reads the ratings, so a repaired score shares their errors, and r would be too high. Each two aspects are
    therefore compared with the score as repaired by the other ones alone.
    """

    def __init__(self) -> None:
        # label -> group -> the terms of `sums_of_squares`
        self.sums = {label: [[0.0] * 4 for _ in range(JACKKNIFE)] for label in LABELS[1:]}
        self.counts: Counter[str] = Counter()
        self.correlations: dict[str, list[float]] = {label: [] for label in LABELS[1:]}

    def add(self, answers: list[Answer]) -> None:
        group = self.counts["records"] % JACKKNIFE
        self.counts["records"] += 1
        self.count_ties(LABELS[0], [answer.rating for answer in answers])
        for label in LABELS[1:]:
            judged = [answer for one in answers for answer in (mended(one) if label == LABELS[2] else [one])]
            self.count_ties(label, [answer.overall_score for answer in judged])
            both = [(a.rating, a.overall_score) for a in judged if a.rating is not None and a.overall_score is not None]
            if len(both) > 1:
                correlation = pearson(*(ranks(list(values)) for values in zip(*both, strict=True)))
                self.correlations[label] += [] if correlation is None else [correlation]
        complete = [(ratings, a.overall_score) for a in answers if (ratings := all_ratings(a))]
        scored = [(ratings, score) for ratings, score in complete if score is not None]
        if len(scored) < 2 or len({len(ratings) for ratings, _ in scored}) > 1:
            return
        for label, terms in zip(LABELS[1:], (sums_of_squares(scored), repaired_sums(scored)), strict=True):
            sums = self.sums[label][group]
            self.sums[label][group] = [a + b for a, b in zip(sums, terms, strict=True)]

    def count_ties(self, label: str, values: list[float | None]) -> None:
        known = [value for value in values if value is not None]
        self.counts[f"tied {label}"] += sum(a == b for a, b in combinations(known, 2))
        self.counts[f"pairs {label}"] += len(known) * (len(known) - 1) // 2

    def share(self, label: str, without: int = -1) -> float | None:
        """The share of truth, without one group of records. None if the aspects do not covary."""
        of = LABELS[1] if label == LABELS[0] else label
        groups = [sums for n, sums in enumerate(self.sums[of]) if n != without]
        truth, mean, score, product = (sum(column) for column in zip(*groups, strict=True))
        if truth <= 0 or score <= 0:
            return None
        if label == LABELS[0]:
            return truth / mean
        return min(max(product, 0.0) ** 2 / (truth * score), 1.0)  # a label that runs backwards teaches no truth

    def interval(self, plus: str, minus: str | None = None) -> tuple[float, float, float] | None:
        """A share, or the difference of two, and its 95 % interval by the delete-a-group jackknife."""
        found = []
        for group in (-1, *range(JACKKNIFE)):
            a, b = self.share(plus, group), 0.0 if minus is None else self.share(minus, group)
            if a is None or b is None:
                return None
            found.append(a - b)
        value, *others = found
        centre = sum(others) / JACKKNIFE
        error = ((JACKKNIFE - 1) / JACKKNIFE * sum((other - centre) ** 2 for other in others)) ** 0.5
        return value, value - 2.09 * error, value + 2.09 * error

    def table(self) -> tuple[list[str], list[list[str]]]:
        header = ["label", "share of truth", "95 % interval", "noise / truth", "tied pairs", "rank correlation"]
        rows = []
        for label in LABELS:
            found = self.interval(label)
            value, low, high = found or (0.0, 0.0, 0.0)
            noise = f"{max(1 / value - 1, 0) ** 0.5:.2f}" if value else "-"
            cells = [f"{value:.2f}", f"{max(low, 0):.2f} to {min(high, 1):.2f}", noise] if found else ["-", "-", "-"]
            known = self.correlations.get(label)
            ties = share(self.counts[f"tied {label}"], self.counts[f"pairs {label}"])
            rows.append([label, *cells, ties, mean(sum(known), len(known), 2) if known else "-"])
        return header, rows

    def verdict(self) -> list[str]:
        """What follows from the table, in a sentence, and its condition."""
        if (found := self.interval(LABELS[0], LABELS[2])) is None:
            return []
        value, low, high = found
        more = "more" if value > 0 else "less"
        figures = f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
        certain = "" if low > 0 or high < 0 else "; the interval holds 0, so this may be chance"
        return [f"the mean rating holds {more} truth than the repaired score: {figures}{certain}", *CAVEAT]


def labels_of(paths: Sequence[Path]) -> Labels:
    """Those of raw files, without an audit."""
    labels = Labels()
    for path in paths:
        for entry in read_entries(path):
            labels.add(entry.answers)
    return labels


def mended(answer: Answer) -> list[Answer]:
    """The answer as `binarize.py --repair` leaves it, or none."""
    if answer.overall_score != 10:
        return [answer]
    record, _ = repair(Record("", "", [Completion(*answer[:4])]))
    return [answer._replace(overall_score=completion.overall_score) for completion in record.completions]


def all_ratings(answer: Answer) -> list[float]:
    """The ratings of at least two aspects, or nothing if one is missing."""
    ratings = [rating for rating, _ in answer.aspects.values()]
    if len(ratings) < 2 or {"", "N/A"} & set(ratings):
        return []
    return [float(rating.removesuffix("/5")) for rating in ratings]


Judged = list[tuple[list[float], float]]  # (k ratings, score) of each answer of a record
Sums = tuple[float, float, float, float]


def sums_of_squares(judged: Judged) -> Sums:
    """Mean SP of two aspects, SS of the mean rating, SS of the score, SP of mean rating and score; SP: the sum of
    products of deviations, SS: of squares."""
    k = len(judged[0][0])
    aspects = [deviations(column) for column in zip(*(ratings for ratings, _ in judged), strict=True)]
    means, scores = deviations([sum(ratings) / k for ratings, _ in judged]), deviations([score for _, score in judged])
    of_mean, of_score = (sum(d * d for d in each) for each in (means, scores))
    of_aspects = sum(d * d for aspect in aspects for d in aspect)
    product = sum(a * b for a, b in zip(means, scores, strict=True))
    return (k * k * of_mean - of_aspects) / (k * (k - 1)), of_mean, of_score, product


def repaired_sums(judged: Judged) -> Sums:
    """The same after a repair: the mean over all two aspects, each with the scores that the other aspects repair."""
    k = len(judged[0][0])
    if k < 3 or all(score != 10 for _, score in judged):
        return sums_of_squares(judged) if k > 2 else (0.0, 0.0, 0.0, 0.0)
    terms = []
    for two in combinations(range(k), 2):
        kept = []
        for ratings, score in judged:
            others = [rating for i, rating in enumerate(ratings) if i not in two]
            mended_, _ = repair(Record("", "", [Completion("", "", sum(others) / len(others), score)]))
            kept += [([ratings[i] for i in two], one.overall_score or 0.0) for one in mended_.completions]
        terms.append(sums_of_squares(kept) if len(kept) > 1 else (0.0, 0.0, 0.0, 0.0))
    a, b, c, d = (sum(column) / len(terms) for column in zip(*terms, strict=True))
    return a, b, c, d


def deviations(values: Sequence[float]) -> list[float]:
    centre = sum(values) / len(values)
    return [value - centre for value in values]


def pearson(a: list[float], b: list[float]) -> float | None:
    da, db = deviations(a), deviations(b)
    scale = (sum(x * x for x in da) * sum(x * x for x in db)) ** 0.5
    return sum(x * y for x, y in zip(da, db, strict=True)) / scale if scale else None


# ---- the audit ------------------------------------------------------------------------------------------------------

COLUMNS = [
    *("where", "source", "prompt", "reasons", "chosen", "rejected", "score", "margin", "disagreement", "length"),
    *("longer", "prompt_id", "pair"),
]


class Audit:
    """What is known of all entries. The records themselves go to the page's files as they are read."""

    def __init__(self, folder: Path, reasons: dict[str, str]):
        self.folder, self.reasons = folder, reasons
        self.counts: Counter[str] = Counter()
        self.sources: dict[str, Counter[str]] = defaultdict(Counter)
        self.models: dict[str, Counter[str]] = defaultdict(Counter)
        self.labels = Labels() if "rules differ" in reasons else None  # of raw records only
        self.rows: list[list[Any]] = []  # by COLUMNS
        self.findings: list[list[tuple[str, str]]] = []  # of each row
        self.prompts: dict[bytes, list[int]] = defaultdict(list)  # digest of a prompt -> its rows
        self.chunk: list[dict[str, Any]] = []
        self.chunks: list[Path] = []
        (folder / "records").mkdir(parents=True)

    def add(self, entry: Entry, findings: list[tuple[str, str]]) -> None:
        digest = hashlib.sha256(normal(entry.question).encode(errors="surrogatepass")).digest()
        self.prompts[digest].append(len(self.rows))
        self.counts.update(entry.counts)
        self.counts["records"] += 1
        source = self.sources[entry.source]
        source.update(entry.counts)
        source["records"] += 1
        if self.labels:
            self.labels.add(entry.answers)
        for i, answer in enumerate(entry.answers):
            model = self.models[answer.model]
            model.update(answers=1, chars=len(answer.response), chosen=i == entry.chosen, rejected=i == entry.rejected)
            for group in (source, model):
                group.update(ratings=answer.rating is not None, scores=answer.overall_score is not None)
                group.update({"rating": answer.rating or 0, "score": answer.overall_score or 0})  # sums, for the means
        chosen, rejected = (None if i is None else entry.answers[i] for i in (entry.chosen, entry.rejected))
        score = margin = length = longer = None
        if chosen and rejected:
            length, longer = len(chosen.response), len(chosen.response) - len(rejected.response)
            score = chosen.rating
            margin = None if score is None or rejected.rating is None else score - rejected.rating
            for counter in (self.counts, source):
                counter.update(pairs=1, longer=longer > 0, shorter=longer < 0)
                counter.update(chosen_chars=length, rejected_chars=length - longer)
        self.findings.append(findings)
        names = [answer.model if answer else "" for answer in (chosen, rejected)]
        self.rows.append([
            entry.where, entry.source, entry.prompt[:160], "", *names, score, margin, entry.disagreement, length,
            longer, entry.prompt_id, entry.pair,
        ])  # fmt: skip
        self.chunk.append({
            "prompt": entry.prompt, "chosen": entry.chosen, "rejected": entry.rejected, "findings": findings,
            "answers": [answer._asdict() for answer in entry.answers],
        })  # fmt: skip
        if len(self.chunk) == CHUNK:
            self.write_chunk()

    def write_chunk(self) -> None:
        """Write CHUNK records as a script, since a page that was opened from a file may load scripts but not fetch."""
        if self.chunk:
            path = self.folder / "records" / f"{len(self.chunks)}.js"
            path.write_text(f"records({len(self.chunks)}, {for_script(self.chunk)});\n")
            self.chunks.append(path)
            self.chunk = []

    def finish(self) -> None:
        """What is known only when all is read: repeated prompts, and the reasons of each row."""
        self.write_chunk()
        for same in self.prompts.values():
            for n in same if len(same) > 1 else ():
                other = next(other for other in same if other != n)
                self.findings[n].append(("repeated prompt", f"{len(same)} times, also in {self.rows[other][0]}"))
        for row, findings in zip(self.rows, self.findings, strict=True):
            found = [reason for reason in self.reasons if any(reason == name for name, _ in findings)]
            self.counts.update(found)
            row[COLUMNS.index("reasons")] = "; ".join(found)

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """(header, rows): by source, then by model, largest first; of raw records, by label."""
        by_source = [
            [
                printable(name) or "(no source)", f"{c['records']:,}", f"{c['pairs']:,}",
                share(c["longer"], c["pairs"]),
                mean(c["chosen_chars"], c["pairs"], 0), mean(c["rejected_chars"], c["pairs"], 0),
                share(c["differ"], c["compared"]), *means(c),
            ]
            for name, c in sorted(self.sources.items(), key=lambda item: -item[1]["records"])
        ]  # fmt: skip
        by_model = [
            [
                printable(name) or "(no model)", f"{c['answers']:,}", *means(c), share(c["chosen"], c["answers"]),
                share(c["rejected"], c["answers"]), mean(c["chars"], c["answers"], 0),
            ]
            for name, c in sorted(self.models.items(), key=lambda item: -item[1]["answers"])
        ]  # fmt: skip
        scores, lengths = ["mean rating", "overall_score"], ["chosen longer", "chosen chars", "rejected chars"]
        by_label = [self.labels.table()] if self.labels else []
        return [
            (["source", "records", "pairs", *lengths, "rules differ", *scores], by_source),
            (["model", "answers", *scores, "chosen", "rejected", "mean chars"], by_model),
            *by_label,
        ]

    def counted(self) -> list[tuple[str, int, int]]:
        """(name, count, the count that it is a share of), as in binarize.py's table."""
        counts = self.counts
        rows = [("records", counts["records"], 0), ("pairs", counts["pairs"], counts["records"])]
        rows += [(f"  {reason}", counts[reason], counts["records"]) for reason in self.reasons]
        rows += rows_of_the_rules(counts) if "rules differ" in self.reasons else []
        rows += [("chosen longer than rejected", counts["longer"], counts["pairs"])]
        return [*rows, ("chosen shorter than rejected", counts["shorter"], counts["pairs"])]


def printable(name: str) -> str:
    """A name for a terminal: short, and without control characters."""
    return "".join(c if c.isprintable() else "?" for c in name[:40])


def share(count: int, of: int) -> str:
    return f"{count / of:.1%}" if of else "-"


def mean(total: float, count: int, digits: int) -> str:
    return f"{total / count:,.{digits}f}" if count else "-"


def means(group: Counter[str]) -> tuple[str, str]:
    """Mean rating and mean overall_score of a source's or a model's answers."""
    return mean(group["rating"], group["ratings"], 2), mean(group["score"], group["scores"], 2)


def audit_files(
    paths: Sequence[str | Path],
    output: str | Path,
    by: str = "ratings",
    seed: int = 42,
    test: Sequence[str | Path] = (),
    benchmarks: Sequence[str | Path] = (),
    overwrite: bool = False,
) -> Audit:
    """Audit raw records or pairs and write the folder `output`. On any error an older one is as it was."""
    output = Path(output)
    files, heldout, questions = ([Path(path) for path in group] for group in (paths, test, benchmarks))
    check_paths([*files, *heldout, *questions], [], overwrite)
    check_output(output, overwrite)
    kinds = {holds_pairs(path): path for path in files}
    if len(kinds) > 1:
        raise ValueError(f"{kinds[False]} holds raw records and {kinds[True]} pairs; audit them one after the other")
    reasons = (PAIR_REASONS if True in kinds else RAW_REASONS) | TEXT_REASONS
    reasons |= (TEST_REASONS if test else {}) | (BENCHMARK_REASONS if benchmarks else {})
    searches: list[Heldout | Benchmarks] = []
    searches += [Heldout(heldout)] if heldout else []
    searches += [Benchmarks(questions)] if questions else []
    new = output.with_name(f".{output.name}.{os.urandom(4).hex()}.tmp")
    try:
        audit = Audit(new, reasons)
        for path in files:
            for entry in read_entries(path, by, seed):
                found = entry.findings + text_findings(entry.answers)
                audit.add(entry, found + [one for search in searches for one in search.findings(entry.question)])
        audit.finish()
        write_findings(new / "audit.jsonl", audit)
        write_page(new, audit)
        replace(new, output)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return audit


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an older audit."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise ValueError(f"{output}: is not a folder, and the output is one")
    if output.exists() and any(output.iterdir()):
        if strange := {path.name for path in output.iterdir()} - {"audit.jsonl", "index.html", "records"}:
            raise ValueError(f"{output}: holds {sorted(strange)[0]}, which is no part of an audit; name another folder")
        if not overwrite:
            raise ValueError(f"{output}: exists; --overwrite replaces it")


def replace(new: Path, output: Path) -> None:
    old = new.with_suffix(".old")
    if output.exists():
        output.rename(old)
    try:
        new.rename(output)
    except BaseException:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_findings(path: Path, audit: Audit) -> None:
    names = ["where", "source", "prompt_id"]
    with open(path, "x", encoding="utf-8") as file:
        for row, findings in zip(audit.rows, audit.findings, strict=True):
            known = dict(zip(COLUMNS, row, strict=True))
            for reason, detail in findings:
                finding = {name: known[name] for name in names} | {"reason": reason, "detail": detail}
                file.write(json.dumps(finding) + "\n")


# ---- the page -------------------------------------------------------------------------------------------------------


def for_script(value: Any) -> str:
    """JSON that may stand in a <script>, whatever the texts hold: ASCII, and without the characters that end a tag."""
    return re.sub(
        "[<>&]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(value, separators=(",", ":"), allow_nan=False)
    )


def write_page(folder: Path, audit: Audit) -> None:
    """index.html: template, styles, Tabulator, our script and the rows. Small sets carry their records in it too."""
    pairs = [row[-2:] for row in audit.rows]
    digest = hashlib.sha256(json.dumps(pairs).encode()).hexdigest()[:32]
    data = {
        "id": digest, "columns": COLUMNS, "rows": audit.rows, "reasons": audit.reasons, "chunk": CHUNK,
        "counts": audit.counted(), "tables": audit.tables(),
    }  # fmt: skip
    scripts = [read(path) for path in ("tabulator/tabulator.min.js", "audit.js")]
    if sum(path.stat().st_size for path in audit.chunks) <= INLINE_BYTES:
        scripts += [path.read_text() for path in audit.chunks]
        shutil.rmtree(folder / "records")
    # Only scripts with this number run, so no text of a record can become one even if the page had a hole.
    tags = "\n".join(f'<script nonce="{digest}">\n{script}</script>' for script in scripts)
    styles = "".join(f"<style>\n{read(path)}</style>\n" for path in ("tabulator/tabulator_simple.min.css", "audit.css"))
    data_tag = f'<script type="application/json" id="data">{for_script(data)}</script>'
    page = read("audit.html").replace("NONCE", digest).replace("<!-- styles -->", styles)
    before, after = page.split("<!-- scripts -->")
    (folder / "index.html").write_text("".join((before, data_tag, "\n", tags, after)), encoding="utf-8")


def read(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


# ---- the command ----------------------------------------------------------------------------------------------------


def table(audit: Audit, most: int = 20) -> str:
    """The counts, then means by source and by model. The page has the sources and models that are left out here."""
    parts = [layout(audit.counted())]
    for header, rows in audit.tables():
        columns = [list(column) for column in zip(header, *rows[:most], strict=True)]
        widths = [max(map(len, column)) for column in columns]
        padded = [[cell.rjust(width) for cell in column] for column, width in zip(columns, widths, strict=True)]
        padded[0] = [cell.ljust(widths[0]) for cell in columns[0]]
        lines = ["  ".join(cells) for cells in zip(*padded, strict=True)]
        parts.append("\n".join(lines + ([f"... and {len(rows) - most} more"] if len(rows) > most else [])))
    if audit.labels:
        parts[-1] = "\n".join([parts[-1], *audit.labels.verdict()])
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="audit.py",
        description="Look at raw UltraFeedback records or preference pairs, and make a page to curate them on.",
        epilog="example: python audit.py ultrafeedback/*.jsonl --output audit/ --benchmark truthful_qa.jsonl",
    )
    add = parser.add_argument
    add("files", nargs="+", type=Path, metavar="FILE", help="raw UltraFeedback, or pairs that train.py reads")
    add("--output", required=True, type=Path, metavar="DIR", help="a folder for audit.jsonl and index.html")
    add("--by", choices=RULES, default="ratings", help="the rule whose pairs are shown, as in binarize.py")
    add("--seed", type=int, default=42, metavar="S", help="as in binarize.py (default: 42)")
    add("--test", nargs="+", type=Path, default=[], metavar="FILE", help="look for these files' prompts, and near ones")
    add("--benchmark", nargs="+", type=Path, default=[], metavar="FILE", help="look for the questions of these files")
    add("--overwrite", action="store_true", help="replace an older audit")
    args = parser.parse_args(argv)
    try:
        audit = audit_files(args.files, args.output, args.by, args.seed, args.test, args.benchmark, args.overwrite)
    except (ValueError, OSError) as error:
        print(f"audit.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("audit.py: interrupted", file=sys.stderr)
        return 130
    if "rules differ" not in audit.reasons:
        print(f"{args.files[0]}: holds preference pairs, not raw records; this is what is left in them")
    print(table(audit))
    print(f"\nopen {args.output / 'index.html'} to read, filter and mark the records")
    return 0


if __name__ == "__main__":
    sys.exit(main())
