"""Preference files and Python rows -> Row: every shape that is read, every refusal. Nothing here knows of tokens.

A row is recognized by its keys. It has two answers, and a prompt beside them unless they are whole conversations:

    answers   chosen, rejected | chosen_response, rejected_response | preferred_output, non_preferred_output
    prompt    prompt | instruction | question | input | conversations
    system    system | system_prompt                                 optional: the text of the first turn

Each is text (one turn), a message, or a list of messages. A message is {"role": ..., "content": ...}, or in sharegpt's
spelling {"from": ..., "value": ...}. "Your own pairs" in the README has a line for each shape.

Files are JSON Lines, one JSON array, parquet or CSV, and all but parquet may be gzipped. The content decides which one
it is. Only CSV is known by its name.
"""

import csv
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from notus.chat import Message
from notus.files import is_utf16, parse_json

SHAPES = (
    'rows look like {"prompt": "...", "chosen": "...", "rejected": "..."}, or {"chosen": messages, "rejected": '
    'messages} with messages = [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]; the '
    'README lists the others under "Your own pairs"'
)
ANSWERS = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("preferred_output", "non_preferred_output"),
)  # fmt: skip
PROMPTS = ("prompt", "instruction", "question", "input", "conversations")
SYSTEMS = ("system", "system_prompt")
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}
# Fields that change what a model reads or says. A row that holds one is refused, because dropping it would train on
# another text. Other unknown fields (ids, scores, sources) are metadata and are ignored.
UNREAD_IN_ROWS = ("tools", "history", "images", "image", "audio", "audios", "video", "videos", "documents", "functions")
UNREAD_IN_MESSAGES = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tools", "images",
)  # fmt: skip
# How chat templates begin a turn. Prompt text with such a marker was probably rendered already.
MARKERS = re.compile(
    r"<\|(?:system|user|assistant|im_start|start_header_id|start_of_role|turn)\|?>|\[/?INST\]|<<SYS>>|<start_of_turn>|"
    r"<｜(?:User|Assistant)｜>|\n\n(?:Human|Assistant):"
)
MESSAGES_IN_A_CELL = re.compile(
    r"""\s*(?:\[\s*\{\s*['"](?:role|content|from|value)|\{\s*['"](?:role|from|messages))['"]\s*:"""
)


class Row(NamedTuple):
    """One preference, as text: two conversations that differ only in their last turn."""

    where: str  # file:line
    prompt: list[Message]
    chosen: str
    rejected: str
    shape: str  # the keys that were read, and what they hold, e.g. "prompt/chosen/rejected strings"


class Explained(ValueError):
    """A refusal that says itself what to do."""


def read_rows(sources: Iterable[str | Path | Mapping[str, Any]]) -> Iterator[Row]:
    """The rows of files and dicts, in order. ValueError names file, line and value, and says what rows look like."""
    for number, source in enumerate(sources, 1):
        records: Iterable[tuple[str, Any]]
        if isinstance(source, Mapping):
            records = [(f"row {number}", plain(source))]
        else:
            check_file(Path(source))
            records = read_records(source)
        try:
            count = 0
            for where, record in records:
                yield parse_row(where, record)
                count += 1
            if not count:
                raise ValueError(f"{source}: no rows in it")
        except Explained:
            raise
        except ValueError as error:
            raise ValueError(f"{error}; {SHAPES}") from None


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without arrays, which pandas makes of lists, at any depth."""

    def listed(value: Any) -> Any:
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, dict):
            return {key: listed(inner) for key, inner in value.items()}
        return [listed(inner) for inner in value] if isinstance(value, list) else value

    return {key: listed(value) for key, value in row.items()}


# --- files ---------------------------------------------------------------------------------------------------------

DATASETS = "load it with `datasets` and save it with Dataset.to_json"
TO_JSON = 'import sys, pandas; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient="records", lines=True)'
# How a file begins that somebody took for rows: (bytes, what it is, what to do).
FOREIGN = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself", "run `git lfs pull` in its folder"),
    (b"PK\x03\x04", "is a zip archive", "unpack it"),
    (b"ARROW1", "is an Arrow file", DATASETS),
    (b"\xff\xff\xff\xff", "is an Arrow file", DATASETS),  # a stream of Arrow messages, as `datasets` saves them
)


def read_records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """(file:line, value) for each line of JSON Lines; (file: row N, value) for each element of a JSON array, or row of
    a parquet or CSV file. Row 1 of a CSV file is the one after its header."""
    check_file(path := Path(source))
    with _unpacked(path) as file:
        if _begins(file, b"PAR1"):
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(_parquet(path), 1))
        elif path.name.lower().removesuffix(".gz").endswith(".csv"):
            yield from _csv(path, file)
        elif file.peek(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            rows = parse_json(file.read().decode("utf-8-sig"), path)
            yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
        else:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield f"{path}:{number}", parse_json(line.strip(), path, number)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, of which some thousand are in memory at a time."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from None


def _csv(path: Path, file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The header's names are the keys. Cells are text, and a cell that holds messages as JSON becomes a list."""
    csv.field_size_limit((1 << 31) - 1)
    reader, number = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True), 0
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise ValueError(f"{path}: the header names a column twice: {show(header)}")
        for number, cells in enumerate(filter(None, reader), 1):
            where = f"{path}: row {number}"
            if len(cells) != len(header):
                raise ValueError(f"{where}: has {len(cells)} cells, and the header has {len(header)}: {show(cells)}")
            yield where, {name: _cell(where, name, text) for name, text in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{path}: row {number + 1}: not CSV: {error}") from None


def _cell(where: str, name: str, text: str) -> Any:
    if name not in (*PROMPTS, *sum(ANSWERS, ())) or not MESSAGES_IN_A_CELL.match(text):
        return text
    try:
        return parse_json(text, where)
    except ValueError:  # a list as Python prints it, which pandas writes into CSV files
        raise ValueError(
            f"{where}: {name} holds messages, but not as JSON: {show(text)}; save JSON Lines or parquet"
        ) from None


def check_file(path: Path) -> None:
    """ValueError for what is no file of rows, and what to do about it."""
    if path.is_dir():
        saved = any((path / name).exists() for name in ("state.json", "dataset_dict.json"))  # by `datasets`
        raise ValueError(f"{path}: is a folder; a file of rows is wanted{f'; {DATASETS}' if saved else ''}")
    if not path.is_file():  # opening a pipe would wait forever
        raise ValueError(f"{path}: no such file" if not path.exists() else f"{path}: not a regular file")
    with _unpacked(path) as file:
        for magic, what, cure in FOREIGN:
            if _begins(file, magic):
                raise ValueError(f"{path}: {what}; {cure}")
        if is_utf16(file.peek(4)[:4]):
            raise ValueError(f"{path}: looks like UTF-16 text; save it as UTF-8")
        if _begins(file, b"PAR1"):
            if isinstance(file, gzip.GzipFile):
                raise ValueError(f"{path}: is a gzipped parquet file; unpack it with gunzip")
            if not find_spec("pyarrow"):
                convert = shlex.join(["python", "-c", TO_JSON, str(path), f"{path}.jsonl"])
                raise ValueError(
                    f"{path}: is a parquet file, which needs pyarrow: pip install -e '.[parquet]'; or convert it: "
                    f"{convert}"
                )


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
        raise Explained(f"{where}: a raw UltraFeedback record; make pairs of it first: python binarize.py --help")
    _refuse_unread(where, "the row", record, UNREAD_IN_ROWS)
    answers = _answer_keys(where, record)
    chosen, rejected = (_turns(where, key, record[key], "assistant") for key in answers)
    text = isinstance(record[answers[0]], str)
    if text != isinstance(record[answers[1]], str):
        raise ValueError(f"{where}: of {' and '.join(answers)} one is text, and the other is a list of messages")

    # Whole conversations hold their prompt, so what else is called an instruction or an input is metadata.
    whole = any(message["role"] == "user" for message in chosen)
    prompts = [key for key in PROMPTS[: 1 if whole else None] if record.get(key) not in (None, "")]
    if len(prompts) > 1:
        raise ValueError(f"{where}: {' and '.join(prompts)} both hold a prompt; make one of them")
    if text and not prompts:
        raise _no_prompt(where, answers[0], record)
    for key in prompts:
        prompt = _turns(where, key, record[key], "user")
        if key == "prompt" and not whole:
            _refuse_markers(where, record[key])
        if whole and isinstance(record[key], str):
            if all(message["content"] != record[key] for message in chosen[:-1]):
                raise ValueError(f"{where}: prompt is {show(record[key])}, but no turn before the answers says that")
        elif chosen[: len(prompt)] != prompt:  # some files repeat the prompt in front of the answers
            if whole and (prompt[-1]["role"] == "user" or chosen[0]["role"] == "system"):
                raise ValueError(
                    f"{where}: {answers[0]} is a whole conversation, but does not begin with {key}: {show(chosen[0])}, "
                    f"not {show(prompt[0])}; leave {key} out, or make the two agree"
                )
            chosen, rejected = prompt + chosen, prompt + rejected
    systems = [key for key in SYSTEMS if holds(record.get(key))]
    for key in systems:
        turn = {"role": "system", "content": check_text(where, key, record[key])}
        if chosen[0]["role"] != "system":
            chosen, rejected = [turn, *chosen], [turn, *rejected]
        elif chosen[0] != turn:
            raise ValueError(f"{where}: {key} is {show(record[key])}, but the first turn is {show(chosen[0])}")

    _check_conversations(where, chosen, rejected)
    first = record[answers[0]][0] if isinstance(record[answers[0]], list) else record[answers[0]]
    kind = "strings" if text else "turns (from/value)" if "from" in first else "messages"
    shape = f"{'/'.join((*systems, *prompts, *answers))} {kind}"
    return Row(where, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], shape)


def _answer_keys(where: str, record: dict[str, Any]) -> tuple[str, str]:
    found = [keys for keys in ANSWERS if all(record.get(key) is not None for key in keys)]
    if len(found) > 1:
        raise ValueError(f"{where}: {' and '.join(map('/'.join, found))} are both answers; leave one of the two")
    if found:
        return found[0]
    half = next((keys for keys in ANSWERS if any(record.get(key) is not None for key in keys)), ANSWERS[0])
    missing, keys = next(key for key in half if record.get(key) is None), ", ".join(map(repr, record)) or "none"
    lacks = f"{missing!r} is {'null' if missing in record else 'missing'}; the keys are {keys:.250}"
    rename = (
        '[print(json.dumps({"prompt": r["PROMPT"], "chosen": r["BETTER"], "rejected": r["WORSE"]})) '
        "for _, r in read_records(sys.argv[1])]"
    )
    raise ValueError(f"{where}: {lacks}. To rename keys: {_command(where, rename)}")


def _no_prompt(where: str, name: str, record: dict[str, Any]) -> ValueError:
    if "\n\nHuman:" not in record[name]:
        names = ", ".join(map(repr, record))
        return ValueError(
            f"{where}: {name} is text without a {', '.join(PROMPTS)} beside it; the keys are {names:.250}"
        )
    split = (
        't = lambda s: [{"role": "user" if w == "Human" else "assistant", "content": c.strip()} for w, c in re.findall('
        r'r"\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", s, re.S)]; '
        '[print(json.dumps({"chosen": c, "rejected": r})) for _, row in read_records(sys.argv[1]) '
        'for c, r in [(t(row["chosen"]), t(row["rejected"]))] if c[:-1] == r[:-1]]'
    )
    return Explained(
        f"{where}: {name} is a dialogue as text, as in Anthropic's HH. This makes messages of it, and leaves out the "
        f"pairs whose prompts differ: {_command(where, split)}"
    )


def _command(where: str, code: str) -> str:
    path = where.rpartition(":")[0] or "FILE"
    code = f"import json, re, sys; from notus.rows import read_records; {code}"
    return f"{shlex.join(['python', '-c', code, path])} > {shlex.quote(path + '.jsonl')}"


def _refuse_markers(where: str, prompt: Any) -> None:
    if isinstance(prompt, str) and (found := MARKERS.search(prompt)):
        raise Explained(
            f"{where}: the text of prompt has {found[0].strip()!r} in it, which begins a turn in a chat template. The "
            "model's template is put around such text, so a conversation that is already rendered would have two. "
            'Write its turns without markers: {"prompt": [{"role": "user", "content": "..."}], "chosen": "...", '
            '"rejected": "..."}. If the user really typed that marker, write it in the same way: it is kept'
        )


def _check_conversations(where: str, chosen: Sequence[Message], rejected: Sequence[Message]) -> None:
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(
            f"{where}: chosen and rejected answer different prompts: all turns but the last must be equal; chosen "
            f"begins with {show(chosen[0]['content'])}, rejected with {show(rejected[0]['content'])}"
        )
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: {name} must be a prompt and then an assistant turn, not {show(messages)}")
    for before, after in pairwise(chosen):  # no model is asked to answer an answer
        if before["role"] == after["role"] == "assistant":
            raise ValueError(
                f"{where}: an assistant turn follows an assistant turn: {show(before['content'])}, then "
                f"{show(after['content'])}"
            )
    if chosen[-2]["role"] not in ("user", "tool") or all(message["role"] != "user" for message in chosen):
        raise ValueError(f"{where}: the answers follow {show(chosen[:-1])}; a user's turn must come before them")


def _turns(where: str, name: str, value: Any, role: str) -> list[Message]:
    """Text as one turn of `role`; a message, a list of them, or OpenAI's {"messages": list} as messages."""
    if isinstance(value, str):
        value = {"role": role, "content": value}
    elif isinstance(value, dict) and "messages" in value:
        _refuse_unread(where, name, value, UNREAD_IN_ROWS)
        value = value["messages"]
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name} must be text or a list of messages, not {show(value)}")
    return [_message(where, name, message) for message in value]


def _message(where: str, name: str, message: Any) -> Message:
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        speaker = message["from"]
        message = message | {"role": SHAREGPT.get(str(speaker), speaker), "content": message["value"]}
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{where}: {name} holds {show(message)}; a message has a role and a content")
    if message["role"] not in ROLES:
        raise ValueError(f"{where}: {name} has the role {show(message['role'])}; known: {', '.join(ROLES)}")
    _refuse_unread(where, f"a message of {name}", message, UNREAD_IN_MESSAGES)
    content = message["content"]
    if isinstance(content, list) and content and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(check_text(where, f"a text part of {name}", part.get("text")) for part in content)
    return {"role": message["role"], "content": check_text(where, f"{name} content", content)}


def _refuse_unread(where: str, what: str, fields: dict[str, Any], unread: Sequence[str]) -> None:
    for key in unread:
        if holds(fields.get(key)):
            raise ValueError(
                f"{where}: {what} has {key!r}: {show(fields[key])}, which would be lost: it is not read. Write it into "
                "the content as the model should see it, or remove it"
            )


def check_text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, not {show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        raise ValueError(f"{where}: {name} holds {value!a:.80}, which is not text") from None
    return value


def holds(value: Any) -> bool:
    """Whether an optional field says anything. Tables fill empty cells with null, NaN, "" or "[]"."""
    return value == value and value not in (None, False, "", "[]", "{}", "null", [], {})


def show(value: Any) -> str:
    """A value for an error message: as JSON, cut to 80 characters."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, ValueError, TypeError):  # Python's values may be deeper, circular, or have other keys
        text = f"a {type(value).__name__} that JSON cannot hold"
    return text if len(text) <= 80 else f"{text[:77]}..."
