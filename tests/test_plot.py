"""Curves from metrics.jsonl: what a resumed, running or broken log becomes."""

import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from notus import plot as plot_module
from notus.plot import (
    COLORS,
    MARKERS,
    draw,
    epoch_ends,
    labels,
    main,
    plot,
    read_metrics,
    readable_decades,
    series,
    smooth,
)


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
    write(run, record(20, epoch=0.9999))
    assert plot_module.title(run, read_metrics(run / "metrics.jsonl")) == "demo:  20 steps  ·  1 epoch"


def test_the_accuracy_begins_where_not_all_pairs_tie():
    """Not before it, and not later either: a step whose pairs are all wrong has a margin."""
    tie, wrong = ({"rewards/accuracies": 0.0, "rewards/margins": margin} for margin in (0.0, -0.3))
    found = series([{"step": k} | each for k, each in enumerate((tie, tie, wrong, tie, wrong))], "rewards/accuracies")
    assert found == ([2, 3, 4], [0, 0, 0])
    held_out = [{"step": 0, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": None}]
    assert series(held_out, "eval_rewards/accuracies") == ([], [])
    assert series([{"step": 0} | tie], "rewards/margins") == ([0], [0])


@pytest.mark.parametrize("top", [1.05, 1.6, 3.3, 12, 200, 5000, 1e9])
def test_ticks_of_the_gradient_norm_are_few_and_round(top: float):
    figure = pytest.importorskip("matplotlib.figure").Figure(figsize=(3.35, 2.75))
    axes = figure.subplots()
    axes.plot([0, 1], [0.7, 0.7 * top])
    readable_decades(axes)
    figure.canvas.draw()
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticklabels() if low <= tick.get_position()[1] <= high]
    assert 2 <= len(shown) <= 8 and not axes.get_yticklabels(minor=True)
    for tick in shown:
        assert float(tick.get_text()) == pytest.approx(tick.get_position()[1], rel=1e-5) and len(tick.get_text()) <= 6
    places = [tick.get_window_extent() for tick in shown]
    assert all(below.y1 <= above.y0 for below, above in pairwise(places))


# --- several runs --------------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path) -> list[Path]:
    """Runs whose environment.json says what differs, and what of it decides their numbers."""
    runs = []
    for name, beta, device in (("x/a/dpo", 0.1, "cpu"), ("x/b/dpo", 0.5, "cpu"), ("x/c/dpo", 0.1, "cuda")):
        (run := tmp_path / name).mkdir(parents=True)
        write(run, record(1), record(20), held_out(20), tail='{"step": 21, "lo')
        settings = {"dpo.beta": beta, "train.seed": 1, "train.output_dir": name, "train.device": device}
        identity = {"dpo.beta": beta, "train.seed": 1, "sha256 of the weights": name}
        (run / "environment.json").write_text(json.dumps({"settings": settings, "identity": identity}))
        runs.append(run)
    return runs


def test_runs_are_told_apart_by_path_and_settings(three):
    assert labels(three) == ["a: beta 0.1", "b: beta 0.5", "c: beta 0.1"]
    assert labels(three[::2]) == ["a", "c"]
    (three[0] / "environment.json").unlink()  # a run of an early version
    assert labels(three[::2]) == ["a", "c"]
    assert labels([three[0], three[0].parent]) == ["a/dpo", "a"]


def test_runs_over_one_another_have_a_colour_and_a_marker_each(three, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(plot_module, "draw", lambda axes, *what: drawn.append(axes) or draw(axes, *what))
    assert main([*map(str, three), "--panels", "loss", "rewards"]) == 0
    assert capsys.readouterr().out == "curves.png\n" and (tmp_path / "curves.png").stat().st_size > 10_000
    loss, rewards = drawn
    lines = [line for line in loss.get_lines() if len(line.get_xdata()) == 2 and line.get_marker() == "None"][:3]
    points = [line for line in loss.get_lines() if line.get_marker() != "None"]
    assert [line.get_color() for line in lines] == [line.get_color() for line in points] == [*COLORS[:3]]
    assert [line.get_marker() for line in points] == [*MARKERS[:3]]
    assert {line.get_linestyle() for line in rewards.get_lines() if line.get_color() == COLORS[2]} == {"-", "--"}
    assert main([str(three[0])] * 8) == 2 and "8 runs: a picture has colours for 7" in capsys.readouterr().err
    (three[1] / "metrics.jsonl").unlink()
    assert main([*map(str, three)]) == 2 and f"{three[1] / 'metrics.jsonl'}: no such file" in capsys.readouterr().err


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
