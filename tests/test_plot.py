"""Curves from metrics.jsonl: what a resumed, running or broken log becomes."""

import json
import math
import sys

import pytest

from notus import plot as plot_module
from notus.plot import epoch_ends, main, plot, read_metrics, series, smooth


def write(run_dir, *records, tail=""):
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return run_dir


def record(step, **more):
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
    values = {"grad_norm": 2.0 + step, "learning_rate": 1e-4 / step, "epoch": step / 10}
    return {"step": step} | values | {name: 1 / step for name in names} | more


def held_out(step):
    return {f"eval_{name}": value for name, value in record(step).items() if name != "step"} | {"step": step}


def test_a_resumed_log_counts_once_and_evaluations_join_their_step(tmp_path):
    write(tmp_path, {"step": 1, "loss": 1}, {"step": 2, "loss": 9}, {"step": 3, "loss": 9}, {"step": 2, "loss": 2},
          {"step": 2, "eval_loss": 5}, {"step": 3, "loss": None}, tail='{"step": 4, "lo')  # fmt: skip
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records == [{"step": 1, "loss": 1}, {"step": 2, "loss": 2, "eval_loss": 5}, {"step": 3, "loss": None}]
    steps, values = series(records, "loss")
    assert steps == [1, 2, 3] and values[:2] == [1, 2] and math.isnan(values[2])


def test_smoothing_keeps_lines_and_ignores_gaps():
    line = [0.5 * i for i in range(300)]
    assert smooth(line)[3:-3] == pytest.approx(line[3:-3])  # a centred mean moves no straight line
    gap = [1.0] * 300
    gap[150] = math.nan
    assert smooth(gap) == [1.0] * 300
    assert smooth([3.0, 1.0]) == [3.0, 1.0]  # a short run is shown as it is


def test_epoch_ends():
    assert epoch_ends([{"step": k, "epoch": k / 963} for k in range(10, 2890, 10)]) == [970, 1930]
    assert epoch_ends([{"step": 1, "loss": 0.7}]) == []


@pytest.mark.parametrize(
    "records",
    [
        [record(k) for k in range(1, 31)] + [held_out(k) for k in (10, 20, 30)],
        [record(1)],
        [{"step": 1, "loss": None}],
    ],
    ids=["run", "one step", "nothing finite"],
)
def test_draws_a_picture(tmp_path, records):
    pytest.importorskip("matplotlib")
    path = plot(write(tmp_path, *records))
    assert path == tmp_path / "curves.png" and path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("settings", "level", "reward"),
    [
        (None, "0.6931: policy = reference", "beta * log(policy / reference) (nats)"),
        ({"dpo.beta": 0.2}, "0.6931: policy = reference", "beta * log(policy / reference) (nats)"),  # a run of 0.2.0
        ({"dpo.loss": "ipo", "dpo.beta": 0.5}, "1: policy = reference", "beta * log(policy / reference) (nats)"),
        ({"dpo.loss": "simpo", "dpo.beta": 2.0}, None, "beta * log(policy) / tokens (nats)"),
        ({"dpo.nll_weight": 1.0}, None, "beta * log(policy / reference) (nats)"),
    ],
)
def test_the_known_value_of_the_loss_is_drawn(tmp_path, settings, level, reward):
    pytest.importorskip("matplotlib")
    write(tmp_path, record(1), record(2))
    if settings:
        (tmp_path / "environment.json").write_text(json.dumps({"settings": settings}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(plot_module.STYLE, "svg.fonttype", "none")  # text stays text
        text = plot(tmp_path, tmp_path / "c.svg").read_text()
    assert f">{reward}<" in text and (f">{level}<" in text if level else "0.6931" not in text)


def test_title_reports_the_last_evaluation(tmp_path):
    run = tmp_path / "demo"
    run.mkdir()
    write(run, record(20, epoch=2.0), held_out(10), held_out(20) | {"eval_loss": 0.45})
    expected = "demo:  20 steps  ·  2 epochs  ·  held out: loss 0.4500, accuracy 5.0%, margin 0.05"
    assert plot_module.title(run, read_metrics(run / "metrics.jsonl")) == expected


@pytest.mark.parametrize("text", ["[1]\n", "{\n", '{"loss": 1}\n', '"step"\n'])
def test_a_broken_line_is_named(tmp_path, text):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a JSON object"):
        read_metrics(path)


def test_errors_of_the_command(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path)]) == 2
    assert "metrics.jsonl: no such file" in capsys.readouterr().err
    assert main([str(write(tmp_path))]) == 2
    assert "no step has been logged yet" in capsys.readouterr().err
    write(tmp_path, record(1))
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    assert main([str(tmp_path)]) == 2
    assert "pip install -e '.[plots]'" in capsys.readouterr().err


def test_the_command_writes_where_it_is_told(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main([str(write(tmp_path, record(1), record(2))), "--output", str(tmp_path / "c.svg")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "c.svg")
    assert "<svg" in (tmp_path / "c.svg").read_text()
