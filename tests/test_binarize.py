"""Laws of binarize.py: the rules, one output for all layouts of the files, and errors that leave nothing behind."""

import codecs
import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import binarize as script  # noqa: E402
from binarize import Drop, Options, binarize, binarize_files, main, mean_rating, parse_record, read_pairs  # noqa: E402

ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")


def completion(response, *ratings, score=None, model=None):
    """`ratings` in the order of ASPECTS; fewer leave the last aspects out."""
    annotations = {aspect: {"Rating": rating} for aspect, rating in zip(ASPECTS, ratings, strict=False)}
    made = {"model": model or f"model of {response}", "response": response, "annotations": annotations}
    return made if score is None else made | {"overall_score": score}


def record(instruction, *completions, source="flan"):
    return {"source": source, "instruction": instruction, "completions": list(completions)}


def random_records(count, seed=0):
    """Four completions each, of unlike ratings; every tenth instruction is another's, as in the real data."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        ratings = [[rng.choice(("1", "2", "3", "4", "5", "N/A")) for _ in ASPECTS] for _ in range(4)]
        answers = [completion(f"answer {i}.{j} é", *r, score=rng.randint(1, 10)) for j, r in enumerate(ratings)]
        records.append(record(f"instruction {i - i % 10 if i % 10 == 1 else i}", *answers))
    return records


def write_lines(path, records):
    text = "".join(json.dumps(one) + "\n" for one in records)
    with gzip.open(path, "wt") if path.suffix == ".gz" else open(path, "w") as file:
        file.write(text)
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(*arguments):
    return main([str(argument) for argument in arguments])


def table_of(capsys):
    """The closing table as {name: count}."""
    lines = capsys.readouterr().out.splitlines()
    matches = [re.fullmatch(r"\s*(.*?)\s+([\d,]+)(\s+[\d.]+%)?", line) for line in lines]
    return {match[1]: int(match[2].replace(",", "")) for match in matches}


def pair_of(raw, **options):
    return binarize(parse_record(raw), **options)


# ---- ratings ----


def test_means_of_the_first_record_of_ultrafeedback():
    """alpaca-7b 1.25, pythia-12b 1.25, starchat 5, vicuna-33b 4: starchat is chosen, any other may be rejected."""
    answers = [
        completion("a", "1", "1", "1", "2", model="alpaca-7b"),
        completion("b", "2", "1", "1", "1", model="pythia-12b"),
        completion("c", "5", "5", "5", "5", model="starchat"),
        completion("d", "5", "4", "3", "4", model="vicuna-33b"),
    ]
    assert [mean_rating(answer) for answer in answers] == [1.25, 1.25, 5.0, 4.0]
    pairs = [pair_of(record("x", *answers), seed=seed) for seed in range(60)]
    assert {pair["chosen_model"] for pair in pairs} == {"starchat"}
    assert {(p["rejected_model"], p["score_rejected"]) for p in pairs} == {
        ("alpaca-7b", 1.25),
        ("pythia-12b", 1.25),
        ("vicuna-33b", 4.0),
    }


@pytest.mark.parametrize(
    ("annotations", "mean"),
    [
        ({"honesty": {"Rating": "N/A"}, "truthfulness": {"Rating": "2"}, "helpfulness": {"Rating": "5"}}, 3.5),
        ({"honesty": {}, "truthfulness": {"Rating": 2}}, 2.0),
        ({"honesty": None, "truthfulness": {"Rating": None}, "helpfulness": {"Rating": "3"}}, 3.0),
        ({"honesty": [{"Rating": "4", "Rationale": "so"}], "helpfulness": [{"Rating": "1"}]}, 2.5),
        ({"honesty": {"Rating": "N/A"}}, None),
        ({}, None),
        (None, None),
    ],
)
def test_absent_ratings_are_left_out_of_the_mean(annotations, mean):
    assert mean_rating({"annotations": annotations}) == mean
    if annotations is None:
        assert mean_rating({}) is None


@pytest.mark.parametrize("rating", [1, 5, 4.0, 2.5, "1", "5", "2.5", "4.0", "4/5"])
def test_ratings_that_are_read(rating):
    value = float(str(rating).removesuffix("/5"))
    assert mean_rating({"annotations": {"honesty": {"Rating": rating}}}) == value


@pytest.mark.parametrize(
    "rating",
    [
        *("77", "0", "6", "5.1", "0.9", "-3", "+4", "1_0", "4/0", "4/10", "4/5/5", "/5", "4/", "1e0", "nan", "inf"),
        *("0x4", "04", "4.", ".5", "٤", "4,5", "", "n/a", "good"),
    ],
)
def test_ratings_that_are_refused(rating):
    """Above all what float() would take: signs, exponents, underscores, spaces, and digits of other scripts."""
    for text in (rating, f" {rating}", f"{rating}\n", f"{rating}\0"):
        with pytest.raises(ValueError, match=r'^honesty rating is ".*, expected a number from 1 to 5, or "N/A"$'):
            mean_rating({"annotations": {"honesty": {"Rating": text}}})


@pytest.mark.parametrize("value", [0, 6, -3, 0.99, 10**400, float("nan"), float("inf"), True, False, [4], {"a": 4}])
def test_json_ratings_that_are_refused(value):
    with pytest.raises(ValueError, match=r"honesty rating is .*, expected a number from 1 to 5"):
        mean_rating({"annotations": {"honesty": {"Rating": value}}})


@pytest.mark.parametrize(
    "score", [1, 10, 7.5, "1", "10", "7.5", "8/10", "7.5/10", None, "N/A", 0, -1, 11, "-1", "8/1", "8/"]
)
def test_overall_scores(score):
    """A score up to 10, also as "8/10", is read. null and "N/A" are no score."""
    raw = record("x", completion("a", "5") | {"overall_score": score})
    if score in (-1, 11, "-1", "8/1", "8/"):
        with pytest.raises(ValueError, match=r"completion 1: overall_score is .*, expected a number from 0 to 10"):
            parse_record(raw)
    else:
        read = parse_record(raw).completions[0].overall_score
        assert read == (None if score in (None, "N/A") else float(str(score).removesuffix("/10")))


def test_rejected_is_strictly_lower_and_chosen_the_first_of_the_best():
    made = 0
    for raw in random_records(300):
        pair, means = pair_of(raw), [mean_rating(answer) for answer in raw["completions"]]
        best = max(mean for mean in means if mean is not None)
        if isinstance(pair, Drop):
            assert pair == Drop.TIED and set(means) <= {best, None}
            continue
        made += 1
        assert pair["score_rejected"] < pair["score_chosen"] == best
        assert pair["chosen"][-1]["content"] == raw["completions"][means.index(best)]["response"]
    assert made > 250


def test_rejected_is_uniform_among_the_lower_and_the_seed_moves_nothing_else():
    answers = [
        completion("a", "2"),
        completion("b", "5"),
        completion("c", "5"),
        completion("d", "4"),
        completion("e", "1"),
    ]
    count = 3000
    by_seed = [[pair_of(record(f"instruction {i}", *answers), seed=seed) for i in range(count)] for seed in (1, 2)]
    for pairs in by_seed:
        drawn = [pair["rejected"][-1]["content"] for pair in pairs]
        chi_square = sum((drawn.count(answer) - count / 3) ** 2 / (count / 3) for answer in "ade")
        assert set(drawn) == set("ade") and chi_square < 13.8  # 2 degrees of freedom: p = 0.001
    assert all(one["chosen"] == other["chosen"] for one, other in zip(*by_seed, strict=True))
    agreeing = sum(one["rejected"] == other["rejected"] for one, other in zip(*by_seed, strict=True))
    assert abs(agreeing / count - 1 / 3) < 0.04  # two seeds are independent draws


@pytest.mark.parametrize(
    ("answers", "drop"),
    [
        ([], Drop.NO_COMPLETIONS),
        ([completion("a", "5")], Drop.ONE_COMPLETION),
        ([completion("a"), completion("b", "N/A")], Drop.UNRATED),
        ([completion("a", "5"), completion("b")], Drop.UNRATED),
        ([completion("a", "5", "3"), completion("b", "4"), completion("c", 4, "N/A", 4)], Drop.TIED),
        ([completion(" \n", "5"), completion("b", "4")], Drop.EMPTY_ANSWER),
        ([completion("a", "5"), completion("", "4")], Drop.EMPTY_ANSWER),
        ([completion("a", "5"), completion("a", "4")], Drop.SAME_ANSWER),
    ],
)
def test_reasons_to_drop(answers, drop, tmp_path, capsys):
    assert pair_of(record("x", *answers)) is drop
    raw = write_lines(
        tmp_path / "raw.jsonl", [record("x", *answers), record("y", completion("a", "5"), completion("b", "4"))]
    )
    assert run(raw, "--output", tmp_path / "pairs.jsonl") == 0
    table = table_of(capsys)
    assert (table["records"], table[f"dropped: {drop}"], table["pairs"]) == (2, 1, 1)
    assert sum(count for name, count in table.items() if name.startswith("dropped")) == 1


# ---- overall score ----


def test_overall_score_rule():
    """The first of the highest; then any that differs in score, text or model, an equal score included."""
    answers = [
        completion("a", score=3),
        completion("b", score="8/10"),
        completion("b", score="8"),  # the same completion twice is never its own rejected
        completion("c", score=8.0),
    ]
    pairs = [pair_of(record("x", *answers), by="overall-score", seed=seed) for seed in range(60)]
    assert {pair["chosen_model"] for pair in pairs} == {"model of b"}
    assert {(pair["rejected"][-1]["content"], pair["score_rejected"]) for pair in pairs} == {("a", 3.0), ("c", 8.0)}
    assert all(isinstance(pair[key], float) for pair in pairs for key in ("score_chosen", "score_rejected"))
    assert pair_of(record("x", answers[1], answers[2]), by="overall-score") is Drop.SAME_ANSWER
    assert pair_of(record("x", answers[1]), by="overall-score") is Drop.ONE_COMPLETION


def test_table_counts_the_bug_and_the_disagreement(tmp_path, capsys):
    """A 1 that UltraFeedback wrote as 10: the two rules choose differently, and the completion is counted."""
    raw = [
        record("planted", completion("bad", "1", "2", score=10), completion("good", "5", "5", score=7)),
        record("sound", completion("bad", "2", score=2), completion("good", "5", score=10)),
        record("between", completion("fair", "3", score=10), completion("good", "4", "5", score="9")),
        record("without", completion("bad", "1"), completion("good", "4", score=5)),
        record("tied", completion("a", "2", score=10), completion("b", "2", score=5)),
    ]
    assert run(write_lines(tmp_path / "raw.jsonl", raw), "--output", tmp_path / "pairs.jsonl") == 0
    table = table_of(capsys)
    assert (table["records"], table["pairs"], table["dropped: all tied"]) == (5, 4, 1)
    assert (table["records on which both rules choose"], table["their chosen answers differ"]) == (3, 2)
    assert table["completions with overall_score 10"] == 4
    assert table["whose mean rating is at most 2"] == 2


# ---- files ----


def test_output_is_exactly_the_documented_form(tmp_path):
    raw = record(
        "Où ?", completion("Là.", "5", "4", model="gpt-4"), completion("No.", 3, model="bard"), source="sharegpt"
    )
    path = write_lines(tmp_path / "raw.jsonl", [raw])
    user = {"role": "user", "content": "Où ?"}
    expected = {
        "chosen": [user, {"role": "assistant", "content": "Là."}],
        "rejected": [user, {"role": "assistant", "content": "No."}],
        "score_chosen": 4.5,
        "score_rejected": 3.0,
        "prompt_id": hashlib.sha256("Où ?".encode()).hexdigest(),
        "source": "sharegpt",
        "chosen_model": "gpt-4",
        "rejected_model": "bard",
    }
    assert run(path, "--output", tmp_path / "pairs.jsonl") == 0
    line = (tmp_path / "pairs.jsonl").read_bytes().decode()
    assert line == json.dumps(expected, ensure_ascii=False) + "\n" and '"score_rejected": 3.0' in line

    assert run(path, "--output", tmp_path / "system.jsonl", "--system-prompt", "") == 0
    (pair,) = read(tmp_path / "system.jsonl")
    system = [{"role": "system", "content": ""}]
    assert pair == expected | {side: system + expected[side] for side in ("chosen", "rejected")}


@pytest.mark.parametrize("by", ["ratings", "overall-score"])
def test_layout_of_the_input_changes_no_byte(tmp_path, by):
    """Shuffled, in three files in another order, packed, as an array, under names that say something else."""
    records = random_records(200)
    shuffled = random.Random(1).sample(records, len(records))
    thirds = [write_lines(tmp_path / f"{i}.jsonl{'.gz' * (i == 1)}", shuffled[i::3]) for i in range(3)]
    lines = write_lines(tmp_path / "all.jsonl", records)
    layouts = [[lines], thirds, thirds[::-1]]

    def layout(name, content):
        (tmp_path / name).write_bytes(content)
        layouts.append([tmp_path / name])

    one_line, indented = json.dumps(shuffled).encode(), json.dumps(records, indent=4, ensure_ascii=False).encode()
    layout("array.json", one_line)
    layout("array.jsonl", b" " * 100 + b"\n" * 100 + indented + b"\n")
    layout("array.json.gz", gzip.compress(one_line))
    layout("packed.jsonl", gzip.compress(lines.read_bytes()))
    layout("packed-twice.gz", gzip.compress(lines.read_bytes()[:9000]) + gzip.compress(lines.read_bytes()[9000:]))
    layout("not-packed.jsonl.gz", lines.read_bytes())
    layout("lines.json", b"\n\n" + lines.read_bytes().replace(b"\n", b"\r\n\r\n"))
    layout("marked.jsonl", codecs.BOM_UTF8 + lines.read_bytes())
    layout("marked.json", codecs.BOM_UTF8 + b"\r\n" + indented)
    layout("marked.json.gz", gzip.compress(codecs.BOM_UTF8 + one_line))
    written = set()
    for number, raw in enumerate(layouts):
        output = tmp_path / f"out{number}.jsonl"
        assert run(*raw, "--output", output, "--test-size", 20, "--by", by) == 0, raw
        written.add((output.read_bytes(), (tmp_path / f"out{number}-test.jsonl").read_bytes()))
    assert len(written) == 1


def test_output_has_not_changed(tmp_path):
    """Digests of what the first version of this file wrote for these records."""
    raw, output = write_lines(tmp_path / "raw.jsonl", random_records(200)), tmp_path / "pairs.jsonl"
    digests = []
    for by in ("ratings", "overall-score"):
        assert run(raw, "--output", output, "--test-size", 20, "--by", by, "--overwrite") == 0
        digests += [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(tmp_path.glob("pairs*"))]
    assert digests == ["a51bca191190fec0", "d173422620c4c0e8", "fa8efda03dc2cb31", "b53e0124c021a836"]


def test_from_python_with_plain_arguments(tmp_path, capsys):
    raw, output = write_lines(tmp_path / "raw.jsonl", random_records(50)), tmp_path / "pairs.jsonl"
    pairs, counts = read_pairs([raw], Options("overall-score", 3, "Be brief."))
    assert pairs == sorted(pairs) and len(pairs) == counts["pairs"] > 40
    assert binarize_files([str(raw)], str(output), by="overall-score", seed=3, system_prompt="Be brief.") == (
        counts,
        {output: len(pairs)},
    )
    assert output.read_bytes() == b"".join(line for _, line in pairs)
    for wrong, message in (({"by": "critique"}, "by is 'critique'"), ({"test_size": -1}, "--test-size is -1")):
        with pytest.raises(ValueError, match=message):
            binarize_files([raw], tmp_path / "no.jsonl", **wrong)
    assert capsys.readouterr() == ("", "")


def test_a_pair_does_not_depend_on_other_records(tmp_path):
    records = random_records(100)
    write_lines(tmp_path / "all.jsonl", records)
    write_lines(tmp_path / "some.jsonl", records[::3])
    for name in ("all", "some"):
        assert run(tmp_path / f"{name}.jsonl", "--output", tmp_path / f"{name}-pairs.jsonl") == 0
    every, some = ((tmp_path / f"{name}-pairs.jsonl").read_text().splitlines() for name in ("all", "some"))
    assert set(some) < set(every)


@pytest.mark.parametrize("size", [1, 2, 37, 120])
def test_split_has_the_exact_size_and_shares_no_instruction(tmp_path, size):
    raw = write_lines(tmp_path / "raw.jsonl", random_records(200))
    assert run(raw, "--output", tmp_path / "whole.jsonl") == 0
    tests = []
    for seed in (1, 2):
        output = tmp_path / f"{seed}.jsonl"
        assert run(raw, "--output", output, "--test-size", size, "--seed", seed) == 0
        train, test = read(output), read(tmp_path / f"{seed}-test.jsonl")
        assert len(test) == size and len(train) + size == len(read(tmp_path / "whole.jsonl"))
        assert not {pair["prompt_id"] for pair in train} & {pair["prompt_id"] for pair in test}
        tests.append({pair["prompt_id"] for pair in test})
    assert tests[0] != tests[1]


# ---- errors ----

GOOD = json.dumps(record("x", completion("a", "5", score=1), completion("b", "4", score=2)))


def damaged(**changes):
    raw = json.loads(GOOD)
    raw |= changes
    return json.dumps({key: value for key, value in raw.items() if value != "absent"})


def damaged_completion(**changes):
    first, second = json.loads(GOOD)["completions"]
    second = {key: value for key, value in (second | changes).items() if value != "absent"}
    return damaged(completions=[first, second])


DEEP = "[" * 100_000 + "]" * 100_000
DEEP_BUT_READ = "[" * 900 + "]" * 900
LONG = "9" * 5000
LINES, ARRAY = "expected one JSON object a line, got ", "expected one JSON array of objects, got "

BAD = {  # name: (content of the file, what the message holds after the path)
    "malformed": (f'{GOOD}\n\n{{"source": "flan",\n{GOOD}\n', ":3: malformed JSON: Expecting property name"),
    "shows the line": (f"{GOOD}\n{{'source': 1}}", ":2: malformed JSON", ": column 2; " + LINES + "\"{'source': 1}\""),
    "an object over several lines": (json.dumps(json.loads(GOOD), indent=1), ":1: malformed JSON", LINES + "'{\\n'"),
    "malformed array": (f"[{GOOD}, {GOOD},\n{{'source': 1}}, {GOOD}]", ":3: malformed JSON", "line 2 column 2"),
    "shows the element": (f"[{GOOD},\n{{source: 1}}, {GOOD}]", ":2: malformed JSON", ARRAY + "'{source: 1}, {"),
    "cut array": (f"[{GOOD}, {GOOD[:50]}", ":2: malformed JSON"),
    "array cut after a comma": (f"[{GOOD}, ", ":2: malformed JSON"),
    "array cut after its bracket": ("[", ":1: malformed JSON"),
    "array without comma": (f"[{GOOD} {GOOD}]", ":2: malformed JSON: Expecting ',' delimiter"),
    "array with a tail": (f"[{GOOD}]\n[]", ":2: malformed JSON: Extra data: line 2 column 1"),
    "an array a line": (f"[{GOOD}]\n[{GOOD}]\n", ":2: malformed JSON: Extra data"),
    "deep line": (f'{GOOD}\n{{"x": {DEEP}}}\n', ":2: malformed JSON: nested too deeply; " + LINES + '\'{"x": [[['),
    "deep array": (f"[{GOOD}, {DEEP}]", ":2: malformed JSON: nested too deeply; " + ARRAY + "'[[["),
    "deep value": (damaged(completions=DEEP_BUT_READ).replace(f'"{DEEP_BUT_READ}"', f"[{DEEP_BUT_READ}]"), "[[["),
    "deep annotation": (
        damaged_completion(annotations=1).replace('"annotations": 1', f'"annotations": {DEEP_BUT_READ}'),
        ':1: completion 2: "annotations" is [[[[[',
    ),
    "long integer": (f'{GOOD}\n{{"x": {LONG}}}\n', ":2: malformed JSON: an integer has more than 4300 digits", LINES),
    "long integer in an array": (f"[{LONG}]", ":1: malformed JSON: an integer has more than 4300 digits", ARRAY),
    "long integer in an element": (f'[{GOOD}, {GOOD}, {{"x": {LONG}}}]', ":3: malformed JSON: an integer has more"),
    "not UTF-8": (GOOD.encode() + b'\n{"source": "\xff"}', ":2: malformed JSON: byte 0xff is not UTF-8", LINES),
    "array not UTF-8": (f"[{GOOD}, ".encode() + b'{"source": "\xff"}]', ":2: malformed JSON: byte 0xff is not UTF-8"),
    "a key twice": (
        f'{GOOD}\n{{"x": {{"a": 1, "b": 2, "a": 1}}}}',
        ':2: malformed JSON: the key "a" is there twice',
        LINES,
    ),
    "a key twice in an array": (f'[{GOOD}, {GOOD[:-1]}, "source": "x"}}]', ':2: malformed JSON: the key "source" is'),
    "encoded surrogate": (b'{"source": "\xed\xa0\x80"}', ":1: malformed JSON: byte 0xed is not UTF-8"),
    "a mark within": (f"{GOOD}\n\ufeff{GOOD}", ":2: malformed JSON: Unexpected UTF-8 BOM"),
    "UTF-16": (GOOD.encode("utf-16"), ": looks like UTF-16 or UTF-32, expected UTF-8"),
    "UTF-16 without a mark": (GOOD.encode("utf-16-le"), ": looks like UTF-16"),
    "UTF-16, big end first": (f" {GOOD}".encode("utf-16-be"), ": looks like UTF-16"),
    "UTF-32": (f"[{GOOD}]".encode("utf-32"), ": looks like UTF-16 or UTF-32"),
    "packed UTF-16": (gzip.compress(GOOD.encode("utf-16")), ": looks like UTF-16"),
    "zeros": (bytes(4096), ":1: malformed JSON"),
    "cut parquet": (b"PAR1\x15\x04\x15\x06", ":1: cannot be read: as parquet: ", "copy or download it again"),
    "gzipped parquet": (gzip.compress(b"PAR1\x15\x04"), ": is a gzipped parquet file; unpack it with gunzip"),
    "scored answers": (
        '{"prompt": "x", "answers": [], "score": []}',
        ":1: holds scored answers, expected a raw",
        "(its",
    ),
    "git-lfs pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 9\n",
        ": is a git-lfs pointer, expected the data",
        "git lfs pull",
    ),
    "cut gzip": (gzip.compress(f"{GOOD}\n".encode() * 3)[:-9], ":4: cannot be read: Compressed file ended before"),
    "cut gzip of an array": (gzip.compress(f"[{GOOD}, {GOOD}]".encode())[:-9], ":3: cannot be read: Compressed file"),
    "cut gzip header": (b"\x1f\x8b\x08", ":1: cannot be read: Compressed file ended", "copy or download it again"),
    "gzip of a wrong checksum": (gzip.compress(GOOD.encode())[:-8] + bytes(8), ":1: cannot be read: CRC check failed"),
    "damaged gzip": (gzip.compress(GOOD.encode())[:12] + b"\xff" * 90, ":1: cannot be read: Error -3"),
    "empty": ("", ": has no record, expected JSON lines or a JSON array, got b''"),
    "blank": ("\n \n", ": has no record, expected JSON lines or a JSON array, got b'\\n \\n'"),
    "empty array": ("[ ]\n", ": has no record"),
    "packed empty": (gzip.compress(b""), ": has no record"),
    "no object": (f"{GOOD}\n17\n", ':2: 17 is not a JSON object, expected one with the field "completions"'),
    "an array as a line": (f"{GOOD}\n[1]\n", ":2: [1] is not a JSON object"),
    "binarized": (
        '{"chosen": [], "rejected": [], "score_chosen": 1.0}',
        ":1: already binarized (it has chosen, rejected), expected a raw record",
    ),
    "binarized by Argilla": ('{"chosen_response": "a", "rejected_response": "b"}', ":1: already binarized"),
    "no completions": (
        damaged(completions="absent"),
        ':1: no field "completions", expected a list, in {"source": "flan", "instruction": "x"}',
    ),
    "no instruction": (
        f"{GOOD}\n{damaged(instruction='absent')}",
        ':2: no field "instruction", expected a string, in {',
    ),
    "no source": (damaged(source="absent"), ':1: no field "source"'),
    "instruction of a wrong type": (damaged(instruction=["x"]), ':1: "instruction" is ["x"], expected a string'),
    "a long value": (damaged(instruction=["é" * 90]), f':1: "instruction" is ["{"é" * 55}..., expected a string'),
    "null source": (damaged(source=None), ':1: "source" is null, expected a string'),
    "completions of a wrong type": (damaged(completions={"a": 1}), ':1: "completions" is {"a": 1}, expected a list'),
    "completion of a wrong type": (damaged(completions=["a"]), ':1: completion 1: "a" is not a JSON object'),
    "no response": (damaged_completion(response="absent"), ':1: completion 2: no field "response"'),
    "null response": (damaged_completion(response=None), ':1: completion 2: "response" is null'),
    "no model": (damaged_completion(model="absent"), ':1: completion 2: no field "model"'),
    "annotations of a wrong type": (
        damaged_completion(annotations=[]),
        ':1: completion 2: "annotations" is [], expected an object',
    ),
    "annotation of a wrong type": (
        damaged_completion(annotations={"honesty": "4"}),
        ':1: completion 2: annotation "honesty" is "4", expected an object',
    ),
    "empty annotation of a wrong type": (
        damaged_completion(annotations={"honesty": 0}),
        ':1: completion 2: annotation "honesty" is 0, expected an object',
    ),
    "annotation by two": (
        damaged_completion(annotations={"honesty": [{"Rating": "4"}, {"Rating": "2"}]}),
        ':1: completion 2: annotation "honesty" is [{"Rating": "4"}, {"Rating": "2"}], expected an object',
    ),
    "rating outside": (
        f"{GOOD}\n{damaged_completion(annotations={'honesty': {'Rating': '77'}})}",
        ':2: completion 2: honesty rating is "77", expected a number from 1 to 5, or "N/A"',
    ),
    "rating in an array outside": (
        f"[{GOOD}, {damaged_completion(annotations={'honesty': [{'Rating': 0}]})}]",
        ":2: completion 2: honesty rating is 0, expected a number from 1 to 5",
    ),
    "score outside": (
        damaged_completion(overall_score=10.5),
        ":1: completion 2: overall_score is 10.5, expected a number from 0 to 10",
    ),
    "lone surrogate": (damaged(instruction="so \ud83d"), ":1: half of a surrogate pair at the end of 'so \\ud83d'"),
    "lone surrogate in a name": (damaged(source="\ud83d"), ":1: half of a surrogate pair at the end of"),
    "no pair": (
        json.dumps(record("x", completion("a", "5"), completion("b", "5"))),
        ": no pair is left of 1 records: 1 all tied",
    ),
}


def fails(capsys, tmp_path, message, *arguments):
    """Exit code 2, one line on stderr, nothing on stdout, and no file was made or changed."""
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("binarize.py: error: ") and captured.err.count("\n") == 1 and not captured.out
    for part in [message] if isinstance(message, str) else message:
        assert part in captured.err, captured.err
    assert len(captured.err) < 800
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name, tmp_path, capsys):
    content, message, *more = BAD[name]
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = f"{raw}{message}" if message.startswith(":") else message
    fails(capsys, tmp_path, (message, *more), raw, "--output", tmp_path / "pairs.jsonl")


def test_bad_record_in_a_later_file_leaves_nothing(tmp_path, capsys):
    good, bad = write_lines(tmp_path / "good.jsonl", random_records(20)), tmp_path / "bad.jsonl"
    bad.write_text(f"{GOOD}\n{GOOD[:-9]}\n")
    fails(capsys, tmp_path, f"{bad}:2: malformed JSON", good, bad, "--output", tmp_path / "pairs.jsonl")


def test_overall_score_rule_needs_every_score(tmp_path, capsys):
    raw = tmp_path / "raw.jsonl"
    raw.write_text(f"{GOOD}\n{damaged_completion(overall_score='absent')}\n")
    output = ("--output", tmp_path / "pairs.jsonl")
    message = f"{raw}:2: completion 2: overall_score is missing or N/A, expected a number from 1 to 10"
    fails(capsys, tmp_path, message, raw, *output, "--by", "overall-score")
    assert run(raw, *output) == 0


def test_torn_gzip_names_the_line_where_it_ends(tmp_path, capsys):
    raw = tmp_path / "raw.jsonl.gz"
    raw.write_bytes(gzip.compress("".join(json.dumps(one) + "\n" for one in random_records(500)).encode())[:-5000])
    assert run(raw, "--output", tmp_path / "pairs.jsonl") == 2
    line = int(re.search(r"gz:(\d+): cannot be read", capsys.readouterr().err)[1])
    assert 100 < line < 500


def test_bad_paths(tmp_path, capsys):
    raw, output = write_lines(tmp_path / "raw.jsonl", random_records(20)), tmp_path / "pairs.jsonl"
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    fails(capsys, tmp_path, "none.jsonl: no such file", raw, tmp_path / "none.jsonl", "--output", output)
    fails(capsys, tmp_path, f"{tmp_path}: is a folder, expected a file", tmp_path, "--output", output)
    fails(capsys, tmp_path, f"{folder}: is a folder, expected a file", raw, "--output", folder, "--overwrite")
    fails(capsys, tmp_path, "raw.jsonl: given twice", raw, raw, "--output", output)
    fails(capsys, tmp_path, "raw.jsonl: given twice", raw, "--output", raw, "--overwrite")
    fails(capsys, tmp_path, "must be a .jsonl file", raw, "--output", tmp_path / "pairs.parquet")
    fails(capsys, tmp_path, "--test-size 20 cannot be held out", raw, "--output", output, "--test-size", 20)
    fails(capsys, tmp_path, "--test-size is -1, expected 0 or more", raw, "--output", output, "--test-size", -1)


def test_the_output_folder_is_made(tmp_path):
    raw, output = write_lines(tmp_path / "raw.jsonl", random_records(20)), tmp_path / "new" / "folder" / "pairs.jsonl"
    assert run(raw, "--output", output) == 0
    assert output.is_file()


def test_existing_outputs_are_kept_unless_told_otherwise(tmp_path, capsys):
    raw, output, test = (tmp_path / name for name in ("raw.jsonl", "pairs.jsonl", "pairs-test.jsonl"))
    write_lines(raw, random_records(20))
    test.write_text("kept")
    fails(capsys, tmp_path, f"{test}: exists; --overwrite", raw, "--output", output, "--test-size", 3)
    assert run(raw, "--output", output, "--test-size", 3, "--overwrite") == 0
    assert len(read(test)) == 3
    capsys.readouterr()
    fails(capsys, tmp_path, f"{output}: exists; --overwrite", raw, "--output", output)


# ---- writing ----

NAMES = ("pairs.jsonl", "pairs-test.jsonl")
STATES = [set(), {NAMES[0]}, {NAMES[1]}, set(NAMES)]  # the outputs that are there before


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.name != "raw.jsonl"}


def old_outputs(folder, names):
    for name in names:
        (folder / name).write_text(f"old {name}")
    write_lines(folder / "raw.jsonl", random_records(20))
    return [folder / "raw.jsonl", "--output", folder / NAMES[0], "--overwrite"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("test_size", [0, 3])
@pytest.mark.parametrize("names", STATES)
def test_a_failure_at_any_step_of_writing(tmp_path, monkeypatch, names, test_size, function, error):
    """The n-th call of os.fsync or os.replace fails, for every n. All outputs are as before or all are new."""
    real, calls, codes = getattr(os, function), [], []
    for n in range(1, 9):
        arguments, before = old_outputs(tmp_path, names), contents(tmp_path)
        calls.clear()

        def fail(*args, n=n):
            calls.append(args)
            if len(calls) == n:
                raise error
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(script.os, function, fail)
            codes.append(run(*arguments, "--test-size", test_size))
        left = contents(tmp_path)
        if codes[-1]:
            assert codes[-1] == (130 if isinstance(error, KeyboardInterrupt) else 2)
        if left != before:
            assert left.keys() == names | set(NAMES[: 2 if test_size else 1])
            assert all(left[name].startswith("{") for name in NAMES[: 2 if test_size else 1])
            assert codes[-1] == 0 or not test_size  # Ctrl-C after the only rename comes too late
            for path in tmp_path.glob("pairs*"):
                path.unlink()
    assert len(calls) < n and codes[-1] == 0 and any(codes)


@pytest.mark.parametrize("names", STATES)
def test_a_kill_never_leaves_a_new_file_beside_an_old_one(tmp_path, names):
    """The process ends before its n-th rename. What is left is old, or new, or missing, and nothing old is lost."""
    code = "import os, sys; sys.path.insert(0, sys.argv.pop(1)); kill = int(sys.argv.pop(1)); calls = []\n"
    code += "real = os.replace\ndef replace(*a):\n calls.append(a)\n if len(calls) == kill: os._exit(9)\n real(*a)\n"
    code += "os.replace = replace; import binarize; sys.exit(binarize.main())"
    for kill in range(1, 6):
        folder = tmp_path / str(kill)
        folder.mkdir()
        arguments = [*old_outputs(folder, names), "--test-size", 3]
        done = subprocess.run([sys.executable, "-c", code, *map(str, [ROOT, kill, *arguments])], capture_output=True)
        left = contents(folder)
        state = {name: left[name][:3] for name in NAMES if name in left}
        assert len(set(state.values())) <= 1, state
        if done.returncode == 9:
            assert {f"old {name}" for name in names} <= set(left.values())
    assert done.returncode == 0 and left.keys() == set(NAMES) and len(state) == 2  # four renames, all done


def test_the_second_output_cannot_be_replaced(tmp_path, capsys):
    arguments = old_outputs(tmp_path, {NAMES[0]})
    (tmp_path / NAMES[1]).mkdir()
    fails(capsys, tmp_path, f"{tmp_path / NAMES[1]}: is a folder", *arguments, "--test-size", 3)


def test_a_folder_that_appears_meanwhile_is_found_before_the_first_rename(tmp_path, capsys, monkeypatch):
    arguments, real = old_outputs(tmp_path, {NAMES[0]}), os.fsync
    monkeypatch.setattr(script.os, "fsync", lambda file: ((tmp_path / NAMES[1]).mkdir(exist_ok=True), real(file)))
    monkeypatch.setattr(script.os, "replace", None)
    fails(capsys, tmp_path, f"{tmp_path / NAMES[1]}: is a folder", *arguments, "--test-size", 3)


def test_a_planted_symbolic_link_is_not_followed(tmp_path, capsys, monkeypatch):
    arguments, victim = old_outputs(tmp_path, ()), tmp_path / "victim"
    victim.write_text("kept")
    monkeypatch.setattr(script.os, "urandom", bytes)
    (tmp_path / f".{NAMES[0]}.00000000.tmp").symlink_to(victim)
    assert run(*arguments) == 2
    assert "File exists" in capsys.readouterr().err and victim.read_text() == "kept"


def test_what_a_killed_process_left_is_not_in_the_way(tmp_path, monkeypatch):
    arguments = old_outputs(tmp_path, ())
    monkeypatch.setattr(script.os, "getpid", lambda: 7)  # as in a container, where the next process has the same id
    (tmp_path / f".{NAMES[0]}.7.tmp").write_text("left")
    assert run(*arguments) == 0


def test_ctrl_c_prints_one_line_and_leaves_nothing(tmp_path):
    """A real SIGINT, while records are read."""
    arguments = old_outputs(tmp_path, ())
    code = f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import binarize; real = binarize.parse_record\n"
    code += f"def parse(*raw):\n os.kill(os.getpid(), {int(signal.SIGINT)})\n return real(*raw)\n"
    code += "binarize.parse_record = parse; sys.exit(binarize.main())"
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "binarize.py: interrupted\n")
    assert contents(tmp_path) == {}


def test_bad_arguments_exit_with_2(tmp_path):
    for wrong in (["--test-size", "x"], ["--by", "critique"], ["--seed", "x"]):
        with pytest.raises(SystemExit, match="2"):
            run(tmp_path / "raw.jsonl", "--output", tmp_path / "pairs.jsonl", *wrong)


def test_standalone_script_loads_neither_torch_nor_notus(tmp_path):
    """Run as a user does; -X importtime names every module that was loaded."""
    raw = write_lines(tmp_path / "raw.jsonl", random_records(10))
    command = [sys.executable, "-X", "importtime", ROOT / "binarize.py", raw, "--output", tmp_path / "pairs.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "tqdm" in loaded and done.stdout.startswith("records")
    assert not {"torch", "notus", "transformers"} & {name.split(".")[0] for name in loaded}
    assert all(line.startswith("import time") for line in done.stderr.splitlines())  # no progress bar off a terminal


# ---- repair, margins, weights and other judges ----


@pytest.mark.parametrize(
    ("ratings", "fate"),
    [
        ("1111", "repaired"), ("2222", "repaired"), ("1223", "repaired"), ("2223", "in doubt"), ("4444", "in doubt"),
        ("4445", None), ("5555", None), ("", "in doubt"),
    ],
)  # fmt: skip
def test_a_ten_is_repaired_as_by_the_authors(ratings, fate):
    """fix_overall_score_issue.py: mean <= 2 -> 1; mean <= 4 -> a judge, here in doubt; else it stays."""
    for score in (1, 9.9, 10):
        made = parse_record(record("x", completion("a", *ratings, score=score), completion("b", "3", score=7)))
        for in_doubt in ("drop", "keep"):
            repaired, counts = script.repair(made, in_doubt)
            expected = {fate: 1} if score == 10 and fate else {}
            assert counts == expected
            gone = bool(expected) and fate == "in doubt" and in_doubt == "drop"
            scores = [] if gone else [1.0 if expected and fate == "repaired" else score]
            assert [one.overall_score for one in repaired.completions] == [*scores, 7]


def test_repair_undoes_the_bug(tmp_path, capsys):
    """The worst answers' scores are those before `score if score > 1 else 10 * score`, and so are the pairs."""
    rng = random.Random(0)
    before, released = [], []
    for i in range(200):
        scores = [rng.randint(1, 9) for _ in range(4)]
        ratings = [[str(min(max(score // 2, 1), 5))] * 4 for score in scores]
        for records, values in ((before, scores), (released, [s if s > 1 else 10 * s for s in scores])):
            made = [completion(f"{i}.{j}", *r, score=v) for j, (r, v) in enumerate(zip(ratings, values, strict=True))]
            records.append(record(f"x{i}", *made))
    outputs = [tmp_path / name for name in ("before.jsonl", "repaired.jsonl", "released.jsonl")]
    for records, output, more in (
        (before, outputs[0], ()),
        (released, outputs[1], ("--repair",)),
        (released, outputs[2], ()),
    ):
        raw = write_lines(tmp_path / "raw.jsonl", records)
        assert run(raw, "--output", output, "--by", "overall-score", *more) == 0
        if more:
            found = table_of(capsys)
        capsys.readouterr()
    assert outputs[0].read_bytes() == outputs[1].read_bytes() != outputs[2].read_bytes()
    ones = sum(c["overall_score"] == 1 for r in before for c in r["completions"])
    assert found["repaired: 10 became 1"] == found["completions with overall_score 10"] == ones > 50
    assert found["in doubt: mean rating above 2 and at most 4, or none"] == 0
    assert found["repaired records on which both rules choose"] > 190


def test_the_table_counts_what_is_in_doubt(tmp_path, capsys):
    doubtful = record("x", completion("a", "3", score=10), completion("b", "1", score=4), completion("c", "1", score=2))
    raw, output = write_lines(tmp_path / "raw.jsonl", [doubtful]), tmp_path / "pairs.jsonl"
    for choice, chosen in (("keep", "a"), ("drop", "b")):
        assert run(raw, "--output", output, "--by", "overall-score", "--repair", choice, "--overwrite") == 0
        assert table_of(capsys)["in doubt: mean rating above 2 and at most 4, or none"] == 1
        assert read(output)[0]["chosen"][-1]["content"] == chosen


@pytest.mark.parametrize("by", ["ratings", "overall-score"])
@pytest.mark.parametrize("margin", [0.0, 0.75, 2.0])
def test_rejected_and_margin_are_those_of_a_plain_loop(by, margin, tmp_path, capsys):
    records = random_records(300)
    raw, output, expected = write_lines(tmp_path / "raw.jsonl", records), tmp_path / "pairs.jsonl", {}
    too_close = 0
    for one in records:
        answers = [
            (mean_rating(c) if by == "ratings" else c["overall_score"], c["response"]) for c in one["completions"]
        ]
        answers = [answer for answer in answers if answer[0] is not None]
        best = max(answers, key=lambda answer: answer[0])
        least = (margin or (by == "ratings") * 2e-9) - 1e-9
        lower = [a for a in answers if a[1] != best[1] and best[0] - a[0] >= least]
        too_close += not lower and (by != "ratings" or min(answers)[0] < best[0])
        for other in lower:
            expected.setdefault((one["instruction"], best[1]), []).append(other)
    for rejected in ("all", "lowest", "random"):
        arguments = ("--by", by, "--rejected", rejected, "--min-margin", margin, "--overwrite")
        assert run(raw, "--output", output, *arguments) == 0
        found = {}
        for pair in read(output):
            prompt, chosen, other = (
                pair["chosen"][0]["content"],
                pair["chosen"][-1]["content"],
                pair["rejected"][-1]["content"],
            )
            found.setdefault((prompt, chosen), []).append((pair["score_rejected"], other))
        assert found.keys() == expected.keys()
        for key, others in found.items():
            if rejected == "all":
                assert sorted(others) == sorted(expected[key])
            elif rejected == "lowest":
                assert others == [min(expected[key], key=lambda answer: answer[0])]
            else:
                assert len(others) == 1 and others[0] in expected[key]
        counted = table_of(capsys)
        assert counted["pairs"] == sum(map(len, found.values()))
        assert counted.get("dropped: margin too small", 0) == too_close


def test_all_rejected_leaves_out_unfit_answers_and_counts_them(tmp_path, capsys):
    made = record("x", *(completion(text, rating) for text, rating in (("a", "5"), (" ", "1"), ("a", "2"), ("b", "3"))))
    output = tmp_path / "pairs.jsonl"
    assert run(write_lines(tmp_path / "raw.jsonl", [made]), "--output", output, "--rejected", "all") == 0
    assert [pair["rejected"][-1]["content"] for pair in read(output)] == ["b"]
    assert table_of(capsys)["rejected answers left out: empty, or equal to the chosen one"] == 2


def test_marks_fit_each_of_several_pairs(tmp_path, capsys):
    raw, output = write_lines(tmp_path / "raw.jsonl", random_records(5)), tmp_path / "pairs.jsonl"
    assert run(raw, "--output", output, "--rejected", "all") == 0
    pairs = read(output)
    marked = pairs[1]
    texts = [marked[side][-1]["content"] for side in ("chosen", "rejected")]
    mark = {"prompt_id": marked["prompt_id"], "mark": "drop", "pair": script.pair_id(marked["prompt_id"], *texts)}
    marks = write_lines(tmp_path / "marks.jsonl", [mark])
    assert run(raw, "--output", output, "--rejected", "all", "--curation", marks, "--overwrite") == 0
    assert read(output) == [pair for pair in pairs if pair != marked]
    table = table_of(capsys)
    assert table["pairs marked drop, of records that keep others"] == 1 and "left out" not in str(table)


def test_a_record_that_was_dropped_without_a_pair_loses_all_that_it_makes(tmp_path):
    answers = [completion(text, *[rating] * 4) for text, rating in (("best", "5"), ("best", "4"), ("worst", "3"))]
    raw, output = write_lines(tmp_path / "raw.jsonl", [record("q", *answers), *random_records(2)]), tmp_path / "p.jsonl"
    mark = {"prompt_id": script.prompt_id_of("q"), "mark": "drop", "pair": ""}
    marks = write_lines(tmp_path / "marks.jsonl", [mark])
    assert run(raw, "--output", output, "--rejected", "all") == 0
    before = read(output)
    assert run(raw, "--output", output, "--rejected", "all", "--curation", marks, "--overwrite") == 0
    assert read(output) == [pair for pair in before if pair["prompt_id"] != mark["prompt_id"]] != before


def test_a_lead_of_exactly_the_margin_and_a_tie_by_weights_are_seen_through_rounding(tmp_path):
    scored = {"prompt": "q", "answers": ["a", "b"], "reward": [0.3, 0.2]}
    raw, output = write_lines(tmp_path / "raw.jsonl", [scored]), tmp_path / "pairs.jsonl"
    assert run(raw, "--output", output, "--scores", "reward", "--min-margin", 0.1) == 0
    one, other = (
        {"annotations": {name: {"Rating": str(rating)} for name, rating in zip(ASPECTS, ratings, strict=True)}}
        for ratings in ((1, 1, 1, 3), (1, 2, 1, 2))
    )
    weights = {"honesty": 0.3, "helpfulness": 0.3}
    assert mean_rating(one, weights) == mean_rating(other, weights) == 16 / 13


def test_weights_are_those_of_numpys_average(tmp_path):
    weights = {"honesty": 3.0, "helpfulness": 0.5, "truthfulness": 0.0}
    for one in random_records(50):
        for answer in one["completions"]:
            notes = {name: note["Rating"] for name, note in answer["annotations"].items() if note["Rating"] != "N/A"}
            by_aspect = [weights.get(name, 1) for name in notes]
            expected = np.average([int(r) for r in notes.values()], weights=by_aspect) if sum(by_aspect) else None
            assert mean_rating(answer, weights) == pytest.approx(expected)
            assert mean_rating(answer, dict.fromkeys(ASPECTS, 2.0)) == mean_rating(answer)
    raw, output = write_lines(tmp_path / "raw.jsonl", random_records(50)), tmp_path / "pairs.jsonl"
    assert run(raw, "--output", output, "--weights", "honesty=0", "truthfulness=0", "helpfulness=0") == 0
    for pair in read(output):
        assert pair["score_chosen"].is_integer() and pair["score_rejected"].is_integer()  # one aspect alone


def test_a_source_is_left_out(tmp_path, capsys):
    records = [one | {"source": name} for one, name in zip(random_records(9), "abcabcabc", strict=True)]
    output = tmp_path / "pairs.jsonl"
    assert run(write_lines(tmp_path / "raw.jsonl", records), "--output", output, "--drop-source", "a", "c") == 0
    assert {pair["source"] for pair in read(output)} == {"b"}
    assert table_of(capsys)["dropped: source left out"] == 6


def scored(one, key="reward", names=("prompt", "answers", "models")):
    """A raw record as scored answers, whose score is the mean rating."""
    answers = one["completions"]
    columns = [one["instruction"], [a["response"] for a in answers], [a["model"] for a in answers]]
    return dict(zip(names, columns, strict=True)) | {key: [mean_rating(a) for a in answers], "source": one["source"]}


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ("reward", ("prompt", "answers", "models")),
        ("ratings", ("instruction", "generations", "generation_models")),  # distilabel
        ("ratings", ("instruction", "generations", "model_names")),  # the same, as it was called later
    ],
)
def test_scored_answers_make_the_pairs_of_the_ratings(key, names, tmp_path):
    records = random_records(60)
    outputs = [tmp_path / name for name in ("ratings.jsonl", "scores.jsonl")]
    assert run(write_lines(tmp_path / "raw.jsonl", records), "--output", outputs[0]) == 0
    lists = write_lines(tmp_path / "scored.jsonl", [scored(one, key, names) for one in records])
    assert run(lists, "--output", outputs[1], "--scores", key) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_scores_have_any_scale_and_names_may_be_absent(tmp_path, capsys):
    row = {"prompt": "x", "answers": ["a", "b", "c", "d"], "logit": [-3.5, -0.25, None, -2e4]}
    output = tmp_path / "pairs.jsonl"
    lists = write_lines(tmp_path / "scored.jsonl", [row])
    assert run(lists, "--output", output, "--scores", "logit", "--rejected", "all", "--min-margin", "3") == 0
    assert "overall_score" not in capsys.readouterr().out
    found = [(p["rejected"][-1]["content"], p["score_rejected"]) for p in read(output)]
    assert found == [("a", -3.5), ("d", -2e4)]
    assert {(p["score_chosen"], p["source"], p["chosen_model"]) for p in read(output)} == {(-0.25, "", "")}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, 'no field "prompt", expected a string'),
        ({"prompt": "x"}, 'no field "answers", expected a list'),
        ({"prompt": "x", "answers": ["a", "b"]}, 'no field "s", expected a list'),
        ({"prompt": [{"role": "user"}], "answers": [], "s": []}, '"prompt" is [{"role": "user"}], expected a string'),
        ({"prompt": "x", "answers": "ab", "s": [1, 2]}, '"answers" is "ab", expected a list'),
        ({"prompt": "x", "answers": ["a", "b"], "s": 1}, '"s" is 1, expected a list'),
        ({"prompt": "x", "answers": ["a", "b"], "s": [1]}, '"s" has 1 values for 2 answers'),
        ({"prompt": "x", "answers": ["a", "b"], "s": [1, 2], "models": ["m"]}, '"models" has 1 values for 2 answers'),
        ({"prompt": "x", "answers": ["a", 2], "s": [1, 2]}, 'answer 2: 2 by "", expected two strings'),
        ({"prompt": "x", "answers": ["a", "b"], "s": [1, 2], "models": ["m", 3]}, 'answer 2: "b" by 3, expected two'),
        (
            {"prompt": "x", "answers": ["a", "b"], "s": [1, True]},
            'answer 2: the score of "s" is true, expected a number,',
        ),
        ({"prompt": "x", "answers": ["a", "b"], "s": [1, float("nan")]}, 'answer 2: the score of "s" is NaN'),
        ({"prompt": "x", "answers": ["a", "b"], "s": [float("inf"), 1]}, 'answer 1: the score of "s" is Infinity'),
        ({"prompt": "x", "answers": ["a", "b"], "s": [10**400, 1]}, 'answer 1: the score of "s" is 1000'),
        ({"prompt": "x", "answers": ["a", "b"], "s": [1, {"a": 2}]}, 'answer 2: the score of "s" is {"a": 2}'),
        ({"prompt": "x", "answers": ["a", "b"], "s": [1, 2], "source": 3}, '"source" is 3, expected a string'),
        ({"chosen": [], "rejected": [], "s": []}, "already binarized"),
        ([1], "[1] is not a JSON object"),
    ],
)
def test_bad_scored_answers(row, message, tmp_path, capsys):
    good = {"prompt": "x", "answers": ["a", "b"], "s": [1, 2]}
    lists = write_lines(tmp_path / "scored.jsonl", [good, row])
    fails(capsys, tmp_path, f"{lists}:2: {message}", lists, "--output", tmp_path / "pairs.jsonl", "--scores", "s")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repair"], "--repair mends overall_score, which only --by overall-score compares"),
        (["--weights", "honesty=1", "--by", "overall-score"], "--weights weighs the aspects' ratings, which only --by"),
        (["--weights", "honesty=1", "--scores", "s"], "--weights weighs the aspects' ratings, which only --by ratings"),
        (["--weights", "honesty=-1"], "--weights: honesty weighs -1.0, expected 0 or more"),
        (["--weights", "honesty=nan"], "--weights: honesty weighs nan, expected 0 or more"),
        (["--weights", "honest=2"], '--weights names "honest", which no record has; they have: helpfulness, honesty, '),
        (["--scores", "s", "--by", "overall-score"], "--scores names what is compared; leave out --by overall-score"),
        (["--min-margin", "-1"], "--min-margin is -1.0, expected 0 or more"),
        (["--min-margin", "nan"], "--min-margin is nan, expected 0 or more"),
        (["--min-margin", "inf"], "--min-margin is inf, expected 0 or more"),
        (["--min-margin", "4.5"], "raw.jsonl: no pair is left of 5 records: 5 margin too small"),
        (["--drop-source", "qa", "flan"], '--drop-source names "qa", which no record has; they have: flan'),
        (["--drop-source", "flan"], "raw.jsonl: no pair is left of 5 records: 5 source left out"),
    ],
)  # fmt: skip
def test_options_that_are_refused(arguments, message, tmp_path, capsys):
    raw = write_lines(tmp_path / "raw.jsonl", random_records(5))
    fails(capsys, tmp_path, message, raw, "--output", tmp_path / "pairs.jsonl", *arguments)


@pytest.mark.parametrize("value", ["honesty", "=1", "honesty=", "honesty=much"])
def test_a_weight_is_a_name_and_a_number(value, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(tmp_path / "raw.jsonl", "--output", tmp_path / "pairs.jsonl", "--weights", value)
    assert exit_.value.code == 2 and f"{value!r} is not ASPECT=NUMBER, such as honesty=2" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [{"rejected": "worst"}, {"repair": "judge", "by": "overall-score"}])
def test_from_python_the_names_are_checked_too(wrong, tmp_path):
    raw = write_lines(tmp_path / "raw.jsonl", random_records(2))
    with pytest.raises(ValueError, match="expected one of"):
        binarize_files([raw], tmp_path / "pairs.jsonl", **wrong)


# ---- parquet ----


def write_parquet(path, records, **options):
    parquet.write_table(pyarrow.Table.from_pylist(records), path, **options)
    return path


def test_parquet_is_json_lines(tmp_path):
    """With missing aspects, which parquet writes as null, and more rows than a batch and a row group hold."""
    records = random_records(700)
    del records[3]["completions"][0]["annotations"]["honesty"]
    outputs = [tmp_path / name for name in ("lines.jsonl", "parquet.jsonl")]
    assert run(write_lines(tmp_path / "raw.jsonl", records), "--output", outputs[0]) == 0
    assert run(write_parquet(tmp_path / "raw", records, row_group_size=300), "--output", outputs[1]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    lists = write_parquet(tmp_path / "scored", [scored(one) for one in records])
    assert run(lists, "--output", outputs[1], "--scores", "reward", "--overwrite") == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_a_bad_row_of_parquet_is_named(tmp_path, capsys):
    raw = write_parquet(tmp_path / "raw", [*random_records(400), record("x", completion("a", "7"))])
    message = f'{raw}:401: completion 1: instruction_following rating is "7"'
    fails(capsys, tmp_path, message, raw, "--output", tmp_path / "pairs.jsonl")


def test_damaged_parquet_is_refused_or_read_as_it_was(tmp_path, capsys):
    """Pages carry a checksum of their own only if asked, so a flipped bit in a text can pass. No traceback, though."""
    raw = write_parquet(tmp_path / "raw", random_records(30))
    content, rng = raw.read_bytes(), random.Random(0)
    assert len(content) > 2000
    codes = Counter()
    for cut in (0.1, 0.5, 0.99):
        raw.write_bytes(content[: int(len(content) * cut)])
        fails(capsys, tmp_path, "copy or download it again", raw, "--output", tmp_path / "pairs.jsonl")
    for _ in range(60):
        place = rng.randrange(4, len(content))
        raw.write_bytes(content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :])
        codes[run(raw, "--output", tmp_path / "pairs.jsonl", "--overwrite")] += 1
    assert codes.keys() <= {0, 2} and codes[2] > 10
    assert all(line.startswith("binarize.py: error: ") for line in capsys.readouterr().err.splitlines())


def test_parquet_without_rows(tmp_path, capsys):
    schema = pyarrow.schema([("instruction", pyarrow.string()), ("source", pyarrow.string())])
    parquet.write_table(schema.empty_table(), tmp_path / "raw")
    message = "raw: has no record, its columns are instruction, source"
    fails(capsys, tmp_path, message, tmp_path / "raw", "--output", tmp_path / "pairs.jsonl")


def test_parquet_without_pyarrow(tmp_path, capsys, monkeypatch):
    raw = write_parquet(tmp_path / "raw", random_records(3))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    message = "raw: is a parquet file, which needs pyarrow: pip install pyarrow"
    fails(capsys, tmp_path, message, raw, "--output", tmp_path / "pairs.jsonl")
