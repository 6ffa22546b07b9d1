"""dims.py: config.json is read as transformers reads it, and nothing in it ends in a traceback."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tiny import config_json, tiny_config
from transformers import MistralConfig as HFConfig

from notus.dims import NUMBERS, MistralConfig
from notus.plan import MISTRAL_7B
from notus.weights import meta_model


def write(directory: Path, raw: dict) -> Path:
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_both_spellings_of_config_json_read_the_same(tmp_path: Path):
    config = tiny_config(rope_theta=123456.0, sliding_window=77, rms_norm_eps=3e-6, tie_word_embeddings=True)
    for spelling in (4, 5):
        assert MistralConfig.read(write(tmp_path, config_json(config, spelling))) == config
    HFConfig(**config_json(config, spelling=5)).save_pretrained(tmp_path)  # as the installed version writes it
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


def test_what_config_json_leaves_out_or_sets_to_null_is_what_transformers_takes(tmp_path: Path):
    sizes = {name: 64 for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    sizes |= {"model_type": "mistral", "num_attention_heads": 16}
    nulls = dict.fromkeys(("head_dim", "sliding_window", "rope_parameters"))
    for raw in (sizes, sizes | nulls):
        ours, theirs = MistralConfig.read(write(tmp_path, raw)), HFConfig.from_pretrained(tmp_path)
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        others = {name: value for name, value in asdict(ours).items() if name != "rope_theta"}
        assert others == {name: getattr(theirs, name) for name in others}
    raw = sizes | {"num_key_value_heads": None}  # transformers 5 refuses it, version 4 takes as many as query heads
    assert MistralConfig.read(write(tmp_path, raw)).num_key_value_heads == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; this model needs 'mistral'"),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; this model needs 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; this model needs 1.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has a quantization_config, so the weights are quantized"),
        ({"compression_config": {"format": "int"}}, "has a compression_config, so the weights are quantized"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
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
        ({"head_dim": ..., "hidden_size": 21}, "hidden_size 21 is not a multiple of num_attention_heads 4, and there"),
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
    for spelling in (4, 5):
        valid = config_json(tiny_config(), spelling) | {"rope_scaling": None, "quantization_config": None}
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
