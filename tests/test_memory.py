"""No rank ever holds the model, while it loads or exports: by the memory that the kernel counts for each process."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import run_ranks, save_checkpoint, tiny_config

from notus import distributed, weights
from notus.checkpoint import StreamingWriter
from notus.dims import MistralConfig
from notus.model import Mistral

MIB = 2**20


class Peak:
    """Peak of this process's own memory in bytes, above what it had at the start; mapped files do not count."""

    def __enter__(self) -> "Peak":
        self.start, self.bytes, self.running = anonymous_bytes(), 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous_bytes() - self.start)
            time.sleep(0.001)  # a copy of a tensor takes longer

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load_and_export(base: Path, output: Path) -> None:
    torch.set_num_threads(1)
    world = distributed.start("cpu")
    model = weights.meta_model(MistralConfig.read(base))
    distributed.shard(model, model.model.layers, world, torch.float32)
    with Peak() as loading:
        weights.load_weights(model, base, world.device)
    with Peak() as exporting:
        weights.export(model, base, output / "out", torch.float32, "", world.rank, eos_id=2)
    (output / f"{world.rank}.json").write_text(json.dumps([loading.bytes, exporting.bytes]))
    distributed.stop()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """242 MiB in float32; its largest tensor has 16 MiB."""
    config = tiny_config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=13,
        num_attention_heads=8,
        head_dim=64,
    )
    model = Mistral(config)
    model.initialize(0)
    return save_checkpoint(model, tmp_path_factory.mktemp("large"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("num_ranks", [4])
def test_a_rank_needs_its_shard_and_one_tensor(base: Path, tmp_path: Path, num_ranks: int):
    run_ranks(num_ranks, load_and_export, base, tmp_path)
    whole = (base / "model.safetensors").stat().st_size
    largest = 16 * MIB
    for rank in range(num_ranks):
        loading, exporting = json.loads((tmp_path / f"{rank}.json").read_text())
        print(f"rank {rank} of {num_ranks}: loading {loading / MIB:.0f} MiB, export {exporting / MIB:.0f} MiB")
        assert whole / num_ranks * 0.7 < loading < whole / num_ranks + 1.5 * largest  # it does hold its shard
        assert exporting < 6 * largest  # gathered, and on rank 0 whole: never the model
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == pytest.approx(whole, rel=1e-3)


def write_a_state(output: Path) -> None:
    distributed.start("cpu")
    state = {f"tensor {number}": torch.randn(2**22) for number in range(8)}  # 128 MiB in 16 MiB tensors
    (output / "state").mkdir()
    with Peak() as writing:
        dcp.save(state, storage_writer=StreamingWriter(str(output / "state"), save_distributed=True))
    (output / "peak.json").write_text(json.dumps(writing.bytes))
    distributed.stop()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_writing_a_checkpoint_copies_nothing(tmp_path: Path):
    """torch's own writer holds the state twice more."""
    run_ranks(1, write_a_state, tmp_path)
    peak = json.loads((tmp_path / "peak.json").read_text())
    print(f"writing 128 MiB took {peak / MIB:.1f} MiB")
    assert peak < 24 * MIB
