"""The files that AlpacaEval and FastChat judge: model_outputs.json, and model_answer/ID.jsonl of MT-Bench."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from notus.answers import Answer, Request, Source, answer_all
from notus.chat import Message
from notus.files import text_digest, write_atomically
from notus.rows import check_text, read_records

# FastChat's temperature_config (fastchat/llm_judge/common.py); other categories have 0.7.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1} | dict.fromkeys(
    ("extraction", "math", "coding", "reasoning", "arena-hard-200"), 0.0
)


def progress_path(output: Path) -> Path:
    """Where the answers for `output` are kept. Not *.jsonl, of which FastChat takes every one for a model."""
    return output.with_name(f"{output.name}.progress")


def read_instructions(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """AlpacaEval's questions, rows with `instruction` and perhaps `dataset`."""
    rows = []
    for where, row in list(read_records(path))[:limit]:
        if not isinstance(row, dict) or not check_text(where, "instruction", row.get("instruction")).strip():
            raise ValueError(f'{where}: rows look like {{"instruction": "...", "dataset": "..."}}, not {row!r:.80}')
        rows.append({"instruction": row["instruction"], "dataset": row.get("dataset")})
    if not rows:
        raise ValueError(f"{path}: no questions in it")
    return rows


def alpaca(
    source: Source, questions: Sequence[dict[str, Any]], generator: str, output: Path, max_new_tokens: int = 2048,
    temperature: float = 0.7, top_p: float = 1.0, seed: int = 0,
) -> list[str]:  # fmt: skip
    """Write AlpacaEval's model_outputs.json: a list of {"instruction", "output", "generator", "dataset"}. The defaults
    are those that Notus-7B-v1 was sampled with."""
    sampling = (max_new_tokens, temperature, top_p, seed)
    requests = [
        Request(str(number), [{"role": "user", "content": row["instruction"]}], *sampling)
        for number, row in enumerate(questions, 1)
    ]
    answers = answer_all(source, requests, progress_path(output))
    rows = [
        {"instruction": row["instruction"], "output": answer.text.strip(), "generator": generator}
        | ({"dataset": row["dataset"]} if row["dataset"] is not None else {})
        for row, answer in zip(questions, answers, strict=True)
    ]
    write_atomically(output, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    return [describe(answers, output)]


def read_mtbench(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """FastChat's question.jsonl, rows with `question_id`, `category` and `turns`."""
    rows = []
    for where, row in list(read_records(path))[:limit]:
        if not isinstance(row, dict) or not isinstance(row.get("question_id"), int | str):
            raise ValueError(
                f'{where}: rows look like {{"question_id": 81, "category": "...", "turns": ["...", "..."]}}'
            )
        turns = row.get("turns")
        if not isinstance(turns, list) or not turns or not all(check_text(where, "a turn", t).strip() for t in turns):
            raise ValueError(f"{where}: turns must be a list of texts that are not empty, not {turns!r:.80}")
        if not isinstance(category := row.get("category"), str | None):
            raise ValueError(f"{where}: category must be a text, not {category!r:.80}")
        rows.append({"question_id": row["question_id"], "category": category, "turns": turns})
    if not rows:
        raise ValueError(f"{path}: no questions in it")
    if len({row["question_id"] for row in rows}) < len(rows):
        raise ValueError(f"{path}: a question_id is there twice")
    return rows


def mtbench(
    source: Source, questions: Sequence[dict[str, Any]], model_id: str, output: Path, max_new_tokens: int = 1024,
    seed: int = 0,
) -> list[str]:  # fmt: skip
    """Write FastChat's model_answer file: {"question_id", "answer_id", "model_id", "choices", "tstamp"} a line.
    All first turns are asked before the second turns, which begin with the first answers."""
    talks: list[list[Message]] = [[] for _ in questions]
    said: list[Answer] = []
    for turn in range(max(len(question["turns"]) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question["turns"])]
        for i in asked:
            talks[i].append({"role": "user", "content": questions[i]["turns"][turn]})
        requests = [
            Request(f"{questions[i]['question_id']} turn {turn + 1}", list(talks[i]), max_new_tokens,
                    TEMPERATURES.get(questions[i]["category"], 0.7), 1.0, seed)
            for i in asked
        ]  # fmt: skip
        answers = answer_all(source, requests, progress_path(output))
        for i, answer in zip(asked, answers, strict=True):
            talks[i].append({"role": "assistant", "content": answer.text.strip()})
        said += answers
    lines = []
    for question, talk in zip(questions, talks, strict=True):
        turns = [message["content"] for message in talk if message["role"] == "assistant"]
        row = {"question_id": question["question_id"], "answer_id": text_digest(json.dumps([model_id, talk]))[:22]}
        row |= {"model_id": model_id, "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(output, "".join(lines))
    return [describe(said, output)]


def describe(answers: Sequence[Answer], output: Path) -> str:
    cut, empty = sum(answer.cut for answer in answers), sum(not answer.text.strip() for answer in answers)
    return f"{output}: {len(answers):,} answers, {cut:,} cut at the limit of new tokens, {empty:,} empty"
