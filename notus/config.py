"""Settings: frozen dataclasses <- one TOML file <- `section.key=value` from the command line.

    configs/demo.toml        command line
    [dpo]                    dpo.beta=0.05
    beta = 0.1          <-   data.train='["a.jsonl", "b.jsonl"]'   ->   Config(dpo=DPO(beta=0.05, ...), ...)

Everything is checked here, before a weight is read: an unknown name, a wrong type, a value out of range or two values
that contradict each other is a ValueError that says where it was written. After `load` nothing changes: what a run used
is what `to_toml` prints. Names are TRL's where the idea is shared. Model dimensions are not settings; the checkpoint's
own config.json has them.
"""

import json
import re
import tomllib
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_origin


def setting(doc: str, default: Any = MISSING, within: str = "") -> Any:
    """A field with its one-line `doc`; `within` is the permitted interval in mathematical notation, e.g. "[0, 0.5)"."""
    return field(default=default, metadata={"doc": doc, "within": within})


@dataclass(frozen=True, kw_only=True)
class Model:
    path: str = setting("Hugging Face directory of the SFT base: where the policy starts and what the reference is")


@dataclass(frozen=True, kw_only=True)
class Data:
    train: tuple[str, ...] = setting("JSONL of preference pairs, as binarize.py writes it")
    test: tuple[str, ...] = setting("held-out pairs for evaluation; may be empty", ())
    max_length: int = setting("tokens of prompt + answer; longer pairs are truncated as in TRL 0.7", 1024, "[2, inf)")
    max_prompt_length: int = setting("tokens kept, from the end, of the prompt of a pair too long", 512, "[1, inf)")
    bos: bool = setting("one <s> before the prompt, as in the training of the SFT base", True)
    cache_dir: str = setting("token ids of the files above, made once; shared by all runs", "runs/tokens")
    drop_bad_pairs: bool = setting("leave out pairs with equal or empty answers; false stops at the first", False)
    insert_system: bool = setting("insert a system turn where the first turn is not one, as Zephyr's SFT had", True)
    system_prompt: str = setting("of the inserted system turn; empty in Zephyr and Notus", "")


@dataclass(frozen=True, kw_only=True)
class DPO:
    beta: float = setting("strength of the pull towards the reference (Rafailov et al. 2023, eq. 7)", 0.1, "(0, inf)")
    label_smoothing: float = setting("assumed share of pairs labelled the wrong way round; 0 is DPO", 0.0, "[0, 0.5)")


@dataclass(frozen=True, kw_only=True)
class Train:
    output_dir: str = setting("directory of this run: checkpoints, metrics.jsonl, the exported model")
    learning_rate: float = setting("peak, at the end of warmup; then linear to 0", 5e-7, "(0, inf)")
    optimizer: Literal["rmsprop", "adamw"] = setting(
        "rmsprop is the original's; its first steps are 10x the rate, so warm up", "rmsprop"
    )
    weight_decay: float = setting("decoupled for adamw, added to the gradient for rmsprop", 0.0, "[0, inf)")
    warmup_ratio: float = setting("share of all steps over which the rate rises from 0", 0.1, "[0, 1]")
    num_train_epochs: int = setting("passes over the pairs, each in its own order", 3, "[1, inf)")
    pairs_per_step: int = setting("global, over all GPUs; the original's 8 GPUs x 8", 64, "[1, inf)")
    micro_batch_tokens: int = setting(
        "stream tokens per GPU and micro-batch; changes speed and memory, never the result", 16384, "[1, inf)"
    )
    max_grad_norm: float = setting("global L2 norm at which gradients are clipped", 1.0, "(0, inf)")
    seed: int = setting("orders the pairs, with the epoch", 42, "[0, inf)")
    compute_dtype: Literal["bfloat16", "float32"] = setting(
        "of matmuls and activations; masters and optimizer are always float32", "bfloat16"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto: cuda where there is one", "auto")
    activation_checkpointing: Literal["auto", "none", "elementwise", "half", "full"] = setting(
        "what backward computes again; auto: the least that fits", "auto"
    )
    compile: bool = setting("torch.compile each layer: a minute at the start, fewer passes over memory after", False)
    eval_steps: int = setting("steps between evaluations on data.test", 100, "[1, inf)")
    log_steps: int = setting("steps between lines of metrics.jsonl", 1, "[1, inf)")
    save_steps: int = setting("steps between checkpoints, written while training goes on", 100, "[1, inf)")
    keep_checkpoints: int = setting("newest checkpoints kept; 8 bytes a parameter each, 12 with adamw", 2, "[1, inf)")
    max_skipped_steps: int = setting("steps in a row with a non-finite gradient that end the run", 3, "[1, inf)")
    export_dtype: Literal["bfloat16", "float32"] = setting("of the weights in the exported model", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Reference:
    cache_dir: str = setting("log-probs of the base, one record per pair; shared by all runs", "runs/reference")


@dataclass(frozen=True, kw_only=True)
class Distributed:
    replicate: int = setting("copies of the sharded model (HSDP), e.g. one a node; divides the GPUs", 1, "[1, inf)")
    cpu_offload: bool = setting("keep shards and optimizer state in host memory: slow, for small cards", False)
    timeout_minutes: float = setting("a rank that does not answer for so long ends the run", 10.0, "(0, inf)")


@dataclass(frozen=True, kw_only=True)
class Config:
    model: Model
    data: Data
    dpo: DPO
    train: Train
    reference: Reference
    distributed: Distributed


SETTINGS: dict[str, Field] = {f"{s.name}.{f.name}": f for s in fields(Config) for f in fields(s.type)}


# What may differ when a run goes on: where things are, what is measured, and how the same result is computed.
FREE_ON_RESUME = {
    "model.path", "data.train", "data.test", "data.cache_dir", "reference.cache_dir", "train.output_dir",
    "train.device", "train.compile", "train.micro_batch_tokens", "train.activation_checkpointing", "train.eval_steps",
    "train.log_steps", "train.save_steps", "train.keep_checkpoints", "train.max_skipped_steps", "train.export_dtype",
    "distributed.replicate", "distributed.cpu_offload", "distributed.timeout_minutes",
}  # fmt: skip


def identity(config: Config) -> dict[str, Any]:
    """The settings, by name, that a run must keep to go on as itself."""
    return {name: value for name, value in flat(config).items() if name not in FREE_ON_RESUME}


def flat(config: Config) -> dict[str, Any]:
    return {name: getattr(getattr(config, name.partition(".")[0]), name.partition(".")[2]) for name in SETTINGS}


def load(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read the TOML file at `path`, lay `overrides` over it (`section.key=value`, with or without `--`; the last one
    wins) and check. An override's value is TOML, or bare text where the setting is text. ValueError on any problem.
    """
    entries = read_file(Path(path)) | dict(map(parse_override, overrides or []))
    values = {}
    for name, (value, where) in entries.items():
        if name not in SETTINGS:
            raise ValueError(f"{where}: unknown setting {name}; {suggestion(name)}")
        values[name] = convert(name, value, where)
    for name, f in SETTINGS.items():
        if f.default is MISSING and not values.get(name):
            raise ValueError(f"{path}: {name} is required ({f.metadata['doc']}); set it there or add {name}=...")

    def section(s: Field) -> Any:
        return s.type(**{f.name: values[n] for f in fields(s.type) if (n := f"{s.name}.{f.name}") in values})

    config = Config(**{s.name: section(s) for s in fields(Config)})
    check(config, {name: where for name, (_, where) in entries.items()})
    return config


def read_file(path: Path) -> dict[str, tuple[Any, str]]:
    """{"section.key": (value, "file:line")}. A key outside any section, or an empty unknown section, keeps its bare
    name, which no setting has."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"{path}: {error}") from error

    lines, header = {}, ""  # by the plain spellings, `[section]` and `key =`; for others the file's name must do
    for number, line in enumerate(text.splitlines(), 1):
        if match := re.match(r"\s*\[\s*([\w-]+)\s*\]", line):
            header = match[1] + "."
            lines.setdefault(match[1], number)
        elif match := re.match(r"\s*([\w.-]+)\s*=", line):
            lines.setdefault(header + match[1], number)

    known = {s.name for s in fields(Config)}
    flat = {}
    for section, table in tree.items():
        if isinstance(table, dict) and (table or section in known):
            flat |= {f"{section}.{key}": value for key, value in table.items()}
        else:
            flat[section] = table
    return {name: (value, f"{path}:{lines[name]}" if name in lines else str(path)) for name, value in flat.items()}


def parse_override(argument: str) -> tuple[str, tuple[Any, str]]:
    name, equals, text = argument.removeprefix("--").partition("=")
    if not equals:
        raise ValueError(f"command line: {argument!r} is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    # Text needs no quotes, even where it looks like something else: model.path=2024 is a directory.
    if name in SETTINGS and SETTINGS[name].type not in (bool, int, float) and not isinstance(value, str | list):
        value = text
    return name, (value, "command line")


def convert(name: str, value: Any, where: str) -> Any:
    """`value` as the type of setting `name`, inside its interval."""
    kind, within = SETTINGS[name].type, SETTINGS[name].metadata["within"]
    if kind is float and type(value) is int:
        value = float(value)
    if kind == tuple[str, ...] and isinstance(value, str):
        value = [value] if value else []

    if get_origin(kind) is Literal:
        ok = value in get_args(kind)
    elif kind == tuple[str, ...]:
        ok = isinstance(value, list) and all(isinstance(item, str) and item for item in value)
    else:
        ok = type(value) is kind  # not isinstance: true is no int here
    if not ok:
        raise ValueError(f"{where}: {name} must be {describe(kind)}, not {value!r}")
    if within and not contains(within, value):
        raise ValueError(f"{where}: {name} = {value!r} is outside {within}")
    return tuple(value) if kind == tuple[str, ...] else value


def contains(interval: str, value: float) -> bool:
    low, high = (float(end) for end in interval[1:-1].split(","))
    return (low < value or (low == value and interval[0] == "[")) and (
        value < high or (value == high and interval[-1] == "]")
    )


def check(config: Config, where: dict[str, str]) -> None:
    """What no setting can tell alone."""

    def refuse(message: str, *names: str) -> None:
        places = ", ".join(dict.fromkeys(where.get(name, "default") for name in names))
        raise ValueError(f"{places}: {message}")

    data = config.data
    if data.max_prompt_length >= data.max_length:
        refuse(
            f"data.max_prompt_length = {data.max_prompt_length} must be below data.max_length = {data.max_length}, "
            "or a long prompt would leave no token for the answers",
            "data.max_prompt_length",
            "data.max_length",
        )
    if data.system_prompt and not data.insert_system:
        refuse(
            f"data.system_prompt = {data.system_prompt!r} would never be used: data.insert_system is false",
            "data.system_prompt",
            "data.insert_system",
        )


def suggestion(name: str) -> str:
    """The nearest setting by its last part (so a right key in the wrong section is found), or the choice there is."""
    section, _, key = name.rpartition(".")
    by_key = {n.rpartition(".")[2]: n for n in SETTINGS}
    if near := get_close_matches(key, by_key, n=1):
        return f"did you mean {by_key[near[0]]}?"
    keys = [n.rpartition(".")[2] for n in SETTINGS if n.startswith(f"{section}.")]
    if keys:
        return f"[{section}] has {', '.join(keys)}"
    return f"sections are {', '.join(s.name for s in fields(Config))}"


def describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(kind))
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        tuple[str, ...]: "a path or a list of paths",
    }[kind]


def to_toml(config: Config) -> str:
    """Every setting with its value; `load` reads it back as an equal Config."""
    sections = [(s.name, getattr(config, s.name)) for s in fields(Config)]
    return "\n".join(
        f"[{name}]\n" + "".join(f"{f.name} = {to_toml_value(getattr(section, f.name))}\n" for f in fields(section))
        for name, section in sections
    )


def to_toml_value(value: Any) -> str:
    # JSON's strings, numbers, booleans and lists of strings are TOML's too; only DEL must be escaped for TOML.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def help_text() -> str:
    """Every setting with its default, type, permitted interval and meaning: the body of --help."""
    text = "Settings: `key = value` under [section] in the TOML file, or section.key=value on the command line.\n"
    for s in fields(Config):
        text += f"\n[{s.name}]\n"
        for f in fields(s.type):
            default = "(required)" if f.default is MISSING else f"= {to_toml_value(f.default)}"
            within = f" in {f.metadata['within']}" if f.metadata["within"] else ""
            text += f"  {f.name} {default}\n      {describe(f.type)}{within}: {f.metadata['doc']}\n"
    return text
