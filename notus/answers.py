"""Answers to many questions, from a checkpoint on this machine or from a server that speaks OpenAI's chat completions.

    requests --Checkpoint: batches, sorted by length-->          answers --outputs.py--> files of AlpacaEval, MT-Bench
             --Server (endpoint.py): concurrent HTTP requests-->         --judge.py--> verdicts on two models

Each answer is appended to a JSON Lines file as soon as it is known, under a key that is a hash of everything it depends
on. A rerun asks only for the keys that are missing. Other settings have other keys, so they never get old answers.
"""

import json
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from tqdm import tqdm

from notus.base import Base, Frame, load_model
from notus.chat import Message
from notus.distributed import World
from notus.files import lock, parse_json, read_bytes, text_digest
from notus.generate import generate
from notus.model import Mistral
from notus.weights import digest


class Request(NamedTuple):
    id: str  # of the question
    messages: list[Message]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0  # of the run; each question has noise of its own


class Answer(NamedTuple):
    text: str
    cut: bool  # at max_new_tokens


class Source(Protocol):
    @property
    def identity(self) -> dict[str, Any]:
        """What an answer depends on besides its request."""

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """(index of the request, its answer), in any order."""


def answer_all(source: Source, requests: Sequence[Request], path: Path) -> list[Answer]:
    """The answers in the order of the requests. They are kept in `path`, also when an error ends this early."""
    identity = source.identity
    keys = [text_digest(json.dumps([identity, *request], sort_keys=True)) for request in requests]
    try:
        with lock(path, wait=False):
            known = read_answers(path)
            missing = [i for i, key in enumerate(keys) if key not in known]
            done = len(keys) - len(missing)
            with path.open("a") as file, tqdm(total=len(keys), initial=done, desc="answers", disable=None) as bar:
                for number, answer in source.ask([requests[i] for i in missing]):
                    i = missing[number]
                    known[keys[i]] = answer
                    line = {"key": keys[i], "id": requests[i].id, "messages": requests[i].messages, **answer._asdict()}
                    file.write(json.dumps(line) + "\n")
                    file.flush()
                    bar.update()
    except BlockingIOError:
        raise ValueError(f"{path}: another process is writing answers there") from None
    return [known[key] for key in keys]


def read_answers(path: Path) -> dict[str, Answer]:
    """Answers by key. A last line that a kill left incomplete is removed from the file."""
    lines = read_bytes(path).split(b"\n")
    if torn := lines.pop():
        os.truncate(path, path.stat().st_size - len(torn))
    known = {}
    for number, line in enumerate(lines, 1):
        row = parse_json(line, path, number)
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("key", "text")):
            raise ValueError(f"{path}:{number}: not an answer that was kept here; move the file away")
        known[row["key"]] = Answer(row["text"], bool(row.get("cut")))
    return known


# --- a checkpoint ----------------------------------------------------------------------------------------------------


class Checkpoint:
    """A model on this machine, in its frame. The weights are read when the first answer is missing."""

    def __init__(self, base: Base, frame: Frame, device: torch.device, dtype: torch.dtype, batch_size: int = 16):
        self.base, self.encoder, self.batch_size = base, base.encoder(frame), batch_size
        self.device, self.dtype = device, dtype

    @cached_property
    def model(self) -> Mistral:
        return load_model(self.base, self.device, self.dtype)

    @cached_property
    def identity(self) -> dict[str, Any]:
        weights = digest(self.base.path, World(rank=0, size=1, device=self.device, mesh=None))
        return self.base.identity | self.encoder.identity | {"weights": weights, "dtype": str(self.dtype)}

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """A batch holds prompts of similar length and equal sampling, the longest first: if memory is short, the first
        batch shows it."""
        prompts = [self.encoder.prompt(request.messages) for request in requests]
        order = sorted(range(len(prompts)), key=lambda i: (requests[i][2:], -len(prompts[i])))
        for (max_new_tokens, *sampling), group in groupby(order, key=lambda i: requests[i][2:]):
            alike = list(group)
            for start in range(0, len(alike), self.batch_size):
                batch = alike[start : start + self.batch_size]
                ids = generate(
                    self.model, [prompts[i] for i in batch], max_new_tokens, self.base.stop_ids, *sampling
                )  # fmt: skip
                for i, answer in zip(batch, ids, strict=True):
                    yield i, Answer(self.base.tokenizer.decode(answer), len(answer) == max_new_tokens)
