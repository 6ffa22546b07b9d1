"""The files that judges read, against what alpaca_eval's and FastChat's loaders do with them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from notus.answers import Answer, Request
from notus.outputs import TEMPERATURES, alpaca, mtbench, progress_path, read_instructions, read_mtbench


class Parrot:
    """Repeats the conversation, with spaces around it."""

    def __init__(self):
        self.asked: list[list[Request]] = []
        self.identity = {"model": "parrot"}

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        self.asked.append(list(requests))
        for i, request in reversed(list(enumerate(requests))):
            yield i, Answer("\n " + "|".join(message["content"] for message in request.messages) + "\n", i == 0)


def write(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_alpaca_writes_model_outputs(tmp_path):
    questions = tmp_path / "alpaca_eval.json"
    questions.write_text(
        json.dumps([{"instruction": "Wie geht's? ä", "output": "reference", "generator": "r", "dataset": "koala"},
                    {"instruction": "b"}, {"instruction": "b"}])
    )  # fmt: skip
    parrot, output = Parrot(), tmp_path / "model_outputs.json"
    report = alpaca(parrot, read_instructions(questions), "notus-7b", output, seed=4)
    assert json.loads(output.read_text()) == [
        {"instruction": "Wie geht's? ä", "output": "Wie geht's? ä", "generator": "notus-7b", "dataset": "koala"},
        {"instruction": "b", "output": "b", "generator": "notus-7b"},
        {"instruction": "b", "output": "b", "generator": "notus-7b"},
    ]
    assert "ä" in output.read_text()
    assert report == [f"{output}: 3 answers, 1 cut at the limit of new tokens, 0 empty"]
    ((request, *_),) = parrot.asked
    assert request[2:] == (2048, 0.7, 1.0, 4)  # as Notus-7B-v1 was sampled
    assert len(progress_path(output).read_text().splitlines()) == 3


def test_mtbench_writes_two_turns_with_the_temperature_of_the_category(tmp_path):
    questions = write(
        tmp_path / "question.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["a", "b"]},
        {"question_id": 101, "category": "reasoning", "turns": ["c", "d"], "reference": ["x", "y"]},
        {"question_id": 151, "category": "humanities", "turns": ["e"]},
        {"question_id": 161, "category": "cooking", "turns": ["f"]},
    )
    (tmp_path / "model_answer").mkdir()
    parrot, output = Parrot(), tmp_path / "model_answer" / "notus.jsonl"
    mtbench(parrot, read_mtbench(questions), "notus", output, seed=2)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 101, 151, 161]
    assert [row["choices"] for row in rows] == [
        [{"index": 0, "turns": ["a", "a|a|b"]}],
        [{"index": 0, "turns": ["c", "c|c|d"]}],
        [{"index": 0, "turns": ["e"]}],
        [{"index": 0, "turns": ["f"]}],
    ]
    assert all(row.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"} for row in rows)
    assert len({row["answer_id"] for row in rows}) == 4 and {row["model_id"] for row in rows} == {"notus"}
    first, second = parrot.asked
    assert [request.temperature for request in first] == [0.7, 0.0, 0.1, 0.7]
    assert [request.temperature for request in second] == [0.7, 0.0]
    assert {request[2::2] for request in (*first, *second)} == {(1024, 1.0)} and first[0].seed == 2
    # FastChat's load_model_answers takes every *.jsonl of the folder for a model.
    assert sorted(path.name for path in output.parent.glob("*.jsonl")) == ["notus.jsonl"]


def test_mtbench_resumes_between_the_turns(tmp_path):
    questions = read_mtbench(write(tmp_path / "q", {"question_id": 1, "category": "math", "turns": ["a", "b"]}))
    mtbench(Parrot(), questions, "m", tmp_path / "m.jsonl")
    progress = progress_path(tmp_path / "m.jsonl")
    progress.write_text(progress.read_text().splitlines(keepends=True)[0])
    parrot = Parrot()
    mtbench(parrot, questions, "m", tmp_path / "m.jsonl")
    assert [[request.id for request in requests] for requests in parrot.asked] == [[], ["1 turn 2"]]


def test_the_temperatures_are_fastchats():
    expected = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
                "stem": 0.1, "humanities": 0.1, "arena-hard-200": 0.0}  # fmt: skip
    assert expected == TEMPERATURES


@pytest.mark.parametrize(
    "row, message",
    [([], "rows look like"), ({}, "must be a string, not null"), ({"instruction": " "}, "rows look like"),
     ({"instruction": 5}, "must be a string, not 5")],
)  # fmt: skip
def test_bad_instructions(tmp_path, row, message):
    path = write(tmp_path / "q", {"instruction": "a"}, row)
    with pytest.raises(ValueError, match=f"{path}:2: .*{message}"):
        read_instructions(path)
    assert len(read_instructions(path, limit=1)) == 1


@pytest.mark.parametrize(
    "row, message",
    [([], "rows look like"), ({"turns": ["a"]}, "rows look like"), ({"question_id": 2}, "turns must be a list"),
     ({"question_id": 2, "turns": []}, "turns must be a list"), ({"question_id": 2, "turns": ["a", ""]}, "not empty"),
     ({"question_id": 2, "turns": [5]}, "a turn must be a string, not 5"),
     ({"question_id": 1, "turns": ["a"]}, "a question_id is there twice"),
     ({"question_id": 2, "turns": ["a"], "category": ["math"]}, "category must be a text")],
)  # fmt: skip
def test_bad_questions(tmp_path, row, message):
    path = write(tmp_path / "q", {"question_id": 1, "turns": ["a"]}, row)
    with pytest.raises(ValueError, match=f"{path}(:2)?: .*{message}"):
        read_mtbench(path)


@pytest.mark.parametrize("read", [read_instructions, read_mtbench])
def test_no_questions(tmp_path, read):
    with pytest.raises(ValueError, match="no questions in it"):
        read(write(tmp_path / "q"))
