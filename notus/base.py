"""A checkpoint directory in Hugging Face layout: what it is, and the one check for everyone who reads one.

Training, generation and evaluation all start from `read_base`, so a model that can be trained can also be asked. Of the
weights only the headers are read here.
"""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from notus.chat import ChatTemplate, check_template, load_chat_template
from notus.dims import MistralConfig
from notus.distributed import World, shard
from notus.files import checksum, file_digest, read_json, text_digest
from notus.lora import LoRA, add_lora, initialize
from notus.losses import PreferenceLoss
from notus.model import Mistral
from notus.tokenizer import Tokenizer, load_tokenizer
from notus.tokens import Encoder
from notus.weights import check_export, check_weights, copied_files, generation_config, load_weights, meta_model

FRAME_FILE = "notus.json"  # beside the weights of a model that notus trained; other tools ignore it
WEIGHTS = ".safetensors"  # read twice only where an answer depends on it, because they may be large


@dataclass(frozen=True)
class Frame:
    """How a model was trained to read and what its rewards mean, kept beside its weights in `notus.json`.

    system_prompt: of the inserted system turn; None inserts none. Lengths are in tokens.
    """

    bos: bool = True
    system_prompt: str | None = ""
    max_length: int = 1024
    max_prompt_length: int = 512
    beta: float = 0.1
    loss: str = "dpo"
    label_smoothing: float = 0.0
    margin: float = 0.0
    nll_weight: float = 0.0

    @property
    def preference_loss(self) -> PreferenceLoss:
        """ValueError as there."""
        return PreferenceLoss(self.loss, self.beta, self.label_smoothing, self.margin, self.nll_weight)


@dataclass(frozen=True)
class Base:
    path: Path
    dims: MistralConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    stop_ids: frozenset[int]  # EOS, and what generation_config.json or config.json adds to it
    frame: Frame | None  # as its training left it; None where notus did not train it
    checksums: dict[str, list[int]]  # of the files that its training wrote, by name; {} where notus did not train it
    notes: tuple[str, ...]  # what a user should know about the files, a sentence each

    def encoder(self, frame: Frame) -> Encoder:
        """Messages -> ids. ValueError if the chat template cannot be used with this frame."""
        self.frame_notes(frame)
        return Encoder(self.tokenizer, self.template, frame.bos, frame.system_prompt, self.dims.vocab_size)

    def frame_notes(self, frame: Frame) -> list[str]:
        """What a user should know about this template in this frame. ValueError if they cannot be used together."""
        return check_template(self.template, frame.system_prompt, frame.bos)

    @property
    def identity(self) -> dict[str, Any]:
        """By name, everything in the directory beside the weights that can change a number or a file of the result."""
        parts = {
            "config.json": read_json(self.path / "config.json"), "tokenizer": self.tokenizer.identity,
            "chat template": self.template.identity,
        }  # fmt: skip
        values = {f"{part}: {name}": value for part, values in parts.items() for name, value in values.items()}
        known = {"tokenizer.json", "tokenizer.model", "chat_template.jinja"}  # their digests are among the parts
        others = [path for path in copied_files(self.path) if path.name not in known]
        return values | {f"sha256 of {path.name}": file_digest(path) for path in others}


def read_base(model_dir: str | Path, need_weights: bool = True) -> Base:
    """ValueError names the file and the value that is wrong. With `need_weights=False` there need be no weights yet."""
    path = Path(model_dir)
    dims = MistralConfig.read(path)
    notes: list[str] = []
    if need_weights:
        _, derived = check_weights(path, dims)
        notes += [f"{len(derived)} rotary buffers in the weights are skipped: they are computed"] * bool(derived)
    tokenizer, template = load_tokenizer(path), load_chat_template(path)
    notes += tokenizer.warnings
    check_export(path)
    stop_ids = {tokenizer.eos_id, *generation_config(path)[1]}
    if tokenizer.vocab_size > dims.vocab_size:
        notes.append(
            f"the tokenizer has {tokenizer.vocab_size:,} ids and the embedding {dims.vocab_size:,} rows, which is fine "
            "as long as no id beyond the embedding is used"
        )
    frame, checksums = read_frame(path)
    check_files(path, {name: value for name, value in checksums.items() if not name.endswith(WEIGHTS)})
    return Base(path, dims, tokenizer, template, frozenset(stop_ids), frame, checksums, tuple(notes))


def write_frame(frame: Frame, directory: Path) -> None:
    """Write notus.json: the frame, and size and CRC-32 of every file beside it that can change an answer."""
    paths = [path for path in sorted(directory.iterdir()) if path.name not in ("README.md", "LICENSE")]
    with ThreadPoolExecutor() as threads:
        checksums = dict(zip((path.name for path in paths), threads.map(checksum, paths), strict=True))
    record = asdict(frame) | {"files": checksums}
    text = json.dumps(record | {"sha256": text_digest(json.dumps(record))}, indent=1)
    (directory / FRAME_FILE).write_text(text + "\n")


def check_files(directory: Path, checksums: dict[str, list[int]]) -> None:
    with ThreadPoolExecutor() as threads:
        found = threads.map(checksum, (directory / name for name in checksums))
        wrong = [name for name, value in zip(checksums, found, strict=True) if value != checksums[name]]
    if wrong:
        raise ValueError(
            f"{directory / wrong[0]}: not the file that training wrote, by its checksum in {FRAME_FILE}. Copy it "
            f"again. If it was changed on purpose, delete {FRAME_FILE}, and say with --bos, --system and --beta what "
            "differs from Zephyr's frame"
        )


def read_frame(model_dir: Path) -> tuple[Frame | None, dict[str, list[int]]]:
    """The frame in notus.json and the checksums of the files beside it; (None, {}) if there is no such file."""
    path = model_dir / FRAME_FILE
    if not os.path.lexists(path):
        return None, {}
    raw = read_json(path)
    if raw.pop("sha256", None) not in (None, text_digest(json.dumps(raw))):
        raise ValueError(f"{path}: fails its checksum. Copy it again, or delete it to use Zephyr's frame")
    kinds: dict[str, tuple[type, ...]] = {
        "bos": (bool,), "system_prompt": (str, type(None)), "max_length": (int,), "max_prompt_length": (int,),
        "beta": (float, int),
    }  # fmt: skip
    later = {name: getattr(Frame, name) for name in ("loss", "label_smoothing", "margin", "nll_weight")}
    kinds |= {name: (str,) if name == "loss" else (float, int) for name in later}
    raw = later | raw  # an earlier version had DPO alone
    for name, allowed in kinds.items():
        value = raw.get(name, ...)
        low = -sys.float_info.max if name in later else 0
        if type(value) not in allowed or (type(value) in (int, float) and not low < value <= sys.float_info.max):
            found = "missing" if value is ... else f"{value!r:.80}"
            raise ValueError(f"{path}: {name} is {found}; delete the file to use Zephyr's frame")
    values: dict[str, Any] = {name: float(raw[name]) if float in kind else raw[name] for name, kind in kinds.items()}
    frame = Frame(**values)
    try:
        _ = frame.preference_loss
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete the file to use Zephyr's frame") from None
    if frame.max_prompt_length >= frame.max_length:
        raise ValueError(
            f"{path}: max_prompt_length is {frame.max_prompt_length}, which must be below max_length "
            f"{frame.max_length}; delete the file to use Zephyr's frame"
        )
    checksums = raw.get("files", {})
    if not isinstance(checksums, dict):
        raise ValueError(f"{path}: files is {checksums!r:.80}; delete the file to use Zephyr's frame")
    return frame, checksums


def load_model(base: Base, device: torch.device, dtype: torch.dtype) -> Mistral:
    """The whole model on one device, for asking it. Weights go straight from the file into `dtype`: there is no float32
    copy, so a 7B takes 13.5 GiB in bfloat16. What notus trained is checked against the checksums of its training."""
    check_files(base.path, {name: value for name, value in base.checksums.items() if name.endswith(WEIGHTS)})
    model = meta_model(base.dims).to(dtype).requires_grad_(False)
    load_weights(model, base.path, device)
    return model


def load_sharded(
    base: Base, world: World, dtype: torch.dtype, cpu_offload: bool = False, recompute: str = "none",
    compile_layers: bool = False, *, reshard_after_forward: bool = True, frozen: bool = False,
    lora: LoRA | None = None, seed: int = 0,
) -> Mistral:  # fmt: skip
    """The model for training, in float32 shards that compute in `dtype`. All ranks call.

    With `lora` the base is frozen and kept in `dtype`, and LoRA's matrices are drawn from `seed`. A `frozen` model is
    for scoring alone. It has the same numbers as one for training, in half the memory where `dtype` is bfloat16.

    The order matters: the compiler must know what is recomputed, sharding must find the layers as they will run, and
    the weights are read last, by each rank its own rows. Nothing here renames a parameter.
    """
    model = meta_model(base.dims)
    if lora:
        add_lora(model, lora, dtype)
    elif frozen:
        model.to(dtype).requires_grad_(False)
    model.model.recompute = recompute
    if compile_layers:
        model.model.compile_layers()
    shard(model, model.model.layers, world, dtype, cpu_offload, reshard_after_forward)
    load_weights(model, base.path, torch.device("cpu") if cpu_offload else world.device)
    if lora:
        initialize(model, seed)
    return model
