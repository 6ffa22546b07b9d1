"""reference.py, law 8: cached = live; what changes the numbers misses the cache, and nothing else does."""

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_vocabulary, write_mistral_tokenizer
from tiny import pair_set, random_pairs, run_ranks, save_checkpoint, tiny_config, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from notus import distributed, reference
from notus.distributed import World, full_tensor, shard
from notus.model import Mistral, pair_logps
from notus.packing import pack_pairs
from notus.reference import RECORD, ReferenceCache, cache_header, reference_logps, score_pairs, verify
from notus.tokens import Pair, pair_key

CONFIG = tiny_config(sliding_window=8)
HEADER = cache_header("ab" * 32, CONFIG, torch.float32)
PAIRS = random_pairs(np.random.default_rng(0), 11, CONFIG.vocab_size)
ALL = pair_set(PAIRS)
BUDGET = 56  # tokens: some micro-batches of several pairs


@pytest.fixture
def world():
    yield distributed.start("cpu")
    distributed.stop()


@pytest.fixture
def model() -> Mistral:
    return tiny_model(CONFIG, dtype=torch.float32)


@pytest.fixture
def score(model: Mistral, world: World, tmp_path: Path) -> Callable:
    """-> the log-probs and how many were computed, with the cache as the last call left it."""

    def score(pairs: list[Pair] = PAIRS, header: dict = HEADER, progress: Callable | None = None) -> tuple[Tensor, int]:
        return reference_logps(model, pair_set(pairs), ReferenceCache(tmp_path, header), world, BUDGET, progress)

    return score


def records_file(directory: Path) -> Path:
    (path,) = directory.rglob("*.records")
    return path


def with_ids(pair: Pair, **ids: list[int]) -> Pair:
    return pair._replace(**{name: np.array(value, dtype=np.int32) for name, value in ids.items()})


# --- cached = live -------------------------------------------------------------------------------------------------


def test_cached_is_live(score, model: Mistral):
    """Live: one pair at a time, whatever its neighbours."""
    live = torch.cat([pair_logps(model, pack_pairs([pair])) for pair in PAIRS]).detach()
    told = []
    logps, computed = score(progress=told.append)
    assert computed == len(PAIRS) and told[-1] == len(PAIRS) and told == sorted(told) and len(told) > 2
    assert logps.dtype == torch.float32 and logps.shape == (len(PAIRS), 2) and logps.device.type == "cpu"
    assert torch.allclose(logps, live, rtol=1e-6, atol=0)
    told.clear()
    again, computed = score(progress=told.append)
    assert computed == 0 and not told  # not one forward pass
    assert torch.equal(again, logps)


def test_score_pairs_gives_each_pair_once_in_blocks(model: Mistral, world: World, monkeypatch):
    monkeypatch.setattr(reference, "BLOCK_PAIRS", 4)
    parts = []
    score_pairs(model, ALL, world, BUDGET, lambda indices, logps: parts.append((indices, logps)))
    order = [i for indices, _ in parts for i in indices]
    assert [sorted(order[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    live = torch.cat([pair_logps(model, pack_pairs([pair])) for pair in PAIRS]).detach()
    for indices, logps in parts:
        assert not logps.requires_grad
        assert torch.allclose(logps, live[indices], rtol=1e-6, atol=0)


class NoNewParameters(TorchDispatchMode):
    """Fails at any operation whose result is a new tensor of a parameter's shape."""

    def __init__(self, model: Mistral):
        super().__init__()
        self.shapes = {parameter.shape for parameter in model.parameters() if parameter.ndim == 2}
        self.storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and {tensor.shape, tensor.shape[::-1]} & self.shapes:
                assert tensor.untyped_storage().data_ptr() in self.storages, func
        return out


def test_there_is_no_second_model_and_the_first_is_untouched(score, model: Mistral):
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    with NoNewParameters(model):
        score()
    with pytest.raises(AssertionError), NoNewParameters(model):  # it can fail
        model.lm_head.weight.clone()
    for name, parameter in model.named_parameters():
        place, bits = before[name]
        assert parameter.data_ptr() == place and torch.equal(parameter, bits), name
        assert parameter.grad is None and parameter.requires_grad, name


def test_masters_are_back_in_float32_after_a_pass_in_bfloat16(model: Mistral, world: World, tmp_path: Path):
    masters = [parameter.detach().clone() for parameter in model.parameters()]
    shard(model, model.model.layers, world, torch.bfloat16)
    logps, _ = reference_logps(model, ALL, ReferenceCache(tmp_path, HEADER), world, BUDGET)
    assert logps.dtype == torch.float32
    for parameter, master in zip(model.parameters(), masters, strict=True):
        assert parameter.dtype == torch.float32 and torch.equal(full_tensor(parameter), master)


# --- what hits, what misses ----------------------------------------------------------------------------------------


def test_order_subset_file_and_line_hit(score):
    logps, _ = score()
    order = np.random.default_rng(1).permutation(len(PAIRS))
    shuffled = [PAIRS[i]._replace(where=f"elsewhere:{i}") for i in order]
    assert_rows(score(shuffled), logps[order], computed=0)
    assert_rows(score(PAIRS[3:6]), logps[3:6], computed=0)
    assert_rows(score([PAIRS[2]] * 3), logps[[2, 2, 2]], computed=0)


def assert_rows(scored: tuple[Tensor, int], expected: Tensor, computed: int) -> None:
    assert scored[1] == computed
    assert torch.equal(scored[0], expected)


def test_an_extension_computes_what_is_new(score):
    logps, _ = score(PAIRS[:7])
    extended, computed = score(PAIRS)
    assert computed == 4 and torch.equal(extended[:7], logps)
    assert score()[1] == 0


def first_token(pair: Pair) -> Pair:
    return with_ids(pair, prompt=[(pair.prompt[0] + 1) % CONFIG.vocab_size, *pair.prompt[1:]])


def last_token(pair: Pair) -> Pair:
    return with_ids(pair, rejected=[*pair.rejected[:-1], (pair.rejected[-1] + 1) % CONFIG.vocab_size])


def shorter_prompt(pair: Pair) -> Pair:
    return with_ids(pair, prompt=pair.prompt[1:])


def cut_answer(pair: Pair) -> Pair:
    return with_ids(pair, chosen=pair.chosen[:-1])


def border_moved(pair: Pair) -> Pair:
    """The same ids one after another, but a token of the prompt is scored."""
    return with_ids(pair, prompt=pair.prompt[:-1], chosen=[pair.prompt[-1], *pair.chosen])


def border_between_answers_moved(pair: Pair) -> Pair:
    return with_ids(pair, chosen=[*pair.chosen, pair.rejected[0]], rejected=pair.rejected[1:])


def sides_swapped(pair: Pair) -> Pair:
    return with_ids(pair, chosen=pair.rejected, rejected=pair.chosen)


CHANGES = [
    first_token, last_token, shorter_prompt, cut_answer, border_moved, border_between_answers_moved, sides_swapped,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_other_tokens_or_lengths_miss_and_only_they(score, model: Mistral, change):
    one, other = [i for i, pair in enumerate(PAIRS) if all(len(ids) > 1 for ids in pair[1:])][-2:]
    logps, _ = score()
    pairs = [change(pair) if i in (one, other) else pair for i, pair in enumerate(PAIRS)]
    changed, computed = score(pairs)
    assert computed == 2
    same = [i for i in range(len(PAIRS)) if i not in (one, other)]
    assert torch.equal(changed[same], logps[same])
    live = pair_logps(model, pack_pairs([pairs[other]]))[0]
    assert torch.allclose(changed[other], live, rtol=1e-6, atol=0)
    assert score()[1] == 0  # both texts are known now


def test_pair_keys_differ_where_ids_do_and_ignore_all_else():
    keys = {
        pair_key(change(pair)) for pair in PAIRS for change in (*CHANGES, lambda pair: pair) if len(pair.prompt) > 1
    }
    long = [pair for pair in PAIRS if len(pair.prompt) > 1]
    assert len(keys) == len(long) * (len(CHANGES) + 1) and {len(key) for key in keys} == {16}
    pair = PAIRS[0]
    assert pair_key(pair) == pair_key(with_ids(pair._replace(where="x"), prompt=pair.prompt.tolist()))


@pytest.mark.parametrize(
    "change",
    [
        {"weights": "ac" * 32},
        {"compute_dtype": "bfloat16"},
        {"model": asdict(tiny_config(sliding_window=9))},
        {"model": asdict(tiny_config(sliding_window=8, rope_theta=1e6))},
    ],
)
def test_another_header_misses_altogether(score, change: dict):
    score()
    assert score(header=HEADER | change)[1] == len(PAIRS)
    assert score()[1] == score(header=HEADER | change)[1] == 0


def test_another_forward_pass_misses_altogether(score, monkeypatch):
    score()
    monkeypatch.setattr(reference, "FORWARD_VERSION", reference.FORWARD_VERSION + 1)
    assert score(header=cache_header("ab" * 32, CONFIG, torch.float32))[1] == len(PAIRS)


def test_the_header_says_what_the_numbers_depend_on(score, tmp_path: Path):
    score(header=dict(reversed(HEADER.items())))  # its order does not matter
    assert score()[1] == 0
    (path,) = tmp_path.rglob("header.json")
    assert json.loads(path.read_text()) == HEADER
    assert {p.name for p in path.parent.iterdir()} == {"header.json", "header.lock", "rank-00000.records"}


# --- kills and damage ----------------------------------------------------------------------------------------------


def test_killed_mid_pass_and_resumed_computes_only_the_rest_to_the_same_bits(score, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(reference, "BLOCK_PAIRS", 4)
    before = 0

    def killed(done: int) -> None:
        nonlocal before
        if done >= 5:
            before = done
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(progress=killed)
    told = []
    logps, computed = score(progress=told.append)
    assert 0 < before < len(PAIRS) and computed == told[-1] == len(PAIRS) - before
    whole, _ = score(header=HEADER | {"weights": "another cache"})
    assert torch.equal(logps, whole)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("torn", [1, 20, 39, 40, 41, 79])
def test_a_torn_last_append_is_computed_again_as_a_whole(score, tmp_path: Path, torn: int):
    """All pairs of its micro-batch, so that they have the neighbours, and so the bits, that they had."""
    told = []
    logps, _ = score(progress=told.append)
    path = records_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-torn])
    again, computed = score()
    assert computed == told[-1] - told[-2] >= 2 and torch.equal(again, logps)
    assert path.stat().st_size == len(PAIRS) * RECORD.itemsize == len(PAIRS) * 40
    assert score()[1] == 0


def test_a_flipped_byte_of_a_record_costs_its_file_and_nothing_else(score, tmp_path: Path, capsys):
    """The file is named and set aside, and its pairs are computed again to the same bits."""
    logps, _ = score()
    path = records_file(tmp_path)
    content = path.read_bytes()
    for byte in range(40):
        spoiled = bytearray(content)
        spoiled[3 * 40 + byte] ^= 1 << byte % 8
        path.write_bytes(spoiled)
        again, computed = score()
        assert torch.equal(again, logps)
        # Of a flipped "follow" another record may be the last of a whole append. Then less is lost.
        assert computed == len(PAIRS)
        assert f"{path} is damaged: record 3 fails its checksum" in capsys.readouterr().out
    assert len(list(path.parent.glob("*.damaged*"))) == 40
    assert score()[1] == 0


@pytest.mark.parametrize("content", ["", "{}", "\0" * 300, None])
def test_a_header_that_is_not_its_folders_costs_the_cache(score, tmp_path: Path, capsys, content: str | None):
    logps, _ = score()
    (path,) = tmp_path.rglob("header.json")
    path.unlink() if content is None else path.write_text(content)
    again, computed = score()
    assert computed == len(PAIRS) and torch.equal(again, logps)
    assert "is not the header this folder is named after" in capsys.readouterr().out
    assert score()[1] == 0


def test_a_cache_that_another_run_is_just_making_is_left_alone(tmp_path: Path):
    cache = ReferenceCache(tmp_path, HEADER)
    cache.directory.mkdir()
    (cache.directory / "header.json.tmp").write_text("{")
    assert cache.read() == {}
    assert [path.name for path in tmp_path.rglob("*")] == [cache.directory.name, "header.json.tmp"]


def test_a_record_of_other_token_counts_is_not_used(score, tmp_path: Path):
    cache = ReferenceCache(tmp_path, HEADER)
    cache.append(ALL.keys[:2], ALL.lengths[1::-1, 1:], np.zeros((2, 2), dtype=np.float32))
    assert (ALL.lengths[0, 1:] != ALL.lengths[1, 1:]).any()
    assert score(PAIRS[:2])[1] == 2


def test_a_complete_cache_may_be_read_only(score, monkeypatch):
    """Nothing is opened for writing, and no lock is taken."""
    score()
    monkeypatch.setattr(ReferenceCache, "_open", None)
    assert score()[1] == 0


def test_random_rows_are_computed_again_and_compared(score, model: Mistral, world: World):
    logps, _ = score()
    assert 0 <= verify(model, ALL, logps, world, BUDGET, torch.float32, rows=len(PAIRS)) < 1e-4
    logps[7, 1] += 0.01
    with pytest.raises(
        ArithmeticError, match=rf"differs from its reference in 1 of 11 pairs, most in {PAIRS[7].where}"
    ):
        verify(model, ALL, logps, world, BUDGET, torch.float32, rows=len(PAIRS))


# --- ranks ---------------------------------------------------------------------------------------------------------


def two_ranks(directory: Path, expected: Tensor) -> None:
    world = distributed.start("cpu")
    check_a_rank(world, directory, expected)
    distributed.stop()


def check_a_rank(world: World, directory: Path, expected: Tensor) -> None:
    model = tiny_model(CONFIG, dtype=torch.float32)
    shard(model, model.model.layers, world, torch.float32)
    told = []

    def score(pairs: list[Pair], cache_dir: Path) -> tuple[Tensor, int]:
        return reference_logps(
            model, pair_set(pairs), ReferenceCache(cache_dir, HEADER, world.rank), world, BUDGET, told.append
        )

    logps, computed = score(PAIRS, directory / "two")
    assert computed == len(PAIRS) and torch.allclose(logps, expected, rtol=1e-6, atol=0)
    assert distributed.sum_over_ranks(torch.tensor(told[-1])) == len(PAIRS)
    assert score(PAIRS, directory / "two")[1] == 0
    again, computed = score(PAIRS, directory / "one")  # whatever the world size that filled it
    assert computed == 0 and torch.equal(again, expected)
    alone, computed = score(PAIRS[:1], directory / "single")  # one rank has nothing to do
    assert computed == 1 and torch.allclose(alone, expected[:1], rtol=1e-6, atol=0)
    # Without a shared disk the other rank finds nothing, and what rank 0 knows decides.
    known, computed = score(PAIRS[:7], directory / ("two" if world.rank == 0 else "empty"))
    assert computed == 0 and torch.equal(known, logps[:7])


def test_two_ranks_compute_and_cache_what_one_does(model: Mistral, world: World, tmp_path: Path):
    expected, _ = reference_logps(model, ALL, ReferenceCache(tmp_path / "one", HEADER), world, BUDGET)
    run_ranks(2, two_ranks, tmp_path, expected)
    files = sorted((tmp_path / "two").rglob("*.records"))
    assert [path.name for path in files] == ["rank-00000.records", "rank-00001.records"]
    assert sum(path.stat().st_size for path in files) == 40 * len(PAIRS)
    logps, computed = reference_logps(model, ALL, ReferenceCache(tmp_path / "two", HEADER), world, BUDGET)
    assert computed == 0 and torch.allclose(logps, expected, rtol=1e-6, atol=0)


# --- python -m notus.reference -------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, eight training pairs, two held out, and the configuration of a run over them."""
    vocabulary = small_vocabulary("train test yes no 0123456789")
    model = tiny_model(tiny_config(vocab_size=vocabulary.vocab_size(), hidden_size=8))
    write_mistral_tokenizer(save_checkpoint(model, tmp_path / "base"), vocabulary)
    for name, count in (("train", 8), ("test", 2)):
        rows = [
            {"instruction": f"{name} {i}", "chosen_response": f"yes {i}", "rejected_response": f"no {i}"}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = '[model]\npath = "base"\n[data]\ntrain = "train.jsonl"\ntest = "test.jsonl"\ncache_dir = "tokens"\n'
    text += '[train]\noutput_dir = "out"\ncompute_dtype = "float32"\ndevice = "cpu"\n[reference]\ncache_dir = "cache"\n'
    (tmp_path / "run.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run.toml"


def test_fill_inspect_and_verify_from_the_command_line(config_file: Path, capsys):
    assert reference.main(["fill", "run.toml"]) == 0
    text = capsys.readouterr().out
    assert "8 pairs scored, 0 found in cache/" in text and "2 held-out pairs scored, 0 found in cache/" in text
    assert reference.main(["inspect", "cache"]) == 0
    text = capsys.readouterr().out
    assert "10 pairs, every checksum right" in text and "float32, 2 layers x 8, forward version 1" in text
    assert reference.main(["verify", "run.toml", "train.seed=7"]) == 0
    assert "0 pairs scored, 8 found in cache/" in capsys.readouterr().out
    assert not (config_file.parent / "out").exists()


def test_verify_finds_a_record_that_another_model_wrote(config_file: Path, capsys):
    assert reference.main(["fill", "run.toml"]) == 0
    path = records_file(config_file.parent / "cache")
    records = np.fromfile(path, dtype=RECORD)
    records[3]["logps"] += 1
    records[3]["crc"] = zlib.crc32(records[3].tobytes()[:-4])
    path.write_bytes(records.tobytes())
    capsys.readouterr()
    assert reference.main(["verify", "run.toml"]) == 2
    assert re.search(r"differs from its reference in 1 of 8 pairs, most in train.jsonl:\d", capsys.readouterr().err)


def test_bad_input_on_the_command_line(config_file: Path, capsys):
    for arguments, message in (
        (["inspect", "nowhere"], "nowhere: no reference cache in it"),
        (["fill", "none.toml"], "none.toml: cannot be read: No such file"),
        (["fill", "run.toml", "dpo.beta=0"], "dpo.beta = 0.0 is outside (0, inf)"),
        (["verify", "run.toml", "data.train=none.jsonl"], "none.jsonl: no such file"),
        (["fill", "run.toml", "dpo.loss=simpo", "dpo.beta=2", "dpo.margin=1"], "'simpo' has no reference to score"),
    ):
        assert reference.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (config_file.parent / "cache").exists()
