"""Critique scores, released or repaired, or ratings: which label trains the better model, and from which noise on?

    python -m pip install -e '.[test]'
    python benchmarks/which_binarization.py          a quarter of an hour of one core; a killed one goes on
    python benchmarks/which_binarization.py --raw FILE     the same map, with a raw file of yours on it

The world is the demo's: questions with a checkable answer, answered by four models, so that every answer has a true
grade. Each of the four ratings of an answer, and its critique score, is that grade plus a rounded Gaussian error. Both
errors are swept. From the same records four sets of pairs are made, by the same rule (the best answer against a random
one of strictly lower value), and the same base is trained on each:

    released    overall_score with UltraFeedback's bug: a 1 became a 10
    repaired    overall_score after `binarize.py --repair`
    ratings     the mean of the four ratings
    truth       the grade itself

Labels are made of 9 x 9 noises, which is exact and cheap. Models are trained on 4 x 4 of them, for five seeds and twice
each, on disjoint thirds of the records. A seed has its own questions, answers, errors and base. Its runs share the base
and the reference log-probs, and equal sets of pairs are trained once. Every finished run is a line of runs.jsonl.

The map's axes are the share of truth in a label: its squared correlation with the grade within a record (0 is noise, 1
is the truth). audit.py estimates it of a raw file without knowing the grade. How well it does is printed too.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))  # where train.py and binarize.py are

import train
from audit import LABELS, Labels, labels_of, raw_entry
from binarize import Drop, Pick, Record, choose_all, parse_record, repair
from notus import demo, distributed
from notus.base import Base, Frame, load_model, read_base
from notus.cost import forward_flops
from notus.evaluate import score
from notus.files import write_atomically
from notus.generate import generate
from notus.losses import PreferenceLoss
from notus.optim import lr_at, make_optimizer
from notus.packing import training_steps
from notus.tokens import PairSet, load_pairs

ARMS = ("released", "repaired", "ratings", "truth")
SEEDS = range(5)
NOISE = np.linspace(0, 12, 9).tolist()  # standard deviations, in points: of a rating, of overall_score; labels only
TRAINED_NOISE = (1.5, 3.0, 6.0, 12.0)
THIRDS, REPEATS = 3, 2  # a seed's records are three disjoint parts; so many of them are trained on, each alone
SETTINGS = demo.Settings(
    records=1500, test_pairs=300, test_prompts=400, sft_questions=10000, hidden_size=96, num_layers=2
)
BETA, LEARNING_RATE, PAIRS_PER_STEP, BUDGET = 0.3, 5e-5, 16, 8192  # BUDGET: tokens of a micro-batch


# ---- the labels -----------------------------------------------------------------------------------------------------


class World(NamedTuple):
    """What a seed makes, but for the judges' errors."""

    seed: int
    rated: list[demo.Question]
    test: list[demo.Question]
    taught: list[demo.Question]


def world(seed: int) -> World:
    rng, known = Random(f"questions {seed}"), set[demo.Question]()
    counts = SETTINGS.records, SETTINGS.test_prompts, SETTINGS.sft_questions
    return World(seed, *(demo.ask(rng, count, known) for count in counts))


def judged(of: World, rating_noise: float, score_noise: float) -> list[Record]:
    """The rated questions' records. All noises share their random numbers, so a larger noise is the same one, grown."""

    return [parse_record(raw) for raw in raw_records(of, rating_noise, score_noise)]


def raw_records(of: World, rating_noise: float, score_noise: float) -> list[dict[str, Any]]:
    def error(sd: float) -> demo.Noise:
        return lambda rng: round(rng.gauss(0, sd))

    rng, errors = Random(f"ratings {of.seed}"), (error(rating_noise), error(score_noise))
    return [demo.record(rng, question, *errors) for question in of.rated]


def combine(ratings: Sequence[Record], scores: Sequence[Record]) -> list[Record]:
    """The ratings of one list and the overall_scores of another. `judged` of both noises makes the same, slower."""
    return [
        record._replace(completions=[
            completion._replace(overall_score=other.overall_score)
            for completion, other in zip(record.completions, scored.completions, strict=True)
        ])
        for record, scored in zip(ratings, scores, strict=True)
    ]  # fmt: skip


def grades(question: demo.Question, record: Record) -> list[int]:
    return [demo.grade(question, completion.response) for completion in record.completions]


def labelled(arm: str, of: World, records: Sequence[Record]) -> tuple[list[Record], str]:
    """The records as the arm sees them, and the rule that makes its pairs."""
    if arm == "truth":
        judge = [
            record._replace(completions=[
                completion._replace(rating=float(grade))
                for completion, grade in zip(record.completions, grades(question, record), strict=True)
            ])
            for question, record in zip(of.rated, records, strict=True)
        ]  # fmt: skip
        return judge, "ratings"
    if arm == "repaired":
        return [repair(record)[0] for record in records], "overall-score"
    return list(records), "ratings" if arm == "ratings" else "overall-score"


def pairs_of(arm: str, of: World, records: Sequence[Record]) -> tuple[list[tuple[demo.Question, Pick]], float, float]:
    """(pairs, share of them whose chosen answer truly is the better one, share of truth in the label)."""
    seen, by = labelled(arm, of, records)
    pairs, right = [], 0
    for question, record in zip(of.rated, seen, strict=True):
        pick = choose_all(record, by, of.seed, min_margin=1e-9)[0]
        if not isinstance(pick, Drop):
            pairs.append((question, pick))
            right += demo.grade(question, pick[0].response) > demo.grade(question, pick[1].response)
    return pairs, right / len(pairs), share_of_truth(of, seen, "rating" if by == "ratings" else "overall_score")


def share_of_truth(of: World, records: Sequence[Record], label: str) -> float:
    """The squared correlation of a label with the grade, both as deviations from their mean over the record."""
    deviations = []
    for question, record in zip(of.rated, records, strict=True):
        values = [getattr(completion, label) for completion in record.completions]
        table = np.array([values, grades(question, record)], dtype=float)  # (2, completions); a repair can empty it
        deviations += [table - table.mean(1, keepdims=True)] if values else []
    (xx, xy), (_, yy) = (d := np.concatenate(deviations, axis=1)) @ d.T
    return float(xy**2 / (xx * yy)) if xx else 0.0


def sweep_labels(of: World) -> Iterator[dict[str, Any]]:
    """A line for each arm and noise of the fine grid. A noise that an arm does not see is None."""
    by_ratings = {r: judged(of, r, 0) for r in NOISE}
    by_score = {s: judged(of, 0, s) for s in NOISE}
    for arm, rating_noise, score_noise in cells(NOISE):
        records = combine(by_ratings[rating_noise or 0.0], by_score[score_noise or 0.0])
        pairs, right, truth = pairs_of(arm, of, records)
        cell = {"seed": of.seed, "arm": arm, "rating_noise": rating_noise, "score_noise": score_noise}
        yield cell | {"pairs": len(pairs), "right": right, "share_of_truth": truth}


def cells(noises: Sequence[float]) -> Iterator[tuple[str, float | None, float | None]]:
    """(arm, rating noise, score noise) of every label there is. The repair reads both."""
    yield "truth", None, None
    yield from (("ratings", r, None) for r in noises)
    yield from (("released", None, s) for s in noises)
    yield from (("repaired", r, s) for r in noises for s in noises)


# ---- the training ---------------------------------------------------------------------------------------------------


def make_base(of: World, folder: Path) -> Base:
    """The seed's base, as in `python -m notus.demo`, but smaller. It is made once."""
    if not (folder / "base").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rng = Random(f"teachers {of.seed}")
        demo.make_base(folder, [(q, demo.answers(rng, q)) for q in of.taught], of.seed, SETTINGS)
    return read_base(folder / "base")


class Bench:
    """A seed's base with what its runs share: the reference log-probs, and the results by digest of the pairs."""

    def __init__(self, of: World, base: Base, alone: distributed.World):
        self.of, self.base, self.encoder, self.alone = of, base, base.encoder(Frame()), alone
        self.reference: dict[bytes, np.ndarray] = {}  # key of a pair -> (2,)
        truth, _, _ = pairs_of("truth", of._replace(rated=of.test), judged(of._replace(rated=of.test), 0, 0))
        self.test = self.tokens(truth)
        self.test_reference = self.score(self.load(), self.test)

    def tokens(self, pairs: Sequence[tuple[demo.Question, Pick]]) -> PairSet:
        rows = [
            {"prompt": question.instruction, "chosen": chosen.response, "rejected": rejected.response}
            for question, (chosen, rejected) in pairs
        ]
        return load_pairs(rows, self.encoder, max_length=256, max_prompt_length=128)

    def load(self) -> Any:
        return load_model(self.base, torch.device("cpu"), torch.float32)

    def score(self, model: Any, pairs: PairSet) -> torch.Tensor:
        return score(model, pairs, BUDGET)  # (P, 2)

    def score_reference(self, model: Any, pairs: PairSet) -> torch.Tensor:
        """(P, 2). Only pairs that no run before had are computed."""
        new = {key: pair for key, pair in zip(pairs.keys, pairs, strict=True) if key not in self.reference}
        if new:
            scored = self.score(model, PairSet.of(list(new.values()), pairs.counts))
            self.reference.update(zip(new, scored.numpy(), strict=True))
        return torch.from_numpy(np.stack([self.reference[key] for key in pairs.keys])).float()

    def run(self, pairs: PairSet) -> dict[str, float]:
        """Train the base on the pairs for one epoch. Returns what became of it."""
        model = self.load()
        reference = self.score_reference(model, pairs)
        optimizer = make_optimizer(model.requires_grad_(True).parameters(), "rmsprop", LEARNING_RATE, 0.0)
        total = len(pairs) // PAIRS_PER_STEP
        costs = forward_flops(self.base.dims, pairs.lengths)
        for step, rows, micro_batches in training_steps(
            pairs, costs, range(total), pairs_per_step=PAIRS_PER_STEP, seed=self.of.seed, budget=BUDGET, rank=0,
            num_ranks=1,
        ):  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, total, total // 10, LEARNING_RATE)
            result = train.train_step(
                model,
                optimizer,
                micro_batches,
                reference,
                len(rows),
                self.alone,
                preference_loss=PreferenceLoss("dpo", BETA),
            )
            if not result.finite:
                raise ValueError(f"step {step + 1} is not finite")
        model.requires_grad_(False)
        return {"steps": total, "exact_match": self.exact_match(model), "accuracy": self.accuracy(model)}

    def exact_match(self, model: Any) -> float:
        """Share of the test questions whose greedy answer is the right one."""
        prompts = [self.encoder.prompt([{"role": "user", "content": q.instruction}]) for q in self.of.test]
        ids = generate(model, prompts, 16, self.base.stop_ids)
        found = [self.base.tokenizer.decode(answer).strip() for answer in ids]
        return sum(answer == q.answer for q, answer in zip(self.of.test, found, strict=True)) / len(found)

    def accuracy(self, model: Any) -> float:
        """Share of the test questions' true pairs whose chosen answer has the higher reward."""
        rewards = self.score(model, self.test) - self.test_reference  # (P, 2)
        return (rewards[:, 0] > rewards[:, 1]).float().mean().item()


def digest(pairs: Sequence[tuple[demo.Question, Pick]]) -> str:
    texts = [[question.instruction, chosen.response, rejected.response] for question, (chosen, rejected) in pairs]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def train_all(folder: Path) -> None:
    """Append to runs.jsonl a line for each run that is not there yet."""
    torch.set_num_threads(1)  # matrices this small are done before a second thread wakes up
    alone = distributed.start("cpu")
    known = read_jsonl(folder / "runs.jsonl")
    done = {tuple(run[name] for name in KEY) for run in known}
    jobs = [("base", None, None), *cells(TRAINED_NOISE)]
    with tqdm(total=REPEATS * len(SEEDS) * len(jobs), unit="run", disable=None) as progress:
        for repeat, seed in ((repeat, seed) for repeat in range(REPEATS) for seed in SEEDS):
            left = [job for job in jobs if (seed, repeat, *job) not in done]
            progress.update(len(jobs) - len(left))
            if not left:
                continue
            of = world(seed)
            of = of._replace(rated=of.rated[repeat::THIRDS])
            bench = Bench(of, make_base(of, folder / f"seed-{seed}"), alone)
            results = {run["digest"]: run for run in known if (run["seed"], run["repeat"]) == (seed, repeat)}
            for job in left:
                line = dict(zip(KEY, (seed, repeat, *job), strict=True)) | one_run(bench, results, *job)
                results[line["digest"]] = line
                with open(folder / "runs.jsonl", "a") as file:
                    file.write(json.dumps(line) + "\n")
                progress.update()
                if progress.disable:
                    print(json.dumps(line), flush=True)


KEY = ("seed", "repeat", "arm", "rating_noise", "score_noise")


def one_run(
    bench: Bench, results: dict[str, dict[str, Any]], arm: str, rating_noise: float | None, score_noise: float | None
) -> dict[str, Any]:
    """The figures of a run. Those of the same pairs are taken from `results`."""
    began, cpu = time.monotonic(), time.process_time()
    if arm == "base":
        model = bench.load()
        return {"digest": "", "steps": 0, "exact_match": bench.exact_match(model), "seconds": 0.0, "cpu_seconds": 0.0}
    pairs, right, _ = pairs_of(arm, bench.of, judged(bench.of, rating_noise or 0.0, score_noise or 0.0))
    line: dict[str, Any] = {"digest": digest(pairs), "pairs": len(pairs), "right": right}
    known = results.get(line["digest"])
    line["trained"] = known is None
    line |= {n: known[n] for n in ("steps", "exact_match", "accuracy")} if known else bench.run(bench.tokens(pairs))
    return line | {
        "seconds": round(time.monotonic() - began, 2), "cpu_seconds": round(time.process_time() - cpu, 2)
    }  # fmt: skip


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---- what it says ---------------------------------------------------------------------------------------------------

Grid = np.ndarray  # (seeds, rating noises, score noises)


def label_lines(folder: Path) -> list[dict[str, Any]]:
    """The fine grid, made once."""
    path = folder / "labels.jsonl"
    if not path.exists():
        lines = [line for seed in tqdm(SEEDS, unit="seed", disable=None) for line in sweep_labels(world(seed))]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return read_jsonl(path)


def estimate_lines(folder: Path) -> list[dict[str, Any]]:
    """What audit.py says of each trained cell's records, beside the shares of truth as they are. Made once."""
    path = folder / "estimates.jsonl"
    if not path.exists():
        lines = []
        for seed in tqdm(SEEDS, unit="seed", disable=None):
            of = world(seed)
            for r, s in ((r, s) for r in TRAINED_NOISE for s in TRAINED_NOISE):
                labels, records = Labels(), judged(of, r, s)
                for entry in (raw_entry("", raw, "ratings", seed) for raw in raw_records(of, r, s)):
                    labels.add(entry.answers)
                line: dict[str, Any] = {"seed": seed, "rating_noise": r, "score_noise": s}
                for name, label, arm in (("rating", LABELS[0], "ratings"), ("score", LABELS[2], "repaired")):
                    line |= {name: pairs_of(arm, of, records)[2], f"{name}_estimate": labels.share(label)}
                lines.append(line)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return read_jsonl(path)


def grid(lines: Sequence[dict[str, Any]], arm: str, value: str, noises: Sequence[float]) -> Grid:
    """Means over a seed's repeats. An arm that reads one noise only has the same value along the other."""
    found = np.full((len(SEEDS), len(noises), len(noises)), np.nan)
    for index in np.ndindex(*found.shape):
        seed, r, s = SEEDS[index[0]], noises[index[1]], noises[index[2]]
        values = [
            line[value]
            for line in lines
            if line["seed"] == seed and line["arm"] == arm
            and line["rating_noise"] in (None, r) and line["score_noise"] in (None, s)
        ]  # fmt: skip
        found[index] = np.mean(values) if values else np.nan
    return found


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean over the seeds and the half width of its 95 % interval, by Student's t."""
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def crossings(difference: np.ndarray, noises: Sequence[float]) -> list[float]:
    """(rating noises, score noises) of ratings minus scores -> for each score noise, the rating noise from which the
    difference is no longer above 0, by linear interpolation. 0: at the smallest noise already; inf: nowhere."""
    found = []
    for column in difference.T:
        i = next((i for i, value in enumerate(column) if value <= 0), -1)
        part = column[i - 1] / (column[i - 1] - column[i]) if i > 0 else 0.0
        found.append(noises[i - 1] + part * (noises[i] - noises[i - 1]) if i > 0 else (0.0 if i == 0 else np.inf))
    return found


def resampled(difference: Grid, count: int = 1000) -> Iterator[np.ndarray]:
    """Means over seeds that were drawn again with replacement: the bootstrap."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield difference[rng.integers(len(difference), size=len(difference))].mean(0)


def report(folder: Path) -> None:
    runs = read_jsonl(folder / "runs.jsonl")
    trained = [run for run in runs if run.get("trained")]
    cpu = sum(run["cpu_seconds"] for run in trained)
    print(f"{len(trained)} trainings, {len(SEEDS)} seeds, {cpu:.0f} s of CPU, {cpu / len(trained):.1f} s each")
    report_models(runs)
    report_crossings(runs, label_lines(folder))
    report_estimates(runs, estimate_lines(folder))


def ahead(lines: Sequence[dict[str, Any]], value: str, noises: Sequence[float]) -> Grid:
    """Ratings minus repaired scores."""
    return grid(lines, "ratings", value, noises) - grid(lines, "repaired", value, noises)


def report_models(runs: Sequence[dict[str, Any]]) -> None:
    points = {arm: 100 * grid(runs, arm, "exact_match", TRAINED_NOISE) for arm in ARMS}
    print("\nexact match in %: mean and 95 % interval, Student's t over seeds; noise in points")
    print(f"  base          {show(base_points(runs))}\n  truth         {show(points['truth'][:, 0, 0])}")
    for i, noise in enumerate(TRAINED_NOISE):
        print(f"  noise {noise:>4g}    ratings {show(points['ratings'][:, i, 0])}", end="")
        print(f"    released {show(points['released'][:, 0, i])}    repaired {show(points['repaired'][:, i, i])}")
    for name, value in (("exact match", "exact_match"), ("pairs labelled right", "right")):
        print(f"\nratings minus repaired scores, {name}, percentage points; rows: rating noise, columns: score noise")
        print("        " + "".join(f"{noise:>14g}" for noise in TRAINED_NOISE))
        for i, noise in enumerate(TRAINED_NOISE):
            cells = 100 * ahead(runs, value, TRAINED_NOISE)[:, i].T  # (score noises, seeds)
            print(f"  {noise:>6g}" + "".join(f"{show(cell):>14}" for cell in cells))


def base_points(runs: Sequence[dict[str, Any]]) -> np.ndarray:
    """(seeds,)"""
    bases = [[run["exact_match"] for run in runs if run["arm"] == "base" and run["seed"] == seed] for seed in SEEDS]
    return 100 * np.array([np.mean(base) for base in bases])


def report_crossings(runs: Sequence[dict[str, Any]], labels: Sequence[dict[str, Any]]) -> None:
    print("\nrating noise from which the repaired score is at least as good, by score noise")
    fine = np.array([crossings(seed, NOISE) for seed in ahead(labels, "right", NOISE)])  # (seeds, score noises)
    for noise, found in zip(NOISE, fine.T, strict=True):
        print(f"  {noise:>4g}  labels  {show(found, 2)} (Student's t over seeds)")
    difference = ahead(runs, "exact_match", TRAINED_NOISE)
    drawn = np.array([crossings(mean, TRAINED_NOISE) for mean in resampled(difference)])
    for noise, found, column in zip(TRAINED_NOISE, crossings(difference.mean(0), TRAINED_NOISE), drawn.T, strict=True):
        low, high = np.percentile(column, [2.5, 97.5], method="nearest")
        print(f"  {noise:>4g}  models  {found:.2f} ({low:.2f} to {high:.2f}, bootstrap over seeds)")


def report_estimates(runs: Sequence[dict[str, Any]], estimates: Sequence[dict[str, Any]]) -> None:
    print("\nthe shares of truth that audit.py estimates, over the files of all seeds and trained noises")
    for name in ("rating", "score"):
        error = np.array([line[f"{name}_estimate"] - line[name] for line in estimates])
        print(f"  {name}: estimate - truth {error.mean():+.3f} on average, {error.min():+.3f} to {error.max():+.3f}")
    leads = share_grid(estimates, "rating_estimate") - share_grid(estimates, "score_estimate")
    truths = share_grid(estimates, "rating") - share_grid(estimates, "score")
    print(f"  the label with more truth is named in {(leads * truths > 0).sum()} of {leads.size} files")
    models = ahead(runs, "exact_match", TRAINED_NOISE)
    right = certain = 0
    for index in np.ndindex(*models.shape[1:]):
        mean, half = interval(models[(slice(None), *index)])
        certain += abs(mean) > half
        right += abs(mean) > half and mean * leads[(slice(None), *index)].mean() > 0
    print(f"  of {certain} cells whose models certainly differ, it names the better label in {right}")


def share_grid(estimates: Sequence[dict[str, Any]], name: str) -> Grid:
    return grid([line | {"arm": "share"} for line in estimates], "share", name, TRAINED_NOISE)


def show(values: np.ndarray, digits: int = 1) -> str:
    mean, half = interval(values)
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


COLOURS = {"released": "#d1495b", "repaired": "#c58b00", "ratings": "#00798c", "truth": "#222222"}


def draw(folder: Path, output: Path, files: Sequence[Path]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    runs, estimates = read_jsonl(folder / "runs.jsonl"), estimate_lines(folder)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), facecolor="white", layout="constrained")
    draw_models(left, runs)
    draw_map(right, ahead(runs, "exact_match", TRAINED_NOISE), estimates, files)
    figure.savefig(output, dpi=90)
    pyplot.close(figure)
    Image.open(output).convert("RGB").quantize(128).save(output, optimize=True)  # a third of the bytes


def draw_models(axes: Any, runs: Sequence[dict[str, Any]]) -> None:
    """What the labels make of a model: a point for each label and noise."""
    for arm in ARMS:
        found = [
            100 * grid(runs, arm, value, TRAINED_NOISE).reshape(len(SEEDS), -1) for value in ("right", "exact_match")
        ]
        cells = {(x.mean(), *interval(y)) for x, y in zip(*(value.T for value in found), strict=True)}
        x, y, half = zip(*sorted(cells), strict=True)
        axes.errorbar(x, y, half, fmt="o", ms=5, lw=1, color=COLOURS[arm], label=arm)
    base = base_points(runs).mean()
    axes.axhline(base, color="gray", lw=1, ls=":")
    axes.text(100, base + 1, "base", color="gray", ha="right")
    axes.set(
        xlabel="pairs labelled right, %",
        ylabel="exact match after DPO, %",
        title="A model is worth what its labels are",
    )
    axes.legend(loc="upper left")


def draw_map(axes: Any, difference: Grid, estimates: Sequence[dict[str, Any]], files: Sequence[Path]) -> None:
    """The exact match by ratings minus that by repaired scores, where the labels hold so much truth."""
    x, y, mean = (
        share_grid(estimates, "rating").mean(0),
        share_grid(estimates, "score").mean(0),
        100 * difference.mean(0),
    )
    top = abs(mean).max()
    for sample in resampled(difference, 100):
        if sample.min() < 0 < sample.max():
            axes.contour(x, y, sample, levels=[0], colors="gray", alpha=0.08, linewidths=2)
    axes.contour(x, y, mean, levels=[0], colors="black", linewidths=2)
    axes.plot([0, 1], [0, 1], color="#d1495b", ls="--", lw=1.3)
    axes.scatter(x, y, c=mean, cmap="BrBG", vmin=-top, vmax=top, s=300, edgecolors="gray", linewidths=0.8, zorder=3)
    for index in np.ndindex(*mean.shape):
        colour = "white" if abs(mean[index]) > 0.6 * top else "black"
        where = {"ha": "center", "va": "center", "fontsize": 8, "zorder": 4}
        axes.text(x[index], y[index], f"{round(mean[index]):+d}", color=colour, **where)
    axes.plot([], [], color="black", lw=2, label="models equal (gray: bootstrap)")
    axes.plot([], [], color="#d1495b", ls="--", lw=1.3, label="equal shares of truth")
    for path in files:
        found = labels_of([path])
        axes.plot(found.share(LABELS[0]), found.share(LABELS[2]), "k*", ms=14, label=path.name, zorder=5)
    ticks = [0.02, 0.1, 0.25, 0.5, 0.75, 1]
    axes.set_xscale("function", functions=(np.sqrt, np.square))
    axes.set_yscale("function", functions=(np.sqrt, np.square))
    axes.set(xlim=(0.005, 1), ylim=(0.005, 1), xlabel="share of truth in the mean rating", xticks=ticks, yticks=ticks)
    axes.set(ylabel="share of truth in the repaired score", title="Exact match, ratings minus repaired scores, points")
    axes.set_xticklabels(map(str, ticks))
    axes.set_yticklabels(map(str, ticks))
    axes.legend(loc="upper left", fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/which_binarization"), metavar="DIR")
    parser.add_argument(
        "--raw", type=Path, nargs="+", default=[], metavar="FILE", help="raw records to show on the map"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    train_all(args.output)
    report(args.output)
    draw(args.output, args.output / "which_binarization.png", args.raw)


if __name__ == "__main__":
    main()
