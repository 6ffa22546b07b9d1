"""Laws of binarize.py: the rules, independence of the files' layout, and errors that leave nothing behind."""

import gzip
import hashlib
import io
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import binarize as script  # noqa: E402
from binarize import Drop, binarize, main, mean_rating, parse_record  # noqa: E402

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
def test_layout_of_the_input_changes_no_byte(tmp_path, by, monkeypatch):
    """Shuffled; in three files in another order; packed; as a JSON array, on one line and indented, in small chunks."""
    records = random_records(200)
    shuffled = random.Random(1).sample(records, len(records))
    thirds = [write_lines(tmp_path / f"{i}.jsonl{'.gz' * (i == 1)}", shuffled[i::3]) for i in range(3)]
    one_line, indented = tmp_path / "a.json", tmp_path / "b.json"
    one_line.write_text(json.dumps(shuffled))
    indented.write_text("\ufeff\n" + json.dumps(records, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")
    packed = tmp_path / "c.json.gz"
    packed.write_bytes(gzip.compress(one_line.read_bytes()))
    layouts = [[write_lines(tmp_path / "all.jsonl", records)], thirds, thirds[::-1], [one_line], [indented], [packed]]
    monkeypatch.setattr(script, "CHUNK", 97)
    written = set()
    for number, raw in enumerate(layouts):
        output = tmp_path / f"out{number}.jsonl"
        assert run(*raw, "--output", output, "--test-size", 20, "--by", by) == 0
        written.add((output.read_bytes(), (tmp_path / f"out{number}-test.jsonl").read_bytes()))
    assert len(written) == 1


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


BAD = {  # name: (text of the file, what the message holds after the path)
    "malformed": (f'{GOOD}\n\n{{"source": "flan",\n{GOOD}\n', ":3: malformed JSON"),
    "malformed array": (f"[{GOOD}, {GOOD},\n{{'source': 1}}, {GOOD}]", ":3: malformed JSON"),
    "cut array": (f"[{GOOD}, {GOOD[:50]}", ":2: malformed JSON"),
    "array without comma": (f"[{GOOD} {GOOD}]", ":2: malformed JSON"),
    "array with a tail": (f"[{GOOD}]\n[]", ":2: malformed JSON: text after the array"),
    "not UTF-8": (GOOD.encode() + b'\n{"source": "\xff"}', ":2: malformed JSON"),
    "array not UTF-8": (b'[{"source": "\xff"}]', ":1: unreadable"),
    "empty": ("", ":1: empty"),
    "blank": ("\n \n", ":1: empty"),
    "empty array": ("[ ]\n", ":1: empty"),
    "no object": (f"{GOOD}\n17\n", ":2: 17 is no JSON object"),
    "an array a line": (f"{GOOD}\n[1]\n", ":2: [1] is no JSON object"),
    "binarized": (
        '{"chosen": [], "rejected": [], "score_chosen": 1.0}',
        ":1: already binarized (it has chosen, rejected)",
    ),
    "binarized by Argilla": ('{"chosen_response": "a", "rejected_response": "b"}', ":1: already binarized"),
    "no completions": (damaged(completions="absent"), ':1: no field "completions"'),
    "no instruction": (f"{GOOD}\n{damaged(instruction='absent')}", ':2: no field "instruction"'),
    "no source": (damaged(source="absent"), ':1: no field "source"'),
    "instruction of a wrong type": (damaged(instruction=["x"]), ":1: \"instruction\" is ['x'], expected a string"),
    "null source": (damaged(source=None), ':1: "source" is None, expected a string'),
    "completions of a wrong type": (damaged(completions={"a": 1}), ":1: \"completions\" is {'a': 1}, expected a list"),
    "completion of a wrong type": (damaged(completions=["a"]), ":1: completion 1: 'a' is no JSON object"),
    "no response": (damaged_completion(response="absent"), ':1: completion 2: no field "response"'),
    "null response": (damaged_completion(response=None), ':1: completion 2: "response" is None'),
    "no model": (damaged_completion(model="absent"), ':1: completion 2: no field "model"'),
    "annotations of a wrong type": (damaged_completion(annotations=[1]), ':1: completion 2: "annotations" is [1]'),
    "annotation of a wrong type": (
        damaged_completion(annotations={"honesty": "4"}),
        ":1: completion 2: annotation \"honesty\" is '4'",
    ),
    "rating in words": (
        damaged_completion(annotations={"honesty": {"Rating": "good"}}),
        ":1: completion 2: honesty rating is 'good', expected a number",
    ),
    "boolean rating": (damaged_completion(annotations={"honesty": {"Rating": True}}), "honesty rating is True"),
    "rating not finite": (damaged_completion(annotations={"honesty": {"Rating": "nan"}}), "honesty rating is 'nan'"),
    "rating too large": (damaged_completion(annotations={"honesty": {"Rating": 10**400}}), "honesty rating is 1000"),
    "score in words": (damaged_completion(overall_score="ten"), ":1: completion 2: overall_score is 'ten'"),
    "lone surrogate": (damaged(instruction="\ud83d"), ":1: 'utf-8' codec can't encode character '\\ud83d'"),
    "no pair": (
        json.dumps(record("x", completion("a", "5"), completion("b", "5"))),
        ": no pair left of 1 records: 1 all",
    ),
}


def fails(capsys, tmp_path, message, *arguments):
    """Exit code 2, one line on stderr, nothing on stdout, and no file that was not there before."""
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("binarize.py: error: ") and captured.err.count("\n") == 1 and not captured.out
    assert message in captured.err, captured.err
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("name", BAD)
def test_bad_file(name, tmp_path, capsys):
    text, message = BAD[name]
    raw = tmp_path / "raw.jsonl"
    raw.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = f"{raw}{message}" if message.startswith(":") else message
    fails(capsys, tmp_path, message, raw, "--output", tmp_path / "pairs.jsonl", "--test-size", 0)


def test_malformed_array_is_given_up_where_it_goes_wrong(monkeypatch):
    class Open(io.BytesIO):
        def close(self):
            """Outlives its reader, to be asked how far that came."""

    monkeypatch.setattr(script, "CHUNK", 97)
    file = Open(f"[{GOOD}, {{'source': 1}}, {', '.join([GOOD] * 5000)}]".encode())
    with pytest.raises(ValueError, match=r"raw\.json:2: malformed JSON"):
        list(script.read_array(file, Path("raw.json")))
    assert file.tell() < 50_000 < len(file.getvalue())


def test_bad_record_in_a_later_file_leaves_nothing(tmp_path, capsys):
    good, bad = write_lines(tmp_path / "good.jsonl", random_records(20)), tmp_path / "bad.jsonl"
    bad.write_text(f"{GOOD}\n{GOOD[:-9]}\n")
    fails(capsys, tmp_path, f"{bad}:2: malformed JSON", good, bad, "--output", tmp_path / "pairs.jsonl")


def test_overall_score_rule_needs_every_score(tmp_path, capsys):
    raw = tmp_path / "raw.jsonl"
    raw.write_text(f"{GOOD}\n{damaged_completion(overall_score='absent')}\n")
    output = ("--output", tmp_path / "pairs.jsonl")
    fails(capsys, tmp_path, f"{raw}:2: a completion has no overall_score", raw, *output, "--by", "overall-score")
    assert run(raw, *output) == 0


def test_bad_paths(tmp_path, capsys):
    raw, output = write_lines(tmp_path / "raw.jsonl", random_records(20)), tmp_path / "pairs.jsonl"
    packed = tmp_path / "cut.jsonl.gz"
    packed.write_bytes(gzip.compress(GOOD.encode() * 100)[:-20])
    not_packed = write_lines(tmp_path / "plain.jsonl", random_records(2)).rename(tmp_path / "plain.jsonl.gz")
    fails(capsys, tmp_path, "none.jsonl: no such file", raw, tmp_path / "none.jsonl", "--output", output)
    fails(capsys, tmp_path, f"{tmp_path}: no such file", tmp_path, "--output", output)
    fails(capsys, tmp_path, f"{packed}:1: unreadable", packed, "--output", output)
    fails(capsys, tmp_path, f"{not_packed}:1: unreadable", not_packed, "--output", output)
    fails(capsys, tmp_path, "raw.jsonl: given twice", raw, raw, "--output", output)
    fails(capsys, tmp_path, "raw.jsonl: given twice", raw, "--output", raw, "--overwrite")
    fails(capsys, tmp_path, "must be a .jsonl file", raw, "--output", tmp_path / "pairs.parquet")
    fails(capsys, tmp_path, "--test-size 20 cannot be held out", raw, "--output", output, "--test-size", 20)


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


def test_a_failing_disk_leaves_the_old_outputs_whole(tmp_path, capsys, monkeypatch):
    raw, output = write_lines(tmp_path / "raw.jsonl", random_records(20)), tmp_path / "pairs.jsonl"
    assert run(raw, "--output", output) == 0
    capsys.readouterr()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.os, "fsync", full)
    fails(capsys, tmp_path, "No space left on device", raw, "--output", output, "--overwrite", "--seed", 7)


def test_bad_arguments_exit_with_2(tmp_path):
    for wrong in (["--test-size", -1], ["--by", "critique"], ["--seed", "x"]):
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
