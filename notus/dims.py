"""config.json -> the dimensions of a model, and what a folder without one holds instead.

Dimensions are not settings: the checkpoint's own config.json has them.
"""

import difflib
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from notus.files import read_json

# name: (lowest, highest, what transformers takes if config.json lacks the key, or None if the key is required). The
# ranges are far wider than any known checkpoint, and narrow enough that no size in bytes overflows 64 bits.
NUMBERS: dict[str, tuple[float, float, float | None]] = {
    "vocab_size": (1, 2**31 - 1, None),
    "hidden_size": (1, 2**24, None),
    "intermediate_size": (1, 2**24, None),
    "num_hidden_layers": (1, 4096, None),
    "num_attention_heads": (1, 2**16, None),
    "num_key_value_heads": (1, 2**16, None),
    "head_dim": (2, 2**16, None),
    "sliding_window": (1, 2**31 - 1, None),
    "rms_norm_eps": (1e-30, 1.0, 1e-6),
    "rope_theta": (1e-3, 1e30, 1e4),
    "initializer_range": (1e-9, 1.0, 0.02),
    "max_window_layers": (0, 2**31 - 1, 28),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor"), (1e-3, 1e6, None)),
    "original_max_position_embeddings": (1, 2**31 - 1, None),
}

# model_type: (what transformers takes if config.json lacks the key, the fields of the dimensions that the family sets)
FAMILIES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "mistral": ({"num_key_value_heads": 8, "sliding_window": 4096}, {}),
    "llama": ({}, {}),  # Llama 1 to 3, TinyLlama, SmolLM2
    "qwen2": ({"num_key_value_heads": 32, "sliding_window": 4096}, {"qkv_bias": True}),  # Qwen2.5 too
    "qwen3": ({"num_key_value_heads": 32, "sliding_window": 4096, "head_dim": 128}, {"qk_norm": True}),
}

# The export hands config.json on, and transformers 5 loads none in which one of these keys has another type.
TYPES: dict[str, tuple[type, ...]] = {
    "bos_token_id": (int, NoneType), "eos_token_id": (int, list, NoneType), "pad_token_id": (int, NoneType),
    "max_position_embeddings": (int,), "attention_dropout": (int, float, NoneType), "architectures": (list, NoneType),
    "hidden_act": (str,), "initializer_range": (float,), "rms_norm_eps": (float,), "use_sliding_window": (bool,),
    "sliding_window": (int, NoneType), "max_window_layers": (int,), "pretraining_tp": (int, NoneType),
    "attention_bias": (bool,), "mlp_bias": (bool,), "tie_word_embeddings": (bool,),
}  # fmt: skip


class Llama3Rope(NamedTuple):
    """How Llama 3.1 to 3.3 stretch their rotary positions, see model.rotary_table."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class MistralConfig:
    """The dimensions of a checkpoint, by the names of its own config.json. `qkv_bias` and `qk_norm` are Qwen's."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    initializer_range: float = 0.02
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_scaling: Llama3Rope | None = None

    @classmethod
    def read(cls, model_dir: str | Path) -> "MistralConfig":
        """Read config.json, in the spelling of transformers 4 or 5. Keys that it lacks get transformers' defaults.

        ValueError names the file, the key, its value and what is permitted. If there is no config.json, it says what
        the folder holds instead and which command makes a model of it.
        """
        path = Path(model_dir) / "config.json"
        if not os.path.exists(path):
            raise ValueError(_without_config(Path(model_dir)))
        raw = read_json(path)
        family = _check_architecture(path, raw)
        defaults, fields = FAMILIES[family]
        raw = defaults | raw  # a null stays: it means as many key/value heads as query heads, and no window

        def number(name: str) -> Any:
            return _number(path, name, raw.get(name, NUMBERS[name][2]))

        numbers = ("vocab_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps", "initializer_range")
        values = {name: number(name) for name in numbers}
        heads, hidden_size = number("num_attention_heads"), number("hidden_size")
        kv_heads = heads if raw.get("num_key_value_heads") is None else number("num_key_value_heads")
        if heads % kv_heads:
            raise ValueError(f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        # null is an absent head_dim, except in a Qwen's config.json, which transformers does not load then.
        own = "head_dim" in raw if family.startswith("qwen") else raw.get("head_dim") is not None
        head_dim = number("head_dim") if own else hidden_size // heads
        if hidden_size % heads and (family == "llama" or not own):
            raise ValueError(
                f"{path}: hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}, as it must be in "
                "a llama or where there is no head_dim"
            )
        if head_dim % 2:
            raise ValueError(f"{path}: head_dim is {head_dim}; rotary positions need an even number")
        dims = cls(
            hidden_size=hidden_size,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            sliding_window=_window(path, raw, family),
            tie_word_embeddings=raw.get("tie_word_embeddings", False),
            **_rope(path, raw),
            **values,
            **fields,
        )
        for name, kinds in TYPES.items():
            if name in raw and type(raw[name]) not in kinds:
                raise ValueError(f"{path}: {name} is {raw[name]!r:.80}, which transformers cannot load")
        return dims


def _number(path: Path, name: str, value: Any) -> int | float:
    """A number of config.json, checked against the range of NUMBERS. `name` may be dotted."""
    low, high, _ = NUMBERS[name.rpartition(".")[2]]
    if value is None:
        raise ValueError(f"{path}: {name} is missing")
    whole = isinstance(low, int)
    if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:  # NaN fails here as well
        what = "whole number" if whole else "number"
        raise ValueError(f"{path}: {name} is {value!r:.80}; it must be a {what} from {low} to {high}")
    return value if whole else float(value)


def _check_architecture(path: Path, raw: dict[str, Any]) -> str:
    """The family. Refuse what the model does not compute: other architectures, other biases, quantized weights."""
    family = raw.get("model_type")
    if str(family) not in FAMILIES:
        near = "".join(f" (the nearest is {name})" for name in difflib.get_close_matches(str(family), FAMILIES, n=1))
        raise ValueError(f"{path}: model_type is {family!r:.80}; supported are {', '.join(FAMILIES)}{near}")
    needs = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0}
    for name, needed in needs.items():
        value = needs.get(name) if raw.get(name) is None else raw[name]
        if value != needed:
            raise ValueError(f"{path}: {name} is {value!r:.80}; this model needs {needed!r}")
    for name in ("quantization_config", "compression_config"):
        if raw.get(name):
            raise ValueError(
                f"{path}: has a {name}, so the weights are quantized and cannot be trained here. Use the unquantized "
                "model that they were made from"
            )
    return str(family)


def _window(path: Path, raw: dict[str, Any], family: str) -> int | None:
    """The sliding window of all layers. Llama has none, Mistral's is on unless it is null, and Qwen's is off unless
    `use_sliding_window`, and for the layers from `max_window_layers` on."""
    layers, full = raw["num_hidden_layers"], 0  # full: the layers without it, which come first
    if family == "llama" or raw["sliding_window"] is None:
        full = layers
    elif family != "mistral":
        first = int(_number(path, "max_window_layers", raw.get("max_window_layers", 28)))
        full = min(first, layers) if raw.get("use_sliding_window") else layers
    kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if raw.get("layer_types") not in (None, kinds) or 0 < full < layers:
        key = "layer_types" if raw.get("layer_types") else "max_window_layers"
        raise ValueError(f"{path}: {key} is {raw.get(key)!r:.80}; this model needs one window for all layers, or none")
    return None if full else int(_number(path, "sliding_window", raw["sliding_window"]))


def _rope(path: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """The base of the rotary frequencies and Llama 3's scaling, from whichever keys hold them. Two keys with two values
    are refused, because transformers 4 and 5 would each take another one."""
    thetas = {} if raw.get("rope_theta") is None else {"rope_theta": raw["rope_theta"]}
    scalings: set[Llama3Rope | None] = set()
    for name in ("rope_parameters", "rope_scaling"):
        rope = raw.get(name)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: {name} is {rope!r:.80}; it must be an object or null")
        kind = "llama3" if "llama3" in (rope.get("rope_type"), rope.get("type")) else "default"
        own = Llama3Rope._fields if kind == "llama3" else ()
        scalings.add(Llama3Rope._make(_number(path, f"{name}.{key}", rope.get(key)) for key in own) if own else None)
        for key, value in rope.items():
            needed = kind if key in ("rope_type", "type") else 1  # 1: a factor that changes nothing
            if key == "rope_theta" and value is not None:
                thetas[f"{name}.{key}"] = value
            elif key not in own and value not in (None, needed):
                either = " or 'llama3'" if needed == "default" else ""
                raise ValueError(f"{path}: {name}.{key} is {value!r:.80}; this model needs {needed!r}{either}")
    if len(scalings) > 1 or any(s and s.low_freq_factor >= s.high_freq_factor for s in scalings):
        raise ValueError(
            f"{path}: rotary scaling {scalings}: there must be one, with its low_freq_factor below its high_freq_factor"
        )
    thetas = thetas or {"rope_theta": NUMBERS["rope_theta"][2]}
    checked = {name: float(_number(path, name, value)) for name, value in thetas.items()}
    if len(set(checked.values())) > 1:
        which = " and ".join(f"{name} is {theta}" for name, theta in checked.items())
        raise ValueError(f"{path}: {which}. Keep the one that the model was trained with")
    return {"rope_theta": next(iter(checked.values())), "rope_scaling": next(iter(scalings), None)}


# --- what else a folder may be ---------------------------------------------------------------------------------------

MERGE = (
    'python -c "import sys; from peft import AutoPeftModelForCausalLM as M; '
    "M.from_pretrained(sys.argv[1], dtype='auto').merge_and_unload().save_pretrained(sys.argv[2])\""
)


def other_layout(directory: Path) -> str:
    """What a folder holds that is no model in Hugging Face layout, and what to do about it; "" if nothing is known."""
    if (directory / "adapter_config.json").is_file():
        base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
        merged = directory.with_name(f"{directory.name}-merged")
        return (
            f"it holds an adapter of {base}, not a whole model. Merge the two (pip install peft), then copy the "
            f"tokenizer files of {base}: {MERGE} {shlex.quote(str(directory))} {shlex.quote(str(merged))}"
        )
    if any((directory / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        return "it holds a data set that was written by save_to_disk, not a model"
    if gguf := sorted(directory.glob("*.gguf")):
        return f"it holds {gguf[0].name}, for llama.cpp. Use the original model that it was converted from"
    if any((directory / name).is_file() for name in ("params.json", "consolidated.safetensors")):
        return "it is in Mistral's own layout. Download the same model in Hugging Face layout"
    inner = [*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json")]
    return f"did you mean {min(inner).parent}?" if inner else ""


def _without_config(directory: Path) -> str:
    """The error for a model that has no config.json."""
    if not os.path.exists(directory):
        if os.path.exists(directory.parent) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(directory)):
            return f"{directory}: no such folder; a model is a folder in Hugging Face layout"
        local = f"models/{directory.name}"
        return (
            f"{directory}: no such folder. If it is a model on the Hugging Face hub, download it and name {local} "
            f"instead: hf download {directory} --local-dir {local}"
        )
    if not directory.is_dir():
        return f"{directory}: not a folder; a model is a folder in Hugging Face layout"
    other = other_layout(directory)
    return f"{directory / 'config.json'}: no such file; {other or 'a model is a folder in Hugging Face layout'}"
