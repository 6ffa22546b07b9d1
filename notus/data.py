"""Preference files -> pairs of token ids, and the order in which training sees them.

Rows may have any of these shapes, recognized by their keys; `messages` are [{"role": ..., "content": ...}, ...]:

    {"chosen": messages, "rejected": messages}                      whole conversations: binarize.py's form
    {"prompt": "...", "chosen": messages, "rejected": messages}     the same, the prompt once more as text: H4's
    {"prompt": messages, "chosen": messages, "rejected": messages}  prompt and answers apart: TRL's
    {"instruction": "...", "chosen_response": "...", "rejected_response": "..."}  argilla's, Notus-7B-v1's own data
"""

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from notus.chat import ChatTemplate, with_system_turn
from notus.tokenizer import Tokenizer

Message = dict[str, str]


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

    @property
    def num_tokens(self) -> int:
        """Tokens of the pair's segment in a stream: the prompt counts once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class PairSet:
    pairs: list[Pair]
    counts: Counter  # what happened to how many rows, by reason


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
        except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
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
) -> PairSet:
    """Read, check, render, tokenize and truncate.

    A pair whose answers are equal, or one of them empty, teaches nothing: ValueError, or with `drop_bad_pairs` it is
    left out and counted. Pairs that only truncation makes equal are always left out and counted.
    """
    counts: Counter = Counter()
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
    for row, (prompt, chosen, rejected) in zip(rows, _tokenize(rows, tokenizer, template, system_prompt), strict=True):
        split, merged = _split(prompt, chosen, rejected)
        counts["prompt and answer share a token"] += merged
        begin = [tokenizer.bos_id] if bos else []
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
    return PairSet(pairs, +counts)


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


def _split(prompt: list[int], chosen: list[int], rejected: list[int]) -> tuple[int, bool]:
    """Where the answers begin: after the prompt's ids, or, if a token reaches over that border, before it."""
    common = 0
    for ids in zip(prompt, chosen, rejected, strict=False):
        if len(set(ids)) > 1:
            break
        common += 1
    return common, common < len(prompt)


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


def largest_id(pairs: Iterable[Pair]) -> int:
    return max((int(ids.max()) for pair in pairs for ids in pair[1:]), default=-1)


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


def batch(num_pairs: int, pairs_per_step: int, seed: int, step: int) -> np.ndarray:
    """Indices of the pairs of training step `step` (from 0): a function of the seed and the step alone, whatever the
    number of ranks, so resuming needs nothing but the step. Each epoch is a fresh permutation; RandomState because its
    stream is frozen for good (NumPy's NEP 19)."""
    epoch, place = divmod(step, steps_per_epoch(num_pairs, pairs_per_step))
    order = np.random.RandomState([seed, epoch]).permutation(num_pairs)
    return order[place * pairs_per_step : (place + 1) * pairs_per_step]
