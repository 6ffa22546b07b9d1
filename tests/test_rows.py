"""rows.py: every accepted shape in every kind of file is the same row, and everything else is refused with its file,
line and value."""

import csv
import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from notus import rows
from notus.rows import read_rows

USER = {"role": "user", "content": "Is 7 prime?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes, it is.", "No."))
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


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


def refusal(source: Path | dict) -> str:
    """What is said of a file, or of a row, that cannot be used."""
    with pytest.raises(ValueError) as caught:
        list(read_rows([source]))
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
    assert row[1:4] == ROW


def test_conversations_of_many_turns_with_a_system_turn(tmp_path: Path):
    prompt = [{"role": "system", "content": "Be brief."}, *turns("1+1?", "2", "2+2?")]
    whole = {"prompt": "1+1?", "chosen": [*prompt, YES], "rejected": [*prompt, NO]}
    apart = {"prompt": prompt, "chosen": [YES], "rejected": [NO]}
    rows = list(read_rows([write(tmp_path / "a.jsonl", whole), write(tmp_path / "b.jsonl", apart, whole)]))
    assert [row.where.rpartition("/")[2] for row in rows] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]
    assert [row[1:4] for row in rows] == [(prompt, "Yes, it is.", "No.")] * 3


def test_metadata_is_ignored_and_gone(tmp_path: Path):
    """Only role and content of a message are kept."""
    user = USER | {"name": "Ada", "info": {"id": 7}}
    row = {"chosen": [user, YES], "rejected": [USER, NO], "prompt_id": "x", "other": [1, 2], "messages": [USER]}
    assert next(read_rows([write(tmp_path / "a.jsonl", row)]))[1:4] == ROW


def table() -> list[tuple[str, dict]]:
    """What the banner says of the rows in the README's table, and the rows."""
    names = {"user": USER, "yes": YES | {"content": "Yes."}, "no": NO}
    lines = re.findall(r"^\| `(.+?)` \|.*\| `({.+})` \|$", README.partition("## Your own pairs")[2], re.MULTILINE)
    return [(shape, eval(row, names)) for shape, row in lines]


@pytest.mark.parametrize(("shape", "row"), table(), ids=[shape for shape, _ in table()])
def test_every_row_of_the_readmes_table_is_the_same_pair(tmp_path: Path, shape: str, row: dict):
    for source in (row, write(tmp_path / "a.jsonl", row)):
        (read,) = read_rows([source])
        assert read[1:] == ([USER], "Yes.", "No.", shape)
    (read,) = read_rows([row | {"system": "Be brief.", "id": 7}])
    prompt = [{"role": "system", "content": "Be brief."}, USER]
    assert read[1:] == (prompt, "Yes.", "No.", f"system/{shape}")


def test_the_table_has_all_shapes():
    assert len(table()) == 9 and {shape for shape, _ in table()} > {
        "prompt/chosen/rejected strings",
        "input/preferred_output/non_preferred_output messages",
    }


STRINGS = {"prompt": "Is 7 prime?", "chosen": "Yes, it is.", "rejected": "No."}
OPENAI = {
    "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [YES],
    "non_preferred_output": [NO],
}
SYSTEM = {"role": "system", "content": "Be brief."}


def parts(*texts: str) -> list[dict]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("row", "prompt", "shape"),
    [
        (OPENAI, [USER], "input/preferred_output/non_preferred_output messages"),
        ({"input": "Is 7 prime?", "chosen": YES, "rejected": NO}, [USER], "input/chosen/rejected messages"),
        ({"prompt": "Is 7 prime?", "chosen": [YES], "rejected": [NO]}, [USER], "prompt/chosen/rejected messages"),
        ({"prompt": [USER], "chosen": "Yes, it is.", "rejected": "No."}, [USER], "prompt/chosen/rejected strings"),
        (STRINGS | {"system_prompt": "Be brief."}, [SYSTEM, USER], "system_prompt/prompt/chosen/rejected strings"),
        # What columns of a table hold where they hold nothing.
        (STRINGS | {"system": "", "instruction": None, "images": [], "tools": "[]"}, [USER], ""),
        (STRINGS | {"system": float("nan"), "chosen_response": None}, [USER], ""),
        # A whole conversation holds its prompt: `question` and `instruction` are metadata.
        (SHAPES["implicit"] | {"question": "7?", "instruction": "Be nice."}, [USER], "chosen/rejected messages"),
        (
            {"chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO], "system": "Be brief."},
            [SYSTEM, USER],
            "system/chosen/rejected messages",
        ),
        (
            {"chosen": [{"from": "human", "value": "Is 7 prime?"}, {"from": "gpt", "value": "Yes, it is."}],
             "rejected": [{"from": "human", "value": "Is 7 prime?"}, {"from": "gpt", "value": "No."}]},
            [USER],
            "chosen/rejected turns (from/value)",
        ),
        # Together's own example begins with a greeting.
        (OPENAI | {"input": {"messages": [NO, USER]}}, [NO, USER], ""),
        (SHAPES["explicit"] | {"prompt": [USER | {"content": parts("Is 7 ", "prime?")}]}, [USER], ""),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_shape_and_what_may_stand_beside_it(row: dict, prompt: list, shape: str):
    (read,) = read_rows([row])
    assert read[1:4] == (prompt, "Yes, it is.", "No.") and shape in read.shape


def test_sharegpts_roles_and_a_tool():
    spoken = [("system", "Be brief."), ("human", "7?"), ("gpt", "call"), ("observation", "prime")]
    answers = {"chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"from": "gpt", "value": "No."}}
    (read,) = read_rows([{"conversations": [{"from": who, "value": what} for who, what in spoken], **answers}])
    roles = ("system", "user", "assistant", "tool")
    assert read.prompt == [{"role": role, "content": what} for role, (_, what) in zip(roles, spoken, strict=True)]


def test_rows_of_a_notebook(tmp_path: Path):
    """Dicts, arrays as pandas makes them, and files, in one list."""
    array = {name: np.array(value, dtype=object) for name, value in SHAPES["explicit"].items()}
    read = list(read_rows([STRINGS, array, write(tmp_path / "a.jsonl", STRINGS), SHAPES["argilla"]]))
    assert [row.where for row in read] == ["row 1", "row 2", f"{tmp_path / 'a.jsonl'}:1", "row 4"]
    assert [row[1:4] for row in read] == [ROW] * 4
    deep = np.array([message | {"tool_calls": np.array([])} for message in SHAPES["implicit"]["chosen"]], dtype=object)
    assert next(read_rows([SHAPES["implicit"] | {"chosen": deep}]))[1:4] == ROW
    assert refusal({"prompt": "Hi"}).startswith("row 1: 'chosen' is missing; the keys are 'prompt'")
    assert refusal(STRINGS | {"chosen": object()}).startswith(
        'row 1: chosen must be text or a list of messages, not "<o'
    )
    assert refusal(STRINGS | {"chosen": {(1, 2)}}).startswith("row 1: chosen must be text or a list of messages")
    assert refusal(STRINGS | {"chosen": [{(1, 2): 3}]}).startswith("row 1: chosen holds a dict that JSON cannot hold; ")


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
    assert all(row[1:4] == ROW for row in rows)


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
        (b"PAR1\x15\x04", ": cannot be read as parquet: "),
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


def test_without_pyarrow_a_parquet_file_is_refused_with_a_command_for_a_shell(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(rows, "find_spec", lambda name: None if name == "pyarrow" else ...)
    path = tmp_path / "it's a.parquet"
    path.write_bytes(b"PAR1")
    said, _, command = refusal(path).partition("; or convert it: ")
    assert said == f"{path}: is a parquet file, which needs pyarrow: pip install -e '.[parquet]'"
    python, flag, code, *files = shlex.split(command)
    assert (python, flag, files) == ("python", "-c", [str(path), f"{path}.jsonl"])
    compile(code, "command", "exec")


MESSAGES = pyarrow.list_(pyarrow.struct([("content", pyarrow.string()), ("role", pyarrow.string())]))
NUMBER = pyarrow.float64()
# As the data sets' cards list their columns.
COLUMNS = {
    "argilla/ultrafeedback-binarized-preferences": (
        pyarrow.schema([
            ("source", pyarrow.string()), ("instruction", pyarrow.string()), ("chosen_response", pyarrow.string()),
            ("rejected_response", pyarrow.string()), ("chosen_avg_rating", NUMBER), ("rejected_avg_rating", NUMBER),
            ("chosen_model", pyarrow.string()),
        ]),
        SHAPES["argilla"] | {"chosen_avg_rating": 5.0, "rejected_avg_rating": 1.0, "chosen_model": "gpt-4"},
        "instruction/chosen_response/rejected_response strings",
    ),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        pyarrow.schema([
            ("source", pyarrow.string()), ("prompt", pyarrow.string()), ("chosen", MESSAGES),
            ("chosen-rating", NUMBER), ("chosen-model", pyarrow.string()), ("rejected", MESSAGES),
            ("rejected-rating", NUMBER), ("rejected-model", pyarrow.string()),
        ]),
        SHAPES["prompt as text too"] | {"source": "flan", "chosen-rating": 5.0, "rejected-rating": 1.0},
        "prompt/chosen/rejected messages",
    ),
    "HuggingFaceH4/ultrafeedback_binarized": (
        pyarrow.schema([
            ("prompt", pyarrow.string()), ("prompt_id", pyarrow.string()), ("chosen", MESSAGES),
            ("rejected", MESSAGES), ("messages", MESSAGES), ("score_chosen", NUMBER), ("score_rejected", NUMBER),
        ]),
        SHAPES["prompt as text too"] | {"prompt_id": "7f", "messages": [USER, YES], "score_chosen": 5.0},
        "prompt/chosen/rejected messages",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_parquet_files_of_the_hub(tmp_path: Path, name: str):
    schema, row, shape = COLUMNS[name]
    path = tmp_path / "train-00000-of-00001.parquet"
    table = pyarrow.Table.from_pylist([row] * 3000, schema)  # several batches
    parquet.write_table(table, path, row_group_size=700)
    read = list(read_rows([path]))
    assert {(str(each[1:4]), each.shape) for each in read} == {(str(ROW), shape)}
    assert [row.where for row in read] == [f"{path}: row {number}" for number in range(1, 3001)]


def test_parquet_is_streamed(tmp_path: Path, monkeypatch):
    """The first rows come before the second batch is read."""
    path, sizes = tmp_path / "a.parquet", []
    parquet.write_table(pyarrow.Table.from_pylist([STRINGS] * 5000), path)
    batches = parquet.ParquetFile.iter_batches

    def counted(*arguments, **settings):
        for batch in batches(*arguments, **settings):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    next(read_rows([path]))
    assert len(sizes) == 1 and sizes[0] < 2000


def test_bad_parquet_files_are_refused(tmp_path: Path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([STRINGS, STRINGS | {"chosen": None}]), path)
    assert refusal(path).startswith(f"{path}: row 2: 'chosen' is null; the keys are 'prompt', 'chosen', 'rejected'. ")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert refusal(path).startswith(f"{path}: cannot be read as parquet: ")
    path.write_bytes(gzip.compress(data))
    assert refusal(path) == f"{path}: is a gzipped parquet file; unpack it with gunzip"


# --- CSV -----------------------------------------------------------------------------------------------------------


def write_csv(path: Path, *lines: list) -> Path:
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.CSV", "a.csv.gz"])
def test_csv_cells_are_text_empty_or_messages_as_json(tmp_path: Path, name: str):
    header = ["\ufeffprompt", "chosen", "rejected", "system", "input", "messages"]  # the last is not read
    chosen, rejected = (json.dumps([USER, answer]) for answer in (YES, NO))
    alone = [json.dumps({"from": "gpt", "value": answer["content"]}) for answer in (YES, NO)]
    assert next(read_rows([write_csv(tmp_path / f"one {name}", header[:3], ["Is 7 prime?", *alone])]))[1:4] == ROW
    lines = [
        ["Is 7 prime?", "Yes, it is.", "No.", "", "", "[{'role': 'user'}]"],
        [],
        ["", chosen, rejected, "Be brief.", "", ""],
        ["", "[1, 2]", '{"a": 3}', "", 'List\n"two", please,\r\n or so', ""],
        ["x" * 200_000, "7", "nan", "", "", ""],
        ["Hi", "", "No.", "", "", ""],
    ]
    path = write_csv(tmp_path / name, header, *lines)
    read = list(read_rows([path]))
    assert [row.where for row in read] == [f"{path}: row {number}" for number in (1, 2, 3, 4, 5)]
    assert read[0][1:] == (*ROW, "prompt/chosen/rejected strings")
    assert read[1][1:] == ([SYSTEM, USER], "Yes, it is.", "No.", "system/chosen/rejected messages")
    assert read[2][1:] == (
        turns('List\n"two", please,\r\n or so'),
        "[1, 2]",
        '{"a": 3}',
        "input/chosen/rejected strings",
    )
    assert read[3][1:4] == (turns("x" * 200_000), "7", "nan")
    assert read[4][1:4] == (turns("Hi"), "", "No.")  # a pair that data.drop_bad_pairs leaves out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen,rejected\na,b,c\na,b\n", ': row 2: has 2 cells, and the header has 3: ["a", "b"]; rows look'),
        ("prompt,chosen,chosen\na,b,c\n", ": the header names a column twice: "),
        ('prompt,chosen,rejected\na,b,c\na,b,"c\n', ": row 2: not CSV: unexpected end of data"),
        ("prompt;chosen;rejected\na;b;c\n", ": row 1: 'chosen' is missing; the keys are 'prompt;chosen;rejected'. "),
        ("prompt,chosen,rejected\n", ": no rows in it; rows look like"),
        ("", ": no rows in it; rows look like"),
        (
            "chosen,rejected\n\"[{'role': 'user', 'content': 'Hi'}]\",b\n",
            ": row 1: chosen holds messages, but not as JSON: \"[{'role': 'user', 'content': 'Hi'}]\"; save "
            "JSON Lines or parquet",
        ),
        ("prompt,chosen,rejected\na,b,\xff\n", ": cannot be read as text: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_bad_csv_is_refused_with_its_row(tmp_path: Path, text: str, message: str):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("latin-1"))
    assert refusal(path).startswith(f"{path}{message}")


# --- files that are none -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("prompt", "before"),
    [
        ([SYSTEM, USER], [USER]), ([USER], [SYSTEM, USER]), ([USER | {"content": "Is 7 prime? "}], [USER]),
        ([USER], [*turns("Hi", "Hello."), USER]), ([*turns("Hi", "Hello."), USER], [USER]),
    ],
)  # fmt: skip
def test_a_whole_conversation_that_does_not_begin_with_its_prompt_is_refused(prompt: list, before: list):
    """Put together, the question would stand there twice, or a system turn after a user's."""
    said = refusal({"prompt": prompt, "chosen": [*before, YES], "rejected": [*before, NO]})
    assert said.startswith("row 1: chosen is a whole conversation, but does not begin with prompt: ")


def test_a_conversation_may_go_on_where_its_prompt_ends():
    row = next(read_rows([{"prompt": turns("Hi", "Hello."), "chosen": [USER, YES], "rejected": [USER, NO]}]))
    assert row.prompt == [*turns("Hi", "Hello."), USER]


RAW = {"instruction": "Hi", "source": "flan", "completions": [{"response": "Hello", "annotations": {}}]}
TOOL = {"role": "tool", "content": "7"}
HALF = "\ud83d"  # of a surrogate pair: JSON can spell it, and no tokenizer takes it


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1, 2], "a row must be an object, not [1, 2]"),
        ("text", 'a row must be an object, not "text"'),
        (None, "a row must be an object, not null"),
        ({}, "'chosen' is missing; the keys are none"),
        (changed(chosen=None), "'chosen' is missing; the keys are 'rejected', 'score_chosen', 'score_rejected'"),
        (changed(rejected=None), "'rejected' is missing"),
        (
            {"instruction": "Hi", "chosen_response": "Hello"},
            "'rejected_response' is missing; the keys are 'instruction', ",
        ),
        (changed(chosen="Yes, it is."), "of chosen and rejected one is text, and the other is a list of messages"),
        (changed(rejected="No."), "of chosen and rejected one is text, and the other is a list of messages"),
        (
            STRINGS | {"prompt": None},
            "chosen is text without a prompt, instruction, question, input, conversations beside",
        ),
        (STRINGS | {"instruction": "7?"}, "prompt and instruction both hold a prompt; make one of them"),
        (
            STRINGS | SHAPES["argilla"],
            "chosen/rejected and chosen_response/rejected_response are both answers; leave one",
        ),
        (STRINGS | {"system": ["Be brief."]}, 'system must be a string, not ["Be brief."]'),
        (
            STRINGS | {"system": "a", "system_prompt": "b"},
            'system_prompt is "b", but the first turn is {"role": "system"',
        ),
        (OPENAI | {"input": {"messages": [USER], "tools": [1]}}, "input has 'tools': [1], which would be lost"),
        (OPENAI | {"input": {"messages": []}}, "input must be text or a list of messages, not []"),
        (OPENAI | {"preferred_output": [YES, YES]}, "chosen and rejected answer different prompts"),
        (changed(chosen=[USER, YES | {"content": []}]), "chosen content must be a string, not []"),
        (
            changed(chosen=[USER, YES | {"content": [{"type": "image_url", "image_url": "x"}]}]),
            "must be a string, not [{",
        ),
        (changed(chosen=[USER, YES | {"content": parts(7)}]), "a text part of chosen must be a string, not 7"),
        (
            changed(chosen=[{"from": "function_call", "value": ""}]),
            'chosen has the role "function_call"; known: system',
        ),
        (
            changed(chosen=[{"from": ["gpt"], "value": ""}]),
            'chosen has the role ["gpt"]; known: system, user, assistant',
        ),
        (SHAPES["explicit"] | {"prompt": [SYSTEM]}, "; a user's turn must come before them"),
        (SHAPES["explicit"] | {"prompt": [USER, SYSTEM]}, "; a user's turn must come before them"),
        (changed(chosen=nested(500)), "chosen holds [[["),
        (changed(rejected=[]), "rejected must be text or a list of messages, not []"),
        (changed(chosen={"role": "user"}), 'chosen holds {"role": "user"}; a message has a role and a content'),
        (changed(rejected=[USER, "No."]), 'rejected holds "No."; a message has a role and a content'),
        (changed(rejected=[USER, {"role": "assistant"}]), 'rejected holds {"role": "assistant"}; a message has a role'),
        (changed(chosen=[USER, TOOL]), "chosen must be a prompt and then an assistant turn, not [{"),
        (changed(chosen=[USER, {"role": 7, "content": ""}]), "chosen has the role 7; known: system, user, assistant"),
        (changed(chosen=[USER, {"role": "assistant", "content": 42}]), "chosen content must be a string, not 42"),
        (changed(chosen=[{"role": "user", "content": None}, YES]), "chosen content must be a string, not null"),
        (SHAPES["argilla"] | {"instruction": ["Hi"]}, 'instruction holds "Hi"; a message has a role and a content'),
        (SHAPES["argilla"] | {"rejected_response": None}, "'rejected_response' is null; the keys are 'instruction', "),
        (changed(rejected=[*turns("Is 8 prime?"), NO]), "chosen and rejected answer different prompts"),
        (changed(rejected=[USER, NO, USER, NO]), "chosen and rejected answer different prompts"),
        (changed(chosen=[USER], rejected=[USER]), "chosen must be a prompt and then an assistant turn, not [{"),
        (changed(chosen=[YES], rejected=[NO]), "chosen must be a prompt and then an assistant turn, not [{"),
        (changed(rejected=[USER, USER]), "rejected must be a prompt and then an assistant turn, not [{"),
        (changed(prompt="Is 8 prime?"), 'prompt is "Is 8 prime?", but no turn before the answers says that'),
        (changed(prompt=YES["content"]), "but no turn before the answers says that"),
        (changed(prompt=True), "prompt must be text or a list of messages, not true"),
        (changed(prompt=7), "prompt must be text or a list of messages, not 7"),
        (changed(prompt={}), "prompt holds {}; a message has a role and a content"),
        (SHAPES["explicit"] | {"prompt": []}, "prompt must be text or a list of messages, not []"),
        (SHAPES["explicit"] | {"prompt": [TOOL]}, "; a user's turn must come before them"),
        (
            SHAPES["explicit"] | {"prompt": turns("Hi", "Hello!")},
            'an assistant turn follows an assistant turn: "Hello!", then "Yes, it is."',
        ),
        (
            SHAPES["explicit"] | {"prompt": [USER, NO, NO, USER]},
            'an assistant turn follows an assistant turn: "No.", then "No."',
        ),
        (changed(chosen=[USER, {"role": "assistant", "content": HALF}]), "chosen content holds '\\ud83d', which is"),
        (SHAPES["argilla"] | {"instruction": "a\udc00"}, "instruction content holds 'a\\udc00', which is not text"),
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


ROW_FIELDS = (
    "tools", "history", "images", "image", "audio", "audios", "video", "videos", "documents", "functions",
)  # fmt: skip
MESSAGE_FIELDS = (
    "tool_calls", "function_call", "tool_call_id", "reasoning_content", "reasoning", "thinking", "tools", "images",
)  # fmt: skip


@pytest.mark.parametrize("name", ROW_FIELDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_field_that_would_be_lost_is_refused(tmp_path: Path, shape: str, name: str):
    path = write(tmp_path / "a.jsonl", SHAPES[shape] | {name: ["Be brief."]})
    assert refusal(path).startswith(
        f'{path}:1: the row has {name!r}: ["Be brief."], which would be lost: it is not read.'
    )


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
    row = changed(chosen=[user, yes]) | dict.fromkeys((*ROW_FIELDS, "system", "question"), empty)
    assert next(read_rows([write(tmp_path / "a.jsonl", row)]))[1:4] == ROW


# --- refusals that say what to do ------------------------------------------------------------------------------------


def test_raw_records_are_sent_to_binarize(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", RAW)
    what = "a raw UltraFeedback record; make pairs of it first: python binarize.py --help"
    assert refusal(path) == f"{path}:1: {what}"


@pytest.mark.parametrize(
    "marker",
    ["<|user|>", "<|system|>", "<|im_start|>", "<|start_header_id|>", "[INST]", "<<SYS>>", "<start_of_turn>",
     "<｜User｜>", "\n\nHuman:", "\n\nAssistant:"],
)  # fmt: skip
def test_a_rendered_prompt_is_refused_with_both_ways_out(tmp_path: Path, marker: str):
    text = f"{marker}\nIs 7 prime?"
    path = write(tmp_path / "a.jsonl", STRINGS | {"prompt": text})
    said = refusal(path)
    assert said.startswith(f"{path}:1: the text of prompt has {marker.strip()!r} in it") and len(said) < 700
    # The first way: its turns as messages. The second: the same text as a message.
    assert "Write its turns without markers" in said and "If the user really typed that marker" in said
    assert next(read_rows([STRINGS | {"prompt": [USER]}]))[1:4] == ROW
    assert "the text of prompt has" in refusal({"prompt": text, "chosen": [YES], "rejected": [NO]})
    for row in (STRINGS | {"prompt": turns(text)}, STRINGS | {"chosen": f"{marker} begins a turn."}):
        assert next(read_rows([row])).prompt in (turns(text), [USER])


def run(command: str) -> None:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(command, shell=True, check=True, env=environment, cwd=Path(__file__).parent.parent)


def test_the_command_that_renames_keys_works_for_every_kind_of_file(tmp_path: Path):
    row = {"q": "Is 7 prime?", "good": "Yes, it is.", "bad": "No."}
    files = [write(tmp_path / "it's a.jsonl.gz", row), write_csv(tmp_path / "a.csv", list(row), list(row.values()))]
    for path in files:
        said = refusal(path)
        assert "'chosen' is missing; the keys are 'q', 'good', 'bad'. " in said and len(said) < 900
        command = said.partition("To rename keys: ")[2].partition("; rows look like")[0]
        for name, key in (("PROMPT", "q"), ("BETTER", "good"), ("WORSE", "bad")):
            command = command.replace(f'"{name}"', f'"{key}"')
        run(command)
        assert next(read_rows([f"{path}.jsonl"]))[1:4] == ROW


def test_the_command_for_anthropics_hh_works(tmp_path: Path):
    def row(chosen: str, rejected: str, end: str = "Is 7 prime?") -> dict:
        begin = "\n\nHuman: Hello\n\nAssistant: Hi.\nAsk me.\n\nHuman: "
        answers = {"chosen": chosen, "rejected": rejected}
        return {key: f"{begin}{end}\n\nAssistant: {answer}" for key, answer in answers.items()}

    other = row("a", "b") | {"rejected": row("a", "b", "Is 8 prime?")["rejected"]}
    path = write(tmp_path / "train.jsonl.gz", row("Yes, it is.", "No."), other, row("Yes.\n\nReally.", ""))
    said = refusal(path)
    assert said.startswith(f"{path}:1: chosen is a dialogue as text, as in Anthropic's HH. ") and len(said) < 900
    run(said[said.index("python -c") :])
    prompt = turns("Hello", "Hi.\nAsk me.", "Is 7 prime?")
    assert [each[1:4] for each in read_rows([f"{path}.jsonl"])] == [
        (prompt, "Yes, it is.", "No."), (prompt, "Yes.\n\nReally.", "")
    ]  # fmt: skip
