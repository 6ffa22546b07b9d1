"""weights.py: what a checkpoint's files hold is what the model holds, bit for bit, and the way back (law 9)."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
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
from notus.dims import MistralConfig
from notus.model import Mistral, pair_logps
from notus.packing import pack_pairs
from notus.weights import check_export, check_weights, digest, load_weights, meta_model, weight_map

CPU = torch.device("cpu")
ALONE = distributed.World(0, 1, CPU, None)
ODD = tiny_config(vocab_size=31, hidden_size=15, intermediate_size=21)  # rows that two ranks cannot halve
ONE_ROW = tiny_config(hidden_size=1)  # rows of which the second rank gets none


def export(*arguments, **named) -> None:
    """With the eos_token_id of the tests' config.json."""
    weights.export(*arguments, **{"eos_id": 2} | named)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
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


def write_index(directory: Path, index: object) -> None:
    split(directory)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cast(directory: Path, dtype: torch.dtype) -> None:
    change_tensors(directory, lambda tensors: tensors.update({NORM: tensors[NORM].to(dtype)}))


def into_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def only(directory: Path, name: str, content: str = "") -> None:
    """In place of the weights, this file."""
    (directory / "model.safetensors").unlink()
    (directory / name).write_text(content)


NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14483464192\n"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        # names and shapes
        (
            lambda d: change_tensors(d, lambda t: t.pop(NORM)),
            f": the weights do not fit config.json: 1 missing tensors, e.g. {NORM}",
        ),
        (
            lambda d: change_tensors(d, lambda t: t.update(bias=t.pop(NORM))),
            f"1 missing tensors, e.g. {NORM} and 1 unexpected tensors, e.g. bias",
        ),
        (
            lambda d: change_tensors(d, lambda t: t.update({NORM: torch.zeros(21)})),
            f"model.safetensors: {NORM} is (21,), but config.json makes it (20,)",
        ),
        (
            lambda d: change_tensors(d, lambda t: t.update({"model.layers.2.bias": torch.zeros(1)})),
            "config.json has num_hidden_layers = 2, but the weights have 3 layers. The files are of different models",
        ),
        # dtypes
        (lambda d: cast(d, torch.int8), f"model.safetensors: {NORM} is I8; weights must be F32, F16, BF16, F64. If"),
        (lambda d: cast(d, torch.bool), f"{NORM} is BOOL; weights must be F32, F16, BF16, F64. If the model is"),
        (lambda d: cast(d, torch.float8_e4m3fn), f"{NORM} is F8_E4M3; weights must be F32, F16, BF16, F64. If the"),
        # files
        (lambda d: truncate(d / "model.safetensors"), "model.safetensors: cannot be opened as safetensors"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "model.safetensors: cannot be opened as safetensors"),
        (lambda d: into_pipe(d / "model.safetensors"), "model.safetensors: not a regular file"),
        (lambda d: only(d, "model.safetensors", POINTER), "a git-lfs pointer, not the file itself. Run `git lfs pull`"),
        # the index
        (lambda d: change_index(d, lambda names: names.pop(NORM)), f"1 missing tensors, e.g. {NORM}"),
        (
            lambda d: change_index(d, lambda names: names.update({NORM: "absent.safetensors"})),
            "absent.safetensors: no such file",
        ),
        (
            lambda d: change_index(d, lambda names: names.update({NORM: "x" * 300})),
            "xxx: no such file",
        ),
        (
            lambda d: change_index(
                d, lambda names: names.update({NORM: next(file for file in names.values() if file != names[NORM])})
            ),
            f".safetensors: {NORM} is missing, though the index says that it is here",
        ),
        (
            lambda d: change_index(d, lambda names: names.update({NORM: "../base/model.safetensors"})),
            f"index.json: {NORM} is in '../base/model.safetensors', which is outside the model's folder",
        ),
        (
            lambda d: change_index(d, lambda names: names.update({NORM: "/etc/model.safetensors"})),
            f"index.json: {NORM} is in '/etc/model.safetensors', which is outside the model's folder",
        ),
        (lambda d: (split(d) / "model.safetensors.index.json").write_text("{"), "index.json:1: not JSON"),
        (lambda d: into_pipe(split(d) / "model.safetensors.index.json"), "index.json: not a regular file"),
        (lambda d: into_pipe(split(d) / "model-00002-of-00002.safetensors"), "00002.safetensors: not a regular file"),
        *((lambda d, index=index: write_index(d, index), "index.json: not a safetensors index") for index in (
            {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {NORM: 3}}, {"weight_map": {NORM: None}},
        )),
        (
            lambda d: shutil.copyfile(split(d) / "model-00001-of-00002.safetensors", d / "model.safetensors"),
            ": both model.safetensors and model.safetensors.index.json are here, and the index names other files",
        ),
        # other things than weights
        (lambda d: (d / "model.safetensors").unlink(), "neither model.safetensors nor model.safetensors.index.json is"),
        (lambda d: only(d, "pytorch_model.bin"), 'it holds pytorch_model*.bin. Convert it: python -c "'),
        (
            lambda d: only(d, "adapter_config.json", '{"base_model_name_or_path": "org/base"}'),
            "it holds an adapter of org/base, not a whole model. Merge the two (pip install peft)",
        ),
        (lambda d: only(d, "zephyr.Q4_K_M.gguf"), "it holds zephyr.Q4_K_M.gguf, for llama.cpp. Use the original model"),
        (lambda d: only(d, "consolidated.safetensors"), "it is in Mistral's own layout"),
        (lambda d: only(d, "dataset_info.json"), "it holds a data set that was written by save_to_disk, not a model"),
        (
            lambda d: (split(d) / "model.safetensors.index.json").unlink(),
            "it holds model-00001-of-00002.safetensors, but not model.safetensors.index.json. Download that file too",
        ),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_before_any_weight_is_read(tmp_path: Path, spoil, message: str):
    config = tiny_config()
    base = save_checkpoint(tiny_model(config), tmp_path / "base")
    assert check_weights(base, config) == (weight_map(base), [])
    spoil(base)
    with pytest.raises(ValueError) as caught:
        check_weights(base, config)
    assert str(caught.value).startswith(str(base))
    assert message in str(caught.value)


def test_the_commands_that_errors_give_make_a_checkpoint_that_loads(tmp_path: Path):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path / "a [folder] of mine")
    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)

    def obey(pattern: str) -> None:
        with pytest.raises(ValueError) as caught:
            weight_map(base)
        command = re.search(pattern, str(caught.value))[1].replace("python", sys.executable, 1)
        subprocess.run(command, shell=True, check=True)
        assert_holds(load(base), tensors)
        (base / "model.safetensors").unlink()

    (base / "model.safetensors").rename(base / "zephyr.safetensors")
    obey(r"rename it: (mv .*)")
    shared = torch.stack([tensors[NORM], tensors[NORM]])  # a view, as tied weights are
    torch.save({name: tensors[name] for name in names if name != NORM}, base / "pytorch_model-00001-of-00002.bin")
    torch.save({NORM: shared[0]}, base / "pytorch_model-00002-of-00002.bin")
    obey(r"Convert it: (python .*)")


def test_an_index_beside_the_single_file_that_it_names_is_no_contradiction(tmp_path: Path):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path)
    names = load_file(base / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "./model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(weight_map(base).values()) == {base / "model.safetensors"}
    assert_holds(load(base), names)


def test_shards_may_lie_in_folders_of_the_model(tmp_path: Path):
    base = split(save_checkpoint(tiny_model(tiny_config()), tmp_path))
    tensors = all_tensors(base)
    index = json.loads((base / "model.safetensors.index.json").read_text())
    for number, path in enumerate(sorted(base.glob("*.safetensors"))):  # both named alike
        (base / f"part{number}").mkdir()
        path.rename(base / f"part{number}" / "weights.safetensors")
        renamed = f"part{number}/weights.safetensors"
        index["weight_map"] |= {name: renamed for name, file in index["weight_map"].items() if file == path.name}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_holds(load(base), tensors)
    lines = subprocess.run("sha256sum part*/*.safetensors", shell=True, cwd=base, capture_output=True).stdout
    assert digest(base, ALONE) == hashlib.sha256(lines).hexdigest()


def test_a_wrong_number_of_layers_is_refused_before_they_are_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path)
    monkeypatch.setattr(weights, "meta_model", None)  # to call it would be a TypeError
    with pytest.raises(ValueError, match="num_hidden_layers = 4096, but the weights have 2 layers"):
        check_weights(base, tiny_config(num_hidden_layers=4096))


def test_buffers_that_old_versions_saved_are_skipped_and_named(tmp_path: Path):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path)
    tensors = load_file(base / "model.safetensors")
    buffers = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    change_tensors(base, lambda t: t.update({name: torch.ones(3) for name in buffers}))
    files, skipped = check_weights(base, tiny_config())
    assert skipped == buffers and files.keys() == tensors.keys()
    assert_holds(load(base), tensors)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tied_model_may_hold_its_head_twice_if_the_two_are_equal(tmp_path: Path, sharded: bool):
    base = save_checkpoint(tiny_model(tiny_config(tie_word_embeddings=True)), tmp_path, torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    change_tensors(base, lambda t: t.update({HEAD: t[EMBEDDING].float()}))  # the same numbers in another dtype
    if sharded:
        split(base)
    assert_holds(load(base), tensors)


def test_a_tied_model_whose_head_differs_is_refused(tmp_path: Path):
    base = save_checkpoint(tiny_model(tiny_config(tie_word_embeddings=True)), tmp_path)
    change_tensors(base, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    change_tensors(base, lambda t: t[HEAD][-1].add_(1e-6))
    with pytest.raises(
        ValueError, match=r"model\.safetensors: lm_head\.weight differs from model\.embed_tokens\.weight"
    ):
        load(base)
    raw = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}
    (base / "config.json").write_text(json.dumps(raw))  # as the error advises
    assert_holds(load(base), load_file(base / "model.safetensors"))


@pytest.mark.parametrize(
    ("dtype", "value", "what"),
    [
        (torch.float32, float("nan"), "holds NaN (as float32)"),
        (torch.bfloat16, float("nan"), "holds NaN (as float32)"),
        (torch.float16, float("-inf"), "holds Inf (as float32)"),
        (torch.float64, 1e39, "holds Inf (as float32)"),  # finite in the file, but not in the model
        (torch.float32, 3e38, None),  # finite, though the sum of the row is not
    ],
)
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, dtype: torch.dtype, value: float, what: str | None):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path, dtype)
    name = "model.layers.0.self_attn.q_proj.weight"
    change_tensors(base, lambda t: t[name][3].fill_(value))
    if what is None:
        assert_holds(load(base), load_file(base / "model.safetensors"))
        return
    with pytest.raises(ValueError) as caught:
        load(base)
    assert str(caught.value).startswith(f"{base / 'model.safetensors'}: {name} {what}. Download the model again")


def test_digest_names_the_files_and_their_contents(tmp_path: Path):
    base = split(save_checkpoint(tiny_model(tiny_config()), tmp_path / "base"))
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(base.glob("*.safetensors"))
    ]  # the output of `sha256sum *.safetensors`
    assert digest(base, ALONE) == hashlib.sha256("".join(lines).encode()).hexdigest()
    moved = shutil.copytree(base, tmp_path / "moved")
    (moved / "README.md").write_text("no weight")
    assert digest(moved, ALONE) == digest(base, ALONE)
    path = min(moved.glob("*.safetensors"))
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # nothing tells it from the old file but its content
    assert digest(moved, ALONE) != digest(base, ALONE)


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
    copied |= {"added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json"}
    rng = np.random.default_rng(0)
    for name in copied:
        (base / name).write_bytes(rng.bytes(100))
    (base / "generation_config.json").write_text('{"eos_token_id": [7,\n2]}')
    (base / "training_args.bin").write_bytes(b"not to be copied")
    export(load(base), base, tmp_path / "out", torch.float32, "# The card: übung\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]
    out = bytes_of(tmp_path / "out")
    assert out.keys() == {*copied, "config.json", "README.md", "model.safetensors"}
    assert all(out[name] == (base / name).read_bytes() for name in copied)
    assert out["README.md"].decode() == "# The card: übung\n"


def test_export_writes_the_template_of_training_and_what_else_the_run_gives(tmp_path: Path):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path / "base")
    (base / "chat_template.jinja").write_text("the base's own")
    template, whole = "{% for m in messages %}ü\n{{ m }}{% endfor %}\n", {}

    def finish(directory: Path) -> None:
        whole.update(bytes_of(directory))
        (directory / "notus.json").write_text('{"bos": true}\n')

    export(load(base), base, tmp_path / "own", torch.float32, "", finish=finish)
    export(load(base), base, tmp_path / "given", torch.float32, "", chat_template=template)
    own, given = bytes_of(tmp_path / "own"), bytes_of(tmp_path / "given")
    assert own["chat_template.jinja"] == b"the base's own" and own["notus.json"] == b'{"bos": true}\n'
    assert own == whole | {"notus.json": own["notus.json"]}
    assert given["chat_template.jinja"].decode() == template and "notus.json" not in given


@pytest.mark.parametrize(
    ("generation", "stops_at"),  # the base's generation_config.json, and what transformers stops at without the trained
    [
        (None, 2),  # config.json's
        ({"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}, 2),
        ({"eos_token_id": [2, 90], "max_new_tokens": 7}, [2, 90]),
        ({"bos_token_id": 1}, None),
    ],
)
def test_transformers_stops_where_the_answers_of_training_ended(tmp_path: Path, generation: dict | None, stops_at):
    from transformers import GenerationConfig

    base = save_checkpoint(tiny_model(tiny_config()), tmp_path / "base")
    if generation is not None:
        (base / "generation_config.json").write_text(json.dumps(generation))
    prompt = torch.tensor([[1, 5, 9]])
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    twin = hf_load(base)
    assert twin.generation_config.eos_token_id == stops_at
    written = twin.generate(prompt, **options)[0, 3:].tolist()
    assert len(written) == 6
    eos = written[2]
    out = tmp_path / "out"
    export(load(base), base, out, torch.float32, "", eos_id=eos)
    assert hf_load(out).generate(prompt, **options)[0, 3:].tolist() == written[: written.index(eos) + 1]
    exported = json.loads((out / "generation_config.json").read_text())
    listed = [stops_at] if isinstance(stops_at, int) else stops_at or []
    assert exported["eos_token_id"] == ([*listed, eos] if listed else eos)
    kept = {"bos_token_id": 1, "max_new_tokens": 7}
    assert {key: exported.get(key) for key in kept} == {
        key: (generation or {"bos_token_id": 1}).get(key) for key in kept
    }
    assert not exported.get("_from_model_config")
    assert GenerationConfig.from_pretrained(out).eos_token_id == exported["eos_token_id"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "generation_config.json:1: not JSON"),
        ("[]", "generation_config.json: must hold a JSON object"),
        ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>'; it must be an id or a list of ids"),
        ('{"eos_token_id": [2, null]}', "eos_token_id is [2, None]; it must be an id or a list of ids"),
        ('{"max_new_tokens": 0}', "max_new_tokens is 0; it must be a number above 0"),
        ('{"max_new_tokens": "many"}', "max_new_tokens is 'many'; it must be a number above 0"),
        ('{"do_sample": true, "temperature": 0.0}', "temperature is 0.0; it must be a number above 0"),
        ('{"do_sample": true, "temperature": NaN}', "temperature is nan; it must be a number above 0"),
        ('{"do_sample": true, "top_p": -0.5}', "top_p is -0.5; it must be a number of at least 0"),
        ('{"do_sample": true, "top_k": -1}', "top_k is -1; it must be a number of at least 0"),
        ('{"do_sample": false, "temperature": 0.0, "top_p": 2.0}', None),  # transformers warns
        ('{"do_sample": true, "temperature": 0.7, "top_k": 0, "top_p": 0.0, "eos_token_id": [2, 3]}', None),
        ('{"pad_token_id": -1, "unheard_of": {}}', None),
    ],
)
def test_a_generation_config_is_refused_before_training_if_transformers_cannot_generate_with_it(
    tmp_path: Path, content: str, message: str | None
):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path)
    path = base / "generation_config.json"
    path.write_text(content)
    if message is None:
        check_export(base)
    else:
        with pytest.raises(ValueError) as caught:
            check_export(base)
        assert str(caught.value).startswith(str(path)) and message in str(caught.value)
    if content.startswith('{"'):

        def generate() -> None:
            from transformers import GenerationConfig

            config = GenerationConfig.from_pretrained(base)
            hf_load(base).generate(torch.tensor([[1, 5]]), config, max_length=4)

        if message is None:
            generate()
        else:
            with pytest.raises(Exception):  # noqa: B017  transformers has no type of its own for it
                generate()


def hub_cache(root: Path) -> Path:
    """A model as `huggingface_hub` caches it: links into blobs/."""
    blobs, snapshot = root / "models--org--name" / "blobs", root / "models--org--name" / "snapshots" / "4c1b"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(save_checkpoint(tiny_model(tiny_config()), root / "files").iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    (blobs / "license").write_text("MIT")
    (snapshot / "LICENSE").symlink_to("../../blobs/license")
    return snapshot


def test_links_of_the_hub_cache_are_followed(tmp_path: Path):
    base = hub_cache(tmp_path)
    (tmp_path / "base").symlink_to(base)
    for name, directory in (("a", base), ("b", tmp_path / "base")):
        check_export(directory)
        export(load(directory), directory, tmp_path / name, torch.float32, "")
        out = tmp_path / name
        assert (out / "LICENSE").read_text() == "MIT" and not any(path.is_symlink() for path in out.iterdir())
        assert_holds(load(out), load_file(base / "model.safetensors"))
    assert digest(base, ALONE) == digest(tmp_path / "base", ALONE)


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer_config.json", "config.json"])
def test_a_link_out_of_the_base_is_refused_before_training_and_never_exported(tmp_path: Path, name: str):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path / "base")
    model = load(base)
    (base / "kept").write_bytes((base / "config.json").read_bytes())
    (tmp_path / "secret").write_bytes((base / "config.json").read_bytes())
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to("kept")  # inside the folder
    check_export(base)
    for target, message in (
        ("../secret", f"{base / name}: a link to {tmp_path / 'secret'}, outside the model's folder"),
        ("../blobs/x", "outside the model's folder"),  # no hub cache
        ("gone", f"{base / name}: a link to {base / 'gone'}, which is not there. Download the model again"),
        (name, "which is not there"),  # a loop
    ):
        (base / name).unlink()
        (base / name).symlink_to(target)
        for work in (check_export, lambda base: export(model, base, tmp_path / "out", torch.float32, "")):
            with pytest.raises(ValueError) as caught:
                work(base)
            assert message in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_export_writes_through_no_link_that_has_one_of_its_names(tmp_path: Path):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path / "base")
    for name in ("out", "out.tmp"):
        (tmp_path / f"elsewhere-{name}").mkdir()
        (tmp_path / f"elsewhere-{name}" / "README.md").write_text("not ours")
        (tmp_path / name).symlink_to(f"elsewhere-{name}")
    export(load(base), base, tmp_path / "out", torch.float32, "card")
    assert not (tmp_path / "out").is_symlink() and not os.path.lexists(tmp_path / "out.tmp")
    assert_holds(load(tmp_path / "out"), load_file(base / "model.safetensors"))
    for name in ("out", "out.tmp"):
        assert bytes_of(tmp_path / f"elsewhere-{name}") == {"README.md": b"not ours"}


def test_a_base_that_changed_while_training_is_not_exported_under_its_new_config(tmp_path: Path):
    base = save_checkpoint(tiny_model(tiny_config()), tmp_path / "base")
    model = load(base)
    raw = json.loads((base / "config.json").read_text()) | {"rope_theta": 5e4}
    (base / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"config\.json: has changed since training began"):
        export(model, base, tmp_path / "out", torch.float32, "card")


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
        save_checkpoint(tiny_model(config), tmp_path / f"base{number}")
        for number, config in enumerate((ODD, ONE_ROW, replace(ODD, qkv_bias=True), replace(ODD, qk_norm=True)))
    ]
    outs = [tmp_path / f"out{number}" for number in range(len(bases))]
    run_ranks(num_ranks, export_loaded, bases, outs)
    for base, out in zip(bases, outs, strict=True):
        export(load(base), base, tmp_path / "alone", torch.float32, "card", max_shard_bytes=5000)
        assert bytes_of(out) == bytes_of(tmp_path / "alone")
        assert all_tensors(out).keys() == load_file(base / "model.safetensors").keys()
        shutil.rmtree(tmp_path / "alone")


def fail_to_load(bases: list[Path], messages: list[str]) -> None:
    """One rank's work: it hangs if the ranks do not agree."""
    world = distributed.start("cpu")
    for base, message in zip(bases, messages, strict=True):
        model = meta_model(MistralConfig.read(base))
        distributed.shard(model, model.model.layers, world, torch.float32)
        with pytest.raises(ValueError) as caught:
            load_weights(model, base, world.device)
        assert message in str(caught.value)
    whole = bases[0].parent / "whole"
    load_weights(model, whole, world.device)
    (whole / "config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="no such file"):
        export(model, whole, whole.parent / "out", torch.float32, "", world.rank)
    assert digest(bases[0], world) == digest(bases[0], ALONE)
    del model
    distributed.stop()


def test_all_ranks_refuse_what_one_of_them_reads(tmp_path: Path):
    bases = [
        save_checkpoint(tiny_model(tiny_config(tie_word_embeddings=tied)), tmp_path / f"base{tied}")
        for tied in (False, True)
    ]
    shutil.copytree(bases[1], tmp_path / "whole")
    change_tensors(bases[0], lambda t: t[NORM][-1].fill_(float("nan")))  # rows of the second rank
    change_tensors(bases[1], lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    change_tensors(bases[1], lambda t: t[HEAD][0].add_(1))  # rows of the first
    run_ranks(2, fail_to_load, [split(bases[0]), bases[1]], [f"{NORM} holds NaN", "lm_head.weight differs from"])
