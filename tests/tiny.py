"""Models and data small enough to check by other means: what the tests share."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from notus.attention import PackedAttention
from notus.chat import ZEPHYR_TEMPLATE
from notus.dims import MistralConfig
from notus.model import Mistral
from notus.packing import Segment
from notus.tokens import Pair, PairSet

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other


def tiny_config(**overrides) -> MistralConfig:
    """Two layers, grouped queries, head_dim apart from hidden_size / heads. No dimension equals another, so that a
    transposed or mixed-up one shows."""
    dimensions = {
        "vocab_size": 97,
        "hidden_size": 20,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,  # large: the logits are far from uniform
    }
    return MistralConfig(**dimensions | overrides)


def tiny_model(config: MistralConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Mistral:
    """Random weights, the same for every dtype. Norms are spread around 1 and biases around 0, so that forgetting one
    shows."""
    model = Mistral(config)
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.uniform_(*((-0.2, 0.2) if name.endswith("bias") else (0.5, 1.5)), generator=generator)
    return model.to(dtype)


def random_pairs(rng: np.random.Generator, n: int, vocab: int) -> list[Pair]:
    """Prompts of 1 to 12 tokens, answers of 1 to 10."""

    def ids(longest: int) -> np.ndarray:
        return rng.integers(0, vocab, rng.integers(1, longest + 1)).astype(np.int32)

    return [Pair(f"random:{i + 1}", ids(12), ids(10), ids(10)) for i in range(n)]


def pair_set(pairs: list[Pair]) -> PairSet:
    return PairSet.of(pairs, Counter())


def logits_of(model: Mistral, ids: Tensor, start: int = 0) -> Tensor:
    """One plain sequence (T,), its first token at position `start` -> logits (T, V)."""
    everywhere = torch.arange(len(ids))
    attend = PackedAttention([Segment(len(ids), ())], model.config.sliding_window, ids.device)
    return model(ids, everywhere + start, attend, source=everywhere)


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """By parameter name; the model keeps none."""
    model.zero_grad()
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference over all tensors, each relative to its tensor's largest entry."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in theirs)


def family_of(config: MistralConfig) -> str:
    """The model_type that has these dimensions. A Llama 2 is a Mistral without a window."""
    return "qwen3" if config.qk_norm else "qwen2" if config.qkv_bias else "llama" if config.rope_scaling else "mistral"


def config_json(
    config: MistralConfig, spelling: int = 4, dtype: torch.dtype = torch.float32, family: str | None = None
) -> dict:
    """What a checkpoint's config.json holds, in the spelling of transformers 4 or 5."""
    name, family = str(dtype).removeprefix("torch."), family or family_of(config)
    raw = {"architectures": [f"{family.capitalize()}ForCausalLM"], "model_type": family}
    raw |= {"bos_token_id": 1, "eos_token_id": 2}
    raw |= asdict(config) | {"hidden_act": "silu", "max_position_embeddings": 32768, "use_cache": False}
    if raw.pop("qkv_bias") | raw.pop("qk_norm"):
        raw |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
    scaling = raw.pop("rope_scaling")
    rope = {"rope_type": "llama3", **scaling._asdict()} if scaling else {}
    if spelling == 4:
        return raw | {"rope_scaling": rope or None, "torch_dtype": name, "transformers_version": "4.35.0"}
    rope = {"rope_type": "default"} | rope | {"rope_theta": raw.pop("rope_theta")}
    return raw | {"rope_parameters": rope, "dtype": name, "transformers_version": "5.0.0"}


def save_checkpoint(
    model: Mistral, directory: Path, dtype: torch.dtype = torch.float32, spelling: int = 4, family: str | None = None
) -> Path:
    """config.json and model.safetensors as Hugging Face lays them out, written by its library. No tokenizer files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_json(model.config, spelling, dtype, family), indent=2))
    tensors = {name: parameter.detach().to(dtype) for name, parameter in model.named_parameters()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def save_base(directory: Path, words: str = "a b c d e f g", **overrides) -> Path:
    """A whole base in Hugging Face layout, with one token id for each word: enough for Zephyr's template."""
    vocabulary = ["<unk>", "<s>", "</s>", "<|", "|>", "user", "system", "assistant", *words.split()]
    save_checkpoint(tiny_model(tiny_config(**{"vocab_size": len(vocabulary), **overrides})), directory)
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": ZEPHYR_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def hf_class(family: str) -> type:
    import transformers  # here: processes that need no oracle start in half the time

    return getattr(transformers, f"{family.capitalize()}ForCausalLM")


def hf_twin(model: Mistral, attention: str = "eager", family: str | None = None) -> nn.Module:
    """transformers' model with the same weights and dtype: the oracle. `twin(ids (B, T)).logits` is (B, T, V)."""
    raw = config_json(model.config, spelling=5, family=family)
    oracle = hf_class(raw["model_type"])
    twin = oracle(oracle.config_class(**raw, attn_implementation=attention))
    twin.to(next(model.parameters()).dtype).eval()
    with torch.no_grad():
        theirs = dict(twin.named_parameters())
        assert theirs.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            theirs[name].copy_(parameter)
    return twin


def hf_load(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    oracle = hf_class(json.loads((directory / "config.json").read_text())["model_type"])
    return oracle.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()


def hf_logps(twin: nn.Module, prompt: np.ndarray, answer: np.ndarray) -> Tensor:
    """log p(answer | prompt), summed, by the plain road: the whole sequence, alone, and a full log-softmax."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    logps = twin(ids[None, :-1]).logits[0, len(prompt) - 1 :].log_softmax(-1)  # (R, V)
    return logps.gather(1, ids[len(prompt) :, None]).sum()


def run_ranks(num_ranks: int, work: Callable, *arguments) -> None:
    """`work(*arguments)` in `num_ranks` processes with torchrun's environment; `work` is a module's function. They are
    forked from one that has imported torch."""
    import forked  # here: it imports this file

    forked.start_server()
    torch.multiprocessing.start_processes(
        _run_rank, (forked.torchrun(num_ranks), work, arguments), nprocs=num_ranks, start_method="forkserver"
    )


def _run_rank(rank: int, environments: list[dict[str, str]], work: Callable, arguments: tuple) -> None:
    os.environ |= environments[rank]
    work(*arguments)
