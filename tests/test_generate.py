"""Decoding against re-reading the whole text and against transformers; sampling against brute force; the terminal."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import pytest
import torch
from conftest import write_mistral_tokenizer
from tiny import hf_twin, logits_of, save_checkpoint, tiny_config, tiny_model

import notus.generate
from notus.attention import KVCache
from notus.base import Frame, load_model, read_base
from notus.generate import (
    generate,
    main,
    noise,
    nucleus,
    sample,
    stream,
    text_stream,
)
from notus.model import Mistral
from notus.tokenizer import SentencePieceTokenizer, load_tokenizer

PROMPTS = [[7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [27, 18, 28, 18]]  # shorter and longer than the window of 5
STOP = set(range(0, 97, 9))  # so that sequences leave at different steps
SAMPLING = {"temperature": 0.8, "top_p": 0.9, "seed": 3}


def model_with(seed: int = 0, dtype: torch.dtype = torch.float64, **dimensions) -> Mistral:
    return tiny_model(tiny_config(**{"sliding_window": 5} | dimensions), seed, dtype)


@torch.no_grad()
def reread(model, prompt, max_new_tokens, stop, temperature=0.0, top_p=1.0, seed=0) -> list[int]:
    """One sequence, no cache: every token is computed from the whole text before it."""
    generator, ids = noise(seed, prompt), list(prompt)
    for _ in range(max_new_tokens):
        logits = logits_of(model, torch.tensor(ids))[-1:]
        uniform = torch.rand(1, dtype=torch.float64, generator=generator)
        token = int(sample(logits, uniform, temperature, top_p))
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampled"])
@pytest.mark.parametrize("window", [5, None])
def test_the_cache_equals_reading_the_whole_text_again(window, sampling):
    for seed in range(4):
        model = model_with(seed, sliding_window=window)
        expected = [reread(model, prompt, 20, STOP, **sampling) for prompt in PROMPTS]
        assert generate(model, PROMPTS, 20, STOP, **sampling) == expected


def test_the_test_above_ends_sequences_at_different_steps():
    lengths = {tuple(map(len, generate(model_with(seed), PROMPTS, 20, STOP, **SAMPLING))) for seed in range(4)}
    assert any(len(set(ragged)) > 1 for ragged in lengths)


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_its_company(sampling):
    model = model_with()
    alone = [generate(model, [prompt], 12, (), **sampling)[0] for prompt in PROMPTS]
    assert generate(model, PROMPTS[::-1], 12, (), **sampling) == alone[::-1]


def test_seeds_and_prompts_bring_their_own_noise():
    def first(seed, prompt):
        return float(torch.rand((), generator=noise(seed, prompt)))

    values = [first(0, [1, 2]), first(1, [1, 2]), first(0, [1, 3]), first(0, [12])]
    assert len(set(values)) == 4
    assert first(0, (1, 2)) == values[0]


@pytest.mark.parametrize("window", [5, None])
def test_greedy_equals_transformers(window):
    model = model_with(sliding_window=window)
    twin = hf_twin(model)
    for prompt, answer in zip(PROMPTS, generate(model, PROMPTS, 16, {11}), strict=True):
        ids = torch.tensor([prompt])
        whole = twin.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=16,
            eos_token_id=11,
            pad_token_id=0,
        )
        expected = whole[0, len(prompt) :].tolist()
        assert answer == (expected[:-1] if expected[-1] == 11 else expected)


def test_an_answer_ends_before_its_stop_token_and_the_others_go_on():
    model = model_with()
    free = generate(model, PROMPTS, 10, ())
    token = free[0][4]
    expected = [answer[: answer.index(token)] if token in answer else answer for answer in free]
    assert len(expected[0]) <= 4 < max(map(len, expected))
    assert generate(model, PROMPTS, 10, {token}) == expected
    assert generate(model, PROMPTS, 10, set(range(97))) == [[], [], []]


def test_the_cache_has_no_place_too_many(monkeypatch):
    caches = []

    class Spy(KVCache):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            caches.append(self)

    monkeypatch.setattr(notus.generate, "KVCache", Spy)
    generate(model_with(dtype=torch.bfloat16), PROMPTS, 6, ())
    (cache,) = caches
    assert [keys.shape for keys in cache.keys] == 2 * [(3, 2, 11 + 6 - 1, 6)]  # of two layers (S, K, C, d)
    assert max(cache.lengths) == 16
    assert cache.keys[0].dtype == torch.bfloat16


def test_stream_yields_a_step_as_soon_as_it_is_computed():
    model, reads = model_with(), []
    model.register_forward_hook(lambda *_: reads.append(1))
    steps = stream(model, PROMPTS, 5, ())
    assert next(steps).keys() == {0, 1, 2}
    assert len(reads) == 1


# --- sampling ------------------------------------------------------------------------------------------------------


def test_nucleus_is_the_smallest_set_that_holds_top_p():
    generator = torch.Generator().manual_seed(0)
    for top_p in (0.05, 0.3, 0.5, 0.9, 0.999):
        probs = torch.rand(5, 6, dtype=torch.float64, generator=generator).pow(3)
        probs /= probs.sum(-1, keepdim=True)
        for row, kept in zip(probs, nucleus(probs, top_p), strict=True):
            chosen = kept.nonzero().flatten().tolist()
            assert kept[chosen].tolist() == row[chosen].tolist()
            assert kept.sum() >= top_p
            for smaller in combinations(range(6), len(chosen) - 1):
                assert row[list(smaller)].sum() < top_p
            for rival in combinations(range(6), len(chosen)):
                assert row[list(rival)].sum() <= kept.sum() + 1e-12


@pytest.mark.parametrize("temperature", [0.25, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_tokens_come_as_often_as_their_probability_says(temperature, top_p):
    logits, n = torch.tensor([1.0, -1.0, 2.0, 0.5, 1.9]), 20_000
    weights = [float((logit / temperature).exp()) for logit in logits]
    if top_p < 1:
        held, rest = 0.0, sum(weights)
        for token in sorted(range(5), key=lambda i: -weights[i]):
            weights[token], held = weights[token] * (held < top_p * rest), held + weights[token]
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # evenly, so the counts are exact to 1
    counts = sample(logits.expand(n, 5), uniform, temperature, top_p).bincount(minlength=5)
    expected = torch.tensor(weights, dtype=torch.float64) * n / sum(weights)
    torch.testing.assert_close(counts.double(), expected, rtol=0, atol=1.01)


def test_noise_of_0_picks_no_token_of_probability_0():
    logits = torch.tensor([[-torch.inf, 0.0, 0.0]])
    assert sample(logits, torch.zeros(1, dtype=torch.float64), 1.0, 1.0).tolist() == [1]


def test_temperature_0_is_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, 4.0, 4.9]])
    assert sample(logits, torch.tensor([0.99, 0.99]), 0.0, 1.0).tolist() == [1, 0]


# --- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_streamed_text_never_shows_a_part_of_a_character(mistral_tokenizer_dir, file):
    tokenizer = load_tokenizer(mistral_tokenizer_dir)
    if file == "tokenizer.model":
        tokenizer = SentencePieceTokenizer(mistral_tokenizer_dir / file)
    text = "Grüße 🙂🦉, 𓂀 你好 — ꙮ!\n  indented\n"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode(ids[: n + 1]) for n in range(len(ids)))  # characters do get cut
    pieces = list(text_stream(iter(ids), tokenizer))
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert len(pieces) > 10
    owl = tokenizer.encode("a🦉")
    assert list(text_stream(owl[:-1], tokenizer)) == ["a", tokenizer.decode(owl[:-1])[1:]]  # ends inside it
    assert list(text_stream([tokenizer.eos_id, *owl], tokenizer)) == ["a", "🦉"]  # special tokens are not shown


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Random weights behind Mistral's tokenizer."""
    model = model_with(vocab_size=32000, sliding_window=None)
    return write_mistral_tokenizer(save_checkpoint(model, tmp_path_factory.mktemp("checkpoint")))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def answer(model_dir: Path, *turns: str, system: str | None = "", bos: bool = True, **sampling) -> str:
    """What the command should say to the last turn."""
    base = read_base(model_dir)
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    ids = base.encoder(Frame(bos=bos, system_prompt=system)).prompt(messages)
    model = load_model(base, torch.device("cpu"), torch.float32)
    (tokens,) = generate(model, [ids], 8, base.stop_ids, **sampling)
    return base.tokenizer.decode(tokens)


def test_prompt_option_and_pipe_give_the_answer(checkpoint, capsys, monkeypatch):
    command = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "8"]
    assert main([*command, "--prompt", "Hi", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == answer(checkpoint, "Hi") + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nthere\n"))
    assert main([*command, "--seed", "5", "--top-p", "0.9"]) == 0
    assert capsys.readouterr().out == answer(checkpoint, "Hi\nthere", temperature=0.7, top_p=0.9, seed=5) + "\n"


def test_chat_remembers_and_resets(checkpoint, capsys, monkeypatch):
    def lines(*typed):
        monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in typed)))
        command = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "8", "--temperature", "0"]
        assert main(command) == 0
        return capsys.readouterr().out

    first = answer(checkpoint, "Hi")
    second = answer(checkpoint, "Hi", first, "And?")
    assert second != answer(checkpoint, "And?")
    assert lines("Hi", "", "And?", "/exit", "never read") == f"\n> {first}\n\n> \n> {second}\n\n> "
    assert lines("Hi", "/reset", "And?") == f"\n> {first}\n\n> \n> {answer(checkpoint, 'And?')}\n\n> \n"  # Ctrl-D


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(capsys, monkeypatch):
    heard = []

    def reply(messages):
        heard.append([message["content"] for message in messages])
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Terminal("one\ntwo\n"))
    notus.generate.chat(reply)
    assert heard == [["one"], ["one", "so far", "two"]]
    assert capsys.readouterr().out == "\n> so far\n\n> so far\n\n> \n"


def test_a_model_is_asked_in_the_frame_of_its_training_unless_told_otherwise(checkpoint, tmp_path, capsys):
    """Law 12. A change of the frame is announced, because it changes the answer."""
    trained = shutil.copytree(checkpoint, tmp_path / "trained")
    (trained / "notus.json").write_text(json.dumps(asdict(Frame(bos=False, system_prompt="Be brief."))))
    command = ["--model", str(trained), "--device", "cpu", "--max-new-tokens", "8", "--temperature", "0"]
    for options, frame, said in (
        ([], {"bos": False, "system": "Be brief."}, ""),
        (["--bos"], {"bos": True, "system": "Be brief."}, "trained with bos = False, asked with True"),
        (["--no-system"], {"bos": False, "system": None}, "system_prompt = 'Be brief.', asked with None"),
        (["--system", "Be brief."], {"bos": False, "system": "Be brief."}, ""),
    ):
        assert main([*command, "--prompt", "Hi", *options]) == 0
        out, err = capsys.readouterr()
        assert out == answer(checkpoint, "Hi", **frame) + "\n"
        assert said in err and bool(said) == bool(err)
    assert answer(checkpoint, "Hi") != answer(checkpoint, "Hi", bos=False, system="Be brief.")


def test_what_a_user_should_know_about_the_files_is_said(checkpoint: Path, tmp_path: Path, capsys):
    """By every command that asks a model: they all choose its frame in one place."""
    dated = shutil.copytree(checkpoint, tmp_path / "dated")
    path = dated / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = "{% set today = strftime_now('%d') %}" + settings["chat_template"]
    path.write_text(json.dumps(settings))
    assert main(["--model", str(dated), "--prompt", "Hi", "--device", "cpu", "--max-new-tokens", "1"]) == 0
    assert re.fullmatch(rf"{dated}: note: .* writes the day's date: .*\n", capsys.readouterr().err)


def test_system_and_bos_options_reach_the_prompt(checkpoint, capsys):
    command = ["--model", str(checkpoint), "--device", "cpu", "--max-new-tokens", "8", "--temperature", "0"]
    for options, frame in (
        (["--system", "Be brief."], {"system": "Be brief."}),
        (["--no-system", "--no-bos"], {"system": None, "bos": False}),
    ):
        assert main([*command, "--prompt", "Hi", *options]) == 0
        expected = answer(checkpoint, "Hi", **frame)
        assert expected != answer(checkpoint, "Hi")
        assert capsys.readouterr().out == expected + "\n"


def test_weights_are_loaded_in_the_dtype_asked_for(checkpoint):
    base = read_base(checkpoint)
    model, wide = (load_model(base, torch.device("cpu"), dtype) for dtype in (torch.bfloat16, torch.float32))
    for (name, parameter), expected in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16 and not parameter.requires_grad, name
        assert torch.equal(parameter, expected.bfloat16()), name


def test_bad_input_is_one_line_and_exit_code_2_before_weights_are_read(checkpoint, tmp_path, capsys, monkeypatch):
    small = write_mistral_tokenizer(save_checkpoint(model_with(), tmp_path / "small"))
    no_weights = write_mistral_tokenizer(tmp_path / "no weights")
    (no_weights / "config.json").write_text((checkpoint / "config.json").read_text())
    bad_stop = write_mistral_tokenizer(save_checkpoint(model_with(vocab_size=32000), tmp_path / "bad stop"))
    (bad_stop / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    monkeypatch.setattr("notus.base.load_weights", lambda *_: pytest.fail("weights were read"))
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    for options, message in (
        (["--model", str(tmp_path / "nowhere"), "--prompt", "Hi"], "nowhere: no such folder"),
        (["--model", str(no_weights), "--prompt", "Hi"], "no weights in safetensors format"),
        (["--model", str(small), "--prompt", "Hi"], "embedding has only 97 rows"),
        (["--model", str(bad_stop), "--prompt", "Hi"], "generation_config.json: eos_token_id is '</s>'"),
        (["--model", str(checkpoint), "--prompt", " "], "the prompt is empty"),
        (["--model", str(checkpoint)], "the prompt is empty"),  # piped
    ):
        assert main([*options, "--device", "cpu"]) == 2
        *notes, error = capsys.readouterr().err.splitlines()
        assert message in error and all(": note: " in note for note in notes)
    for option, value in (("--temperature", "-1"), ("--temperature", "nan"), ("--top-p", "0"), ("--top-p", "1.5"),
                          ("--max-new-tokens", "0"), ("--dtype", "int8")):  # fmt: skip
        with pytest.raises(SystemExit, match="2"):
            main(["--model", str(checkpoint), "--prompt", "Hi", option, value])
        assert option in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_cuda_without_a_gpu_is_refused(checkpoint, capsys):
    assert main(["--model", str(checkpoint), "--prompt", "Hi", "--device", "cuda"]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "notus.generate", "--model", str(tmp_path / "nowhere"), "--prompt", "Hi"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "no such folder" in result.stderr and "Traceback" not in result.stderr
