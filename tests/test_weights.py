"""weights.py: what a checkpoint's files hold is what the model holds, bit for bit, and the way back (law 9)."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import (
    hf_load,
    hf_logps,
    random_pairs,
    run_ranks,
    save_checkpoint,
    tiny_config,
    tiny_model,
)
from torch import Tensor

from notus import distributed, weights
from notus.data import file_digest
from notus.model import Mistral, MistralConfig, pair_logps
from notus.packing import pack_pairs
from notus.weights import check_weights, digest, export, load_weights, meta_model, weight_map

CPU = torch.device("cpu")
ODD = tiny_config(vocab_size=31, hidden_size=15, intermediate_size=21)  # rows that two ranks cannot halve
ONE_ROW = tiny_config(hidden_size=1)  # rows of which the second rank gets none


def load(directory: Path) -> Mistral:
    model = meta_model(MistralConfig.read(directory))
    load_weights(model, directory, CPU)
    return model


def split(directory: Path) -> Path:
    """Rewrite a checkpoint's model.safetensors as two files and their index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if where[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def all_tensors(directory: Path) -> dict[str, Tensor]:
    """As the safetensors library reads them."""
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_holds(model: Mistral, tensors: dict[str, Tensor]) -> None:
    """Bit for bit, as float32."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert parameters.keys() == tensors.keys()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter.view(torch.int32), tensors[name].float().view(torch.int32)), name


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_loaded_weights_are_the_files_bit_for_bit(tmp_path: Path, sharded: bool, dtype: torch.dtype, tied: bool):
    save_checkpoint(tiny_model(tiny_config(tie_word_embeddings=tied)), tmp_path, dtype)
    if sharded:
        split(tmp_path)
    tensors = all_tensors(tmp_path)
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert_holds(load(tmp_path), tensors)


def change_tensors(directory: Path, change) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def change_index(directory: Path, change) -> None:
    path = split(directory) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: change_tensors(d, lambda t: t.pop(NORM)), f"the weights lack 1 tensors, e.g. {NORM}"),
        (
            lambda d: change_tensors(d, lambda t: t.update(bias=torch.zeros(1))),
            "the weights have, unknown to a Mistral, 1 tensors, e.g. bias",
        ),
        (
            lambda d: change_tensors(d, lambda t: t.update({NORM: torch.zeros(21)})),
            f"model.safetensors: {NORM} is (21,), but config.json makes it (20,)",
        ),
        (lambda d: truncate(d / "model.safetensors"), "model.safetensors: cannot be opened as safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors: cannot be opened as safetensors"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights: neither model.safetensors nor model.safetensors."),
        (lambda d: change_index(d, lambda names: names.pop(NORM)), f"the weights lack 1 tensors, e.g. {NORM}"),
        (
            lambda d: change_index(d, lambda names: names.update({NORM: "absent.safetensors"})),
            "absent.safetensors: cannot be opened as safetensors",
        ),
        (
            lambda d: change_index(
                d, lambda names: names.update({NORM: next(file for file in names.values() if file != names[NORM])})
            ),
            f".safetensors: {NORM} is missing, though the index says that it is here",
        ),
        (lambda d: (d / "model.safetensors.index.json").write_text("{"), "index.json:1: not JSON"),
        (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "index.json: not a safetensors index"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_any_weight_is_read(tmp_path: Path, spoil, message: str):
    config = tiny_config()
    save_checkpoint(tiny_model(config), tmp_path)
    assert check_weights(tmp_path, config) == weight_map(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError) as caught:
        check_weights(tmp_path, config)
    assert str(caught.value).startswith(str(tmp_path))
    assert message in str(caught.value)


def test_digest_names_the_files_and_their_contents(tmp_path: Path):
    def digest_of(directory: Path) -> str:
        return digest(directory, distributed.World(0, 1, CPU, None), tmp_path / "memory")

    base = split(save_checkpoint(tiny_model(tiny_config()), tmp_path / "base"))
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(base.glob("*.safetensors"))
    ]  # the output of `sha256sum *.safetensors`
    assert digest_of(base) == hashlib.sha256("".join(lines).encode()).hexdigest()
    moved = shutil.copytree(base, tmp_path / "moved")
    (moved / "README.md").write_text("no weight")
    assert digest_of(moved) == digest_of(base)
    path = min(moved.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert digest_of(moved) != digest_of(base)


def test_a_digest_is_remembered_while_the_file_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base, alone = (
        split(save_checkpoint(tiny_model(tiny_config()), tmp_path / "base")),
        distributed.World(0, 1, CPU, None),
    )
    first = digest(base, alone, tmp_path / "memory")
    hashed: list[Path] = []
    monkeypatch.setattr(weights, "file_digest", lambda path: hashed.append(path) or file_digest(path))
    assert digest(base, alone, tmp_path / "memory") == first and not hashed
    changed = min(base.glob("*.safetensors"))
    os.utime(changed, ns=(0, 0))
    assert digest(base, alone, tmp_path / "memory") == first and hashed == [changed]


# --- export (law 9) ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_exported_then_loaded_is_bit_identical(tmp_path: Path, tied: bool, max_shard_bytes: int):
    base = save_checkpoint(tiny_model(tiny_config(tie_word_embeddings=tied)), tmp_path / "base")
    model = tiny_model(tiny_config(tie_word_embeddings=tied), seed=7, dtype=torch.float32)
    out = tmp_path / "runs" / "out"
    export(model, base, out, torch.float32, "card", max_shard_bytes=max_shard_bytes)
    assert_holds(load(out), {name: parameter.detach() for name, parameter in model.named_parameters()})

    files = sorted(out.glob("*.safetensors"))
    for path in files:
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # the tensors begin at a multiple of 8
    sizes = [sum(t.numel() * t.itemsize for t in load_file(path).values()) for path in files]
    if max_shard_bytes == 5_000_000_000:
        assert [path.name for path in files] == ["model.safetensors"]
        assert not (out / "model.safetensors.index.json").exists()
    else:
        assert len(files) > 1
        assert [path.name for path in files] == [
            f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)
        ]
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(sizes)
        assert index["weight_map"] == {name: path.name for path in files for name in load_file(path)}
        largest = max(parameter.numel() * 4 for parameter in model.parameters())
        assert max(sizes) <= max(max_shard_bytes, largest)


def test_bfloat16_export_is_the_weights_rounded_once(tmp_path: Path):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path / "base")
    model = load(base)
    export(model, base, tmp_path / "out", torch.bfloat16, "card")
    rounded = {name: parameter.detach().bfloat16() for name, parameter in model.named_parameters()}
    for name, tensor in all_tensors(tmp_path / "out").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), rounded[name].view(torch.int16)), name


@pytest.mark.parametrize("spelling", [4, 5])
@pytest.mark.parametrize(("max_shard_bytes", "theta"), [(5_000_000_000, 10000.0), (20_000, 1e6)])
def test_transformers_computes_the_same_log_probs_from_an_export(
    tmp_path: Path, max_shard_bytes: int, theta: float, spelling: int
):
    config = tiny_config(rope_theta=theta, sliding_window=6)
    base = save_checkpoint(tiny_model(config), tmp_path / "base", spelling=spelling)
    model = tiny_model(config, seed=5, dtype=torch.float32)
    export(model, base, tmp_path / "out", torch.float32, "card", max_shard_bytes=max_shard_bytes)
    pairs = random_pairs(np.random.default_rng(0), 4, config.vocab_size)
    with torch.no_grad():
        ours = pair_logps(model, pack_pairs(pairs))
        twin = hf_load(tmp_path / "out")
        theirs = [hf_logps(twin, pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    assert torch.allclose(ours, torch.stack(theirs).view(-1, 2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("spelling", [4, 5])
def test_export_changes_dtype_and_use_cache_in_config_json_and_nothing_else(tmp_path: Path, spelling: int):
    config = tiny_config(rope_theta=1e6)
    base = save_checkpoint(tiny_model(config), tmp_path / "base", spelling=spelling)
    raw = json.loads((base / "config.json").read_text()) | {"pretraining_tp": 1, "unheard_of": {"key": [None]}}
    (base / "config.json").write_text(json.dumps(raw))
    export(load(base), base, tmp_path / "out", torch.bfloat16, "card")
    expected = raw | {"use_cache": True}
    if spelling == 4:
        expected |= {"torch_dtype": "bfloat16"}
    else:  # with version 4's spelling beside
        expected |= {"dtype": "bfloat16", "torch_dtype": "bfloat16", "rope_theta": 1e6}
    exported = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(exported.items()) == list(expected.items()) if spelling == 4 else exported == expected
    assert MistralConfig.read(tmp_path / "out") == config


def test_config_json_without_a_dtype_gets_one_in_the_old_spelling():
    assert weights.exported_config({"vocab_size": 3}, torch.float32) == {
        "vocab_size": 3,
        "torch_dtype": "float32",
        "use_cache": True,
    }


def test_export_copies_tokenizer_files_byte_for_byte_and_leaves_nothing_else(tmp_path: Path):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path / "base")
    copied = {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "LICENSE"}
    copied |= {"added_tokens.json", "chat_template.jinja", "generation_config.json"}
    rng = np.random.default_rng(0)
    for name in copied:
        (base / name).write_bytes(rng.bytes(100))
    (base / "training_args.bin").write_bytes(b"not to be copied")
    export(load(base), base, tmp_path / "out", torch.float32, "# The card: übung\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    out = bytes_of(tmp_path / "out")
    assert out.keys() == {*copied, "config.json", "README.md", "model.safetensors"}
    assert all(out[name] == (base / name).read_bytes() for name in copied)
    assert out["README.md"].decode() == "# The card: übung\n"


def test_an_interrupted_export_leaves_no_directory_that_looks_finished(tmp_path: Path, monkeypatch):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path / "base")
    model, out, whole = load(base), tmp_path / "out", weights._safetensors

    def dies_after_the_first_chunk(*arguments):
        yield next(whole(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_safetensors", dies_after_the_first_chunk)
    with pytest.raises(KeyboardInterrupt):
        export(model, base, out, torch.float32, "card")
    monkeypatch.undo()
    assert not out.exists()
    assert (tmp_path / "out.tmp" / "model.safetensors").exists()  # it did begin
    export(model, base, out, torch.float32, "card")  # and the next one clears it away
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    assert_holds(load(out), load_file(base / "model.safetensors"))


# --- sharded -------------------------------------------------------------------------------------------------------


def load_sharded(base: Path, world: distributed.World, compute_dtype: torch.dtype) -> Mistral:
    model = meta_model(MistralConfig.read(base))
    distributed.shard(model, model.model.layers, world, compute_dtype)
    load_weights(model, base, world.device)
    return model


@pytest.fixture
def process_group():
    yield
    distributed.stop()


@pytest.mark.usefixtures("process_group")
def test_sharded_parameters_are_float32_masters_also_after_a_forward_pass_in_bfloat16(tmp_path: Path):
    config = tiny_config(sliding_window=6)
    base = save_checkpoint(tiny_model(config), tmp_path / "base")
    model = load_sharded(base, distributed.start("cpu"), torch.bfloat16)
    masters = load_file(base / "model.safetensors")
    plain = tiny_model(config, dtype=torch.bfloat16)
    stream = pack_pairs(random_pairs(np.random.default_rng(0), 3, config.vocab_size))
    with torch.no_grad():
        # Equal to a model that is bfloat16 throughout: the sharding casts weights, and no rotary table.
        assert torch.equal(pair_logps(model, stream), pair_logps(plain, stream))
    distributed.reshard(model)
    export(model, base, tmp_path / "out", torch.float32, "card")
    assert_holds(load(tmp_path / "out"), masters)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert torch.equal(parameter.to_local(), masters[name]), name


def export_loaded(bases: list[Path], outs: list[Path]) -> None:
    """One rank's work."""
    world = distributed.start("cpu")
    for base, out in zip(bases, outs, strict=True):
        model = load_sharded(base, world, torch.float32)
        whole = load_file(base / "model.safetensors")
        for name, parameter in model.named_parameters():
            rows = -(-parameter.shape[0] // world.size)  # FSDP2's rule: the last ranks hold fewer, or none
            assert torch.equal(parameter.to_local(), whole[name][world.rank * rows : (world.rank + 1) * rows]), name
        export(model, base, out, torch.float32, "card", world.rank, max_shard_bytes=5000)
    del model  # FSDP modules hold on to the process group
    distributed.stop()


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_many_ranks_export_the_very_files_that_one_exports(tmp_path: Path, num_ranks: int):
    bases = [
        save_checkpoint(tiny_model(config), tmp_path / f"base{number}") for number, config in enumerate((ODD, ONE_ROW))
    ]
    outs = [tmp_path / f"out{number}" for number in range(len(bases))]
    run_ranks(num_ranks, export_loaded, bases, outs)
    for base, out in zip(bases, outs, strict=True):
        export(load(base), base, tmp_path / "alone", torch.float32, "card", max_shard_bytes=5000)
        assert bytes_of(out) == bytes_of(tmp_path / "alone")
        assert all_tensors(out).keys() == load_file(base / "model.safetensors").keys()
        shutil.rmtree(tmp_path / "alone")
