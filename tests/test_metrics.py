"""metrics.jsonl is strict JSON that survives a kill; the console says one thing at a time and cannot end a run."""

import errno
import io
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from notus import metrics
from notus.distributed import World
from notus.losses import METRICS
from notus.metrics import (
    FORMATS,
    SPARED,
    Console,
    Lasting,
    Log,
    duration,
    lasting_console,
    one_line,
    peak_memory_gib,
    short_line,
)  # fmt: skip

TIMINGS = {"tokens_per_second", "memory_gib"}


class Clock:
    """time.monotonic, of which a test says how it goes."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=clock))
    return clock


def log_of(folder: Path, rank: int = 0, size: int = 1, device: str = "cpu", **state) -> Log:
    """Of a run of 10 steps, 4 an epoch."""
    return Log(folder, World(rank, size, torch.device(device), None), 10, 4, **state)


def strictly(path: Path) -> list[dict]:
    def refuse(constant):
        raise ValueError(constant)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- metrics.jsonl -------------------------------------------------------------------------------------------------


def test_a_line_is_strict_json_and_readable_at_once(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    log = log_of(tmp_path)
    with log.between_steps():
        log.write(1, {"loss": torch.tensor(0.5), "grad_norm": float("nan"), "rewards/margins": torch.tensor(torch.inf)})
        log.write(1, {"eval_loss": 0.25})
    line = {"step": 1, "epoch": 0.25, "loss": 0.5, "grad_norm": None, "rewards/margins": None, "eval_loss": 0.25}
    assert strictly(path) == log.lines == [line]
    log.close()


def test_a_line_of_a_step_has_means_over_the_pairs_since_the_last_one(tmp_path: Path, clock: Clock, capsys):
    path = tmp_path / "metrics.jsonl"
    log = log_of(tmp_path)
    names = [*METRICS]
    log.add([8.0 * k for k in range(7)], num_pairs=8, num_tokens=500, flops=1.0)
    log.add([2.0 * k + 4 for k in range(7)], num_pairs=2, num_tokens=100, flops=1.0)
    clock.now += 4.0
    log.step(2, {"grad_norm": 3.0, "learning_rate": 1e-5})
    log.add([float(k) for k in range(7)], num_pairs=1, num_tokens=30, flops=1.0)
    clock.now += 0.5
    log.step(3, {"grad_norm": math.nan, "learning_rate": 0.0})
    log.close()
    first, second = strictly(path)
    assert first["step"] == 2 and first["epoch"] == 0.5 and second["epoch"] == 0.75
    assert [first[name] for name in names] == pytest.approx([k + 0.4 for k in range(7)])
    assert [second[name] for name in names] == pytest.approx([float(k) for k in range(7)])
    assert (first["tokens_per_second"], second["tokens_per_second"]) == (150.0, 60.0)
    assert (first["grad_norm"], first["learning_rate"], second["grad_norm"]) == (3.0, 1e-5, None)
    assert first["memory_gib"] > 0 and "mfu" not in first  # no peak is known of a CPU
    assert (
        capsys.readouterr().err.splitlines()[0].startswith("step  2/10  loss 0.4000  acc 3.40  margin 4.40  grad 3.0")
    )


def test_mfu_is_useful_flops_over_the_peak_of_all_gpus(tmp_path: Path, clock: Clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 3 * 2**30)
    log = log_of(tmp_path, size=8, device="cuda")
    log.add([0.0] * 7, 64, 100, flops=8 * 312e12)
    clock.now += 2.0
    log.step(1, {})
    log.close()
    assert log.lines[0]["mfu"] == pytest.approx(0.5) and log.lines[0]["memory_gib"] == 3.0


def test_what_is_between_steps_is_no_time_of_a_step(tmp_path: Path, clock: Clock):
    log = log_of(tmp_path)
    log.add([0.0] * 7, 1, 100, 0.0)
    clock.now += 1.0
    with log.between_steps():
        clock.now += 1000.0
    clock.now += 1.0
    log.step(1, {})
    log.close()
    assert log.lines[0]["tokens_per_second"] == 50.0


def test_evaluations_and_skipped_steps_are_lines_and_are_said(tmp_path: Path, capsys):
    path = tmp_path / "metrics.jsonl"
    log = log_of(tmp_path)
    found = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.5, "eval_runtime": 2.0}
    found["eval_rewards/chosen"] = 0.5
    log.evaluated(0, found)
    log.skipped(1, ["pairs.jsonl:3", "pairs.jsonl:9"])
    log.evaluated(2, found | {"eval_loss": math.nan})
    log.close()
    first, skipped, last = strictly(path)
    assert first == {"step": 0, "epoch": 0.0} | found
    assert skipped == {"step": 1, "epoch": 0.25, "skipped_pairs": ["pairs.jsonl:3", "pairs.jsonl:9"]}
    assert last["eval_loss"] is None
    assert log.evaluations() == [found, found | {"eval_loss": None}]
    assert capsys.readouterr().err.splitlines() == [
        "held out    step 0  loss 0.5000  acc 0.750  margin 1.500",
        "skipped     step 1: loss or gradient is not finite; its pairs are in metrics.jsonl",
        "held out    step 2  loss nan  acc 0.750  margin 1.500",
    ]


def test_a_resumed_log_reads_as_if_nothing_had_happened(tmp_path: Path, clock: Clock):
    """Lines and window are those of the checkpoint. What the file had beyond, or a torn line, is gone."""

    def steps(log: Log, numbers: range) -> None:
        for step in numbers:
            log.add([0.1 * step + k for k in range(7)], step, 10 * step, 0.0)
            clock.now += 1.0
            if step % 4 == 0:  # log_steps = 4
                log.step(step, {"grad_norm": float(step)})

    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole, cut = tmp_path / "whole" / "metrics.jsonl", tmp_path / "cut" / "metrics.jsonl"
    uninterrupted = log_of(whole.parent)
    steps(uninterrupted, range(1, 9))
    uninterrupted.close()

    log = log_of(cut.parent)
    steps(log, range(1, 7))  # the checkpoint is in the middle of a window
    state = json.loads(json.dumps(log.state(), allow_nan=False))
    steps(log, range(7, 8))
    log.write(7, {"loss": 0.5})
    log.close()
    with cut.open("a") as file:
        file.write('{"step": 8, "lo')  # killed here
    resumed = log_of(cut.parent, first_step=6, **state)
    assert strictly(cut) == state["lines"] and [line["step"] for line in state["lines"]] == [4]
    steps(resumed, range(7, 9))
    resumed.close()
    assert [strip(line) for line in strictly(cut)] == [strip(line) for line in strictly(whole)]
    assert resumed.state()["window"] == uninterrupted.state()["window"] == [0.0] * 8
    # The speed is this process's own: steps 7 and 8 in two seconds, though the means are of steps 5 to 8.
    assert resumed.lines[-1]["tokens_per_second"] == 75.0

    log_of(cut.parent).close()  # a run that starts again
    assert cut.read_text() == ""


def strip(line: dict) -> dict:
    return {name: value for name, value in line.items() if name not in TIMINGS}


def test_a_full_disk_costs_no_line_and_no_run(tmp_path: Path, monkeypatch, capsys):
    path = tmp_path / "metrics.jsonl"
    log = log_of(tmp_path)
    with log.between_steps():
        log.write(1, {"loss": 0.5})
    lines = log._files[0]
    lines._file = FullFile(lines._file)
    monkeypatch.setattr(metrics, "write_atomically", full)
    for step in (2, 3):
        with log.between_steps():
            log.write(step, {"loss": 0.5})
    assert capsys.readouterr().err.count(f"{path} cannot be written, training continues: No space left on device") == 1
    log.close()  # still full

    monkeypatch.undo()
    with log.between_steps():
        log.write(4, {"loss": 0.5})
    assert strictly(path) == log.lines and [line["step"] for line in log.lines] == [1, 2, 3, 4]
    lines._file = FullFile(lines._file)
    log.write(5, {"loss": 0.5})
    log.close()  # there is room again
    assert [line["step"] for line in strictly(path)] == [1, 2, 3, 4, 5]


def full(*_) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullFile:
    """On a disk that has room for half of a line more."""

    def __init__(self, file):
        self.file = file

    def write(self, text: str) -> None:
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        full()


def test_other_ranks_count_but_write_and_say_nothing(tmp_path: Path, capsys):
    logs = [log_of(tmp_path, rank=rank, size=2) for rank in (0, 1)]
    capsys.readouterr()
    logs[0].close()
    log = logs[1]
    log.add([1.0] * 7, 2, 10, 0.0)
    log.step(1, {})
    rewards = {"eval_rewards/accuracies": 0.5, "eval_rewards/chosen": 0.0, "eval_rewards/margins": 0.0}
    log.evaluated(1, {"eval_loss": 0.5} | rewards)
    log.skipped(2, ["pairs.jsonl:1"])
    log.add([1.0] * 7, 2, 10, 0.0)
    log.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")
    assert len(log.lines) == 2 and log.evaluations()[0]["eval_loss"] == 0.5  # as on rank 0
    assert log.state()["window"] == [1.0] * 7 + [2.0]


# --- samples.jsonl -------------------------------------------------------------------------------------------------


def test_samples_stand_beside_those_of_step_0_and_survive_a_kill(tmp_path: Path, capsys):
    path = tmp_path / "samples.jsonl"
    log = log_of(tmp_path)
    assert not path.exists()  # as long as there are none
    log.sampled(0, [{"prompt": f"a\n{'p' * 80}", "answer": "old"}], 0.5)
    log.sampled(4, [{"prompt": f"a\n{'p' * 80}", "answer": "new\n" * 30}, {"prompt": "b", "answer": "c"}], 0.25)
    log.sampled(8, [], 0.0)
    state = json.loads(json.dumps(log.state()))
    log.close()
    first, second, other = strictly(path)
    assert first == {"step": 0, "prompt": f"a\n{'p' * 80}", "before": None, "answer": "old"}
    assert (second["step"], second["before"], second["answer"]) == (4, "old", "new\n" * 30)
    assert other == {"step": 4, "prompt": "b", "before": None, "answer": "c"}
    assert [line["sample_seconds"] for line in strictly(tmp_path / "metrics.jsonl")] == [0.5, 0.25]
    said = capsys.readouterr().err.splitlines()
    assert said[2:5] == [
        f"sample      prompt  ...{'p' * 65}", "            before  old", f"            now     {'new ' * 16}n...",
    ]  # fmt: skip
    assert max(map(len, said)) <= 88

    before = path.read_text()
    path.write_text("torn")
    log_of(tmp_path, **state).close()
    assert path.read_text() == before


def test_a_falling_reward_of_the_chosen_answers_is_said_to_be_usual_once(tmp_path: Path, capsys):
    log = log_of(tmp_path)
    rewards = [(0.0, 0.0), (0.1, 0.2), (-0.2, 0.3), (-0.5, 0.4), (-0.6, 0.3), (-0.7, 0.9)]
    said = []
    for step, (chosen, margin) in enumerate(rewards):
        line = {"eval_loss": 0.5, "eval_rewards/accuracies": 0.5}
        log.evaluated(step, line | {"eval_rewards/chosen": chosen, "eval_rewards/margins": margin})
        said.append("usual" in capsys.readouterr().err)
    assert said == [False, False, True, False, False, False]
    anchor = "Why does the reward of the chosen answers fall?"
    assert f"**{anchor}**" in (Path(__file__).parent.parent / "README.md").read_text()


def test_one_line():
    assert one_line(" a\n\n b ") == one_line(" a\n\n b ", 3) == "a b"
    assert one_line("x" * 81, 80) == "x" * 77 + "..."


# --- the console ---------------------------------------------------------------------------------------------------


def test_a_console_that_is_not_enabled_is_silent():
    for stream in (io.StringIO(), Terminal()):
        with Console(10, enabled=False, stream=stream) as console:
            console.step(1, {"loss": 0.5})
            console.say("hello")
        assert not stream.getvalue()


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


def test_plain_lines(clock: Clock):
    """Time left counts from the first report: 100 steps took 100 s, so 2,689 left take 44m49s."""
    stream = io.StringIO()
    console = Console(2889, first_step=99, stream=stream)
    console.say("resumed")
    console.step(100, {"loss": 0.693147})
    clock.now += 100.0
    console.step(200, FULL)
    console.close()
    assert stream.getvalue().splitlines() == [
        "resumed",
        "step  100/2889  loss 0.6931",
        "step  200/2889  loss 0.6123  acc 0.67  margin 0.21  18,234 tok/s  eta 44m49s",
    ]


@pytest.mark.parametrize("room", range(4, 110, 7))
def test_a_line_has_room_for_the_time_left_before_all_else(room: int):
    line = short_line(FULL, 3600.0, room)
    assert line.endswith("eta 1h00m") and len(line) <= max(room, 9)
    left_out = [name for name in SPARED if FORMATS[name].format(FULL[name]) not in line]
    assert tuple(left_out) == SPARED[: len(left_out)]
    assert ("loss" in line) == (room >= len("loss 0.6123  eta 1h00m"))


def test_plain_lines_are_a_share_of_the_steps_apart_and_the_last_one_comes():
    stream = io.StringIO()
    console = Console(250, stream=stream, unit="pair", every=0.1)
    for step in range(7, 251, 9):
        console.step(step, {})
    numbers = [int(line.split()[1].partition("/")[0]) for line in stream.getvalue().splitlines()]
    assert numbers == [25, 52, 79, 106, 133, 160, 187, 214, 241, 250]
    assert stream.getvalue().startswith("pair  25/250  ")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    console = Console(10, first_step=4, stream=stream)
    assert not stream.getvalue()  # a cache hit has nothing to show
    console.step(5, FULL)
    console.say("saved")
    console.step(10, FULL)
    console.close()
    last = stream.getvalue().rstrip().rpartition("\r")[2]
    assert last == "step 10/10 |##########| loss 0.6123  acc 0.67  margin 0.21  eta 0s"
    assert "saved\n" in stream.getvalue()
    assert "\x1b[3" not in stream.getvalue()  # no colours


# --- a console that is gone ----------------------------------------------------------------------------------------


class Broken(io.StringIO):
    """A stream whose other end is closed: every write fails."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, _text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")])
def test_a_run_goes_on_when_its_console_is_gone(error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """OSError 5 is what a terminal gives whose window was closed."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Broken(error))
    with lasting_console():
        print("hello", flush=True)
        log = log_of(tmp_path)
        log.add([1.0] * 7, 1, 1, 0.0)
        log.step(1, {})
        log.skipped(2, [])
        log.close()
    assert len(strictly(tmp_path / "metrics.jsonl")) == 2
    with pytest.raises(OSError):
        sys.stdout.write("the streams themselves are back")


def test_a_bar_goes_on_when_its_terminal_is_gone(monkeypatch: pytest.MonkeyPatch):
    terminal = Broken(OSError(5, "Input/output error"))
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    with Console(10, stream=Lasting(terminal)) as console:
        console.step(5, FULL)
        assert console.bar is not None
        console.say("saved")
        console.step(10, FULL)


def test_what_works_passes_through():
    stream = io.StringIO()
    lasting = Lasting(stream)
    assert lasting.write("hello") == 5 and stream.getvalue() == "hello"
    assert not lasting.isatty() and lasting.encoding == stream.encoding


def test_a_pipe_whose_reader_has_gone_is_written_to_nowhere():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:  # closing it flushes, which would fail
        lasting = Lasting(stream)
        for number in range(100_000):  # more than its buffer holds
            print("line", number, file=lasting)


def test_head_changes_neither_exit_code_nor_work(tmp_path: Path):
    """`train.py | head -1`. The second line is still buffered when the reader has gone. Python would try it when it
    exits, report the failure, and end with code 120."""
    program = (
        "import sys; from notus.metrics import lasting_console\n"
        "with lasting_console():\n"
        "    print('first', flush=True); sys.stdin.read(); print('second')\n"
        f"open({str(tmp_path / 'done')!r}, 'w').close()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0 and (tmp_path / "done").exists()


# --- time and memory -----------------------------------------------------------------------------------------------


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
