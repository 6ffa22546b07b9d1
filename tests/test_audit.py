"""Laws of audit.py: findings against planted truth and plain loops, the page in a real browser, marks as applied."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata, spearmanr
from test_binarize import BAD, completion, random_records, read, record, table_of, write_lines

import audit as script
import binarize
from audit import Answer, Benchmarks, Heldout, Labels, audit_files, jaccard, main, ngrams, ranks, words
from notus import demo

ROOT = Path(__file__).parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def run(*arguments):
    return main([str(argument) for argument in arguments])


def findings(folder):
    return read(folder / "audit.jsonl")


def reasons(tmp_path, *records):
    """The reasons found in the first of some records, each once."""
    raw = write_lines(tmp_path / "raw.jsonl", records)
    audit_files([raw], tmp_path / "audit", overwrite=True)
    return list({one["reason"]: 0 for one in findings(tmp_path / "audit") if one["where"] == f"{raw}:1"})


# ---- planted truth ----


@pytest.mark.parametrize("seed", range(3))
def test_the_planted_bug_is_found_every_time_and_nothing_else_is(seed, tmp_path):
    """The demo writes 10 for an answer that it grades 1. Its grade is the truth, and the ratings are noisy."""
    rng = random.Random(seed)
    records = [demo.record(rng, question) for question in demo.ask(rng, 1000, set())]
    raw = write_lines(tmp_path / "raw.jsonl", records)
    planted = set()
    for line, (one, question) in enumerate(zip(records, questions_of(seed), strict=True), 1):
        for answer in one["completions"]:
            if answer["overall_score"] == 10 and demo.grade(question, answer["response"]) == 1:
                planted.add((f"{raw}:{line}", answer["model"]))
    audit_files([raw], tmp_path / "audit")
    found = {
        (one["where"], one["detail"].partition(":")[0])
        for one in findings(tmp_path / "audit")
        if one["reason"] == "score contradicts ratings"
    }
    assert len(planted) > 300
    assert len(found & planted) == len(planted)  # recall
    assert len(found & planted) >= 0.99 * len(found)  # precision


def questions_of(seed):
    return demo.ask(random.Random(seed), 1000, set())


def test_binarize_and_audit_print_the_same_share_chosen_differently(tmp_path, capsys):
    raw = write_lines(tmp_path / "raw.jsonl", random_records(200))
    binarize.main([str(raw), "--output", str(tmp_path / "pairs.jsonl")])
    pairs = table_of(capsys)
    run(raw, "--output", tmp_path / "audit")
    audited = capsys.readouterr().out
    for name in ("records on which both rules choose", "their chosen answers differ", "whose mean rating is at most 2"):
        count = re.search(rf"^ *{name} +([\d,]+)", audited, re.M)[1]
        assert int(count.replace(",", "")) == pairs[name]
    found = [one["where"] for one in findings(tmp_path / "audit") if one["reason"] == "rules differ"]
    assert pairs["their chosen answers differ"] == len(found) > 0


# ---- findings within a record ----

A, B = "the first answer is this one", "an unlike second answer stands here"


@pytest.mark.parametrize(
    "answers, expected",
    [
        ([completion(A, "5"), completion(B, "4")], []),
        (
            [completion(A, "5", "5", score=9), completion(B, "2", "2", score=10)],
            ["score contradicts ratings", "rank gap"],
        ),
        ([completion(A, "5", score=9), completion(B, "3", score=9.5)], ["rank gap"]),
        ([completion(A, "5", score=9), completion(B, "2", score=9)], []),
        ([completion(A, "5"), completion(B, "N/A", "4")], ["N/A rating"]),
        ([completion(A, "5"), completion(B, "N/A"), completion("c d e", "3")], ["N/A rating", "unrated answer"]),
        ([completion(A, "5"), completion(B)], ["no pair: fewer than two rated completions", "unrated answer"]),
        ([completion(A, "5")], ["no pair: one completion only"]),
        ([], ["no pair: no completions"]),
        ([completion(A, "5"), completion(B, "5")], ["no pair: all tied"]),
        ([completion(A, "5"), completion(B, "5"), completion("c d e", "3")], ["tie for the best"]),
        ([completion(A, "5"), completion(" \n", "4")], ["no pair: empty answer", "empty answer"]),
        ([completion(A, "5"), completion(A, "4")], ["no pair: chosen = rejected", "identical answers"]),
        ([completion(A * 9, "5"), completion(A * 9 + " ok", "4")], ["near-identical answers"]),
        ([completion("I'm sorry, but no.", "5"), completion(B, "4")], ["refusal"]),
        ([completion("Sure! It is 4.", "5"), completion(B, "4")], ["boilerplate opening"]),
    ],
)
def test_reasons(answers, expected, tmp_path):
    found = [reason for reason in reasons(tmp_path, record("what?", *answers)) if reason != "rules differ"]
    assert found == expected


def test_the_rules_differ(tmp_path):
    answers = [completion(A, "5", score=7), completion(B, "4", score=8), completion("c d e", "1", score=2)]
    assert "rules differ" in reasons(tmp_path, record("what?", *answers))
    assert audit_files([tmp_path / "raw.jsonl"], tmp_path / "audit", overwrite=True).rows[0][8] == 1  # disagreement


@pytest.mark.parametrize(
    "opening, reason",
    [
        ("As an AI language model, I", "refusal"),
        ("I cannot help with that.", "refusal"),
        ("I’m really sorry, but", "refusal"),
        ("  Unfortunately, I am unable to", "refusal"),
        ("I apologize for", "refusal"),
        ("I cannoli", None),
        ("I am happy to help", "boilerplate opening"),
        ("Great question! The", "boilerplate opening"),
        ("Certainly, here", "boilerplate opening"),
        ("Sure as night follows day", None),
        ("Of course he went", None),
        ("The answer is: I cannot say", None),
    ],
)
def test_openings(opening, reason, tmp_path):
    found = reasons(tmp_path, record("what?", completion(opening, "5"), completion(B, "4")))
    assert found == ([reason] if reason else [])


def test_ranks_are_scipys():
    rng = random.Random(0)
    for _ in range(200):
        values = [float(rng.randint(1, 5)) for _ in range(rng.randint(1, 6))]
        assert ranks(values) == list(rankdata([-value for value in values]))


def test_prompts_that_repeat_whatever_their_case_and_space(tmp_path):
    pair = [completion(A, "5"), completion(B, "4")]
    others = [record("what is  THIS?\n", *pair), record("what else?", *pair)]
    assert reasons(tmp_path, record("What is this?", *pair), *others) == ["repeated prompt"]
    found = findings(tmp_path / "audit")
    assert [one["detail"] for one in found] == [f"2 times, also in {tmp_path}/raw.jsonl:{line}" for line in (2, 1)]


def test_length_bias_and_means_are_those_of_a_plain_loop(tmp_path):
    raw = write_lines(tmp_path / "raw.jsonl", records := random_records(120))
    audit = audit_files([raw], tmp_path / "audit")
    made = [binarize.binarize(binarize.parse_record(one)) for one in records]
    lengths = [
        [len(pair[side][-1]["content"]) for side in ("chosen", "rejected")] for pair in made if isinstance(pair, dict)
    ]
    counted = dict((name.strip(), count) for name, count, _ in audit.counted())
    assert counted["chosen longer than rejected"] == sum(chosen > rejected for chosen, rejected in lengths)
    assert counted["chosen shorter than rejected"] == sum(chosen < rejected for chosen, rejected in lengths)
    (_, by_source), (_, by_model), _ = audit.tables()
    groups = {name: [c for one in records for c in one["completions"] if c["model"] == name] for name, *_ in by_model}
    groups["flan"] = [c for one in records for c in one["completions"]]
    assert [row[0] for row in by_source] == ["flan"] and len(by_model) == 480
    for name, *cells in by_source + by_model:
        means = [m for c in groups[name] if (m := binarize.mean_rating(c)) is not None]
        rating, score = cells[-2:] if name == "flan" else cells[1:3]
        assert rating == (f"{sum(means) / len(means):,.2f}" if means else "-")
        assert score == f"{sum(c['overall_score'] for c in groups[name]) / len(groups[name]):,.2f}"


# ---- what the labels are worth ----


def factor_records(count, seed, *, error=1.0, shared=0.0, score_error=0.5, k=4):
    """Answers whose ratings are truth + shared error + own error, and whose score is 2 * (truth + error). Truth has a
    standard deviation of 1 within a record, and each record its own level."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        truth = rng.normal(3 * rng.normal(), 1, size=4)
        common = truth + shared * rng.normal(size=4)
        ratings = common[:, None] + error * rng.normal(size=(4, k))
        scores = 2 * (truth + score_error * rng.normal(size=4))
        yield [
            Answer("m", "r", row.mean(), score, {f"a{i}": (repr(float(x)), "") for i, x in enumerate(row)}, "")
            for row, score in zip(ratings, scores, strict=True)
        ]


def labels_from(records):
    labels = Labels()
    for answers in records:
        labels.add(answers)
    return labels


@pytest.mark.parametrize("error, score_error", [(0.5, 1.0), (1.5, 0.7), (2.0, 2.0)])
def test_shares_of_truth_are_those_that_made_the_data(error, score_error):
    """alpha = 1 / (1 + error^2 / 4) and 1 / (1 + score_error^2). The intervals hold them."""
    truths = {"mean rating": 1 / (1 + error**2 / 4), "overall_score": 1 / (1 + score_error**2)}
    truths["difference"] = truths["mean rating"] - truths["overall_score"]
    held = Counter()
    for seed in range(12):
        labels = labels_from(factor_records(250, seed, error=error, score_error=score_error))
        found = {name: labels.interval(name) for name in list(truths)[:2]}
        found["difference"] = labels.interval("mean rating", "overall_score")
        for name, (value, low, high) in found.items():
            assert value == pytest.approx(truths[name], abs=0.2) and high - low < 0.5
            held[name] += low <= truths[name] <= high
    assert min(held.values()) >= 9  # of 12; over 1,000 simulations 94 to 95 % do


def test_an_error_that_aspects_share_passes_for_truth():
    labels = labels_from(factor_records(3000, 0, error=1.0, shared=1.0, score_error=0.5))
    assert labels.share("mean rating") == pytest.approx(2 / 2.25, abs=0.02)  # though the truth is 1 / 2.25 of it
    assert labels.share("overall_score") == pytest.approx(0.5 * 1 / 1.25, abs=0.03)  # though it is 1 / 1.25


def test_a_score_that_runs_backwards_holds_no_truth():
    records = [
        [answer._replace(overall_score=-answer.overall_score) for answer in answers]
        for answers in factor_records(250, 0, error=0.5, score_error=0.5)
    ]
    assert labels_from(records).share("overall_score") == 0.0


def test_the_share_of_the_ratings_is_cronbachs_alpha():
    records = list(factor_records(50, 1, k=5))
    table = np.array([[[float(r) for r, _ in a.aspects.values()] for a in answers] for answers in records])
    table = (table - table.mean(1, keepdims=True)).reshape(-1, 5)
    alpha = 5 / 4 * (1 - table.var(0).sum() / table.sum(1).var())
    assert labels_from(records).share("mean rating") == pytest.approx(alpha, rel=1e-9)


def test_ties_and_rank_correlations_are_those_of_a_plain_loop():
    records = [binarize.parse_record(one) for one in random_records(200)]
    answers = [[Answer(*c, {}, "") for c in record.completions] for record in records]
    labels = labels_from(answers)
    rhos, tied, pairs = [], Counter(), Counter()
    for one in answers:
        both = [(a.rating, a.overall_score) for a in one if a.rating is not None]
        rho = spearmanr(both).statistic if len(both) > 1 and all(map(len, map(set, zip(*both, strict=True)))) else None
        rhos += [rho] if rho is not None and not np.isnan(rho) else []
        for name, values in (("mean rating", [b[0] for b in both]), ("overall_score", [a.overall_score for a in one])):
            for i in range(len(values)):
                for j in range(i):
                    pairs[name] += 1
                    tied[name] += values[i] == values[j]
    header, rows = labels.table()
    for row in rows[:2]:
        assert row[header.index("tied pairs")] == f"{tied[row[0]] / pairs[row[0]]:.1%}"
    assert labels.correlations["overall_score"] == pytest.approx(rhos)
    assert rows[1][-1] == f"{np.mean(rhos):.2f}"


def test_the_repaired_label_is_the_score_without_the_bug(tmp_path, capsys):
    """The worst answers get their 1 back, and the share of truth is that of the scores before the bug."""
    rng = random.Random(0)
    before, released = [], []
    for i in range(100):
        truths = [rng.randint(1, 5) for _ in range(4)]
        scores = [max(2 * truth - rng.choice((1, 2)), 1) for truth in truths]
        ratings = [[str(min(max(truth + rng.choice((0, 0, 1)), 1), 5)) for _ in range(4)] for truth in truths]
        ratings = [["1"] * 4 if score == 1 else row for score, row in zip(scores, ratings, strict=True)]
        for records, values in ((before, scores), (released, [s if s > 1 else 10 for s in scores])):
            made = [completion(f"{i}.{j}", *r, score=v) for j, (r, v) in enumerate(zip(ratings, values, strict=True))]
            records.append(record(f"x{i}", *made))
    labels = [
        script.labels_of([write_lines(tmp_path / f"{i}.jsonl", records)])
        for i, records in enumerate((before, released))
    ]
    assert labels[1].share("overall_score, repaired") == pytest.approx(labels[0].share("overall_score"))
    assert labels[0].share("overall_score") > 0.8
    assert labels[1].share("overall_score") < 0.5
    run(tmp_path / "1.jsonl", "--output", tmp_path / "audit")
    printed = capsys.readouterr().out
    assert re.search(r"^label +share of truth", printed, re.M)
    assert "the mean rating holds" in printed and "assume that the aspects err" in printed


def test_a_repair_by_noisy_ratings_does_not_flatter_the_score():
    """The repair copies errors of the ratings into the score. The estimate stays the squared correlation with the truth
    that the score has after a repair by two of the ratings; the plain correction for attenuation does not."""
    rng, labels, naive = np.random.default_rng(0), Labels(), np.zeros(3)
    deviations = {two: [] for two in combinations(range(4), 2)}
    for _ in range(1500):
        truth = rng.integers(1, 6, size=4)
        ratings = np.clip(truth[:, None] + rng.integers(-4, 5, size=(4, 4)), 1, 5)
        scores = np.clip(2 * truth - 1 + rng.integers(-1, 2, size=4), 1, 10)
        scores = np.where(scores == 1, 10, scores)
        labels.add([
            Answer("m", "r", row.mean(), float(score), {f"a{i}": (str(x), "") for i, x in enumerate(row)}, "")
            for row, score in zip(ratings, scores, strict=True)
        ])  # fmt: skip

        def repaired(means, scores=scores):  # fix_overall_score_issue.py, with nan for what is in doubt
            return np.where(scores < 10, scores, np.where(means <= 2, 1.0, np.where(means <= 4, np.nan, 10.0)))

        for two, found in deviations.items():
            score = repaired(np.delete(ratings, two, axis=1).mean(1))
            kept = np.stack([score, truth])[:, ~np.isnan(score)]
            found += [kept - kept.mean(1, keepdims=True)] if kept.size else []
        kept = np.stack([repaired(ratings.mean(1)), ratings.mean(1)])
        kept = kept[:, ~np.isnan(kept[0])]
        (yy, xy), (_, xx) = np.cov(kept, ddof=0) * kept.shape[1] if kept.shape[1] > 1 else np.zeros((2, 2))
        naive += [xx, yy, xy]
    true = np.mean([np.corrcoef(np.concatenate(found, axis=1))[0, 1] ** 2 for found in deviations.values()])
    estimate = labels.share("overall_score, repaired")
    assert estimate == pytest.approx(true, abs=0.05)
    assert naive[2] ** 2 / naive[0] / naive[1] / labels.share("mean rating") > true + 0.15


def test_without_scores_or_aspects_nothing_is_estimated(tmp_path, capsys):
    records = [record(f"x{i}", completion(A, "5"), completion(B, "4")) for i in range(3)]
    run(write_lines(tmp_path / "raw.jsonl", records), "--output", tmp_path / "audit")
    printed = capsys.readouterr().out
    assert re.search(r"^overall_score +- +- +- +- +-$", printed, re.M)
    assert "holds more truth" not in printed and "holds less truth" not in printed


# ---- findings across files ----


def test_benchmark_questions_are_found_as_by_a_plain_loop(tmp_path):
    """Tülu 3's rule, word by word: in how many of the question's words is there an 8-gram that the prompt has?"""
    rng = random.Random(1)
    vocabulary = "abc"
    questions = [" ".join(rng.choices(vocabulary, k=rng.choice((5, 9, 14, 20)))) for _ in range(60)]
    prompts = [" ".join(rng.choices(vocabulary, k=rng.choice((5, 30, 60)))) for _ in range(60)] + questions[:5]
    file = write_lines(tmp_path / "questions.jsonl", [{"question": question} for question in questions])
    benchmarks, hits = Benchmarks([file]), 0
    for prompt in prompts:
        expected = []
        for line, question in enumerate(questions, 1):
            q, p = question.split(), prompt.split()
            matched = {
                place
                for start in range(len(q) - 7)
                if any(q[start : start + 8] == p[i : i + 8] for i in range(len(p) - 7))
                for place in range(start, start + 8)
            }
            share = len(matched) / len(q) if len(q) >= 8 else float(q == p)
            if share > 0.5:
                expected.append(f"{file}:{line}: {share:.0%} of its words")
        found = [detail for _, detail in benchmarks.findings(prompt)]
        assert len(found) == len(expected) or set(found) <= set(expected)  # of equal short questions the first is named
        assert {one for one in expected if len(questions[int(one.split(":")[1]) - 1].split()) >= 8} <= set(found)
        hits += len(found)
    assert hits > 20


def test_punctuation_and_case_do_not_hide_a_question(tmp_path):
    file = write_lines(tmp_path / "q.jsonl", [{"turns": ["Who was the very first man to walk on the Moon?", "Why?"]}])
    (found,) = Benchmarks([file]).findings("Tell me: who was the VERY first man, to walk on the moon - and when?")
    assert found == ("benchmark overlap", f"{file}:1: 100% of its words")
    assert Benchmarks([file]).findings("why") == [("benchmark overlap", f"{file}:1: 100% of its words")]
    assert not Benchmarks([file]).findings("why not")


def test_held_out_prompts_are_found_exactly_and_nearly(tmp_path):
    """Against all similarities, computed one by one."""
    rng = random.Random(2)
    vocabulary = [f"word{i}" for i in range(500)]
    heldout = [rng.choices(vocabulary, k=rng.randint(3, 60)) for _ in range(150)]
    pair = {"chosen_response": "a", "rejected_response": "b"}
    file = write_lines(tmp_path / "test.jsonl", [pair | {"instruction": " ".join(one)} for one in heldout])
    search, near = Heldout([file]), 0
    assert search.findings(" ".join(heldout[3]).upper() + " ") == [("in the test set", f"{file}:4")]
    for one in heldout:
        prompt = " ".join(one[: rng.randint(len(one) - 6, len(one))] + rng.choices(vocabulary, k=1))
        grams = ngrams(words(prompt), 3)
        best = max(len(grams & other) / len(grams | other) for other in (ngrams(o, 3) for o in heldout))
        assert bool(search.findings(prompt)) == (best >= script.NEAR)
        near += best >= script.NEAR
    assert 30 < near < 140


def test_similarity_is_exact_wherever_it_counts():
    rng = random.Random(3)
    for _ in range(500):
        a, b = ({rng.randint(0, 12) for _ in range(rng.randint(0, 12))} for _ in range(2))
        exact = len(a & b) / len(a | b) if a | b else 0.0
        assert jaccard(a, b) == exact or (jaccard(a, b) == 0 and exact < script.NEAR)


def test_train_and_test_overlap_is_counted(tmp_path, capsys):
    records = random_records(40)
    train = write_lines(tmp_path / "train.jsonl", records)
    test = write_lines(tmp_path / "test.jsonl", [r for r in records[:5]])
    questions = write_lines(tmp_path / "q.jsonl", [{"prompt": records[7]["instruction"]}])
    assert run(train, "--output", tmp_path / "audit", "--test", test, "--benchmark", questions) == 0
    out = capsys.readouterr().out
    known = {one["instruction"] for one in records[:5]}
    inside = sum(one["instruction"] in known for one in records)
    assert re.search(rf"^  in the test set +{inside} ", out, re.M)
    assert re.search(r"^  benchmark overlap +1 ", out, re.M)


# ---- pairs ----


def messages(*contents):
    return [{"role": role, "content": c} for role, c in zip(("user", "assistant") * 3, contents, strict=False)]


def shapes(prompt, chosen, rejected):
    yield {"chosen": messages(prompt, chosen), "rejected": messages(prompt, rejected)}
    yield {"prompt": prompt, "chosen": messages(prompt, chosen), "rejected": messages(prompt, rejected)}
    yield {"prompt": messages(prompt), "chosen": messages("", chosen)[1:], "rejected": messages("", rejected)[1:]}
    yield {"instruction": prompt, "chosen_response": chosen, "rejected_response": rejected}


@pytest.mark.parametrize("shape", range(4))
def test_pairs_are_audited_in_every_shape_and_it_says_so(shape, tmp_path, capsys):
    scores = {"score_chosen": 3.0, "score_rejected": 3.5, "source": "flan", "chosen_model": "x", "rejected-model": "y"}
    texts = [(A, B), (A, A), (A, " "), (A * 9, A * 9 + " ok"), ("Sure! " + A * 3, B)]
    rows = [list(shapes(f"prompt {i}", *pair))[shape] for i, pair in enumerate(texts)]
    rows += [list(shapes("prompt 0", A, B))[shape] | scores]
    pairs = write_lines(tmp_path / "pairs.jsonl", rows)
    assert run(pairs, "--output", tmp_path / "audit") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{pairs}: holds preference pairs, not raw records")
    found = [(int(one["where"].rpartition(":")[2]), one["reason"]) for one in findings(tmp_path / "audit")]
    assert found == [
        (1, "repeated prompt"), (2, "identical answers"), (3, "empty answer"), (4, "near-identical answers"),
        (5, "boilerplate opening"), (6, "not preferred"), (6, "repeated prompt"),
    ]  # fmt: skip
    assert re.search(r"^chosen longer than rejected +2 ", out, re.M)  # the empty one, and "Sure!"
    assert re.search(r"^flan +1 +1 +0.0%", out, re.M) and re.search(r"^y +1 +3.50 ", out, re.M)


def test_a_system_turn_hides_no_prompt_that_is_elsewhere_too(tmp_path):
    first, second = list(shapes("Which prime is even and why?", A, B))[:2]
    system = {"role": "system", "content": "You are a careful assistant who answers at length."}
    framed = {side: [system, *first[side]] for side in ("chosen", "rejected")}
    test = write_lines(tmp_path / "test.jsonl", [framed])
    for row in (framed, second):
        out = tmp_path / "audit"
        audit_files([write_lines(tmp_path / "a.jsonl", [framed, row])], out, test=[test], overwrite=True)
        assert [one["reason"] for one in findings(out)].count("in the test set") == 2
        assert [one["reason"] for one in findings(out)].count("repeated prompt") == 2


def test_means_by_source_of_negative_scores(tmp_path, capsys):
    rows = [next(shapes(f"p{i}", A, B)) | {"score_chosen": -1, "score_rejected": -3, "source": "s"} for i in range(10)]
    assert run(write_lines(tmp_path / "pairs.jsonl", rows), "--output", tmp_path / "audit") == 0
    assert re.search(r"^s +10 .* -2.00", capsys.readouterr().out, re.M)


def test_ratings_out_of_five_are_ratings(tmp_path):
    records = random_records(6)
    for one in records:
        for answer in one["completions"]:
            for note in answer["annotations"].values():
                note["Rating"] = f"{note['Rating']}/5" if note["Rating"] != "N/A" else "N/A"
    plain = audit_files([write_lines(tmp_path / "plain.jsonl", random_records(6))], tmp_path / "a")
    out_of_five = audit_files([write_lines(tmp_path / "five.jsonl", records)], tmp_path / "b")
    assert [row[4:] for row in out_of_five.rows] == [row[4:] for row in plain.rows]


def test_scores_that_are_no_numbers_are_left_out(tmp_path):
    scores = [float("nan"), float("inf"), True, "3", 10**400, None, 2]
    rows = [{"chosen_response": A, "rejected_response": B, "instruction": "p", "chosen_avg_rating": s} for s in scores]
    audit = audit_files([write_lines(tmp_path / "pairs.jsonl", rows)], tmp_path / "audit")
    assert [row[6] for row in audit.rows] == [None] * 6 + [2.0]


def test_marks_made_on_binarizes_pairs_fit_the_raw_records(tmp_path):
    raw = write_lines(tmp_path / "raw.jsonl", random_records(30))
    binarize.binarize_files([raw], tmp_path / "pairs.jsonl")
    of_pairs = audit_files([tmp_path / "pairs.jsonl"], tmp_path / "a")
    of_raw = audit_files([raw], tmp_path / "b")
    assert {tuple(row[-2:]) for row in of_pairs.rows} == {tuple(row[-2:]) for row in of_raw.rows if row[-1]}


# ---- the files ----


def fails(capsys, tmp_path, message, *arguments):
    """Exit code 2, one line on stderr, and no file was made or changed."""
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("audit.py: error: ") and captured.err.count("\n") == 1 and not captured.out
    assert message in captured.err, captured.err
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert {path for path in after if path not in before} == set()


@pytest.mark.parametrize("name", BAD)
def test_what_binarize_refuses_is_refused(name, tmp_path, capsys):
    """Except for pairs, which are audited, and a file of which no pair is left, which is worth a look."""
    content, message, *_ = BAD[name]
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(content if isinstance(content, bytes) else content.encode())
    if "no pair is left" in message or "already binarized" in message:
        return
    where = message if message.startswith(":") and "parquet" not in message else ""
    fails(capsys, tmp_path, f"{raw}{where}", raw, "--output", tmp_path / "audit")


def test_bad_paths_and_arguments(tmp_path, capsys):
    raw = write_lines(tmp_path / "raw.jsonl", random_records(5))
    pairs = write_lines(tmp_path / "pairs.jsonl", shapes("p", A, B))
    output = ("--output", tmp_path / "audit")
    fails(capsys, tmp_path, "none.jsonl: no such file", tmp_path / "none.jsonl", *output)
    fails(capsys, tmp_path, "raw.jsonl: given twice", raw, raw, *output)
    fails(capsys, tmp_path, f"{raw} holds raw records and {pairs} pairs", raw, pairs, *output)
    fails(capsys, tmp_path, f"{raw}: is not a folder", pairs, "--output", raw, "--overwrite")
    fails(capsys, tmp_path, "holds pairs.jsonl, which is no part of an audit", raw, "--output", tmp_path, "--overwrite")
    no_question = write_lines(tmp_path / "q.jsonl", [{"text": "x"}])
    fails(capsys, tmp_path, f"{no_question}:1: no question in", raw, *output, "--benchmark", no_question)
    wrong = write_lines(tmp_path / "w.jsonl", [{"chosen": "x", "rejected": []}])
    fails(capsys, tmp_path, f"{wrong}:1: ", wrong, *output)
    without = write_lines(tmp_path / "s.jsonl", [record("x", completion(A, "5", score=2), completion(B, "4"))])
    fails(
        capsys, tmp_path, "s.jsonl:1: completion 2: overall_score is missing", without, *output, "--by", "overall-score"
    )


def test_an_older_audit_is_kept_unless_told_otherwise(tmp_path, capsys):
    raw = write_lines(tmp_path / "raw.jsonl", random_records(5))
    assert run(raw, "--output", tmp_path / "audit") == 0
    capsys.readouterr()
    old = (tmp_path / "audit" / "audit.jsonl").read_bytes()
    fails(capsys, tmp_path, "audit: exists; --overwrite replaces it", raw, "--output", tmp_path / "audit")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(raw.read_text() + "{\n")
    fails(capsys, tmp_path, "bad.jsonl:6: malformed JSON", bad, "--output", tmp_path / "audit", "--overwrite")
    assert (tmp_path / "audit" / "audit.jsonl").read_bytes() == old
    write_lines(raw, random_records(9, seed=1))
    assert run(raw, "--output", tmp_path / "audit", "--overwrite") == 0
    assert (tmp_path / "audit" / "audit.jsonl").read_bytes() != old
    assert {path.name for path in tmp_path.iterdir()} == {"audit", "bad.jsonl", "raw.jsonl"}


def test_without_datasketch_near_duplicates_are_refused_with_the_cure(tmp_path, capsys, monkeypatch):
    raw = write_lines(tmp_path / "raw.jsonl", random_records(5))
    test = write_lines(tmp_path / "test.jsonl", random_records(5, seed=1))
    monkeypatch.setitem(sys.modules, "datasketch", None)
    fails(capsys, tmp_path, "pip install datasketch", raw, "--output", tmp_path / "audit", "--test", test)


def test_pairs_without_notus_are_refused_with_the_cure(tmp_path, capsys, monkeypatch):
    pairs = write_lines(tmp_path / "pairs.jsonl", shapes("p", A, B))
    monkeypatch.setitem(sys.modules, "notus.rows", None)
    fails(capsys, tmp_path, "pairs.jsonl: holds pairs, which notus reads", pairs, "--output", tmp_path / "audit")


def test_an_older_audit_comes_back_if_the_new_one_cannot_have_its_name(tmp_path, capsys, monkeypatch):
    raw = write_lines(tmp_path / "raw.jsonl", random_records(5))
    assert run(raw, "--output", tmp_path / "audit") == 0
    old, rename = (tmp_path / "audit" / "index.html").stat().st_ino, Path.rename
    monkeypatch.setattr(
        Path, "rename", lambda a, b: rename(a, b) if a.suffix != ".tmp" else Path("/dev/full/x").touch()
    )
    capsys.readouterr()
    fails(capsys, tmp_path, "/dev/full/x", raw, "--output", tmp_path / "audit", "--overwrite")
    assert (tmp_path / "audit" / "index.html").stat().st_ino == old


@pytest.mark.parametrize("kind, loaded", [("raw", set()), ("pairs", {"notus"})])
def test_audit_stands_alone(kind, loaded, tmp_path):
    """Raw records need binarize.py and nothing else of ours. Pairs need notus/rows.py, and still no torch."""
    rows = random_records(5) if kind == "raw" else shapes("p", A, B)
    file = write_lines(tmp_path / "rows.jsonl", rows)
    command = [sys.executable, "-X", "importtime", ROOT / "audit.py", file, "--output", tmp_path / "audit"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    names = {line.rsplit("|", 1)[1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "binarize" in names
    assert names & {"torch", "notus", "numpy", "datasketch", "transformers"} == loaded


# ---- marks ----


def mark(record_, kind, pair=None, **more):
    instruction = record_["instruction"] if isinstance(record_, dict) else record_
    made = {"prompt_id": binarize.prompt_id_of(instruction), "mark": kind} | more
    return made if pair is None else made | {"pair": pair}


def curate(tmp_path, records, marks, *more):
    raw, file = write_lines(tmp_path / "raw.jsonl", records), write_lines(tmp_path / "marks.jsonl", marks)
    output = tmp_path / "curated.jsonl"
    arguments = [raw, "--output", output, "--overwrite", "--curation", file, *more]
    return binarize.main([str(one) for one in arguments]), output


def test_marks_keep_flip_and_drop(tmp_path, capsys):
    records = random_records(20)[2:8]
    binarize.binarize_files([write_lines(tmp_path / "raw.jsonl", records)], tmp_path / "plain.jsonl")
    plain = {pair["prompt_id"]: pair for pair in read(tmp_path / "plain.jsonl")}
    assert len(plain) == 6
    marks = [mark(one, kind) for one, kind in zip(records, ("keep", "flip", "drop", "note"), strict=False)]
    code, output = curate(tmp_path, records, marks)
    curated = {pair["prompt_id"]: pair for pair in read(output)}
    ids = [one["prompt_id"] for one in marks]
    assert code == 0 and plain.keys() - curated.keys() == {ids[2]}
    swap = {"chosen": "rejected", "rejected": "chosen"}
    flipped = {re.sub("chosen|rejected", lambda m: swap[m[0]], key): value for key, value in plain[ids[1]].items()}
    assert curated[ids[1]] == flipped
    assert all(curated[key] == plain[key] for key in curated if key != ids[1])
    counts = table_of(capsys)
    assert [counts[name] for name in ("dropped: marked drop", "marked keep", "marked flip", "marked note")] == [1] * 4


def test_a_mark_of_a_pair_leaves_the_other_pairs_of_its_prompt_alone(tmp_path):
    records = [record("same", completion(f"{i} {A}", "5"), completion(f"{i} {B}", "4")) for i in range(3)]
    raw = write_lines(tmp_path / "raw.jsonl", [*records, record("same", completion("x", "5"))])
    rows = audit_files([raw], tmp_path / "audit").rows
    assert rows[3][-1] == ""
    code, output = curate(tmp_path, records, [mark("same", "drop", rows[1][-1])])
    assert code == 0 and [pair["chosen"][1]["content"][0] for pair in read(output)] == ["0", "2"]
    records.append(record("same", completion("x", "5")))
    code, output = curate(tmp_path, records, [mark("same", "drop", "")])  # of the record that makes no pair
    assert code == 0 and len(read(output)) == 3


GOOD = [record("a", completion(A, "5"), completion(B, "4"), completion("c d e", "1")), record("b", completion(A, "5"))]


@pytest.mark.parametrize(
    "marks, message",
    [
        ([mark("another", "keep")], "1: the mark fits no record (1 of 1 do not); the marks are of another data set"),
        ([mark("a", "keep"), mark("another", "drop")], "2: the mark fits no record (1 of 2 do not)"),
        ([mark("a", "flip", "0123456789abcdef")], "1: the mark fits no record"),
        ([mark("a", "maybe")], '1: the mark is "maybe", expected one of keep, flip, drop, note'),
        ([mark("a", "keep"), mark("a", "drop")], "marks.jsonl:2: marks the same pair as"),
        ([mark("b", "flip")], "1 flips its pair, but the record makes none: one completion only"),
        ([{"mark": "keep"}], '1: no field "prompt_id"'),
        ([["keep"]], '1: "keep" is not a JSON object'),
        ([mark("a", "keep", 7)], '1: "pair" is 7, expected a string'),
        (GOOD, '1: no field "mark"'),
    ],
)
def test_marks_that_are_refused(marks, message, tmp_path, capsys):
    code, output = curate(tmp_path, GOOD, marks)
    captured = capsys.readouterr()
    assert code == 2 and message in captured.err and captured.err.count("\n") == 1
    assert str(tmp_path / "marks.jsonl") in captured.err
    assert not output.exists()


def test_marks_of_another_seed_are_refused_where_the_pair_is_another(tmp_path, capsys):
    raw = write_lines(tmp_path / "raw.jsonl", GOOD)
    pair = audit_files([raw], tmp_path / "audit").rows[0][-1]
    seeds = [
        seed
        for seed in range(20)
        if audit_files([raw], tmp_path / "other", seed=seed, overwrite=True).rows[0][-1] != pair
    ]
    assert seeds
    assert curate(tmp_path, GOOD, [mark("a", "flip", pair)])[0] == 0
    assert curate(tmp_path, GOOD, [mark("a", "flip", pair)], "--seed", seeds[0])[0] == 2
    assert "made with another --by or --seed" in capsys.readouterr().err


def test_a_file_of_marks_that_is_none(tmp_path, capsys):
    raw = write_lines(tmp_path / "raw.jsonl", GOOD)
    for path, message in ((tmp_path / "none", "no such file"), (tmp_path, "is a folder")):
        assert binarize.main([str(raw), "--output", str(tmp_path / "o.jsonl"), "--curation", str(path)]) == 2
        assert message in capsys.readouterr().err


# ---- the page ----

HOSTILE = (
    "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'><!-- <script> &lt; \u2028 NONCE"
)


def hostile_records():
    bad = completion(HOSTILE, model=HOSTILE, score=10) | {"critique": HOSTILE}
    bad["annotations"] = {HOSTILE: {"Rating": "1", "Rationale": HOSTILE}}
    return [record(f"{HOSTILE}\nSecond line", bad, completion(B, "4", score=3), source=HOSTILE)]


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.data = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if data.strip():
            self.data.append((self.tags[-1][1].get("id") if self.tags else None, data))


@pytest.mark.parametrize("inline", [0, script.INLINE_BYTES])
def test_hostile_texts_stay_texts(inline, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "INLINE_BYTES", inline)
    tags = {}
    for name, records in (("plain", random_records(1)), ("hostile", hostile_records())):
        audit_files([write_lines(tmp_path / f"{name}.jsonl", records)], tmp_path / name)
        page = Tags()
        page.feed((tmp_path / name / "index.html").read_text())
        tags[name] = [tag for tag, _ in page.tags]
    assert tags["hostile"] == tags["plain"]
    (data,) = (json.loads(data) for tag, data in page.data if tag == "data")
    assert data["rows"][0][data["columns"].index("source")] == HOSTILE
    chunks = list((tmp_path / "hostile").glob("records/*.js"))
    assert len(chunks) == (inline == 0)
    assert all("<" not in chunk.read_text() for chunk in chunks)


def test_a_terminal_gets_no_control_characters(tmp_path, capsys):
    answers = [completion(A, "5", model="\x1b[2Jred"), completion(B, "4", model="m" * 99)]
    assert run(write_lines(tmp_path / "r.jsonl", [record("x", *answers)]), "--output", tmp_path / "audit") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "?[2Jred" in out and "m" * 41 not in out


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser):
    """open(folder) -> a tab with the page. The test fails if a script did, or if anything but files was asked for."""
    contexts, problems = [], []

    def open_page(folder, **options):
        context = browser.new_context(viewport={"width": 1400, "height": 900}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on(
            "console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None
        )
        tab.on("request", lambda r: None if r.url.startswith(("file:", "blob:", "data:")) else problems.append(r.url))
        tab.goto((folder / "index.html").as_uri())
        tab.wait_for_selector(".answer")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert not problems


def shows(tab, selector, text):
    """Wait until an element has this text. (Functions to wait for would be evaluated, which the page forbids.)"""
    tab.wait_for_selector(f'{selector}:text-is("{text}")', timeout=10_000)


def press(tab, *keys):
    for key in keys:
        tab.keyboard.press(key)


@pytest.mark.parametrize("inline", [0, script.INLINE_BYTES])
def test_three_marks_change_exactly_three_pairs(inline, opened, tmp_path, monkeypatch):
    """Filter, mark three rows with the keyboard, reload, download, apply."""
    monkeypatch.setattr(script, "INLINE_BYTES", inline)
    raw = write_lines(tmp_path / "raw.jsonl", random_records(250))
    binarize.binarize_files([raw], tmp_path / "plain.jsonl")
    audit = audit_files([raw], tmp_path / "audit")
    assert len(list((tmp_path / "audit").glob("records/*.js"))) == (3 if inline == 0 else 0)
    tab = opened(tmp_path / "audit")
    tab.select_option('[tabulator-field="reasons"] select', "rules differ")
    tab.focus('[tabulator-field="margin"] input')
    tab.keyboard.type(">=1")
    rows = [row for row in audit.rows if "rules differ" in row[3].split("; ") and (row[7] or 0) >= 1]
    shows(tab, "#shown", f"{len(rows)} of 250 records")
    assert len(rows) > 10
    press(tab, "Escape", "ArrowDown", "f", "d", "ArrowDown", "ArrowDown", "ArrowUp", "f")
    tab.reload()
    tab.wait_for_selector(".answer")
    assert tab.inner_text("#marked") == "3 marked: 2 flip, 1 drop"
    with tab.expect_download() as download:
        tab.click("#download")
    download.value.save_as(tmp_path / "marks.jsonl")
    wanted = [(rows[1], "flip"), (rows[2], "drop"), (rows[4], "flip")]
    marks = read(tmp_path / "marks.jsonl")
    assert [(m["prompt_id"], m["pair"], m["mark"]) for m in marks] == [(row[-2], row[-1], kind) for row, kind in wanted]
    binarize.binarize_files([raw], tmp_path / "curated.jsonl", curation=tmp_path / "marks.jsonl")
    plain, curated = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("plain", "curated"))
    gone, new = set(plain) - set(curated), set(curated) - set(plain)
    assert {json.loads(line)["prompt_id"] for line in gone} == {row[-2] for row, _ in wanted}
    assert {json.loads(line)["prompt_id"] for line in new} == {row[-2] for row, kind in wanted if kind == "flip"}
    assert len(gone) == 3 and len(new) == 2 and len(plain) == len(curated) + 1


def test_hostile_texts_do_nothing_in_the_browser(opened, tmp_path):
    audit_files([write_lines(tmp_path / "raw.jsonl", hostile_records() + random_records(3))], tmp_path / "audit")
    tab = opened(tmp_path / "audit")
    press(tab, "n")
    tab.keyboard.type(HOSTILE[:40])
    press(tab, "Escape", "?", "Escape")
    tab.select_option('[tabulator-field="source"] select', HOSTILE)
    shows(tab, "#shown", "1 of 4 records")
    assert tab.inner_text(".prompt") == f"{HOSTILE}\nSecond line"
    assert HOSTILE in tab.inner_text(".tabulator-row") and HOSTILE in tab.inner_text(".answer.rejected")
    assert tab.evaluate("[window.hacked, document.querySelectorAll('img').length]") == [None, 0]


def test_the_page_needs_no_mouse(opened, tmp_path):
    audit = audit_files([write_lines(tmp_path / "raw.jsonl", random_records(40))], tmp_path / "audit")
    tab = opened(tmp_path / "audit")
    # Sort by disagreement: to the prompt's filter, then Tab until the title of that column has the focus.
    press(tab, "/")
    focus = "document.activeElement.textContent.trim()"
    for _ in range(30):
        if tab.evaluate(focus) == "disagreement":
            break
        press(tab, "Tab")
    press(tab, "Enter", "Enter")
    known = [(row[8], -i) for i, row in enumerate(audit.rows) if row[8] is not None]
    shows(tab, ".tabulator-row:first-child .tabulator-cell:first-child", str(1 - max(known)[1]))
    # Filter by a text, and come back with Escape.
    press(tab, "/")
    tab.keyboard.type("instruction 17")
    shows(tab, "#shown", "1 of 40 records")
    press(tab, "Escape", "k", "n")
    tab.keyboard.type("fine dk")
    press(tab, "Escape", "k")
    assert tab.inner_text("#marked") == "1 marked: 1 keep"
    assert tab.inner_text(".tabulator-row .mark") == "keep"
    with tab.expect_download() as download:
        tab.focus("#download")
        press(tab, "Enter")
    assert json.loads(Path(download.value.path()).read_text())["note"] == "fine dk"
    press(tab, "u")
    assert tab.inner_text("#marked") == "nothing marked"  # the focus is on a button, but the key is ours
    press(tab, "?")
    assert tab.is_visible("#overview") and "tie for the best" in tab.inner_text("#overview")
    press(tab, "d", "Escape")
    assert not tab.is_visible("#overview") and "drop" not in tab.inner_text("#marked")


def test_the_keyboard_goes_through_all_chunks_and_the_row_stays_in_sight(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "INLINE_BYTES", 0)
    monkeypatch.setattr(script, "CHUNK", 20)
    audit_files([write_lines(tmp_path / "raw.jsonl", random_records(50))], tmp_path / "audit")
    tab = opened(tmp_path / "audit")
    press(tab, *["ArrowDown"] * 45)
    tab.wait_for_selector(".where:has-text('raw.jsonl:46 flan')")
    table, row = (
        tab.locator(selector).bounding_box() for selector in (".tabulator-tableholder", ".tabulator-selected")
    )
    assert table["y"] - 1 <= row["y"] and row["y"] + row["height"] <= table["y"] + table["height"] + 1
    assert tab.inner_text(".answer pre") == "answer 45.0 é"


def test_marks_are_loaded_again_and_those_of_another_set_are_not(opened, tmp_path):
    records = random_records(6)
    audit = audit_files([write_lines(tmp_path / "raw.jsonl", records)], tmp_path / "audit")
    tab = opened(tmp_path / "audit")
    good = write_lines(tmp_path / "marks.jsonl", [mark(records[3], "drop", audit.rows[3][-1], note="why")])
    tab.set_input_files("#file", good)
    shows(tab, "#marked", "1 marked: 1 drop")
    said = []
    tab.on("dialog", lambda dialog: (said.append(dialog.message), dialog.accept()))
    tab.set_input_files("#file", write_lines(tmp_path / "other.jsonl", [mark("another", "drop", "")]))
    tab.wait_for_timeout(300)
    assert "other.jsonl is not loaded. no record here has this mark" in said[0]
    assert tab.inner_text("#marked") == "1 marked: 1 drop"
    for kind in ("flip", "keep"):  # the same file, changed
        write_lines(good, [mark(records[3], kind, audit.rows[3][-1])])
        with tab.expect_file_chooser() as chooser:
            tab.click("#load")
        chooser.value.set_files(good)
        shows(tab, "#marked", f"1 marked: 1 {kind}")


def test_two_tabs_have_the_same_marks(opened, tmp_path):
    audit_files([write_lines(tmp_path / "raw.jsonl", random_records(6))], tmp_path / "audit")
    tab = opened(tmp_path / "audit")
    other = tab.context.new_page()
    other.goto(tab.url)
    other.wait_for_selector(".answer")
    press(tab, "d", "f")
    shows(other, "#marked", "2 marked: 1 flip, 1 drop")
    press(other, "ArrowDown", "ArrowDown", "k")
    shows(tab, "#marked", "3 marked: 1 keep, 1 flip, 1 drop")
    tab.reload()
    shows(tab, "#marked", "3 marked: 1 keep, 1 flip, 1 drop")


CONTRAST = """() => {
    const part = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    const light = (color) => {
        const [r, g, b] = color.match(/[\\d.]+/g).map((c) => part(c / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const back = (e) => {
        const color = getComputedStyle(e).backgroundColor;
        return color === 'rgba(0, 0, 0, 0)' && e.parentElement ? back(e.parentElement) : color;
    };
    const hasText = (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const shown = (e) => e.checkVisibility() && !e.closest('script, style, :disabled');
    return [...document.querySelectorAll('body *')].filter((e) => hasText(e) && shown(e)).map((e) => {
        const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), `${e.tagName}.${e.className} ${e.textContent.slice(0, 30)}`];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_legible(scheme, opened, tmp_path):
    """A contrast of at least 4.5 to 1 for every text that is shown: WCAG 2.1, criterion 1.4.3."""
    audit_files([write_lines(tmp_path / "raw.jsonl", random_records(30))], tmp_path / "audit")
    tab = opened(tmp_path / "audit", color_scheme=scheme)
    press(tab, "f", "d", "k", "ArrowUp")
    tab.wait_for_selector('button[aria-pressed="true"]')
    found = tab.evaluate(CONTRAST)
    press(tab, "?")
    found += tab.evaluate(CONTRAST)
    assert len(found) > 200
    assert not [one for one in found if one[0] < 4.5]
    dark = sum(map(int, re.findall(r"\d+", tab.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])) < 200
    assert dark == (scheme == "dark")


def test_a_chunk_that_is_missing_is_named(browser, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "INLINE_BYTES", 0)
    audit_files([write_lines(tmp_path / "raw.jsonl", random_records(3))], tmp_path / "audit")
    os.remove(tmp_path / "audit" / "records" / "0.js")
    tab = browser.new_page()
    tab.goto((tmp_path / "audit" / "index.html").as_uri())
    assert "records/0.js is missing" in tab.inner_text(".problem")
    tab.close()
