"""Rows -> pairs of token ids. The only way from messages to ids, for training, generation, evaluation and the demo.

    messages --with_system_turn--> --chat template--> text --tokenizer--> ids

    prompt    <s> <|system|> ... </s> <|user|> ... </s> <|assistant|>     context, never scored
    answer                                                 ... </s>       scored; ends with exactly one EOS

A prompt and its answer are tokenized as one text and then split, because an answer on its own would begin with another
token ("▁Hello", not "Hello").

Legend: P pairs, N token ids of all pairs.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from notus.chat import ChatTemplate, Message, check_tool_turns, with_system_turn
from notus.files import checksum, file_digest, fsync, lock, make_folder, read_json, set_aside, text_digest
from notus.rows import Row, check_file, plain, read_rows, show
from notus.tokenizer import Tokenizer


class Pair(NamedTuple):
    """One preference, as token ids: both answers continue the prompt."""

    where: str  # file:line
    prompt: np.ndarray  # int32
    chosen: np.ndarray  # int32, ends with EOS unless truncated
    rejected: np.ndarray


class PairSet(Sequence[Pair]):
    """P pairs as views of one flat array of ids, so that the token cache can be mapped from the disk."""

    def __init__(self, ids: np.ndarray, bounds: np.ndarray, where: np.ndarray, counts: Counter):
        self.ids = ids  # (N,) int32, all pairs one after another
        self.bounds = bounds  # (P, 4) int64: where prompt, chosen and rejected begin, and where the pair ends
        self.where = where  # (P,) file:line
        self.counts = counts  # how many rows met which fate, by reason
        self.lengths = np.diff(bounds, axis=1)  # (P, 3) tokens of prompt, chosen, rejected
        self.num_tokens = self.lengths.sum(axis=1)  # (P,) of a pair's segment in a stream: the prompt counts once

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]  # no slices
        start, chosen, rejected, end = self.bounds[index].tolist()
        return Pair(str(self.where[index]), self.ids[start:chosen], self.ids[chosen:rejected], self.ids[rejected:end])

    @cached_property
    def keys(self) -> list[bytes]:
        """`pair_key` of every pair, each hashed once."""
        return [pair_key(pair) for pair in self]

    @classmethod
    def of(cls, pairs: Sequence[Pair], counts: Counter) -> "PairSet":
        parts = [ids for pair in pairs for ids in pair[1:]]
        ends = np.cumsum([0, *map(len, parts)])
        bounds = np.stack([ends[0:-1:3], ends[1::3], ends[2::3], ends[3::3]], axis=1)
        ids = np.concatenate(parts).astype(np.int32) if parts else np.empty(0, np.int32)
        return cls(ids, bounds, np.array([pair.where for pair in pairs], dtype=str), counts)


def pair_key(pair: Pair) -> bytes:
    """16 bytes that name the token ids of a pair, and nothing else of it."""
    lengths = np.array([len(pair.prompt), len(pair.chosen), len(pair.rejected)], dtype="<i4")
    ids = np.concatenate([lengths, pair.prompt, pair.chosen, pair.rejected]).astype("<i4")
    return hashlib.sha256(ids.tobytes()).digest()[:16]


# --- messages -> ids -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """How one model reads conversations: its tokenizer, its chat template, and the frame around them.

    bos: begin with BOS, exactly once; False adds none. system_prompt: the system turn inserted where a conversation has
    none; None inserts none. vocab_size: rows of the embedding. A tokenizer may be larger, as long as no id beyond the
    embedding is used.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    bos: bool
    system_prompt: str | None
    vocab_size: int

    @property
    def identity(self) -> dict[str, Any]:
        """Everything here that can change an id, by name."""
        return self.tokenizer.identity | self.template.identity | {"bos": self.bos, "system turn": self.system_prompt}

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation up to where the assistant's answer begins."""
        ((ids, _, _),) = self.encode([(messages, [])])
        return ids

    def encode(
        self,
        conversations: Sequence[tuple[Sequence[Message], Sequence[str]]],
        block: int = 4096,
        where: Sequence[str] | None = None,
    ) -> Iterator[tuple[list[int], list[list[int]], bool]]:
        """(messages, answers) -> (prompt ids, ids of each answer, whether a token reaches from prompt into answer).

        Such a token belongs to the answers: the prompt is then what all of them share. ValueError for an id that the
        embedding does not have, and for messages that the template rejects, with the place in `where` they came from.
        """
        for start in range(0, len(conversations), block):
            part = conversations[start : start + block]
            texts: list[str] = []
            for number, each in enumerate(part, start):
                try:
                    texts += self._texts(*each)
                except ValueError as error:
                    raise ValueError(f"{where[number]}: {error}" if where else str(error)) from error
            ids = iter(self.tokenizer.encode_batch(texts, bos=self.bos))
            for messages, answers in part:
                prompt, whole = next(ids), [next(ids) for _ in answers]
                if (largest := max(map(max, filter(None, (prompt, *whole))), default=0)) >= self.vocab_size:
                    raise ValueError(
                        f"{self.tokenizer.path}: {show(messages[-1]['content'])} or an answer to it has token id "
                        f"{largest}, but the model's embedding has only {self.vocab_size} rows: tokenizer and weights "
                        "do not belong together"
                    )
                split = common_prefix(prompt, *whole)
                yield prompt[:split], [answer[split:] for answer in whole], split < len(prompt)

    def _texts(self, messages: Sequence[Message], answers: Sequence[str]) -> Iterator[str]:
        """Prompt, prompt + first answer, prompt + second answer, ..."""
        prompt = with_system_turn(messages, self.system_prompt)
        check_tool_turns(self.template, prompt)
        yield self.template.render(prompt, add_generation_prompt=True)
        for answer in answers:
            text = self.template.render([*prompt, {"role": "assistant", "content": answer}])
            yield strip_eos(text, self.template.eos_token) + self.template.eos_token


def strip_eos(text: str, eos_token: str) -> str:
    """A text without the EOS at its end, and without the whitespace after it: that is never sampled."""
    while (body := text.rstrip()).endswith(eos_token):
        text = body.removesuffix(eos_token)
    return text


def common_prefix(prompt: list[int], *others: list[int]) -> int:
    """How many leading ids of the prompt all the others share."""
    if all(other[: len(prompt)] == prompt for other in others):
        return len(prompt)
    differ = (i for i, ids in enumerate(zip(prompt, *others, strict=False)) if len(set(ids)) > 1)
    return next(differ, min(map(len, (prompt, *others))))


def truncate(
    prompt: list[int], chosen: list[int], rejected: list[int], max_length: int, max_prompt_length: int, keep: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """The recipe's rule (TRL 0.7). Only a pair whose longer side exceeds `max_length` is cut. First the prompt keeps
    its first `keep` tokens (BOS) and its last ones, `max_prompt_length` in all. If that is not enough, each answer
    keeps its first max_length - max_prompt_length tokens. Such an answer has no EOS: the model is not taught to stop
    there."""
    longer = max(len(chosen), len(rejected))
    if len(prompt) + longer > max_length and len(prompt) > max_prompt_length:
        prompt = prompt[:keep] + prompt[len(prompt) - (max_prompt_length - keep) :]
    if len(prompt) + longer > max_length:
        room = max_length - max_prompt_length
        chosen, rejected = chosen[:room], rejected[:room]
    return prompt, chosen, rejected


# --- rows -> pairs -------------------------------------------------------------------------------------------------


Source = str | Path | Mapping[str, Any]  # a file of rows, or one row


def load_pairs(
    sources: Source | Sequence[Source],
    encoder: Encoder,
    *,
    max_length: int,
    max_prompt_length: int,
    drop_bad_pairs: bool = False,
    test_size: float = 0.0,
    held_out: bool = False,
    cache_dir: str | Path | None = None,
) -> PairSet:
    """Read, check, render, tokenize and truncate. A source is a file of rows, or a row as a dict: see rows.py.

    test_size: hold out this share of the rows, or from 1 on this number of them. A row's prompt decides, by its hash,
    so the choice does not depend on the order, and rows with the same prompt stay together. `held_out` gives the pairs
    of these rows, otherwise the others.

    A pair whose answers are equal, or one of whose answers is empty, teaches nothing: ValueError, or with
    `drop_bad_pairs` it is left out and counted. Pairs that become equal only as tokens or by truncation are always left
    out and counted.

    With a `cache_dir` the result is kept there, under a name made of everything it depends on, and mapped from the disk
    the next time. Of the processes of a machine one does the work, and the others wait for it.
    """
    if isinstance(sources, str | Path | Mapping):
        sources = [sources]
    for source in sources:
        if not isinstance(source, Mapping):
            check_file(Path(source))
    settings: dict[str, Any] = {"max_length": max_length, "max_prompt_length": max_prompt_length}
    settings |= {"drop_bad_pairs": drop_bad_pairs, "test_size": test_size, "held_out": held_out and test_size > 0}
    if cache_dir is None or not len(sources):
        return make_pairs(sources, encoder, **settings)
    data = [json.dumps(plain(s), default=str) if isinstance(s, Mapping) else file_digest(s) for s in sources]
    made_of = {"version": TOKENS_VERSION, "data": data, "rows": encoder.vocab_size}
    directory = Path(cache_dir) / text_digest(json.dumps(made_of | encoder.identity | settings, sort_keys=True))[:16]
    if (pairs := read_pairs(directory)) is not None:  # before any lock: a complete cache may be read-only
        return pairs
    make_folder(directory.parent)
    with lock(directory.with_suffix(".lock")):
        if (pairs := read_pairs(directory)) is not None:
            return pairs
        if directory.exists():
            print(f"tokens      {directory} is damaged; it was moved to {set_aside(directory)} and is made again")
        write_pairs(directory, make_pairs(sources, encoder, **settings))
    if (pairs := read_pairs(directory)) is None:
        raise OSError(f"{directory}: the token cache was written, but cannot be read back")
    return pairs


def make_pairs(
    sources: Sequence[Source], encoder: Encoder, max_length: int, max_prompt_length: int, drop_bad_pairs: bool,
    test_size: float, held_out: bool,
) -> PairSet:  # fmt: skip
    counts: Counter[str] = Counter()
    if not len(sources):
        return PairSet.of([], counts)
    read: Iterable[Row] = read_rows(sources)
    if test_size:
        read = split_off(list(read), test_size, held_out)
    rows = []
    for row in read:
        counts["rows"] += 1
        counts[f"{READ_AS}{row.shape}"] += 1
        bad = bad_pair(row, encoder.template.eos_token)
        if bad and not drop_bad_pairs:
            raise ValueError(f"{row.where}: {bad[1]}; data.drop_bad_pairs=true leaves such pairs out and counts them")
        if bad:
            counts[f"dropped: {bad[0]}"] += 1
        else:
            rows.append(row)

    pairs = []
    conversations = [(row.prompt, [row.chosen, row.rejected]) for row in rows]
    special, keep = encoder.tokenizer.special_ids, len(encoder.tokenizer.begin(encoder.bos))
    encoded = encoder.encode(conversations, where=[row.where for row in rows])
    for row, (prompt, (chosen, rejected), shared) in zip(rows, encoded, strict=True):
        counts["prompt and answer share a token"] += shared
        # Text such as "</s>" in an answer becomes the special token, as everywhere in the Hugging Face ecosystem.
        counts["answers with the text of a special token"] += sum(
            not special.isdisjoint(answer[:-1]) for answer in (chosen, rejected)
        )
        same = chosen == rejected
        lengths = len(prompt), len(chosen), len(rejected)
        prompt, chosen, rejected = truncate(prompt, chosen, rejected, max_length, max_prompt_length, keep)
        counts["prompts cut"] += len(prompt) < lengths[0]
        counts["answers cut (no EOS)"] += (len(chosen) < lengths[1]) + (len(rejected) < lengths[2])
        if chosen == rejected:
            counts["dropped: equal as tokens" if same else "dropped: equal after truncation"] += 1
        else:
            pairs.append(Pair(row.where, *(np.array(ids, dtype=np.int32) for ids in (prompt, chosen, rejected))))
    if not pairs:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts.items() if reason.startswith("dropped"))
        names = ", ".join(str(source) for source in sources if not isinstance(source, Mapping)) or "the rows"
        raise ValueError(f"{names}: no pair is left of {counts['rows']:,} rows ({reasons})")
    counts["pairs"] = len(pairs)
    return PairSet.of(pairs, +counts)


def split_off(rows: Sequence[Row], test_size: float, held_out: bool) -> list[Row]:
    """The rows that `test_size` holds out, or the others. Each prompt has a fixed random place between 0 and 1, and the
    lowest places are held out."""
    texts = (json.dumps(row.prompt, sort_keys=True) for row in rows)
    places = [int(text_digest(text)[:13], 16) / 16**13 for text in texts]  # 52 bits: exact in a float
    limit = test_size if test_size < 1 else sorted(places)[min(int(test_size), len(rows)) - 1] + 16**-13
    part = [row for row, place in zip(rows, places, strict=True) if (place < limit) == held_out]
    if not part:
        raise ValueError(
            f"data.test_size = {test_size:g} leaves no row of {len(rows):,} to {'hold out' if held_out else 'train on'}"
        )
    return part


def bad_pair(row: Row, eos_token: str) -> tuple[str, str] | None:
    """(the reason, a sentence) for a pair that teaches nothing; None for a good one. EOS at an answer's end is none of
    its text."""
    chosen, rejected = (strip_eos(text, eos_token) for text in (row.chosen, row.rejected))
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            return "an answer is empty", f"the {name} answer is empty"
    if chosen == rejected:
        return "answers are equal", f"the chosen and the rejected answer are both {show(row.chosen)}"
    return None


READ_AS = "read as "  # begins the count of each shape of rows


def describe_counts(counts: Counter) -> str:
    """`1,234 pairs of 1,240 rows (dropped: ... 6): 1,000 prompt/chosen/rejected strings, 240 ...`."""
    shapes = ", ".join(f"{n:,} {name.removeprefix(READ_AS)}" for name, n in counts.items() if name.startswith(READ_AS))
    fates = (name for name in counts if name not in ("rows", "pairs") and not name.startswith(READ_AS))
    notes = ", ".join(f"{name} {counts[name]:,}" for name in fates)
    return f"{counts['pairs']:,} pairs of {counts['rows']:,} rows{f' ({notes})' if notes else ''}: {shapes}"


def describe_pair(pair: Pair, tokenizer: Tokenizer, max_characters: int = 400) -> str:
    """A pair as the model sees it, with special tokens and line ends in plain sight, and which part of it is scored."""

    def part(name: str, ids: np.ndarray, scored: str) -> str:
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False).replace("\n", "\\n")
        if len(text) > max_characters:
            text = f"{text[: max_characters // 2]} [...] {text[-max_characters // 2 :]}"
        return f"  {name:9} {len(ids):5} tokens, {scored}:  {text}"

    parts = (
        ("prompt", pair.prompt, "context"),
        ("chosen", pair.chosen, "scored "),
        ("rejected", pair.rejected, "scored "),
    )
    return "\n".join(part(*each) for each in parts)


# --- the token cache -----------------------------------------------------------------------------------------------

TOKENS_VERSION = 3  # raise it when the same text would give other ids or counts
ARRAYS = ("ids", "bounds", "where")


def write_pairs(directory: Path, pairs: PairSet) -> None:
    """A folder with the three arrays, the counts, the folder's own name, and the checksum of each array."""
    building = directory.with_suffix(".tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for name in ARRAYS:
        np.save(building / f"{name}.npy", getattr(pairs, name), allow_pickle=False)
    manifest = {
        "name": directory.name,
        "counts": pairs.counts,
        "files": {name: checksum(building / f"{name}.npy") for name in ARRAYS},
    }
    text = json.dumps(manifest)
    (building / "counts.json").write_text(json.dumps(manifest | {"sha256": text_digest(text)}))
    for path in (*building.iterdir(), building):
        fsync(path)
    building.replace(directory)
    fsync(directory.parent)


def read_pairs(directory: Path) -> PairSet | None:
    """The pairs of a cache folder; None if there is none, or if it is not exactly what `write_pairs` wrote."""
    try:
        manifest = read_json(directory / "counts.json")
        digest = manifest.pop("sha256")
        if digest != text_digest(json.dumps(manifest)) or manifest["name"] != directory.name:
            return None
        if any(checksum(directory / f"{name}.npy") != manifest["files"][name] for name in ARRAYS):
            return None
        ids, bounds, where = (np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS)
        return PairSet(ids, bounds, where, Counter(manifest["counts"]))
    except (OSError, ValueError, KeyError):
        return None
