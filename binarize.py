"""UltraFeedback -> preference pairs: from each instruction's rated completions, one chosen and one rejected.

    {"instruction", "source", "completions": [{"model", "response", "annotations": {aspect: {"Rating": "4"}}}, ...]}
        mean ratings    3.25  5.0  4.0  1.0      chosen = the best; rejected = one of the lower ones, at random
    {"chosen": [user, assistant], "rejected": [user, assistant], "score_chosen": 5.0, "score_rejected": 3.25, ...}

A pair holds two whole conversations and no `prompt` column: the one form that TRL, open-instruct, RewardBench and
train.py all read. It depends on its record and the seed, on nothing else: the raw files may be split,
shuffled or compressed, and the output is the same, byte for byte. They stream through; the pairs stay in memory.
"""

import argparse
import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

CHUNK = 1 << 20  # characters of a JSON array read at a time
ARRAY_OPENING, ARRAY_SEPARATOR = re.compile(r"\s*\[\s*(\])?"), re.compile(r"\s*([,\]])\s*")


class Completion(NamedTuple):
    model: str
    response: str
    rating: float | None  # mean over the rated aspects, 1..5
    overall_score: float | None  # the critique's score, 1..10


class Record(NamedTuple):
    instruction: str
    source: str
    completions: list[Completion]


class Drop(StrEnum):
    """Why a record makes no pair. The last two come after the rule: it picks as published, then the pair is refused."""

    NO_COMPLETIONS = "no completions"
    ONE_COMPLETION = "one completion only"
    UNRATED = "fewer than two rated completions"
    TIED = "all tied"
    EMPTY_ANSWER = "empty answer"
    SAME_ANSWER = "chosen = rejected"


# ---- the rules: which completion is chosen, and among which the rejected one is drawn -------------------------------


def mean_rating(completion: dict[str, Any]) -> float | None:
    """Mean of a raw completion's aspect ratings; "N/A" and absent ones are left out; None where none is left.

    UltraFeedback's `calculate_average_rating` (its later field `fine-grained_score`). An aspect is a dict, or in the
    authors' intermediate files a list of one dict.
    """
    ratings = []
    annotations = completion.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise ValueError(f'"annotations" is {annotations!r:.60}, expected an object')
    for aspect, note in annotations.items():
        note = note[0] if isinstance(note, list) and note else note or {}
        if not isinstance(note, dict):
            raise ValueError(f'annotation "{aspect}" is {note!r:.60}, expected an object')
        rating = number(note.get("Rating"), f"{aspect} rating")
        ratings += [] if rating is None else [rating]
    return sum(ratings) / len(ratings) if ratings else None


def choose_by_ratings(completions: list[Completion]) -> tuple[Completion, list[Completion]] | Drop:
    """Notus's rule, from the card of argilla/ultrafeedback-binarized-preferences:

    "Compute mean of preference ratings (honesty, instruction-following, etc.). Pick the best mean rating as the chosen.
    Pick random rejected with lower mean (or another random if equal to chosen rating). Filter out examples with chosen
    rating == rejected rating." The first wins among equals; an equal one is only picked, and so filtered, if all tie.
    """
    rated = [completion for completion in completions if completion.rating is not None]
    if len(rated) < 2:
        return Drop.UNRATED
    chosen = max(rated, key=lambda completion: completion.rating)  # max() keeps the first of equals
    lower = [completion for completion in rated if completion.rating < chosen.rating]
    return (chosen, lower) if lower else Drop.TIED


def choose_by_overall_score(completions: list[Completion]) -> tuple[Completion, list[Completion]] | Drop:
    """Zephyr's rule, from create_dataset.py of HuggingFaceH4/ultrafeedback_binarized.

    Chosen has the highest overall_score, the first of equals; rejected is any completion that differs from it in score,
    text or model. An equal score is no obstacle. Files older than 2023-12-29 score some of the worst answers 10.
    """
    if any(completion.overall_score is None for completion in completions):
        raise ValueError("a completion has no overall_score, which --by overall-score needs")
    chosen = max(completions, key=lambda completion: completion.overall_score)
    others = [other for other in completions if other._replace(rating=None) != chosen._replace(rating=None)]
    return (chosen, others) if others else Drop.SAME_ANSWER


RULES = {"ratings": (choose_by_ratings, "rating"), "overall-score": (choose_by_overall_score, "overall_score")}


def draw(seed: int, purpose: str, prompt_id: str) -> int:
    """A uniform 64-bit number of these three alone, whatever was drawn before: a hash in place of a random stream."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed} {prompt_id}".encode()).digest()[:8], "big")


def binarize(record: Record, by: str = "ratings", seed: int = 42, system_prompt: str | None = None) -> dict | Drop:
    """The pair of one record, as it is written; or the reason why there is none."""
    if len(record.completions) < 2:
        return Drop.ONE_COMPLETION if record.completions else Drop.NO_COMPLETIONS
    rule, score = RULES[by]
    choice = rule(record.completions)
    if isinstance(choice, Drop):
        return choice
    chosen, candidates = choice
    prompt_id = hashlib.sha256(record.instruction.encode()).hexdigest()
    rejected = candidates[draw(seed, "rejected", prompt_id) % len(candidates)]
    if not chosen.response.strip() or not rejected.response.strip():
        return Drop.EMPTY_ANSWER
    if chosen.response == rejected.response:
        return Drop.SAME_ANSWER
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    prompt = [*system, {"role": "user", "content": record.instruction}]
    return {
        "chosen": [*prompt, {"role": "assistant", "content": chosen.response}],
        "rejected": [*prompt, {"role": "assistant", "content": rejected.response}],
        "score_chosen": getattr(chosen, score),
        "score_rejected": getattr(rejected, score),
        "prompt_id": prompt_id,
        "source": record.source,
        "chosen_model": chosen.model,
        "rejected_model": rejected.model,
    }


def split(pairs: list[tuple[str, bytes]], test_size: int, seed: int) -> tuple[list[bytes], list[bytes]]:
    """(prompt_id, line) pairs -> train and test lines, in their order. An instruction's pairs stay on one side.

    Instructions go to the test side in the order of their draw, those that no longer fit passed over, until it is full.
    """
    pairs_of = Counter(prompt_id for prompt_id, _ in pairs)
    test, left = set(), test_size
    for prompt_id in sorted(pairs_of, key=lambda prompt_id: draw(seed, "test", prompt_id)):
        if pairs_of[prompt_id] <= left:
            test.add(prompt_id)
            left -= pairs_of[prompt_id]
    if left or len(test) == len(pairs_of):
        raise ValueError(f"--test-size {test_size} cannot be held out of {len(pairs)} pairs ({len(pairs_of)} prompts)")
    return [line for key, line in pairs if key not in test], [line for key, line in pairs if key in test]


# ---- reading: every error names FILE:LINE, or FILE:INDEX in a JSON array --------------------------------------------


def number(value: Any, name: str) -> float | None:
    """4, "4" or "4/10" -> 4.0; null and "N/A" -> None."""
    if value is None or value == "N/A":
        return None
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            result = float(value.split("/")[0] if isinstance(value, str) else value)
            if math.isfinite(result):
                return result
    raise ValueError(f"{name} is {value!r:.60}, expected a number")


def field(mapping: Any, name: str, kind: type) -> Any:
    if not isinstance(mapping, dict):
        raise ValueError(f"{mapping!r:.60} is no JSON object")
    if name not in mapping:
        raise ValueError(f'no field "{name}"')
    if not isinstance(mapping[name], kind):
        raise ValueError(f'"{name}" is {mapping[name]!r:.60}, expected a {"string" if kind is str else "list"}')
    return mapping[name]


def parse_record(raw: Any) -> Record:
    """A record of UltraFeedback, checked, without what the rules do not read."""
    if isinstance(raw, dict) and (pair := [key for key in raw if key.startswith(("chosen", "rejected"))]):
        raise ValueError(f"already binarized (it has {', '.join(pair)}): train on this file as it is")
    completions = []
    for position, completion in enumerate(field(raw, "completions", list), start=1):
        try:
            model, response = field(completion, "model", str), field(completion, "response", str)
            overall_score = number(completion.get("overall_score"), "overall_score")
            completions.append(Completion(model, response, mean_rating(completion), overall_score))
        except ValueError as error:
            raise ValueError(f"completion {position}: {error}") from None
    return Record(field(raw, "instruction", str), field(raw, "source", str), completions)


def read_lines(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[int, Any]]:
    for line_number, line in enumerate(file, start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
                reason = str(error).replace("line 1 ", "")  # of this line
                raise ValueError(f"{path}:{line_number}: malformed JSON: {reason}") from None
            yield line_number, value


def read_array(file: io.BufferedIOBase, path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of one JSON array, counted from 1. A chunk is in memory at a time, and the element that it cuts."""
    text, decode = io.TextIOWrapper(file, encoding="utf-8-sig"), json.JSONDecoder().raw_decode
    buffer, at, index = "", 0, 1
    while True:
        try:
            mark = (ARRAY_OPENING if index == 1 else ARRAY_SEPARATOR).match(buffer, at)
            if not mark:
                raise json.JSONDecodeError("Expecting ',' or ']'", buffer, at)
            if mark[1] == "]":
                break
            value, end = decode(buffer, mark.end())
        except json.JSONDecodeError as error:  # at the chunk's end the text is only cut; before it, malformed
            cut = error.pos > len(buffer) - 64 or error.msg.startswith("Unterminated string")
            more = text.read(CHUNK) if cut else ""
            if not more:
                raise ValueError(f"{path}:{index}: malformed JSON: {error.msg}") from None
            buffer, at = buffer[at:] + more, 0
        else:
            yield index, value
            index, at = index + 1, end
    if (buffer[mark.end() :] + text.read(CHUNK)).strip():
        raise ValueError(f"{path}:{index}: malformed JSON: text after the array")


def read_records(path: Path, progress: tqdm) -> Iterator[tuple[int, Any]]:
    """(line number, value) for JSON lines, (index, value) for a JSON array; told apart by the first character."""
    last = done = 0
    with open(path, "rb") as packed, gzip.open(packed) if path.suffix == ".gz" else packed as file:
        try:
            is_array = file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
            for last, value in read_array(file, path) if is_array else read_lines(file, path):
                yield last, value
                progress.update(packed.tell() - done)
                done = packed.tell()
        except (UnicodeDecodeError, RecursionError, EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}:{last + 1}: unreadable: {error}") from None
    if not last:
        raise ValueError(f"{path}:1: empty, no record in it")


# ---- the command ----------------------------------------------------------------------------------------------------


def write(files: dict[Path, list[bytes]]) -> None:
    """All files whole under their names, or none: written beside them under other names, synced, then renamed."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, lines in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary[path], "xb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def compare_rules(record: Record, counts: Counter[str]) -> None:
    """Count where the two rules choose different answers, and the low-rated answers with a score of 10.

    UltraFeedback wrote `overall_score = score if score > 1 else 10 * score`, so the worst answers, scored 1, read 10.
    Its fix of 2023-12-29 sets a 10 back to 1 where the mean rating is at most 2.
    """
    tens = [completion for completion in record.completions if completion.overall_score == 10]
    counts["tens"] += len(tens)
    counts["low tens"] += sum(completion.rating is not None and completion.rating <= 2 for completion in tens)
    if len(record.completions) > 1 and all(c.overall_score is not None for c in record.completions):
        choices = choose_by_ratings(record.completions), choose_by_overall_score(record.completions)
        if not any(isinstance(choice, Drop) for choice in choices):
            counts["compared"] += 1
            counts["differ"] += choices[0][0].response != choices[1][0].response


def read_pairs(args: argparse.Namespace) -> tuple[list[tuple[str, bytes]], Counter[str]]:
    """All pairs as (prompt_id, line), sorted: a fixed shuffle, whatever the files' order; and all that was counted."""
    pairs, counts = [], Counter()
    total = sum(path.stat().st_size for path in args.raw)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:  # None: only on a terminal
        for path in args.raw:
            for line, raw in read_records(path, progress):
                try:
                    record = parse_record(raw)
                    pair = binarize(record, args.by, args.seed, args.system_prompt)
                    if isinstance(pair, Drop):
                        counts[pair] += 1
                    else:
                        pairs.append((pair["prompt_id"], (json.dumps(pair, ensure_ascii=False) + "\n").encode()))
                except ValueError as error:
                    raise ValueError(f"{path}:{line}: {error}") from None
                compare_rules(record, counts)
                counts["records"] += 1
    if not pairs:
        reasons = ", ".join(f"{counts[drop]} {drop}" for drop in Drop if counts[drop])
        raise ValueError(f"{args.raw[0]}: no pair left of {counts['records']} records: {reasons}")
    return sorted(pairs), counts


def run(args: argparse.Namespace) -> str:
    """The whole way; returns the closing table."""
    outputs = [args.output, args.output.with_name(f"{args.output.stem}-test.jsonl")][: 2 if args.test_size else 1]
    for path in args.raw:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    for path in outputs:
        if path.suffix != ".jsonl":
            raise ValueError(f"{path}: the output must be a .jsonl file")
        if path.exists() and not args.overwrite:
            raise ValueError(f"{path}: exists; --overwrite replaces it")
    paths = [path.resolve() for path in [*args.raw, *outputs]]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"{twice[0]}: given twice")

    pairs, counts = read_pairs(args)
    splits = dict(zip(outputs, split(pairs, args.test_size, args.seed), strict=False))
    write(splits)

    rows = [("records", counts["records"], 0)]  # name, count, and of how many
    rows += [(f"  dropped: {drop}", counts[drop], counts["records"]) for drop in Drop]
    rows += [("pairs", len(pairs), counts["records"])]
    rows += [(f"  in {path}", len(lines), len(pairs)) for path, lines in splits.items()]
    rows += [("  whose prompt repeats another's", len(pairs) - len({prompt_id for prompt_id, _ in pairs}), len(pairs))]
    rows += [("records on which both rules choose", counts["compared"], counts["records"])]
    rows += [("  their chosen answers differ", counts["differ"], counts["compared"])]
    rows += [("completions with overall_score 10", counts["tens"], 0)]
    rows += [("  whose mean rating is at most 2", counts["low tens"], counts["tens"])]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}} {n:>9,}" + (f" {n / of:>7.1%}" if of else "") for name, n, of in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="binarize.py",
        description="Turn raw UltraFeedback records into preference pairs for DPO.",
        epilog="example: python binarize.py ultrafeedback/*.jsonl --output pairs.jsonl --test-size 2000 --seed 42",
    )
    add = parser.add_argument
    add("raw", nargs="+", type=Path, metavar="RAW", help="raw UltraFeedback: .jsonl, or a .json array; also .gz")
    add("--output", required=True, type=Path, metavar="FILE", help="the pairs, .jsonl")
    add("--by", choices=RULES, default="ratings", help="Notus's rule (the default) or Zephyr's")
    add("--seed", type=int, default=42, metavar="S", help="draws rejected answers and held-out prompts (default: 42)")
    add("--test-size", type=int, default=0, metavar="N", help="hold out N pairs, in FILE-test.jsonl (default: 0)")
    add("--system-prompt", metavar="TEXT", help="begin every conversation with this system turn; '' makes an empty one")
    add("--overwrite", action="store_true", help="replace an output that exists")
    args = parser.parse_args(argv)
    if args.test_size < 0:
        parser.error(f"--test-size is {args.test_size}, expected 0 or more")
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"binarize.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
