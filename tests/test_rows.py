"""rows.py: every accepted shape in every kind of file is the same row, and everything else is refused with its file,
line and value."""

import gzip
import json
import os
import shlex
from pathlib import Path

import pytest

from notus import rows
from notus.rows import read_rows

USER = {"role": "user", "content": "Is 7 prime?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes, it is.", "No."))


def write(path: Path, *rows: object) -> Path:
    """One row a line; .json as an array; .gz compressed."""
    name = path.name.removesuffix(".gz")
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def turns(*contents: str) -> list[dict]:
    """A conversation of alternating turns that the user begins."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def row_of(chosen: str, rejected: str, *prompt: str) -> dict:
    return {"chosen": turns(*prompt or ("Hi",), chosen), "rejected": turns(*prompt or ("Hi",), rejected)}


def refusal(path: Path) -> str:
    """What is said of a file that cannot be used."""
    with pytest.raises(ValueError) as caught:
        list(read_rows([path]))
    return str(caught.value)


# --- shapes --------------------------------------------------------------------------------------------------------

SHAPES = {
    "implicit": {"chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 5.0, "score_rejected": 1.0},
    "prompt as text too": {"prompt": USER["content"], "chosen": [USER, YES], "rejected": [USER, NO]},
    "explicit": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "explicit, prompt repeated": {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
    "argilla": {
        "instruction": USER["content"],
        "chosen_response": YES["content"],
        "rejected_response": NO["content"],
        "source": "flan",
    },
}
ROW = ([{"role": "user", "content": "Is 7 prime?"}], "Yes, it is.", "No.")


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json", "pairs.json.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_file_is_the_same_row(tmp_path: Path, shape: str, name: str):
    path = write(tmp_path / name, SHAPES[shape])
    (row,) = read_rows([path])
    assert row.where == (f"{path}: row 1" if ".json" in name and "jsonl" not in name else f"{path}:1")
    assert row[1:] == ROW


def test_conversations_of_many_turns_with_a_system_turn(tmp_path: Path):
    prompt = [{"role": "system", "content": "Be brief."}, *turns("1+1?", "2", "2+2?")]
    whole = {"prompt": "1+1?", "chosen": [*prompt, YES], "rejected": [*prompt, NO]}
    apart = {"prompt": prompt, "chosen": [YES], "rejected": [NO]}
    rows = list(read_rows([write(tmp_path / "a.jsonl", whole), write(tmp_path / "b.jsonl", apart, whole)]))
    assert [row.where.rpartition("/")[2] for row in rows] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]
    assert [row[1:] for row in rows] == [(prompt, "Yes, it is.", "No.")] * 3


def test_metadata_is_ignored_and_gone(tmp_path: Path):
    """Only role and content of a message are kept."""
    user = USER | {"name": "Ada", "info": {"id": 7}}
    row = {"chosen": [user, YES], "rejected": [USER, NO], "prompt_id": "x", "other": [1, 2], "messages": [USER]}
    assert next(read_rows([write(tmp_path / "a.jsonl", row)]))[1:] == ROW


# --- files ---------------------------------------------------------------------------------------------------------

LINE = json.dumps(SHAPES["implicit"]).encode() + b"\n"
ARRAY = b"[\n" + LINE + b"]"
BOM = b"\xef\xbb\xbf"


def test_blank_lines_are_no_rows_but_are_counted_as_lines(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(SHAPES["implicit"]) + "\r\n\n  \n" + json.dumps(SHAPES["explicit"]))
    assert [row.where for row in read_rows([path])] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.txt", "a"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize(
    ("content", "places"),
    [
        (LINE + LINE, [":1", ":2"]),
        (BOM + LINE + LINE, [":1", ":2"]),
        (BOM + b"\n" + LINE, [":2"]),
        (ARRAY, [": row 1"]),
        (BOM + b" \n" + ARRAY, [": row 1"]),
    ],
    ids=["lines", "lines after a BOM", "blank line after a BOM", "array", "array after a BOM"],
)
def test_the_content_decides_the_format_and_not_the_name(tmp_path: Path, name: str, pack, content, places):
    path = tmp_path / name
    path.write_bytes(pack(content))
    rows = list(read_rows([path]))
    assert [row.where for row in rows] == [f"{path}{place}" for place in places]
    assert all(row[1:] == ROW for row in rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE + b'{"chosen": [}\n', ":2: not JSON: Expecting value at column 13"),
        (LINE + LINE[:-20], ":2: not JSON: "),
        (gzip.compress(LINE + b"{'chosen'"), ":2: not JSON: "),
        (b"[\n{},\n{]", ":3: not JSON: "),
        (b"[{},\n{}]x", ":2: not JSON: Extra data at column 4"),
        (LINE + b"[" * 100_000 + b"\n", ":2: not JSON that can be read: it is nested too deeply"),
        (LINE + b'{"chosen": ' + b"7" * 5000 + b"}\n", ":2: not JSON that can be read: Exceeds the limit"),
        (b"[" * 100_000, ":1: not JSON that can be read: it is nested too deeply"),
        (LINE + b'{"chosen": 1, "chosen": 1}\n', ":2: not JSON that can be read: an object has the key 'chosen' twice"),
        (LINE + b'{"chosen": "\xe9"}\n', ":2: not JSON that can be read: 'utf-8' codec can't decode byte 0xe9"),
        (b'["\xe9"]', ": cannot be read as text: 'utf-8' codec can't decode byte 0xe9"),
        (LINE.decode().encode("utf-16"), ": looks like UTF-16 text; save it as UTF-8"),
        (b"\xfe\xff" + LINE.decode().encode("utf-16-be"), ": looks like UTF-16 text; save it as UTF-8"),
        (LINE.decode().encode("utf-16-le"), ": looks like UTF-16 text; save it as UTF-8"),
        (gzip.compress(LINE.decode().encode("utf-16")), ": looks like UTF-16 text; save it as UTF-8"),
        (b"[]", ": no rows in it; rows look like "),
        (b"", ": no rows in it; rows look like "),
        (BOM, ": no rows in it; rows look like "),
        (b"\n \n", ": no rows in it; rows look like "),
        (gzip.compress(b""), ": no rows in it; rows look like "),
        (gzip.compress(LINE * 99)[:-9], ": cannot be read as text: Compressed file ended"),
        (gzip.compress(LINE)[:5], ": cannot be read as text: Compressed file ended"),
        (gzip.compress(LINE)[:10] + b"\xff" * 50, ": cannot be read as text: "),  # zlib's own error
        (b"PAR1\x15\x04", ": is a parquet file; convert it: python -c 'import sys, pandas; pandas.read_parquet("),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", ": is a git-lfs pointer, not the file itself; "),
        (b"PK\x03\x04\x14\x00", ": is a zip archive; unpack it"),
        (b"ARROW1\x00\x00", ": is an Arrow file; load it with `datasets` and save it with Dataset.to_json"),
        (b"\xff\xff\xff\xff\x10\x01", ": is an Arrow file; load it with `datasets` and save it with Dataset.to_json"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value[:40],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}{message}")


def test_the_command_for_a_parquet_file_is_one_for_a_shell(tmp_path: Path):
    path = tmp_path / "it's a.parquet"
    path.write_bytes(b"PAR1")
    python, flag, code, *files = shlex.split(refusal(path).partition("convert it: ")[2])
    assert (python, flag, files) == ("python", "-c", [str(path), f"{path}.jsonl"])
    compile(code, "command", "exec")


def test_what_is_no_file_is_refused(tmp_path: Path):
    for name in ("dataset", "datasets"):
        (tmp_path / name).mkdir()
    (tmp_path / "dataset" / "state.json").touch()  # Dataset.save_to_disk
    (tmp_path / "datasets" / "dataset_dict.json").touch()  # DatasetDict.save_to_disk
    os.mkfifo(tmp_path / "pipe")
    folder, hint = "is a folder; a file of rows is wanted", "load it with `datasets` and save it with Dataset.to_json"
    for name, message in {
        "absent.jsonl": "no such file",
        "": folder,
        "dataset": f"{folder}; {hint}",
        "datasets": f"{folder}; {hint}",
        "pipe": "not a regular file",  # opening it would wait forever
    }.items():
        assert refusal(tmp_path / name) == f"{tmp_path / name}: {message}"


# --- rows that are refused -----------------------------------------------------------------------------------------


def changed(**values: object) -> dict:
    """The implicit row with other values; None takes a key away."""
    row = SHAPES["implicit"] | values
    return {name: value for name, value in row.items() if value is not None}


def nested(depth: int) -> list:
    return [nested(depth - 1)] if depth else []


RAW = {"instruction": "Hi", "source": "flan", "completions": [{"response": "Hello", "annotations": {}}]}
TOOL = {"role": "tool", "content": "7"}
HALF = "\ud83d"  # of a surrogate pair: JSON can spell it, and no tokenizer takes it


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RAW, "a raw UltraFeedback record; make pairs of it first: python binarize.py"),
        ([1, 2], "a row must be an object, not [1, 2]"),
        ("text", 'a row must be an object, not "text"'),
        (None, "a row must be an object, not null"),
        ({}, "'chosen' is missing; the keys are none"),
        (changed(chosen=None), "'chosen' is missing; the keys are 'rejected', 'score_chosen', 'score_rejected'"),
        (changed(rejected=None), "'rejected' is missing"),
        ({"instruction": "Hi", "chosen_response": "Hello"}, "'chosen' is missing; the keys are 'instruction', "),
        (changed(chosen="Yes, it is."), 'chosen must be a list of messages, not "Yes, it is."'),
        (changed(chosen=nested(500)), "chosen holds [[["),
        (changed(rejected=[]), "rejected must be a list of messages, not []"),
        (changed(chosen={"role": "user"}), 'chosen must be a list of messages, not {"role": "user"}'),
        (changed(rejected=[USER, "No."]), 'rejected holds "No."; a message has a role and a content'),
        (changed(rejected=[USER, {"role": "assistant"}]), 'rejected holds {"role": "assistant"}; a message has a role'),
        (changed(chosen=[USER, TOOL]), 'chosen has the role "tool"; known: system, user, assistant'),
        (changed(chosen=[USER, {"role": 7, "content": ""}]), "chosen has the role 7; known: system, user, assistant"),
        (changed(chosen=[USER, {"role": "assistant", "content": 42}]), "chosen content must be a string, not 42"),
        (changed(chosen=[{"role": "user", "content": None}, YES]), "chosen content must be a string, not null"),
        (SHAPES["argilla"] | {"instruction": ["Hi"]}, 'instruction must be a string, not ["Hi"]'),
        (SHAPES["argilla"] | {"rejected_response": None}, "rejected_response must be a string, not null"),
        (changed(rejected=[*turns("Is 8 prime?"), NO]), "chosen and rejected answer different prompts"),
        (changed(rejected=[USER, NO, USER, NO]), "chosen and rejected answer different prompts"),
        (changed(chosen=[USER], rejected=[USER]), "chosen must be a prompt and then an assistant turn, not [{"),
        (changed(chosen=[YES], rejected=[NO]), "chosen must be a prompt and then an assistant turn, not [{"),
        (changed(rejected=[USER, USER]), "rejected must be a prompt and then an assistant turn, not [{"),
        (changed(prompt="Is 8 prime?"), 'prompt is "Is 8 prime?", but no turn before the answers says that'),
        (changed(prompt=YES["content"]), "but no turn before the answers says that"),
        (changed(prompt=True), "prompt must be text or a list of messages, not true"),
        (changed(prompt=7), "prompt must be text or a list of messages, not 7"),
        (changed(prompt={}), "prompt must be text or a list of messages, not {}"),
        (SHAPES["explicit"] | {"prompt": []}, "prompt must be a list of messages, not []"),
        (SHAPES["explicit"] | {"prompt": [TOOL]}, 'prompt has the role "tool"'),
        (
            SHAPES["explicit"] | {"prompt": turns("Hi", "Hello!")},
            'an assistant turn follows an assistant turn: "Hello!", then "Yes, it is."',
        ),
        (
            SHAPES["explicit"] | {"prompt": [USER, NO, NO, USER]},
            'an assistant turn follows an assistant turn: "No.", then "No."',
        ),
        (SHAPES["explicit"] | {"prompt": [NO, USER]}, 'the conversation begins with an assistant turn: "No."'),
        (changed(chosen=[USER, {"role": "assistant", "content": HALF}]), "chosen content holds '\\ud83d', which is"),
        (SHAPES["argilla"] | {"instruction": "a\udc00"}, "instruction holds 'a\\udc00', which is not text"),
        (changed(chosen=[{"role": "user", "content": "x" * 500}, YES]), f'"{"x" * 76}..., rejected with "Is 7'),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)
def test_a_bad_row_is_refused_with_its_file_line_and_value(tmp_path: Path, row: object, message: str):
    path = write(tmp_path / "pairs.jsonl", SHAPES["implicit"], row)
    said = refusal(path)
    assert said.startswith(f"{path}:2: ") and message in said and said.endswith(f"; {rows.SHAPES}")
    said = refusal(write(tmp_path / "pairs.json", SHAPES["implicit"], row))
    assert said.startswith(f"{tmp_path / 'pairs.json'}: row 2: ") and message in said


ROW_FIELDS = ("tools", "system", "system_prompt", "images", "image", "audio", "videos", "documents")
MESSAGE_FIELDS = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tools", "images",
)  # fmt: skip


@pytest.mark.parametrize("name", ROW_FIELDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_field_that_would_be_lost_is_refused(tmp_path: Path, shape: str, name: str):
    path = write(tmp_path / "a.jsonl", SHAPES[shape] | {name: ["Be brief."]})
    assert refusal(path).startswith(f'{path}:1: {name!r} is ["Be brief."], which would be lost: it is not read.')


@pytest.mark.parametrize("name", MESSAGE_FIELDS)
def test_a_field_of_a_message_that_would_be_lost_is_refused(tmp_path: Path, name: str):
    for place, row in {
        "chosen": changed(chosen=[USER, YES | {name: "7"}]),
        "rejected": changed(rejected=[USER | {name: "7"}, NO]),
        "prompt": SHAPES["explicit"] | {"prompt": [USER | {name: "7"}]},
    }.items():
        path = write(tmp_path / "a.jsonl", row)
        assert refusal(path).startswith(f'{path}:1: a message of {place} has {name!r}: "7", which would be lost')


@pytest.mark.parametrize("empty", [None, "", "[]", "{}", "null", [], {}, False])
def test_a_field_that_is_empty_loses_nothing(tmp_path: Path, empty: object):
    user, yes = (message | dict.fromkeys(MESSAGE_FIELDS, empty) for message in (USER, YES))
    row = changed(chosen=[user, yes]) | dict.fromkeys(ROW_FIELDS, empty)
    assert next(read_rows([write(tmp_path / "a.jsonl", row)]))[1:] == ROW
