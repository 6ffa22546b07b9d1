"""Malformed input: exit code 2 and one sentence, or the right result. Never a traceback, a hang or a written file.

A fuzzer. A case spoils one input of a small world (a base, its data, a configuration) in a way drawn from its seed, and
runs a command that reads it. What is accepted is read again by other means (transformers, safetensors, sentencepiece,
tomllib, or a few lines here) and must be the same. A failure prints its area and seed. To run one case again, or more
of them than the tests do:

    python tests/test_fuzz.py AREA FIRST_SEED COUNT
"""

import copy
import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import tomllib
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path
from stat import S_ISDIR
from typing import Any, Literal, NamedTuple, get_args, get_origin
from unittest import mock

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from tiny import save_base
from transformers import AutoTokenizer, GenerationConfig, MistralConfig, PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import binarize  # noqa: E402
import train  # noqa: E402
from notus import chat, config, evaluate, generate, plan, rows, run, weights  # noqa: E402
from notus.base import FRAME_FILE, Frame, load_model, read_base  # noqa: E402
from notus.chat import ZEPHYR_TEMPLATE, load_chat_template  # noqa: E402
from notus.tokenizer import load_tokenizer  # noqa: E402

CASES = 50  # of each area, in the tests
SECONDS = 20.0  # after which a case hangs
TEMPLATE_SECONDS = 2.0  # chat.MAX_SECONDS, where templates are spoiled
CPU = torch.device("cpu")

# --- the world -----------------------------------------------------------------------------------------------------

WORDS = "a b c d e f g h i j k l m n o"
CONFIG = """
[model]
path = "base"
[data]
train = "train.jsonl"
test = ["test.jsonl"]
max_length = 64
max_prompt_length = 32
cache_dir = "tokens"
drop_bad_pairs = false
[dpo]
beta = 0.1
[train]
output_dir = "out"
learning_rate = 1e-3
warmup_ratio = 0.1
pairs_per_step = 4
device = "cpu"
seed = 7
[reference]
cache_dir = "reference"
"""
FLAGS = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))


def write_lines(path: Path, values: list) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def make_world(folder: Path) -> Path:
    """Three bases, of which a case takes one, and one file of everything else that is read.

    base: as transformers 4 saves it. base5: in the spelling of version 5, in two shards with an index, with its added
    tokens in tokenizer_config.json. pieces: its tokenizer is a tokenizer.model.
    """
    base = save_base(folder / "base", WORDS, vocab_size=40)
    special = {f"{name}_token": {"content": text, **FLAGS} for name, text in (("bos", "<s>"), ("eos", "</s>"))}
    write_json(base / "special_tokens_map.json", special)
    write_json(base / "added_tokens.json", {"<extra>": 23})
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "transformers_version": "4.35.0"}
    write_json(base / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, **sampling})
    write_json(base / FRAME_FILE, asdict(Frame(max_length=64, max_prompt_length=32)))

    five = shutil.copytree(base, folder / "base5", ignore=shutil.ignore_patterns("added*", "special*"))
    raw = json.loads((five / "config.json").read_text())
    raw |= {"rope_parameters": {"rope_theta": raw.pop("rope_theta"), "rope_type": "default"}}
    write_json(five / "config.json", {**raw, "dtype": raw.pop("torch_dtype")})
    tensors, shards = load_file(five / "model.safetensors"), {}
    (five / "model.safetensors").unlink()
    for k in (1, 2):
        held = dict(sorted(tensors.items())[k - 1 :: 2])
        save_file(held, five / f"model-0000{k}-of-00002.safetensors", metadata={"format": "pt"})
        shards |= dict.fromkeys(held, f"model-0000{k}-of-00002.safetensors")
    write_json(five / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": shards})
    settings = json.loads((five / "tokenizer_config.json").read_text()) | {
        "added_tokens_decoder": {
            i: {"content": text, "special": True, **FLAGS} for i, text in ((1, "<s>"), (2, "</s>"), (23, "<extra>"))
        },
        "pad_token": "</s>", "model_max_length": 2048, "padding_side": "left", "add_bos_token": True, "legacy": False,
        "clean_up_tokenization_spaces": False, "additional_special_tokens": ["<extra>"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    write_json(five / "tokenizer_config.json", settings)

    shutil.copytree(base, folder / "pieces", ignore=shutil.ignore_patterns("tokenizer.json", "added*"))
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([WORDS, "<|user|> <|system|> <|assistant|>"]), model_writer=(made := io.BytesIO()),
        vocab_size=40, model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "pieces" / "tokenizer.model").write_bytes(made.getvalue())

    def pair(word: str) -> dict:
        answers = {"chosen": f"b {word}", "rejected": f"c {word} d"}
        return {side: [turn("user", f"a {word}"), turn("assistant", text)] for side, text in answers.items()}

    pairs = [pair(word) | {"score_chosen": 5.0} for word in "efghij"]
    pairs[1] = {"prompt": pairs[1]["chosen"][:1]} | {side: pairs[1][side][1:] for side in ("chosen", "rejected")}
    pairs[2] = {"instruction": "k l", "chosen_response": "m", "rejected_response": "n", "source": "x"}
    pairs[3]["prompt"] = pairs[3]["chosen"][0]["content"]
    user = turn("user", [{"type": "text", "text": "o "}, {"type": "text", "text": "p"}])
    pairs += [
        {"system": "k", "prompt": "l m", "chosen": "n", "rejected": "o"},
        {"input": {"messages": [user], "tools": []}, "preferred_output": [turn("assistant", "q")],
         "non_preferred_output": [turn("assistant", "r")]},
        {"conversations": [{"from": "human", "value": "s"}], "chosen": {"from": "gpt", "value": "t"},
         "rejected": {"from": "gpt", "value": "u"}},
    ]  # fmt: skip
    write_lines(folder / "train.jsonl", pairs)
    write_lines(folder / "test.jsonl", [pair("o")])
    write_lines(folder / "questions.jsonl", [{"instruction": f"a {w}", "correct_answers": [w, "b"]} for w in "cde"])

    def completion(n: int, i: int, rating: int) -> dict:
        notes = {aspect: {"Rating": str(rating), "Rationale": "r"} for aspect in ("honesty", "truthfulness")}
        return {"model": f"m{i}", "response": f"{n} {i}", "overall_score": 2.5 * i, "annotations": notes}

    ratings = ((1, 2), (2, 5), (3, 3))
    write_lines(folder / "raw.jsonl", [
        {"instruction": f"Say {n}.", "source": "flan", "completions": [completion(n, *each) for each in ratings]}
        for n in range(4)
    ])  # fmt: skip
    (folder / "run.toml").write_text(CONFIG)
    return folder


class Case(NamedTuple):
    draw: random.Random
    world: Path
    folder: Path  # where the command runs: a copy of the world, with one base

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def take(self, kind: str) -> str:
        shutil.rmtree(self.base, ignore_errors=True)
        shutil.copytree(self.world / kind, self.base)
        return kind


# --- how a value, bytes or a file is spoiled -----------------------------------------------------------------------

MARKS = {"@deep@": "[" * 100_000 + "]" * 100_000, "@huge@": "9" * 5000, "@open@": '{"a":' * 100_000}  # see as_json
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 40, 64, 2**31, 2**63, 2**64, 10**30, 0.5, 1e-5, -0.1, 1e308, math.nan,
    math.inf, -math.inf, "", " ", "x", "0", "1", "nan", "true", "null", "\ud800", "a\x00b", "</s>", "é" * 300,
    "x" * 100_000, "../x", "\u202e", "a\nb", [], {}, [[]], [None], [1], ["x"], {"content": 1}, {"a": {}}, *MARKS,
]  # fmt: skip
NAMES = ("tools", "tool_calls", "system", "rope_scaling", "quantization_config", "x", "", "\ud800")


def shown(value: Any) -> str:
    return f"{value!a:.60}"


def positions(value: Any, way: tuple = ()) -> Iterator[tuple]:
    yield way
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from positions(inner, (*way, key))


def retyped(value: Any) -> Any:
    """The same in another type, or the opposite."""
    match value:
        case bool():
            return not value
        case int() | float():
            return -value if value > 0 else value + 1
        case str():
            return list(value)
        case list():
            return {str(i): each for i, each in enumerate(value)}
        case dict():
            return [*map(list, value.items())]
    return [value]


def spoil_value(draw: random.Random, value: Any) -> tuple[str, Any]:
    """(what was done, a JSON value with one place of it changed)"""
    value = copy.deepcopy(value)
    way = draw.choice(list(positions(value)))
    old, outer = value, None
    for key in way:
        old, outer = old[key], old
    part = {k: v for k, v in old.items() if draw.random() < 0.8} if isinstance(old, dict) else draw.choice(JUNK)
    new = draw.choice([draw.choice(JUNK), draw.choice(JUNK), [old], {"content": old}, str(old), [old, old], part,
                       retyped(old), retyped(old)])  # fmt: skip
    new = copy.deepcopy(new)
    did = draw.choice(["set", "set", "set", "drop", "rename", "add", "twice"]) if way else "set"
    if did == "drop":
        del outer[way[-1]]
    elif did == "rename" and isinstance(outer, dict):
        new = draw.choice([way[-1].upper(), way[-1] + " ", way[-1][:-1], *NAMES])
        outer[new] = outer.pop(way[-1])
    elif did == "add" and isinstance(old, dict):
        way = (*way, draw.choice(NAMES))
        old[way[-1]] = new
    elif did == "twice" and isinstance(outer, list):
        outer.insert(way[-1], old)
    elif did == "twice":
        outer[f"@twice@{way[-1]}"] = new  # the key again, with another value
    elif way:
        outer[way[-1]] = new
    else:
        value = new
    return f"{did} {'.'.join(map(str, way)) or 'all'} {shown(new)}", value


def as_json(draw: random.Random, value: Any) -> bytes:
    """The text of a value. Marks stand for what json.dumps cannot write."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5).replace('"@twice@', '"')
    for mark, meaning in MARKS.items():
        text = text.replace(f'"{mark}"', meaning)
    return text.encode("utf-8", "surrogatepass")


def spoil_bytes(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """Damage that knows nothing of the format."""
    at, other = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    noise, text = draw.randbytes(draw.randint(1, 9)), data.decode("latin-1")
    flipped = bytes([data[at - 1] ^ 1 << draw.randrange(8)]) if at else b""
    return draw.choice([
        (f"cut at {at}", data[:at]), (f"cut out {at}:{other}", data[:at] + data[other:]),
        (f"a bit of {at}", data[: max(at - 1, 0)] + flipped + data[at:]),
        (f"{noise!r} at {at}", data[:at] + noise + data[at:]), ("empty", b""), ("zeros", bytes(len(data))),
        ("twice", data + data), ("BOM", b"\xef\xbb\xbf" + data), ("UTF-16", text.encode("utf-16")),
        ("UTF-16 without a BOM", text.encode("utf-16-le")), ("UTF-32", text.encode("utf-32-le")),
        ("CRLF", data.replace(b"\n", b"\r\n")), ("CR", data.replace(b"\n", b"\r")),
        ("git-lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        ("gzip, damaged", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + data),
        ("zip", b"PK\x03\x04" + data), ("parquet", b"PAR1" + data),
        ("HTML", b"<!doctype html><html><body>Access denied</body></html>"),
    ])  # fmt: skip


def spoil_path(draw: random.Random, path: Path) -> str:
    """Something else under the file's name."""
    data = path.read_bytes()
    path.unlink()
    what = draw.choice(["missing", "folder", "pipe", "loop", "dangling", "link out", "device", "sparse"])
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "link out":
        (path.parent.parent / "elsewhere").write_bytes(data)
        path.symlink_to("../elsewhere")
    elif what == "sparse" and path.suffix != ".jsonl":  # data may be as long as they like
        path.write_bytes(data)
        os.truncate(path, 1 << 36)
    elif what in ("loop", "dangling", "device"):
        path.symlink_to({"loop": path.name, "dangling": "nowhere", "device": "/dev/zero"}[what])
    return what


def spoil_json(draw: random.Random, path: Path) -> str:
    """A JSON file, or a line of JSON Lines, changed as a value; or its bytes, or the file itself."""
    kind, data = draw.random(), path.read_bytes()
    if kind < 0.07:
        return f"{path.name}: {spoil_path(draw, path)}"
    if kind < 0.25 or path.suffix == ".model":
        did, data = spoil_bytes(draw, data)
    else:
        lines = data.splitlines() if path.suffix == ".jsonl" else [data]
        number = draw.randrange(len(lines))
        did, value = spoil_value(draw, json.loads(lines[number]))
        lines[number] = as_json(draw, value)
        data = b"\n".join(lines) if path.suffix != ".jsonl" or draw.random() < 0.8 else b"[" + b",".join(lines) + b"]"
        did = f"line {number + 1}: {did}"
    path.write_bytes(data)
    return f"{path.name}: {did}"


# --- what is spoiled, by area --------------------------------------------------------------------------------------


def spoil_file(*names: str) -> Callable[[Case], list[str]]:
    """One of these files: of the folder, or of one of the bases that has it."""

    def spoil(case: Case) -> list[str]:
        if (case.folder / names[0]).exists():
            return [spoil_json(case.draw, case.folder / names[0])]
        kind = case.take(case.draw.choice(["base", "base5", "pieces"]))
        there = [case.base / name for name in names if (case.base / name).exists()]
        if not there:
            return spoil(case)
        return [kind, spoil_json(case.draw, case.draw.choice(there))]

    return spoil


TOML_JUNK = (
    "nan", "inf", "-inf", "+nan", "0", "-1", "1", "2", "3", "64", "65", "1e400", "1e-400", "0.5", "1.0", "4294967296",
    "0x1F", "1_000", "9223372036854775808", "1" + "0" * 5000, '""', '" "', '"x"', '"~"', '"~/x"', '"~nobody/x"', "'x'",
    '"a\\u0000b"', '"\\ud800"', '"""a\nb"""', '"a\\nb"', "[]", "[[]]", '["train.jsonl", "train.jsonl"]', "[1]", "{}",
    '["./test.jsonl"]', '["train.jsonl", 1]', "{a = 1}", "true", "false", "1979-05-27", "07:32:00", '"base"', "=", "#",
    "[" * 5000 + "]" * 5000, '"base/config.json"', '"' + "x" * 300 + '"', '"' + "x/" * 3000 + '"', '"run.toml"', "",
    '"pipe"', '"float32"', '"rmsprop"', '"none"', '"cuda"', "float32",
)  # fmt: skip
NEARLY: dict[Any, tuple[str, ...]] = {
    bool: ("true", "false", "True", "1", '"true"'),
    int: ("1", "8", "+5", "1_0", "0x10", "1e3", "64.0", "33"),
    float: ("0.5", "1", "5e-7", "0.0", "1e6", "0.05", ".5"),
    str: ('"base"', "'base5'", "base", '"./base/"', '"x y"'),
    tuple[str, ...]: ('"test.jsonl"', '["train.jsonl"]', "train.jsonl", '["train.jsonl", "test.jsonl"]'),
}


def written_value(draw: random.Random, name: str) -> str:
    """What is written for a setting: junk, or what nearly fits its type."""
    kind = config.SETTINGS[name].type
    choices = [f'"{choice}"' for choice in get_args(kind)] if get_origin(kind) is Literal else NEARLY[kind]
    return draw.choice(choices if draw.random() < 0.5 else TOML_JUNK)


def spoil_toml(case: Case) -> list[str]:
    """The configuration file."""
    draw, path = case.draw, case.folder / "run.toml"
    name = draw.choice(list(config.SETTINGS))
    section, _, key = name.partition(".")
    junk, kind, lines = written_value(draw, name), draw.random(), CONFIG.splitlines(keepends=True)
    os.mkfifo(case.folder / "pipe")
    if kind < 0.05:
        return [spoil_path(draw, path)]
    if kind < 0.2:
        did, data = spoil_bytes(draw, CONFIG.encode())
        path.write_bytes(data)
        return [did]
    if kind < 0.3:
        lines[0] = draw.choice([
            f"extends = {junk}", f"extends = {junk}", f"{key} = {junk}", f"[{key}]\nx = 1", f"{name} = {junk}", "[x]",
            f"[[{section}]]\n{key} = {junk}", f"{section} = {junk}",
        ]) + "\n"  # fmt: skip
        did = f"first {lines[0]!a:.80}"
    elif kind < 0.4:
        at = draw.randrange(len(lines))
        did = f"without {lines.pop(at)!a}, and another line twice"
        lines.insert(draw.randrange(len(lines)), draw.choice(lines))
    else:
        key = draw.choice([*[key] * 6, key.upper(), key[:-1], key + "s", f'"{key}"', f"{key}.x", f" {key} ", "tools"])
        lines = [line for line in lines if not line.startswith(f"{key} ")]
        at = lines.index(f"[{section}]\n") if f"[{section}]\n" in lines else len(lines)
        lines[at : at + 1] = [f"[{section}]\n", f"{key} = {junk}\n"]
        did = f"[{section}] {key} = {junk!a:.60}"
    path.write_text("".join(lines))
    return [did]


def spoil_words(case: Case) -> list[str]:
    """The command line: a good configuration, and then these words."""
    name, other = case.draw.sample(list(config.SETTINGS), 2)
    junk = written_value(case.draw, name)
    word = case.draw.choice([
        *[f"{name}={junk}"] * 3, f"--{name}={junk}", name, f"{name}==", f"={junk}", f"{name.upper()}={junk}", " ", "=",
        f"{name[:-1]}={junk}", f"{name}=1\n{name}=2", f"{name}={junk}\r", f"---{name}={junk}", f"-{name}={junk}", ".",
        "train", "--gpus=0", "--gpus=-1", "--gpus=x", "--gpus=99999999999999999999", "--gpus", "--gpus=1e3", "..=1",
        "--fresh=1", "-x", "--unknown", "", "train.=1", ".seed=1", "run.toml", f"{name}=\udcff", f"{name} = {junk}",
        "é=1", f"{name}:{junk}", "a" * 5000, f"{name}=" + "a" * 5000, "--dry-ru", "--help=1",
    ])  # fmt: skip
    return [word] if case.draw.random() < 0.8 else [word, f"{other}={written_value(case.draw, other)}"]


def spoil_weights(case: Case) -> list[str]:
    """The index, or the header or the data of a safetensors file."""
    draw, how, kind = case.draw, case.draw.random(), case.take(case.draw.choice(["base", "base5"]))
    if kind == "base5" and how < 0.6:
        return [kind, spoil_json(draw, case.base / "model.safetensors.index.json")]
    path = draw.choice(sorted(case.base.glob("*.safetensors")))
    if how < 0.1:
        return [kind, path.name, spoil_path(draw, path)]
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    text, body = data[8 : 8 + size], data[8 + size :]
    header = json.loads(text)
    name, other = draw.sample(sorted(header.keys() - {"__metadata__"}), 2)
    shape, offsets = header[name]["shape"], header[name]["data_offsets"]
    claimed = None
    if how < 0.3:
        did, body = draw.choice([
            ("NaN", body[:400] + b"\x00\x00\xc0\x7f" + body[404:]), ("Inf", b"\x00\x00\x80\x7f" + body[4:]),
            ("cut", body[: -draw.randint(1, 400)]), ("more", body + b"x" * draw.randint(1, 9)), ("none", b""),
            ("bit", body[:-1] + bytes([body[-1] ^ 1])),
        ])  # fmt: skip
    elif how < 0.4:
        claimed = draw.choice([0, 1, size - 1, size + 1, len(data), 2**32, 2**63, 2**64 - 1, 100_000_001])
        did = f"a header of {claimed}"
    elif how < 0.5:
        did, text = spoil_bytes(draw, text)
    elif how < 0.8:
        change = draw.choice([
            {"dtype": draw.choice(["I8", "U8", "BOOL", "F8_E4M3", "I32", "F64", "F16", "BF16", "F4", "x", "f32"])},
            {"shape": draw.choice([shape[::-1], [*shape, 1], [math.prod(shape)], [0], [], [-1], [2**63] * 2, ["1"]])},
            {"data_offsets": draw.choice([[0, 0], offsets[::-1], header[other]["data_offsets"], [0, 2**63], [-4, 0]])},
            {"dtype": "I8", "shape": [4 * math.prod(shape)]},
        ])  # fmt: skip
        header[name] |= change
        did, text = f"{name}: {change}", json.dumps(header).encode()
    else:
        did, value = spoil_value(draw, header)
        text = as_json(draw, value)
    path.write_bytes((len(text) if claimed is None else claimed).to_bytes(8, "little") + text + body)
    return [kind, path.name, did]


TEMPLATE_JUNK = (
    "{{", "}}", "{% if x %}", "{% endif %}", "{{ 1 / 0 }}", "{{ x.y.z }}", "{{ messages[99].content }}",
    "{{ messages | random }}", "{{ raise_exception('no') }}", "{% for i in range(10**9) %}x{% endfor %}", "{#",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "{{ lipsum(10000) }}", "\x00",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}", "{{ messages | tojson }}",
    "{{ 'x' * 10**9 }}", "{{ 'x' * 10**12 }}", "{{ 10**(10**9) }}", "{% set n = namespace(i=0) %}{% set n.i = 1 %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include 'tokenizer.json' %}", "{% import 'x' as y %}",
    "{% extends 'x' %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ strftime_now('%Y') }}",
    "{{ messages.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os.system('touch x') }}", "{% break %}",
    "{{ strftime_now(1) }}", "{{ bos_token }}", "{{ eos_token }}", "{{ 1 }}", "{% generation %}x{% endgeneration %}",
    "{% generation %}", "{{ '%1000000000d' | format(1) }}", "{{ 'x' | center(10**10) }}", "{{ tools | length }}",
    "{{ messages | tojson(indent=10**10) }}", "{{ x }}", "{{ None }}", "{{ '\ud800' }}", "é" * 100, "(" * 5000,
    "{{ " + "(" * 500 + ")" * 500 + " }}", "{% if 1 %}" * 300 + "{% endif %}" * 300, "{{ " + "-" * 20000 + "1 }}",
    "{% set messages = [] %}", "{% set eos_token = 'x' %}", "{{ messages[0]['content'].format(messages) }}",
    "{{ [].sort() }}", "{{ dict(a=1).popitem() }}", "{{ messages | map('upper') | list }}", "{{ caller() }}",
    "{% raw %}",
    "{{ messages | groupby('role') }}", "{% autoescape true %}{{ '<' }}{% endautoescape %}", "{{ loop.index }}",
    "{% filter upper %}{{ messages[0].content }}{% endfilter %}", "{{ (1, 2)[5] }}", "{{ '{:>9999999999}'.format(1) }}",
    "{% set s = namespace(t='x') %}{% for i in range(60) %}{% set s.t = s.t ~ s.t %}{% endfor %}",
)  # fmt: skip
PLACES = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")


def spoil_template(case: Case) -> list[str]:
    """The chat template, in one of the places that it can be in."""
    draw, lines = case.draw, ZEPHYR_TEMPLATE.splitlines(keepends=True)
    at, other, junk = draw.randrange(len(lines)), draw.randrange(len(lines)), draw.choice(TEMPLATE_JUNK)
    word = draw.choice(re.findall(r"\w+|%}|'|\+|\n", ZEPHYR_TEMPLATE))
    did = draw.choice(["drop", "swap", "insert", "insert", "insert", "only", "after", "word"])
    if did == "drop":
        del lines[at]
    elif did == "swap":
        lines[at], lines[other] = lines[other], lines[at]
    elif did == "word":
        lines = [ZEPHYR_TEMPLATE.replace(word, draw.choice(["", "x", word + word, word.upper()]), draw.choice([1, -1]))]
        junk = word
    else:
        lines = [junk] if did == "only" else [*lines, junk] if did == "after" else [*lines[:at], junk, *lines[at:]]
    text, where = "".join(lines), draw.choice(PLACES)
    path = case.base / where
    if where == "chat_template.jinja":
        how, data = spoil_bytes(draw, text.encode("utf-8", "surrogatepass"))
        if draw.random() < 0.8:
            how, data = "", text.encode("utf-8", "surrogatepass")
        path.write_bytes(data)
        return [f"{where}: {did} {at} {shown(junk)} {how}"]
    named = draw.choice(
        [text, text, [{"name": "default", "template": text}], [{"name": "x", "template": text}], {"x": text}]
    )
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | {"chat_template": named})
    return [f"{where}: {did} {at} {shown(junk)} as {type(named).__name__}"]


# --- the commands --------------------------------------------------------------------------------------------------


def ask_train(words: list[str]) -> int:
    """train.py, up to where weights are loaded. A real dry run needs no weights; this one checks their headers."""

    def read_inputs(settings: config.Config, fresh: bool, need_weights: bool) -> run.Inputs:  # noqa: ARG001
        return run.read_inputs(settings, fresh)

    with mock.patch.object(train, "read_inputs", read_inputs), mock.patch.object(plan, "cpu_flops", lambda: 1e9):
        return train.main(["run.toml", "--dry-run", *words])


def ask_plan(words: list[str]) -> int:
    return plan.main(["run.toml", *words, "--device", "H100-80GB"])


def ask_generate(words: list[str]) -> int:
    return generate.main(["--model", "base", "--prompt", "a b", "--max-new-tokens", "1", "--device", "cpu", *words])


def ask_preferences(words: list[str]) -> int:
    return evaluate.main(["preferences", "--model", "base", "--base", "base", "--data", "test.jsonl", *words])


def ask_questions(words: list[str]) -> int:
    common = ["--model", "base", "--prompts", "questions.jsonl", "--max-new-tokens", "1", "--device", "cpu"]
    return evaluate.main(["exact-match", *common, *words])


def ask_binarize(words: list[str]) -> int:
    return binarize.main(["raw.jsonl", "--output", "pairs.jsonl", *words])


PROGRAMS = {
    ask_train: "train.py", ask_plan: "notus.plan", ask_generate: "notus.generate", ask_preferences: "notus.evaluate",
    ask_questions: "notus.evaluate", ask_binarize: "binarize.py",
}  # fmt: skip

# --- the same by other means ---------------------------------------------------------------------------------------
# Each of these asserts that what was accepted was read as others read it. It runs in the case's folder, with the words
# of the command line.


def unique(pairs: list[tuple[str, Any]]) -> dict:
    assert len({key for key, _ in pairs}) == len(pairs), "a key is there twice, and one was taken by guess"
    return dict(pairs)


def strict_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text("utf-8"), object_pairs_hook=unique)


def records(name: str) -> list:
    text = Path(name).read_text("utf-8-sig")
    texts = [text] if text.lstrip().startswith("[") else [line for line in text.split("\n") if line.strip()]
    values = [json.loads(each, object_pairs_hook=unique) for each in texts]
    return values[0] if text.lstrip().startswith("[") else values


def as_turns(value: Any, role: str) -> list[dict]:
    """Text, a message, messages, or OpenAI's object, as messages of text."""
    if isinstance(value, str):
        return [turn(role, value)]
    if isinstance(value, dict) and "messages" in value:
        assert not rows.holds(value.get("tools")), "a field is lost"
        value = value["messages"]
    made = []
    for message in value if isinstance(value, list) else [value]:
        assert not any(rows.holds(message.get(name)) for name in ("tool_calls", "tools")), "a field is lost"
        speaker, said = (message[key] for key in (("from", "value") if "from" in message else ("role", "content")))
        said = said if isinstance(said, str) else "".join(part["text"] for part in said)
        made.append(turn({"human": "user", "gpt": "assistant", "observation": "tool"}.get(speaker, speaker), said))
    return made


def right_rows(_words: list[str]) -> None:
    ours, theirs = [row[1:4] for row in rows.read_rows(["train.jsonl"])], []
    for row in records("train.jsonl"):
        assert not rows.holds(row.get("tools")), "a field is lost"
        row = {name: value for name, value in row.items() if value is not None}
        pairs = (("chosen", "rejected"), ("chosen_response", "rejected_response"),
                 ("preferred_output", "non_preferred_output"))  # fmt: skip
        ((better, worse),) = (names for names in pairs if {*names} <= row.keys())
        first, second = as_turns(row[better], "assistant"), as_turns(row[worse], "assistant")
        asked = [row[name] for name in ("prompt", "instruction", "question", "input", "conversations") if row.get(name)]
        if not any(message["role"] == "user" for message in first):
            (prompt,) = (as_turns(value, "user") for value in asked)
            first, second = prompt + first, prompt + second
        elif isinstance(prompt := row.get("prompt"), str) and prompt:
            assert prompt in [message["content"] for message in first]
        elif prompt and first[: len(prompt)] != as_turns(prompt, "user"):
            first, second = ([*as_turns(prompt, "user"), *side] for side in (first, second))
        if rows.holds(row.get("system")) and first[0] != (system := turn("system", row["system"])):
            assert first[0]["role"] != "system", "two system turns"
            first, second = [system, *first], [system, *second]
        assert first[:-1] == second[:-1] and first[-1]["role"] == second[-1]["role"] == "assistant"
        assert first[-2]["role"] in ("user", "tool"), "nobody asked"
        theirs.append((first[:-1], first[-1]["content"], second[-1]["content"]))
    assert ours == theirs
    assert all(isinstance(text, str) and text.strip() for _, *texts in ours for text in texts)


def right_questions(_words: list[str]) -> None:
    ours = [(question.instruction, question.correct_answers) for question in evaluate.read_questions("questions.jsonl")]
    assert ours == [(row["instruction"], row["correct_answers"]) for row in records("questions.jsonl")]
    assert all(text.strip() for instruction, answers in ours for text in [instruction, *answers])


def right_pairs(_words: list[str]) -> None:
    pairs = {pair["chosen"][0]["content"]: pair for pair in records("pairs.jsonl")}
    for record in records("raw.jsonl"):
        means = []
        for completion in record["completions"]:
            notes = [note[0] if isinstance(note, list) and note else note
                     for note in (completion.get("annotations") or {}).values()]  # fmt: skip
            ratings = [float(note["Rating"]) for note in notes if note and note.get("Rating") not in (None, "N/A")]
            assert all(1 <= rating <= 5 for rating in ratings)
            means.append(sum(ratings) / len(ratings) if ratings else -1)
        best = record["completions"][means.index(max(means))]["response"] if means else ""
        lower = [c["response"] for c, mean in zip(record["completions"], means, strict=True) if 0 < mean < max(means)]
        if pair := pairs.get(record["instruction"]):
            assert pair["chosen"][1]["content"] == best and pair["score_chosen"] == max(means)
            assert pair["rejected"][1]["content"] in lower
        else:
            assert not lower or not best.strip() or any(not text.strip() or text == best for text in lower)


def right_dims(_words: list[str]) -> None:
    raw, ours = strict_json("base/config.json"), asdict(read_base("base").dims)
    own = {name: ours.pop(name) for name in ("qkv_bias", "qk_norm", "rope_scaling")}
    theirs = MistralConfig(**weights.exported_config(raw, torch.float32)).to_dict()
    theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
    theirs["head_dim"] = theirs["head_dim"] or theirs["hidden_size"] // theirs["num_attention_heads"]
    assert ours == {name: theirs[name] for name in ours}
    assert (theirs["model_type"], theirs["hidden_act"]) == ("mistral", "silu") and not theirs.get("attention_bias")
    assert theirs["rope_parameters"]["rope_type"] == "default" and not raw.get("quantization_config")
    assert not any(own.values())


def right_weights(_words: list[str]) -> None:
    index, base = Path("base/model.safetensors.index.json"), Path("base")
    try:
        ours = dict(load_model(read_base(base), CPU, torch.float32).named_parameters())
    except ValueError as error:  # where weights are read, as training does after its other checks
        assert re.search("holds (NaN|Inf)", str(error)), error
        return
    files = strict_json(index)["weight_map"] if index.exists() else dict.fromkeys(ours, "model.safetensors")
    held = {name: load_file(base / name) for name in set(files.values())}
    for name, tensor in ours.items():
        theirs = held[files[name]][name]
        assert theirs.is_floating_point() and theirs.itemsize > 1, f"{name} is {theirs.dtype}"
        assert torch.equal(theirs.float(), tensor) and tensor.isfinite().all()


TEXTS = ["a b", " a  b\n", "zz", "", "<|user|>\na</s>\n<s> <extra> b", "</s>"]


def right_ids(_words: list[str]) -> None:
    for path in Path("base").glob("*token*.json"):
        strict_json(path)
    ours, named = load_tokenizer("base"), chat.read_tokenizer_config("base")
    if ours.path.name == "tokenizer.model":  # which transformers 5 reads in another way
        assert ours.encode_batch(TEXTS[:4]) == sentencepiece.SentencePieceProcessor(str(ours.path)).encode(TEXTS[:4])
        return
    theirs = AutoTokenizer.from_pretrained("base")
    assert ours.eos_id == (theirs.eos_token_id if "eos_token" in named else 2)  # </s> where no file names one
    assert ours.bos_id == (theirs.bos_token_id if "bos_token" in named else 1)
    if not any("transformers 5" in warning for warning in ours.warnings):
        assert ours.encode_batch(TEXTS) == theirs(TEXTS, add_special_tokens=False)["input_ids"]


def right_texts(_words: list[str]) -> None:
    template = load_chat_template("base")
    theirs = PreTrainedTokenizerFast(tokenizer_file="base/tokenizer.json", bos_token="<s>", eos_token="</s>")
    asked, told = [turn("system", ""), turn("user", "a")], [turn("user", "a"), turn("assistant", "b")]
    for messages, prompt in ((asked, True), (told, False)):
        expected = theirs.apply_chat_template(
            messages, chat_template=template.source, add_generation_prompt=prompt, tokenize=False
        )
        assert template.render(messages, prompt) == expected or "strftime_now" in template.source


def right_stops(_words: list[str]) -> None:
    if Path("base/generation_config.json").exists():
        strict_json("base/generation_config.json")
        eos = GenerationConfig.from_pretrained("base").eos_token_id
        assert read_base("base").stop_ids == {2, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
        assert all(i >= 0 for i in read_base("base").stop_ids)


def right_frame(_words: list[str]) -> None:
    if Path("base", FRAME_FILE).exists():
        raw, frame = strict_json(Path("base", FRAME_FILE)), asdict(read_base("base").frame)
        later = {name: asdict(Frame())[name] for name in ("loss", "label_smoothing", "margin", "nll_weight")}
        assert frame == {name: (later | raw)[name] for name in frame}
        assert 0 < frame["max_prompt_length"] < frame["max_length"] and 0 < frame["beta"] < math.inf


def same_setting(name: str, ours: Any, written: Any) -> bool:
    """Whether a setting that Config holds is what was written."""
    if isinstance(ours, tuple):
        written = written if isinstance(written, list) else [written] if written else []
        return len(ours) == len(written) and all(same_setting(name, *both) for both in zip(ours, written, strict=True))
    if isinstance(written, str) and config.SETTINGS[name].metadata["path"]:
        written = os.path.expanduser(written)
    return ours == written and type(written) in (type(ours), *([int] if isinstance(ours, float) else []))


def right_settings(words: list[str]) -> None:
    ours, trees = config.flat(config.load("run.toml", words)), [tomllib.loads(Path("run.toml").read_text("utf-8-sig"))]
    while "extends" in trees[0]:
        trees.insert(0, tomllib.loads(Path(trees[0].pop("extends")).read_text("utf-8-sig")))
    written = {f"{section}.{key}": v for tree in trees for section, table in tree.items() for key, v in table.items()}
    assert written.keys() <= ours.keys(), "an unknown setting was ignored"
    wrong = [name for name, value in written.items() if not same_setting(name, ours[name], value)]
    assert not wrong, f"{wrong[0]} is {ours[wrong[0]]!r}, written as {written[wrong[0]]!r}"
    assert all(math.isfinite(value) for value in ours.values() if isinstance(value, float))


def right_words(words: list[str]) -> None:
    settings = dict(word.removeprefix("--").split("=", 1) for word in words)
    ours = config.flat(config.load("run.toml", [f"{name}={text}" for name, text in settings.items()]))
    for name, text in settings.items():
        assert name in ours, "an unknown setting was ignored"
        meanings = [text]
        with suppress(ValueError, RecursionError):
            meanings.append(tomllib.loads(f"x = {text}")["x"])
        assert any(same_setting(name, ours[name], meaning) for meaning in meanings), f"{name} is {ours[name]!r:.80}"


class Area(NamedTuple):
    spoil: Callable[[Case], list[str]]  # what was done; for words, the words
    commands: tuple[Callable[[list[str]], int], ...]  # one of which is run
    right: Callable[[list[str]], None]
    names: str  # what every refusal names


ASK = (ask_train, ask_generate, ask_preferences)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
)
AREAS = {
    "rows": Area(spoil_file("train.jsonl"), (ask_train,), right_rows, "train.jsonl"),
    "raw": Area(spoil_file("raw.jsonl"), (ask_binarize,), right_pairs, "raw.jsonl"),
    "questions": Area(spoil_file("questions.jsonl"), (ask_questions,), right_questions, "questions.jsonl"),
    "toml": Area(spoil_toml, (ask_train, ask_plan), right_settings, ""),
    "words": Area(spoil_words, (ask_train,), right_words, ""),
    "dims": Area(spoil_file("config.json"), ASK, right_dims, "base"),
    "weights": Area(spoil_weights, ASK, right_weights, "base"),
    "tokenizer": Area(spoil_file(*TOKENIZER), ASK, right_ids, "base"),
    "template": Area(spoil_template, ASK, right_texts, "base"),
    "generation": Area(spoil_file("generation_config.json"), ASK, right_stops, "base"),
    "frame": Area(spoil_file(FRAME_FILE), (ask_generate, ask_preferences), right_frame, "base"),
}

# --- the law -------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    pass


@contextmanager
def time_limit() -> Iterator[None]:
    def strike(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def snapshot(folder: Path) -> set[tuple]:
    """Everything in a folder but token caches, whose names are 16 digits, and the folders that they are in."""
    found = {path.relative_to(folder): path.lstat() for path in folder.rglob("*")}
    caches = {path for path in found if any(re.match("[0-9a-f]{16}([.]|$)", part) for part in path.parts)}
    caches |= {parent for path in caches for parent in path.parents}
    return {
        (str(path), stat.st_mode, *(() if S_ISDIR(stat.st_mode) else (stat.st_size, stat.st_mtime_ns)))
        for path, stat in found.items() if path not in caches
    }  # fmt: skip


def fault_of(area: Area, command: Callable[[list[str]], int], words: list[str]) -> tuple[str, int | None, str]:
    """(what is wrong or "", exit code, what was said) of a command that is run here."""
    out, err, code = io.StringIO(), io.StringIO(), None
    try:
        with time_limit(), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                code = command(words)
            except SystemExit as left:  # argparse
                code = left.code  # type: ignore[assignment]
            if code == 0:
                area.right(words)
    except Hang:
        return "hangs", code, err.getvalue()
    except BaseException as error:
        told = "accepted, but" if code == 0 else f"traceback: {''.join(traceback.format_tb(error.__traceback__)[-2:])}"
        return f"{told} {type(error).__name__}: {error!s:.300}", code, err.getvalue()
    said, fault = err.getvalue(), ""
    if code not in (0, 2):
        fault = f"exit code {code}"
    elif code == 2:
        last = said.rstrip("\n").split("\n")[-1].removeprefix("python -m ")
        named = area.names in last or "no pair is left" in last  # an odd tokenizer may make two answers equal
        if not last.startswith(f"{PROGRAMS[command]}: error: ") or not named:
            fault = "no sentence"
        elif len(said) >= 1000 or said.count("\n") > 5:
            fault = "more than a sentence"
    return fault, code, said


def try_case(world: Path, area: str, seed: int) -> str:
    """Run a case; "refused" or "accepted". AssertionError says what was done and what is wrong."""
    at, draw = AREAS[area], random.Random(f"{area} {seed}")
    with tempfile.TemporaryDirectory() as holder:
        case = Case(draw, world, Path(holder) / "w")
        case.folder.mkdir()
        for path in world.iterdir():
            if path.is_file():
                shutil.copy(path, case.folder)
        case.take("base")
        did, command = at.spoil(case), draw.choice(at.commands)
        before = snapshot(case.folder)
        limit = TEMPLATE_SECONDS if area == "template" else chat.MAX_SECONDS
        with chdir(case.folder), mock.patch.object(chat, "MAX_SECONDS", limit):
            fault, code, said = fault_of(at, command, did if area == "words" else [])
        wrote = {path for path, *_ in snapshot(case.folder) ^ before} - ({"pairs.jsonl"} if code == 0 else set())
    fault = fault or (f"wrote {sorted(wrote)}" if wrote else "")
    if fault:
        raise AssertionError(
            f"{area} {seed}: {command.__name__}: {' '.join(did)!a:.300}: {fault}; said: {said!a:.1200}"
        )
    return "accepted" if code == 0 else "refused"


# --- the tests -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("area", AREAS)
def test_spoiled_input_is_refused_in_a_sentence_or_read_as_others_read_it(world: Path, area: str, monkeypatch):
    monkeypatch.setenv("HOME", "/nonexistent")
    assert "refused" in {try_case(world, area, seed) for seed in range(CASES)}


def unchecked_frame(model_dir: Path) -> Frame:
    raw = json.loads((model_dir / FRAME_FILE).read_text())
    return Frame(**{name: raw.get(name, value) for name, value in asdict(Frame()).items()})


def written(*arguments: Any) -> Any:
    Path("left behind").touch()
    return load_chat_template(*arguments)


# The seed that finds it, so that none before it are tried. A new setting shifts those of "toml" and "words".
FIRST = {("template", "notus.chat._time_limit"): 119, ("toml", "notus.config.contains"): 272}


@pytest.mark.parametrize(
    ("area", "check", "without", "message"),
    [
        ("rows", "notus.rows.parse_json", lambda text, *_: json.loads(text), "a key is there twice"),
        ("raw", "binarize.number", lambda value, *_: None if value is None else float(value), ""),
        ("questions", "notus.evaluate.check_text", lambda _where, _name, value: value, ""),
        ("toml", "notus.config.contains", lambda *_: True, ""),
        ("words", "notus.config.fits", lambda *_: True, ""),
        ("dims", "notus.dims._number", lambda _path, _name, value: value, ""),
        ("weights", "notus.weights._check_tensor", lambda *_: None, ""),
        ("dims", "notus.files.parse_json", lambda text, *_: json.loads(text), "traceback"),
        ("template", "notus.chat._time_limit", nullcontext, "hangs"),
        ("template", "notus.base.load_chat_template", written, r"wrote \['left behind'\]"),
        ("generation", "notus.files._without_repeats", dict, "a key is there twice"),
        ("frame", "notus.base.read_frame", unchecked_frame, ""),
    ],
)
def test_the_fuzzer_finds_a_check_that_is_missing(
    world: Path, area: str, check: str, without, message: str, monkeypatch
):
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(check, without)
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 3.0)
    with pytest.raises(AssertionError, match=rf"^{area} \d+: ask_.*{message}"):
        first = FIRST.get((area, check), 0)
        for seed in range(first, first + 1000):
            try_case(world, area, seed)


if __name__ == "__main__":
    area, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    os.environ["HOME"] = "/nonexistent"
    outcomes = []
    with tempfile.TemporaryDirectory() as holder:
        world_folder = make_world(Path(holder))
        for seed in range(first, first + count):
            try:
                outcomes.append(try_case(world_folder, area, seed))
            except AssertionError as error:
                outcomes.append("wrong")
                print(error, flush=True)
    print(f"{area}: " + ", ".join(f"{outcomes.count(name)} {name}" for name in ("accepted", "refused", "wrong")))
