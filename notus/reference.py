"""Log-probs of the reference model: computed once by the policy itself, before its first step, and kept on disk.

DPO needs pi_ref only as two numbers a pair, and pi_ref is the policy before training. So there is never a second model
in memory, and a run over the same base and text, whatever its order, learning rate or output folder, starts at once.

    cache_dir / <digest of the header> /
        header.json                what the numbers depend on besides the pair: weights, config, dtype, forward pass
        rank-00000.records         appended as the pass goes, one file a rank: what is there survives a kill

A record is 36 bytes: key of the pair's token ids (16), two float32 sums, two uint32 token counts, CRC-32 of the rest.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from notus.data import Pair
from notus.distributed import World, reshard, sum_over_ranks
from notus.model import Mistral, pair_logps
from notus.packing import deal, pack

FORWARD_VERSION = 1  # raise it when a change of the forward pass changes its numbers by more than rounding
BLOCK_PAIRS = 512  # pairs between two appends
RECORD = np.dtype(
    [("key", "V16"), ("logps", "<f4", 2), ("tokens", "<u4", 2), ("crc", "<u4")]  # logps, tokens: chosen, rejected
)


def pair_key(pair: Pair) -> bytes:
    """16 bytes that name the token ids of a pair, and nothing else of it."""
    lengths = np.array([len(pair.prompt), len(pair.chosen), len(pair.rejected)], dtype="<i4")
    ids = np.concatenate([lengths, pair.prompt, pair.chosen, pair.rejected]).astype("<i4")
    return hashlib.sha256(ids.tobytes()).digest()[:16]


class ReferenceCache:
    """The records of one header. Files that do not check out are refused by name, never guessed around."""

    def __init__(self, cache_dir: str | Path, header: dict, rank: int = 0):
        text = json.dumps(header | {"forward_version": FORWARD_VERSION}, sort_keys=True, indent=1)
        self.directory = Path(cache_dir) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.own_file = self.directory / f"rank-{rank:05d}.records"
        if rank == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            header_file = self.directory / "header.json"
            if not header_file.exists():
                header_file.with_suffix(".tmp").write_text(text)
                header_file.with_suffix(".tmp").replace(header_file)
            elif header_file.read_text() != text:
                raise ValueError(f"{header_file}: not the header this directory is named after; delete the directory")

    def read(self) -> dict[bytes, np.void]:
        """All records by key. A record that was torn by a kill, the last of its file, is cut off."""
        found = {}
        for path in sorted(self.directory.glob("*.records")):
            whole = path.stat().st_size // RECORD.itemsize
            os.truncate(path, whole * RECORD.itemsize)
            records = np.fromfile(path, dtype=RECORD)
            body = records.view(np.uint8).reshape(whole, RECORD.itemsize)[:, :-4]
            for number, record in enumerate(records):
                if zlib.crc32(body[number].tobytes()) != record["crc"]:
                    raise ValueError(f"{path}: record {number} fails its checksum; delete the file to compute it again")
                found[record["key"].tobytes()] = record
        return found

    def append(self, pairs: Sequence[Pair], logps: np.ndarray) -> None:
        """logps: (P, 2) float32."""
        records = np.zeros(len(pairs), dtype=RECORD)
        for record, pair, pair_logps_ in zip(records, pairs, logps, strict=True):
            record["key"] = pair_key(pair)
            record["logps"] = pair_logps_
            record["tokens"] = len(pair.chosen), len(pair.rejected)
            record["crc"] = zlib.crc32(record.tobytes()[:-4])
        self.directory.mkdir(parents=True, exist_ok=True)
        with self.own_file.open("ab") as file:
            file.write(records.tobytes())
            file.flush()
            os.fsync(file.fileno())


@torch.no_grad()
def score_pairs(
    model: Mistral, pairs: Sequence[Pair], world: World, budget: int, block_done: Callable[[list[int], Tensor], None]
) -> None:
    """Forward passes over all pairs, dealt over ranks. After each block of pairs every rank gets, for its own share,
    `block_done(indices, logps (P, 2))`."""
    for start in range(0, len(pairs), BLOCK_PAIRS):
        block = range(start, min(start + BLOCK_PAIRS, len(pairs)))
        micro_batches = deal([pairs[i].num_tokens for i in block], world.size, budget)[world.rank]
        indices = [[block[i] for i in micro_batch] for micro_batch in micro_batches]
        logps = []
        for micro_batch in indices:
            stream = pack([(pairs[i].prompt, (pairs[i].chosen, pairs[i].rejected)) for i in micro_batch])
            logps.append(pair_logps(model, stream.to(world.device)))
        block_done([i for micro_batch in indices for i in micro_batch], torch.cat(logps))
    reshard(model)


def reference_logps(
    model: Mistral,
    pairs: Sequence[Pair],
    cache: ReferenceCache,
    world: World,
    budget: int,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, int]:
    """(P, 2) float32 on the CPU, chosen and rejected, and how many of the P pairs had to be computed.

    `model` must be the untouched base: call this before the first step, never after a resume. Rank 0's view of the
    cache decides for all, and results travel over the process group, so no shared disk is needed. `progress` is told
    how many pairs this rank has scored so far.
    """
    logps = torch.zeros(len(pairs), 2)
    known = torch.zeros(len(pairs))
    if world.rank == 0:
        records = cache.read()
        for i, pair in enumerate(pairs):
            if (record := records.get(pair_key(pair))) is not None:
                if tuple(record["tokens"]) != (len(pair.chosen), len(pair.rejected)):
                    raise ValueError(f"{cache.directory}: the record of {pair.where} counts other tokens; delete it")
                logps[i] = torch.from_numpy(record["logps"].copy())
                known[i] = 1
    shared = torch.cat([logps, known[:, None]], dim=1).to(world.device)
    dist.broadcast(shared, src=0)
    missing = (shared[:, 2] == 0).nonzero().squeeze(1).tolist()

    computed = torch.zeros_like(shared[:, :2])
    done = 0

    def keep(block: list[int], block_logps: Tensor) -> None:
        nonlocal done
        if block:
            rows = [missing[i] for i in block]
            computed[rows] = block_logps.float()
            cache.append([pairs[i] for i in rows], block_logps.float().cpu().numpy())
        done += len(block)
        if progress:
            progress(done)

    score_pairs(model, [pairs[i] for i in missing], world, budget, keep)
    return (shared[:, :2] + sum_over_ranks(computed)).cpu(), len(missing)
