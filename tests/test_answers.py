"""Answers are those of `generate`, kept one by one, and never asked for twice."""

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from conftest import write_mistral_tokenizer
from tiny import save_checkpoint, tiny_config, tiny_model

import notus.answers
from notus.answers import Answer, Checkpoint, Request, answer_all, read_answers
from notus.base import Base, Frame, load_model, read_base
from notus.files import lock
from notus.generate import generate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_mistral_tokenizer(save_checkpoint(tiny_model(tiny_config(vocab_size=32000)), path))


@pytest.fixture
def base(directory) -> Base:
    return read_base(directory)


def ask(*texts: str, **settings) -> list[Request]:
    settings = {"max_new_tokens": 6} | settings
    return [Request(str(i), [{"role": "user", "content": text}], **settings) for i, text in enumerate(texts)]


class Scripted:
    """Answers in reverse order, and breaks down before the answer number `fails_at`."""

    def __init__(self, fails_at: int | None = None, name: str = "m"):
        self.fails_at, self.asked, self.identity = fails_at, [], {"model": name}

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        for number, i in enumerate(reversed(range(len(requests)))):
            if number == self.fails_at:
                raise ConnectionError("gone")
            self.asked.append(requests[i].id)
            yield i, Answer(f"to {requests[i].messages[0]['content']}", requests[i].max_new_tokens < 6)


# --- a checkpoint ----------------------------------------------------------------------------------------------------


def test_answers_are_those_of_each_prompt_alone(base):
    """Whatever the batches are, in two samplings that must not share one."""
    model, encoder = load_model(base, CPU, torch.float64), base.encoder(Frame())
    texts = ["a", "a longer question " * 4, "three words here", "b", "another longer question " * 3]
    requests = ask(*texts) + ask(*texts, temperature=0.9, top_p=0.8, seed=5) + ask("a", max_new_tokens=2)
    expected = []
    for request in requests:
        (ids,) = generate(
            model, [encoder.prompt(request.messages)], request.max_new_tokens, base.stop_ids, request.temperature,
            request.top_p, request.seed,
        )  # fmt: skip
        expected.append(Answer(base.tokenizer.decode(ids), len(ids) == request.max_new_tokens))
    for batch_size in (1, 3, 16):
        found = dict(Checkpoint(base, Frame(), CPU, torch.float64, batch_size).ask(requests))
        assert [found[i] for i in range(len(requests))] == expected
    assert len(set(expected)) == len(expected)


def test_batches_are_sorted_by_length_and_the_longest_come_first(base, monkeypatch):
    batches = []

    def record(_, prompts, *settings):
        batches.append(([len(prompt) for prompt in prompts], settings[2]))
        return [[] for _ in prompts]

    monkeypatch.setattr(notus.answers, "generate", record)
    requests = ask(*("word " * n for n in (3, 30, 1, 12, 7))) + ask("word " * 9, temperature=0.5)
    dict(Checkpoint(base, Frame(), CPU, torch.float32, batch_size=2).ask(requests))
    lengths = [length for batch, temperature in batches if temperature == 0 for length in batch]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) == 5
    assert [(len(batch), temperature) for batch, temperature in batches] == [(2, 0), (2, 0), (1, 0), (1, 0.5)]


def test_the_identity_names_whatever_changes_an_answer(base, directory, tmp_path):
    def identity(base=base, frame=Frame(), dtype=torch.float32):  # noqa: B008
        return Checkpoint(base, frame, CPU, dtype).identity

    other = write_mistral_tokenizer(save_checkpoint(tiny_model(tiny_config(vocab_size=32000), seed=1), tmp_path / "b"))
    identities = [identity(), identity(read_base(other)), identity(frame=Frame(bos=False)),
                  identity(frame=Frame(system_prompt="Be brief.")), identity(dtype=torch.float64)]  # fmt: skip
    assert len({json.dumps(each, sort_keys=True) for each in identities}) == len(identities)
    assert identity(read_base(directory)) == identities[0]


def test_no_weights_are_read_when_every_answer_is_there(base, tmp_path, monkeypatch):
    requests = ask("a", "b")
    first = answer_all(Checkpoint(base, Frame(), CPU, torch.float32), requests, tmp_path / "kept")
    monkeypatch.setattr(notus.answers, "load_model", lambda *_: pytest.fail("weights were read"))
    assert answer_all(Checkpoint(base, Frame(), CPU, torch.float32), requests, tmp_path / "kept") == first


# --- what is kept ----------------------------------------------------------------------------------------------------


def test_a_rerun_asks_for_what_is_missing_only(tmp_path):
    path, requests = tmp_path / "kept", ask("a", "b", "c", "d")
    with pytest.raises(ConnectionError):
        answer_all(Scripted(fails_at=2), requests, path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["id"], row["messages"], row["text"], row["cut"]) for row in rows] == [
        ("3", requests[3].messages, "to d", False),
        ("2", requests[2].messages, "to c", False),
    ]
    again = Scripted()
    assert [answer.text for answer in answer_all(again, requests, path)] == ["to a", "to b", "to c", "to d"]
    assert again.asked == ["1", "0"]
    nothing = Scripted(fails_at=0)
    assert len(answer_all(nothing, requests, path)) == 4 and not nothing.asked


@pytest.mark.parametrize("change", [{"max_new_tokens": 5}, {"temperature": 0.1}, {"top_p": 0.5}, {"seed": 1}])
def test_another_setting_asks_again(tmp_path, change):
    answer_all(Scripted(), ask("a", "b"), tmp_path / "kept")
    again = Scripted()
    answers = answer_all(again, ask("a", "b", **change), tmp_path / "kept")
    assert again.asked == ["1", "0"] and answers[0].cut == ("max_new_tokens" in change)


def test_another_model_or_text_asks_again(tmp_path):
    answer_all(Scripted(), ask("a", "b"), tmp_path / "kept")
    other, edited = Scripted(name="other"), Scripted()
    answer_all(other, ask("a", "b"), tmp_path / "kept")
    assert answer_all(edited, ask("a", "B"), tmp_path / "kept")[1].text == "to B"
    assert (other.asked, edited.asked) == (["1", "0"], ["1"])


def test_an_answer_torn_by_a_kill_is_asked_for_again(tmp_path):
    path, requests = tmp_path / "kept", ask("a", "b", "c")
    whole = answer_all(Scripted(), requests, path)
    data = path.read_bytes()
    for size in range(len(data)):
        path.write_bytes(data[:size])
        again = Scripted()
        assert answer_all(again, requests, path) == whole
        assert len(again.asked) == 3 - data[:size].count(b"\n")
        assert len(read_answers(path)) == 3


@pytest.mark.parametrize("line", ["{}", "[]", "nothing", '{"key": "a", "text": 5}', '{"text": "a"}'])
def test_a_file_that_holds_something_else_is_refused_and_left_alone(tmp_path, line):
    path = tmp_path / "kept"
    path.write_text(f'{{"key": "a", "text": "b"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"{path}:2: "):
        answer_all(Scripted(), ask("a"), path)
    assert path.read_text().endswith(f"{line}\n")


def hold(path: Path, held, release) -> None:
    with lock(path):
        held.set()
        release.wait(30)


def test_two_processes_do_not_write_one_file(tmp_path):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "kept", held, release))
    process.start()
    try:
        assert held.wait(30)
        with pytest.raises(ValueError, match="kept: another process is writing answers there"):
            answer_all(Scripted(), ask("a"), tmp_path / "kept")
    finally:
        release.set()
        process.join()
