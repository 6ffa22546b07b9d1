"""UltraFeedback -> preference pairs: one chosen and one rejected answer from each instruction's rated completions.

    {"instruction", "source", "completions": [{"model", "response", "annotations": {aspect: {"Rating": "4"}}}, ...]}
        mean ratings    3.25  5.0  4.0  1.0      chosen: the best; rejected: one of the lower ones, drawn at random
    {"chosen": [user, assistant], "rejected": [user, assistant], "score_chosen": 5.0, "score_rejected": 3.25, ...}

A pair holds two complete conversations and no `prompt` column. TRL, open-instruct, RewardBench and train.py all read
this form. A pair depends only on its record and the options, so the raw files may be split, shuffled or compressed and
the output stays the same, byte for byte. JSON lines and parquet are streamed. An array is read into memory at once, and
the pairs stay in memory until they are written.

With --scores KEY a record is a prompt whose answers were scored by anything: {"prompt", "answers": [...], KEY: [...]}.
"""

import argparse
import codecs
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Completion(NamedTuple):
    model: str
    response: str
    rating: float | None  # mean over the rated aspects, 1..5; with --scores, the score
    overall_score: float | None  # the critique's score, 1..10


class Record(NamedTuple):
    instruction: str
    source: str
    completions: list[Completion]


class Drop(StrEnum):
    """Why a record makes no pair. Empty and equal answers are found after the rule has picked two, as published."""

    NO_COMPLETIONS = "no completions"
    ONE_COMPLETION = "one completion only"
    UNRATED = "fewer than two rated completions"
    TIED = "all tied"
    EMPTY_ANSWER = "empty answer"
    SAME_ANSWER = "chosen = rejected"
    MARGIN = "margin too small"  # --min-margin
    SOURCE = "source left out"  # --drop-source
    MARKED = "marked drop"  # by a person: --curation


ASKED_FOR = (Drop.MARGIN, Drop.SOURCE, Drop.MARKED)  # only an option leads to these


# ---- the rules: which completion is chosen, and from which ones the rejected one is drawn ---------------------------

Choice = tuple[Completion, list[Completion]]  # the chosen one; the candidates for the rejected one
Pick = tuple[Completion, Completion]  # chosen, rejected


def mean_rating(completion: dict[str, Any], weights: Mapping[str, float] | None = None) -> float | None:
    """Mean of a raw completion's aspect ratings. "N/A" and missing ratings are left out; None if no rating is left.
    An aspect that `weights` does not name weighs 1.

    This is UltraFeedback's `calculate_average_rating` and its later field `fine-grained_score`. An aspect is an object.
    In the authors' intermediate files it is a list of one object.
    """
    annotations = completion.get("annotations")
    if annotations is None:
        return None
    if not isinstance(annotations, dict):
        raise ValueError(f'"annotations" is {show(annotations)}, expected an object')
    ratings: list[float | Fraction] = []
    total: int | Fraction = 0
    for aspect, note in annotations.items():
        if isinstance(note, list) and len(note) < 2:
            note = note[0] if note else None
        if note is None:
            continue
        if not isinstance(note, dict):
            raise ValueError(f'annotation "{aspect}" is {show(note)}, expected an object with a "Rating"')
        rating = number(note.get("Rating"), f"{aspect} rating", 1, 5)
        if rating is not None:
            weight = Fraction(str(weights.get(aspect, 1))) if weights else 1  # exact, or rounding would break ties
            ratings.append(weight * Fraction(rating) if weights else rating)
            total += weight
    return float(sum(ratings) / total) if total else None


def choose_by_ratings(completions: list[Completion]) -> Choice | Drop:
    """Notus's rule, from the card of argilla/ultrafeedback-binarized-preferences:

    "Compute mean of preference ratings (honesty, instruction-following, etc.). Pick the best mean rating as the chosen.
    Pick random rejected with lower mean (or another random if equal to chosen rating). Filter out examples with chosen
    rating == rejected rating." The first of equals is chosen. An equal one is rejected only if all tie, and such a pair
    is then filtered out, so a record whose completions all tie is dropped here.
    """
    rated = [(completion.rating, completion) for completion in completions if completion.rating is not None]
    if len(rated) < 2:
        return Drop.UNRATED
    best, chosen = max(rated, key=lambda pair: pair[0])  # max() keeps the first of equals
    lower = [completion for rating, completion in rated if rating < best]
    return (chosen, lower) if lower else Drop.TIED


def choose_by_overall_score(completions: list[Completion]) -> Choice | Drop:
    """Zephyr's rule, from create_dataset.py of HuggingFaceH4/ultrafeedback_binarized.

    Chosen has the highest overall_score; the first of equals is taken. Rejected is any completion that differs from it
    in score, text or model, so the two scores may be equal. Files older than 2023-12-29 score some of the worst answers
    10.
    """
    scored = []
    for position, completion in enumerate(completions, start=1):
        if completion.overall_score is None:
            raise ValueError(f"completion {position}: overall_score is missing or N/A, expected a number from 1 to 10")
        scored.append((completion.overall_score, completion))
    _, chosen = max(scored, key=lambda pair: pair[0])
    others = [other for other in completions if other._replace(rating=None) != chosen._replace(rating=None)]
    return (chosen, others) if others else Drop.SAME_ANSWER


Rule = Callable[[list[Completion]], Choice | Drop]
RULES: dict[str, tuple[Rule, str]] = {  # --by -> the rule, and the field of Completion that it compares
    "ratings": (choose_by_ratings, "rating"),
    "overall-score": (choose_by_overall_score, "overall_score"),
}
Candidates = list[tuple[float, Completion]]  # (score, completion), in the record's order
REJECTED: dict[str, Callable[[Candidates, int], Candidates]] = {  # --rejected -> which candidates, given a draw
    "random": lambda candidates, drawn: [candidates[drawn % len(candidates)]],
    "lowest": lambda candidates, _: [min(candidates, key=lambda pair: pair[0])],  # the first of equals
    "all": lambda candidates, _: candidates,  # a pair for each
}
IN_DOUBT = ("drop", "keep")  # --repair: what becomes of a 10 that only a judge could check


def repair(record: Record, in_doubt: str = "drop") -> tuple[Record, Counter[str]]:
    """UltraFeedback's fix of 2023-12-29 (fix_overall_score_issue.py), without its judge, and what it did.

    Of the completions with overall_score 10, those with a mean rating of at most 2 get their 1 back, and those above 4
    stay. Between the two the authors asked GPT-4 again. Here such a completion, or one without ratings, is in doubt.
    """
    counts: Counter[str] = Counter()
    completions = []
    for completion in record.completions:
        if completion.overall_score == 10 and (completion.rating is None or completion.rating <= 4):
            if completion.rating is not None and completion.rating <= 2:
                completion = completion._replace(overall_score=1.0)
                counts["repaired"] += 1
            else:
                counts["in doubt"] += 1
                if in_doubt == "drop":
                    continue
        completions.append(completion)
    return record._replace(completions=completions), counts


def draw(seed: int, purpose: str, prompt_id: str) -> int:
    """A uniform 64-bit number that depends only on these three. A hash, so no draw depends on the draws before it."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed} {prompt_id}".encode()).digest()[:8], "big")


def prompt_id_of(instruction: str) -> str:
    return hashlib.sha256(instruction.encode()).hexdigest()


def choose_all(
    record: Record, by: str = "ratings", seed: int = 42, rejected: str = "random", min_margin: float = 0.0
) -> list[Pick | Drop]:
    """What `rejected` draws of a record: each a chosen and a rejected completion, or why they make no pair."""
    if by not in RULES or rejected not in REJECTED:
        name, value, known = ("rejected", rejected, REJECTED) if by in RULES else ("by", by, RULES)
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    if len(record.completions) < 2:
        return [Drop.ONE_COMPLETION if record.completions else Drop.NO_COMPLETIONS]
    rule, score = RULES[by]
    choice = rule(record.completions)
    if isinstance(choice, Drop):
        return [choice]
    chosen, others = choice
    best = getattr(chosen, score)
    leads = [(getattr(other, score), other, best - getattr(other, score)) for other in others]
    far = [lead for *_, lead in leads if lead >= min_margin or math.isclose(lead, min_margin)]  # 0.3 - 0.2 < 0.1
    candidates = [(points, other) for points, other, lead in leads if lead in far]
    if not candidates:
        return [Drop.MARGIN]
    drawn = REJECTED[rejected](candidates, draw(seed, "rejected", prompt_id_of(record.instruction)))
    return [check_pair(chosen, other) for _, other in drawn]


def check_pair(chosen: Completion, rejected: Completion) -> Pick | Drop:
    if not chosen.response.strip() or not rejected.response.strip():
        return Drop.EMPTY_ANSWER
    return Drop.SAME_ANSWER if chosen.response == rejected.response else (chosen, rejected)


def choose(record: Record, by: str = "ratings", seed: int = 42) -> Pick | Drop:
    """The chosen and the rejected completion of a record, or the reason why it makes no pair."""
    return choose_all(record, by, seed)[0]


def binarize(
    record: Record, by: str = "ratings", seed: int = 42, system_prompt: str | None = None
) -> dict[str, Any] | Drop:
    """The pair of one record, with the columns that are written, or the reason why it has none."""
    choice = choose(record, by, seed)
    return choice if isinstance(choice, Drop) else make_pair(record, *choice, by, system_prompt)


def make_pair(
    record: Record, chosen: Completion, rejected: Completion, by: str, system_prompt: str | None
) -> dict[str, Any]:
    score = RULES[by][1]
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    prompt = [*system, {"role": "user", "content": record.instruction}]
    return {
        "chosen": [*prompt, {"role": "assistant", "content": chosen.response}],
        "rejected": [*prompt, {"role": "assistant", "content": rejected.response}],
        "score_chosen": getattr(chosen, score),
        "score_rejected": getattr(rejected, score),
        "prompt_id": prompt_id_of(record.instruction),
        "source": record.source,
        "chosen_model": chosen.model,
        "rejected_model": rejected.model,
    }


def split(pairs: list[tuple[str, bytes]], test_size: int, seed: int) -> tuple[list[bytes], list[bytes]]:
    """Split (prompt_id, line) pairs into train and test lines, in their order. All pairs of a prompt stay together.

    Prompts join the test side in the order of their draw until it is full. A prompt with more pairs than there is room
    for is skipped. ValueError if exactly `test_size` pairs cannot be held out.
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


# ---- records: every error names FILE:LINE, or FILE:INDEX in a JSON array --------------------------------------------

NUMBER = re.compile(r"(0|[1-9][0-9]*)(\.[0-9]+)?")
FINITE = 10**300  # a score of another judge has any scale, but it is a number


def show(value: Any) -> str:
    """The beginning of a JSON value, for messages. The rest is not encoded, so deep nesting does no harm."""
    text = "".join(islice(json.JSONEncoder(ensure_ascii=False).iterencode(value), 61))  # a chunk is never empty
    return text if len(text) <= 60 else f"{text[:57]}..."


def number(value: Any, name: str, lowest: int, highest: int) -> float | None:
    """A rating or score from `lowest` to `highest`; null and "N/A" are None.

    It is a JSON number or a string of plain digits: "4", "4.5", or "8/10" where `highest` is 10. A string with a sign,
    a space, an exponent, an underscore or any other slash is refused.
    """
    if value is None or value == "N/A":
        return None
    result = value
    if isinstance(value, str):
        digits = value.removesuffix(f"/{highest}")
        result = float(digits) if NUMBER.fullmatch(digits) else None
    if isinstance(result, int | float) and not isinstance(result, bool) and lowest <= result <= highest:
        return float(result)
    bounds = "" if highest == FINITE else f" from {lowest} to {highest}"
    raise ValueError(f'{name} is {show(value)}, expected a number{bounds}, or "N/A"')


def field(mapping: Any, name: str, kind: type[T]) -> T:
    wanted = "a string" if kind is str else "a list"
    if not isinstance(mapping, dict):
        raise ValueError(f'{show(mapping)} is not a JSON object, expected one with the field "{name}"')
    if name not in mapping:
        raise ValueError(f'no field "{name}", expected {wanted}, in {show(mapping)}')
    if not isinstance(mapping[name], kind):
        raise ValueError(f'"{name}" is {show(mapping[name])}, expected {wanted}')
    return mapping[name]


def parse_record(raw: Any, weights: Mapping[str, float] | None = None) -> Record:
    """Check a raw record of UltraFeedback and keep what the rules read."""
    refuse_pairs(raw)
    if isinstance(raw, dict) and "completions" not in raw and any(isinstance(raw.get(name), list) for name in ANSWERS):
        raise ValueError(f"holds scored answers, expected a raw record; say --scores KEY (its keys: {', '.join(raw)})")
    completions = []
    for position, completion in enumerate(field(raw, "completions", list), start=1):
        try:
            model, response = field(completion, "model", str), field(completion, "response", str)
            overall_score = number(completion.get("overall_score"), "overall_score", 0, 10)
            completions.append(Completion(model, response, mean_rating(completion, weights), overall_score))
        except ValueError as error:
            raise ValueError(f"completion {position}: {error}") from None
    return Record(field(raw, "instruction", str), field(raw, "source", str), completions)


PROMPTS, ANSWERS = ("prompt", "instruction"), ("answers", "generations")
MODELS = ("models", "generation_models", "model_names")


def parse_scored(raw: Any, key: str) -> Record:
    """A prompt whose answers were scored: {"prompt", "answers": [...], KEY: [...]}, or distilabel's "instruction" and
    "generations". An answer without a score (null) is never chosen or rejected. "source" and the models' names may be
    absent."""
    refuse_pairs(raw)
    instruction = field(raw, first_of(raw, PROMPTS), str)
    answers, scores = field(raw, first_of(raw, ANSWERS), list), field(raw, key, list)
    name = next((name for name in MODELS if raw.get(name) is not None), None)
    models = [""] * len(answers) if name is None else field(raw, name, list)
    for what, values in ((key, scores), (name, models)):
        if len(values) != len(answers):
            raise ValueError(f'"{what}" has {len(values)} values for {len(answers)} answers')
    completions = []
    for position, (model, answer, score) in enumerate(zip(models, answers, scores, strict=True), start=1):
        if not isinstance(answer, str) or not isinstance(model, str):
            raise ValueError(f"answer {position}: {show(answer)} by {show(model)}, expected two strings")
        rating = number(score, f'answer {position}: the score of "{key}"', -FINITE, FINITE)
        completions.append(Completion(model, answer, rating, None))
    return Record(instruction, field({"source": ""} | raw, "source", str), completions)


def first_of(raw: Any, names: Sequence[str]) -> str:
    """The first name that the record has, or else the one that an error should ask for."""
    return next((name for name in names if isinstance(raw, dict) and name in raw), names[0])


def refuse_pairs(raw: Any) -> None:
    if isinstance(raw, dict) and (pair := [key for key in raw if key.startswith(("chosen", "rejected"))]):
        raise ValueError(f"already binarized (it has {', '.join(pair)}), expected a raw record; train on it as it is")


# ---- files: the content decides what a file is, never the name ------------------------------------------------------

Binary = io.BufferedReader | gzip.GzipFile
BAD_TEXT = (ValueError, RecursionError)  # not JSON or not UTF-8
BAD_FILE = (EOFError, OSError, zlib.error)  # gzip data that is cut off or damaged, or a disk that fails
GZIP, PARQUET, GIT_LFS = b"\x1f\x8b", b"PAR1", b"version https://git-lfs"


def refuse_other_formats(head: bytes, path: Path) -> None:
    """Raise a ValueError that names the format, if `head` begins a file of a known format other than UTF-8 JSON."""
    if head.startswith(PARQUET):
        raise ValueError(f"{path}: is a gzipped parquet file; unpack it with gunzip")
    if head.startswith(GIT_LFS):
        raise ValueError(f"{path}: is a git-lfs pointer, expected the data; in its repository, run: git lfs pull")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 < head[:4].count(0) < 4:
        raise ValueError(
            f"{path}: looks like UTF-16 or UTF-32, expected UTF-8; save it as UTF-8 (it begins with {head[:8]!r})"
        )


def refusal(where: str, error: Exception, wanted: str = "", found: str = "") -> ValueError:
    """The ValueError that explains an exception of BAD_FILE, or one of BAD_TEXT where `wanted` was expected."""
    if isinstance(error, BAD_FILE):
        return ValueError(f"{where}: cannot be read: {error}; the file may be damaged, copy or download it again")
    if isinstance(error, RecursionError):
        reason = "nested too deeply"
    elif isinstance(error, UnicodeDecodeError):
        reason = f"byte 0x{error.object[error.start]:02x} is not UTF-8"
    elif isinstance(error, json.JSONDecodeError):  # a line of JSON lines is "line 1" to the decoder
        reason = str(error).partition(" (char")[0].replace("line 1 ", "")
    elif isinstance(error, RepeatedKey):
        reason = str(error)
    else:
        reason = f"an integer has more than {sys.get_int_max_str_digits()} digits"
    return ValueError(f"{where}: malformed JSON: {reason}; expected {wanted}, got {found!r}")


class RepeatedKey(ValueError):
    pass


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. A key that it holds twice is refused, because programs differ in which one they take."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(f"the key {show(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return mapping


def parse(data: bytes | bytearray) -> Any:
    return json.loads(data.decode(), object_pairs_hook=without_repeats)


def read_lines(file: Binary, path: Path) -> Iterator[tuple[int, Any]]:
    line_number = 0
    try:
        for line_number, line in enumerate(file, start=1):
            if line.strip():
                yield line_number, parse(line)
    except BAD_TEXT as error:
        found = line[:60].decode(errors="replace")
        raise refusal(f"{path}:{line_number}", error, "one JSON object a line", found) from None
    except BAD_FILE as error:
        raise refusal(f"{path}:{line_number + 1}", error) from None


def read_array(file: Binary, path: Path) -> list[Any]:
    data = bytearray()
    try:
        while chunk := file.read1():  # read() would lose all that precedes the cut in a torn gzip file
            data += chunk
        return parse(data)
    except (*BAD_TEXT, *BAD_FILE) as error:
        end = error.start if isinstance(error, UnicodeDecodeError) else len(data)
        index, found = first_bad_element(data[:end].decode(errors="ignore"))
        raise refusal(f"{path}:{index}", error, "one JSON array of objects", found) from None


def first_bad_element(text: str) -> tuple[int, str]:
    """(index from 1, first characters) of the element of a broken JSON array that does not parse."""
    decode, comma = json.JSONDecoder(object_pairs_hook=without_repeats).raw_decode, re.compile(r"\s*,\s*")
    index, start, mark = 1, 0, re.match(r"\s*\[\s*", text)
    with suppress(*BAD_TEXT):
        while mark:
            start = mark.end()
            _, start = decode(text, start)
            index, mark = index + 1, comma.match(text, start)
    return index, text[start : start + 60]


def read_parquet(packed: io.BufferedReader, path: Path) -> Iterator[tuple[int, Any]]:
    """(row, value) from 1, of which some hundred are in memory at a time."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path}: is a parquet file, which needs pyarrow: pip install pyarrow") from None
    size, number = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(256):
                for value in batch.to_pylist():
                    number += 1
                    yield number, value
                packed.seek(size * number // file.metadata.num_rows)  # read_json shows it as progress
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise refusal(f"{path}:{number + 1}", OSError("as parquet: " + " ".join(str(error).split()))) from None
    if not number:
        raise ValueError(f"{path}: has no record, its columns are {', '.join(file.schema_arrow.names)}")


def read_values(packed: io.BufferedReader, path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of JSON lines, (index, value) of a JSON array, or (row, value) of parquet, all from 1.

    `packed` is the open file and `path` its name in errors. The first bytes identify gzip and parquet, and the first
    character identifies an array. A UTF-8 byte order mark is skipped.
    """
    if packed.peek(4).startswith(PARQUET):
        yield from read_parquet(packed, path)
        return
    file = gzip.GzipFile(fileobj=packed) if packed.peek(2).startswith(GZIP) else packed
    try:
        head = file.read(64)
        refuse_other_formats(head, path)
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        file.seek(start)
        while (first := file.read(1)).isspace():
            pass
        file.seek(start)
    except BAD_FILE as error:
        raise refusal(f"{path}:1", error) from None
    number = 0
    for number, value in enumerate(read_array(file, path), start=1) if first == b"[" else read_lines(file, path):
        yield number, value
    if not number:
        raise ValueError(f"{path}: has no record, expected JSON lines or a JSON array, got {head[:60]!r}")


def read_json(paths: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """("FILE:LINE", value) of every value, in the files' order. A terminal shows the progress."""
    total = sum(path.stat().st_size for path in paths)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as progress:  # None: only on a terminal
        for path in paths:
            done = 0
            with open(path, "rb") as packed:
                for number, value in read_values(packed, path):
                    yield f"{path}:{number}", value
                    progress.update(packed.tell() - done)
                    done = packed.tell()


class Named:
    """What an option names, such as the sources to drop. What no record has is a typing error, and refused."""

    def __init__(self, option: str, names: Sequence[str]):
        self.option, self.unseen, self.seen = option, set(names), set[str]()

    def see(self, names: Iterable[str]) -> None:
        if self.unseen:
            self.unseen.difference_update(names)
            self.seen.update(names)

    def refuse_unseen(self) -> None:
        if self.unseen:
            known = ", ".join(sorted(self.seen)[:20]) or "none"
            raise ValueError(f"{self.option} names {show(min(self.unseen))}, which no record has; they have: {known}")


def read_records(
    paths: Sequence[Path], weights: Mapping[str, float] | None = None, scores: str | None = None
) -> Iterator[tuple[str, Record]]:
    aspects = Named("--weights", list(weights or ()))
    for where, value in read_json(paths):
        try:
            record = parse_scored(value, scores) if scores else parse_record(value, weights)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        for completion in value["completions"] if weights else ():
            aspects.see(completion.get("annotations") or {})
        yield where, record
    aspects.refuse_unseen()


def refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, expected a file")


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut. Some network file systems cannot; that is no error."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write(files: dict[Path, list[bytes]]) -> None:
    """Write one or two files of a folder so that afterwards all are new, or all are as they were.

    1. Each is written under a temporary name and synced to disk. Nothing else changes until all of them are.
    2. One file is renamed over the old one, which is atomic. With two files, the old ones are first renamed to
       NAME.RANDOM.old, then the new ones get their names, and then the .old files are deleted.

    An error or Ctrl-C puts the old files back. A kill or a power cut in step 2 can leave one or both names missing, but
    never a new file beside an old one. train.py refuses a missing file, and the old content is in NAME.RANDOM.old. A
    kill in step 1 leaves the old files untouched and .NAME.RANDOM.tmp beside them.
    """
    tag = os.urandom(4).hex()  # a fresh name, so files left by a killed process are not in the way
    new = {path: path.with_name(f".{path.name}.{tag}.tmp") for path in files}
    try:
        for path, lines in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(new[path], "xb") as file:  # x: never follows a symbolic link
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            refuse_folder(path)
        if len(files) == 1:
            [(path, temporary)] = new.items()
            os.replace(temporary, path)
            sync_folder(path.parent)
        else:
            replace_together(new, {path: path.with_name(f"{path.name}.{tag}.old") for path in files})
    finally:
        for temporary in new.values():
            temporary.unlink(missing_ok=True)


def replace_together(new: dict[Path, Path], old: dict[Path, Path]) -> None:
    """Step 2 of `write` for {path: its new file} and {path: where its old file waits}, all in one folder."""
    folder = next(iter(new)).parent
    try:
        for path in new:
            with suppress(FileNotFoundError):
                os.replace(path, old[path])
        sync_folder(folder)  # the old names must be gone from the disk before a new one appears
        for path in new:
            os.replace(new[path], path)
        sync_folder(folder)
    except BaseException:
        for path in new:  # remove every new file before an old one returns
            if not os.path.lexists(new[path]):
                path.unlink(missing_ok=True)
        for path in new:
            with suppress(FileNotFoundError):
                os.replace(old[path], path)
        raise
    for path in old.values():
        path.unlink(missing_ok=True)


# ---- marks: what a person decided on the page that audit.py writes --------------------------------------------------

MARKS = ("keep", "flip", "drop", "note")  # note: a remark and no decision


class Mark(NamedTuple):
    where: str
    mark: str
    prompt_id: str
    pair: str | None  # `pair_id` of the pair that was looked at, "" if there was none; None: all records of the prompt


def pair_id(prompt_id: str, chosen: str, rejected: str) -> str:
    """A name for a pair. Another --by or --seed makes another pair of the same record, and a mark is no use there."""
    return hashlib.sha256("\0".join((prompt_id, chosen, rejected)).encode()).hexdigest()[:16]


class Marks:
    """{"prompt_id": ..., "mark": "flip", "pair": ..., "note": ...} a line. The last two are optional."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[tuple[str, str | None], Mark] = {}
        self.used: set[Mark] = set()
        refuse_folder(path)
        for where, value in read_json([path]):
            try:
                mark, prompt_id = field(value, "mark", str), field(value, "prompt_id", str)
                pair = field(value, "pair", str) if value.get("pair") is not None else None
            except ValueError as error:
                raise ValueError(f"{where}: {error}; a marks file is what the page of audit.py downloads") from None
            if mark not in MARKS:
                raise ValueError(f"{where}: the mark is {show(mark)}, expected one of {', '.join(MARKS)}")
            first = self.found.setdefault((prompt_id, pair), Mark(where, mark, prompt_id, pair))
            if first.where != where:
                raise ValueError(f"{where}: marks the same pair as {first.where}; keep one of the two")

    def apply(self, record: Record, choice: Pick | Drop) -> tuple[str, Pick | Drop]:
        """(mark or "", the choice after it). A mark that names a pair comes before one that names the prompt only."""
        prompt_id = prompt_id_of(record.instruction)
        pair = "" if isinstance(choice, Drop) else pair_id(prompt_id, *(answer.response for answer in choice))
        mark = self.found.get((prompt_id, pair)) or self.found.get((prompt_id, None))
        if mark is None:
            return "", choice
        self.used.add(mark)
        if mark.mark == "drop":
            return mark.mark, Drop.MARKED
        if mark.mark != "flip":
            return mark.mark, choice
        if isinstance(choice, Drop):
            raise ValueError(f"{mark.where} flips its pair, but the record makes none: {choice}")
        chosen, rejected = choice
        return mark.mark, (rejected, chosen)

    def refuse_unused(self) -> None:
        if left := [mark for mark in self.found.values() if mark not in self.used]:
            raise ValueError(
                f"{left[0].where}: the mark fits no record ({len(left)} of {len(self.found)} do not); the marks are of "
                "another data set, or of pairs made with another --by or --seed, or this command leaves the record out"
            )


# ---- the command ----------------------------------------------------------------------------------------------------


def compare_rules(record: Record, counts: Counter[str]) -> None:
    """Count the records where the two rules choose different answers, and the low-rated answers with a score of 10.

    UltraFeedback wrote `overall_score = score if score > 1 else 10 * score`, so the worst answers, scored 1, got a 10.
    Its fix of 2023-12-29 sets a 10 back to 1 where the mean rating is at most 2.
    """
    tens = [completion for completion in record.completions if completion.overall_score == 10]
    counts["tens"] += len(tens)
    counts["low tens"] += sum(completion.rating is not None and completion.rating <= 2 for completion in tens)
    if len(record.completions) > 1 and all(c.overall_score is not None for c in record.completions):
        by_ratings, by_score = choose_by_ratings(record.completions), choose_by_overall_score(record.completions)
        if not isinstance(by_ratings, Drop) and not isinstance(by_score, Drop):
            counts["compared"] += 1
            counts["differ"] += by_ratings[0].response != by_score[0].response


class Options(NamedTuple):
    """How pairs are made, by the names of the command line."""

    by: str = "ratings"
    seed: int = 42
    system_prompt: str | None = None
    rejected: str = "random"
    min_margin: float = 0.0
    repair: str | None = None  # one of IN_DOUBT
    weights: Mapping[str, float] | None = None
    drop_source: Sequence[str] = ()
    scores: str | None = None

    def check(self) -> None:
        """ValueError for what no record could mend."""
        if self.repair is not None and self.repair not in IN_DOUBT:
            raise ValueError(f"--repair is {self.repair!r}, expected one of {', '.join(IN_DOUBT)}")
        if self.repair and self.by != "overall-score":
            raise ValueError("--repair mends overall_score, which only --by overall-score compares")
        if self.weights and (self.by != "ratings" or self.scores):
            raise ValueError("--weights weighs the aspects' ratings, which only --by ratings compares")
        if self.scores and self.by != "ratings":
            raise ValueError(f"--scores names what is compared; leave out --by {self.by}")
        if not 0 <= self.min_margin <= FINITE:
            raise ValueError(f"--min-margin is {self.min_margin}, expected 0 or more")
        for aspect, weight in (self.weights or {}).items():
            if not 0 <= weight <= FINITE:
                raise ValueError(f"--weights: {aspect} weighs {weight}, expected 0 or more")


DEFAULTS = Options()


def read_pairs(
    paths: Sequence[Path], options: Options = DEFAULTS, marks: Marks | None = None
) -> tuple[list[tuple[str, bytes]], Counter[str]]:
    """All pairs as sorted (prompt_id, line), and the counts of `table`.

    A prompt_id is a hash, so sorting by it shuffles the pairs, always in the same way whatever the order of the files.
    """
    pairs: list[tuple[str, bytes]] = []
    counts: Counter[str] = Counter()
    sources = Named("--drop-source", options.drop_source)
    for where, record in read_records(paths, options.weights, options.scores):
        counts["records"] += 1
        sources.see([record.source])
        if record.source in options.drop_source:
            counts[Drop.SOURCE] += 1
            continue
        try:
            made = pairs_of(record, options, marks, counts)
        except ValueError as error:
            raise located(where, error) from None
        pairs += made
    sources.refuse_unseen()
    if marks:
        marks.refuse_unused()
    if not pairs:
        reasons = ", ".join(f"{counts[drop]} {drop}" for drop in Drop if counts[drop])
        raise ValueError(f"{paths[0]}: no pair is left of {counts['records']} records: {reasons}")
    counts["pairs"] = len(pairs)
    counts["repeats"] = len(pairs) - len({prompt_id for prompt_id, _ in pairs})
    return sorted(pairs), counts


def pairs_of(record: Record, options: Options, marks: Marks | None, counts: Counter[str]) -> list[tuple[str, bytes]]:
    """The (prompt_id, line) of each pair of a record. `counts` gets what happened to it."""
    if not options.scores:
        compare_rules(record, counts)
    if options.repair:
        record, done = repair(record, options.repair)
        after = Counter[str]()
        compare_rules(record, after)
        counts.update(done)
        counts.update({f"{name} repaired": after[name] for name in ("compared", "differ")})
    found = choose_all(record, options.by, options.seed, options.rejected, options.min_margin)
    if marks:
        marked = [marks.apply(record, choice) for choice in found]
        counts.update(f"mark {mark}" for mark, _ in marked)
        # A mark on a record that made no pair drops all pairs that it makes with another --rejected.
        whole = any(
            isinstance(made, Drop) and kept is Drop.MARKED for made, (_, kept) in zip(found, marked, strict=True)
        )
        found = [Drop.MARKED] if whole else [choice for _, choice in marked]
    picks = [choice for choice in found if not isinstance(choice, Drop)]
    if not picks:
        counts.update(drop for drop in found[:1] if isinstance(drop, Drop))
    else:
        marked_pairs = found.count(Drop.MARKED)
        counts["marked pairs"] += marked_pairs
        counts["left out"] += len(found) - len(picks) - marked_pairs
    made = [make_pair(record, *pick, options.by, options.system_prompt) for pick in picks]
    return [(pair["prompt_id"], (json.dumps(pair, ensure_ascii=False) + "\n").encode()) for pair in made]


def check_paths(raw: Sequence[Path], outputs: Sequence[Path], overwrite: bool) -> None:
    for path in raw:
        refuse_folder(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
    for path in outputs:
        refuse_folder(path)
        if path.suffix != ".jsonl":
            raise ValueError(f"{path}: the output must be a .jsonl file")
        if path.exists() and not overwrite:
            raise ValueError(f"{path}: exists; --overwrite replaces it")
    paths = [path.resolve() for path in [*raw, *outputs]]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"{twice[0]}: given twice")


def located(where: str, error: ValueError) -> ValueError:
    """An error with the place of its record. JSON can spell half of a surrogate pair, UTF-8 cannot."""
    if isinstance(error, UnicodeEncodeError):
        text = error.object[max(error.start - 20, 0) : error.end]
        return ValueError(f"{where}: half of a surrogate pair at the end of {text!a}, expected Unicode text")
    return ValueError(f"{where}: {error}")


def binarize_files(
    paths: Sequence[str | Path],
    output: str | Path,
    *,
    test_size: int = 0,
    overwrite: bool = False,
    curation: str | Path | None = None,
    **options: Any,
) -> tuple[Counter[str], dict[Path, int]]:
    """Make pairs of raw files by `options`, those of `Options`, and write them to `output`, with `test_size` of them in
    OUTPUT-test.jsonl instead.

    `curation` is a file of marks, which are applied before the split.
    Returns the counts, and the number of pairs in each file written. On any error the outputs are as they were.
    """
    raw, output, how = [Path(path) for path in paths], Path(output), Options(**options)
    outputs = [output, output.with_name(f"{output.stem}-test.jsonl")][: 2 if test_size else 1]
    if test_size < 0:
        raise ValueError(f"--test-size is {test_size}, expected 0 or more")
    how.check()
    check_paths([*raw, Path(curation)] if curation else raw, outputs, overwrite)
    pairs, counts = read_pairs(raw, how, Marks(Path(curation)) if curation else None)
    splits = dict(zip(outputs, split(pairs, test_size, how.seed), strict=False))
    write(splits)
    return counts, {path: len(lines) for path, lines in splits.items()}


def table(counts: Counter[str], written: dict[Path, int]) -> str:
    """What `binarize_files` returns, as text: name, count and share."""
    records, pairs = counts["records"], counts["pairs"]
    rows = [("records", records, 0)]  # name, count, and the count that it is a share of
    rows += [(f"  dropped: {drop}", counts[drop], records) for drop in Drop if drop not in ASKED_FOR or counts[drop]]
    optional = [(f"  marked {mark}", counts[f"mark {mark}"], records) for mark in MARKS if mark != "drop"]
    optional += [
        ("  pairs marked drop, of records that keep others", counts["marked pairs"], 0),
        ("  rejected answers left out: empty, or equal to the chosen one", counts["left out"], 0),
    ]
    rows += [row for row in optional if row[1]]
    rows += [("pairs", pairs, records)]
    rows += [(f"  in {path}", count, pairs) for path, count in written.items()]
    rows += [("  whose prompt repeats another's", counts["repeats"], pairs)]
    return layout(rows + (rows_of_the_rules(counts) if "tens" in counts else []))


def rows_of_the_rules(counts: Counter[str]) -> list[tuple[str, int, int]]:
    """The counts of `compare_rules`. audit.py prints the same ones."""
    rows = [
        ("records on which both rules choose", counts["compared"], counts["records"]),
        ("  their chosen answers differ", counts["differ"], counts["compared"]),
        ("completions with overall_score 10", counts["tens"], 0),
        ("  whose mean rating is at most 2", counts["low tens"], counts["tens"]),
    ]
    repaired = [
        ("  repaired: 10 became 1", counts["repaired"], counts["tens"]),
        ("  in doubt: mean rating above 2 and at most 4, or none", counts["in doubt"], counts["tens"]),
        ("repaired records on which both rules choose", counts["compared repaired"], counts["records"]),
        ("  their chosen answers differ", counts["differ repaired"], counts["compared repaired"]),
    ]
    return rows + (repaired if "compared repaired" in counts else [])


def layout(rows: list[tuple[str, int, int]]) -> str:
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}} {n:>9,}" + (f" {n / of:>7.1%}" if of else "") for name, n, of in rows)


def weight(text: str) -> tuple[str, float]:
    """An `argparse` type."""
    aspect, equals, value = text.partition("=")
    try:
        if aspect and equals:
            return aspect, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not ASPECT=NUMBER, such as honesty=2")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="binarize.py",
        description="Turn raw UltraFeedback records into preference pairs for DPO.",
        epilog="example: python binarize.py ultrafeedback/*.jsonl --output pairs.jsonl --test-size 2000 --seed 42",
    )
    add = parser.add_argument
    add(
        "raw", nargs="+", type=Path, metavar="RAW", help="raw records: JSON lines, a JSON array (gzip is fine), parquet"
    )
    add("--output", required=True, type=Path, metavar="FILE", help="where the pairs go, a .jsonl file")
    add("--by", choices=RULES, default="ratings", help="Notus's rule (ratings, the default) or Zephyr's")
    add("--scores", metavar="KEY", help="records are prompts with scored answers, and KEY holds the scores")
    add("--repair", nargs="?", choices=IN_DOUBT, const="drop", help="give the worst answers their overall_score of 1 "
        "back; drop (the default) or keep answers whose 10 is in doubt")  # fmt: skip
    add("--rejected", choices=REJECTED, default="random", help="which of the other answers: one at random (the "
        "default), the lowest, or all, a pair for each")  # fmt: skip
    add("--min-margin", type=float, default=0.0, metavar="X", help="the chosen answer's lead, at least (default: 0)")
    add("--weights", nargs="+", type=weight, metavar="ASPECT=W", help="weigh the ratings of these aspects (default: 1)")
    add("--drop-source", nargs="+", default=(), metavar="SOURCE", help="leave out records of it, such as truthful_qa")
    add("--seed", type=int, default=42, metavar="S", help="draws rejected answers and held-out prompts (default: 42)")
    add("--test-size", type=int, default=0, metavar="N", help="hold out N pairs in FILE-test.jsonl (default: 0)")
    add("--system-prompt", metavar="TEXT", help="start every conversation with this system turn; '' makes an empty one")
    add("--curation", type=Path, metavar="FILE", help="apply the marks that were made on the page of audit.py")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    args = vars(parser.parse_args(argv))
    try:
        weights = dict(args.pop("weights") or ())
        counts, written = binarize_files(args.pop("raw"), args.pop("output"), weights=weights, **args)
        print(table(counts, written))
    except (ValueError, OSError) as error:
        print(f"binarize.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("binarize.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
