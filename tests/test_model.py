"""model.py: law 3, the logits and gradients of transformers' Mistral, and how a checkpoint's config.json is read."""

import numpy as np
import pytest
import torch
from tiny import config_json, gradients, hf_twin, logits_of, random_pairs, tiny_config, tiny_model, worst
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig as HFConfig
from transformers import MistralForCausalLM

from notus.dims import MistralConfig
from notus.model import Mistral, pair_logps, rotary_table
from notus.packing import pack_pairs
from notus.plan import MISTRAL_7B
from notus.weights import meta_model


def random_config(rng: np.random.Generator, gqa_ratio: int) -> MistralConfig:
    kv_heads = int(rng.integers(1, 3))
    return tiny_config(
        vocab_size=int(rng.integers(20, 200)),
        hidden_size=int(rng.integers(8, 40)),
        intermediate_size=int(rng.integers(8, 60)),
        num_hidden_layers=int(rng.integers(1, 4)),
        num_attention_heads=kv_heads * gqa_ratio,
        num_key_value_heads=kv_heads,
        head_dim=int(rng.choice([2, 4, 6, 10])),
        rms_norm_eps=float(rng.choice([1e-6, 1e-5, 1e-2])),
        rope_theta=float(rng.choice([1e4, 1e6])),
        sliding_window=[None, 2, 5, 1000][rng.integers(4)],
        tie_word_embeddings=bool(rng.integers(2)),
    )


# --- law 3 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gqa_ratio", [1, 2, 4, 8])
def test_logits_and_gradients_are_those_of_transformers_on_random_configurations(gqa_ratio: int):
    rng = np.random.default_rng(gqa_ratio)
    largest = {"logits": 0.0, "gradients": 0.0}  # differences, relative to the largest entry
    for seed in range(6):
        config = random_config(rng, gqa_ratio)
        model = tiny_model(config, seed, torch.float32)
        twin = hf_twin(model, attention="sdpa" if seed % 2 else "eager")
        ids = torch.from_numpy(rng.integers(0, config.vocab_size, 24))
        ours, theirs = logits_of(model, ids), twin(ids[None]).logits[0]  # (T, V)
        largest["logits"] = max(largest["logits"], worst({"": ours.detach()}, {"": theirs.detach()}))
        # Cross-entropy of the next token, with the same targets for both.
        losses = [torch.nn.functional.cross_entropy(logits[:-1], ids[1:]) for logits in (ours, theirs)]
        error = worst(gradients(losses[0], model), gradients(losses[1], twin))
        largest["gradients"] = max(largest["gradients"], error)
        assert largest["logits"] < 1e-5, config
        assert largest["gradients"] < 5e-5, config
    print(f"GQA {gqa_ratio}: {largest}")  # pytest -s shows it


@pytest.mark.parametrize("tied", [False, True])
def test_names_shapes_and_order_of_parameters_are_those_of_transformers(tied: bool):
    config = tiny_config(tie_word_embeddings=tied)
    with torch.device("meta"):
        twin = MistralForCausalLM(HFConfig(**config_json(config, spelling=5)))
    theirs = {name: parameter.shape for name, parameter in twin.named_parameters()}
    ours = {name: parameter.shape for name, parameter in meta_model(config).named_parameters()}
    assert ours == theirs
    assert meta_model(config).state_dict().keys() == ours.keys()  # no buffers
    assert ("lm_head.weight" in ours) is not tied


def test_mistral_7b_has_its_291_tensors_and_7241732096_parameters():
    parameters = list(meta_model(MISTRAL_7B).parameters())
    assert len(parameters) == 291
    assert sum(parameter.numel() for parameter in parameters) == 7_241_732_096


# --- the forward pass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("level", "products_again"), [("none", 0), ("elementwise", 0), ("half", 3), ("full", 5)])
@pytest.mark.parametrize("biases", [False, True])
def test_what_is_recomputed_changes_no_bit_of_the_gradients(level: str, products_again: int, biases: bool):
    """products_again: of how many of the 5 layers the matrix products run twice. With a bias torch has another name for
    them."""
    model = tiny_model(tiny_config(num_hidden_layers=5, sliding_window=6, qkv_bias=biases))
    stream = pack_pairs(random_pairs(np.random.default_rng(0), 4, model.config.vocab_size))
    plain = gradients(pair_logps(model, stream).sum(), model)
    model.model.recompute = level
    with Products() as forward:
        logps = pair_logps(model, stream)
    with Products() as backward:
        again = gradients(logps.sum(), model)
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert forward.count == 5 * 7 + 1  # each layer's, and the head's; backward has two for each of them
    assert backward.count == 2 * forward.count + products_again * 6  # down_proj's result is not needed again
    with torch.no_grad():
        assert torch.equal(pair_logps(model, stream), logps)


class Products(TorchDispatchMode):
    """How many matrix products run."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **kwargs or {})


def test_log_probs_are_those_of_the_logits():
    model = tiny_model(tiny_config())
    stream = pack_pairs(random_pairs(np.random.default_rng(1), 3, model.config.vocab_size))
    seen = {}

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # each token sees itself alone
        seen[layer] = query.shape, key.shape, value.shape
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    inputs = stream.input_ids, stream.positions, attend, stream.source
    logits, logps = model(*inputs), model(*inputs, stream.target)
    assert logits.shape == (len(stream.target), model.config.vocab_size)
    assert torch.allclose(logps, logits.log_softmax(-1).gather(1, stream.target[:, None]).squeeze(1), rtol=1e-13)
    tokens = len(stream.input_ids)
    assert seen == dict.fromkeys((0, 1), ((tokens, 4, 6), (tokens, 2, 6), (tokens, 2, 6)))


def test_rotary_tables_stay_float32_beside_a_bfloat16_model():
    positions = torch.tensor([0, 1, 511, 2000, 32767])
    angles = positions.double()[:, None] * 10000.0 ** (-torch.arange(0, 8, 2).double() / 8)  # (T, d/2)
    for dtype, wide, tolerance in (
        (torch.bfloat16, torch.float32, 4e-3),  # an angle near 32767 is known to 2e-3
        (torch.float32, torch.float32, 4e-3),
        (torch.float64, torch.float64, 1e-10),
    ):
        cos, sin = rotary_table(positions, 8, 10000.0, dtype)
        assert cos.dtype == sin.dtype == wide
        assert cos.shape == sin.shape == (5, 1, 4)
        assert torch.allclose(cos[:, 0].double(), angles.cos(), rtol=0, atol=tolerance)
        assert torch.allclose(sin[:, 0].double(), angles.sin(), rtol=0, atol=tolerance)


def test_bfloat16_is_as_close_to_float32_at_position_2000_as_at_the_start():
    wide = tiny_model(tiny_config(), dtype=torch.float32)
    narrow = tiny_model(tiny_config(), dtype=torch.bfloat16)
    ids = torch.randint(97, (32,), generator=torch.Generator().manual_seed(0))
    errors = []
    for start in (0, 2000):
        exact, ours = (logits_of(model, ids, start).detach() for model in (wide, narrow))
        assert ours.dtype == torch.float32
        errors.append(float((ours - exact).norm() / exact.norm()))
    assert errors[0] < 0.03
    assert errors[1] < 1.3 * errors[0]


def test_initialize_is_a_function_of_the_seed():
    config = tiny_config(hidden_size=64, initializer_range=0.05)
    first, again, other = Mistral(config), Mistral(config), Mistral(config)
    first.initialize(1), again.initialize(1), other.initialize(2)
    for (name, parameter), same, different in zip(
        first.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(parameter, same)
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert not torch.equal(parameter, different), name
            assert 0.04 < parameter.std().item() < 0.06, name
