"""audit.py on a generated file of UltraFeedback's real size, and its page in a browser.

    pip install -e .[test] && apt-get install chromium
    python benchmarks/audit_64k.py            a few minutes, 3 GB of disk in a temporary folder

63,967 records with four completions each. The lengths are those of the real set: prompts of 140 words on average,
answers of 225, critiques of 105 and rationales. One completion in 25 carries UltraFeedback's bug. The audit looks for
2,000 held-out prompts and 1,000 benchmark questions as well. `--records` makes it smaller. Prints seconds, GiB and,
with Chromium, the milliseconds until the page shows its first record and until a filter has its result on the screen.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from statistics import median

ROOT = Path(__file__).parent.parent
ASPECTS = ("instruction_following", "honesty", "truthfulness", "helpfulness")
SOURCES = {
    "evol_instruct": 10000, "false_qa": 2339, "flan_v2_niv2": 20939, "sharegpt": 19949, "truthful_qa": 811,
    "ultrachat": 9929,
}  # fmt: skip


def make(folder: Path, records: int) -> None:
    """raw.jsonl, test.jsonl and questions.jsonl."""
    rng = Random(0)
    letters = "etaoinshrdlu"
    vocabulary = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(30000)]
    frequencies = [1 / rank for rank in range(1, len(vocabulary) + 1)]
    pool = rng.choices(vocabulary, frequencies, k=3_000_000)

    def text(mean_words: float) -> str:
        count = max(3, int(rng.lognormvariate(0, 0.8) * mean_words / 1.38))  # exp(0.8**2 / 2) = 1.38
        start = rng.randrange(len(pool) - count)
        return " ".join(pool[start : start + count])

    def completion(model: str) -> dict:
        points = rng.randint(1, 5)
        ratings = [str(min(max(points + rng.choice((-1, 0, 0, 1)), 1), 5)) for _ in ASPECTS]
        notes = {a: {"Rating": r, "Rationale": text(30)} for a, r in zip(ASPECTS, ratings, strict=True)}
        score = 10 if ratings.count("1") > 2 and rng.random() < 0.5 else 2 * points
        return {
            "model": model, "response": text(225), "critique": text(105), "overall_score": float(score),
            "annotations": notes,
        }  # fmt: skip

    models = [f"model-{i}" for i in range(17)]
    prompts: list[str] = []
    with open(folder / "raw.jsonl", "w") as file:
        for _ in range(records):
            prompts.append(rng.choice(prompts) if prompts and rng.random() < 0.01 else text(140))
            completions = [completion(model) for model in sorted(rng.sample(models, 4))]
            source = rng.choices(list(SOURCES), list(SOURCES.values()))[0]
            record = {"source": source, "instruction": prompts[-1], "completions": completions}
            file.write(json.dumps(record) + "\n")
    heldout = [{"instruction": rng.choice(prompts), "chosen_response": "a", "rejected_response": "b"}] * 20
    heldout += [heldout[0] | {"instruction": f"{rng.choice(prompts)} or not"} for _ in range(80)]
    heldout += [heldout[0] | {"instruction": text(140)} for _ in range(1900)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in heldout))
    questions = [{"question": rng.choice(prompts)} for _ in range(50)] + [{"question": text(20)} for _ in range(950)]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))


def in_the_browser(page: Path) -> None:
    from playwright.sync_api import sync_playwright

    filters = {"source": "sharegpt", "reasons": "score contradicts ratings", "prompt": "the", "length": ">2000"}
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        tab = browser.new_page()
        start = time.perf_counter()
        tab.goto(page.as_uri())
        tab.wait_for_selector(".answer")
        print(
            f"opened {page.stat().st_size / 2**20:.0f} MiB and showed a record in {time.perf_counter() - start:.2f} s"
        )
        for field, value in filters.items():
            took, left = tab.evaluate(
                """async ([field, value]) => {
                    const table = Tabulator.findTable("#table")[0], took = [];
                    let left;
                    for (let i = 0; i < 5; i++) {
                        const start = performance.now();
                        table.setHeaderFilterValue(field, value);
                        await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
                        took.push(performance.now() - start);
                        left = table.getDataCount("active");
                        table.clearHeaderFilter();
                    }
                    return [took, left];
                }""",
                [field, value],
            )
            print(f"filter {field} by {value}: {median(took):.0f} ms, at most {max(took):.0f} ms, {left:,} rows")
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--records", type=int, default=63967)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the files there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(exist_ok=True)
        make(folder, args.records)
        raw = folder / "raw.jsonl"
        print(f"{args.records:,} records, {raw.stat().st_size / 2**20:,.0f} MiB")
        command = [sys.executable, str(ROOT / "audit.py"), str(raw), "--output", str(folder / "audit"), "--overwrite"]
        for extra in ([], ["--test", str(folder / "test.jsonl"), "--benchmark", str(folder / "questions.jsonl")]):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run(command + extra, check=True, stdout=subprocess.DEVNULL)
            wall, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
            cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
            flags = " ".join(extra[::2]) or "no more files"
            print(f"audit with {flags}: {wall:.0f} s ({cpu:.0f} s of CPU), at most {used.ru_maxrss / 2**20:.2f} GiB")
        in_the_browser(folder / "audit" / "index.html")


if __name__ == "__main__":
    main()
