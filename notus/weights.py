"""Hugging Face checkpoints in and out: safetensors -> this rank's shards -> safetensors.

No rank ever holds the whole model. Loading reads only the slices that a rank keeps, and export gathers one tensor at a
time. Tensors keep the names of the checkpoint. Nothing here can run code from a file.
"""

import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from notus.dims import MistralConfig, other_layout
from notus.distributed import World, full_tensor, local_rows
from notus.files import file_digest, fsync, read_json, refuse_pointer, text_digest
from notus.lora import LoRALinear, lora_layers, merged, peft_tensors
from notus.model import Mistral

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "LICENSE",
)  # fmt: skip
# In a safetensors header.
DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
READABLE = tuple(DTYPE_NAMES.values())
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"model\.layers\.(\d+)\.")
OTHER_MODEL = "The files are of different models, or incomplete: download them again"
DERIVED = re.compile(r"(.+\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")  # buffers that old versions saved

CONVERT = (  # pytorch_model*.bin -> model.safetensors, with nothing that notus does not install
    'python -c "import sys, torch; from pathlib import Path; from safetensors.torch import save_file; '
    "d = Path(sys.argv[1]); save_file({k: v.contiguous().clone() for f in d.glob('pytorch_model*.bin') "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}, "
    "d / 'model.safetensors', {'format': 'pt'})\""
)


def meta_model(config: MistralConfig) -> Mistral:
    """The model without storage: its names and shapes, for checking, sharding and then filling."""
    with torch.device("meta"):
        return Mistral(config)


# --- what a checkpoint holds -----------------------------------------------------------------------------------------


def weight_map(model_dir: str | Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or from the single model.safetensors."""
    model_dir = Path(model_dir)
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    if not os.path.lexists(index):
        if not os.path.lexists(single):
            raise ValueError(f"{model_dir}: no weights in safetensors format; {_instead_of_weights(model_dir)}")
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise ValueError(f"{index}: not a safetensors index: weight_map must name a file for each tensor")
    for name, file in names.items():
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(f"{index}: {name} is in {file!r}, which is outside the model's folder")
    files = {name: model_dir / file for name, file in names.items()}
    if os.path.lexists(single) and set(files.values()) != {single}:
        raise ValueError(
            f"{model_dir}: both {single.name} and {index.name} are here, and the index names other files. Some tools "
            "take the one, some the other. Remove the one that does not belong to this model"
        )
    return files


def _instead_of_weights(model_dir: Path) -> str:
    """What a folder holds in place of model.safetensors and its index, and the command that helps."""
    folder = shlex.quote(str(model_dir))
    if list(model_dir.glob("pytorch_model*.bin")):
        return f"it holds pytorch_model*.bin. Convert it: {CONVERT} {folder}"
    if other := other_layout(model_dir):
        return other
    found = sorted(path.name for path in model_dir.glob("*.safetensors"))
    if shards := [name for name in found if re.search(r"-of-\d+\.", name)]:
        return f"it holds {shards[0]}, but not model.safetensors.index.json. Download that file too"
    if found:
        rename = f"mv {shlex.quote(str(model_dir / found[0]))} {shlex.quote(str(model_dir / 'model.safetensors'))}"
        return f"it holds {', '.join(found)}. If the model is in {found[0]}, rename it: {rename}"
    return (
        "neither model.safetensors nor model.safetensors.index.json is there. Download the model again: "
        f"hf download ID --local-dir {folder}"
    )


def _open(path: Path) -> Any:
    """Open a safetensors file. This checks its header, and reads no tensor."""
    if not os.path.isfile(path):  # opening a pipe would wait forever
        raise ValueError(f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")
    try:
        return safe_open(path, framework="pt")
    except (OSError, MemoryError) as error:  # MemoryError: no address space to map it
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except SafetensorError as error:
        with path.open("rb") as file:
            refuse_pointer(path, file.read(40))
        raise ValueError(f"{path}: cannot be opened as safetensors: {error}. Download it again") from None


def check_weights(model_dir: str | Path, config: MistralConfig) -> tuple[dict[str, Path], list[str]]:
    """Compare names, shapes and dtypes with the config. It reads headers only, no weight.

    It returns the map from tensor to file, and the names of the buffers in the files that are not weights: the model
    computes them itself, so they are not in the map. A tied model may also have `lm_head.weight` in its map.
    """
    found = weight_map(model_dir)
    derived = sorted(name for name in found if DERIVED.fullmatch(name))
    files = {name: path for name, path in found.items() if name not in derived}
    expected = _expected_shapes(model_dir, config, files)
    for path in sorted(set(files.values())):
        with _open(path) as file:
            held = set(file.keys())
            for name in (name for name, where in files.items() if where == path):
                if name not in held:
                    raise ValueError(f"{path}: {name} is missing, though the index says that it is here")
                _check_tensor(path, name, file.get_slice(name), expected[name])
    return files, derived


def _expected_shapes(
    model_dir: str | Path, config: MistralConfig, files: Mapping[str, Path]
) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as the config has it. ValueError if the files have other names."""
    # The layers are counted before the model is built, because a wrong number could take minutes.
    layers = {match[1] for match in map(LAYER.match, files) if match}
    if len(layers) != config.num_hidden_layers:
        raise ValueError(
            f"{model_dir}: config.json has num_hidden_layers = {config.num_hidden_layers}, but the weights have "
            f"{len(layers)} layers. {OTHER_MODEL}"
        )
    expected = {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}
    if config.tie_word_embeddings and HEAD in files:
        expected[HEAD] = expected[EMBEDDING]  # load_weights compares their values
    differences = {"missing": expected.keys() - files, "unexpected": files.keys() - expected}
    problems = [f"{len(names)} {what} tensors, e.g. {min(names)}" for what, names in differences.items() if names]
    if problems:
        raise ValueError(f"{model_dir}: the weights do not fit config.json: {' and '.join(problems)}. {OTHER_MODEL}")
    return expected


def _check_tensor(path: Path, name: str, tensor: Any, shape: tuple[int, ...]) -> None:
    if tensor.get_dtype() not in READABLE:
        raise ValueError(
            f"{path}: {name} is {tensor.get_dtype()}; weights must be {', '.join(READABLE)}. If the model is "
            "quantized, use the one that it was made from"
        )
    if (found := tuple(tensor.get_shape())) != shape:
        raise ValueError(f"{path}: {name} is {found}, but config.json makes it {shape}. {OTHER_MODEL}")


# --- loading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load_weights(model: Mistral, model_dir: str | Path, device: torch.device) -> None:
    """Fill a `meta_model`, sharded or not, on `device`. Every rank reads its own rows and no others.

    The model keeps its dtype, whatever the files hold. Weights to train are float32, because at a learning rate of 5e-7
    bfloat16 weights would hardly move. LoRA's matrices are in no file, and are not filled here. If the model is
    sharded, all ranks call. ValueError if a weight is NaN or infinite, or if the head of a tied model differs from its
    embedding: the same on every rank, so that none hangs.
    """

    def fill() -> None:
        files, _ = check_weights(model_dir, model.config)
        model.to_empty(device=device)
        opened: tuple[Path, Any] | None = None
        of_base = [(name, parameter) for name, parameter in model.named_parameters() if name in files]  # not LoRA's
        for name, parameter in sorted(of_base, key=lambda item: (files[item[0]], item[0])):
            if opened is None or opened[0] != files[name]:
                opened = files[name], _open(files[name])
            local, rows = local_rows(parameter)
            held = opened[1].get_slice(name)[rows]
            local.copy_(held)
            _check_finite(files[name], name, local)
            if name == EMBEDDING and model.config.tie_word_embeddings and HEAD in files:
                _check_tied(files[HEAD], held, _open(files[HEAD]).get_slice(HEAD)[rows])

    _on_every_rank(_num_ranks(model), fill)


def _check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Sum first, because a sum is NaN or infinite if an entry is, and `isfinite` takes 20 times as long on a CPU."""
    if math.isfinite(tensor.sum().item()):
        return
    for what, where in (("NaN", tensor.isnan()), ("Inf", tensor.isinf())):
        if where.any():
            raise ValueError(
                f"{path}: {name} holds {what} (as {str(tensor.dtype).removeprefix('torch.')}). Download the model "
                "again; if that does not help, it was saved so, and cannot be trained"
            )


def _check_tied(path: Path, embedding: Tensor, head: Tensor) -> None:
    wide = torch.promote_types(embedding.dtype, head.dtype)
    if not torch.equal(embedding.to(wide), head.to(wide)):
        raise ValueError(
            f"{path}: {HEAD} differs from {EMBEDDING}, but config.json has tie_word_embeddings = true, which makes "
            "them one. Set it to false if the model was trained with two"
        )


def _num_ranks(model: Mistral) -> int:
    """How many processes work on the model together: all of them if it is sharded, else this one alone."""
    return dist.get_world_size() if any(isinstance(parameter, DTensor) for parameter in model.parameters()) else 1


def _on_every_rank(num_ranks: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on each rank, on every rank. If it fails on one, every rank raises that error."""
    result, failure = None, None
    try:
        result = work()
    except Exception as raised:  # and again below, on every rank
        failure = raised
    outcomes: list[Any] = [(result, failure)] * num_ranks
    if num_ranks > 1:
        dist.all_gather_object(outcomes, (result, failure))
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


def digest(model_dir: str | Path, world: World) -> str:
    """sha256 over the weight files' names and contents, as `sha256sum` lists them. It names a base in the reference
    cache and in the model card.

    Every call reads every file: a remembered digest could name a base that has changed since. The files are shared out
    over ranks, and each rank hashes its files at once. All ranks call.
    """

    def hash_mine() -> dict[Path, str]:
        mine = sorted(set(weight_map(model_dir).values()))[world.rank :: world.size]
        with ThreadPoolExecutor() as threads:  # hashlib lets other threads run
            return dict(zip(mine, threads.map(file_digest, mine), strict=True))

    digests = {path: found for rank in _on_every_rank(world.size, hash_mine) for path, found in rank.items()}
    lines = "".join(f"{digests[path]}  {path.relative_to(model_dir)}\n" for path in sorted(digests))
    return text_digest(lines)


# --- export ----------------------------------------------------------------------------------------------------------


def check_export(base_dir: str | Path) -> None:
    """Raise ValueError, before training, for everything in the base that would spoil the export after it."""
    copied_files(base_dir)
    generation_config(base_dir)


def copied_files(base_dir: str | Path) -> list[Path]:
    """The files of a base that its export takes over. Symbolic links may point into the base's folder, or to the blobs
    of the Hugging Face cache that it lies in (snapshots/REVISION/NAME -> ../../blobs/SHA). Others are refused, because
    an export is made to be published, and such a link could put any file of this machine into it."""
    home = Path(os.path.realpath(base_dir))
    allowed = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    files = []
    for path in (Path(base_dir) / name for name in (*COPIED, "config.json")):
        target = Path(os.path.realpath(path))
        if not any(target.is_relative_to(folder) for folder in allowed):
            raise ValueError(
                f"{path}: a link to {target}, outside the model's folder. The export does not follow it; replace it "
                "by a copy of the file"
            )
        if path.is_symlink() and not target.exists():
            raise ValueError(f"{path}: a link to {target}, which is not there. Download the model again")
        if path.name in COPIED and target.is_file():
            files.append(path)
    return files


def export(
    model: Mistral,
    base_dir: str | Path,
    output_dir: str | Path,
    dtype: torch.dtype,
    card: str,
    rank: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    *,
    eos_id: int,
    chat_template: str | None = None,
    adapter: dict[str, Any] | None = None,
    finish: Callable[[Path], None] = lambda _: None,
) -> None:
    """Write a directory that every Hugging Face tool loads. All ranks call; rank 0 writes.

    Tokenizer files are copied byte for byte from the base, config.json key for key (dtype and use_cache aside).
    `chat_template` is the template of training, if the base's own files do not hold it. generation_config.json stops at
    `eos_id`, the token that ended the answers in training. `finish` is called with the directory when all this is in
    it, and may add to it. What LoRA has learned is added to the weights; or, with PEFT's adapter_config.json as
    `adapter`, it is written alone, in PEFT's layout.

    The directory is built under a temporary name, and renamed when it is complete and on disk.
    """
    base_dir, output_dir = Path(base_dir), Path(output_dir)
    building = output_dir.with_name(output_dir.name + ".tmp")

    def prepare() -> None:
        if rank > 0:
            return
        _remove(building)
        building.mkdir(parents=True)
        for path in copied_files(base_dir):
            shutil.copyfile(path, building / path.name)
        if MistralConfig.read(base_dir) != model.config:
            raise ValueError(f"{base_dir / 'config.json'}: has changed since training began")
        configs = {"adapter_config.json": adapter}
        if adapter is None:
            configs = {
                "config.json": exported_config(read_json(base_dir / "config.json"), dtype),
                "generation_config.json": exported_generation_config(base_dir, eos_id),
            }
        texts = {name: json.dumps(config, indent=2) + "\n" for name, config in configs.items() if config}
        texts["README.md"] = card
        if chat_template is not None:
            texts["chat_template.jinja"] = chat_template
        for name, text in texts.items():
            (building / name).write_text(text, encoding="utf-8")

    _on_every_rank(_num_ranks(model), prepare)  # an error on rank 0 must not leave the others waiting for its tensors
    if adapter is None:
        write_weights(model, building, dtype, rank, max_shard_bytes)
    else:
        write_file(building / "adapter_model.safetensors", peft_tensors(model), dtype, rank)
    if rank == 0:
        finish(building)
        for path in building.iterdir():
            fsync(path)
        fsync(building)
        _remove(output_dir)  # an earlier export of the same run
        building.replace(output_dir)
        fsync(output_dir.parent)


def _remove(path: Path) -> None:
    """Remove a file, a folder or a symbolic link, but never what the link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def exported_config(base: dict, dtype: torch.dtype) -> dict:
    """The base's config.json with the new dtype, and with `use_cache` on: training scripts leave it off, and then every
    generation would read the whole text again for each token. A file in the spelling of transformers 5 also gets that
    of version 4, which would otherwise take 10000 for rope_theta, and no scaling, without a word."""
    config = dict(base)
    name = str(dtype).removeprefix("torch.")
    for key in [key for key in ("torch_dtype", "dtype") if key in base] or ["torch_dtype"]:
        config[key] = name
    config["use_cache"] = True
    rope = dict(base.get("rope_parameters") or {})
    if "rope_theta" in rope and "rope_theta" not in base:
        config["rope_theta"] = rope.pop("rope_theta")
        config.setdefault("torch_dtype", name)
        if rope.get("rope_type", "default") != "default":
            config.setdefault("rope_scaling", rope)
    return config


def exported_generation_config(base_dir: str | Path, eos_id: int) -> dict[str, Any] | None:
    """The generation_config.json of the export, or None if the base's own will do, or if it needs none.

    transformers stops at the eos_token_id of this file, and without the file at that of config.json. Where neither
    names the EOS of training, a tuned model would keep writing after its answer, so `eos_id` is added.
    """
    generation, ids = generation_config(base_dir)
    if eos_id in ids:
        return None
    generation.pop("_from_model_config", None)  # with it, transformers 4 may go back to the ids of config.json
    return generation | {"eos_token_id": [*ids, eos_id] if ids else eos_id}


def generation_config(model_dir: str | Path) -> tuple[dict[str, Any], list[int]]:
    """generation_config.json and its EOS ids, checked. Without the file, what transformers takes from config.json."""
    path = Path(model_dir) / "generation_config.json"
    if path.exists():
        generation = read_json(path)
    else:
        path = Path(model_dir) / "config.json"
        taken = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = {key: value for key, value in read_json(path).items() if key in taken}
    eos = generation.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise ValueError(f"{path}: eos_token_id is {eos!r:.80}; it must be an id or a list of ids")

    # What stops transformers from loading or sampling. What it only warns of is left alone.
    rules: dict[str, tuple[Callable[[float], bool], str]] = {"max_new_tokens": (lambda n: n > 0, "above 0")}
    if generation.get("do_sample"):
        rules["temperature"] = lambda t: t > 0, "above 0"
        rules["top_p"] = rules["top_k"] = lambda n: n >= 0, "of at least 0"
    for name, (fits, what) in rules.items():
        value = generation.get(name)
        if value is not None and (type(value) not in (int, float) or not fits(value)):
            raise ValueError(f"{path}: {name} is {value!r:.80}; it must be a number {what}")
    return generation, ids


def write_weights(model: Mistral, directory: Path, dtype: torch.dtype, rank: int, max_shard_bytes: int) -> None:
    """Write model.safetensors, with LoRA merged in. If it would exceed `max_shard_bytes`, write
    model-0000k-of-0000n.safetensors and their index instead. All ranks call; rank 0 writes."""
    layers = {f"{name}.weight": layer for name, layer in lora_layers(model).items()}
    own = {id(matrix) for layer in layers.values() for matrix in (layer.lora_a, layer.lora_b)}
    shards: list[list[tuple[str, Tensor]]] = [[]]
    filled = total = 0
    for name, parameter in model.named_parameters():
        if id(parameter) in own:
            continue
        size = parameter.numel() * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, parameter))
        filled += size
        total += size
    files = ["model.safetensors"]
    if len(shards) > 1:
        files = [f"model-{k:05d}-of-{len(shards):05d}.safetensors" for k in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard},
        }
        if rank == 0:
            (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, shard in zip(files, shards, strict=True):
        write_file(directory / file, shard, dtype, rank, layers)


def write_file(
    path: Path, tensors: list[tuple[str, Tensor]], dtype: torch.dtype, rank: int,
    layers: Mapping[str, LoRALinear] | None = None,
) -> None:  # fmt: skip
    """`layers`: those whose weight is written with LoRA merged in, by its name."""
    chunks = _safetensors(tensors, dtype, layers or {})
    if rank == 0:
        with path.open("wb") as out:
            for chunk in chunks:
                out.write(chunk)
    else:
        for _ in chunks:  # rank 0 needs this rank's part of each tensor
            pass


def safetensors_header(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a .safetensors file before its tensors (https://github.com/huggingface/safetensors): the length of
    the header (u64, little-endian), and the header as JSON padded to 8 bytes. tensors: (name, dtype, shape) of each."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _safetensors(
    tensors: list[tuple[str, Tensor]], dtype: torch.dtype, layers: Mapping[str, LoRALinear]
) -> Iterator[bytes | memoryview]:
    """The bytes of a .safetensors file, one tensor in memory at a time."""
    # Older transformers refuse files that do not name their format.
    yield safetensors_header([(name, dtype, tensor.shape) for name, tensor in tensors], {"format": "pt"})
    for name, tensor in tensors:
        whole = merged(layers[name]) if name in layers else full_tensor(tensor.detach())
        whole = whole.to(dtype).cpu().contiguous()
        yield whole.view(-1).view(torch.uint8).numpy().data
