"""plan.py: the report adds up, with the arithmetic of cost.py, and picks the level that training picks."""

import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import config_json, tiny_config, tiny_model

from notus import config as configuration
from notus import plan
from notus.cost import DEVICES, forward_flops, memory_gib, num_parameters, scored_share, traffic_bytes
from notus.distributed import World
from notus.lora import TARGETS
from notus.losses import dpo
from notus.metrics import duration
from notus.model import RECOMPUTE, pair_logps
from notus.optim import make_optimizer
from notus.packing import pack_pairs
from notus.plan import MISTRAL_7B, describe_cost, engineering
from notus.run import job_of, recomputation
from notus.tokens import Pair

RECIPE = configuration.CONFIGS / "notus-7b-v1.toml"
AVERAGE = (161, 298, 281)  # of UltraFeedback, cut at 512 / 1024
PROMPTS, ANSWERS = (900, 60, 60), (60, 480, 480)  # as many tokens, but few or nearly all of them scored


def pairs_of(count: int, lengths: tuple[int, int, int] = AVERAGE) -> np.ndarray:
    """(P, 3): prompt, chosen, rejected."""
    return np.tile(lengths, (count, 1))


# --- the report ----------------------------------------------------------------------------------------------------


def report_of(*overrides: str, train=None, test=None, num_gpus: int = 8, devices=DEVICES) -> str:
    job = job_of(configuration.load(RECIPE, list(overrides)), num_gpus)
    train = pairs_of(6400) if train is None else train
    return describe_cost(MISTRAL_7B, job, train, pairs_of(0) if test is None else test, devices)


def memory(level: str, *overrides: str, lengths: tuple[int, int, int] = AVERAGE, num_gpus: int = 8) -> dict[str, float]:
    job = job_of(configuration.load(RECIPE, list(overrides)), num_gpus)
    return memory_gib(MISTRAL_7B, job, scored_share(pairs_of(1, lengths)), level)


def rows(report: str) -> dict[str, list[str]]:
    """device -> [level, GiB needed, GiB there, MFU, time, pairs/s, seconds of: compute, links, host link, CPU; and, if
    the job does not fit, the sentence that says what helps]"""
    found: dict[str, list[str]] = {}
    for line in report.splitlines():
        words = line.split()
        if words[0] in DEVICES:
            found[words[0]] = words[1:]
        elif line.startswith("            does not fit"):
            found[list(found)[-1]].append(line.strip())
    return found


def test_the_report_adds_up():
    train, test = pairs_of(100), pairs_of(10, (100, 50, 50))
    report = report_of("train.pairs_per_step=10", "train.eval_steps=10", train=train, test=test)
    assert "steps       30: 3 epochs of 100 pairs, 10 each" in report
    assert "parameters  7,241,732,096" in report
    assert "740 unique a pair, on average, 78% of them scored; 925 a GPU and step, in 1 micro-batch\n" in report
    ours, held_out = forward_flops(MISTRAL_7B, train).sum(), forward_flops(MISTRAL_7B, test).sum()
    parts = {"training": 9 * ours, "reference, if nothing is cached": ours + held_out, "4 evaluations": 4 * held_out}
    for name, flops in parts.items():
        assert f"{engineering(flops, 'FLOP'):>14}  {name}" in report
    assert f"compute     {engineering(sum(parts.values()), 'FLOP')}" in report
    assert f"memory      {sum(memory('none').values()):.2f} GiB a GPU, estimated" in report
    assert all(f"{gib:.2f} GiB  {name}" in report for name, gib in memory("none").items())
    for level in RECOMPUTE[1:]:
        assert f"{sum(memory(level).values()):.2f} GiB  in all, recomputing {level}" in report
    assert "evaluations" not in report_of(train=train)
    assert "reference" not in report_of("dpo.loss=simpo", "dpo.beta=2", "dpo.margin=1", train=train)
    assert "On several\n  GPUs nothing." in report


@pytest.mark.parametrize("lengths", [AVERAGE, PROMPTS, ANSWERS], ids=str)
@pytest.mark.parametrize("tokens", [2048, 6656, 8192, 20_000, 60_000])
@pytest.mark.parametrize("num_gpus", [4, 8])
def test_each_device_has_the_level_that_training_takes_there(
    num_gpus: int, tokens: int, lengths: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
):
    """By comparing GiB, and by asking what train.py asks of such a GPU, for the same pairs."""
    override, train = f"train.micro_batch_tokens={tokens}", pairs_of(640, lengths)
    found = rows(report_of(override, train=train, num_gpus=num_gpus))
    assert found.keys() == DEVICES.keys()
    needs = [sum(memory(level, override, lengths=lengths, num_gpus=num_gpus).values()) for level in RECOMPUTE]
    for name, (level, needed, there, *rest) in found.items():
        free = DEVICES[name].memory_gib - 3.0
        fitting = [each for each, gib in zip(RECOMPUTE, needs, strict=True) if gib <= free]
        assert level == (fitting or ["full"])[0]
        assert needed == f"{needs[RECOMPUTE.index(level)]:.1f}" and float(there) == DEVICES[name].memory_gib
        assert ("does not fit" in " ".join(rest)) == (not fitting)

        gpu = SimpleNamespace(total_memory=DEVICES[name].memory_gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, gpu=gpu: gpu)
        inputs = SimpleNamespace(base=SimpleNamespace(dims=MISTRAL_7B), train=SimpleNamespace(lengths=train))
        world = World(0, num_gpus, torch.device("cuda"), None)
        assert recomputation(configuration.load(RECIPE, [override]), inputs, world) == level


def test_long_prompts_and_long_answers_of_as_many_tokens_can_take_other_levels():
    """The head's rows are those of the data: 12,450 tokens of long prompts just fit an H100, of long answers not."""
    levels = {}
    for lengths in (PROMPTS, ANSWERS):
        report = report_of("train.micro_batch_tokens=12450", train=pairs_of(640, lengths))
        assert f"{2 * lengths[1] / sum(lengths):.0%} of them scored" in report
        levels[lengths] = rows(report)["H100-80GB"][0]
    assert levels == {PROMPTS: "none", ANSWERS: "elementwise"}


def test_a_configured_level_is_kept_even_where_it_does_not_fit():
    found = rows(report_of("train.activation_checkpointing=none"))
    assert {row[0] for row in found.values()} == {"none"}
    too_small = {name for name, device in DEVICES.items() if device.memory_gib < 55}
    assert {name for name, row in found.items() if "does not fit" in row[-1]} == too_small
    assert "A100-40GB" in too_small and "A100-80GB" not in too_small


def test_time_is_flops_over_the_assumed_rate_where_compute_is_the_longer():
    """100 steps of 64 pairs, by division."""
    forward = 6400 * float(forward_flops(MISTRAL_7B, pairs_of(1))[0])
    for name, (level, _, _, mfu, took, pairs, compute, *_) in rows(report_of()).items():
        if DEVICES[name].link_bytes < 300e9:  # there the traffic takes longer
            continue
        assert float(mfu[:-1]) / 100 == DEVICES[name].mfu
        rate = DEVICES[name].peak_flops * 8 * DEVICES[name].mfu
        again = {"none": 0, "half": 1 / 2}[level]  # of a forward pass: here the A100-40GB recomputes half
        assert float(compute) == pytest.approx((3 + again) * forward / 100 / rate, abs=0.001)
        assert float(pairs) == pytest.approx(64 / ((3 + again) * forward / 100 / rate), rel=0.005)
        whole = (3 * (3 + again) + 1) * forward  # 3 epochs, and the reference
        assert took == duration(whole / rate)
    full = rows(report_of("train.activation_checkpointing=full"))["H200"]
    assert float(full[6]) == pytest.approx(4 / 3 * float(rows(report_of())["H200"][6]), abs=0.001)


def test_a_step_takes_as_long_as_its_traffic_where_that_is_longer():
    """Micro-batches of 100 tokens: 8 x 740 tokens a GPU are 60 of them."""
    one = traffic_bytes(MISTRAL_7B, job_of(configuration.load(RECIPE, []), 8))
    for micro_batches, tokens in ((1, 8192), (60, 100)):
        report = report_of(f"train.micro_batch_tokens={tokens}")
        assert f"5,920 a GPU and step, in {micro_batches} micro-batch" in report
        for name, (_, _, _, _, _, pairs, compute, traffic, host, cpu, *_) in rows(report).items():
            assert float(traffic) == pytest.approx(micro_batches * one / DEVICES[name].link_bytes, abs=0.001)
            assert float(host) == float(cpu) == 0.0
            if DEVICES[name].link_bytes >= 300e9:
                assert (float(traffic) > float(compute)) == (micro_batches == 60)
            if micro_batches == 60:
                assert float(pairs) == pytest.approx(64 / float(traffic), rel=0.01)


def test_one_gpu_sends_nothing_and_copies_of_the_model_gather_within_themselves():
    one, two = (report_of(f"distributed.replicate={copies}", num_gpus=8 * copies) for copies in (1, 2))
    assert [row[7] for row in rows(one).values()] == [row[7] for row in rows(two).values()]
    assert [row[:3] for row in rows(one).values()] == [row[:3] for row in rows(two).values()]
    with pytest.raises(ValueError, match=r"12 GPUs cannot hold distributed.replicate = 5"):
        report_of("distributed.replicate=5", num_gpus=12)


def test_more_gpus_than_pairs_are_not_busy():
    few = rows(report_of("train.pairs_per_step=4"))["H200"]
    assert few[6] == rows(report_of("train.pairs_per_step=8"))["H200"][6]  # a pair each, in the time of a pair


def test_offload_costs_pcie_and_the_optimizers_step_on_the_cpu():
    """A 7B on one GPU: 27 GiB of shards go up twice and their gradients come down once, for each micro-batch; then the
    CPU moves 70 bytes a parameter of RMSprop. So it is slower than without, never faster."""
    number = 7_241_732_096
    overrides = ("distributed.cpu_offload=true", "train.micro_batch_tokens=8192")
    offloaded, plain = (rows(report_of(*some, num_gpus=1)) for some in (overrides, overrides[1:]))
    micro_batches = 6
    for name, (_, needed, _, _, _, pairs, compute, links, host, cpu, *_) in offloaded.items():
        layers = number - 262_148_096  # embedding, norm and head stay gathered
        moved = micro_batches * 4 * (2 * layers + 262_148_096 + number)
        assert float(host) == pytest.approx(moved / DEVICES[name].host_bytes, rel=1e-3)
        assert float(cpu) == pytest.approx(number * 70 / 50e9, abs=1e-3)
        assert float(links) == 0.0
        assert float(pairs) == pytest.approx(64 / (max(float(compute), float(host)) + float(cpu)), rel=0.01)
        assert float(needed) < float(plain[name][1])
        same_level = plain[name][0] == offloaded[name][0]
        assert not same_level or float(pairs) < float(plain[name][5])
    assert f"{12 * number / 2**30:.2f} GiB  in host memory" in report_of(*overrides, num_gpus=1)
    assert f"{12 * number / 2**30:.2f} GiB  in host memory" in report_of(*overrides, num_gpus=8)
    assert "in host memory" not in report_of(num_gpus=1)
    eight = rows(report_of(*overrides, num_gpus=8))["A100-80GB"]
    assert float(eight[9]) == float(offloaded["A100-80GB"][9])  # one host updates the whole model, however it is cut
    assert float(rows(report_of(*overrides, "train.optimizer=adamw", num_gpus=1))["A10"][9]) == pytest.approx(
        number * 114 / 50e9, abs=1e-3
    )


def fits(gpus: int, device: str, *overrides: str) -> bool:
    needed = rows(report_of(*overrides, num_gpus=gpus))[device][1]
    return float(needed) + 3.0 <= DEVICES[device].memory_gib


def test_what_helps_is_named_and_helps():
    """A 7B with all weights trained never fits one card of 80 GB: 80.9 GiB before any activation. The planner names
    three ways out, and each of them fits by its own report."""
    for device in ("A100-80GB", "RTX-4090", "A10"):
        (sentence,) = [row[-1] for name, row in rows(report_of(num_gpus=1)).items() if name == device]
        assert sentence.startswith("does not fit; it would with lora.rank=16, or distributed.cpu_offload=true, or ")
        ways = sentence.partition(" with ")[2].split(", or ")
        assert len(ways) == 3 and not fits(1, device)
        for way in ways[:2]:
            assert fits(1, device, *way.replace(" with ", " ").split())
        count = int(ways[2].split()[0])
        assert fits(count, device, *ways[2].partition(" with ")[2].split())
        assert not fits(count // 2, device, "train.micro_batch_tokens=740", "train.activation_checkpointing=full")


def test_smaller_micro_batches_come_first_because_they_change_nothing():
    overrides = "train.micro_batch_tokens=60000"
    sentence = rows(report_of(overrides))["A100-40GB"][-1]
    assert sentence == "does not fit; it would with train.micro_batch_tokens=30000"
    assert fits(8, "A100-40GB", "train.micro_batch_tokens=30000") and not fits(8, "A100-40GB", overrides)
    kept = rows(report_of("train.activation_checkpointing=none"))["A100-40GB"][-1]
    assert kept == "does not fit; it would with train.activation_checkpointing=auto"
    assert fits(8, "A100-40GB", "train.activation_checkpointing=auto")


def test_layers_that_stay_gathered_take_memory_and_save_traffic():
    stay = "distributed.reshard_after_forward=false"
    freed, kept = memory("none"), memory("none", stay)
    layers, _ = num_parameters(MISTRAL_7B)
    assert kept.pop("layers that stay gathered") == pytest.approx(2 * layers * 30 / 32 / 2**30) and kept == freed
    links = [float(rows(report_of(*words))["A100-80GB"][7]) for words in ((), (stay,))]
    assert links[0] - links[1] == pytest.approx(2 * layers * 7 / 8 / 300e9, abs=0.002)
    sentence = rows(report_of(stay, "train.micro_batch_tokens=740", num_gpus=6))["RTX-4090"][-1]
    assert sentence == f"does not fit; it would with {stay.replace('false', 'true')}"
    assert "layers that stay gathered" not in memory("none", stay, "lora.rank=4", num_gpus=1)  # FSDP2 is not used


def test_where_nothing_helps_that_is_said():
    tiny = plan.device_of(1.0, 20e12)
    assert "does not fit; it would with none of notus's means" in report_of(devices=tiny, num_gpus=1)


def test_lora_is_planned_with_its_own_arithmetic():
    """Frozen weights take two thirds of the FLOPs, and 2 bytes each. LoRA's take 12, and nothing is gathered."""
    report = report_of("lora.rank=64", "train.micro_batch_tokens=4096", num_gpus=1, devices={"A10": DEVICES["A10"]})
    assert "parameters  7,241,732,096 frozen; LoRA trains 54,525,952 more" in report
    assert f"{2 * 7_241_732_096 / 2**30:.2f} GiB  frozen weights, bfloat16 shard" in report
    assert report.count(f"{4 * 54_525_952 / 2**30:.2f} GiB  ") == 3
    full, lora = (float(rows(report_of(*some, num_gpus=1))["H200"][6]) for some in ((), ("lora.rank=1",)))
    assert 0.66 < lora / full < 0.7


def test_notus_first_experiment_fits_a_card_of_24_gb():
    """configs/notus-7b-v1-lora.toml on one GPU takes at most 22 GiB, with what is left free."""
    config = configuration.load(configuration.CONFIGS / "notus-7b-v1-lora.toml")
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (64, 16.0, TARGETS[:4])
    found = rows(describe_cost(MISTRAL_7B, job_of(config, 1), pairs_of(61_619), pairs_of(0)))
    for device in ("A10", "RTX-3090", "RTX-4090"):
        assert "does not fit" not in found[device][-1]
        assert float(found[device][1]) + 3.0 <= 22.0


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
    job = job_of(configuration.load(configuration.CONFIGS / "demo.toml", ["train.pairs_per_step=2"]), 1)
    for attempt in range(3):
        for _ in range(6):
            start = time.perf_counter()
            logps = pair_logps(model, pack_pairs(pairs))
            dpo(logps, logps.detach(), torch.ones_like(logps), 0.1).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            best = min(best, time.perf_counter() - start)
        report = describe_cost(config, job, pairs_of(100, sizes), pairs_of(0))
        rates.append(float(report.partition("training at ")[2].split()[0]))
        if attempt and 1 / 2 < max(rates) * best / 2 < 2:
            break
    assert 1 / 2 < max(rates) * best / 2 < 2, f"predicted {max(rates)} pairs/s, measured {2 / best}"
    assert "Measured now: its matmul rate" in report and "A100" not in report


# --- python -m notus.plan ------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory: the command needs no checkout around it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_needs_neither_data_nor_weights_nor_a_checkout(elsewhere: Path, capsys: pytest.CaptureFixture):
    assert plan.main([]) == 0
    report = capsys.readouterr().out
    assert "model       Mistral-7B; there is no models/zephyr-7b-sft-full/config.json" in report
    assert "61,619 and 2,000 held out, of 161 + 298 + 281 tokens, UltraFeedback's means" in report
    assert report.endswith(report_of(train=pairs_of(61_619), test=pairs_of(2_000)) + "\n")
    assert not list(elsewhere.iterdir())


def test_its_arguments(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "config.json").write_text(json.dumps(config_json(tiny_config())))
    flags = ["--gpus", "4", "--lengths", "10", "20", "30", "--pairs", "640", "--device", "H200", "B200"]
    assert plan.main([str(RECIPE), "train.pairs_per_step=32", f"model.path={tmp_path}", "data.test=", *flags]) == 0
    report = capsys.readouterr().out
    assert f"model       {tmp_path / 'config.json'}\n" in report
    assert f"parameters  {sum(num_parameters(tiny_config())):,}\n" in report
    assert "640 and 0 held out, of 10 + 20 + 30 tokens\n" in report
    assert "steps       60: 3 epochs of 640 pairs, 32 each" in report and "with 4 GPUs" in report
    assert list(rows(report)) == ["H200", "B200"]
    assert plan.main([str(RECIPE), "--gpus", "4", "train.pairs_per_step=32"]) == 0
    assert "32 each" in capsys.readouterr().out
    assert plan.main([str(RECIPE), "--memory", "16", "--flops", "80e12"]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  this GPU")]
    assert (row[4], row[5]) == ("16.0", "40%")
    compute = [float(rows(report_of())["A10"][6]), float(row[8])]
    assert compute[1] / compute[0] == pytest.approx(125 / 80, rel=0.01)


@pytest.mark.usefixtures("elsewhere")
def test_settings_without_a_file_change_the_recipe(capsys: pytest.CaptureFixture):
    assert plan.main(["train.pairs_per_step=32", "train.num_train_epochs=1"]) == 0
    assert "steps       1,926: 1 epochs of 61,619 pairs, 32 each" in capsys.readouterr().out


def test_a_file_may_have_an_equals_sign_in_its_path(elsewhere: Path, capsys: pytest.CaptureFixture):
    path = elsewhere / "train.learning_rate=1e-6" / "config.toml"
    path.parent.mkdir()
    path.write_text(configuration.to_toml(configuration.load(RECIPE, ["train.pairs_per_step=128"])))
    for spelled in (str(path), str(path.relative_to(elsewhere))):
        assert plan.main([spelled, "train.num_train_epochs=1"]) == 0
        assert "steps       482: 1 epochs of 61,619 pairs, 128 each" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["none.toml"], "none.toml: cannot be read: No such file"),
        (["a=b/none.toml"], "a=b/none.toml: cannot be read: No such file"),
        (["RECIPE", "train.no_such=1"], "unknown setting train.no_such"),
        (["RECIPE", "--gpus", "0"], "--gpus 0: must be from 1 to 100,000"),
        (["RECIPE", "--gpus", "12", "distributed.replicate=5"], "12 GPUs cannot hold distributed.replicate = 5"),
        (["RECIPE", "--lengths", "0", "1", "1"], "--lengths 0: must be from 1 to 10,000,000"),
        (["RECIPE", "--lengths", "1", "1", "9999999999"], "--lengths 9999999999: must be from 1 to 10,000,000"),
        (["RECIPE", "--pairs", "0"], "--pairs 0: must be from 1 to 100,000,000"),
        (["RECIPE", "--gpus", "99999999999999999999"], "--gpus 99999999999999999999: must be from 1 to 100,000"),
        (["RECIPE", "model.path=damaged"], "damaged/config.json:1: not JSON"),
        (["RECIPE", "--memory", "16"], "--memory and --flops describe a GPU together: give both"),
        (["RECIPE", "--memory", "0", "--flops", "1e14"], "--memory 0: must be from 1 to 2000 (GiB)"),
        (["RECIPE", "--memory", "16", "--flops", "100"], "--flops 100: must be from 1e+12 to 1e+17 (FLOP/s)"),
    ],
)
def test_bad_input_is_said_and_ends_with_2(words: list[str], error: str, elsewhere: Path, capsys):
    (elsewhere / "damaged").mkdir()
    (elsewhere / "damaged" / "config.json").write_text("{")
    assert plan.main([word.replace("RECIPE", str(RECIPE)) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("notus.plan: error: ") and error in said.err


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (7, "7 B"), (1000, "1 kB"), (123_456, "123 kB"), (999_700, "1 MB"), (6.53e18, "6.53 EB"),
     (2.5e21, "2.5e+03 EB")],
)  # fmt: skip
def test_engineering_notation(value: float, text: str):
    assert engineering(value, "B") == text
