"""Preference files -> pairs of token ids, and the order in which training sees them.

Rows may have any of these shapes, recognized by their keys; `messages` are [{"role": ..., "content": ...}, ...]:

    {"chosen": messages, "rejected": messages}                      whole conversations: binarize.py's form
    {"prompt": "...", "chosen": messages, "rejected": messages}     the same, the prompt once more as text: H4's
    {"prompt": messages, "chosen": messages, "rejected": messages}  prompt and answers apart: TRL's
    {"instruction": "...", "chosen_response": "...", "rejected_response": "..."}  argilla's, Notus-7B-v1's own data
"""

import fcntl
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from notus.chat import ChatTemplate, with_system_turn
from notus.tokenizer import Tokenizer

Message = dict[str, str]
T = TypeVar("T")


class Row(NamedTuple):
    """One preference, as text: two conversations that differ in their last turn only."""

    where: str  # file:line
    prompt: list[Message]
    chosen: str
    rejected: str


class Pair(NamedTuple):
    """One preference, as token ids: the answers continue the prompt."""

    where: str  # file:line
    prompt: np.ndarray  # int32, begins with BOS
    chosen: np.ndarray  # int32, ends with EOS unless truncated
    rejected: np.ndarray


class PairSet(Sequence[Pair]):
    """P pairs as views of one flat array of ids, so that the token cache can map it from the disk."""

    def __init__(self, ids: np.ndarray, bounds: np.ndarray, where: np.ndarray, counts: Counter):
        self.ids = ids  # (N,) int32, all pairs one after another
        self.bounds = bounds  # (P, 4) int64: where prompt, chosen, rejected begin, and the end
        self.where = where  # (P,) file:line
        self.counts = counts  # what happened to how many rows, by reason
        self.lengths = np.diff(bounds, axis=1)  # (P, 3) tokens of prompt, chosen, rejected
        self.num_tokens = self.lengths.sum(axis=1)  # (P,) of a pair's segment in a stream: the prompt counts once

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> Pair:
        start, chosen, rejected, end = self.bounds[index].tolist()
        return Pair(str(self.where[index]), self.ids[start:chosen], self.ids[chosen:rejected], self.ids[rejected:end])

    @classmethod
    def of(cls, pairs: Sequence[Pair], counts: Counter) -> "PairSet":
        parts = [ids for pair in pairs for ids in pair[1:]]
        ends = np.cumsum([0, *map(len, parts)])
        bounds = np.stack([ends[0:-1:3], ends[1::3], ends[2::3], ends[3::3]], axis=1)
        ids = np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)
        return cls(ids, bounds, np.array([pair.where for pair in pairs], dtype=str), counts)


# --- reading -------------------------------------------------------------------------------------------------------


def read_rows(paths: Sequence[str | Path]) -> Iterator[Row]:
    """Rows of .jsonl, .jsonl.gz or .json (an array) files, in file order. ValueError names file, line and value."""
    for path in map(Path, paths):
        count = 0
        for where, record in read_records(path):
            count += 1
            yield _row(where, record)
        if not count:
            raise ValueError(f"{path}: no rows in it")


def read_records(path: Path) -> Iterator[tuple[str, object]]:
    """(file:line, value) of every line of .jsonl, .jsonl.gz, or of every element of a .json array."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        try:
            if path.name.removesuffix(".gz").endswith(".json"):
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise ValueError(f"{path}: a .json file must hold an array of rows; one object a line is .jsonl")
                yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
                return
            for line_number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}:{line_number}"
                    yield where, json.loads(line)
        except json.JSONDecodeError as error:
            line_number = error.lineno if path.name.endswith((".json", ".json.gz")) else line_number
            raise ValueError(f"{path}:{line_number}: not JSON: {error.msg} at column {error.colno}") from None
        except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{path}: cannot be read as text: {error}") from None


def _row(where: str, record: object) -> Row:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a row must be an object, not {_show(record)}")
    if "completions" in record:
        raise ValueError(f"{where}: a raw UltraFeedback record; make pairs of it first: python binarize.py --help")
    if {"instruction", "chosen_response", "rejected_response"} <= record.keys():
        texts = [
            check_text(where, name, record[name]) for name in ("instruction", "chosen_response", "rejected_response")
        ]
        return Row(where, [{"role": "user", "content": texts[0]}], *texts[1:])
    for name in ("chosen", "rejected"):
        if name not in record:
            raise ValueError(f"{where}: {name!r} is missing; the keys are {', '.join(map(repr, record))}")
    chosen, rejected = (_messages(where, name, record[name]) for name in ("chosen", "rejected"))
    prompt = record.get("prompt")
    if isinstance(prompt, list):
        prompt = _messages(where, "prompt", prompt)
        if chosen[: len(prompt)] != prompt:  # some files repeat the prompt in front of the answers
            chosen, rejected = prompt + chosen, prompt + rejected
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(f"{where}: chosen and rejected answer different prompts: all turns but the last must be equal")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: {name} must be a prompt and then an assistant turn, not {_show(messages)}")
    if isinstance(prompt, str) and not any(message["content"] == prompt for message in chosen[:-1]):
        raise ValueError(f"{where}: prompt is {_show(prompt)}, but no turn before the answers says that")
    return Row(where, chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _messages(where: str, name: str, value: object) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where}: {name} must be a list of messages, not {_show(value)}")
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{where}: {name} holds {_show(message)}; a message has a role and a content")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"{where}: {name} has the role {_show(message['role'])}; known: system, user, assistant")
    return [{"role": m["role"], "content": check_text(where, f"{name} content", m["content"])} for m in value]


def check_text(where: str, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a string, not {_show(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no tokenizer takes it
        raise ValueError(f"{where}: {name} holds {value!a:.80}, which is not text") from None
    return value


def _show(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# --- tokenizing ----------------------------------------------------------------------------------------------------


def load_pairs(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    max_length: int,
    max_prompt_length: int,
    bos: bool,
    system_prompt: str | None,
    drop_bad_pairs: bool = False,
    cache_dir: str | Path | None = None,
) -> PairSet:
    """Read, check, render, tokenize and truncate.

    A pair whose answers are equal, or one of them empty, teaches nothing: ValueError, or with `drop_bad_pairs` it is
    left out and counted. Pairs that only truncation makes equal are always left out and counted.

    With a `cache_dir` the result is kept there, under a name made of all that it depends on, and mapped from the disk
    the next time. Of the processes of a machine one does the work; the others wait for it.
    """
    settings = (max_length, max_prompt_length, bos, system_prompt, drop_bad_pairs)
    if cache_dir is None or not paths:
        return _make_pairs(paths, tokenizer, template, *settings)
    made_of = [file_digest(path) for path in (*paths, tokenizer.path)]
    made_of += [TOKENS_VERSION, template.source, tokenizer.bos_id, template.eos_token, *settings]
    key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    directory = Path(cache_dir) / key
    directory.parent.mkdir(parents=True, exist_ok=True)
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed when the process ends, however it ends
        if not directory.is_dir():
            _write_pairs(directory, _make_pairs(paths, tokenizer, template, *settings))
    return _read_pairs(directory)


TOKENS_VERSION = 1  # raise it when the same text would give other ids
ARRAYS = ("ids", "bounds", "where")


def _write_pairs(directory: Path, pairs: PairSet) -> None:
    building = directory.with_suffix(".tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for name in ARRAYS:
        with (building / f"{name}.npy").open("wb") as file:
            np.save(file, getattr(pairs, name), allow_pickle=False)
            os.fsync(file.fileno())
    (building / "counts.json").write_text(json.dumps(pairs.counts))
    building.replace(directory)


def _read_pairs(directory: Path) -> PairSet:
    try:
        arrays = [np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS]
        pairs = PairSet(*arrays, Counter(json.loads((directory / "counts.json").read_text())))
        if len(pairs.where) != len(pairs) or pairs.bounds[-1, -1] != len(pairs.ids):
            raise ValueError("the arrays do not fit together")
        return pairs
    except (OSError, ValueError, IndexError) as error:
        raise ValueError(f"{directory}: damaged token cache, delete it to have it made anew: {error}") from None


def file_digest(path: str | Path) -> str:
    """sha256 of a file, in hexadecimal."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make_pairs(
    paths: Sequence[str | Path], tokenizer: Tokenizer, template: ChatTemplate,
    max_length: int, max_prompt_length: int, bos: bool, system_prompt: str | None, drop_bad_pairs: bool,
) -> PairSet:  # fmt: skip
    counts: Counter = Counter()
    if not paths:
        return PairSet.of([], counts)
    rows = []
    for row in read_rows(paths):
        counts["rows"] += 1
        bad = _bad_pair(row)
        if bad and not drop_bad_pairs:
            raise ValueError(f"{row.where}: {bad[1]}; data.drop_bad_pairs=true leaves such pairs out and counts them")
        if bad:
            counts[f"dropped: {bad[0]}"] += 1
        else:
            rows.append(row)

    pairs = []
    begin = [tokenizer.bos_id] if bos else []
    for row, (prompt, chosen, rejected) in zip(rows, _tokenize(rows, tokenizer, template, system_prompt), strict=True):
        split = _split(prompt, chosen, rejected)
        counts["prompt and answer share a token"] += split < len(prompt)
        prompt, chosen, rejected = begin + chosen[:split], chosen[split:], rejected[split:]
        lengths = len(prompt), len(chosen), len(rejected)
        prompt, chosen, rejected = truncate(prompt, chosen, rejected, max_length, max_prompt_length, len(begin))
        counts["prompts cut"] += len(prompt) < lengths[0]
        counts["answers cut (no EOS)"] += (len(chosen) < lengths[1]) + (len(rejected) < lengths[2])
        if chosen == rejected:
            counts["dropped: equal after truncation"] += 1
        else:
            pairs.append(Pair(row.where, *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected))))
    if not pairs:
        raise ValueError(f"{', '.join(map(str, paths))}: no pair is left of {counts['rows']} rows")
    counts["pairs"] = len(pairs)
    return PairSet.of(pairs, +counts)


def _bad_pair(row: Row) -> tuple[str, str] | None:
    for name, text in (("chosen", row.chosen), ("rejected", row.rejected)):
        if not text.strip():
            return "an answer is empty", f"the {name} answer is empty"
    if row.chosen == row.rejected:
        return "answers are equal", f"the chosen and the rejected answer are both {_show(row.chosen)}"
    return None


def _tokenize(
    rows: Sequence[Row], tokenizer: Tokenizer, template: ChatTemplate, system_prompt: str | None, block: int = 4096
) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Ids of (prompt, prompt + chosen, prompt + rejected), without BOS. Prompt and answer are tokenized as one text:
    an answer on its own would begin with another token ("▁Hello", not "Hello")."""
    for start in range(0, len(rows), block):
        texts = []
        for row in rows[start : start + block]:
            prompt = with_system_turn(row.prompt, system_prompt)
            texts.append(template.render(prompt, add_generation_prompt=True))
            for answer in (row.chosen, row.rejected):
                texts.append(close(template.render([*prompt, {"role": "assistant", "content": answer}]), template))
        ids = tokenizer.encode_batch(texts)
        yield from zip(ids[0::3], ids[1::3], ids[2::3], strict=True)


def close(text: str, template: ChatTemplate) -> str:
    """End a conversation with exactly one EOS: what a template writes after it is never sampled."""
    body = text.rstrip()
    while body.endswith(template.eos_token):
        text = body = body.removesuffix(template.eos_token)
    return text + template.eos_token


def _split(prompt: list[int], chosen: list[int], rejected: list[int]) -> int:
    """Where the answers begin: after the prompt's ids, or, if a token reaches over that border, before it."""
    if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        return len(prompt)
    differ = (i for i, ids in enumerate(zip(prompt, chosen, rejected, strict=False)) if len(set(ids)) > 1)
    return next(differ, min(len(prompt), len(chosen), len(rejected)))


def truncate(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int, max_prompt_length: int, keep: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """The recipe's rule (TRL 0.7): only a pair whose longer side exceeds `max_length` is cut. Then the prompt keeps its
    first `keep` tokens (BOS) and its last ones, `max_prompt_length` in all, and if that is not enough each answer keeps
    its first max_length - max_prompt_length: such an answer has no EOS, and the model is not taught to stop there."""
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_length and len(prompt) > max_prompt_length:
        prompt = prompt[:keep] + prompt[len(prompt) - (max_prompt_length - keep) :]
    if len(prompt) + longer > max_length:
        room = max_length - max_prompt_length
        chosen, rejected = chosen[:room], rejected[:room]
    return prompt, chosen, rejected


def describe_counts(counts: Counter) -> str:
    """`1,234 pairs of 1,240 rows (dropped: ... 6)`."""
    notes = ", ".join(f"{reason} {count:,}" for reason, count in counts.items() if reason not in ("rows", "pairs"))
    return f"{counts['pairs']:,} pairs of {counts['rows']:,} rows" + (f" ({notes})" if notes else "")


def describe_pair(pair: Pair, tokenizer: Tokenizer, max_characters: int = 400) -> str:
    """A pair as the model sees it, special tokens and line ends in plain sight, and which of it is scored."""

    def part(name: str, ids: np.ndarray, scored: str) -> str:
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False).replace("\n", "\\n")
        if len(text) > max_characters:
            text = f"{text[: max_characters // 2]} [...] {text[-max_characters // 2 :]}"
        return f"  {name:9} {len(ids):5} tokens, {scored}:  {text}"

    return "\n".join(
        [
            part("prompt", pair.prompt, "context"),
            part("chosen", pair.chosen, "scored "),
            part("rejected", pair.rejected, "scored "),
        ]
    )


# --- the order of training -----------------------------------------------------------------------------------------


def steps_per_epoch(num_pairs: int, pairs_per_step: int) -> int:
    """The last step of an epoch may be smaller; no pair is left out."""
    return -(-num_pairs // pairs_per_step)


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each made by a thread while the one before it is used."""
    items, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield item


def batch(num_pairs: int, pairs_per_step: int, seed: int, step: int) -> np.ndarray:
    """Indices of the pairs of training step `step` (from 0): a function of the seed and the step alone, whatever the
    number of ranks, so resuming needs nothing but the step. Each epoch is a fresh permutation; RandomState because its
    stream is frozen for good (NumPy's NEP 19)."""
    epoch, place = divmod(step, steps_per_epoch(num_pairs, pairs_per_step))
    order = np.random.RandomState([seed, epoch]).permutation(num_pairs)
    return order[place * pairs_per_step : (place + 1) * pairs_per_step]
