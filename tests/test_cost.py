"""cost.py: the arithmetic agrees with what PyTorch itself counts, keeps, sends and multiplies."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import pair_set, random_pairs, tiny_config, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from notus import distributed
from notus.attention import PackedAttention, sdpa
from notus.checkpoint import make_state, state_of
from notus.cost import (
    RESERVE_GIB,
    Job,
    activation_bytes,
    checkpoint_bytes,
    forward_flops,
    least_recomputation,
    memory_gib,
    num_adapter_parameters,
    num_parameters,
    peak_flops,
    scored_share,
    traffic_bytes,
    training_flops,
)
from notus.dims import FAMILIES, MistralConfig
from notus.distributed import World
from notus.logprobs import CHUNK_ROWS, token_logps
from notus.lora import TARGETS, LoRA, add_lora, initialize, lora_layers
from notus.model import RECOMPUTE, pair_logps, rotary_table
from notus.optim import make_optimizer
from notus.packing import Segment, pack_pairs
from notus.plan import MISTRAL_7B
from notus.tokens import Pair
from notus.weights import meta_model

AVERAGE = (161, 298, 281)  # of UltraFeedback, cut at 512 / 1024
LORA = LoRA(16, 16.0, TARGETS[:4])


def lengths(*pairs: tuple[int, int, int]) -> np.ndarray:
    """(P, 3): prompt, chosen, rejected."""
    return np.array(pairs, dtype=np.int64).reshape(-1, 3)


def job(**changes) -> Job:
    """The recipe's, on 8 GPUs, not compiled."""
    settings = {
        "num_gpus": 8, "replicate": 1, "dtype": torch.bfloat16, "optimizer": "rmsprop", "micro_batch_tokens": 8192,
        "activation_checkpointing": "auto", "compile": False, "cpu_offload": False, "num_train_epochs": 3,
        "pairs_per_step": 64, "eval_steps": 100,
    }  # fmt: skip
    return Job(**settings | changes)


def memory(recompute: str = "none", scored: float = 0.8, **changes) -> dict[str, float]:
    return memory_gib(MISTRAL_7B, job(**changes), scored, recompute)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(), tiny_config(tie_word_embeddings=True), tiny_config(qkv_bias=True), tiny_config(qk_norm=True),
        MISTRAL_7B,
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_model(config: MistralConfig):
    model = meta_model(config)
    of_layers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert num_parameters(config) == (of_layers, sum(parameter.numel() for parameter in model.parameters()) - of_layers)


def test_mistral_7b_has_its_published_parameters():
    assert sum(num_parameters(MISTRAL_7B)) == 7_241_732_096


def attention_flops(config: MistralConfig, pairs: list[Pair]) -> int:
    """The query-key meetings of the mask as drawn in packing.py, two products each, two FLOPs a number."""
    meetings = sum(
        sum(range(1, len(p.prompt) + 1)) + sum(len(p.prompt) + i for n in map(len, p[2:]) for i in range(1, n + 1))
        for p in pairs
    )
    return 2 * 2 * meetings * config.num_attention_heads * config.head_dim * config.num_hidden_layers


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
    ours = forward_flops(config, pair_set(pairs).lengths).sum() - attention_flops(config, pairs) - norms

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


@pytest.mark.parametrize("lora", [LORA, LoRA(3, 1.0, TARGETS)], ids=["attention", "all"])
def test_flops_of_lora_are_those_that_pytorch_counts(lora: LoRA):
    """Two of the three products with a frozen weight, and all three with A and B; but in the last layer, where only
    scored tokens go through o_proj and the MLP, we count A and B for every token. The first layer's x has no gradient:
    a product with each of its q, k and v is saved, which we do not count."""
    config = tiny_config(num_hidden_layers=3)
    model, pairs = tiny_model(config, dtype=torch.float32), random_pairs(np.random.default_rng(0), 6, config.vocab_size)
    add_lora(model, lora, torch.float32)
    initialize(model, 0)
    stream = pack_pairs(pairs)
    tokens, scored = len(stream.input_ids), len(stream.target)
    with FlopCounterMode(display=False) as counter:
        pair_logps(model, stream).sum().backward()
    found = sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))
    rows = pair_set(pairs).lengths
    both = training_flops(config, rows, lora).sum()
    assert training_flops(config, rows).sum() == 3 * forward_flops(config, rows).sum()
    norms = 2 * config.hidden_size * ((2 * config.num_hidden_layers - 1) * tokens + scored)
    products = both - 2 * norms - 3 * attention_flops(config, pairs)
    first = model.model.layers[0].self_attn
    saved = sum(2 * tokens * layer.weight.numel() for layer in (first.q_proj, first.k_proj, first.v_proj))
    saved += sum(2 * tokens * layer.lora_a.numel() for layer in (first.q_proj, first.k_proj, first.v_proj))
    late = [layer for name, layer in lora_layers(model.model.layers[2]).items() if name[-6:] not in
            ("q_proj", "k_proj", "v_proj")]  # fmt: skip
    saved += sum(6 * (tokens - scored) * (layer.lora_a.numel() + layer.lora_b.numel()) for layer in late)
    assert found == products - saved


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


def kept_on_cpu(config: MistralConfig, dtype: torch.dtype, level: str, lora: LoRA | None = None) -> int:
    """`activation_bytes`, and what the CPU keeps beyond that: its RMSNorm is made of plain operations, which keep two
    float32 rows, the input made wide and the normalized one, where the GPU's kernel keeps the input as it is. Nothing
    needs the normalized one of Qwen 3's head norms if they are frozen."""
    of_heads = config.qk_norm * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    norms = 2 * config.hidden_size * (4 + 4 - dtype.itemsize) + of_heads * ((0 if lora else 4) + 4 - dtype.itemsize)
    norms = norms if level == "none" else 0
    return activation_bytes(config, dtype, level, False, lora) + norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [4, 1])
@pytest.mark.parametrize("level", RECOMPUTE)
@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_activations_are_what_is_alive_after_a_forward_pass(
    family: str, level: str, heads: int, dtype: torch.dtype, lora
):
    """Of a real model on real numbers, with autograd and with selective checkpointing: two layers more keep so much."""
    tokens, alive = 48, []
    for layers in (3, 5):
        sizes = {"num_key_value_heads": heads, "hidden_size": 44, "intermediate_size": 100}
        config = tiny_config(num_hidden_layers=layers, **sizes, **FAMILIES[family][1])
        model = tiny_model(config, dtype=dtype).model
        if lora:
            add_lora(model, lora, dtype)
            initialize(model, 0)
        model.recompute = level
        everywhere = torch.arange(tokens)
        with Alive() as storages:
            out = model(everywhere, everywhere, causal, everywhere)
        assert out.requires_grad
        alive.append(storages.bytes(but={p.untyped_storage()._cdata for p in model.parameters()}))
        del out
    levels = ("full", "elementwise") if level == "half" else (level, level)
    copies = num_adapter_parameters(config, lora) * 2 // 5 * dtype.itemsize if dtype != torch.float32 else 0  # A and B
    copies *= {"none": 1, "elementwise": 0, "half": 0, "full": 0}[level]
    kept = tokens * sum(kept_on_cpu(config, dtype, each, lora) for each in levels) + copies
    if lora and level == "none":  # a frozen norm does not keep its normalized row, of float32
        kept -= 2 * tokens * 2 * config.hidden_size * 4
    assert alive[1] - alive[0] == kept


class Traffic(TorchDispatchMode):
    """Bytes that this rank receives or sends, of all-gathers and reduce-scatters, without its own share."""

    bytes = 0.0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.name() in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            whole = max(tensor.nbytes for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor))
            self.bytes += whole * (dist.get_world_size() - 1) / dist.get_world_size()
        return op(*args, **kwargs or {})


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("level", "reshard"), [*((level, True) for level in RECOMPUTE), ("none", False), ("full", False)]
)
def test_a_simulated_step_of_fsdp2_takes_that_memory_and_traffic(level: str, reshard: bool, lora: LoRA | None):
    """Layers of the 7B in bfloat16: tensors without numbers, collectives without a network. PyTorch's own tracker finds
    at most what we estimate, and not much less. Traffic is exact."""
    config = replace(MISTRAL_7B, num_hidden_layers=2 if reshard else 5)
    ranks, tokens, optimizer = 8, 8192, "rmsprop"
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        world = World(0, ranks, torch.device("cpu"), init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",)))
        model = meta_model(config)
        if lora:
            add_lora(model, lora, torch.bfloat16)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.model.recompute = level
            distributed.shard(model, model.model.layers, world, torch.bfloat16, reshard_after_forward=reshard)
            model.to_empty(device="cpu")
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            optimize = make_optimizer(trained, optimizer, 1e-5, weight_decay=0.0)
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
    costs = job(num_gpus=ranks, micro_batch_tokens=tokens, lora=lora, reshard_after_forward=reshard)
    assert traffic.bytes == traffic_bytes(config, costs)
    ours = sum(memory_gib(config, costs, 0.8, level).values())
    of_norms = kept_on_cpu(config, torch.bfloat16, level, lora) - activation_bytes(
        config, torch.bfloat16, level, False, lora
    )
    ours += config.num_hidden_layers * of_norms * tokens / 2**30
    print(f"{level}, {reshard}: {peak / 2**30:.2f} GiB, estimated {ours:.2f}")
    assert peak / 2**30 <= ours <= peak / 2**30 + 1.5


class Peak(Alive):
    """The most bytes that were alive at once after an operation."""

    peak = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(op, types, args, kwargs)
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        self.peak = max(self.peak, self.bytes(but=self.outside))
        return out


@pytest.mark.parametrize("level", RECOMPUTE)
def test_a_simulated_step_of_lora_on_one_gpu_takes_that_memory(level: str):
    """Two layers of the 7B in bfloat16, without FSDP2: all that is alive beside the weights, operation by operation."""
    config, tokens = replace(MISTRAL_7B, num_hidden_layers=2), 8192
    model = meta_model(config)
    add_lora(model, LORA, torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.model.recompute = level
        model.to_empty(device="cpu")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimize = make_optimizer(trained, "rmsprop", 1e-5, weight_decay=0.0)
        ids, rows = torch.zeros(tokens, dtype=torch.long), torch.zeros(int(0.8 * tokens), dtype=torch.long)
        with Peak() as alive:
            alive.outside = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
            for _ in range(2):  # the second time with the optimizer's state
                model(ids, ids, causal, rows, rows).sum().backward()
                optimize.step()
        peak = alive.peak + sum(parameter.nbytes for parameter in model.parameters())
    ours = sum(memory_gib(config, job(num_gpus=1, micro_batch_tokens=tokens, lora=LORA), 0.8, level).values())
    of_norms = kept_on_cpu(config, torch.bfloat16, level, LORA) - activation_bytes(
        config, torch.bfloat16, level, False, LORA
    )
    ours += 2 * of_norms * tokens / 2**30
    print(f"{level}: {peak / 2**30:.2f} GiB, estimated {ours:.2f}")
    assert peak / 2**30 <= ours <= peak / 2**30 + 1.0


@pytest.mark.parametrize("level", ["none", "elementwise"])
def test_compiled_layers_keep_what_is_said_or_less(level: str, monkeypatch: pytest.MonkeyPatch):
    """A real compiled layer's storages that outlive its forward pass, in bfloat16; the first, that has all rows. What
    is kept, Inductor's partitioner decides. It runs here without code generation, which takes a minute and keeps, byte
    for byte, the same."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition"))
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


def test_memory_of_the_shards_is_12_bytes_a_parameter_divided_by_the_gpus_that_share_a_copy():
    for num_gpus in (1, 8, 64):
        for optimizer, size in (("rmsprop", 12), ("adamw", 16)):
            shards = [gib for name, gib in memory(num_gpus=num_gpus, optimizer=optimizer).items() if "shard" in name]
            assert sum(shards) == pytest.approx(size * 7_241_732_096 / num_gpus / 2**30, rel=1e-12)
    assert memory(num_gpus=64, replicate=8) == memory(num_gpus=8)
    assert sum(gib for name, gib in memory(cpu_offload=True).items() if "shard" in name) == 0


def test_memory_beside_the_shards_does_not_depend_on_the_gpus_but_on_the_tokens():
    def rest(**changes) -> dict[str, float]:
        return {name: gib for name, gib in memory(**changes).items() if "shard" not in name}

    assert rest() == rest(num_gpus=64) == rest(optimizer="adamw")
    from_host = rest(cpu_offload=True)
    assert from_host.pop("copies that come from the host") < 0.21
    assert rest() == from_host
    one, two = rest(), rest(micro_batch_tokens=16384)
    assert {name for name in one if one[name] != two[name]} == {"activations", "head, scored rows and softmax"}
    assert two["activations"] == pytest.approx(2 * one["activations"])


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_a_checkpoint_has_the_bytes_of_its_state(optimizer: str, lora: LoRA | None):
    model = tiny_model(tiny_config(), dtype=torch.float32)
    if lora:
        add_lora(model, lora, torch.bfloat16)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimize = make_optimizer(trained, optimizer, 1e-5, weight_decay=0.0)
    make_state(optimize)
    state = state_of(model, optimize)
    saved = sum(tensor.nbytes for name, tensor in state.items() if not name.endswith(".step"))  # a number each
    assert checkpoint_bytes(model.config, optimizer, lora) == saved


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_the_optimizers_step_takes_one_more_copy_of_what_is_trained(optimizer: str):
    """The multi-tensor step that GPUs take, on real numbers. With few tokens on few GPUs that is the peak."""
    model = tiny_model(tiny_config(), dtype=torch.float32)
    optimize = make_optimizer(model.parameters(), optimizer, 1e-5, weight_decay=0.0)
    optimize.param_groups[0]["foreach"] = True
    make_state(optimize)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Peak() as alive:
        alive.outside = set()
        optimize.step()
    trained = sum(parameter.nbytes for parameter in model.parameters())
    assert trained <= alive.peak < 1.01 * trained

    parts = memory("full", num_gpus=2, micro_batch_tokens=64, optimizer=optimizer)
    shards = sum(gib for name, gib in parts.items() if "shard" in name)
    assert sum(parts.values()) - shards == pytest.approx(4 * 7_241_732_096 / 2 / 2**30)
    assert not any("temporaries" in name for name in memory("full"))


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
        needed = sum(memory(level).values()) + RESERVE_GIB
        assert least_recomputation(MISTRAL_7B, job(), 0.8, needed) == level
        assert least_recomputation(MISTRAL_7B, job(), 0.8, needed - 1e-6) == RECOMPUTE[min(number + 1, 3)]
    assert least_recomputation(MISTRAL_7B, job(), 0.8, 1.0) == "full"
    assert least_recomputation(MISTRAL_7B, job(), 0.8, None) == "none"  # no GPU


@pytest.mark.parametrize("level", RECOMPUTE)
def test_a_level_that_is_named_is_taken_whether_or_not_it_fits(level: str):
    for device_gib in (1.0, 1000.0, None):
        assert least_recomputation(MISTRAL_7B, job(activation_checkpointing=level), 0.8, device_gib) == level


def test_the_scored_share_is_of_the_tokens_of_all_pairs():
    assert scored_share(lengths((10, 3, 7))) == 0.5
    assert scored_share(lengths((10, 3, 7), (0, 5, 15))) == 30 / 40
    assert scored_share(lengths()) == 0.0


def test_a_scored_row_costs_its_softmax_and_three_rows_of_the_models_width():
    """In bfloat16, up to 512 MiB of softmax (logprobs.py). A prompt token costs nothing there."""
    head = "head, scored rows and softmax"
    rows = (0.5 - 0.25) * 8192
    grown = memory(scored=0.5)[head] - memory(scored=0.25)[head]
    assert grown == pytest.approx(rows * (32000 + 3 * 4096) * 2 / 2**30, rel=1e-12)
    with_softmax, without = (memory(scored=1.0, micro_batch_tokens=tokens)[head] for tokens in (8192, 16384))
    assert without - with_softmax == pytest.approx((8192 * 3 * 4096 * 2 + 2**29 - 8192 * 64000) / 2**30, rel=1e-9)
    assert {name for name in memory() if memory(scored=0.1)[name] != memory(scored=0.9)[name]} == {head}


def test_data_of_long_prompts_recomputes_less_than_data_of_long_answers():
    """Micro-batches of as many tokens, on a GPU whose memory lies between what the two need."""
    shares = [scored_share(data) for data in (lengths((900, 60, 60)), lengths((60, 480, 480)))]
    of_prompts, of_answers = (sum(memory(scored=share).values()) for share in shares)
    assert of_answers - of_prompts > 0.5  # GiB
    device_gib = (of_prompts + of_answers) / 2 + RESERVE_GIB
    levels = [least_recomputation(MISTRAL_7B, job(), share, device_gib) for share in shares]
    assert levels == ["none", "elementwise"]


@pytest.mark.parametrize(("num_gpus", "replicate"), [(12, 5), (4, 8), (0, 1), (-8, 1)])
def test_gpus_that_cannot_hold_equal_copies_are_refused(num_gpus: int, replicate: int):
    with pytest.raises(ValueError, match=rf"{num_gpus} GPUs cannot hold distributed.replicate = {replicate} equal"):
        job(num_gpus=num_gpus, replicate=replicate)


def test_a_copy_of_the_model_is_in_shards_on_the_gpus_of_its_group():
    assert [job(num_gpus=16, replicate=copies).shards for copies in (1, 2, 4, 16)] == [16, 8, 4, 1]
    assert traffic_bytes(MISTRAL_7B, job(num_gpus=16, replicate=16)) == 0


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_peak_flops_by_the_name_that_cuda_gives(name: str, flops: float | None):
    assert peak_flops(name) == flops
