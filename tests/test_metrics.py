"""metrics.jsonl is strict JSON that survives a kill; the console says one thing at a time."""

import io
import json
import resource
import sys
from pathlib import Path

import pytest
import torch

from notus import metrics
from notus.metrics import Console, MetricsLog, duration, peak_memory_gib


def strictly(text):
    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_log_is_strict_json_and_readable_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write(
        {"step": 1, "loss": torch.tensor(0.5), "grad_norm": float("nan"), "rewards/margins": torch.tensor(torch.inf)}
    )
    assert strictly(path.read_text()) == [{"step": 1, "loss": 0.5, "grad_norm": None, "rewards/margins": None}]
    log.close()


def test_a_resumed_log_keeps_the_lines_up_to_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (0, 1, 2, 2, 3):
        log.write({"step": step})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')  # killed here
    log = MetricsLog(path, last_step=2)
    assert log.kept == [{"step": step} for step in (0, 1, 2, 2)]
    log.write({"step": 3, "loss": 0.5})
    log.close()
    assert strictly(path.read_text()) == [*log.kept, {"step": 3, "loss": 0.5}]
    MetricsLog(path).close()  # a run that begins anew
    assert path.read_text() == ""


def test_other_ranks_are_silent(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", enabled=False)
    log.write({"step": 1})
    log.close()
    stream = io.StringIO()
    console = Console(10, enabled=False, stream=stream)
    console.step(1, {"loss": 0.5})
    console.say("hello")
    console.close()
    assert not list(tmp_path.iterdir()) and not stream.getvalue()


FULL = {
    "loss": 0.61234,
    "rewards/accuracies": 0.671,
    "rewards/margins": 0.208,
    "learning_rate": 4.9e-7,
    "grad_norm": 12.34,
    "tokens_per_second": 18234.4,
    "mfu": 0.413,
    "memory_gib": 5.08,
}


def test_plain_lines(monkeypatch):
    """Time left counts from the first report: 100 steps took 100 s, so 2,689 left take 44m49s."""
    stream, clock = io.StringIO(), iter([1000.0, 1100.0])
    monkeypatch.setattr(metrics.time, "monotonic", lambda: next(clock))
    console = Console(2889, first_step=99, stream=stream)
    console.say("resumed")
    console.step(100, {"loss": 0.693147})
    console.step(200, FULL)
    console.close()
    assert stream.getvalue().splitlines() == [
        "resumed",
        "step  100/2889  loss 0.6931",
        "step  200/2889  loss 0.6123  acc 0.67  margin 0.21  lr 4.9e-07  grad 12.3  "
        "18,234 tok/s  41.3% MFU  5.1 GiB  eta 44m49s",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    console = Console(10, first_step=4, stream=stream)
    console.step(5, FULL)
    console.say("saved")
    console.step(10, FULL)
    console.close()
    last = stream.getvalue().rstrip().rpartition("\r")[2]
    assert last.startswith("step 10/10 |") and "loss 0.6123  acc 0.67  margin 0.21  18,234 tok/s  eta 0s" in last
    assert "saved\n" in stream.getvalue()
    assert "\x1b[3" not in stream.getvalue()  # no colours


@pytest.mark.parametrize(
    "seconds, text", [(0, "0s"), (45.4, "45s"), (59.6, "1m00s"), (200, "3m20s"), (3599.9, "1h00m"), (90061, "25h01m")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel's own account is Linux's")
def test_peak_memory_is_the_kernels_high_water_mark():
    held = torch.ones(2**26)  # 0.25 GiB
    peak = peak_memory_gib(torch.device("cpu"))
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    assert peak == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)  # given in kB
    assert peak > held.nbytes / 2**30


def test_peak_memory_in_the_units_of_macos(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(resource, "getrusage", lambda _: resource.struct_rusage([0.0, 0.0, 2**31] + [0] * 13))
    assert peak_memory_gib(torch.device("cpu")) == 2.0


@pytest.mark.gpu
def test_peak_memory_of_a_gpu():
    device = torch.device("cuda")
    held = torch.empty(2**28, device=device)  # 1 GiB
    assert peak_memory_gib(device) >= held.nbytes / 2**30
