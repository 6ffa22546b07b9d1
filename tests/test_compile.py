"""Compiled layers: how many functions the compiler makes of them, which is a law, and that they compute the same.

Past torch's limit of 8 for one function, a rank would run its layers uncompiled from then on, while the others wait for
it. Most tests count graphs only, with a backend that generates no code.
"""

from contextlib import ExitStack
from functools import partial

import numpy as np
import pytest
import torch
from tiny import gradients, random_pairs, tiny_config, tiny_model, worst
from torch._dynamo.utils import counters
from torch.nn.attention import varlen

from notus import distributed
from notus.attention import PackedAttention, sdpa
from notus.lora import TARGETS, LoRA, add_lora
from notus.lora import initialize as initialize_lora
from notus.model import Mistral, pair_logps, stream_logps
from notus.packing import pack, pack_pairs

# With and without gradients, times the last layer and the others. In every second layer `half` recomputes otherwise.
GRAPHS = {"none": 4, "elementwise": 4, "half": 5, "full": 4}
FIRST_LAYER = 1  # with LoRA, whose embedding is frozen: the first layer's input needs no gradient


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(monkeypatch: pytest.MonkeyPatch, model: Mistral, level: str, backend: str) -> Mistral:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model.model.recompute = level
    model.model.compile_layers()
    return model


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def run_steps(model: Mistral, num_steps: int) -> None:
    """Train and evaluate on streams of ever other lengths. Every third is that of a rank that has no pair, as is the
    first. From the second step on a recompilation is an error. The forward pass decides about it, so only the first
    steps go backward."""
    rng = np.random.default_rng(0)
    for step in range(num_steps):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            for has_gradient in (True, False):
                pairs = random_pairs(rng, step % 3 and int(rng.integers(1, 5)), model.config.vocab_size)
                with torch.set_grad_enabled(has_gradient):
                    logps = pair_logps(model, pack_pairs(pairs))
                if has_gradient and step < 2:
                    logps.sum().backward()
        distributed.reshard(model)


@pytest.mark.parametrize(("level", "layers"), [("none", 3), ("elementwise", 3), ("half", 32), ("full", 3)])
def test_streams_of_all_lengths_share_a_few_graphs(level: str, layers: int, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(tiny_config(num_hidden_layers=layers, initializer_range=0.05), dtype=torch.float32)
    run_steps(compiled(monkeypatch, model, level, "eager"), 40 if layers < 32 else 20)
    assert num_graphs() == GRAPHS[level]
    assert not counters["graph_break"]


def test_with_lora_the_first_layer_has_one_more(monkeypatch: pytest.MonkeyPatch):
    model = tiny_model(tiny_config(num_hidden_layers=3), dtype=torch.float32)
    add_lora(model, LoRA(3, 6.0, TARGETS), torch.bfloat16)
    initialize_lora(model, seed=0)
    run_steps(compiled(monkeypatch, model, "none", "eager"), 8)
    assert num_graphs() == GRAPHS["none"] + FIRST_LAYER


def test_sizes_that_are_equal_in_the_first_stream_are_not_taken_to_be_equal_always(monkeypatch: pytest.MonkeyPatch):
    """As many tokens as columns, and as many pieces as half a head has."""
    config = tiny_config(hidden_size=12, head_dim=8)
    model = compiled(monkeypatch, tiny_model(config, dtype=torch.float32), "none", "eager")
    for prompt, answers in ((2, (4, 6)), (3, (4, 6)), (3, (2, 9))):
        stream = pack([([1] * prompt, [[1] * answer for answer in answers])])
        pair_logps(model, stream)
    assert num_graphs() == 2


def test_under_fsdp2_there_are_no_more(monkeypatch: pytest.MonkeyPatch):
    """In bfloat16, so that a process alone is sharded too."""
    world = distributed.start("cpu")
    try:
        model = tiny_model(tiny_config(num_hidden_layers=3), dtype=torch.float32)
        compiled(monkeypatch, model, "full", "eager")
        distributed.shard(model, model.model.layers, world, torch.bfloat16)
        run_steps(model, 8)
    finally:
        distributed.stop()
    assert num_graphs() == GRAPHS["full"]
    assert not counters["graph_break"]


def test_past_the_limit_a_run_fails(monkeypatch: pytest.MonkeyPatch):
    model = compiled(monkeypatch, tiny_model(tiny_config()), "none", "eager")
    stream = pack_pairs(random_pairs(np.random.default_rng(0), 2, model.config.vocab_size))
    with torch._dynamo.config.patch(recompile_limit=1):
        pair_logps(model, stream)
        with torch.no_grad(), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            pair_logps(model, stream)


# --- FlashAttention's way, with kernels of the same formula -----------------------------------------------------------

CALLS = {"forward": 0, "backward": 0}
OFF = ExitStack()  # never left


def pieces(query, key, value, query_ends, key_ends, window_size):
    """By SDPA, with the mask aligned to the lower right."""
    sizes = query_ends.diff().tolist(), key_ends.diff().tolist()
    out = []
    for q, k, v in zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1]), strict=True):
        distance = len(k) - len(q) + torch.arange(len(q))[:, None] - torch.arange(len(k))  # (l, s)
        mask = (distance >= 0) & ((distance <= window_size[0]) if window_size[0] >= 0 else True)
        out.append(sdpa(q, k, v, mask=mask))
    return torch.cat(out)


def flash_forward(query, key, value, query_ends, key_ends, *rest, window_size=None, **_):
    CALLS["forward"] += 1
    window_size = next((x for x in rest if isinstance(x, list)), window_size)
    out = pieces(query, key, value, query_ends, key_ends, window_size)
    return out, query.new_zeros(query.shape[1], len(query), dtype=torch.float), torch.zeros(2, dtype=torch.uint64)


def flash_backward(grad, query, key, value, _out, _lse, query_ends, key_ends, *rest, window_size=None, **_):
    CALLS["backward"] += 1
    window_size = next((x for x in rest if isinstance(x, list)), window_size)
    way = partial(pieces, query_ends=query_ends, key_ends=key_ends, window_size=window_size)
    return torch.func.vjp(way, query, key, value)[1](grad)


@pytest.fixture
def flash_on_cpu(monkeypatch: pytest.MonkeyPatch):
    """torch's own operation for variable lengths, with CPU kernels in it. The streams then take the way that they take
    on GPUs."""
    kernels = {varlen._varlen_attn: flash_forward, varlen._varlen_attn_backward: flash_backward}
    init = PackedAttention.__init__
    monkeypatch.setattr(PackedAttention, "__init__", lambda *arguments: init(*arguments, flash=True))
    CALLS.update(forward=0, backward=0)
    with ExitStack() as stack:
        for operation, kernel in kernels.items():
            operation.register_kernel("cpu")(kernel)
            stack.enter_context(operation.set_kernel_enabled("cpu", True))
        yield
    for operation in kernels:  # from now on they are off, for the other tests of this process
        OFF.enter_context(operation.set_kernel_enabled("cpu", False))


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize(("level", "window"), [("none", None), ("elementwise", 6), ("full", None)])
def test_flash_attention_is_part_of_the_graph(level: str, window: int | None, monkeypatch: pytest.MonkeyPatch):
    """One graph a layer, the gradients of the uncompiled model, and attention runs again only where the whole layer
    does. With the partitioner that code generation uses."""
    config = tiny_config(num_hidden_layers=2, sliding_window=window, initializer_range=0.05)
    stream = pack_pairs(random_pairs(np.random.default_rng(0), 3, config.vocab_size))
    found = []
    for compile_it in (False, True):
        model = tiny_model(config, dtype=torch.bfloat16)
        if compile_it:
            compiled(monkeypatch, model, level, "aot_eager_decomp_partition")
        model.model.recompute = level
        CALLS.update(forward=0, backward=0)
        found.append(gradients(pair_logps(model, stream).sum(), model))
        assert (CALLS["forward"], CALLS["backward"]) == (4 if level == "full" else 2, 2)
    assert worst(*found) < 0.1
    assert num_graphs() == 2
    assert not counters["graph_break"]


@pytest.mark.usefixtures("flash_on_cpu")
@pytest.mark.parametrize(("level", "window"), [("none", None), ("half", 6)])
def test_flash_attention_takes_streams_of_all_lengths_in_the_same_graphs(
    level: str, window: int | None, monkeypatch: pytest.MonkeyPatch
):
    """Pieces of 2 tokens, as of a rank without pairs, and around 128, where torch 2.15 chooses between kernels."""
    config = tiny_config(num_hidden_layers=4, sliding_window=window)
    model = compiled(monkeypatch, tiny_model(config, dtype=torch.bfloat16), level, "eager")
    for size in (300, 0, 100, 128, 129, 1000, 3, 127, 400):
        stream = pack([([1] * 5, [[1] * size, [2] * (size // 2 + 1)])] if size else [])
        for has_gradient in (True, False):
            with torch.set_grad_enabled(has_gradient):
                stream_logps(model, stream)
    assert num_graphs() == GRAPHS[level]
    assert not counters["graph_break"]
