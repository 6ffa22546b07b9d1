"""distributed.py: ranks add up to what one process computes, in float32, and a rank with nothing to do adds nothing."""

import io
import platform
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from tiny import gradients, random_pairs, run_ranks, tiny_config, tiny_model, worst
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from notus import distributed
from notus.distributed import World, from_rank_zero, full_tensor, reshard, shard, sum_over_ranks
from notus.losses import dpo
from notus.model import Mistral, pair_logps
from notus.packing import pack_pairs
from notus.tokens import Pair

# Rows that two ranks cannot halve, and every kind of parameter: matrices, norms, Qwen 2's biases, Qwen 3's norms.
CONFIG = tiny_config(hidden_size=15, intermediate_size=21, initializer_range=0.1, qkv_bias=True, qk_norm=True)
PAIRS = random_pairs(np.random.default_rng(0), 9, CONFIG.vocab_size)


def loss_of(model: Mistral, pairs: list[Pair]) -> Tensor:
    """A share of the loss of a step that has all PAIRS, against a reference of its own."""
    policy = pair_logps(model, pack_pairs(pairs))
    reference = torch.tensor([[-30.0 - len(pair.chosen), -31.0 - len(pair.chosen)] for pair in pairs]).view(-1, 2)
    return dpo(policy, reference, torch.ones_like(policy), beta=0.02).sum() / len(PAIRS)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: full_tensor(parameter.grad) for name, parameter in model.named_parameters()}


@pytest.fixture
def world():
    """A process group of one."""
    yield distributed.start("cpu")
    distributed.stop()


# --- two processes -------------------------------------------------------------------------------------------------


def check_the_group(world: World) -> None:
    assert (world.rank, world.size, world.device) == (distributed.rank(), 2, torch.device("cpu"))
    assert world.mesh.size() == 2
    mine = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    assert sum_over_ranks(mine) is mine
    assert mine.tolist() == [3.0, 30.0]
    calls = []
    answer = from_rank_zero(world, lambda: calls.append(world.rank) or {"rank": world.rank, "text": "é"})
    assert answer == {"rank": 0, "text": "é"}
    assert calls == [0] * (world.rank == 0)


def check_the_shards(world: World) -> None:
    plain = tiny_model(CONFIG, dtype=torch.float32)
    model = tiny_model(CONFIG, dtype=torch.float32)
    shard(model, model.model.layers, world, torch.float32)
    held = 0
    for (name, parameter), (same, whole) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == same
        assert isinstance(parameter, DTensor) and parameter.dtype == torch.float32
        assert torch.equal(full_tensor(parameter), whole)
        assert full_tensor(whole) is whole
        held += parameter.to_local().numel()
    total = sum(parameter.numel() for parameter in plain.parameters())
    assert held < 0.6 * total
    assert sum_over_ranks(torch.tensor(held)) == total


def check_gradients(world: World) -> None:
    """Uneven shares, and then all pairs on one rank: the other feeds the empty stream."""
    plain = tiny_model(CONFIG, dtype=torch.float32)
    truth = gradients(loss_of(plain, PAIRS), plain)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in truth.values()]))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        model = tiny_model(CONFIG, dtype=torch.float32)
        shard(model, model.model.layers, world, dtype)
        for shares in ((PAIRS[:4], PAIRS[4:]), (PAIRS, []), ([], PAIRS)):
            loss = loss_of(model, shares[world.rank])
            assert loss.item() > 0 if shares[world.rank] else loss.item() == 0
            loss.backward()
            for parameter in model.parameters():
                assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert worst(whole_gradients(model), truth) < tolerance, shares
            clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1e-3)
            assert torch.allclose(full_tensor(clipped), norm, rtol=tolerance), shares
            if dtype == torch.float32:  # clipped by the norm of the whole, not of a shard
                scaled = {name: grad * (1e-3 / (norm + 1e-6)) for name, grad in truth.items()}
                assert worst(whole_gradients(model), scaled) < tolerance
            model.zero_grad()


def check_offload(world: World) -> None:
    """Shards in host memory: the same gradients."""
    plain, model = (tiny_model(CONFIG, dtype=torch.float32) for _ in range(2))
    truth = gradients(loss_of(plain, PAIRS), plain)
    shard(model, model.model.layers, world, torch.float32, cpu_offload=True)
    loss_of(model, PAIRS if world.rank == 0 else []).backward()
    assert all(parameter.to_local().device.type == "cpu" for parameter in model.parameters())
    assert worst(whole_gradients(model), truth) < 1e-5


def check_layers_that_stay_gathered(world: World) -> None:
    """The same bits, after a pass without gradients that left the layers gathered, too."""
    found = []
    for freed in (True, False):
        model = tiny_model(CONFIG, dtype=torch.float32)
        shard(model, model.model.layers, world, torch.bfloat16, reshard_after_forward=freed)
        with torch.no_grad():
            loss_of(model, PAIRS)
        gathered = [not isinstance(next(layer.parameters()), DTensor) for layer in model.model.layers]
        assert gathered == [not freed] * len(gathered)
        reshard(model)
        loss_of(model, PAIRS).backward()
        assert all(isinstance(parameter, DTensor) for parameter in model.model.layers.parameters())
        found.append(whole_gradients(model))
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def check_empty_streams_add_exactly_nothing(world: World) -> None:
    model = tiny_model(CONFIG, dtype=torch.float32)
    shard(model, model.model.layers, world, torch.float32)
    loss_of(model, PAIRS if world.rank == 0 else []).backward()
    once = {name: grad.clone() for name, grad in whole_gradients(model).items()}
    loss_of(model, []).backward()  # on both ranks, on top of what is there
    assert all(torch.equal(grad, once[name]) for name, grad in whole_gradients(model).items())


def two_ranks() -> None:
    world = distributed.start("cpu")
    check_the_group(world)
    check_the_shards(world)
    check_gradients(world)
    check_empty_streams_add_exactly_nothing(world)
    check_offload(world)
    check_layers_that_stay_gathered(world)
    distributed.stop()


def test_two_ranks_compute_what_one_process_computes():
    run_ranks(2, two_ranks)


# --- one process ---------------------------------------------------------------------------------------------------


def test_one_process_without_torchrun_is_a_group_of_one(world: World):
    assert (world.rank, world.size, world.device, world.mesh.size()) == (0, 1, torch.device("cpu"), 1)
    assert distributed.rank() == 0 and distributed.world_size() is None
    assert sum_over_ranks(torch.tensor([2.0])).tolist() == [2.0]
    assert from_rank_zero(world, lambda: "once") == "once"


def test_groups_can_be_left_and_joined_again():
    for _ in range(2):
        distributed.start("cpu")
        distributed.stop()
    distributed.stop()


def test_one_process_in_float32_is_left_as_it_is(world: World):
    model, plain = (tiny_model(CONFIG, dtype=torch.float32) for _ in range(2))
    shard(model, model.model.layers, world, torch.float32)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    ours, theirs = (gradients(loss_of(m, PAIRS), m) for m in (model, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_process_in_bfloat16_keeps_float32_masters_and_gradients(world: World):
    model, plain = (tiny_model(CONFIG, dtype=torch.float32) for _ in range(2))
    shard(model, model.model.layers, world, torch.bfloat16)
    assert all(isinstance(module, FSDPModule) for module in (model, *model.model.layers))
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    loss_of(model, PAIRS).backward()
    assert seen == [torch.bfloat16]
    for (name, parameter), master in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert torch.equal(full_tensor(parameter), master), name
    assert worst(whole_gradients(model), gradients(loss_of(plain, PAIRS), plain)) < 0.1


def test_reshard_gives_back_the_masters_after_a_forward_pass_alone(world: World):
    model = tiny_model(CONFIG, dtype=torch.float32)
    shard(model, model.model.layers, world, torch.bfloat16)
    with torch.no_grad():
        loss_of(model, PAIRS)
    reshard(model)
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor) and parameter.dtype == torch.float32
    reshard(tiny_model(CONFIG))  # unsharded: nothing to free


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="local rank 0 has no GPU: 0 found"):
        distributed.start("cuda")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_stays_with_the_process():
    """32 MiB taken and given back again and again: page faults each time, or only at first."""
    program = """
        import resource, torch
        from notus.distributed import keep_freed_memory
        for way in (lambda: None, keep_freed_memory):
            way()
            for round in range(20):
                if round == 10:
                    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                torch.ones(2**23)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    given_back, kept = map(int, subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.split())
    assert 5 * kept < given_back


def test_a_terminal_gets_folded_lines_and_whole_commands(monkeypatch: pytest.MonkeyPatch):
    """Lines that begin with a name are folded behind it. What one may paste stays one line."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "40")
    text = f"train       {'a word ' * 12}\n  python {'--flag ' * 12}\n\ndone"
    folded = ["train       a word a word a word a word", *2 * ["            a word a word a word a word"]]
    for stream, lines in ((Terminal(), folded), (io.StringIO(), text.splitlines()[:1])):
        monkeypatch.setattr(sys, "stdout", stream)
        World(0, 1, torch.device("cpu"), None).say(text)
        World(1, 2, torch.device("cpu"), None).say(text)
        assert stream.getvalue().rstrip("\n").split("\n") == [*lines, *text.split("\n")[1:]]
