"""evaluate.py on models whose answers and log-probabilities are known by construction."""

import json
import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_server import completion, reply
from conftest import small_vocabulary, write_mistral_tokenizer
from scipy import stats
from tiny import pair_set, random_pairs, run_ranks, save_checkpoint, tiny_config, tiny_model

from notus import distributed
from notus.base import Frame, read_base, write_frame
from notus.evaluate import held_out_metrics, main, read_questions
from notus.losses import LOSSES, PreferenceLoss
from notus.model import Mistral, pair_logps
from notus.packing import pack_pairs
from notus.tokenizer import Tokenizer, load_tokenizer
from notus.tokens import load_pairs

VOCABULARY = small_vocabulary("What is a word\n" + "\n".join("0123456789"))  # each digit a token
VOCAB = VOCABULARY.vocab_size()
GAIN = 2.0  # of the head's rows


def uniform() -> Mistral:
    """Every token has probability 1 / VOCAB."""
    model = Mistral(tiny_config(vocab_size=VOCAB))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
    return model


def chain(tokenizer: Tokenizer, text: str) -> Mistral:
    """A model that says `text` after the newline that ends every prompt, and nothing else: its layers add nothing, so
    the newest token alone decides. The logit of the next token is GAIN * sqrt(hidden_size), all others are 0."""
    model = uniform()
    said = [*tokenizer.encode("\n" + text)[1:], tokenizer.eos_id]  # without the "▁" before the newline
    with torch.no_grad():
        for place, (token, following) in enumerate(pairwise(said)):
            model.model.embed_tokens.weight[token, place] = 1000.0
            model.lm_head.weight[following, place] = GAIN
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(write_mistral_tokenizer(root / "none", VOCABULARY))
    made = {"says42": chain(tokenizer, "42"), "says7": chain(tokenizer, "7\t"),
            "uniform": uniform(), "random": tiny_model(tiny_config(vocab_size=VOCAB))}  # fmt: skip
    return {
        name: write_mistral_tokenizer(save_checkpoint(model, root / name), VOCABULARY) for name, model in made.items()
    }


def write_rows(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments) -> int:
    return main([str(argument) for argument in (*arguments, "--device", "cpu")])


# --- while training --------------------------------------------------------------------------------------------------


def check_held_out_metrics(path: Path, names: list[str]) -> None:
    """Of 23 pairs, and of one, which leaves a rank without: plain means over pairs that are scored one by one, and
    scipy's correlation. path: a file of their rows. names: the sources that are found there."""
    world = distributed.start("cpu")
    model, pairs = tiny_model(tiny_config()), random_pairs(np.random.default_rng(1), 23, vocab=97)
    pairs = [pair._replace(where=f"{path}:{k}") for k, pair in enumerate(pairs, 1)]
    with torch.no_grad():
        policy = torch.cat([pair_logps(model, pack_pairs([pair])) for pair in pairs]).numpy()
    reference = policy + np.random.default_rng(2).normal(size=policy.shape)
    tokens = np.array([[len(pair.chosen), len(pair.rejected)] for pair in pairs])
    for count, name in ((23, "dpo"), (1, "dpo"), (23, "simpo")):
        old, loss = torch.from_numpy(reference[:count]), PreferenceLoss(name, 0.5)
        found = held_out_metrics(model, pair_set(pairs[:count]), old, world, 60, loss, last=True)
        ratios = (policy - reference)[:count]
        rewards = 0.5 * (policy / tokens)[:count] if name == "simpo" else 0.5 * ratios
        accurate = rewards[:, 0] > rewards[:, 1]
        expected = dict(zip(("rewards/chosen", "rewards/rejected"), rewards.mean(0), strict=True))
        expected |= {"rewards/accuracies": accurate.mean(), "rewards/margins": np.mean(rewards[:, 0] - rewards[:, 1])}
        expected["rewards/length_correlation"] = stats.pearsonr(rewards.ravel(), tokens[:count].ravel()).statistic
        if LOSSES[name].reference:
            expected |= {"logratios/chosen": ratios[:, 0].mean(), "logratios/rejected": ratios[:, 1].mean()}
        assert {key: found[f"eval_{key}"] for key in expected} == pytest.approx(expected, rel=1e-9)
        assert ("eval_logratios/chosen" in found) == (name == "dpo")
        assert ("eval_slices" in found) == (count == 23)
        for each in found.get("eval_slices", []):
            if each["by"] == "source":  # every third row is of wiki
                right = accurate[2::3] if each["name"] == "wiki" else np.delete(accurate, np.s_[2::3])
                assert each["accuracy"] == pytest.approx(right.mean()) and each["pairs"] == len(right)
        sources = [each["name"] for each in found.get("eval_slices", []) if each["by"] == "source"]
        assert sources == (names if count == 23 else [])
    near = torch.from_numpy(policy * (1 + 1e-8))  # as another order of the same sums would give
    assert "eval_rewards/length_correlation" not in held_out_metrics(
        model, pair_set(pairs), near, world, 60, PreferenceLoss("dpo", 0.5)
    )
    distributed.stop()


def test_held_out_metrics_are_plain_means_on_any_number_of_ranks(tmp_path: Path):
    rows = [{"source": "wiki" if k % 3 == 0 else "code"} for k in range(1, 31)]
    path = write_rows(tmp_path / "a: b.jsonl", *rows)
    check_held_out_metrics(path, ["code", "wiki"])
    run_ranks(2, check_held_out_metrics, path, ["code", "wiki"])
    path.write_text(path.read_text() + "{}\n")  # a row without its source
    check_held_out_metrics(path, [])


# --- exact-match ---------------------------------------------------------------------------------------------------


@pytest.fixture
def questions(tmp_path) -> Path:
    return write_rows(
        tmp_path / "questions.jsonl",
        {"instruction": "What is 12 + 30?", "correct_answers": ["forty-two", "\n42 "], "source": "sums"},
        {"instruction": "What is 3 + 4?\nAnswer with a number.", "correct_answers": ["7"]},
        {"instruction": "What is 40 + 2?", "correct_answers": ["42"]},
        {"instruction": "What is 0.42 * 100?", "correct_answers": ["42.", "4", "421"]},
    )


def test_exact_match_counts_right_answers_of_each_model(models, questions, tmp_path, capsys):
    output = tmp_path / "answers.json"
    before, after = models["says7"], models["says42"]
    command = ("exact-match", "--model", before, "--model", after, "--prompts", questions, "--samples", 2)
    assert run(*command, "--batch-size", 3, "--output", output) == 0
    lines = capsys.readouterr().out.splitlines()
    width = max(len(str(before)), len(str(after)))
    assert lines[:11] == [
        f"{'model':{width}}  exact match",
        f"{before!s:{width}}        25.0%  1 of 4",
        f"{after!s:{width}}        50.0%  2 of 4",
        "",
        f"{'prompt':{width}}  What is 12 + 30?",
        f"{before!s:{width}}  wrong  7",
        f"{after!s:{width}}  right  42",
        f"{'right answer':{width}}         forty-two | 42",
        "",
        f"{'prompt':{width}}  What is 40 + 2?",
        f"{before!s:{width}}  wrong  7",
    ]
    written = json.loads(output.read_text())
    assert written["exact_match"] == {str(before): 0.25, str(after): 0.5}
    assert written["rows"][1] == {
        "where": f"{questions}:2",
        "instruction": "What is 3 + 4?\nAnswer with a number.",
        "correct_answers": ["7"],
        "answers": {str(before): "7\t", str(after): "42"},
    }
    assert [path.name for path in tmp_path.iterdir() if ".tmp" in path.name] == []


def test_limit_and_batch_size_change_no_answer(models, questions, tmp_path, capsys):
    answers = []
    for options in (["--batch-size", 1], ["--batch-size", 4], ["--limit", 2]):
        output = tmp_path / "answers.json"
        command = ("exact-match", "--model", models["random"], "--prompts", questions, "--output", output)
        assert run(*command, "--max-new-tokens", 6, *options) == 0
        answers.append([row["answers"] for row in json.loads(output.read_text())["rows"]])
    assert answers[0] == answers[1]
    assert answers[2] == answers[0][:2]
    assert len({str(answer) for answer in answers[0]}) == 4
    assert "of 2" in capsys.readouterr().out


def test_bad_questions_name_file_and_line(models, tmp_path, capsys):
    good = {"instruction": "a", "correct_answers": ["b"]}
    path = tmp_path / "bad.jsonl"
    for row, message in (
        ([], "a row must be an object, not []"),
        ({"correct_answers": ["b"]}, "instruction must be a string, not null"),
        ({"instruction": " ", "correct_answers": ["b"]}, "the instruction is empty"),
        ({"instruction": "a \ud800", "correct_answers": ["b"]}, "which is not text"),
        ({"instruction": "a"}, "correct_answers must be a list of texts, not None"),
        ({"instruction": "a", "correct_answers": "b"}, "correct_answers must be a list of texts, not 'b'"),
        ({"instruction": "a", "correct_answers": []}, "correct_answers must be a list of texts, not []"),
        ({"instruction": "a", "correct_answers": ["b", 7]}, "a correct answer must be a string, not 7"),
        ({"instruction": "a", "correct_answers": ["b", " "]}, "a correct answer is empty: ['b', ' ']"),
        ({"instruction": "a", "correct_answers": ["None"]}, "UltraFeedback knows none"),
    ):
        write_rows(path, good, row)
        assert run("exact-match", "--model", models["says7"], "--prompts", path) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"notus.evaluate: error: {path}:2: ") and message in error and error.count("\n") == 1
        assert error.endswith('; rows look like {"instruction": "...", "correct_answers": ["...", "..."]}\n')
    path.write_text(json.dumps(good) + "\n{")
    assert run("exact-match", "--model", models["says7"], "--prompts", path) == 2
    assert f"{path}:2: not JSON" in capsys.readouterr().err
    path.write_text("\n")
    assert run("exact-match", "--model", models["says7"], "--prompts", path) == 2
    assert f"{path}: no questions in it" in capsys.readouterr().err


def test_everything_is_checked_before_a_model_is_read(models, questions, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("notus.answers.load_model", lambda *_: pytest.fail("weights were read"))
    first = ("exact-match", "--model", models["says7"])
    for options, message in (
        (["--prompts", tmp_path / "none.jsonl"], "none.jsonl: no such file"),
        (["--prompts", questions, "--model", tmp_path / "nowhere"], "nowhere: no such folder"),
        (["--prompts", questions, "--output", tmp_path / "nowhere" / "a.json"], "nowhere: no such directory"),
    ):
        assert run(*first, *options) == 2
        assert message in capsys.readouterr().err
    for option in ("--limit", "--max-new-tokens", "--batch-size"):
        with pytest.raises(SystemExit, match="2"):
            run(*first, "--prompts", questions, option, "0")
        assert "0 must be above 0" in capsys.readouterr().err


def test_rows_may_be_an_array(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([{"instruction": "a", "correct_answers": ["b"]}] * 3))
    assert len(read_questions(path)) == 3
    assert [question.where for question in read_questions(path, limit=1)] == [f"{path}: row 1"]


# --- preferences ---------------------------------------------------------------------------------------------------


def preference(prompt: str, chosen: str, rejected: str) -> dict:
    def conversation(answer):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    return {"chosen": conversation(chosen), "rejected": conversation(rejected)}


def printed(text: str) -> dict[str, float]:
    """The figures of a report, by name."""
    rows = [line.split() for line in text.splitlines()[1:]]
    return {row[0]: float(row[1].rstrip("%")) / (100 if "%" in row[1] else 1) for row in rows}


def test_preferences_of_a_model_known_in_closed_form(models, tmp_path, capsys):
    data = write_rows(
        tmp_path / "pairs.jsonl",
        preference("What is 12 + 30?", "42", "7"),
        preference("What is 3 + 4?", "7", "42"),
        preference("What is 40 + 2?", "42", "9"),
    )
    assert run("preferences", "--model", models["says42"], "--base", models["uniform"], "--data", data,
               "--beta", "0.25", "--micro-batch-tokens", 60) == 0  # fmt: skip
    report = capsys.readouterr().out

    logit = GAIN * math.sqrt(tiny_config().hidden_size)
    normalizer = math.log(math.exp(logit) + VOCAB - 1)
    # Tokens of "42</s>": each follows its predecessor in the chain. Of "7</s>": after the newline any token but "4" has
    # logit 0; after "7" all have.
    says42 = 0.25 * (3 * (logit - normalizer) + 3 * math.log(VOCAB))
    says7 = 0.25 * ((-normalizer - math.log(VOCAB)) + 2 * math.log(VOCAB))
    margins = [says42 - says7, says7 - says42, says42 - says7]
    expected = {
        "rewards/accuracies": 2 / 3,
        "rewards/margins": sum(margins) / 3,
        "rewards/chosen": (2 * says42 + says7) / 3,
        "rewards/rejected": (2 * says7 + says42) / 3,
        "loss": sum(math.log1p(math.exp(-margin)) for margin in margins) / 3,
        "rewards/length_correlation": 1.0,  # 42 has a token more than 7 and 9, and more reward
        "logratios/chosen": (2 * says42 + says7) / 0.75,
        "logratios/rejected": (2 * says7 + says42) / 0.75,
    }
    assert printed(report) == pytest.approx(expected, abs=6e-4)
    assert report.splitlines()[0] == "3 pairs of 3 rows: 3 chosen/rejected messages"


def test_a_model_equal_to_its_base_has_loss_log_2_and_no_accuracy(models, tmp_path, capsys):
    rows = [preference(f"Question {i}?", "word " * (i + 1), "other " * (7 - i)) for i in range(7)]
    data = write_rows(tmp_path / "pairs.jsonl", *rows)
    command = ("preferences", "--model", models["random"], "--base", models["random"], "--data", data)
    assert run(*command, "--micro-batch-tokens", 1) == 0
    names = ("accuracies", "margins", "chosen", "rejected")  # without a correlation, which equal rewards do not have
    expected = dict.fromkeys([*(f"rewards/{name}" for name in names), "logratios/chosen", "logratios/rejected"], 0)
    assert printed(capsys.readouterr().out) == expected | {"loss": 0.6931}


def test_micro_batches_and_lengths(models, tmp_path, capsys):
    rows = [preference(f"Question {i}?", "word " * (3 * i + 1), "other " * (20 - i)) for i in range(7)]
    data = write_rows(tmp_path / "pairs.jsonl", *rows)
    command = ("preferences", "--model", models["random"], "--base", models["uniform"], "--data", data)
    reports = []
    for options in ([], ["--micro-batch-tokens", 50], ["--max-length", 50, "--max-prompt-length", 40]):
        assert run(*command, *options) == 0
        reports.append(capsys.readouterr().out)
    assert printed(reports[0]) == pytest.approx(printed(reports[1]), abs=2e-4)
    assert "answers cut" not in reports[0] and "answers cut" in reports[2]
    assert printed(reports[2]) != pytest.approx(printed(reports[0]), abs=0.1)


def test_pairs_without_a_difference_are_left_out_and_counted(models, tmp_path, capsys):
    data = write_rows(tmp_path / "pairs.jsonl", preference("a", "b", "c"), preference("a", "b", "b"))
    assert run("preferences", "--model", models["uniform"], "--base", models["uniform"], "--data", data) == 0
    assert capsys.readouterr().out.startswith(
        "1 pairs of 2 rows (dropped: answers are equal 1): 2 chosen/rejected messages\n"
    )


def test_preferences_of_the_rows_that_training_held_out(models, tmp_path, capsys):
    rows = [preference(f"Question {i}?", "word " * (i + 1), "other " * (20 - i)) for i in range(20)]
    data = write_rows(tmp_path / "pairs.jsonl", *rows)
    command = ("preferences", "--model", models["random"], "--base", models["uniform"], "--data")
    assert run(*command, data, "--test-size", 3) == 0
    report = capsys.readouterr().out
    encoder = read_base(models["random"]).encoder(Frame())
    held_out = load_pairs([data], encoder, max_length=1024, max_prompt_length=512, test_size=3, held_out=True)
    lines = [int(pair.where.rpartition(":")[2]) for pair in held_out]
    assert run(*command, write_rows(tmp_path / "held-out.jsonl", *(rows[line - 1] for line in lines))) == 0
    assert report == capsys.readouterr().out and report.startswith("3 pairs of 3 rows")


def test_preferences_refuse_bad_input_before_a_model_is_read(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("notus.evaluate.load_model", lambda *_: pytest.fail("weights were read"))
    data = write_rows(tmp_path / "pairs.jsonl", preference("a", "b", "c"))
    bad = write_rows(tmp_path / "bad.jsonl", preference("a", "b", "c"), {"chosen": []})
    other = write_mistral_tokenizer(save_checkpoint(uniform(), tmp_path / "other"), VOCABULARY)
    (other / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    model, base = ("--model", models["says7"]), ("--base", models["uniform"])
    for options, message in (
        ([*model, "--base", tmp_path / "nowhere", "--data", data], "nowhere: no such folder"),
        ([*model, *base, "--data", bad], f"{bad}:2: 'rejected' is missing"),
        ([*model, *base, "--data", tmp_path / "none.jsonl"], "none.jsonl: no such file"),
        ([*model, "--base", other, "--data", data], "different tokens of the same pairs"),
        (
            [*model, *base, "--data", data, "--max-length", "512"],
            "--max-prompt-length 512 must be below --max-length 512",
        ),
    ):
        assert run("preferences", *options) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for value in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(SystemExit, match="2"):
            run("preferences", *model, *base, "--data", data, f"--beta={value}")
        assert "--beta" in capsys.readouterr().err


def test_preferences_by_subset_and_by_rewardbenchs_sections(models, tmp_path, capsys):
    """The model prefers 42 to 7 to anything else, so the accuracy of each subset is known."""
    right, wrong = preference("What is 12 + 30?", "42", "7"), preference("What is 3 + 4?", "7", "42")
    rows = [right | {"subset": "math-prm"}, wrong | {"subset": "math-prm"}, right | {"subset": "hep-cpp"},
            right | {"subset": "hep-go"}, wrong | {"subset": "donotanswer"}, right | {"subset": "donotanswer"},
            right | {"subset": "donotanswer"}, preference("a", "b", "b") | {"subset": "dropped"}]  # fmt: skip
    data = write_rows(tmp_path / "pairs.jsonl", *rows)
    command = ("preferences", "--model", models["says42"], "--base", models["uniform"], "--data", data)
    assert run(*command) == 0
    plain = capsys.readouterr().out
    assert run(*command, "--by", "subset") == 0
    report = capsys.readouterr().out
    assert report.startswith(plain)
    assert report.removeprefix(plain).splitlines() == [
        "accuracy by subset, 95 % interval",
        "  donotanswer              66.7%   20.8% to  93.9%  of 3",
        "  hep-cpp                 100.0%   20.7% to 100.0%  of 1",
        "  hep-go                  100.0%   20.7% to 100.0%  of 1",
        "  math-prm                 50.0%    9.5% to  90.5%  of 2",
        "accuracy by section",
        "  Safety                   66.7%",
        "  Reasoning                75.0%",
    ]
    assert run(*command, "--by", "source") == 2
    assert f"{data}:1: has no 'source', by which --by divides the rows; its keys: chosen" in capsys.readouterr().err


# --- alpaca, mtbench, pairwise, winrate ------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path) -> Path:
    rows = [{"instruction": "What is 12 + 30?", "dataset": "koala"}, {"instruction": "And what is 3 + 4?"}]
    return write_rows(tmp_path / "asked.jsonl", *rows)


def test_alpaca_asks_a_checkpoint(models, asked, tmp_path, capsys):
    output = tmp_path / "model_outputs.json"
    assert run("alpaca", "--model", models["says42"], "--questions", asked, "--output", output, "--temperature", 0) == 0
    assert [row["output"] for row in json.loads(output.read_text())] == ["42", "42"]
    assert {row["generator"] for row in json.loads(output.read_text())} == {str(models["says42"])[1:].replace("/", "-")}
    assert capsys.readouterr().out == f"{output}: 2 answers, 0 cut at the limit of new tokens, 0 empty\n"


def test_alpaca_asks_a_server_and_mtbench_twice(serve, asked, tmp_path, capsys):
    server, output = serve(), tmp_path / "out.json"
    command = ("alpaca", "--endpoint", server.url, "--model", "served", "--questions", asked, "--output", output)
    assert (
        main([*map(str, command), "--generator", "notus", "--limit", "1", "--top-p", "0.9", "--system", "Be brief."])
        == 0
    )
    assert json.loads(output.read_text()) == [
        {
            "instruction": "What is 12 + 30?",
            "output": "You said What is 12 + 30?",
            "generator": "notus",
            "dataset": "koala",
        }
    ]
    (body,) = server.bodies
    assert (body["model"], body["max_tokens"], body["temperature"], body["top_p"]) == ("served", 2048, 0.7, 0.9)
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert "inserts the system turn 'Be brief.'" in capsys.readouterr().err

    questions = write_rows(tmp_path / "q.jsonl", {"question_id": 81, "category": "stem", "turns": ["a", "b"]})
    command = ("mtbench", "--endpoint", server.url, "--model", "served", "--questions", questions, "--output",
               tmp_path / "served.jsonl", "--model-id", "notus")  # fmt: skip
    assert main([*map(str, command)]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "served.jsonl").read_text().splitlines())
    assert row["choices"][0]["turns"] == ["You said a", "You said b"] and row["model_id"] == "notus"
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["a", "You said a", "b"]
    assert server.bodies[-1]["temperature"] == 0.1
    assert "inserts no system turn" in capsys.readouterr().err


def test_a_server_gets_the_trained_system_turn_where_its_model_is_a_directory_here(serve, asked, tmp_path, models):
    trained = tmp_path / "trained"
    shutil.copytree(models["uniform"], trained)
    write_frame(Frame(system_prompt=""), trained)
    for number, (options, first) in enumerate((([], "system"), (["--no-system"], "user"))):
        server = serve()
        command = ("alpaca", "--endpoint", server.url, "--model", trained, "--questions", asked, "--output",
                   tmp_path / f"{number}.json", *options)  # fmt: skip
        assert main([*map(str, command)]) == 0
        assert server.bodies[0]["messages"][0]["role"] == first


def test_pairwise(serve, tmp_path, capsys):
    """A server that prefers the answer with more letters."""

    def judge(handler, body, _):
        text = body["messages"][1]["content"]
        a, b = (text.split(f"Assistant {name}'s Answer]\n")[1].split("\n")[0] for name in "AB")
        reply(handler, completion(f"[[{'A' if len(a) > len(b) else 'B'}]]"))

    server = serve(judge)
    for name, texts in (("a", ["x", "xxxx", "x"]), ("b", ["xx", "xx", "xx"])):
        rows = [{"instruction": f"q{i}", "output": text} for i, text in enumerate(texts)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    verdicts = tmp_path / "verdicts.jsonl"
    command = ("pairwise", tmp_path / "a.json", tmp_path / "b.json", "--judge", server.url, "--judge-model", "j",
               "--output", verdicts, "--temperature", 1)  # fmt: skip
    for _ in range(2):  # the second time nothing is asked
        assert main([*map(str, command)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].startswith("win rate            66.7%  95 % interval 0.0% to 100.0%")
        assert lines[-1] == f"prompts and verdicts: {verdicts}"
        assert len(server.bodies) == 6
        assert all((body["max_tokens"], body["temperature"]) == (2048, 1) for body in server.bodies)


def test_winrate(tmp_path, capsys):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps([{"preference": value} for value in [2] * 735 + [1] * 69 + [None]]))
    assert main(["winrate", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "win rate        91.41791044776119 %",
        "standard error  0.9884492893847528 %",
    ]


def test_a_server_that_fails_is_exit_code_1(serve, asked, tmp_path, capsys):
    server = serve(lambda handler, *_: reply(handler, b"no such model", 404))
    command = (
        "alpaca",
        "--endpoint",
        server.url,
        "--model",
        "m",
        "--questions",
        asked,
        "--output",
        tmp_path / "o.json",
    )
    assert main([*map(str, command)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"notus.evaluate: error: {server.url}/chat/completions: question ")
    assert "HTTP 404 Not Found: no such model (tries: 1)" in error and not (tmp_path / "o.json").exists()


def test_bad_input_is_refused_before_anyone_is_asked(serve, models, asked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("notus.answers.load_model", lambda *_: pytest.fail("weights were read"))
    server, empty, good = serve(), write_rows(tmp_path / "empty"), tmp_path / "a.json"
    good.write_text('[{"instruction": "q", "output": "a"}]')
    first = ("alpaca", "--model", models["uniform"], "--output", tmp_path / "o.json")
    judged = ("pairwise", good, "--judge", server.url, "--judge-model", "j", "--output", tmp_path / "v")
    for command, message in (
        ([*first, "--questions", empty], "no questions in it"),
        ([*first, "--questions", tmp_path / "none"], "none: no such file"),
        ([*first, "--questions", asked, "--output", tmp_path / "nowhere" / "o.json"], "nowhere: no such directory"),
        ([*first, "--questions", asked, "--output", tmp_path], "a directory, so --output"),
        ([*first, "--questions", asked, "--model", tmp_path / "nowhere"], "nowhere: no such folder"),
        ([*first, "--questions", asked, "--endpoint", "localhost:8000"], "begins with http:// or https://"),
        ([*first, "--questions", asked, "--generator", "a/b"], "--generator a/b: must not hold a /"),
        ([*judged, empty], "no answers in it"),
        ([*judged, tmp_path / "none"], "none: no such file"),
        (["winrate", empty], "no row has a preference"),
    ):
        assert main([*map(str, command)]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
    for option, value in (("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "1.1"), ("--concurrency", "0"),
                          ("--timeout", "nan")):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, first), "--questions", str(asked), f"{option}={value}"])
        assert option in capsys.readouterr().err
    assert not server.bodies


def test_it_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "notus.evaluate", "-h"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert "python -m notus.evaluate exact-match --model BASE --model TRAINED" in result.stdout
