"""Hugging Face checkpoints in and out: safetensors -> this rank's shards -> safetensors.

No rank ever holds the whole model: loading reads only the slices that a rank keeps, export gathers one tensor at a
time. Names are those of the checkpoint, so nothing is renamed. Nothing here can run code from a file.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from notus.chat import read_json
from notus.data import file_digest
from notus.distributed import World, full_tensor, gather
from notus.model import Mistral, MistralConfig

COPIED = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "LICENSE",
)  # fmt: skip
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # in a safetensors header


def meta_model(config: MistralConfig) -> Mistral:
    """The model without storage: its names and shapes, for checking, sharding and then filling."""
    with torch.device("meta"):
        return Mistral(config)


def weight_map(model_dir: str | Path) -> dict[str, Path]:
    """Tensor name -> file, by the index or from the single model.safetensors."""
    model_dir = Path(model_dir)
    index, single = model_dir / "model.safetensors.index.json", model_dir / "model.safetensors"
    if index.is_file():
        try:
            return {name: model_dir / file for name, file in read_json(index)["weight_map"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: not a safetensors index: {error!r}") from None
    if single.is_file():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    raise ValueError(f"{model_dir}: no weights: neither model.safetensors nor model.safetensors.index.json")


def check_weights(model_dir: str | Path, config: MistralConfig) -> dict[str, Path]:
    """The weight map, after comparing every name and shape with the config; reads headers only, no weight."""
    files = weight_map(model_dir)
    expected = {name: tuple(parameter.shape) for name, parameter in meta_model(config).named_parameters()}
    for what, names in (("lack", expected.keys() - files), ("have, unknown to a Mistral,", files.keys() - expected)):
        if names:
            raise ValueError(f"{model_dir}: the weights {what} {len(names)} tensors, e.g. {min(names)}")
    for path in sorted(set(files.values())):
        with _open(path) as file:
            held = set(file.keys())
            for name in (name for name, where in files.items() if where == path):
                if name not in held:
                    raise ValueError(f"{path}: {name} is missing, though the index says that it is here")
                shape = tuple(file.get_slice(name).get_shape())
                if shape != expected[name]:
                    raise ValueError(f"{path}: {name} is {shape}, but config.json makes it {expected[name]}")
    return files


def _open(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: cannot be opened as safetensors: {error}") from None


@torch.no_grad()
def load_weights(model: Mistral, model_dir: str | Path, device: torch.device) -> None:
    """Fill a `meta_model`, sharded or not, on `device`. Its dtype stays, whatever the files hold: float32 for training,
    since at a learning rate of 5e-7 bfloat16 weights would hardly move. Every rank reads its own rows and no others."""
    files = check_weights(model_dir, model.config)
    model.to_empty(device=device)
    by_file = sorted(model.named_parameters(), key=lambda item: (files[item[0]], item[0]))
    opened: tuple[Path, object] | None = None
    for name, parameter in by_file:
        if opened is None or opened[0] != files[name]:
            opened = files[name], _open(files[name])
        rows = opened[1].get_slice(name)
        if isinstance(parameter, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            parameter.to_local().copy_(rows[offset[0] : offset[0] + shape[0]])
        else:
            parameter.copy_(rows[:])


def digest(model_dir: str | Path, world: World, memory_dir: str | Path) -> str:
    """sha256 over the weight files' names and contents: what names a base in the reference cache and the model card.

    The files are shared out over ranks, and digests are remembered in `memory_dir` by path, size and time of change, so
    that the 14.5 GB of a 7B are hashed once. All ranks call.
    """
    memory = Path(memory_dir) / "digests.json"
    remembered = read_json(memory)
    files = sorted(set(weight_map(model_dir).values()))
    mine = {}
    for path in files[world.rank :: world.size]:
        status = path.stat()
        identity = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
        mine[path.name] = identity, remembered.get(identity) or file_digest(path)
    digests = {name: found for ranks in gather(world, mine) for name, found in ranks.items()}
    if world.rank == 0:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with memory.with_suffix(".lock").open("w") as lock:  # other runs use the folder too
            fcntl.flock(lock, fcntl.LOCK_EX)
            write_atomically(memory, json.dumps(read_json(memory) | dict(digests.values()), indent=1))
    lines = "".join(f"{digests[path.name][1]}  {path.name}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


# --- export --------------------------------------------------------------------------------------------------------


def export(
    model: Mistral,
    base_dir: str | Path,
    output_dir: str | Path,
    dtype: torch.dtype,
    card: str,
    rank: int = 0,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a directory that every Hugging Face tool loads. All ranks call; rank 0 writes.

    Tokenizer files are copied byte for byte from the base, config.json key for key (dtype and use_cache aside). It is
    built under a temporary name and renamed when complete and on disk.
    """
    base_dir, output_dir = Path(base_dir), Path(output_dir)
    building = output_dir.with_name(output_dir.name + ".tmp")
    if rank == 0:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        for name in COPIED:
            if (base_dir / name).is_file():
                shutil.copyfile(base_dir / name, building / name)
        config = exported_config(read_json(base_dir / "config.json"), dtype)
        (building / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (building / "README.md").write_text(card)
    write_weights(model, building, dtype, rank, max_shard_bytes)
    if rank == 0:
        for path in building.iterdir():
            fsync(path)
        fsync(building)
        shutil.rmtree(output_dir, ignore_errors=True)  # an earlier export of a run that went on
        building.replace(output_dir)
        fsync(output_dir.parent)


def exported_config(base: dict, dtype: torch.dtype) -> dict:
    """The base's config.json with the new dtype, and `use_cache` on: training scripts leave it off, and every
    generation then reads the whole text anew. A file in transformers 5's spelling gets version 4's beside it, which
    would otherwise take rope_theta for 10000 without a word."""
    config = dict(base)
    name = str(dtype).removeprefix("torch.")
    for key in [key for key in ("torch_dtype", "dtype") if key in base] or ["torch_dtype"]:
        config[key] = name
    config["use_cache"] = True
    rope = base.get("rope_parameters") or {}
    if "rope_theta" in rope and "rope_theta" not in base:
        config["rope_theta"] = rope["rope_theta"]
        config.setdefault("torch_dtype", name)
    return config


def write_weights(model: Mistral, directory: Path, dtype: torch.dtype, rank: int, max_shard_bytes: int) -> None:
    """model.safetensors, or with more than `max_shard_bytes` model-0000k-of-0000n.safetensors and their index."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    filled = total = 0
    for name, parameter in model.named_parameters():
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
        chunks = _safetensors(shard, dtype)
        if rank == 0:
            with (directory / file).open("wb") as out:
                for chunk in chunks:
                    out.write(chunk)
        else:
            for _ in chunks:  # take part in gathering
                pass


def _safetensors(tensors: list[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[bytes | np.ndarray]:
    """The bytes of a .safetensors file, one tensor in memory at a time: length of the header (u64, little-endian), the
    header as JSON padded to 8 bytes, the tensors one after another (https://github.com/huggingface/safetensors)."""
    header: dict = {"__metadata__": {"format": "pt"}}  # older transformers refuse files that do not say so
    offset = 0
    for name, tensor in tensors:
        end = offset + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in tensors:
        whole = full_tensor(tensor.detach()).to(dtype).cpu().contiguous()
        yield whole.view(-1).view(torch.uint8).numpy()


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Complete or not at all: under a temporary name, to the disk, then renamed."""
    building = path.with_name(path.name + ".tmp")
    building.write_text(text, encoding="utf-8")
    fsync(building)
    building.replace(path)
    fsync(path.parent)
