"""Preference files -> rows: every shape that is read, every refusal. Nothing here knows of tokens.

`messages` are [{"role": ..., "content": ...}, ...]. A row has one of these shapes, recognized by its keys:

    {"chosen": messages, "rejected": messages}                      whole conversations: what binarize.py writes
    {"prompt": "...", "chosen": messages, "rejected": messages}     the same, with the prompt repeated as text: H4's
    {"prompt": messages, "chosen": messages, "rejected": messages}  the prompt apart from the answers: TRL's
    {"instruction": "...", "chosen_response": "...", "rejected_response": "..."}   argilla's, Notus-7B-v1's own data

Files are JSON Lines or one JSON array, plain or gzipped. The content decides which, not the name.
"""

import gzip
import json
import shlex
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from notus.chat import Message
from notus.files import is_utf16, parse_json

SHAPES = (
    'rows look like {"chosen": messages, "rejected": messages} with messages = [{"role": "user", "content": "..."}, '
    '{"role": "assistant", "content": "..."}], or {"instruction": "...", "chosen_response": "...", '
    '"rejected_response": "..."}'
)
# Fields that change what a model reads or says. A row that holds one is refused, because dropping it would train on
# another text. Other unknown fields (ids, scores, sources) are metadata and are ignored.
UNREAD_IN_ROWS = ("tools", "system", "system_prompt", "images", "image", "audio", "videos", "documents")
UNREAD_IN_MESSAGES = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tools", "images",
)  # fmt: skip


class Row(NamedTuple):
    """One preference, as text: two conversations that differ only in their last turn."""

    where: str  # file:line
    prompt: list[Message]
    chosen: str
    rejected: str


def read_rows(paths: Sequence[str | Path]) -> Iterator[Row]:
    """The rows of all files, in order. ValueError names file, line and value, and says what rows look like."""
    for path in map(Path, paths):
        check_file(path)
        count = 0
        try:
            for where, record in read_records(path):
                yield parse_row(where, record)
                count += 1
            if not count:
                raise ValueError(f"{path}: no rows in it")
        except ValueError as error:
            raise ValueError(f"{error}; {SHAPES}") from None


# --- files ---------------------------------------------------------------------------------------------------------

DATASETS = "load it with `datasets` and save it with Dataset.to_json"
CONVERT = 'import sys, pandas; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient="records", lines=True)'
# How a file begins that somebody took for JSON: (bytes, what it is, what to do).
FOREIGN = (
    (b"PAR1", "is a parquet file", f"convert it: python -c {shlex.quote(CONVERT)} FILE FILE.jsonl"),
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself", "run `git lfs pull` in its folder"),
    (b"PK\x03\x04", "is a zip archive", "unpack it"),
    (b"ARROW1", "is an Arrow file", DATASETS),
    (b"\xff\xff\xff\xff", "is an Arrow file", DATASETS),  # a stream of Arrow messages, as `datasets` saves them
)


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, value) for each line of JSON Lines, or (file: row N, value) for each element of a JSON array."""
    check_file(path)
    with _unpacked(path) as file:
        if file.peek(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            rows = parse_json(file.read().decode("utf-8-sig"), path)
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
            return
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"{path}:{number}", parse_json(line.strip(), path, number)


def check_file(path: Path) -> None:
    """ValueError for what is no file of JSON, and what to do about it."""
    if path.is_dir():
        saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))  # by `datasets`
        raise ValueError(f"{path}: is a folder; a file of rows is wanted{f'; {DATASETS}' if saved else ''}")
    if not path.is_file():  # opening a pipe would wait forever
        raise ValueError(f"{path}: no such file" if not path.exists() else f"{path}: not a regular file")
    with _unpacked(path) as file:
        for magic, what, cure in FOREIGN:
            if _begins(file, magic):
                raise ValueError(f"{path}: {what}; {cure.replace('FILE', shlex.quote(str(path)))}")
        if is_utf16(file.peek(4)[:4]):
            raise ValueError(f"{path}: looks like UTF-16 text; save it as UTF-8")


@contextmanager
def _unpacked(path: Path) -> Iterator[Any]:
    """The bytes of a file, gzipped or not. ValueError if they cannot be read, also from within the block."""
    try:
        with path.open("rb") as packed, gzip.open(packed) if _begins(packed, b"\x1f\x8b") else packed as file:
            yield file
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as text: {error}") from None


def _begins(file: Any, magic: bytes) -> bool:
    return file.peek(len(magic))[: len(magic)] == magic


# --- rows ----------------------------------------------------------------------------------------------------------


def parse_row(where: str, record: Any) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a row must be an object, not {show(record)}")
    if "completions" in record:
        raise ValueError(f"{where}: a raw UltraFeedback record; make pairs of it first: python binarize.py --help")
    if unread := [name for name in UNREAD_IN_ROWS if holds(record.get(name))]:
        raise ValueError(
            f"{where}: {unread[0]!r} is {show(record[unread[0]])}, which would be lost: it is not read. Remove the "
            "field, or write what it says into the messages"
        )
    if {"instruction", "chosen_response", "rejected_response"} <= record.keys():
        instruction, chosen, rejected = (
            check_text(where, name, record[name]) for name in ("instruction", "chosen_response", "rejected_response")
        )
        return Row(where, [{"role": "user", "content": instruction}], chosen, rejected)
    return _conversations(where, record)


def _conversations(where: str, record: dict[str, Any]) -> Row:
    """The shapes with `chosen` and `rejected`."""
    for name in ("chosen", "rejected"):
        if name not in record:
            keys = ", ".join(map(repr, record)) or "none"
            raise ValueError(f"{where}: {name!r} is missing; the keys are {keys:.300}")
    chosen, rejected = (_messages(where, name, record[name]) for name in ("chosen", "rejected"))
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        prompt = _messages(where, "prompt", prompt)
        if chosen[: len(prompt)] != prompt:  # some files repeat the prompt in front of the answers
            chosen, rejected = prompt + chosen, prompt + rejected
    elif not isinstance(prompt, str | None):
        raise ValueError(f"{where}: prompt must be text or a list of messages, not {show(prompt)}")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(
            f"{where}: chosen and rejected answer different prompts: all turns but the last must be equal; chosen "
            f"begins with {show(chosen[0]['content'])}, rejected with {show(rejected[0]['content'])}"
        )
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: {name} must be a prompt and then an assistant turn, not {show(messages)}")
    if isinstance(prompt, str) and not any(message["content"] == prompt for message in chosen[:-1]):
        raise ValueError(f"{where}: prompt is {show(prompt)}, but no turn before the answers says that")
    _check_order(where, chosen)
    return Row(where, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _check_order(where: str, messages: Sequence[Message]) -> None:
    """An answer to an answer is a damaged conversation: no model is asked that way."""
    for before, after in pairwise(messages):
        if before["role"] == after["role"] == "assistant":
            raise ValueError(
                f"{where}: an assistant turn follows an assistant turn: {show(before['content'])}, then "
                f"{show(after['content'])}"
            )
    if messages[0]["role"] == "assistant":
        raise ValueError(f"{where}: the conversation begins with an assistant turn: {show(messages[0]['content'])}")


def _messages(where: str, name: str, value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name} must be a list of messages, not {show(value)}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: {name} holds {show(message)}; a message has a role and a content")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: {name} has the role {show(message['role'])}; known: system, user, assistant")
        if unread := [key for key in UNREAD_IN_MESSAGES if holds(message.get(key))]:
            raise ValueError(
                f"{where}: a message of {name} has {unread[0]!r}: {show(message[unread[0]])}, which would be lost: it "
                "is not read. Write it into the content as the model should see it, or remove it"
            )
    return [{"role": m["role"], "content": check_text(where, f"{name} content", m["content"])} for m in value]


def check_text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, not {show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise ValueError(f"{where}: {name} holds {value!a:.80}, which is not text") from None
    return value


def holds(value: Any) -> bool:
    """Whether an optional field says anything. Tables fill empty cells with null, "" or "[]"."""
    return value not in (None, False, "", "[]", "{}", "null", [], {})


def show(value: Any) -> str:
    """A value for an error message: as JSON, cut to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= 80 else f"{text[:77]}..."
