"""Curves of a run: `python -m notus.plot RUN_DIR` reads RUN_DIR/metrics.jsonl and draws RUN_DIR/curves.png.

    loss          rewards chosen, rejected    accuracy
    margin        gradient norm               learning rate

Training is a faint line with its running mean over it. Held-out pairs are ringed points, and dotted verticals mark the
ends of epochs. It needs matplotlib.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from notus.run import loss_of, read_quietly

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#5F6B76"  # Okabe & Ito's blue and vermilion, safe for the colour-blind
STYLE: Any = {  # matplotlib types its 300 names one by one
    "font.size": 9.5,
    "axes.titlesize": 11,
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
    """Steps and values of `name` where it was logged. null becomes NaN, which is a gap in the line."""
    points = [(r["step"], math.nan if r[name] is None else r[name]) for r in records if name in r]
    return [step for step, _ in points], [value for _, value in points]


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


def plot(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Draw the curves, and return the path of the picture. Its suffix picks the format (.png, .svg, .pdf)."""
    records = read_metrics(Path(run_dir) / "metrics.jsonl")
    preference_loss = loss_of(read_quietly(Path(run_dir) / "environment.json").get("settings", {}))
    output = Path(output or Path(run_dir) / "curves.png")
    try:
        from matplotlib import rc_context
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install -e '.[plots]'") from error

    def curve(axes: Axes, name: str, color: str = BLUE) -> Line2D:
        axes.plot(*series(records, name), color=color, alpha=0.22, linewidth=0.7)
        steps, values = series(records, name)
        (mean,) = axes.plot(steps, smooth(values), color=color, linewidth=1.8, label="train, running mean")
        if (held_out := series(records, f"eval_{name}"))[0]:
            axes.plot(*held_out, "-o", color=color, linewidth=0.8, ms=4.5, markerfacecolor="white", label="held out")
        return mean

    def level(axes: Axes, value: float, text: str) -> None:
        axes.axhline(value, color=GREY, linestyle="--", linewidth=1)
        axes.annotate(
            text, (1, value), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
            color=GREY, fontsize="small",
        )  # fmt: skip

    with rc_context(STYLE):
        figure = Figure(figsize=(13, 7.4), layout="constrained")
        (loss, rewards, accuracy), (margin, norm, rate) = panels = figure.subplots(2, 3, sharex=True)

        loss.set(title="Loss", ylabel="nats per pair")
        curve(loss, "loss")
        if preference_loss.start is not None:
            level(loss, preference_loss.start, f"{preference_loss.start:.4g}: policy = reference")

        rewards.set(title="Implicit rewards", ylabel=f"{preference_loss.reward('policy', 'reference')} (nats)")
        lines = curve(rewards, "rewards/chosen", BLUE), curve(rewards, "rewards/rejected", ORANGE)
        rewards.legend(lines, ("chosen", "rejected"), loc="lower left")
        if preference_loss.member.reference:
            level(rewards, 0, "policy = reference")

        accuracy.set(title="Accuracy", ylabel="pairs ranked as labelled (%)")
        curve(accuracy, "rewards/accuracies")
        level(accuracy, 0.5, "chance")
        accuracy.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f}")

        margin.set(title="Margin", ylabel="reward of chosen - rejected (nats)", xlabel="step")
        curve(margin, "rewards/margins")
        level(margin, 0, "policy = reference" if preference_loss.member.reference else "chance")

        norm.set(title="Gradient norm", ylabel="L2 over all weights, before clipping", xlabel="step", yscale="log")
        curve(norm, "grad_norm")
        norm.yaxis.set_major_formatter(LogFormatter())
        norm.yaxis.set_minor_formatter(LogFormatter())

        rate.set(title="Learning rate", xlabel="step")
        rate.plot(*series(records, "learning_rate"), color=BLUE, linewidth=1.8)
        rate.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}" if value else "0")

        for axes in panels.flat:
            for step in epoch_ends(records):
                axes.axvline(step, color=GREY, linestyle=":", linewidth=0.9, zorder=0)
        figure.suptitle(title(Path(run_dir), records), x=0.008, ha="left", fontsize=12.5)
        figure.legend(*loss.get_legend_handles_labels(), loc="upper right", ncols=2)
        figure.savefig(output, dpi=150)
    return output


def title(run_dir: Path, records: list[dict[str, Any]]) -> str:
    facts = [f"{run_dir.resolve().name}:  {records[-1]['step']:,} steps"]
    if epochs := series(records, "epoch")[1]:
        facts.append(f"{epochs[-1]:.3g} epoch{'s' * (epochs[-1] != 1)}")
    last = {name: series(records, f"eval_{name}")[1][-1:] for name in ("loss", "rewards/accuracies", "rewards/margins")}
    if all(last.values()):
        loss, accuracy, margin = (values[0] for values in last.values())
        facts.append(f"held out: loss {loss:.4f}, accuracy {accuracy:.1%}, margin {margin:.2f}")
    return "  ·  ".join(facts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m notus.plot", description="Draw the curves of a run.")
    parser.add_argument("run_dir", type=Path, help="output_dir of the run; metrics.jsonl is read from it")
    parser.add_argument("--output", type=Path, help="the picture (default: RUN_DIR/curves.png)")
    arguments = parser.parse_args(argv)
    try:
        print(plot(arguments.run_dir, arguments.output))
    except (ValueError, ImportError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
