"""plan.py: the arithmetic agrees with what PyTorch itself counts, multiplies and saves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import MISTRAL_7B, pair_set, random_pairs, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from notus.attention import PackedAttention
from notus.logprobs import CHUNK_ROWS, token_logps
from notus.model import DecoderLayer, MistralConfig, pair_logps, rotary_table
from notus.packing import Segment, pack_pairs
from notus.plan import (
    DEVICES,
    activation_bytes,
    describe_cost,
    engineering,
    forward_flops,
    memory_gib,
    num_parameters,
    peak_flops,
)
from notus.weights import meta_model


def lengths(*pairs: tuple[int, int, int]) -> np.ndarray:
    """(P, 3): prompt, chosen, rejected."""
    return np.array(pairs, dtype=np.int64).reshape(-1, 3)


AVERAGE = (161, 298, 281)  # of UltraFeedback, cut at 512 / 1024


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(tie_word_embeddings=True), MISTRAL_7B])
def test_parameters_are_those_of_the_model(config: MistralConfig):
    model = meta_model(config)
    of_layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert num_parameters(config) == (of_layers, sum(parameter.numel() for parameter in model.parameters()) - of_layers)


def test_mistral_7b_has_its_published_parameters():
    assert sum(num_parameters(MISTRAL_7B)) == 7_241_732_096


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_pytorch_counts(tied: bool, monkeypatch: pytest.MonkeyPatch):
    """Matrix products exactly. PyTorch does not count the products of norm weights, which the parameters include."""
    config = tiny_config(num_hidden_layers=3, tie_word_embeddings=tied)
    model, pairs = tiny_model(config, dtype=torch.float32), random_pairs(np.random.default_rng(0), 6, config.vocab_size)
    stream = pack_pairs(pairs)
    norms = 2 * (2 * config.hidden_size) * config.num_hidden_layers * len(stream.input_ids)
    head = 2 * config.vocab_size * config.hidden_size * len(stream.target)
    # Attention: the query-key meetings of the mask as drawn in packing.py, two products each, two FLOPs a number.
    meetings = sum(
        sum(range(1, len(p.prompt) + 1)) + sum(len(p.prompt) + i for n in map(len, p[2:]) for i in range(1, n + 1))
        for p in pairs
    )
    attention = 2 * 2 * meetings * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    ours = forward_flops(config, pair_set(pairs).lengths).sum() - attention - norms

    def counted(work) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")

    assert counted(lambda: pair_logps(model, stream)) == ours
    forward_and_backward = counted(lambda: pair_logps(model, stream).sum().backward())
    assert forward_and_backward == 3 * ours
    monkeypatch.setattr(token_logps, "__defaults__", (CHUNK_ROWS, 0))  # keep no softmax
    again = counted(lambda: pair_logps(model, stream).sum().backward())
    assert again == 3 * ours + head  # whose logits are computed again in backward: no credit for that


def test_flops_of_the_average_pair_of_the_recipe():
    """161 / 298 / 281 tokens of prompt, chosen and rejected: 31.8 TFLOP, forward and backward."""
    assert 3 * forward_flops(MISTRAL_7B, lengths(AVERAGE)) == pytest.approx(31.8e12, rel=0.01)


def test_a_shared_prompt_counts_once():
    both, chosen, rejected, prompt = forward_flops(
        tiny_config(), lengths((30, 10, 20), (30, 10, 0), (30, 0, 20), (30, 0, 0))
    )
    assert both == pytest.approx(chosen + rejected - prompt, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [4, 2, 1])
def test_activations_are_what_autograd_saves(heads: int, dtype: torch.dtype):
    """Of a real layer on real numbers: the storages that are no parameters, each once."""
    config, tokens = tiny_config(num_key_value_heads=heads, hidden_size=44, intermediate_size=100), 48
    layer = DecoderLayer(config).to(dtype)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage
        return tensor

    x = torch.zeros(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    rotary = rotary_table(torch.arange(tokens), config.head_dim, config.rope_theta, dtype)
    attend = PackedAttention([Segment(tokens, ())], None, x.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = layer(x, rotary, attend, 0)
    assert out.shape == x.shape
    assert sum(storage.nbytes() for storage in saved.values()) == tokens * activation_bytes(config, dtype)


def memory(num_gpus: int = 8, **changes) -> dict[str, float]:
    settings = {"dtype": torch.bfloat16, "optimizer": "rmsprop", "micro_batch_tokens": 8192, "recompute_every": 0}
    return memory_gib(MISTRAL_7B, num_gpus, **settings | changes)


def test_memory_of_the_shards_is_12_bytes_a_parameter_divided_by_the_gpus():
    for num_gpus in (1, 8, 64):
        for optimizer, size in (("rmsprop", 12), ("adamw", 16)):
            shards = [gib for name, gib in memory(num_gpus, optimizer=optimizer).items() if "shard" in name]
            assert sum(shards) == pytest.approx(size * 7_241_732_096 / num_gpus / 2**30, rel=1e-12)


def test_memory_beside_the_shards_does_not_depend_on_the_gpus_but_on_the_tokens():
    def rest(parts: dict[str, float]) -> dict[str, float]:
        return {name: gib for name, gib in parts.items() if "shard" not in name}

    assert rest(memory(8)) == rest(memory(64)) == rest(memory(8, optimizer="adamw"))
    one, two = rest(memory()), rest(memory(micro_batch_tokens=16384))
    assert {name for name in one if one[name] != two[name]} == {"activations", "head, scored rows and softmax"}
    assert two["activations"] == pytest.approx(2 * one["activations"])
    assert one["activations"] == pytest.approx(32 * 8192 * activation_bytes(MISTRAL_7B, torch.bfloat16) / 2**30)


def test_recomputation_keeps_one_layers_activations_beside_the_inputs():
    layer, inputs = activation_bytes(MISTRAL_7B, torch.bfloat16), 2 * 4096  # bytes a token
    for every, bytes_per_token in ((1, layer + 32 * inputs), (2, 17 * layer + 16 * inputs), (0, 32 * layer)):
        gib = memory(recompute_every=every)["activations"]
        assert gib == pytest.approx(8192 * bytes_per_token / 2**30, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_peak_flops_by_the_name_that_cuda_gives(name: str, flops: float | None):
    assert peak_flops(name) == flops


def test_the_report_adds_up_and_says_what_does_not_fit():
    train, test = lengths(*[AVERAGE] * 100), lengths(*[(100, 50, 50)] * 10)
    settings = {"epochs": 3, "evaluations": 4, "num_gpus": 8, "dtype": torch.bfloat16, "optimizer": "rmsprop"}
    settings |= {"recompute_every": 0}
    report = describe_cost(MISTRAL_7B, train, test, micro_batch_tokens=8192, **settings)
    assert "parameters  7,241,732,096" in report
    assert "740 unique a pair" in report
    ours, held_out = forward_flops(MISTRAL_7B, train).sum(), forward_flops(MISTRAL_7B, test).sum()
    parts = {"training": 9 * ours, "reference, if nothing is cached": ours + held_out, "4 evaluations": 4 * held_out}
    for name, flops in parts.items():
        assert f"{engineering(flops, 'FLOP'):>14}  {name}" in report
    assert f"compute     {engineering(sum(parts.values()), 'FLOP')}" in report
    assert f"{sum(memory().values()):.2f} GiB a GPU" in report
    assert all(name in report for name in (*memory(), *DEVICES))
    needed = sum(memory().values())
    misfits = [line.split()[1] for line in report.splitlines() if "does not fit" in line]
    assert misfits == [name for name, device in DEVICES.items() if device.memory_gib < needed + 3]
    assert "A100-40GB" in misfits and "H200" not in misfits
    huge = describe_cost(MISTRAL_7B, train, test, micro_batch_tokens=10**6, **settings)
    assert all("does not fit" in line for line in huge.splitlines() if line.split()[-1] in DEVICES)


def test_hours_are_flops_over_the_assumed_rate():
    """At 40 % of 8 x 312 TFLOP/s: 100 steps' worth of FLOPs is a matter of division."""
    train = lengths(*[AVERAGE] * 1000)
    settings = {"dtype": torch.bfloat16, "optimizer": "rmsprop", "micro_batch_tokens": 8192, "recompute_every": 0}
    report = describe_cost(MISTRAL_7B, train, lengths(), epochs=3, evaluations=2, num_gpus=8, **settings)
    seconds = round(10 * forward_flops(MISTRAL_7B, train).sum() / (0.4 * 8 * 312e12))  # 3 epochs x 3, and the reference
    assert f"{seconds // 60}m{seconds % 60:02}s  A100-40GB" in report


def test_a_float32_run_is_timed_at_this_cpus_own_rate():
    config = replace(tiny_config(), vocab_size=64)
    settings = {"optimizer": "rmsprop", "micro_batch_tokens": 512, "recompute_every": 0, "num_gpus": 1}
    report = describe_cost(
        config, lengths((3, 2, 2)), lengths(), epochs=1, evaluations=1, dtype=torch.float32, **settings
    )
    assert "at this CPU's matmul rate" in report and "A100" not in report


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (7, "7 B"), (1000, "1 kB"), (123_456, "123 kB"), (999_700, "1 MB"), (6.53e18, "6.53 EB"),
     (2.5e21, "2.5e+03 EB")],
)  # fmt: skip
def test_engineering_notation(value: float, text: str):
    assert engineering(value, "B") == text
