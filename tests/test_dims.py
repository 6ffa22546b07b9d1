"""dims.py: config.json is read as transformers reads it, and nothing in it ends in a traceback."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tiny import config_json, hf_class, tiny_config

from notus.dims import FAMILIES, NUMBERS, Llama3Rope, MistralConfig
from notus.plan import MISTRAL_7B
from notus.weights import meta_model


def write(directory: Path, raw: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_of_config_json_read_the_same(tmp_path: Path, family: str):
    config = tiny_config(
        rope_theta=123456.0, sliding_window=None if family == "llama" else 77, rms_norm_eps=3e-6, hidden_size=24,
        tie_word_embeddings=True, rope_scaling=Llama3Rope(3.0, 1.5, 2.5, 99), **FAMILIES[family][1],
    )  # fmt: skip
    for spelling in (4, 5):
        assert MistralConfig.read(write(tmp_path, config_json(config, spelling, family=family))) == config
    theirs = hf_class(family).config_class(**config_json(config, spelling=5, family=family))
    theirs.save_pretrained(tmp_path)  # as the installed version writes it, layer_types and all
    assert MistralConfig.read(tmp_path) == config


def test_mistral_7bs_own_config_json(tmp_path: Path):
    raw = {  # mistralai/Mistral-7B-v0.1, word for word; it has no head_dim
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
    }  # fmt: skip
    assert MistralConfig.read(write(tmp_path, raw)) == MISTRAL_7B


@pytest.mark.parametrize("family", FAMILIES)
def test_what_config_json_leaves_out_or_sets_to_null_is_what_transformers_takes(tmp_path: Path, family: str):
    sizes = {name: 64 for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"model_type": family, "num_attention_heads": 32}
    nulls = dict.fromkeys(("head_dim", "sliding_window", "rope_parameters", "num_key_value_heads"))
    if family == "mistral":
        nulls.pop("num_key_value_heads")  # transformers 5 refuses it, version 4 takes as many as query heads
        raw = sizes | {"num_key_value_heads": None}
        assert MistralConfig.read(write(tmp_path, raw)).num_key_value_heads == 32
    if family.startswith("qwen"):
        nulls.pop("head_dim")
    window = {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 7, "layer_types": None}
    for raw in (sizes, sizes | nulls, sizes | window, sizes | window | {"use_sliding_window": False}):
        ours = MistralConfig.read(write(tmp_path, raw))
        theirs = hf_class(family).config_class.from_pretrained(tmp_path)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        head_dim = getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
        found = {"rope_theta", "head_dim", "sliding_window", "qkv_bias", "qk_norm", "rope_scaling"}
        others = {name: value for name, value in asdict(ours).items() if name not in found}
        assert others == {name: getattr(theirs, name) for name in others} and ours.head_dim == head_dim
        with torch.device("meta"):
            theirs.num_hidden_layers, kinds = 1, getattr(theirs, "layer_types", None)
            theirs.layer_types = kinds and kinds[:1]
            attention = hf_class(family)(theirs).model.layers[0].self_attn
        # Llama has no such attribute. Mistral's attention reads the config's, Qwen's its own.
        own = None if family == "llama" else theirs.sliding_window if family == "mistral" else attention.sliding_window
        assert ours.sliding_window == own


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True; this model needs False"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True; this model needs False"),
        (
            "llama",
            {"hidden_size": 22},
            "hidden_size 22 is not a multiple of num_attention_heads 4, as it must be in a ll",
        ),
        (
            "llama",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is ['full_attention', 'sliding_",
        ),
        ("qwen3", {"attention_bias": True}, "attention_bias is True; this model needs False"),
        ("qwen2", {"head_dim": None}, "head_dim is missing"),
        ("llama", {"pretraining_tp": "2"}, "pretraining_tp is '2', which transformers cannot load"),
        ("llama", {"mlp_bias": 0}, "mlp_bias is 0, which transformers cannot load"),
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1, which transformers cannot load"),
        ("qwen2", {"sliding_window": "7"}, "sliding_window is '7', which transformers cannot load"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
            "max_window_layers is 1; this model needs one window for all layers, or none",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "layer_types is ['full_attention', 'sliding_attention']; this model needs one window for all layers",
        ),
        (
            "qwen3",
            {"layer_types": "full"},
            "layer_types is 'full'; this model needs one window for all layers, or none",
        ),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": -1},
            "max_window_layers is -1; it must be a whole number from 0",
        ),
        (
            "mistral",
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types is ['sliding_attention', 'sliding_attenti",
        ),
    ],
    ids=lambda value: f"{value!s:.60}",
)
def test_what_would_change_a_familys_computation_is_refused_by_name(
    tmp_path: Path, family: str, change: dict, message: str
):
    config = tiny_config(hidden_size=24, **FAMILIES[family][1])
    assert MistralConfig.read(write(tmp_path, config_json(config, family=family))) == config
    with pytest.raises(ValueError) as caught:
        MistralConfig.read(write(tmp_path, config_json(config, family=family) | change))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: {message}")


def test_keys_that_transformers_ignores_in_a_family_are_ignored(tmp_path: Path):
    """A Llama has no window, whatever its config.json says, and a Qwen's is off until use_sliding_window is true."""
    llama, qwen = tiny_config(hidden_size=24), tiny_config(qkv_bias=True)
    more = {"sliding_window": 7, "pretraining_tp": 2, "max_window_layers": 1}
    assert MistralConfig.read(write(tmp_path, config_json(llama, family="llama") | more)) == llama
    assert MistralConfig.read(write(tmp_path, config_json(qwen) | more)) == qwen


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"factor": ...}, "rope_scaling.factor is missing"),
        ({"factor": "8"}, "rope_scaling.factor is '8'; it must be a number from 0.001 to 1000000.0"),
        ({"low_freq_factor": 0}, "rope_scaling.low_freq_factor is 0; it must be a number"),
        ({"high_freq_factor": float("nan")}, "rope_scaling.high_freq_factor is nan; it must be a number"),
        ({"high_freq_factor": 1}, "there must be one, with its low_freq_factor below its high_freq_factor"),
        ({"original_max_position_embeddings": ...}, "rope_scaling.original_max_position_embeddings is missing"),
        (
            {"original_max_position_embeddings": 1.5},
            "rope_scaling.original_max_position_embeddings is 1.5; it must be a",
        ),
        ({"type": "yarn"}, "rope_scaling.type is 'yarn'; this model needs 'llama3'"),
        ({"attention_factor": 0.5}, "rope_scaling.attention_factor is 0.5; this model needs 1"),
        ({"rope_type": "yarn"}, "rope_scaling.rope_type is 'yarn'; this model needs 'default' or 'llama3'"),
        ({"rope_theta": 7.0}, "rope_theta is 10000.0 and rope_scaling.rope_theta is 7.0. Keep the one that the model"),
    ],
    ids=lambda value: f"{value!s:.60}",
)
def test_an_unusable_rotary_scaling_is_refused_with_its_name_and_value(tmp_path: Path, scaling: dict, message: str):
    rope = {name: value for name, value in (SCALED | scaling).items() if value is not ...}
    with pytest.raises(ValueError) as caught:
        MistralConfig.read(write(tmp_path, config_json(tiny_config()) | {"rope_scaling": rope}))
    assert message in str(caught.value)


def test_two_rotary_scalings_must_be_the_same(tmp_path: Path):
    raw = config_json(tiny_config(), spelling=5) | {"rope_scaling": SCALED}
    with pytest.raises(ValueError, match="there must be one, with its low_freq_factor below"):
        MistralConfig.read(write(tmp_path, raw))
    raw["rope_parameters"] = SCALED | {"rope_theta": 1e4}
    assert MistralConfig.read(write(tmp_path, raw)).rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("model_type", "nearest"),
    [
        ("mixtral", "mistral"), ("qwen2_moe", "qwen2"), ("qwen3_moe", "qwen3"), ("llama4", "llama"),
        ("ministral", "mistral"), ("gemma2", None), ("phi3", None), (["llama"], "llama"), (7, None),
    ],
)  # fmt: skip
def test_another_architecture_is_told_which_are_supported_and_the_nearest(tmp_path: Path, model_type, nearest):
    with pytest.raises(ValueError) as caught:
        MistralConfig.read(write(tmp_path, config_json(tiny_config()) | {"model_type": model_type}))
    known = "supported are mistral, llama, qwen2, qwen3"
    assert f"config.json: model_type is {model_type!r}; {known}" in str(caught.value)
    assert str(caught.value).endswith(f"(the nearest is {nearest})" if nearest else known)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model needs 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; this model needs 1.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config, so the weights are quantized"),
        ({"compression_config": {"format": "int"}}, "has a compression_config, so the weights are quantized"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', which transformers cannot load"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, which transformers cannot load"),
        # rotary positions
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type is 'linear'; this model needs 'defau"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters.rope_type is 'yarn'"),
        ({"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is {}; this model needs 1"),
        ({"rope_parameters": "x"}, "rope_parameters is 'x'; it must be an object or null"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]; it must be an object or null"),
        ({"rope_scaling": 2.0}, "rope_scaling is 2.0; it must be an object or null"),
        (
            {"rope_parameters": {"rope_theta": 1e6}},
            "rope_theta is 10000.0 and rope_parameters.rope_theta is 1000000.0. Keep the one that the model was",
        ),
        ({"rope_theta": 0}, "rope_theta is 0; it must be a number from 0.001 to 1e+30"),
        ({"rope_theta": ..., "rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters.rope_theta is '1e6'; it must"),
        # numbers
        ({"vocab_size": 0}, "vocab_size is 0; it must be a whole number from 1 to 2147483647"),
        ({"vocab_size": 10**30}, f"vocab_size is {10**30}; it must be a whole number from 1 to 2147483647"),
        ({"vocab_size": float("nan")}, "vocab_size is nan; it must be a whole number"),
        ({"hidden_size": "20"}, "hidden_size is '20'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"intermediate_size": 3.5}, "intermediate_size is 3.5"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 3_000_000}, "num_hidden_layers is 3000000; it must be a whole number from 1 to 4096"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be a whole number from 1 to 2147483647"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; it must be a number from 1e-30 to 1.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; it must be a number from 1e-30 to 1.0"),
        ({"rms_norm_eps": 10**400}, "000; it must be a number from 1e-30 to 1.0"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0; it must be a number from 1e-30 to 1.0"),
        ({"initializer_range": -0.02}, "initializer_range is -0.02; it must be a number"),
        ({"vocab_size": ...}, "vocab_size is missing"),
        ({"num_attention_heads": ...}, "num_attention_heads is missing"),
        # heads
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be a whole number from 1 to 65536"),
        ({"head_dim": 5}, "head_dim is 5; rotary positions need an even number"),
        ({"bos_token_id": [1]}, "bos_token_id is [1], which transformers cannot load"),
        ({"hidden_act": None}, "hidden_act is None, which transformers cannot load"),
        ({"initializer_range": 1}, "initializer_range is 1, which transformers cannot load"),
        ({"max_position_embeddings": "x"}, "max_position_embeddings is 'x', which transformers cannot load"),
        ({"head_dim": 0}, "head_dim is 0; it must be a whole number from 2 to 65536"),
        ({"head_dim": ..., "hidden_size": 21}, "hidden_size 21 is not a multiple of num_attention_heads 4, as it"),
    ],
    ids=lambda value: f"{value!s:.60}",
)
def test_an_unusable_config_json_is_refused_with_its_name_and_value(tmp_path: Path, change: dict, message: str):
    raw = {name: value for name, value in (config_json(tiny_config()) | change).items() if value is not ...}
    with pytest.raises(ValueError) as caught:
        MistralConfig.read(write(tmp_path, raw))
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < len(str(tmp_path)) + 250


def test_no_json_value_of_any_key_ends_in_a_traceback(tmp_path: Path):
    values = [None, True, 0, -1, 2**62, 10**400, 1.5, float("inf"), float("nan"), "", "x", [], [[]], {}, {"a": [1]}]
    rotary = tiny_config(rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192))
    for spelling, family in ((4, "llama"), (5, "mistral"), (5, "qwen2")):
        valid = {"quantization_config": None, "use_sliding_window": True, "layer_types": None}
        valid = config_json(rotary, spelling, family=family) | {"max_window_layers": 0} | valid
        keys = [*valid, "rope_parameters.rope_theta", "rope_parameters.rope_type", "rope_scaling.type"]
        for key in keys:
            for value in values:
                name, _, inner = key.partition(".")
                raw = valid | {name: {inner: value} if inner else value}
                try:
                    assert isinstance(MistralConfig.read(write(tmp_path, raw)), MistralConfig)
                except ValueError as error:
                    assert str(error).startswith(f"{tmp_path / 'config.json'}: "), (key, value)


def test_the_largest_permitted_sizes_overflow_nothing(tmp_path: Path):
    largest = {name: high for name, (low, high, _) in NUMBERS.items() if isinstance(low, int)}
    config = MistralConfig.read(write(tmp_path, config_json(tiny_config()) | largest))
    model = meta_model(replace(config, num_hidden_layers=1))
    assert all(0 < parameter.numel() * 8 < 2**63 for parameter in model.parameters())


def test_a_config_json_that_is_not_json_is_refused(tmp_path: Path):
    path = tmp_path / "config.json"
    for content, message in (
        ('{\n"vocab_size": 3,\n}', "not JSON"),
        ("[1]", "must hold a JSON object"),
        ("", "not JSON"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json[:0-9]*: {message}"):
            MistralConfig.read(tmp_path)
    path.unlink()
    os.mkfifo(path)  # to open it would wait forever
    with pytest.raises(ValueError, match=r"config\.json: not a regular file"):
        MistralConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("files", "model", "message"),
    [
        ({}, "folder", "folder/config.json: no such file; a model is a folder in Hugging Face layout"),
        (
            {},
            "HuggingFaceH4/mistral-7b-sft-beta",
            "HuggingFaceH4/mistral-7b-sft-beta: no such folder. If it is a model on the Hugging Face hub, download it "
            "and name models/mistral-7b-sft-beta instead: hf download HuggingFaceH4/mistral-7b-sft-beta --local-dir "
            "models/mistral-7b-sft-beta",
        ),
        ({}, "folder/final", "folder/final: no such folder; a model is a folder in Hugging Face layout"),
        ({}, "a/b/c", "a/b/c: no such folder; a model is a folder in Hugging Face layout"),
        ({}, "x" * 300, "x: no such folder; a model is a folder in Hugging Face layout"),
        ({"model.safetensors": ""}, "folder/model.safetensors", "folder/model.safetensors: not a folder; a model is"),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": ""},
            "folder",
            "it holds an adapter of org/base, not a whole model. Merge the two (pip install peft), then copy the "
            'tokenizer files of org/base: python -c "import sys; from peft import AutoPeftModelForCausalLM as M; '
            "M.from_pretrained(sys.argv[1], dtype='auto').merge_and_unload().save_pretrained(sys.argv[2])\" folder "
            "folder-merged",
        ),
        ({"adapter_config.json": "{"}, "folder", "folder/adapter_config.json:1: not JSON"),
        ({"dataset_info.json": "{}"}, "folder", "it holds a data set that was written by save_to_disk, not a model"),
        ({"dataset_dict.json": "{}"}, "folder", "it holds a data set that was written by save_to_disk, not a model"),
        ({"zephyr.Q4_K_M.gguf": ""}, "folder", "it holds zephyr.Q4_K_M.gguf, for llama.cpp. Use the original model"),
        ({"params.json": "{}"}, "folder", "it is in Mistral's own layout. Download the same model in Hugging Face"),
        ({"final/config.json": "{}"}, "folder", "folder/config.json: no such file; did you mean folder/final?"),
        ({"snapshots/4c1b/config.json": "{}"}, "folder", "did you mean folder/snapshots/4c1b?"),
    ],
)
def test_a_model_without_config_json_is_refused_with_what_is_there_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], model: str, message: str
):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name, content in files.items():
        path = Path("folder") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    with pytest.raises(ValueError) as caught:
        MistralConfig.read(model)
    assert message in str(caught.value)
