"""Log-probs of the reference model: computed once, before the first step, and kept on disk.

DPO needs pi_ref only as two numbers a pair. pi_ref is the policy before training, or else dpo.reference, which is
scored before the policy is loaded. So there is never a second model in memory. A later run over the same base and text
starts at once, whatever its order, learning rate, output folder, number of GPUs or LoRA. If some rows of the data
changed, only those are computed.

    cache_dir / <digest of the header> /
        header.json                what the numbers depend on besides the pair: weights, config, dtype, forward pass
        rank-00000.records         appended as the pass proceeds, one file a rank: what is there survives a kill

A record is 40 bytes: key of the pair's token ids (16), two float32 sums, two uint32 token counts, how many records of
the same append follow, CRC-32 of the rest. A damaged file is set aside, and its pairs are computed again.

    python -m notus.reference fill CONFIG [section.key=value ...]      the pass alone, for use elsewhere
    python -m notus.reference inspect CACHE_DIR                        what a cache holds; checks every record
    python -m notus.reference verify CONFIG [...] [--rows 64]          computes random rows again and compares

Legend: P pairs.
"""

import argparse
import fcntl
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from notus import config as configuration
from notus import distributed
from notus.base import load_sharded
from notus.dims import MistralConfig
from notus.distributed import World, from_rank_zero, reshard, sum_over_ranks
from notus.files import (
    lock,
    make_folder,
    read_bytes,
    read_json,
    sentence,
    set_aside,
    text_digest,
    write_atomically,
)
from notus.metrics import Console
from notus.model import Mistral, pair_logps
from notus.packing import Stream, ahead, deal, pack_pairs
from notus.run import read_inputs
from notus.tokens import PairSet
from notus.weights import digest

FORWARD_VERSION = 1  # raise it when a change of the forward pass changes its numbers by more than rounding
BLOCK_PAIRS = 512  # pairs that are dealt to ranks and micro-batches at a time
RECORD = np.dtype(
    [("key", "V16"), ("logps", "<f4", 2), ("tokens", "<u4", 2), ("follow", "<u4"), ("crc", "<u4")]
)  # logps, tokens: chosen, rejected


def cache_header(model_sha256: str, dims: MistralConfig, compute_dtype: torch.dtype) -> dict:
    """Everything that a reference log-prob depends on, besides the token ids of its pair."""
    name = str(compute_dtype).removeprefix("torch.")
    return {
        "weights": model_sha256, "model": asdict(dims), "compute_dtype": name, "forward_version": FORWARD_VERSION,
    }  # fmt: skip


class ReferenceCache:
    """The records of one header. Every rank makes one, and appends to a file of its own. A complete cache may be
    read-only: nothing is opened for writing before the first append."""

    def __init__(self, cache_dir: str | Path, header: dict, rank: int = 0):
        self.text, self.rank = json.dumps(header, sort_keys=True, indent=1), rank
        self.directory = Path(cache_dir) / text_digest(self.text)[:16]
        self._file: io.BufferedWriter | None = None

    def read(self) -> dict[bytes, np.void]:
        """All records by key. Rank 0 calls, before any rank appends."""
        header = self.directory / "header.json"
        if not header.exists() and not any(self.directory.glob("*.records")):
            return {}  # no cache, or one that another run is just making
        if not header.is_file() or read_bytes(header) != self.text.encode():
            self._set_aside(header, "is not the header this folder is named after")  # then nothing in it can be trusted
            return {}
        return read_records(self.directory, self._set_aside)

    def _set_aside(self, path: Path, fault: str) -> None:
        damaged = path if path.suffix == ".records" else self.directory
        print(f"reference   {path} {fault}; {damaged.name} was moved to {set_aside(damaged)} and is computed again")

    def append(self, keys: Sequence[bytes], tokens: np.ndarray, logps: np.ndarray) -> None:
        """keys (P,), tokens (P, 2) of the answers, logps (P, 2) float32. On disk when this returns, as a whole or,
        after a kill, not at all."""
        records = np.zeros(len(keys), dtype=RECORD)
        records["logps"], records["tokens"] = logps, tokens
        records["follow"] = np.arange(len(keys))[::-1]
        for record, key in zip(records, keys, strict=True):
            record["key"] = key
            record["crc"] = zlib.crc32(record.tobytes()[:-4])
        file = self._file or self._open()
        file.write(records.tobytes())
        file.flush()
        os.fsync(file.fileno())

    def _open(self) -> io.BufferedWriter:
        """A file of its own for each rank of each run at work, because another run may be filling the same cache."""
        make_folder(self.directory)
        header = self.directory / "header.json"
        with lock(header.with_suffix(".lock")):
            if not header.exists():
                write_atomically(header, self.text)
        for number in itertools.count():
            path = self.directory / f"rank-{self.rank:05d}{f'-{number}' if number else ''}.records"
            file = path.open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends, however it ends
            except BlockingIOError:
                file.close()
                continue
            except OSError:  # no locks on this file system, as `lock` above has said
                pass
            file.truncate(RECORD.itemsize * len(whole_appends(path)))
            self._file = file
            break
        return file


def whole_appends(path: Path) -> np.ndarray:
    """The records of a file, without what a kill left of an unfinished append, so that a resumed pass forms the same
    micro-batches."""
    records = np.fromfile(path, dtype=RECORD)
    ends = np.flatnonzero(records["follow"] == 0)
    return records[: ends[-1] + 1 if len(ends) else 0]


def read_records(directory: Path, damaged: Callable[[Path, str], None]) -> dict[bytes, np.void]:
    """The records of one cache by key. `damaged(path, what is wrong)` is called for what is no file, and for a file
    with a record that fails its checksum. None of that file's records are used."""
    found: dict[bytes, np.void] = {}
    for path in sorted(directory.glob("*.records")):
        if not path.is_file():  # opening a pipe would wait forever
            damaged(path, "is not a regular file")
            continue
        records = whole_appends(path)
        body = records.view(np.uint8).reshape(len(records), RECORD.itemsize)[:, :-4]
        wrong = (number for number, crc in enumerate(records["crc"]) if zlib.crc32(body[number].tobytes()) != crc)
        if (number := next(wrong, None)) is not None:
            damaged(path, f"is damaged: record {number} fails its checksum")
        else:
            found.update({record["key"].tobytes(): record for record in records})
    return found


@torch.no_grad()
def score_pairs(
    model: Mistral,
    pairs: PairSet,
    world: World,
    budget: int,
    done: Callable[[list[int], Tensor], None],
    wanted: np.ndarray | None = None,
) -> None:
    """Forward passes over the pairs, or over those for which `wanted` (P,) is true, dealt over ranks. After each
    micro-batch every rank gets `done(indices, logps (P, 2))` for its own share, which may be empty.

    How pairs are put together does not depend on `wanted`: a pass that is cut short and goes on gives the same bits.
    """

    def micro_batches() -> Iterator[tuple[list[int], Stream]]:
        for start in range(0, len(pairs), BLOCK_PAIRS):
            tokens = pairs.num_tokens[start : start + BLOCK_PAIRS]
            plan = deal(tokens, tokens, world.size, budget)  # so many pairs at a time cost about what they are long
            for parts in zip(*plan, strict=True):  # one of each rank
                indices = [[start + i for i in part if wanted is None or wanted[start + i]] for part in parts]
                if any(indices):
                    mine = indices[world.rank]
                    yield mine, pack_pairs([pairs[i] for i in mine])

    for mine, stream in ahead(micro_batches()):
        done(mine, pair_logps(model, stream.to(world.device)))
    reshard(model)


def score_reference(
    model: Mistral, pair_sets: Mapping[str, PairSet], world: World, *, cache_dir: str, model_sha256: str,
    compute_dtype: torch.dtype, budget: int, rows: int = 4, new_too: bool = False,
    stopping: Callable[[], None] = lambda: None,
) -> tuple[list[Tensor], list[str]]:  # fmt: skip
    """For each named set of P pairs its reference (P, 2) on the CPU, and a sentence that says where it comes from.

    If the cache had some of them, or with `new_too`, `rows` random pairs are computed again and compared. `stopping` is
    called after each micro-batch and may raise. All ranks call, with a model that has not made a step yet: before a
    checkpoint is loaded."""
    cache = ReferenceCache(cache_dir, cache_header(model_sha256, model.config, compute_dtype), world.rank)
    references, sentences = [], []
    for name, pairs in pair_sets.items():
        with Console(len(pairs), enabled=world.rank == 0, unit="pair", every=0.1) as console:

            def progress(done: int, console: Console = console) -> None:
                console.step(min(done * world.size, console.total_steps), {})
                stopping()

            reference, computed = reference_logps(model, pairs, cache, world, budget, progress)
        found, again = len(pairs) - computed, ""
        if len(pairs) and (found or new_too):
            difference = verify(model, pairs, reference, world, budget, compute_dtype, rows)
            again = f"; {min(rows, len(pairs))} computed again, largest difference {difference:.1e} nats"
        references.append(reference)
        if len(pairs):
            sentences.append(f"{computed:,} {name} scored, {found:,} found in {cache.directory}{again}")
    return references, sentences


def reference_logps(
    model: Mistral,
    pairs: PairSet,
    cache: ReferenceCache,
    world: World,
    budget: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, int]:
    """(P, 2) float32 on the CPU, chosen and rejected, and how many of the P pairs had to be computed.

    Rank 0's view of the cache decides for all, and results travel over the process group, so no shared disk is needed.
    `progress` is called after each micro-batch with the number of pairs that this rank has scored so far.
    """
    known = from_rank_zero(world, lambda: look_up(cache, pairs)).to(world.device)  # (P, 2), NaN where missing
    missing = known.isnan().any(dim=1).cpu().numpy()
    first: dict[
        bytes, int
    ] = {}  # the first of several pairs with the same tokens stands for all, now and in later runs
    twin = np.array([first.setdefault(key, i) for i, key in enumerate(pairs.keys)], dtype=np.int64)
    missing &= twin == np.arange(len(pairs))
    computed = torch.zeros_like(known)
    count = 0

    def keep(rows: list[int], logps: Tensor) -> None:
        nonlocal count
        if rows:
            computed[rows] = logps.float()
            cache.append([pairs.keys[i] for i in rows], pairs.lengths[rows, 1:], logps.float().cpu().numpy())
        count += len(rows)
        if progress:
            progress(count)

    score_pairs(model, pairs, world, budget, keep, wanted=missing)
    return torch.where(known.isnan(), sum_over_ranks(computed), known).cpu()[twin], int(missing.sum())


def look_up(cache: ReferenceCache, pairs: PairSet) -> Tensor:
    """(P, 2) float32, NaN where the cache has no record, or one that counts other tokens than the pair has."""
    records, logps = cache.read(), torch.full((len(pairs), 2), float("nan"))
    for i, key in enumerate(pairs.keys if records else ()):
        record = records.get(key)
        if record is not None and record["tokens"].tolist() == pairs.lengths[i, 1:].tolist():
            logps[i] = torch.from_numpy(record["logps"].copy())
    return logps


def rounding(lengths: Tensor, reference: Tensor, dtype: torch.dtype) -> Tensor:
    """How far two log-probs (P, 2) of one model and text may lie apart, in nats; `lengths` (P, 2) of the answers.

    Two passes with other kernels or micro-batches differ by rounding alone: a token's log-prob by some 8 eps of the
    compute dtype, in either direction, so a sum of n by 8 eps sqrt(n) (benchmarks/rounding.py, a model of 30 layers).
    Eight times that is allowed, because one false alarm among 123,238 sums ends a run; and 4 eps of the stored float32
    sum. Other weights, another template or other lengths are off by more: 0.1 nats a token are 30 of 300.
    """
    return 64 * torch.finfo(dtype).eps * lengths.sqrt() + 4 * torch.finfo(torch.float32).eps * reference.abs()


def verify(
    model: Mistral, pairs: PairSet, reference: Tensor, world: World, budget: int, dtype: torch.dtype, rows: int = 4
) -> float:
    """Compute some random pairs again with the untouched base; the largest difference, in nats. ArithmeticError names a
    pair whose reference (P, 2) is off by more than rounding."""
    chosen = from_rank_zero(world, lambda: np.random.default_rng().permutation(len(pairs))[:rows])
    again = torch.zeros(len(pairs), 2, dtype=torch.float32, device=world.device)
    wanted = np.zeros(len(pairs), dtype=bool)
    wanted[chosen] = True
    score_pairs(model, pairs, world, budget, lambda rows, logps: again.__setitem__(rows, logps.float()), wanted)
    again = sum_over_ranks(again).cpu()
    check_same(pairs, dtype, chosen, again[chosen], reference[chosen])
    return (again - reference)[chosen].abs().max().item() if len(chosen) else 0.0


def check_same(
    pairs: PairSet, dtype: torch.dtype, indices: Sequence[int] | np.ndarray, policy: Tensor, reference: Tensor
) -> None:
    """Law 1: before its first step the policy IS the reference. policy, reference: (P, 2) of the pairs `indices`,
    computed in `dtype`. ArithmeticError names the pair that differs most."""
    lengths = torch.from_numpy(pairs.lengths[indices, 1:]).to(policy)
    difference = (policy.detach() - reference).abs()
    wrong = (~(difference <= rounding(lengths, reference, dtype))).any(dim=1).nonzero().squeeze(1).tolist()  # or NaN
    if wrong:
        worst = max(wrong, key=lambda i: difference[i].nan_to_num(float("inf")).max().item())
        raise ArithmeticError(
            f"the untrained policy differs from its reference in {len(wrong)} of {len(policy)} pairs, most in "
            f"{pairs[indices[worst]].where}: policy {policy[worst].tolist()}, reference {reference[worst].tolist()} "
            "nats. The loss would not begin at its known value (log 2 for dpo). Delete reference.cache_dir to compute "
            "the reference again."
        )


# --- python -m notus.reference ---------------------------------------------------------------------------------------


def fill(config: configuration.Config, rows: int) -> list[str]:
    """Load the reference, fill the cache, and compute `rows` random pairs again; a sentence for each set of pairs."""
    inputs, parallel, dtype = read_inputs(config), config.distributed, getattr(torch, config.train.compute_dtype)
    if not inputs.frame.preference_loss.member.reference:
        raise ValueError(f"dpo.loss = {config.dpo.loss!r} has no reference to score")
    world = distributed.start(config.train.device, parallel.replicate, parallel.timeout_minutes)
    try:
        model = load_sharded(
            inputs.reference, world, dtype, parallel.cpu_offload, frozen=True,
            reshard_after_forward=parallel.reshard_after_forward,
        )  # fmt: skip
        _, sentences = score_reference(
            model, {"pairs": inputs.train, "held-out pairs": inputs.test}, world,
            cache_dir=config.reference.cache_dir, model_sha256=digest(inputs.reference.path, world),
            compute_dtype=dtype, budget=config.train.micro_batch_tokens, rows=rows, new_too=True,
        )  # fmt: skip
        return sentences
    finally:
        distributed.stop()


def inspect(cache_dir: Path) -> list[str]:
    """What a cache holds, two lines and more for each base in it. ValueError names what is damaged."""
    headers = sorted(cache_dir.glob("*/header.json"))
    if not headers:
        raise ValueError(f"{cache_dir}: no reference cache in it")

    def damaged(path: Path, fault: str) -> None:
        raise ValueError(f"{path}: {fault}; the next run moves the file aside and computes its pairs again")

    lines = []
    for path in headers:
        header, records = read_json(path), read_records(path.parent, damaged)
        if not {"weights", "compute_dtype", "model", "forward_version"} <= header.keys():
            damaged(path, "is damaged")
        logps = np.array([record["logps"] for record in records.values()]).reshape(-1, 2)
        tokens = np.array([record["tokens"] for record in records.values()], dtype=np.int64).reshape(-1, 2)
        lines += [
            f"{path.parent}: {len(records):,} pairs, every checksum right",
            f"  weights sha256 {header['weights'][:16]}..., {header['compute_dtype']}, "
            f"{header['model']['num_hidden_layers']} layers x {header['model']['hidden_size']}, "
            f"forward version {header['forward_version']}",
            f"  {tokens.sum():,} answer tokens, {logps.sum() / max(1, tokens.sum()):.3f} nats a token on average",
        ]
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m notus.reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("fill", "score the pairs of a config with its base"), ("verify", "fill, then compute random rows again")
    ):  # fmt: skip
        command = commands.add_parser(name, help=text)
        command.add_argument("config", type=Path, help="a TOML file, as for train.py")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
        command.add_argument("--rows", type=int, default=4 if name == "fill" else 64, help="pairs to compute again")
    command = commands.add_parser("inspect", help="what is in a cache; every checksum is tried")
    command.add_argument("cache_dir", type=Path)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "inspect":
            lines = inspect(arguments.cache_dir)
        else:
            lines = fill(configuration.load(arguments.config, arguments.overrides), arguments.rows)
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"notus.reference: error: {sentence(error)}", file=sys.stderr)
        return 2
    if distributed.rank() == 0:
        print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
