"""lora.py: peft is the truth for the file and the numbers, finite differences for the gradient, an unchanged base for
the start; and nothing of the base is trained, copied or kept twice."""

import functools
import json
import math
from dataclasses import replace
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    hf_load,
    hf_logps,
    logits_of,
    random_pairs,
    run_ranks,
    save_base,
    save_checkpoint,
    tiny_config,
    tiny_model,
    worst,
)
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from notus import config as configuration
from notus import distributed, weights
from notus.base import Frame, load_sharded, read_base
from notus.checkpoint import state_of
from notus.distributed import full_tensor
from notus.logprobs import token_logps
from notus.lora import TARGETS, LoRA, add_lora, initialize, lora_layers, merged, peft_config, peft_tensors
from notus.losses import dpo
from notus.model import Mistral, pair_logps
from notus.optim import make_optimizer
from notus.packing import pack_pairs
from notus.tokens import load_pairs
from notus.weights import export, load_weights, meta_model

CONFIG = tiny_config(initializer_range=0.2)
IDS = torch.arange(17) * 5 % CONFIG.vocab_size
LORAS = [LoRA(3, 16.0, TARGETS[:4]), LoRA(5, 2.0, TARGETS), LoRA(1, 0.5, ("down_proj",))]


def with_lora(lora: LoRA, dtype: torch.dtype = torch.float32, seed: int = 0, learned: bool = True) -> Mistral:
    """The tiny model with LoRA as training begins, or with a B as if it had learned something."""
    model = tiny_model(CONFIG, dtype=dtype)
    add_lora(model, lora, dtype)
    initialize(model, seed)
    if learned:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_b.normal_(0.0, 0.1, generator=generator)
    return model


def loss_of(model: Mistral, pairs: list) -> Tensor:
    logps = pair_logps(model, pack_pairs(pairs))
    return dpo(logps, torch.tensor([-30.0, -31.0]), torch.ones_like(logps), beta=0.02).mean()


def base_files(directory: Path) -> Path:
    save_checkpoint(tiny_model(CONFIG, dtype=torch.float32), directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


# --- the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", LORAS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_before_its_first_step_the_policy_is_its_base_bit_for_bit(lora: LoRA, dtype: torch.dtype):
    model = with_lora(lora, dtype, learned=False)
    assert torch.equal(logits_of(model, IDS), logits_of(tiny_model(CONFIG, dtype=dtype), IDS))
    assert not torch.equal(logits_of(with_lora(lora, dtype), IDS), logits_of(model, IDS))


@pytest.mark.parametrize("lora", LORAS, ids=str)
def test_names_stay_and_only_a_and_b_are_trained_in_float32(lora: LoRA):
    model, plain = with_lora(lora, torch.bfloat16), tiny_model(CONFIG)
    names = {name: parameter for name, parameter in model.named_parameters()}
    trained = {name: parameter for name, parameter in names.items() if parameter.requires_grad}
    assert names.keys() - trained.keys() == dict(plain.named_parameters()).keys()
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert {parameter.dtype for name, parameter in names.items() if name not in trained} == {torch.bfloat16}
    layers = {name.rpartition(".")[0] for name in trained}
    assert (
        TARGETS
        == configuration.LAYERS
        == tuple(
            name.rpartition(".")[2]
            for name, layer in plain.model.layers[0].named_modules()
            if isinstance(layer, nn.Linear)
        )
    )
    assert {name.rpartition(".")[2] for name in layers} == set(lora.targets)
    assert len(layers) == len(lora.targets) * CONFIG.num_hidden_layers
    assert trained.keys() == {f"{layer}.lora_{matrix}" for layer in layers for matrix in "ab"}
    for layer in lora_layers(model).values():
        assert layer.lora_a.shape == (lora.rank, layer.in_features)
        assert layer.lora_b.shape == (layer.out_features, lora.rank)


def test_a_is_drawn_as_peft_draws_it():
    """kaiming_uniform_ with a = sqrt(5): within 1 / sqrt(inputs), whatever the rank, and other numbers for another
    seed."""
    wide = nn.Module()
    wide.q_proj = nn.Linear(400, 30, bias=False)
    add_lora(wide, LoRA(200, 1.0, ("q_proj",)), torch.float32)
    initialize(wide, 0)
    theirs = nn.init.kaiming_uniform_(torch.empty(200, 400), a=math.sqrt(5))
    ours = wide.q_proj.lora_a.detach().clone()
    most, spread = (pytest.approx(float(value), rel=0.02) for value in (theirs.abs().max(), theirs.std()))
    assert float(ours.abs().max()) <= 1 / 20 and float(ours.abs().max()) == most
    assert float(ours.std()) == spread and abs(float(ours.mean())) < 1e-3
    initialize(wide, 1)
    assert not torch.equal(wide.q_proj.lora_a, ours)
    initialize(wide, 0)
    assert torch.equal(wide.q_proj.lora_a, ours)
    assert not wide.q_proj.lora_b.any()


# --- the gradient --------------------------------------------------------------------------------------------------


def test_the_gradient_by_finite_differences():
    """Of the DPO loss, by every entry of some A and B, in float64."""
    pairs = random_pairs(np.random.default_rng(0), 2, CONFIG.vocab_size)
    model = with_lora(LoRA(2, 6.0, TARGETS), torch.float64)
    loss_of(model, pairs).backward()
    step, checked = 1e-6, 0
    for name in ("layers.0.self_attn.k_proj", "layers.1.mlp.down_proj", "layers.1.self_attn.o_proj"):
        layer = model.model.get_submodule(name)
        for matrix in (layer.lora_a, layer.lora_b):
            assert matrix.dtype == torch.float64
            flat = matrix.detach().view(-1)
            for i in range(0, len(flat), 7):
                before = flat[i].item()
                with torch.no_grad():
                    flat[i] = before + step
                    up = loss_of(model, pairs).item()
                    flat[i] = before - step
                    down = loss_of(model, pairs).item()
                    flat[i] = before
                assert matrix.grad.view(-1)[i].item() == pytest.approx((up - down) / (2 * step), rel=1e-4, abs=1e-9)
                checked += 1
    assert checked > 20


def test_the_base_gets_no_gradient_and_no_optimizer_state():
    pairs = random_pairs(np.random.default_rng(0), 2, CONFIG.vocab_size)
    model = with_lora(LORAS[0])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], "adamw", 1e-2, 0.1)
    loss_of(model, pairs).backward()
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert norm == pytest.approx(math.sqrt(sum(float(grad.square().sum()) for grad in grads)), rel=1e-5)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert ("lora_" in name) == (parameter.grad is not None) == (not torch.equal(parameter, before[name])), name
    assert {name.split(".lora_")[0] for name in state_of(model, optimizer)} == {
        f"{part}.{name}" for part in ("model", "optimizer") for name in lora_layers(model)
    }


class Products(TorchDispatchMode):
    """Shapes of the results of matrix products."""

    def __enter__(self):
        self.shapes = []
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        if op.name() in ("aten::mm", "aten::addmm"):
            self.shapes.append(tuple(out.shape))
        return out


@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_a_frozen_head_takes_no_product_for_its_gradient(keep_bytes: int):
    """The gradient of hidden states is the same, and one product of three is left out."""
    hidden, head, target = torch.randn(13, 7), torch.randn(29, 7), torch.arange(13)
    grads, shapes = [], []
    for trained in (True, False):
        inputs, weight = hidden.clone().requires_grad_(), head.clone().requires_grad_(trained)
        with Products() as products:
            token_logps(inputs, weight, target, 5, keep_bytes).sum().backward()
        grads.append(inputs.grad)
        shapes.append(products.shapes)
        assert (weight.grad is not None) == trained
    assert torch.equal(*grads)
    assert (29, 7) in shapes[0] and (29, 7) not in shapes[1]
    assert len(shapes[0]) - len(shapes[1]) == 3  # one for each chunk


def test_a_step_makes_no_product_of_a_frozen_weights_shape():
    model = with_lora(LoRA(2, 4.0, TARGETS[:4]))
    pairs = random_pairs(np.random.default_rng(0), 5, CONFIG.vocab_size)  # no dimension has as many rows
    frozen = {tuple(p.shape) for p in model.parameters() if not p.requires_grad and p.ndim == 2}
    frozen |= {shape[::-1] for shape in frozen}
    found = []
    for trained in (model, tiny_model(CONFIG, dtype=torch.float32)):
        with Products() as products:
            loss_of(trained, pairs).backward()
        found.append(frozen & set(products.shapes))
    assert found[0] == set() and len(found[1]) > 4


# --- export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", LORAS, ids=str)
def test_peft_loads_the_adapter_and_computes_the_same_logits(lora: LoRA, tmp_path: Path):
    """Within 1e-5 in float32, on logits of some units, by PEFT's own way from the two folders."""
    import peft
    from transformers import MistralForCausalLM

    base, model = base_files(tmp_path / "base"), with_lora(lora)
    export(
        model, base, tmp_path / "adapter", torch.float32, "card", eos_id=2, adapter=peft_config(lora, str(base))
    )  # fmt: skip
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    theirs = MistralForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert not [key for key in peft.get_peft_model_state_dict(theirs) if "lora_" not in key]
    with torch.no_grad():
        ours, logits = logits_of(model, IDS), theirs(IDS[None]).logits[0]
        without = logits_of(with_lora(lora, learned=False), IDS)
    assert (ours - logits).abs().max() < 1e-5
    assert (ours - without).abs().max() > 0.1
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (lora.rank, lora.alpha, str(base))


@pytest.mark.parametrize("lora", LORAS, ids=str)
@pytest.mark.parametrize("max_shard_bytes", [10_000, 5_000_000_000])
def test_merged_is_unmerged(lora: LoRA, max_shard_bytes: int, tmp_path: Path):
    base, model = base_files(tmp_path / "base"), with_lora(lora)
    export(model, base, tmp_path / "out", torch.float32, "card", max_shard_bytes=max_shard_bytes, eos_id=2)
    plain = meta_model(CONFIG)
    load_weights(plain, tmp_path / "out", torch.device("cpu"))
    assert (logits_of(plain, IDS) - logits_of(model, IDS)).abs().max() < 2e-5
    files = weights.weight_map(tmp_path / "out")
    assert files.keys() == dict(plain.named_parameters()).keys()
    assert (len(set(files.values())) > 1) == (max_shard_bytes == 10_000)
    unchanged = set(files) - {f"{name}.weight" for name in lora_layers(model)}
    whole = {name: tensor for path in set(files.values()) for name, tensor in load_file(path).items()}
    of_base = load_file(base / "model.safetensors")
    assert all(torch.equal(whole[name], of_base[name]) for name in unchanged)


def test_merging_adds_in_float32():
    """W = 1 and B A = 2^-10 are 1 in bfloat16 and more in float32."""
    model = with_lora(LoRA(1, 1.0, ("q_proj",)), torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.lora_a.fill_(2**-5)
        layer.lora_b.fill_(2**-5)
    assert torch.equal(merged(layer), torch.full(layer.weight.shape, 1 + 2**-10))


# --- two processes -------------------------------------------------------------------------------------------------

RANKS_LORA = LoRA(3, 6.0, TARGETS)
PAIRS = random_pairs(np.random.default_rng(0), 6, CONFIG.vocab_size)


def two_ranks(base: Path, out: Path) -> None:
    """Frozen bfloat16 and trained float32 in one group of FSDP2: the same start, gradients and export as one process
    has, with half of everything on each rank."""
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        model = meta_model(CONFIG)
        add_lora(model, RANKS_LORA, dtype)
        distributed.shard(model, model.model.layers, world, dtype)
        load_weights(model, base, world.device)
        initialize(model, 7)
        alone = meta_model(CONFIG)
        add_lora(alone, RANKS_LORA, dtype)
        load_weights(alone, base, world.device)
        initialize(alone, 7)
        for (name, sharded), (same, whole) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
            assert name == same and isinstance(sharded, DTensor) and sharded.dtype == whole.dtype
            assert sharded.dtype == (torch.float32 if "lora_" in name else dtype)
            assert torch.equal(full_tensor(sharded), whole)
        mine = PAIRS[world.rank :: 2]
        for _ in range(2):  # gradients of micro-batches are added
            (loss_of(model, mine) / 2).backward()
            loss_of(alone, PAIRS).backward()
        for (name, sharded), (_, whole) in zip(model.named_parameters(), alone.named_parameters(), strict=True):
            if "lora_b" in name:  # while B is 0, A has no gradient
                difference = (full_tensor(sharded.grad) - whole.grad).abs().max()
                assert sharded.grad.dtype == torch.float32 and difference < tolerance * whole.grad.abs().max(), name
            else:
                assert sharded.grad is None or not full_tensor(sharded.grad).any(), name
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad], "rmsprop", 1e-3, 0.0)
        optimizer.step()
        config = peft_config(RANKS_LORA, str(base))
        name = str(dtype).removeprefix("torch.")
        export(model, base, out / f"{name}-adapter", torch.float32, "", world.rank, eos_id=2, adapter=config)
        export(model, base, out / f"{name}-merged", torch.float32, "", world.rank, eos_id=2)
    distributed.stop()


def test_two_processes_begin_learn_and_export_as_one(tmp_path: Path):
    base = base_files(tmp_path / "base")
    run_ranks(2, two_ranks, base, tmp_path)
    for name in ("float32", "bfloat16"):
        adapter = load_file(tmp_path / f"{name}-adapter" / "adapter_model.safetensors")
        whole = load_file(tmp_path / f"{name}-merged" / "model.safetensors")
        dtype = getattr(torch, name)
        for key, before in load_file(base / "model.safetensors").items():
            prefix = f"base_model.model.{key.removesuffix('.weight')}"
            learned = 0.0
            if f"{prefix}.lora_A.weight" in adapter:
                a, b = (adapter[f"{prefix}.lora_{matrix}.weight"] for matrix in "AB")
                assert b.any()
                learned = 2.0 * b @ a
            assert torch.allclose(whole[key], before.to(dtype).float() + learned, rtol=1e-6, atol=1e-7), key


def test_bytes_of_the_adapter_are_those_of_notus_7b_v1_lora():
    """argilla/notus-7b-v1-lora-adapter: rank 64 on q, k, v and o, a file of 218 MB in float32."""
    from notus.cost import num_adapter_parameters
    from notus.plan import MISTRAL_7B

    lora = LoRA(64, 16.0, TARGETS[:4])
    assert num_adapter_parameters(MISTRAL_7B, lora) == 54_525_952
    assert num_adapter_parameters(CONFIG, lora) == sum(
        p.numel() for p in with_lora(lora).parameters() if p.requires_grad
    )
    assert num_adapter_parameters(MISTRAL_7B, None) == 0


# --- whole runs ----------------------------------------------------------------------------------------------------

ON = ("lora.rank=4", "lora.alpha=8", "train.learning_rate=1e-2")


@pytest.fixture(scope="module")
def lora_truth(home: Path, truth: Path) -> Path:
    """A LoRA run that nothing interrupts, with the reference cache of the full run."""
    out = home / "lora-truth"
    text = forked.finish(out, home, *ON, *forked.own_caches(truth))
    assert "0 pairs scored, 19 found" in text and "0 held-out pairs scored, 5 found" in text
    assert "lora        rank 4, alpha 8, on q_proj, k_proj, v_proj, o_proj: " in text
    return out


def test_a_lora_run_takes_the_cache_of_a_full_run_and_begins_at_log_2(home: Path, lora_truth: Path):
    lines = [line for line in forked.read_metrics(lora_truth) if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines[-1]["loss"] < 0.9 * math.log(2)
    before, after = load_file(home / "base" / "model.safetensors"), load_file(lora_truth / "final/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.split(".")[-2] in TARGETS[:4]}


def test_a_checkpoint_holds_the_adapter_alone(lora_truth: Path):
    names = {name.split(": ")[1] for name in forked.tensors_in(lora_truth / "checkpoints" / "step-00000008")}
    assert {name.split(".lora_")[0].split(".", 1)[1].split(".")[-1] for name in names} == set(TARGETS[:4])
    assert all(".lora_" in name for name in names)


@pytest.mark.parametrize("settings", [(), ("train.compute_dtype=bfloat16",)], ids=["float32", "bfloat16"])
def test_a_killed_run_resumes_bit_for_bit(home: Path, truth: Path, lora_truth: Path, tmp_path: Path, settings):
    """In bfloat16, one process needs no FSDP2: A and B cast themselves."""
    caches, whole, out = forked.own_caches(truth), lora_truth, tmp_path / "killed"
    if settings:
        whole = tmp_path / "whole"
        forked.finish(whole, home, *ON, *caches, *settings)
    killed = forked.launch(out, home, *ON, *caches, *settings, strikes=(forked.Strike("train:lr_at", forked.die, 6),))
    assert killed.code < 0
    assert "resuming    after step " in forked.finish(out, home, *ON, *caches, *settings)
    forked.assert_same(out, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_process_shards_only_what_it_must(dtype: torch.dtype, tmp_path: Path):
    """Frozen weights are in the compute dtype, and A and B cast themselves: nothing is gathered, and nothing copied. A
    full run in bfloat16, or offload, needs FSDP2."""
    base, world = read_base(save_base(tmp_path / "base")), distributed.start("cpu")
    try:
        for settings, sharded, trained in (
            ({"lora": LORAS[0]}, False, 16), ({"frozen": True}, False, 0), ({}, dtype == torch.bfloat16, 21),
            ({"lora": LORAS[0], "cpu_offload": True}, True, 16),
        ):  # fmt: skip
            model = load_sharded(base, world, dtype, **settings)
            assert isinstance(model, FSDPModule) == sharded, settings
            assert sum(parameter.requires_grad for parameter in model.parameters()) == trained
            del model
    finally:
        distributed.stop()


def test_another_rank_of_lora_is_another_run(home: Path, truth: Path, tmp_path: Path):
    caches, out = forked.own_caches(truth), tmp_path / "out"
    forked.launch(out, home, *ON, *caches, strikes=(forked.Strike("train:lr_at", forked.die, 6),))
    other = forked.launch(out, home, *ON, *caches, "lora.rank=5")
    assert other.code == 2 and "lora.rank was 4 and is 5" in other.text
    assert forked.launch(out, home, *ON, *caches, "lora.export=adapter").code == 0  # only how it is written


def test_two_processes_are_one_run_and_export_the_same_adapter(home: Path, truth: Path, lora_truth: Path, tmp_path):
    """And PEFT, given the adapter, computes the log-probs of the last evaluation."""
    out, settings = tmp_path / "two", (*ON, *forked.own_caches(truth), "lora.export=adapter")
    assert forked.join(forked.start_ranks(out, home, 2, *settings)) == [0, 0], forked.log_of(out, 0).read_text()
    for mine, other in zip(forked.read_metrics(out), forked.read_metrics(lora_truth), strict=True):
        assert mine.keys() == other.keys()
        for name in mine:  # a reward is a tenth of a log-ratio
            tolerance = 1e-4 if "logratios" in name else 1e-5
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=tolerance), (mine["step"], name)
    adapter = load_file(out / "final" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    whole, base = load_file(lora_truth / "final/model.safetensors"), load_file(home / "base" / "model.safetensors")
    for name in (name for name in base if name.split(".")[-2] in TARGETS[:4]):
        a, b = (adapter[f"base_model.model.{name.removesuffix('weight')}lora_{matrix}.weight"] for matrix in "AB")
        assert torch.allclose(base[name] + 2.0 * b @ a, whole[name], atol=1e-5)

    import peft

    theirs = peft.PeftModel.from_pretrained(hf_load(home / "base"), out / "final").eval()
    encoder = read_base(home / "base").encoder(Frame())
    pairs = load_pairs([home / "test.jsonl"], encoder, max_length=48, max_prompt_length=24)
    with torch.no_grad():
        logps = torch.stack([hf_logps(theirs, pair.prompt, answer) for pair in pairs for answer in pair[2:]])
    chosen, rejected = logps.view(-1, 2).mean(0).tolist()
    last = [line for line in forked.read_metrics(out) if "eval_loss" in line][-1]
    assert last["eval_logps/chosen"] == pytest.approx(chosen, rel=1e-5)
    assert last["eval_logps/rejected"] == pytest.approx(rejected, rel=1e-5)


def test_two_processes_in_bfloat16_begin_at_log_2(home: Path, tmp_path: Path):
    """FSDP2 with frozen bfloat16 and trained float32, through a whole run."""
    out = tmp_path / "two"
    settings = (*ON, *forked.own_caches(out), "train.compute_dtype=bfloat16", "train.num_train_epochs=1")
    assert forked.join(forked.start_ranks(out, home, 2, *settings)) == [0, 0], forked.log_of(out, 0).read_text()
    lines = [line for line in forked.read_metrics(out) if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.01) and len(lines) == 3


def test_peft_computes_the_same_gradients(tmp_path: Path):
    """Of the loss over pairs, by every A and B, through PEFT's own layers and transformers' model."""
    import peft

    lora, pairs = LoRA(3, 16.0, TARGETS), random_pairs(np.random.default_rng(1), 4, CONFIG.vocab_size)
    base, model = base_files(tmp_path / "base"), with_lora(lora)
    export(model, base, tmp_path / "adapter", torch.float32, "", eos_id=2, adapter=peft_config(lora, str(base)))
    theirs = peft.PeftModel.from_pretrained(hf_load(base), tmp_path / "adapter", is_trainable=True)
    loss_of(model, pairs).backward()
    logps = torch.stack([hf_logps(theirs, pair.prompt, answer) for pair in pairs for answer in pair[2:]]).view(-1, 2)
    dpo(logps, torch.tensor([-30.0, -31.0]), torch.ones_like(logps), beta=0.02).mean().backward()
    found = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    ours = {name: parameter.grad for name, parameter in peft_tensors(model)}
    assert len(found) == 2 * 7 * CONFIG.num_hidden_layers
    assert worst(ours, found) < 2e-5


@pytest.mark.parametrize("level", ["none", "elementwise", "half", "full"])
def test_recomputation_changes_no_gradient(level: str):
    pairs, grads = random_pairs(np.random.default_rng(1), 4, CONFIG.vocab_size), []
    for recompute in ("none", level):
        model = with_lora(LORAS[1])
        model.model.recompute = recompute
        loss_of(model, pairs).backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert all(torch.equal(*both) for both in zip(*grads, strict=True))


def test_compiled_layers_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch):
    """With autograd's partitioner, without code generation, which takes a minute."""
    torch._dynamo.reset()
    monkeypatch.setitem(globals(), "CONFIG", replace(CONFIG, num_hidden_layers=1))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    pairs = random_pairs(np.random.default_rng(1), 4, CONFIG.vocab_size)
    plain, compiled = with_lora(LORAS[1]), with_lora(LORAS[1])
    compiled.model.recompute = "elementwise"
    compiled.model.compile_layers()
    for model in (plain, compiled):
        loss_of(model, pairs).backward()
    ours, theirs = ({name: p.grad for name, p in peft_tensors(model)} for model in (compiled, plain))
    assert worst(ours, theirs) < 1e-5
    assert all(p.grad is None for p in compiled.parameters() if not p.requires_grad)
