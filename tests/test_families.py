"""Llama, Qwen 2 and Qwen 3: each computes, reads text, trains, exports and answers as it does in transformers.

Mistral has its own tests (test_model.py, test_tokens.py, test_train.py, test_weights.py, test_generate.py)."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tiny import (
    config_json,
    gradients,
    hf_class,
    hf_load,
    hf_logps,
    hf_twin,
    logits_of,
    random_pairs,
    save_checkpoint,
    tiny_config,
    tiny_model,
    worst,
)
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from notus import generate
from notus.base import Frame, load_model, read_base
from notus.cost import num_parameters
from notus.dims import FAMILIES, Llama3Rope, MistralConfig
from notus.lora import TARGETS, LoRA, add_lora, initialize, lora_layers, peft_config
from notus.model import Mistral, pair_logps, rotary_table
from notus.packing import pack_pairs
from notus.weights import export, load_weights, meta_model

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

LLAMA_3_1, LLAMA_3_2 = Llama3Rope(8.0, 1.0, 4.0, 8192), Llama3Rope(32.0, 1.0, 4.0, 8192)

# --- the computation -------------------------------------------------------------------------------------------------


def random_config(rng: np.random.Generator, family: str) -> MistralConfig:
    kv_heads = int(rng.integers(1, 3))
    heads, head_dim = kv_heads * int(rng.choice([1, 2, 4])), int(rng.choice([2, 4, 6, 10]))
    scaling = None
    if family == "llama" and rng.integers(4):  # an original context so short that frequencies fall on all three sides
        scaling = Llama3Rope(float(rng.uniform(2, 32)), float(rng.uniform(0.2, 1)), float(rng.uniform(1.5, 4)), 60)
    return tiny_config(
        vocab_size=int(rng.integers(20, 200)),
        hidden_size=heads * int(rng.integers(3, 8)),
        intermediate_size=int(rng.integers(8, 60)),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-2])),
        rope_theta=float(rng.choice([1e2, 1e4, 1e6])),
        sliding_window=None if family == "llama" else [None, 2, 5][rng.integers(3)],
        tie_word_embeddings=bool(rng.integers(2)),
        rope_scaling=scaling,
        **FAMILIES[family][1],
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers_for_every_family(family: str):
    rng = np.random.default_rng(sorted(FAMILIES).index(family))
    for seed in range(8):
        config = random_config(rng, family)
        model = tiny_model(config, seed, torch.float32)
        twin = hf_twin(model, attention="sdpa" if seed % 2 else "eager", family=family)
        ids = torch.from_numpy(rng.integers(0, config.vocab_size, 24))
        start = int(rng.integers(0, 50))
        ours = logits_of(model, ids, start)
        theirs = twin(ids[None], position_ids=torch.arange(start, start + 24)[None]).logits[0]  # (T, V)
        assert worst({"": ours.detach()}, {"": theirs.detach()}) < 1e-5, config
        losses = [torch.nn.functional.cross_entropy(logits[:-1], ids[1:]) for logits in (ours, theirs)]
        assert worst(gradients(losses[0], model), gradients(losses[1], twin)) < 5e-5, config


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_order_of_parameters_are_those_of_transformers_for_every_family(family: str, tied: bool):
    config = tiny_config(tie_word_embeddings=tied, **FAMILIES[family][1])
    oracle = hf_class(family)
    with torch.device("meta"):
        twin = oracle(oracle.config_class(**config_json(config, spelling=5, family=family)))
    theirs = {name: parameter.shape for name, parameter in twin.named_parameters()}
    ours = {name: parameter.shape for name, parameter in meta_model(config).named_parameters()}
    assert list(ours.items()) == list(theirs.items())


PUBLISHED = {  # of each model on the hub: what its config.json holds, and how many parameters it has
    "llama 3.2 1B": ("llama", 1_235_814_400, (128256, 2048, 8192, 16, 32, 8, 64), 5e5, LLAMA_3_2, True),
    "llama 3.1 8B": ("llama", 8_030_261_248, (128256, 4096, 14336, 32, 32, 8, None), 5e5, LLAMA_3_1, False),
    "tinyllama": ("llama", 1_100_048_384, (32000, 2048, 5632, 22, 32, 4, None), 1e4, None, False),
    "smollm2 135M": ("llama", 134_515_008, (49152, 576, 1536, 30, 9, 3, None), 1e5, None, True),
    "qwen2.5 0.5B": ("qwen2", 494_032_768, (151936, 896, 4864, 24, 14, 2, None), 1e6, None, True),
    "qwen2.5 7B": ("qwen2", 7_615_616_512, (152064, 3584, 18944, 28, 28, 4, None), 1e6, None, False),
    "qwen3 0.6B": ("qwen3", 596_049_920, (151936, 1024, 3072, 28, 16, 8, 128), 1e6, None, True),
    "qwen3 8B": ("qwen3", 8_190_735_360, (151936, 4096, 12288, 36, 32, 8, 128), 1e6, None, False),
}
SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim",
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters_and_frequencies(name: str, tmp_path: Path):
    family, parameters, sizes, theta, scaling, tied = PUBLISHED[name]
    raw = {"model_type": family, "rope_theta": theta, "tie_word_embeddings": tied, "hidden_act": "silu"}
    raw |= {size: value for size, value in zip(SIZES, sizes, strict=True) if value is not None}
    if scaling:
        raw["rope_scaling"] = {"rope_type": "llama3", **scaling._asdict()}
    if family == "qwen2":  # on the hub all have a window, and none uses it
        raw |= {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 21}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    dims = MistralConfig.read(tmp_path)
    assert dims.sliding_window is None
    assert sum(parameter.numel() for parameter in meta_model(dims).parameters()) == parameters
    assert sum(num_parameters(dims)) == parameters

    # The angles at position 1 are the frequencies.
    rotary = getattr(sys.modules[hf_class(family).__module__], f"{family.capitalize()}RotaryEmbedding")
    inverse = rotary(AutoConfig.from_pretrained(tmp_path)).inv_freq.double()
    cos, sin = rotary_table(torch.tensor([1]), dims.head_dim, dims.rope_theta, torch.float64, dims.rope_scaling)
    assert torch.allclose(torch.atan2(sin, cos).flatten(), inverse, rtol=1e-6, atol=0)


def test_llama_3_stretches_slow_frequencies_keeps_fast_ones_and_blends_between():
    """The three cases of Llama 3.1 by hand, for frequencies that turn 8192 * f / 2 pi times in the original context."""
    table = rotary_table(torch.tensor([1]), 128, 5e5, torch.float64, LLAMA_3_1)
    ours = torch.atan2(table[1], table[0]).flatten().tolist()
    for i, found in enumerate(ours):
        plain = 5e5 ** (-2 * i / 128)
        turns = 8192 * plain / (2 * np.pi)
        share = (turns - 1) / 3  # 0 at one turn, 1 at four
        expected = plain / 8 if turns < 1 else plain if turns > 4 else share * plain + (1 - share) * plain / 8
        assert found == pytest.approx(expected, rel=1e-12), i
    assert len({8192 * 5e5 ** (-2 * i / 128) / (2 * np.pi) // 3 for i in range(64)}) > 3


def test_biases_begin_at_0_and_norms_at_1():
    for family in ("qwen2", "qwen3"):
        model = Mistral(tiny_config(**FAMILIES[family][1]))
        model.initialize(0)
        vectors = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 1}
        assert {name.split(".")[-2] for name in vectors} > {"norm", "input_layernorm"}
        for name, vector in vectors.items():
            assert torch.equal(vector, torch.full_like(vector, 0.0 if name.endswith("bias") else 1.0)), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("level", ["elementwise", "full"])
def test_packing_and_recomputation_change_nothing_for_any_family(family: str, level: str):
    """Shared prompts in one stream, against transformers on each sequence alone; biases are part of the products that
    `elementwise` keeps, so they are not computed twice."""
    config = tiny_config(rope_scaling=LLAMA_3_1 if family == "llama" else None, **FAMILIES[family][1])
    model = tiny_model(config, dtype=torch.float32)
    pairs = random_pairs(np.random.default_rng(0), 4, config.vocab_size)
    model.model.recompute = level
    ours = pair_logps(model, pack_pairs(pairs))
    twin = hf_twin(model)
    theirs = [hf_logps(twin, pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    assert torch.allclose(ours, torch.stack(theirs).view(-1, 2), rtol=1e-5, atol=0)
    ours = gradients((ours[:, 0] - ours[:, 1]).sum(), model)
    theirs = gradients((torch.stack(theirs).view(-1, 2) @ torch.tensor([1.0, -1.0])).sum(), twin)
    assert worst(ours, theirs) < 1e-4


# --- the text --------------------------------------------------------------------------------------------------------

LLAMA_3_TEMPLATE = (
    "{% for message in messages %}{% set text = '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' "
    "+ message.content | trim + '<|eot_id|>' %}{{ bos_token + text if loop.first else text }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML_TEMPLATE = (  # with a system turn of its own, like those of Qwen 2.5 and SmolLM2
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING_TEMPLATE = (  # Qwen 3's: the last answer gets a block of thoughts, if only an empty one, and earlier ones none
    "{% for message in messages %}{% set ns = namespace(text=message.content) %}"
    "{% if message.role == 'assistant' %}{% set ns.text = ns.text.split('</think>')[-1].lstrip('\n') %}"
    "{% if loop.last %}{% set ns.text = '<think>\n\n</think>\n\n' + ns.text %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\n' + ns.text + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not "
    "enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def split_by(regex: str) -> pre_tokenizers.PreTokenizer:
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_of_words])


DIGITS_ALONE = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)
# kind: its tokenizer's rules, special tokens, tokenizer_config.json, EOS ids by name, template, and dimensions
KINDS = {
    "llama3": {
        "rules": split_by(PRETOKENIZE_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
        "special": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "config": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
        },
        "stop": ["<|end_of_text|>", "<|eot_id|>"], "template": LLAMA_3_TEMPLATE, "bos": True,
        "dims": {"rope_scaling": Llama3Rope(8.0, 1.0, 4.0, 30), "tie_word_embeddings": True},
    },
    "smollm2": {
        "rules": DIGITS_ALONE, "special": CHATML_TOKENS,
        "config": {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        "stop": ["<|im_end|>"], "template": CHATML_TEMPLATE, "bos": True,
        "dims": {"tie_word_embeddings": True},
    },
    "qwen2": {
        "rules": split_by(PRETOKENIZE_REGEX), "special": CHATML_TOKENS,
        "config": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"},
        "stop": ["<|im_end|>", "<|endoftext|>"], "template": CHATML_TEMPLATE, "bos": False,
        "dims": {"qkv_bias": True, "tie_word_embeddings": True},
    },
    "qwen3": {
        "rules": split_by(PRETOKENIZE_REGEX), "special": [*CHATML_TOKENS, "<think>", "</think>"],
        "config": {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|im_end|>"},
        "stop": ["<|im_end|>", "<|endoftext|>"], "template": THINKING_TEMPLATE, "bos": False,
        "dims": {"qk_norm": True},
    },
}  # fmt: skip


def write_tokenizer(directory: Path, kind: str) -> tokenizers.Tokenizer:
    """A byte-level BPE with the rules and the special tokens of a family, trained on the README."""
    made = KINDS[kind]
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer, tokenizer.decoder = made["rules"], decoders.ByteLevel()
    if kind.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(ROOT / "README.md")], trainer)
    thoughts = [AddedToken(text, special=False, normalized=False) for text in ("<think>", "</think>")]
    tokenizer.add_special_tokens([text for text in made["special"] if "think" not in text])
    tokenizer.add_tokens([token for token in thoughts if token.content in made["special"]])
    if kind == "llama3":  # which puts BOS in front of every text; the template writes it as well
        begin = "<|begin_of_text|>"
        ids = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=ids
        )
    tokenizer.save(str(directory / "tokenizer.json"))
    decoder = {str(i): token_json(token) for i, token in tokenizer.get_added_tokens_decoder().items()}
    settings = made["config"] | {"chat_template": made["template"], "added_tokens_decoder": decoder}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    stop = {"eos_token_id": [tokenizer.token_to_id(token) for token in made["stop"]]}
    (directory / "generation_config.json").write_text(json.dumps(stop))
    return tokenizer


def token_json(token: AddedToken) -> dict:
    flags = ("lstrip", "normalized", "rstrip", "single_word", "special")
    return {"content": token.content} | {flag: getattr(token, flag) for flag in flags}


@pytest.fixture(scope="module", params=KINDS)
def base(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of a family: weights, tokenizer and template in its shape. The folder's name is the kind."""
    directory = tmp_path_factory.mktemp("families") / request.param
    directory.mkdir()
    tokenizer = write_tokenizer(directory, request.param)
    dims = KINDS[request.param]["dims"]
    config = tiny_config(vocab_size=tokenizer.get_vocab_size(), hidden_size=24, initializer_range=0.1, **dims)
    family = "llama" if request.param in ("llama3", "smollm2") else None
    return save_checkpoint(tiny_model(config), directory, family=family)


def oracle_of(base: Path) -> PreTrainedTokenizerFast:
    """transformers 5 ignores the rules of a tokenizer.json whose class is GPT2Tokenizer, as SmolLM2's is."""
    return (PreTrainedTokenizerFast if base.name == "smollm2" else AutoTokenizer).from_pretrained(base)


def frame_of(base: Path) -> Frame:
    """The template has its own system turn, or none."""
    return Frame(bos=KINDS[base.name]["bos"], system_prompt=None)


TURNS = [
    [("user", "In 2024 it's 12345 of them,\n\n  isn't it?")],
    [
        ("system", "Be brief."),
        ("user", "Café \u00e9 e\u0301 你好 🙂\tx"),
        ("assistant", "No. 7"),
        ("user", "<|im_end|> eot?"),
    ],
]


@pytest.mark.parametrize("turns", TURNS, ids=["digits", "turns"])
def test_ids_are_those_of_transformers_for_every_kind_of_tokenizer(base: Path, turns: list):
    oracle, encoder = oracle_of(base), read_base(base).encoder(frame_of(base))
    messages = [{"role": role, "content": content} for role, content in turns]
    answers = ["It's 3.14159!", " Well\n\nthen.  "]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encoder.prompt(messages) == expected
    ((prompt, ids, reaches),) = encoder.encode([(messages, answers)])
    assert prompt == expected and not reaches
    for answer, found in zip(answers, ids, strict=True):
        whole = oracle.apply_chat_template([*messages, {"role": "assistant", "content": answer}], return_dict=False)
        after = len(whole) - whole[::-1].index(oracle.eos_token_id)
        assert prompt + found == whole[:after]  # ChatML has a line end after EOS, which is never sampled
        assert found.count(oracle.eos_token_id) == 1
        assert encoder.tokenizer.decode(found) == oracle.decode(found, skip_special_tokens=True)
    bos = encoder.tokenizer.bos_id
    assert bos == oracle.bos_token_id and (bos is None) == base.name.startswith("qwen")
    assert (base.name == "llama3") == (prompt[0] == bos == oracle.convert_tokens_to_ids("<|begin_of_text|>"))


def test_what_notus_says_about_a_familys_files(base: Path):
    """Generation stops at every EOS that the files name; a tokenizer without BOS needs data.bos=false; and SmolLM2's
    class makes transformers 5 read its digits otherwise."""
    read, oracle = read_base(base), oracle_of(base)
    assert read.stop_ids == set(oracle.convert_tokens_to_ids(KINDS[base.name]["stop"]))
    if base.name.startswith("qwen"):
        with pytest.raises(ValueError, match=r"this tokenizer has no BOS token: set data\.bos=false"):
            read.encoder(Frame(bos=True, system_prompt=None)).prompt([{"role": "user", "content": "x"}])
    told = [note for note in read.notes if "transformers 5 ignores the rules" in note]
    assert bool(told) == (base.name == "smollm2")
    ids = [each.encode("of  12", add_special_tokens=False) for each in (oracle, AutoTokenizer.from_pretrained(base))]
    assert (ids[0] != ids[1]) == bool(told)
    system = read.frame_notes(Frame(bos=False, system_prompt=""))
    assert any("has a system prompt of its own" in note for note in system) == (base.name in ("smollm2", "qwen2"))


# --- the run ---------------------------------------------------------------------------------------------------------

ROWS = [
    ("What is 2 + 2?", "It is 4.", "It's 5, I think."),
    ("Name a colour.", "Blue.", "A fish!"),
    ("Say hello.", "Hello, you.", "No."),
    ("Is the sea dry?", "No, it is wet.", "Yes, very dry, 100 %."),
]
STEPS, RATE, BETA = 4, 1e-3, 0.1


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of train.py over a family's base: each step is all four pairs -> its output folder."""
    home = tmp_path_factory.mktemp("run")
    pairs = [
        {
            side: [{"role": "user", "content": user}, {"role": "assistant", "content": text}]
            for side, text in (("chosen", good), ("rejected", bad))
        }
        for user, good, bad in ROWS
    ]
    (home / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    settings = {
        "model.path": base, "data.train": home / "train.jsonl", "data.test": "",
        "data.cache_dir": home / "tokens", "reference.cache_dir": home / "reference", "data.insert_system": "false",
        "data.bos": str(KINDS[base.name]["bos"]).lower(), "train.output_dir": home / "out", "train.device": "cpu",
        "train.learning_rate": RATE, "train.optimizer": "adamw", "train.warmup_ratio": 0, "train.max_grad_norm": 1e9,
        "train.num_train_epochs": STEPS, "train.pairs_per_step": len(ROWS), "train.micro_batch_tokens": 150,
        "train.compute_dtype": "float32", "train.export_dtype": "float32", "dpo.beta": BETA,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert train.main([f"{name}={value}" for name, value in settings.items()]) == 0
    return home / "out"


CONFIGS = {
    "llama3": ("llama-3.2-1b", "llama-3.1-tulu-3-8b"), "smollm2": ("smollm2-135m",),
    "qwen2": ("qwen2.5-0.5b", "qwen2.5-7b"), "qwen3": ("qwen3-0.6b", "qwen3-8b"),
}  # fmt: skip


def test_the_shipped_configs_of_a_family_read_its_template_and_tokenizer(base: Path, finished: Path, tmp_path, capsys):
    """In a dry run, which checks the frame: no BOS where there is none, no system turn beside the template's own."""
    for name in CONFIGS[base.name]:
        data = {"data.train": finished.parent / "train.jsonl", "data.test": "", "data.cache_dir": tmp_path / name}
        settings = data | {"model.path": base, "train.output_dir": tmp_path / "out", "train.device": "cpu"}
        words = [f"{key}={value}" for key, value in settings.items()]
        assert train.main([str(ROOT / "configs" / f"{name}.toml"), "--dry-run", *words]) == 0, name
        report = capsys.readouterr().out
        assert "4 pairs of 4 rows" in report
        assert "system prompt of its own" not in report and "system turn" not in report


def test_a_run_is_a_plain_loop_over_transformers_for_every_family(base: Path, finished: Path):
    """transformers' model, tokenizer and template, a second model as the reference, and torch's AdamW."""
    oracle, policy, reference = oracle_of(base), hf_load(base).train(), hf_load(base)
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=0.0)
    sides = []
    for user, *answers in ROWS:
        messages = [{"role": "user", "content": user}]
        prompt = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        for answer in answers:
            told = [*messages, {"role": "assistant", "content": answer}]
            ids = oracle.apply_chat_template(told, return_dict=False)
            ids = ids[: len(ids) - ids[::-1].index(oracle.eos_token_id)]
            assert ids[: len(prompt)] == prompt
            sides.append((np.array(prompt), np.array(ids[len(prompt) :])))

    losses = []
    with torch.no_grad():
        old = torch.stack([hf_logps(reference, *side) for side in sides]).view(-1, 2)
    for step in range(STEPS):
        ratios = torch.stack([hf_logps(policy, *side) for side in sides]).view(-1, 2) - old
        loss = -torch.nn.functional.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * (STEPS - step) / STEPS
        optimizer.step()
        losses.append(loss.item())
    lines = map(json.loads, (finished / "metrics.jsonl").read_text().splitlines())
    ours = [line["loss"] for line in lines if "loss" in line]
    assert ours == pytest.approx(losses, rel=2e-5)
    assert losses[-1] < 0.95 * losses[0]
    theirs, exported = dict(policy.named_parameters()), load_file(finished / "final" / "model.safetensors")
    assert exported.keys() == theirs.keys()
    start = load_file(base / "model.safetensors")
    for name, tensor in exported.items():
        if not name.endswith("k_proj.bias"):  # AdamW makes a whole step of a gradient that is rounding
            assert torch.allclose(tensor, theirs[name], rtol=0, atol=2e-4), name
        assert not torch.equal(tensor, start[name]), name


def test_a_trained_export_answers_in_notus_as_in_transformers(base: Path, finished: Path, capsys):
    """Greedily, token by token, in the frame that the run left in the export."""
    final = finished / "final"
    read, oracle, twin = read_base(final), oracle_of_export(final, base.name), hf_load(final)
    assert read.frame == replace(frame_of(base), max_length=256, max_prompt_length=128, beta=BETA)
    model = load_model(read, torch.device("cpu"), torch.float32)
    prompts = [read.encoder(read.frame).prompt([{"role": "user", "content": user}]) for user, *_ in ROWS]
    ours = generate.generate(model, prompts, 12, read.stop_ids)
    for prompt, found in zip(prompts, ours, strict=True):
        inputs = torch.tensor([prompt])
        theirs = twin.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=12, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        theirs = theirs[: next((i for i, token in enumerate(theirs) if token in read.stop_ids), len(theirs))]
        assert found == theirs
    asked = ["--model", str(final), "--prompt", ROWS[0][0], "--max-new-tokens", "12", "--device", "cpu"]
    assert generate.main([*asked, "--dtype", "float32", "--temperature", "0"]) == 0
    assert oracle.decode(ours[0], skip_special_tokens=True).strip() in capsys.readouterr().out


def oracle_of_export(final: Path, kind: str) -> PreTrainedTokenizerFast:
    return (PreTrainedTokenizerFast if kind == "smollm2" else AutoTokenizer).from_pretrained(final)


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_untrained_export_is_the_base_byte_for_byte_for_every_family(tmp_path: Path, family: str, spelling: int):
    """Weights as they were, a config.json in which transformers finds the same model, and logits to prove it."""
    config = tiny_config(hidden_size=24, rope_theta=5e5, **FAMILIES[family][1])
    config = replace(config, rope_scaling=Llama3Rope(4.0, 0.5, 2.0, 20) if family == "llama" else None)
    base = save_checkpoint(tiny_model(config), tmp_path / "base", spelling=spelling, family=family)
    assert MistralConfig.read(base) == config
    model = meta_model(config)
    load_weights(model, base, torch.device("cpu"))
    export(model, base, tmp_path / "out", torch.float32, "card", eos_id=2)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert MistralConfig.read(tmp_path / "out") == config
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_theta"] == 5e5  # where transformers 4 looks for it, in both spellings, and the scaling too
    assert (raw.get("rope_scaling") or {}).get("rope_type") == ("llama3" if family == "llama" else None)
    ids = torch.arange(3, 40)
    with torch.no_grad():
        ours, theirs = logits_of(model, ids), hf_load(tmp_path / "out")(ids[None]).logits[0]
    assert worst({"": ours}, {"": theirs}) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_is_pefts_for_every_family_as_an_adapter_and_merged(tmp_path: Path, family: str):
    """The biases of Qwen 2 and the norms of Qwen 3 are frozen, and stay in the merged model."""
    import peft

    config, lora = tiny_config(hidden_size=24, **FAMILIES[family][1]), LoRA(3, 16.0, TARGETS)
    base = save_checkpoint(tiny_model(config), tmp_path / "base", family=family)
    (base / "tokenizer.json").write_text("{}")
    model = tiny_model(config, dtype=torch.float32)
    add_lora(model, lora, torch.float32)
    initialize(model, 0)
    with torch.no_grad():
        for layer in lora_layers(model).values():  # as if it had learned something
            layer.lora_b.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(0))
    adapter = peft_config(lora, str(base))
    export(model, base, tmp_path / "adapter", torch.float32, "card", eos_id=2, adapter=adapter)
    export(model, base, tmp_path / "merged", torch.float32, "card", eos_id=2)
    ids = torch.arange(3, 40)
    with torch.no_grad():
        ours, plain = logits_of(model, ids), hf_load(base)(ids[None]).logits[0]
        theirs = peft.PeftModel.from_pretrained(hf_load(base), tmp_path / "adapter").eval()(ids[None]).logits[0]
        merged = hf_load(tmp_path / "merged")(ids[None]).logits[0]
    assert worst({"": ours}, {"": theirs}) < 1e-5
    assert worst({"": ours}, {"": merged}) < 1e-5
    assert worst({"": ours}, {"": plain}) > 0.01
