"""Curves of runs: `python -m notus.plot RUN_DIR [RUN_DIR ...]` draws the metrics.jsonl of each, over one another.

    loss          rewards chosen, rejected    accuracy
    margin        gradient norm               learning rate

Training is a running mean, over a faint line if there is one run. Held-out pairs are ringed points, and dotted
verticals mark the ends of epochs. The picture is RUN_DIR/curves.png, or curves.png in the current folder for several
runs. Each panel is as wide as a column of a paper, and --panels picks some. It needs matplotlib.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from itertools import dropwhile
from pathlib import Path
from typing import Any, NamedTuple

from notus.losses import PreferenceLoss
from notus.run import loss_of, read_quietly

# Okabe & Ito's, safe for the colour-blind. Their yellow is left out, because nobody can see it on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^DvPX"
GREY = "#5F6B76"
STYLE: Any = {  # matplotlib types its 300 names one by one
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "grid.color": "#E6E9EC",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}


class Panel(NamedTuple):
    title: str
    ylabel: str
    metrics: tuple[str, ...]


PANELS = {
    "loss": Panel("Loss", "nats per pair", ("loss",)),
    "rewards": Panel("Implicit rewards", "{reward} (nats)", ("rewards/chosen", "rewards/rejected")),
    "accuracy": Panel("Accuracy", "pairs ranked as labelled (%)", ("rewards/accuracies",)),
    "margin": Panel("Margin", "reward of chosen - rejected (nats)", ("rewards/margins",)),
    "norm": Panel("Gradient norm", "L2 of all weights, before clipping", ("grad_norm",)),
    "rate": Panel("Learning rate", "", ("learning_rate",)),
}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One record for each step, ascending. If several lines have the same step, the last value counts, as after a
    resumed run. ValueError names file and line of what is not a record. A last line without its newline is still being
    written, and is left out."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; is {path.parent} the output_dir of a run?")
    steps: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            steps.setdefault(int(record["step"]), {}).update(record)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f'{path}:{number}: not a JSON object with a "step": {line.strip()[:80]!r}') from error
    if not steps:
        raise ValueError(f"{path}: no step has been logged yet")
    return [steps[step] for step in sorted(steps)]


def series(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of `name` where it was logged. null becomes NaN, which is a gap in the line.

    An accuracy begins where not all pairs tie. Before, the policy is the reference, and a tie counts as wrong: the
    curve would begin at 0 %, which says nothing of the model."""
    logged = [r for r in records if name in r]
    if name.endswith("rewards/accuracies"):
        margin = name.replace("accuracies", "margins")
        logged = [*dropwhile(lambda r: r[name] == 0 and abs(r.get(margin) or 0) < 1e-6, logged)]
    return [r["step"] for r in logged], [math.nan if r[name] is None else r[name] for r in logged]


def smooth(values: list[float]) -> list[float]:
    """Mean over a centred window of 1/50 of the run, shorter at the ends. NaN is left out."""
    half = len(values) // 100
    means = []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        means.append(sum(window) / len(window) if window else math.nan)
    return means


def epoch_ends(records: list[dict[str, Any]]) -> list[int]:
    """The first step logged at or after the end of each epoch, except the end of the run."""
    steps, epochs = series(records, "epoch")
    whole = range(1, math.ceil(max(epochs, default=0)))
    return [next(step for step, epoch in zip(steps, epochs, strict=True) if epoch >= n) for n in whole]


def labels(run_dirs: Sequence[Path]) -> list[str]:
    """What tells runs apart: the parts of their paths that differ, and the settings that differ, of those that decide a
    run's numbers."""
    paths = [list(path.resolve().parts) for path in run_dirs]
    for end in (0, -1):
        while len({path[end] for path in paths}) == 1 and min(map(len, paths)) > 1:
            for path in paths:
                path.pop(end)
    facts = [read_quietly(path / "environment.json") for path in run_dirs]
    settings = [{name: each["settings"][name] for name in each["identity"] if name in each["settings"]}
                if "identity" in each else {} for each in facts]  # fmt: skip
    names = [name for name in settings[0] if any(each.get(name) != settings[0][name] for each in settings)]
    said = [", ".join(f"{n.partition('.')[2]} {each[n]}" for n in names if n in each) for each in settings]
    return [": ".join(filter(None, ["/".join(path), text])) for path, text in zip(paths, said, strict=True)]


def levels(name: str, losses: Sequence[PreferenceLoss]) -> dict[float, str]:
    """Values with a meaning, of a panel, and what they mean."""
    referenced = all(loss.member.reference for loss in losses)
    known: dict[str, dict[float, str]] = {
        "loss": {loss.start: f"{loss.start:.4g}: policy = reference" for loss in losses if loss.start is not None},
        "rewards": {0: "policy = reference"} if referenced else {},
        "accuracy": {0.5: "chance"},
        "margin": {0: "policy = reference" if referenced else "chance"},
    }
    return known.get(name, {})


class Run(NamedTuple):
    """What is drawn of a run, and how."""

    records: list[dict[str, Any]]
    loss: PreferenceLoss
    color: str
    marker: str


def curve(axes: Any, run: Run, metric: str, color: str, line: str, alone: bool) -> Any:
    """Training, whose mean is returned, and held-out pairs. alone: there is no other run in the picture."""
    steps, values = series(run.records, metric)
    if alone:
        axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.7)
    values = values if metric == "learning_rate" else smooth(values)
    (mean,) = axes.plot(steps, values, line, color=color, linewidth=1.6)
    if (held_out := series(run.records, f"eval_{metric}"))[0]:
        axes.plot(*held_out, line, marker=run.marker, color=color, linewidth=0.8, ms=4.5, markerfacecolor="white")
    return mean


def draw(axes: Any, name: str, runs: Sequence[Run]) -> None:
    """A panel."""
    panel, alone = PANELS[name], len(runs) == 1
    reward = {run.loss.reward("policy", "reference") for run in runs}
    axes.set_title(panel.title)
    axes.set_ylabel(panel.ylabel.format(reward=reward.pop() if len(reward) == 1 else "reward"))
    means = []
    for run in runs:
        for place, metric in enumerate(panel.metrics):
            color, line = (COLORS[place], "-") if alone else (run.color, ("-", "--")[place])
            means.append(curve(axes, run, metric, color, line, alone))
    for value, text in levels(name, [run.loss for run in runs]).items():
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            text, (1, value), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
            color=GREY, fontsize="small",
        )  # fmt: skip
    if name == "rewards":
        axes.legend(means[:2], ("chosen", "rejected"), loc="lower left")
    elif name == "accuracy":
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}")
    elif name == "rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    elif name == "norm":
        readable_decades(axes)
    if len(ends := {tuple(epoch_ends(run.records)) for run in runs}) == 1:
        for step in ends.pop():
            axes.axvline(step, color=GREY, linestyle=":", linewidth=0.9, zorder=0)


def readable_decades(axes: Any) -> None:
    """A logarithmic axis, with labels at round numbers within a decade, at 1, 2, 5, 10 over two, else at 1, 10, 100."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    locator = MaxNLocator(5) if decades < 1 else LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,))
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def plot(
    run_dirs: str | Path | Sequence[str | Path], output: str | Path | None = None, panels: Sequence[str] = tuple(PANELS)
) -> Path:
    """Draw the curves of one run or several, and return the path of the picture. Its suffix picks the format (.png,
    .svg, .pdf). panels: names of PANELS. ValueError for more than 7 runs, or a run without a log."""
    paths = [Path(run_dirs)] if isinstance(run_dirs, str | Path) else [Path(each) for each in run_dirs]
    if len(paths) > len(COLORS):
        raise ValueError(f"{len(paths)} runs: a picture has colours for {len(COLORS)} at most")
    logs = [read_metrics(path / "metrics.jsonl") for path in paths]
    losses = [loss_of(read_quietly(path / "environment.json").get("settings", {})) for path in paths]
    runs = [Run(*each) for each in zip(logs, losses, COLORS, MARKERS, strict=False)]
    output = Path(output or (paths[0] / "curves.png" if len(paths) == 1 else "curves.png"))
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install -e '.[plots]'") from error

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.35 * columns, 2.75 * rows + 0.3), layout="constrained")
        grid = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
        for number, (axes, name) in enumerate(zip(grid, panels, strict=False)):
            draw(axes, name, runs)
            if number + columns >= len(panels):
                axes.set(xlabel="step")
                axes.tick_params(labelbottom=True)
        for axes in grid[len(panels) :]:
            axes.remove()
        handles = [Line2D([], [], color=run.color, marker=run.marker, mfc="white") for run in runs]
        if len(runs) > 1:
            figure.legend(handles, labels(paths), loc="outside upper left", ncols=min(2, columns))
        else:
            said = {"train, running mean": Line2D([], [], color=COLORS[0], linewidth=1.6)}
            said |= {"held out": handles[0]} if any("eval_loss" in record for record in logs[0]) else {}
            figure.legend(said.values(), said.keys(), loc="outside upper right", ncols=2)
            if columns == 3:
                figure.suptitle(title(paths[0], logs[0]), x=0.008, ha="left", fontsize=11)
        figure.savefig(output, dpi=150)
    return output


def title(run_dir: Path, records: list[dict[str, Any]]) -> str:
    facts = [f"{run_dir.resolve().name}:  {records[-1]['step']:,} steps"]
    if epochs := series(records, "epoch")[1]:
        facts.append(f"{epochs[-1]:.3g} epochs" if f"{epochs[-1]:.3g}" != "1" else "1 epoch")
    last = {name: series(records, f"eval_{name}")[1][-1:] for name in ("loss", "rewards/accuracies", "rewards/margins")}
    if all(last.values()):
        loss, accuracy, margin = (values[0] for values in last.values())
        facts.append(f"held out: loss {loss:.4f}, accuracy {accuracy:.1%}, margin {margin:.2f}")
    return "  ·  ".join(facts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m notus.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN_DIR", help="output_dir of a run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the picture; .png, .svg or .pdf")
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=[*PANELS], metavar="P", help=", ".join(PANELS))
    arguments = parser.parse_args(argv)
    try:
        print(plot(arguments.run_dirs, arguments.output, arguments.panels))
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
