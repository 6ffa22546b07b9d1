"""plan.py: the arithmetic agrees with what PyTorch itself counts, keeps, sends and multiplies."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import config_json, pair_set, random_pairs, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from notus import config as configuration
from notus import distributed, plan
from notus.attention import PackedAttention, sdpa
from notus.data import Pair
from notus.distributed import World
from notus.logprobs import CHUNK_ROWS, token_logps
from notus.losses import dpo_loss
from notus.metrics import duration
from notus.model import RECOMPUTE, MistralConfig, pair_logps, rotary_table
from notus.optim import make_optimizer
from notus.packing import Segment, pack_pairs
from notus.plan import (
    DEVICES,
    MISTRAL_7B,
    RESERVE_GIB,
    activation_bytes,
    describe_cost,
    engineering,
    forward_flops,
    least_recomputation,
    memory_gib,
    num_parameters,
    peak_flops,
    traffic_bytes,
)
from notus.weights import meta_model

ROOT = Path(__file__).parent.parent


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
    tokens, scored = len(stream.input_ids), len(stream.target)
    norms = (
        2 * config.hidden_size * ((2 * config.num_hidden_layers - 1) * tokens + scored)
    )  # the last: scored rows only
    head = 2 * config.vocab_size * config.hidden_size * scored
    # Attention: the query-key meetings of the mask as drawn in packing.py, two products each, two FLOPs a number.
    meetings = sum(
        sum(range(1, len(p.prompt) + 1)) + sum(len(p.prompt) + i for n in map(len, p[2:]) for i in range(1, n + 1))
        for p in pairs
    )
    attention = 2 * 2 * meetings * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    ours = forward_flops(config, pair_set(pairs).lengths).sum() - attention - norms

    def counted(work: Callable) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm")

    def forward_and_backward() -> None:
        pair_logps(model, stream).sum().backward()

    assert counted(lambda: pair_logps(model, stream)) == ours
    assert counted(forward_and_backward) == 3 * ours
    model.model.recompute = "elementwise"
    assert counted(forward_and_backward) == 3 * ours  # no product runs twice
    model.model.recompute = "none"
    monkeypatch.setattr(token_logps, "__defaults__", (CHUNK_ROWS, 0))  # keep no softmax
    assert counted(forward_and_backward) == 3 * ours + head  # logits are computed again in backward: no credit for that


def test_the_last_layer_computes_only_what_is_scored():
    """A longer prompt costs all but o_proj, MLP and norm of the last layer, of which the other layers have all."""
    one, two = (tiny_config(num_hidden_layers=n) for n in (1, 2))
    products = {}
    for config in (one, two):
        ids = [np.arange(n, dtype=np.int32) for n in (40, 5, 7)]
        streams = [pack_pairs([Pair("", ids[0][:n], *ids[1:])]) for n in (39, 40)]
        counts = []
        for stream in streams:
            with FlopCounterMode(display=False) as counter:
                pair_logps(tiny_model(config, dtype=torch.float32), stream)
            counts.append(next(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) == "aten.mm"))
        products[config] = counts[1] - counts[0]
    heads, keys = one.num_attention_heads * one.head_dim, one.num_key_value_heads * one.head_dim
    qkv = 2 * one.hidden_size * (heads + 2 * keys)
    assert products[one] == qkv  # of one more token, in the last layer
    assert products[two] == 2 * qkv + 2 * one.hidden_size * (heads + 3 * one.intermediate_size)


def test_flops_of_the_average_pair_of_the_recipe():
    """161 / 298 / 281 tokens of prompt, chosen and rejected: 31.8 TFLOP, forward and backward."""
    assert 3 * forward_flops(MISTRAL_7B, lengths(AVERAGE)) == pytest.approx(31.8e12, rel=0.01)


def test_a_shared_prompt_counts_once():
    both, chosen, rejected, prompt = forward_flops(
        tiny_config(), lengths((30, 10, 20), (30, 10, 0), (30, 0, 20), (30, 0, 0))
    )
    assert both == pytest.approx(chosen + rejected - prompt, rel=1e-12)


class Alive(TorchDispatchMode):
    """The storages that were made inside and still are there."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self, but: set[int]) -> int:
        return sum(size for key, (ref, size) in self.made.items() if key not in but and not ref.expired())


def causal(_layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """One kernel for the whole stream, like FlashAttention on a GPU."""
    return sdpa(query, key, value, is_causal=True)


def kept_on_cpu(config: MistralConfig, dtype: torch.dtype, level: str) -> int:
    """`activation_bytes`, and what the CPU keeps beyond that: its RMSNorm is made of plain operations, which keep two
    float32 rows, the input made wide and the normalized one, where the GPU's kernel keeps the input as it is."""
    norms = 2 * config.hidden_size * (4 + 4 - dtype.itemsize) if level == "none" else 0
    return activation_bytes(config, dtype, level, compiled=False) + norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("level", RECOMPUTE)
def test_activations_are_what_is_alive_after_a_forward_pass(level: str, heads: int, dtype: torch.dtype):
    """Of a real model on real numbers, with autograd and with selective checkpointing: two layers more keep so much."""
    tokens, alive = 48, []
    for layers in (3, 5):
        config = tiny_config(num_key_value_heads=heads, hidden_size=44, intermediate_size=100, num_hidden_layers=layers)
        model = tiny_model(config, dtype=dtype).model
        model.recompute = level
        everywhere = torch.arange(tokens)
        with Alive() as storages:
            out = model(everywhere, everywhere, causal, everywhere)
        assert out.requires_grad
        alive.append(storages.bytes(but={p.untyped_storage()._cdata for p in model.parameters()}))
        del out
    levels = ("full", "elementwise") if level == "half" else (level, level)
    assert alive[1] - alive[0] == tokens * sum(kept_on_cpu(config, dtype, each) for each in levels)


class Traffic(TorchDispatchMode):
    """Bytes that this rank receives or sends, of all-gathers and reduce-scatters, without its own share."""

    bytes = 0.0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name() in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            whole = max(tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor))
            self.bytes += whole * (dist.get_world_size() - 1) / dist.get_world_size()
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("level", RECOMPUTE)
def test_a_simulated_step_of_fsdp2_takes_that_memory_and_traffic(level: str):
    """Two layers of the 7B in bfloat16 on 8 ranks: tensors without numbers, collectives without a network. PyTorch's
    own tracker finds at most what we estimate, and not much less. Traffic is exact."""
    config, ranks, tokens, optimizer = replace(MISTRAL_7B, num_hidden_layers=2), 8, 8192, "rmsprop"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        world = World(0, ranks, torch.device("cpu"), init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",)))
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = meta_model(config)
            model.model.recompute = level
            distributed.shard(model, model.model.layers, world, torch.bfloat16)
            model.to_empty(device="cpu")
            optimize = make_optimizer(model.parameters(), optimizer, 1e-5, weight_decay=0.0)
            ids, rows = torch.zeros(tokens, dtype=torch.long), torch.zeros(int(0.8 * tokens), dtype=torch.long)

            def micro_batch() -> None:
                model(ids, ids, causal, rows, rows).sum().backward()

            with Traffic() as traffic:
                micro_batch()
            tracker = FSDPMemTracker(model, optimize)
            with tracker:
                micro_batch()
                optimize.step()
                tracker.reset_mod_stats()
                micro_batch()  # with gradients from before
            peak = tracker.get_tracker_snapshot("peak")[world.device]["Total"]
    finally:
        dist.destroy_process_group()
    assert traffic.bytes == traffic_bytes(config, ranks, torch.bfloat16)
    ours = sum(memory_gib(config, ranks, torch.bfloat16, optimizer, tokens, False, False, level).values())
    of_norms = kept_on_cpu(config, torch.bfloat16, level) - activation_bytes(
        config, torch.bfloat16, level, compiled=False
    )
    ours += 2 * of_norms * tokens / 2**30
    assert peak / 2**30 <= ours <= peak / 2**30 + 1.5


def arguments(num_gpus: int = 8, **changes) -> tuple:
    """Of `memory_gib`, but the last."""
    settings = {
        "dtype": torch.bfloat16,
        "optimizer": "rmsprop",
        "micro_batch_tokens": 8192,
        "cpu_offload": False,
        "compiled": False,
    }
    return MISTRAL_7B, num_gpus, *(settings | changes).values()


@pytest.mark.parametrize("level", ["none", "elementwise"])
def test_compiled_layers_keep_what_is_said_or_less(level: str):
    """A real compiled layer's storages that outlive its forward pass, in bfloat16; the first, that has all rows."""
    torch._dynamo.reset()
    config, tokens, kept = tiny_config(hidden_size=64, intermediate_size=200, head_dim=16), 192, {}
    model = tiny_model(config, dtype=torch.bfloat16)
    model.model.recompute = level
    model.model.compile_layers()
    layer = model.model.layers[0]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    x = torch.randn(tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    rotary = rotary_table(torch.arange(tokens), config.head_dim, config.rope_theta, torch.bfloat16)
    attend = PackedAttention([Segment(tokens, ())], None, x.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, rotary, attend, 0)
    shared = sum(table.nbytes for table in rotary)  # by all layers
    ours = (sum(storage.nbytes() for storage in kept.values()) - shared) / tokens
    said = activation_bytes(config, torch.bfloat16, level, compiled=True)
    assert 0.8 * said < ours <= 1.01 * said


def memory(num_gpus: int = 8, recompute: str = "none", **changes) -> dict[str, float]:
    return memory_gib(*arguments(num_gpus, **changes), recompute)


def test_memory_of_the_shards_is_12_bytes_a_parameter_divided_by_the_gpus():
    for num_gpus in (1, 8, 64):
        for optimizer, size in (("rmsprop", 12), ("adamw", 16)):
            shards = [gib for name, gib in memory(num_gpus, optimizer=optimizer).items() if "shard" in name]
            assert sum(shards) == pytest.approx(size * 7_241_732_096 / num_gpus / 2**30, rel=1e-12)
    assert sum(gib for name, gib in memory(8, cpu_offload=True).items() if "shard" in name) == 0


def test_memory_beside_the_shards_does_not_depend_on_the_gpus_but_on_the_tokens():
    def rest(parts: dict[str, float]) -> dict[str, float]:
        return {name: gib for name, gib in parts.items() if "shard" not in name}

    assert rest(memory(8)) == rest(memory(64)) == rest(memory(8, optimizer="adamw")) == rest(memory(cpu_offload=True))
    one, two = rest(memory()), rest(memory(micro_batch_tokens=16384))
    assert {name for name in one if one[name] != two[name]} == {"activations", "head, scored rows and softmax"}
    assert two["activations"] == pytest.approx(2 * one["activations"])


def test_what_a_layer_computes_again_is_there_once():
    none, elementwise, full = (
        activation_bytes(MISTRAL_7B, torch.bfloat16, level, compiled=False) for level in RECOMPUTE if level != "half"
    )
    assert full == 2 * 4096
    by_level = {
        "none": 32 * none,
        "elementwise": 31 * elementwise + none,
        "half": 15 * elementwise + 16 * full + none,  # the last layer is no other one's second
        "full": 31 * full + none,
    }
    for level, bytes_per_token in by_level.items():
        assert memory(recompute=level)["activations"] == pytest.approx(8192 * bytes_per_token / 2**30, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_level_needs_less_than_the_one_before(dtype: torch.dtype):
    needed = [sum(memory(recompute=level, dtype=dtype).values()) for level in RECOMPUTE]
    assert needed == sorted(needed, reverse=True) and len(set(needed)) == len(RECOMPUTE)


def test_the_least_recomputation_that_fits():
    for number, level in enumerate(RECOMPUTE):
        needed = sum(memory(recompute=level).values()) + RESERVE_GIB
        assert least_recomputation(needed, *arguments()) == level
        assert least_recomputation(needed - 1e-6, *arguments()) == RECOMPUTE[min(number + 1, 3)]
    assert least_recomputation(1.0, *arguments()) == "full"


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


# --- the report ----------------------------------------------------------------------------------------------------


def report_of(*overrides: str, train=None, test=None, num_gpus: int = 8, devices=tuple(DEVICES)) -> str:
    config = configuration.load(ROOT / "configs" / "notus-7b-v1.toml", list(overrides))
    train = lengths(*[AVERAGE] * 6400) if train is None else train
    return describe_cost(config, MISTRAL_7B, train, lengths() if test is None else test, num_gpus, devices)


def rows(report: str) -> dict[str, list[str]]:
    """device -> [level, GiB needed, GiB there, MFU, time, pairs/s, MFU for 90 minutes, compute s, traffic s, ...]"""
    return {words[0]: words[1:] for words in map(str.split, report.splitlines()) if words[0] in DEVICES}


def test_the_report_adds_up():
    train, test = lengths(*[AVERAGE] * 100), lengths(*[(100, 50, 50)] * 10)
    report = report_of("train.pairs_per_step=10", "train.eval_steps=10", train=train, test=test)
    assert "steps       30: 3 epochs of 100 pairs, 10 each" in report
    assert "parameters  7,241,732,096" in report
    assert "740 unique a pair, on average; 925 a GPU and step, in 1 micro-batch\n" in report
    ours, held_out = forward_flops(MISTRAL_7B, train).sum(), forward_flops(MISTRAL_7B, test).sum()
    parts = {"training": 9 * ours, "reference, if nothing is cached": ours + held_out, "4 evaluations": 4 * held_out}
    for name, flops in parts.items():
        assert f"{engineering(flops, 'FLOP'):>14}  {name}" in report
    assert f"compute     {engineering(sum(parts.values()), 'FLOP')}" in report
    assert f"memory      {sum(memory().values()):.2f} GiB a GPU, estimated" in report
    assert all(f"{gib:.2f} GiB  {name}" in report for name, gib in memory().items())
    assert "evaluations" not in report_of(train=train)
    assert "has not run on a GPU yet" in report


@pytest.mark.parametrize("tokens", [2048, 6656, 8192, 20_000, 60_000])
@pytest.mark.parametrize("num_gpus", [4, 8])
def test_each_device_has_the_level_that_auto_takes_there(num_gpus: int, tokens: int):
    found = rows(report_of(f"train.micro_batch_tokens={tokens}", num_gpus=num_gpus))
    assert found.keys() == DEVICES.keys()
    for name, (level, needed, there, *rest) in found.items():
        all_needed = [
            sum(memory(num_gpus, each, micro_batch_tokens=tokens, compiled=True).values()) for each in RECOMPUTE
        ]
        free = DEVICES[name].memory_gib - 3.0
        fitting = [each for each, gib in zip(RECOMPUTE, all_needed, strict=True) if gib <= free]
        assert level == (fitting or ["full"])[0]
        assert needed == f"{all_needed[RECOMPUTE.index(level)]:.1f}" and float(there) == DEVICES[name].memory_gib
        assert ("does not fit" in " ".join(rest)) == (not fitting)


def test_a_configured_level_is_kept_even_where_it_does_not_fit():
    found = rows(report_of("train.activation_checkpointing=none"))
    assert {row[0] for row in found.values()} == {"none"}
    assert {name for name, row in found.items() if "fit:" in row} == {"A100-40GB"}


def test_time_is_flops_over_the_assumed_rate_where_compute_is_the_longer():
    """100 steps of 64 pairs, by division."""
    forward = 6400 * float(forward_flops(MISTRAL_7B, lengths(AVERAGE))[0])
    for name, (level, _, _, mfu, took, pairs, ninety, compute, _) in rows(report_of()).items():
        assert float(mfu[:-1]) / 100 == DEVICES[name].mfu
        rate = DEVICES[name].peak_flops * 8 * DEVICES[name].mfu
        again = {"none": 0, "half": 1 / 2}[level]  # of a forward pass: here the A100-40GB recomputes half
        assert float(compute) == pytest.approx((3 + again) * forward / 100 / rate, abs=0.001)
        assert float(pairs) == pytest.approx(64 / ((3 + again) * forward / 100 / rate), rel=0.005)
        whole = (3 * (3 + again) + 1) * forward  # 3 epochs, and the reference
        assert took == duration(whole / rate)
        assert float(ninety[:-1]) == pytest.approx(100 * whole / (DEVICES[name].peak_flops * 8 * 5400), abs=0.5)
    full = rows(report_of("train.activation_checkpointing=full"))["H200"]
    assert float(full[7]) == pytest.approx(4 / 3 * float(rows(report_of())["H200"][7]), abs=0.001)


def test_a_step_takes_as_long_as_its_traffic_where_that_is_longer():
    """Micro-batches of 100 tokens: 8 x 740 tokens a GPU are 60 of them."""
    one = traffic_bytes(MISTRAL_7B, 8, torch.bfloat16)
    for micro_batches, tokens in ((1, 8192), (60, 100)):
        report = report_of(f"train.micro_batch_tokens={tokens}")
        assert f"5,920 a GPU and step, in {micro_batches} micro-batch" in report
        for name, (*_, pairs, _, compute, traffic) in rows(report).items():
            assert float(traffic) == pytest.approx(micro_batches * one / DEVICES[name].link_bytes, abs=0.001)
            assert (float(traffic) > float(compute)) == (micro_batches == 60)
            if micro_batches == 60:
                assert float(pairs) == pytest.approx(64 / float(traffic), rel=0.01)


def test_one_gpu_sends_nothing_and_copies_of_the_model_gather_within_themselves():
    assert traffic_bytes(MISTRAL_7B, 1, torch.bfloat16) == 0
    one, two = (report_of(f"distributed.replicate={copies}", num_gpus=8 * copies) for copies in (1, 2))
    assert [row[8] for row in rows(one).values()] == [row[8] for row in rows(two).values()]
    assert [row[:3] for row in rows(one).values()] == [row[:3] for row in rows(two).values()]
    with pytest.raises(ValueError, match=r"12 GPUs cannot hold distributed.replicate = 5"):
        report_of("distributed.replicate=5", num_gpus=12)


def test_more_gpus_than_pairs_are_not_busy():
    few = rows(report_of("train.pairs_per_step=4"))["H200"]
    assert few[7] == rows(report_of("train.pairs_per_step=8"))["H200"][7]  # a pair each, in the time of a pair


def test_a_float32_run_is_predicted_within_a_factor_of_two_of_the_measured():
    """The best of many short steps, so that others at work on this machine disturb neither side for long."""
    config = tiny_config(
        vocab_size=512, hidden_size=256, intermediate_size=896, num_hidden_layers=4, num_attention_heads=4, head_dim=64,
        initializer_range=0.02,
    )  # fmt: skip
    rng, sizes = np.random.default_rng(0), (40, 75, 70)
    pairs = [Pair("", *(rng.integers(0, 512, size).astype(np.int32) for size in sizes)) for _ in range(2)]
    model = tiny_model(config, dtype=torch.float32)
    optimizer = make_optimizer(model.parameters(), "rmsprop", 1e-5, weight_decay=0.0)
    best, rates = math.inf, []
    settings = configuration.load(ROOT / "configs" / "demo.toml", ["train.pairs_per_step=2"])
    for attempt in range(3):
        for _ in range(6):
            start = time.perf_counter()
            logps = pair_logps(model, pack_pairs(pairs)).T
            dpo_loss(*logps, *logps.detach(), 0.1).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            best = min(best, time.perf_counter() - start)
        report = describe_cost(settings, config, lengths(*[sizes] * 100), lengths(), 1)
        rates.append(float(report.partition("training at ")[2].split()[0]))
        if attempt and 1 / 2 < max(rates) * best / 2 < 2:
            break
    assert 1 / 2 < max(rates) * best / 2 < 2, f"predicted {max(rates)} pairs/s, measured {2 / best}"
    assert "Measured now: its matmul rate" in report and "A100" not in report


# --- python -m notus.plan ------------------------------------------------------------------------------------------


def test_it_needs_neither_data_nor_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    assert plan.main([]) == 0
    report = capsys.readouterr().out
    assert "model       Mistral-7B; there is no models/zephyr-7b-sft-full/config.json" in report
    assert "61,619 and 2,000 held out, of 161 + 298 + 281 tokens, UltraFeedback's means" in report
    assert report.endswith(report_of(train=lengths(*[AVERAGE] * 61_619), test=lengths(*[AVERAGE] * 2_000)) + "\n")
    assert plan.MISTRAL_7B == MISTRAL_7B


def test_its_arguments(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "config.json").write_text(json.dumps(config_json(tiny_config())))
    recipe = str(ROOT / "configs" / "notus-7b-v1.toml")
    flags = ["--gpus", "4", "--lengths", "10", "20", "30", "--pairs", "640", "--device", "H200", "B200"]
    assert plan.main([recipe, "train.pairs_per_step=32", f"model.path={tmp_path}", "data.test=", *flags]) == 0
    report = capsys.readouterr().out
    assert f"model       {tmp_path / 'config.json'}\n" in report
    assert f"parameters  {sum(num_parameters(tiny_config())):,}\n" in report
    assert "640 and 0 held out, of 10 + 20 + 30 tokens\n" in report
    assert "steps       60: 3 epochs of 640 pairs, 32 each" in report and "with 4 GPUs" in report
    assert list(rows(report)) == ["H200", "B200"]
    assert plan.main([recipe, "--gpus", "4", "train.pairs_per_step=32"]) == 0
    assert "32 each" in capsys.readouterr().out


def test_settings_without_a_file_change_the_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(ROOT)
    assert plan.main(["train.pairs_per_step=32", "train.num_train_epochs=1"]) == 0
    assert "steps       1,926: 1 epochs of 61,619 pairs, 32 each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "configs/notus-7b-v1.toml: No such file or directory"),
        (["none.toml"], "none.toml: No such file or directory"),
        (["RECIPE", "train.no_such=1"], "unknown setting train.no_such"),
        (["RECIPE", "--gpus", "0"], "0 GPUs cannot hold"),
        (["RECIPE", "--lengths", "0", "1", "1"], "must be positive"),
        (["RECIPE", "--pairs", "0"], "must be positive"),
    ],
)
def test_bad_input_is_said_and_ends_with_2(words, error: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert plan.main([word.replace("RECIPE", str(ROOT / "configs" / "notus-7b-v1.toml")) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("notus.plan: error: ") and error in said.err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (7, "7 B"), (1000, "1 kB"), (123_456, "123 kB"), (999_700, "1 MB"), (6.53e18, "6.53 EB"),
     (2.5e21, "2.5e+03 EB")],
)  # fmt: skip
def test_engineering_notation(value: float, text: str):
    assert engineering(value, "B") == text
