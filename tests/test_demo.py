"""The demo: its records and their bug, its answers by other means, its seeds, and the whole of it in miniature."""

import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from itertools import pairwise
from math import log
from pathlib import Path
from random import Random
from statistics import correlation, mean

import pytest
import sentencepiece
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from notus import config, demo
from notus.base import Frame, read_base
from notus.chat import load_chat_template, with_system_turn
from notus.dims import MistralConfig
from notus.model import stream_logps
from notus.packing import pack
from notus.tokenizer import load_tokenizer
from notus.tokens import load_pairs
from notus.weights import check_weights

TINY = demo.Settings(records=64, test_pairs=8, test_prompts=16, sft_questions=24, hidden_size=32, num_layers=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "demo"
    demo.make(output, seed=3, settings=TINY)
    return output


@pytest.fixture(scope="module")
def records() -> list[dict]:
    rng = Random("records")
    return [demo.record(rng, question) for question in demo.ask(Random("questions"), 400, set())]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_answer(instruction: str, answer: str) -> bool:
    """Is the answer right? Decided from the instruction alone, by other means than the demo's."""
    subject = re.search(r"\b([A-P]{3,4}|\d{4})\b", instruction)[1]
    if instruction.startswith("Repeat"):
        return answer == subject
    if "backwards" in instruction:
        return list(answer) == list(reversed(subject))
    if instruction.startswith("Sort"):
        return Counter(answer) == Counter(subject) and all(a < b for a, b in pairwise(answer))
    if instruction.startswith("First"):
        return len(answer) == 1 and subject.startswith(answer)
    if instruction.startswith("Last"):
        return len(answer) == 1 and subject.endswith(answer)
    if instruction.startswith("How many"):
        return answer == {3: "3", 4: "4"}[len(subject)]
    if instruction.startswith("Remove"):
        return len(answer) == len(subject) - 1 and subject.endswith(answer)
    return int(answer) - int(subject) == 1


def test_every_answer_is_right_and_every_miss_is_wrong():
    for question in demo.ask(Random(5), 40 * len(demo.TASKS), set()):
        assert check_answer(question.instruction, question.answer), question
        for habit in ("miss", "chat", "echo"):
            response = demo.HABITS[habit](question)
            assert response.strip(), (habit, question)
            already = question.task == "sort" and habit == "miss" and list(question.subject) == sorted(question.subject)
            assert (response == question.answer) == already, (habit, question)


def test_records_have_ultrafeedbacks_schema(records):
    for record in records:
        assert list(record) == [
            "source", "instruction", "models", "correct_answers", "incorrect_answers", "completions",
        ]  # fmt: skip
        assert record["models"] == sorted(record["models"]) == [c["model"] for c in record["completions"]]
        for completion in record["completions"]:
            assert set(completion) == {
                "model", "principle", "custom_system_prompt", "response", "annotations", "critique", "overall_score",
                "fine-grained_score",
            }  # fmt: skip
            assert isinstance(completion["overall_score"], float)
            annotations = completion["annotations"]
            assert set(annotations) == {"instruction_following", "honesty", "truthfulness", "helpfulness"}
            for aspect, note in annotations.items():
                judged = aspect in ("truthfulness", "helpfulness")
                assert set(note) == {"Rating", "Rationale"} | ({"Type", "Rationale For Rating"} if judged else set())
                assert note["Rating"] in {"1", "2", "3", "4", "5"} | (set() if judged else {"N/A"})
            ratings = [int(note["Rating"]) for note in annotations.values() if note["Rating"] != "N/A"]
            assert completion["fine-grained_score"] == mean(ratings)
    notes = [note for r in records for c in r["completions"] for note in c["annotations"].values()]
    assert any(note["Rating"] == "N/A" for note in notes)


def test_overall_score_has_ultrafeedbacks_bug(records):
    """No answer scores 1, many of the worst score 10, and with these set back the scores agree with the ratings."""
    completions = [completion for record in records for completion in record["completions"]]
    ratings = [completion["fine-grained_score"] for completion in completions]
    scores = [completion["overall_score"] for completion in completions]
    fixed = [1 if s == 10 and r <= 2 else s for s, r in zip(scores, ratings, strict=True)]
    assert 1 not in scores
    assert fixed.count(1) > len(completions) / 20
    assert correlation(ratings, fixed) > 0.9 > correlation(ratings, scores) + 0.2


def test_without_noise_the_ratings_are_the_grade_and_the_score_twice_that():
    rng, questions = Random(0), demo.ask(Random(1), 50, set())
    for question in questions:
        for completion in demo.record(rng, question, lambda _: 0, lambda _: 0)["completions"]:
            grade, notes = demo.grade(question, completion["response"]), completion["annotations"].values()
            assert {note["Rating"] for note in notes} - {"N/A"} == {str(grade)}
            assert completion["overall_score"] == (2 * grade - 1 if grade > 1 else 10)


def test_ratings_follow_the_answer(records):
    by_text = {True: [], False: []}
    for record in records:
        for completion in record["completions"]:
            right = completion["response"] in record["correct_answers"]
            by_text[right].append(completion["fine-grained_score"])
    assert mean(by_text[True]) > mean(by_text[False]) + 2


def test_a_seed_gives_the_same_files_and_another_seed_gives_others(made, tmp_path):
    demo.make(tmp_path / "again", seed=3, settings=TINY)
    demo.make(tmp_path / "other", seed=4, settings=TINY)
    for name in ("raw.jsonl", "pairs.jsonl", "pairs-test.jsonl", "prompts-test.jsonl", "base/model.safetensors"):
        content = (made / name).read_bytes()
        assert content == (tmp_path / "again" / name).read_bytes(), name
        assert content != (tmp_path / "other" / name).read_bytes(), name


def test_held_out_prompts_are_seen_nowhere_else(made):
    prompts, raw = ([row["instruction"] for row in read(made / name)] for name in ("prompts-test.jsonl", "raw.jsonl"))
    assert len(set(prompts)) == TINY.test_prompts and len(set(raw)) == TINY.records
    assert not set(prompts) & set(raw)
    known = set()
    first, second = demo.ask(Random(1), 200, known), demo.ask(Random(1), 200, known)
    assert not set(first) & set(second)


def test_pairs_are_what_train_reads(made):
    encoder = read_base(made / "base").encoder(Frame())
    counts = load_pairs([made / "pairs.jsonl"], encoder, max_length=64, max_prompt_length=32).counts
    assert counts["pairs"] == counts["rows"] > TINY.records / 2
    assert set(counts) == {
        "rows",
        "pairs",
        "read as chosen/rejected messages",
    }  # nothing cut, no token across the border of prompt and answer
    assert len(read(made / "pairs-test.jsonl")) == TINY.test_pairs


def test_tokenizer_keeps_letters_and_digits_apart_and_loses_nothing(made):
    tokenizer = load_tokenizer(made / "base")
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert len(tokenizer.encode("CAFE")) == len(tokenizer.encode("4096")) == 4
    for text in ("Write CAFE backwards.", "Sure! 4096", "  two  spaces\n\nand lines\n", "naïve 猫 \U0001f600"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_both_files_of_the_tokenizer_have_the_same_ids(made, tmp_path):
    """llama.cpp's converter reads tokenizer.model and notus tokenizer.json. A subject's letter is its own token after a
    space too, and nothing is merged across a line break."""
    shutil.copyfile(made / "base" / "tokenizer.model", tmp_path / "tokenizer.model")
    ours, theirs = load_tokenizer(made / "base"), load_tokenizer(tmp_path)
    raw = sentencepiece.SentencePieceProcessor(model_file=str(made / "base" / "tokenizer.model"))
    rng, pieces = Random(0), ["Sort the letters of ", "Sure! ", "<|user|>\n", "CAFE", "4096", " ", "\n", "?", "é", "猫"]
    for _ in range(200):
        text = "".join(rng.choices(pieces, k=6))
        assert ours.encode(text) == theirs.encode(text) == raw.encode(text), text
    assert [raw.id_to_piece(i) for i in raw.encode("Sort the letters of CAFE.\nCAFE")] == [
        "Sort", "▁the", "▁letters", "▁of", "▁", *"CAFE", ".", "<0x0A>", *"CAFE",
    ]  # fmt: skip


def test_training_tokens_are_the_frame_and_the_answer(made):
    question = demo.Question("reverse", "CAFE")
    tokenizer, template = load_tokenizer(made / "base"), load_chat_template(made / "base")
    [(prompt, [answer, wordy])] = demo.tokenize(read_base(made / "base"), [(question, ["EFAC", "Sure! EFAC"])])
    turns = with_system_turn([{"role": "user", "content": "Write CAFE backwards."}], "")
    assert prompt == [1, *tokenizer.encode(template.render(turns, add_generation_prompt=True))]
    assert tokenizer.decode(answer, skip_special_tokens=False) == "EFAC</s>"
    assert wordy[-len(answer) :] == answer


def test_training_learns(tmp_path):
    """On answers that it has not seen, the loss is far below that of an untrained model, log V."""
    settings = demo.Settings(hidden_size=32, num_layers=1, learning_rate=5e-3, warmup_steps=5)
    demo.write_shell(tmp_path, settings)
    rng = Random(0)
    asked = [(question, demo.answers(rng, question)) for question in demo.ask(rng, 240, set())]
    base = read_base(tmp_path, need_weights=False)
    segments = demo.tokenize(base, asked)
    model = demo.train_base(base, segments[:-8], 0, settings)
    stream = pack(segments[-8:])
    loss = -stream_logps(model, stream).sum().item() / len(stream.target)
    assert loss < 0.6 * log(model.config.vocab_size)


def test_base_is_a_checkpoint_for_notus_and_for_transformers(made):
    config = MistralConfig.read(made / "base")
    assert check_weights(made / "base", config)
    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32)
    assert model.config.rope_parameters["rope_theta"] == config.rope_theta
    theirs, ours = AutoTokenizer.from_pretrained(made / "base"), load_tokenizer(made / "base")
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Repeat CAFE."}]
    text = load_chat_template(made / "base").render(turns, add_generation_prompt=True)
    assert theirs.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


def test_second_call_keeps_everything_and_a_missing_piece_is_made_again(tmp_path, capsys):
    demo.make(tmp_path, seed=3, settings=TINY)
    pieces = [path for path in tmp_path.rglob("*") if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in pieces}
    capsys.readouterr()
    demo.make(tmp_path, seed=3, settings=TINY)
    assert "all there" in capsys.readouterr().out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in pieces} == before
    (tmp_path / "pairs-test.jsonl").unlink()
    demo.make(tmp_path, seed=3, settings=TINY)
    assert {path: path.read_bytes() for path in pieces} == {path: content for path, (_, content) in before.items()}
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(pieces)  # no temporary file is left


def test_what_a_killed_demo_left_is_removed(tmp_path):
    """Also where it was killed with all pieces in place."""
    demo.make(tmp_path, seed=3, settings=TINY)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("base.shell/config.json", "base.tmp/model.safetensors", ".pairs.jsonl.12ab.tmp", "raw.jsonl.tmp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    demo.make(tmp_path, seed=3, settings=TINY)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["base"]


def test_files_of_others_are_not_touched(tmp_path, capsys):
    (tmp_path / "raw.jsonl").write_text("mine")
    assert demo.main(["--output", str(tmp_path)]) == 2
    assert str(tmp_path / "raw.jsonl") in capsys.readouterr().err
    assert (tmp_path / "raw.jsonl").read_text() == "mine"


@pytest.mark.parametrize("folder", [None, "it's a $HOME; run & more"])
def test_the_command_at_the_end_is_one_for_a_shell(folder: str | None, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(demo, "make", lambda _output, _seed: None)
    monkeypatch.chdir(demo.TRAIN.parent)
    assert demo.main(["--output", folder] if folder else []) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    words = subprocess.check_output(["sh", "-c", f"printf '%s\\0' {line}"], text=True).split("\0")[:-1]
    assert words[:2] == ["python", "train.py"] and len(words) == (6 if folder else 2)
    monkeypatch.chdir("/")  # away from the checkout, as after the installation of a wheel
    assert demo.main([]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"  python {shlex.quote(str(demo.TRAIN))}"
    assert not folder or config.load(config.CONFIGS / "demo.toml", words[2:]).train.output_dir == f"{folder}/dpo"
