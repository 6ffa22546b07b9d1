"""Settings: frozen dataclasses <- one TOML file <- `section.key=value` from the command line.

    configs/demo.toml        command line
    [dpo]                    dpo.beta=0.05
    beta = 0.1          <-   data.train='["a.jsonl", "b.jsonl"]'   ->   Config(dpo=DPO(beta=0.05, ...), ...)

Every setting is checked here, before any weight is read. An unknown name, a wrong type, a value out of range, or two
values that contradict each other is a ValueError that says where the value was written. A file can build on another
one: `extends = "other.toml"`, relative to the file that says so. `to_toml` prints the settings that a run used.
Names are TRL's where the idea is the same. Model dimensions are not settings; they are in the checkpoint's config.json.
This file and files.py import only the standard library, so that a typo is refused at once.
"""

import argparse
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from notus.files import SHARED, read_text, sentence

MAX_GPUS = 100_000  # to plan for
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # that LoRA can learn
TRACKERS = ("tensorboard", "wandb", "trackio")
CONFIGS = SHARED / "configs"


def setting(doc: str, default: Any = MISSING, within: str = "", path: bool = False) -> Any:
    """A field with a one-line `doc`. `within` is the permitted interval in mathematical notation, e.g. "[0, 0.5)".
    In a `path`, a leading ~ is expanded."""
    return field(default=default, metadata={"doc": doc, "within": within, "path": path})


@dataclass(frozen=True, kw_only=True)
class Model:
    path: str = setting("Hugging Face directory of the SFT model: the starting point, and the reference", path=True)
    hub_id: str = setting("its id on the Hub, owner/name, for the model card; empty: as the Hub's cache says", "")


@dataclass(frozen=True, kw_only=True)
class Data:
    train: tuple[str, ...] = setting("files of preference pairs to train on: JSON, CSV or parquet", path=True)
    test: tuple[str, ...] = setting("files of held-out pairs for evaluation; may be empty", (), path=True)
    test_size: float = setting(
        "without data.test: share of rows to hold out, or from 1 on their number", 0.0, "[0, inf)"
    )
    max_length: int = setting("tokens of prompt + answer; longer pairs are truncated as in TRL 0.7", 1024, "[2, inf)")
    max_prompt_length: int = setting("tokens kept of the prompt, from its end, if a pair is too long", 512, "[1, inf)")
    bos: bool = setting("start every prompt with <s>, as in the SFT", True)
    cache_dir: str = setting("token ids of the files above; runs share it", "runs/tokens", path=True)
    drop_bad_pairs: bool = setting("drop pairs with equal or empty answers; false stops at the first one", False)
    insert_system: bool = setting("add a system turn if the first turn is not one, as in Zephyr's SFT", True)
    system_prompt: str = setting("text of the added system turn; empty in Zephyr and Notus", "")
    hub_ids: tuple[str, ...] = setting("ids of the data sets on the Hub, owner/name, for the model card", ())


@dataclass(frozen=True, kw_only=True)
class DPO:
    loss: Literal["dpo", "dpo_norm", "ipo", "simpo", "apo_zero"] = setting("python -m notus.losses shows each", "dpo")
    beta: float = setting(
        "pull towards the reference (Rafailov et al. 2023, eq. 7); each loss needs its own", 0.1, "(0, inf)"
    )
    label_smoothing: float = setting("assumed share of pairs with swapped labels; 0 is plain DPO", 0.0, "[0, 0.5)")
    margin: float = setting("of simpo: its gamma, by how much reward the chosen answer must lead", 0.0, "[0, inf)")
    nll_weight: float = setting("adds so many times the chosen answer's -log pi a token (RPO)", 0.0, "[0, inf)")
    reference: str = setting("Hugging Face directory of another reference; empty: model.path", "", path=True)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    rank: int = setting(
        "of what each target matrix learns, with the base frozen; 0 trains all weights", 0, "[0, 65536]"
    )
    alpha: float = setting("what is learned is scaled by alpha / rank", 16.0, "(0, inf)")
    targets: tuple[str, ...] = setting(f"linear layers, of {', '.join(LAYERS)}", LAYERS[:4])
    export: Literal["merged", "adapter"] = setting(
        "a whole model, or what was learned alone, in PEFT's format", "merged"
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    output_dir: str = setting("folder of this run: checkpoints, metrics.jsonl, the exported model", path=True)
    learning_rate: float = setting("highest rate, at the end of warmup; it then falls to 0", 5e-7, "(0, inf)")
    schedule: Literal["linear", "cosine"] = setting(
        "how it falls: in a straight line, or along half a cosine", "linear"
    )
    optimizer: Literal["rmsprop", "adamw"] = setting(
        "rmsprop is the original's; its first steps are up to 10 times learning_rate, so use warmup", "adamw"
    )
    weight_decay: float = setting("decoupled for adamw, added to the gradient for rmsprop", 0.0, "[0, inf)")
    warmup_ratio: float = setting("share of all steps in which the rate rises from 0", 0.1, "[0, 1]")
    num_train_epochs: int = setting("passes over the pairs, each in a different order", 3, "[1, inf)")
    pairs_per_step: int = setting("pairs in one optimizer step, over all GPUs", 64, "[1, inf)")
    micro_batch_tokens: int = setting(
        "tokens in one micro-batch of one GPU; changes speed and memory, never the result", 16384, "[1, inf)"
    )
    max_grad_norm: float = setting("gradients are clipped to this global L2 norm", 1.0, "(0, inf)")
    seed: int = setting(
        "decides LoRA's first weights and, with the epoch, the order of the pairs", 42, "[0, 4294967296)"
    )
    compute_dtype: Literal["bfloat16", "float32"] = setting(
        "of matmuls, activations and frozen weights; trained weights and their state are float32", "bfloat16"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto uses cuda if there is a GPU", "auto")
    activation_checkpointing: Literal["auto", "none", "elementwise", "half", "full"] = setting(
        "what backward recomputes; auto: the least that fits", "auto"
    )
    compile: bool = setting("torch.compile each layer; takes a minute at the start, then steps are faster", False)
    eval_steps: int = setting("steps between evaluations on data.test", 100, "[1, inf)")
    sample_prompts: int = setting("held-out prompts that are answered at every evaluation; 0: none", 2, "[0, 1000]")
    log_steps: int = setting("steps between lines of metrics.jsonl", 1, "[1, inf)")
    save_steps: int = setting("steps between checkpoints, which are written while training continues", 100, "[1, inf)")
    keep_checkpoints: int = setting("most recent checkpoints to keep; 8 bytes a parameter, 12 for adamw", 2, "[1, inf)")
    max_skipped_steps: int = setting("stop after this many non-finite gradients in a row", 3, "[1, inf)")
    export_dtype: Literal["bfloat16", "float32"] = setting("of the exported model; an adapter is float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Log:
    to: tuple[str, ...] = setting(f"trackers that get every line as well, of {', '.join(TRACKERS)}", ())


@dataclass(frozen=True, kw_only=True)
class Reference:
    cache_dir: str = setting("reference log-probs, one record a pair; runs share it", "runs/reference", path=True)


@dataclass(frozen=True, kw_only=True)
class Distributed:
    replicate: int = setting("copies of the sharded model (HSDP), e.g. one a node; divides the GPUs", 1, "[1, inf)")
    reshard_after_forward: bool = setting(
        "free a layer between forward and backward; false is less traffic, for 2 bytes a parameter of memory", True
    )
    cpu_offload: bool = setting("keep shards and optimizer state in host memory; slow, for small GPUs", False)
    timeout_minutes: float = setting("stop when a rank has not answered for this long", 10.0, "(0, 1e6]")


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    data: Data
    dpo: DPO
    lora: LoRA
    train: Train
    log: Log
    reference: Reference
    distributed: Distributed


# By dpo.loss: the usual range of its beta, and its settings besides. losses.py has the formulas; this file is read
# before torch is.
LOSSES = {
    "dpo": ("0.01 to 0.5", ("label_smoothing",)),
    "dpo_norm": ("2 to 10", ("label_smoothing",)),
    "ipo": ("0.01 to 1", ()),
    "simpo": ("2 to 10", ("margin",)),
    "apo_zero": ("0.05 to 0.5", ()),
}

BELONGS_TO = {"dpo.beta": "dpo.loss", "model.hub_id": "model.path", "data.hub_ids": "data.train"}

SECTIONS: dict[str, Any] = {s.name: s.type for s in fields(Config)}
SETTINGS: dict[str, Field] = {f"{section}.{f.name}": f for section, kind in SECTIONS.items() for f in fields(kind)}


# May differ when a run resumes: where things are, what is measured, and how the same result is computed.
FREE_ON_RESUME = {
    "model.path", "model.hub_id", "dpo.reference", "data.train", "data.test", "data.cache_dir", "data.hub_ids",
    "reference.cache_dir", "lora.export", "train.output_dir",
    "train.device", "train.compile", "train.micro_batch_tokens", "train.activation_checkpointing", "train.eval_steps",
    "train.sample_prompts", "train.log_steps", "train.save_steps", "train.keep_checkpoints", "train.max_skipped_steps",
    "train.export_dtype",
    "log.to", "distributed.replicate", "distributed.reshard_after_forward", "distributed.cpu_offload",
    "distributed.timeout_minutes",
}  # fmt: skip


def identity(config: Config) -> dict[str, Any]:
    """The settings, by name, that must stay the same when a run resumes."""
    return {name: value for name, value in flat(config).items() if name not in FREE_ON_RESUME}


def flat(config: Config) -> dict[str, Any]:
    return {name: getattr(getattr(config, name.partition(".")[0]), name.partition(".")[2]) for name in SETTINGS}


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """Split the words of a command line, without its flags, into the config file (or None) and the overrides.

    Only the first word can be the file. The overrides keep their order, and in `load` the last one of a setting wins.
    A word that is neither is a ValueError.
    """
    overrides = list(words)
    path = overrides.pop(0) if overrides and is_config_path(overrides[0]) else None
    for override in overrides:
        parse_override(override)
    return path, overrides


class CommandLine(NamedTuple):
    """What train.py was asked to do."""

    config: Config
    fresh: bool
    print_config: bool
    dry_run: bool
    gpus: int | None


def command_line(argv: Sequence[str], description: str | None, early: bool = False) -> CommandLine:
    """train.py's arguments, with its settings read and checked. ValueError for bad input; with `early`, when nobody
    would catch it, the error is printed and the process ends with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=description, epilog=help_text(), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("config", nargs="?", help="a TOML file (default: configs/demo.toml)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--fresh", action="store_true", help="move what is in train.output_dir aside and start again")
    parser.add_argument("--print-config", action="store_true", help="print all settings as TOML and stop")
    parser.add_argument("--dry-run", action="store_true", help="check data and tokenizer, print the cost, and stop")
    parser.add_argument("--gpus", type=int, metavar="N", help="for --dry-run: GPUs to plan for (torchrun's, else 8)")
    arguments, extra = parser.parse_known_args(argv)
    given = {arguments.config, *arguments.overrides, *extra}
    try:
        if arguments.gpus is not None and not 1 <= arguments.gpus <= MAX_GPUS:
            raise ValueError(f"command line: --gpus {arguments.gpus}: must be from 1 to {MAX_GPUS:,}")
        path, overrides = split_words([word for word in argv if word in given])  # in their order: the last one wins
        config = load(path or CONFIGS / "demo.toml", overrides)
    except ValueError as error:
        if not early:
            raise
        print(f"train.py: error: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
    return CommandLine(config, arguments.fresh, arguments.print_config, arguments.dry_run, arguments.gpus)


def is_config_path(word: str) -> bool:
    """Is this first word a file? `data.train=x.toml` is not, `runs/lr=1/config.toml` is, whether or not it exists."""
    if os.path.isfile(word):
        return True
    if not word or word.startswith("-"):
        return False
    name, equals, _ = word.partition("=")
    in_section = name.partition(".")[0] in SECTIONS
    if word.endswith(".toml"):
        return not (equals and in_section)
    return not equals and not in_section


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read the TOML file at `path`, replace settings by `overrides`, and check the result.

    An override is `section.key=value`, with or without a leading `--`. Its value is TOML, or plain text for a setting
    that is text. The last override of a setting wins. Any problem is a ValueError.
    """
    entries = replaced(read_file(Path(os.path.expanduser(path))), dict(map(parse_override, overrides)))
    values = {}
    for name, (value, where) in entries.items():
        if name not in SETTINGS:
            raise ValueError(f"{where}: unknown setting {name}; {suggestion(name)}")
        values[name] = convert(name, value, where)
    for name, f in SETTINGS.items():
        if f.default is MISSING and not values.get(name):
            raise ValueError(f"{path}: {name} is required ({f.metadata['doc']}); set it there or add {name}=...")

    def build(section: str) -> Any:
        names = [name for name in values if name.startswith(f"{section}.")]
        return SECTIONS[section](**{name.partition(".")[2]: values[name] for name in names})

    config = Config(**{section: build(section) for section in SECTIONS})
    check(config, {name: where for name, (_, where) in entries.items()})
    return config


def read_file(path: Path, extended_by: tuple[str, ...] = ()) -> dict[str, tuple[Any, str]]:
    """{"section.key": (value, "file:line")}, first from the file that this one extends, then from this one.

    A key outside any section, or an empty unknown section, keeps its bare name, which is not the name of any setting.
    `extended_by` holds the real paths of the files that led here.
    """
    tree, lines = parse_file(path)
    entries: dict[str, Any] = {}
    for section, table in tree.items():
        if isinstance(table, dict) and (table or section in SECTIONS):
            entries |= {f"{section}.{key}": value for key, value in table.items()}
        else:
            entries[section] = table
    here = {name: (value, f"{path}:{lines[name]}" if name in lines else str(path)) for name, value in entries.items()}
    if "extends" not in here:
        return here

    extends, where = here.pop("extends")
    if not isinstance(extends, str):
        raise ValueError(f"{where}: extends must be the path of one file, not {shown(extends)}")
    base = path.parent / os.path.expanduser(extends)
    if not os.path.isfile(base):
        raise ValueError(f"{where}: extends = {extends!r}, but there is no file {base}")
    extended_by = (*extended_by, os.path.realpath(path))
    if os.path.realpath(base) in extended_by:
        raise ValueError(f"{where}: extends = {extends!r} leads back to the same file")
    return replaced(read_file(base, extended_by), here)


def replaced(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The entries `below` with those `above` in their place. Another loss, model or data do not inherit from below what
    belongs to the one there."""
    others = {name for name, (value, _) in above.items() if name not in below or below[name][0] != value}
    return {name: entry for name, entry in below.items() if BELONGS_TO.get(name) not in others} | above


def parse_file(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The TOML tree, and line numbers by "section.key". Only the plain spellings `[section]` and `key =` have one."""
    text = read_text(path).removeprefix("\ufeff")  # some editors put a byte order mark there
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error
    except (ValueError, RecursionError) as error:  # from int(), or from tomllib's own recursion
        raise ValueError(f"{path}: a number has too many digits, or values are nested too deeply") from error

    lines: dict[str, int] = {}
    header = ""
    for number, line in enumerate(text.split("\n"), 1):
        if match := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            header = match[1] + "."
            lines.setdefault(match[1], number)
        elif match := re.match(r"\s*([\w.-]+)\s*=", line):
            lines.setdefault(header + match[1], number)
    return tree, lines


def parse_override(argument: str) -> tuple[str, tuple[Any, str]]:
    name, equals, text = argument.removeprefix("--").partition("=")
    if not equals:
        hint = f"write {name}=VALUE" if name in SETTINGS else suggestion(name)
        raise ValueError(f"command line: {shown(argument)} is not of the form section.key=value; {hint}")
    if "\n" in argument or "\r" in argument:  # TOML would read a second line as another setting
        raise ValueError(f"command line: {shown(argument)} has a line break; in text, write \\n between double quotes")
    if any("\ud800" <= character <= "\udfff" for character in argument):  # how Python passes bytes that are not UTF-8
        raise ValueError(f"command line: {shown(argument)} is not UTF-8")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    # Text needs no quotes, even if it looks like another type: model.path=2024 is a directory.
    kind = SETTINGS[name].type if name in SETTINGS else str
    if kind not in (bool, int, float) and not isinstance(value, (str, list) if kind == tuple[str, ...] else str):
        value = text
    return name, (value, "command line")


def convert(name: str, value: Any, where: str) -> Any:
    """`value` as the type of setting `name`, within its interval. Paths have their ~ expanded."""
    f = SETTINGS[name]
    within = f.metadata["within"]
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where}: {name} is a whole number beyond 64 bits")
    if f.type is float and type(value) is int:
        value = float(value)
    if f.type == tuple[str, ...] and isinstance(value, str):
        value = [value] if value else []
    if not fits(f, value):
        raise ValueError(f"{where}: {name} must be {describe(f)}, not {shown(value)}")
    if within and not contains(within, value):
        raise ValueError(f"{where}: {name} = {value!r} is outside {within}")
    if f.metadata["path"]:
        return expand(name, value, where)
    return tuple(value) if isinstance(value, list) else value


def fits(f: Field, value: Any) -> bool:
    if get_origin(f.type) is Literal:
        return value in get_args(f.type)
    if f.type == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(text, str) and text for text in value)
    if f.metadata["path"] and not value:
        return value == f.default
    return type(value) is f.type  # not isinstance: true is no int here


def expand(name: str, value: Any, where: str) -> Any:
    """One path, or a list of them as a tuple, with ~ expanded."""
    if isinstance(value, list):
        return tuple(expand(name, path, where) for path in value)
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise ValueError(f"{where}: {name} = {value!r}: there is no such home; write ./~ for a folder named ~")
    if "\0" in path:
        raise ValueError(f"{where}: {name} = {value!r} is not a path")
    return path


def contains(interval: str, value: float) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (low < value or (low == value and interval[0] == "[")) and (
        value < high or (value == high and interval[-1] == "]")
    )


def check(config: Config, where: dict[str, str]) -> None:
    """Checks that involve more than one value."""

    def refuse(message: str, *names: str) -> None:
        places = ", ".join(dict.fromkeys(where.get(name, "default") for name in names))
        raise ValueError(f"{places}: {message}")

    check_loss(config.dpo, where, refuse)
    data, lora = config.data, config.lora
    if wrong := [name for name in lora.targets if name not in LAYERS]:
        refuse(f"lora.targets has {shown(wrong[0])}; it must be of {', '.join(LAYERS)}", "lora.targets")
    if wrong := [name for name in config.log.to if name not in TRACKERS]:
        refuse(f"log.to has {shown(wrong[0])}; it must be of {', '.join(TRACKERS)}", "log.to")
    if lora.rank and not lora.targets:
        refuse(f"lora.rank = {lora.rank}, but lora.targets is empty, so nothing would be trained", "lora.targets")
    if lora.export == "adapter" and not lora.rank:
        refuse('lora.export = "adapter", but lora.rank = 0: there is no adapter without LoRA', "lora.export")
    if data.max_prompt_length >= data.max_length:
        refuse(
            f"data.max_prompt_length = {data.max_prompt_length} must be below data.max_length = {data.max_length}, "
            "or a long prompt would leave no token for the answers",
            "data.max_prompt_length",
            "data.max_length",
        )
    if data.system_prompt and not data.insert_system:
        refuse(
            f"data.system_prompt = {shown(data.system_prompt)} would never be used: data.insert_system is false",
            "data.system_prompt",
            "data.insert_system",
        )
    if data.test_size and data.test:
        refuse(
            f"data.test_size = {data.test_size:g} holds out rows of data.train, but data.test names held-out files; "
            "set one of the two",
            "data.test_size",
            "data.test",
        )
    if data.test_size >= 1 and data.test_size % 1:
        refuse(
            f"data.test_size = {data.test_size:g} must be a share below 1 or a whole number of rows", "data.test_size"
        )
    for name, ids in (("model.hub_id", [config.model.hub_id]), ("data.hub_ids", data.hub_ids)):
        if wrong := [text for text in ids if not re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)?", text, re.ASCII)]:
            refuse(f"{name} has {shown(wrong[0])}; an id on the Hub is owner/name", name)
    for name in ("train.output_dir", "data.cache_dir", "reference.cache_dir"):
        if os.path.realpath(path := flat(config)[name]) == os.path.realpath(config.model.path):
            refuse(f"{name} = {path!r} is the folder of the model, which is only read", name, "model.path")
    seen: dict[str, tuple[str, str]] = {}
    for name, paths in (("data.train", data.train), ("data.test", data.test)):
        for path in paths:
            real = os.path.realpath(path)
            if real in seen:
                other, spelled = seen[real]
                reason = "held-out pairs must not be trained on" if name != other else "its pairs would count twice"
                refuse(f"{name} has {path!r}, and {other} has {spelled!r}: the same file; {reason}", other, name)
            seen[real] = name, path


def check_loss(dpo: DPO, where: dict[str, str], refuse: Callable[..., None]) -> None:
    """A loss has a beta of its own, and none of the settings of the others."""
    beta, options = LOSSES[dpo.loss]
    if "dpo.loss" in where and "dpo.beta" not in where:
        refuse(f'dpo.loss = "{dpo.loss}" needs a dpo.beta beside it, usually {beta}: no beta suits all', "dpo.loss")
    if dpo.loss == "simpo" and "dpo.margin" not in where:
        refuse('dpo.loss = "simpo" needs a dpo.margin, usually 0.3 to 1.6; 0 is none', "dpo.loss")
    for name in ("label_smoothing", "margin"):
        if getattr(dpo, name) and name not in options:
            users = " and ".join(loss for loss, (_, used) in LOSSES.items() if name in used)
            refuse(
                f"dpo.{name} = {getattr(dpo, name):g} would never be used: only {users} can have it, and dpo.loss is "
                f'"{dpo.loss}"',
                f"dpo.{name}",
                "dpo.loss",
            )
    if dpo.reference and dpo.loss == "simpo":
        refuse(
            f'dpo.reference = {dpo.reference!r} would never be used: dpo.loss is "simpo", which has no reference',
            "dpo.reference",
            "dpo.loss",
        )


def suggestion(name: str) -> str:
    """The setting that was probably meant, by its last part, so that a right key in the wrong section is found; else
    the choice there is."""
    section, _, key = name.rpartition(".")
    if key in ("config", "toml"):
        return "give one config file, as the first word, without a flag"
    if key == "extends":
        return "write extends in a file, above its first [section]"
    if near := get_close_matches(key, {n.rpartition(".")[2] for n in SETTINGS}, n=1):
        same = [n for n in SETTINGS if n.endswith(f".{near[0]}")]
        return f"did you mean {f'{section}.{near[0]}' if f'{section}.{near[0]}' in same else ' or '.join(same)}?"
    if section in SECTIONS:
        return f"[{section}] has {', '.join(f.name for f in fields(SECTIONS[section]))}"
    return f"sections are {', '.join(SECTIONS)}"


def describe(f: Field) -> str:
    if get_origin(f.type) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(f.type))
    if f.metadata["path"]:
        return "a path" if f.type is str else "a path or a list of paths"
    words: dict[Any, str] = {
        bool: "true or false", int: "a whole number", float: "a number", str: "text",
        tuple[str, ...]: "a text or a list of texts",
    }  # fmt: skip
    return words[f.type]


def shown(value: Any) -> str:
    """`value` for an error message, cut to a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, or deep tables
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 100 else text[:100] + "..."


def to_toml(config: Config) -> str:
    """Every setting with its value. `load` reads it back as an equal Config."""
    return "\n".join(
        f"[{section}]\n" + "".join(f"{key} = {to_toml_value(value)}\n" for key, value in vars(values).items())
        for section, values in vars(config).items()
    )


def to_toml_value(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists of strings are also TOML's, except that TOML wants DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def help_text() -> str:
    """Every setting with its default, type, interval and meaning: the body of --help."""
    text = "Settings: `key = value` under [section] in the TOML file, or section.key=value on the command line.\n"
    for section, kind in SECTIONS.items():
        text += f"\n[{section}]\n"
        for f in fields(kind):
            default = "(required)" if f.default is MISSING else f"= {to_toml_value(f.default)}"
            within = f" in {f.metadata['within']}" if f.metadata["within"] else ""
            text += f"  {f.name} {default}\n      {describe(f)}{within}: {f.metadata['doc']}\n"
    return text
