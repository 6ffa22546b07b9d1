"""Log-probs of the reference model: computed once by the policy itself, before its first step, and kept on disk.

DPO needs pi_ref only as two numbers a pair, and pi_ref is the policy before training. So there is never a second model
in memory, and a run over the same base and text, whatever its order, learning rate, output folder or number of GPUs,
starts at once; a run over data that changed in some rows computes those rows.

    cache_dir / <digest of the header> /
        header.json                what the numbers depend on besides the pair: weights, config, dtype, forward pass
        rank-00000.records         appended as the pass goes, one file a rank: what is there survives a kill

A record is 40 bytes: key of the pair's token ids (16), two float32 sums, two uint32 token counts, how many records of
the same append follow, CRC-32 of the rest.

    python -m notus.reference fill CONFIG [section.key=value ...]      the pass alone, for use elsewhere
    python -m notus.reference inspect CACHE_DIR                        what is in a cache; checks every record
    python -m notus.reference verify CONFIG [...] [--rows 64]          compute random rows again and compare
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from notus import config as configuration
from notus import distributed, weights
from notus.data import Pair, PairSet, ahead
from notus.distributed import World, from_rank_zero, reshard, sum_over_ranks
from notus.inputs import Inputs, read_inputs
from notus.model import Mistral, MistralConfig, pair_logps
from notus.packing import Stream, deal, pack_pairs
from notus.weights import write_atomically

FORWARD_VERSION = 1  # raise it when a change of the forward pass changes its numbers by more than rounding
BLOCK_PAIRS = 512  # pairs that are dealt to ranks and micro-batches at a time
RECORD = np.dtype(
    [("key", "V16"), ("logps", "<f4", 2), ("tokens", "<u4", 2), ("follow", "<u4"), ("crc", "<u4")]
)  # logps, tokens: chosen, rejected


def pair_key(pair: Pair) -> bytes:
    """16 bytes that name the token ids of a pair, and nothing else of it."""
    lengths = np.array([len(pair.prompt), len(pair.chosen), len(pair.rejected)], dtype="<i4")
    ids = np.concatenate([lengths, pair.prompt, pair.chosen, pair.rejected]).astype("<i4")
    return hashlib.sha256(ids.tobytes()).digest()[:16]


def cache_header(model_sha256: str, dims: MistralConfig, compute_dtype: str) -> dict:
    """All that a reference log-prob depends on, beside the token ids of its pair."""
    return {
        "weights": model_sha256, "model": asdict(dims), "compute_dtype": compute_dtype,
        "forward_version": FORWARD_VERSION,
    }  # fmt: skip


class ReferenceCache:
    """The records of one header. Files that do not check out are refused by name, never guessed around."""

    def __init__(self, cache_dir: str | Path, header: dict, rank: int = 0):
        text = json.dumps(header, sort_keys=True, indent=1)
        self.directory = Path(cache_dir) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.directory.mkdir(parents=True, exist_ok=True)
        header_file = self.directory / "header.json"
        if rank == 0:
            with header_file.with_suffix(".lock").open("w") as lock:  # another run may be making the same cache
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not header_file.exists():
                    write_atomically(header_file, text)
        if rank == 0 and header_file.read_text() != text:
            raise ValueError(f"{header_file}: not the header this directory is named after; delete the directory")
        # A file of its own for each rank of each run at work: another one may be filling the same cache.
        for number in itertools.count():
            self.file = (self.directory / f"rank-{rank:05d}{f'-{number}' if number else ''}.records").open("ab")
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held until the process ends, however it ends
                break
            except BlockingIOError:
                self.file.close()
        self.file.truncate(RECORD.itemsize * len(whole_appends(Path(self.file.name))))

    def read(self) -> dict[bytes, np.void]:
        """All records by key."""
        return read_records(self.directory)

    def append(self, pairs: Sequence[Pair], logps: np.ndarray) -> None:
        """logps: (P, 2) float32. On disk when this returns, as a whole or, after a kill, not at all."""
        records = np.zeros(len(pairs), dtype=RECORD)
        for number, (pair, pair_logps_) in enumerate(zip(pairs, logps, strict=True)):
            record = records[number]
            record["key"], record["logps"] = pair_key(pair), pair_logps_
            record["tokens"] = len(pair.chosen), len(pair.rejected)
            record["follow"] = len(pairs) - 1 - number
            record["crc"] = zlib.crc32(record.tobytes()[:-4])
        self.file.write(records.tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())


def whole_appends(path: Path) -> np.ndarray:
    """The records of a file, without what a kill left of an unfinished append: a pass that goes on then has the very
    micro-batches it would have had."""
    records = np.fromfile(path, dtype=RECORD)
    ends = np.flatnonzero(records["follow"] == 0)
    return records[: ends[-1] + 1 if len(ends) else 0]


def read_records(directory: Path) -> dict[bytes, np.void]:
    """The records of one cache by key. ValueError names file and record."""
    found = {}
    for path in sorted(directory.glob("*.records")):
        records = whole_appends(path)
        body = records.view(np.uint8).reshape(len(records), RECORD.itemsize)[:, :-4]
        for number, record in enumerate(records):
            if zlib.crc32(body[number].tobytes()) != record["crc"]:
                raise ValueError(f"{path}: record {number} fails its checksum; delete the file to compute it again")
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


def reference_logps(
    model: Mistral,
    pairs: PairSet,
    cache: ReferenceCache,
    world: World,
    budget: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, int]:
    """(P, 2) float32 on the CPU, chosen and rejected, and how many of the P pairs had to be computed.

    `model` must be the untouched base: call this before the first step, and before a checkpoint is loaded. Rank 0's
    view of the cache decides for all, and results travel over the process group, so no shared disk is needed.
    `progress` is called after each micro-batch with the number of pairs that this rank has scored so far.
    """
    known = from_rank_zero(world, lambda: look_up(cache, pairs)).to(world.device)  # (P, 2), NaN where missing
    missing = known.isnan().any(dim=1).cpu().numpy()
    first: dict[
        bytes, int
    ] = {}  # of pairs with the same tokens the first stands for all, in this pass as in a later one
    twin = np.array([first.setdefault(pair_key(pair), i) for i, pair in enumerate(pairs)], dtype=np.int64)
    missing &= twin == np.arange(len(pairs))
    computed = torch.zeros_like(known)
    count = 0

    def keep(rows: list[int], logps: Tensor) -> None:
        nonlocal count
        if rows:
            computed[rows] = logps.float()
            cache.append([pairs[i] for i in rows], logps.float().cpu().numpy())
        count += len(rows)
        if progress:
            progress(count)

    score_pairs(model, pairs, world, budget, keep, wanted=missing)
    return torch.where(known.isnan(), sum_over_ranks(computed), known).cpu()[twin], int(missing.sum())


def look_up(cache: ReferenceCache, pairs: PairSet) -> Tensor:
    """(P, 2) float32, NaN where the cache has no record."""
    records, logps = cache.read(), torch.full((len(pairs), 2), float("nan"))
    for i, pair in enumerate(pairs) if records else ():
        if (record := records.get(pair_key(pair))) is not None:
            if tuple(record["tokens"]) != (len(pair.chosen), len(pair.rejected)):
                raise ValueError(f"{cache.directory}: the record of {pair.where} counts other tokens; delete it")
            logps[i] = torch.from_numpy(record["logps"].copy())
    return logps


def rounding(lengths: Tensor, reference: Tensor, dtype: torch.dtype) -> Tensor:
    """How far two log-probs (P, 2) of one model and text may lie apart, in nats; `lengths` (P, 2) of the answers.

    Two passes that put a pair into other micro-batches differ by rounding alone: a token's log-prob by some 16 eps of
    the compute dtype, in either direction, so a sum of n by 16 eps sqrt(n); and the stored float32 sum by 4 eps. Other
    weights, another template or other lengths are off by whole nats.
    """
    return 16 * torch.finfo(dtype).eps * lengths.sqrt() + 4 * torch.finfo(torch.float32).eps * reference.abs()


def verify(
    model: Mistral, pairs: PairSet, reference: Tensor, world: World, budget: int, dtype: torch.dtype, rows: int = 4
) -> float:
    """Compute some random pairs again with the untouched base; the largest difference, in nats. RuntimeError names a
    pair whose reference (P, 2) is off by more than rounding."""
    chosen = from_rank_zero(world, lambda: np.random.default_rng().permutation(len(pairs))[:rows])
    again = torch.zeros(len(pairs), 2, dtype=torch.float32, device=world.device)
    wanted = np.zeros(len(pairs), dtype=bool)
    wanted[chosen] = True
    score_pairs(model, pairs, world, budget, lambda rows, logps: again.__setitem__(rows, logps.float()), wanted)
    again = sum_over_ranks(again).cpu()
    check_same(pairs, chosen, again[chosen], reference[chosen], dtype)
    return (again - reference)[chosen].abs().max().item() if len(chosen) else 0.0


def check_same(pairs: PairSet, indices: Sequence[int], policy: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    """Law 1: before its first step the policy IS the reference. policy, reference: (P, 2) of the pairs `indices`."""
    lengths = torch.from_numpy(pairs.lengths[indices, 1:]).to(policy)
    difference = (policy.detach() - reference).abs()
    wrong = (~(difference <= rounding(lengths, reference, dtype))).any(dim=1).nonzero().squeeze(1).tolist()  # or NaN
    if wrong:
        worst = max(wrong, key=lambda i: difference[i].nan_to_num(float("inf")).max().item())
        raise RuntimeError(
            f"the untrained policy differs from its reference in {len(wrong)} of {len(policy)} pairs, most in "
            f"{pairs[indices[worst]].where}: policy {policy[worst].tolist()}, reference {reference[worst].tolist()} "
            "nats. The loss would not begin at log 2. Delete reference.cache_dir to compute the reference anew."
        )


# --- python -m notus.reference ---------------------------------------------------------------------------------------


def fill(config: configuration.Config, inputs: Inputs, rows: int) -> str:
    """Load the base, fill the cache, and compute `rows` random pairs again."""
    world = distributed.start(config.train.device, config.distributed.replicate)
    try:
        dtype = getattr(torch, config.train.compute_dtype)
        model = weights.meta_model(inputs.dims)
        distributed.shard(model, model.model.layers, world, dtype)
        weights.load_weights(model, config.model.path, world.device)
        sha256 = weights.digest(config.model.path, world, config.reference.cache_dir)
        header = cache_header(sha256, inputs.dims, config.train.compute_dtype)
        cache = ReferenceCache(config.reference.cache_dir, header, world.rank)
        lines = []
        for name, pairs in (("train", inputs.train), ("held out", inputs.test)):
            if len(pairs):
                budget = config.train.micro_batch_tokens
                reference, computed = reference_logps(model, pairs, cache, world, budget)
                difference = verify(model, pairs, reference, world, budget, dtype, rows)
                lines.append(
                    f"{name:11} {computed:,} pairs scored, {len(pairs) - computed:,} found in {cache.directory}; "
                    f"{min(rows, len(pairs))} computed again, largest difference {difference:.1e} nats"
                )
        return "\n".join(lines)
    finally:
        distributed.stop()


def inspect(cache_dir: Path) -> str:
    headers = sorted(cache_dir.glob("*/header.json"))
    if not headers:
        raise ValueError(f"{cache_dir}: no reference cache in it")
    lines = []
    for path in headers:
        header, records = json.loads(path.read_text()), read_records(path.parent)
        logps = np.array([record["logps"] for record in records.values()]).reshape(-1, 2)
        tokens = np.array([record["tokens"] for record in records.values()], dtype=np.int64).reshape(-1, 2)
        per_token = logps.sum() / max(1, tokens.sum())
        lines.append(
            f"{path.parent}: {len(records):,} pairs, every checksum right\n"
            f"  weights sha256 {header['weights'][:16]}..., {header['compute_dtype']}, "
            f"{header['model']['num_hidden_layers']} layers x {header['model']['hidden_size']}, "
            f"forward version {header['forward_version']}\n"
            f"  {tokens.sum():,} answer tokens, {per_token:.3f} nats a token on average"
        )
    return "\n".join(lines)


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
            report = inspect(arguments.cache_dir)
        else:
            config = configuration.load(arguments.config, arguments.overrides)
            report = fill(config, read_inputs(config), arguments.rows)
    except ValueError as error:
        print(f"notus.reference: error: {error}", file=sys.stderr)
        return 2
    if distributed.rank() == 0:
        print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
