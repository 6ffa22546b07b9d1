"""Measure a trained model against its base, or any checkpoints against each other.

    python -m notus.evaluate exact-match --model BASE --model TRAINED --prompts questions.jsonl
    python -m notus.evaluate preferences --model TRAINED --base BASE --data test.jsonl
    python -m notus.evaluate alpaca --model TRAINED --questions alpaca_eval.json --output model_outputs.json
    python -m notus.evaluate mtbench --model TRAINED --questions question.jsonl --model-id notus --output notus.jsonl
    python -m notus.evaluate pairwise BASE.json TRAINED.json --judge URL --judge-model NAME --output verdicts.jsonl
    python -m notus.evaluate winrate annotations.json

exact-match     rows are {"instruction": "...", "correct_answers": ["...", ...]}, UltraFeedback's names. The share of
                prompts whose greedy answer is a correct one, spaces around it aside; and some answers side by side
preferences     any file that train.py reads; with --test-size, only the rows that data.test_size held out of it. What
                training logs as eval_loss and eval_rewards/*. --by subset: accuracy by that key of the rows, and the
                sections of RewardBench if the subsets are its own
alpaca          the answers to AlpacaEval's questions, in the file that alpaca_eval reads
mtbench         the answers to MT-Bench's questions in two turns, in the file that FastChat's judge reads
pairwise        two files of alpaca's before a judge, in both orders: win rate, interval, length-controlled win rate
winrate         AlpacaEval's win rate and standard error, from the annotations that it leaves

alpaca and mtbench take a directory as --model, or with --endpoint URL the name of a model on a server that speaks
OpenAI's chat completions (vLLM, llama.cpp, transformers serve). Each answer is kept as soon as it is known, in the
output's name with .progress behind it. After an interruption the same command asks for the rest. The environment's
OPENAI_API_KEY is sent to the server if it is set.

Models are read one after another: there is never more than one in memory.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from notus import judge, outputs, slices
from notus.answers import Checkpoint, Request, Source
from notus.base import Base, Frame, load_model, read_base, read_frame
from notus.distributed import World, reshard, sum_over_ranks
from notus.endpoint import Server
from notus.files import sentence, write_atomically
from notus.generate import choose_frame, generate, model_arguments, place
from notus.losses import METRICS, PreferenceLoss
from notus.metrics import one_line
from notus.model import Mistral
from notus.reference import rounding, score_pairs
from notus.rows import check_file, check_text, read_records
from notus.tokens import PairSet, describe_counts, load_pairs

# --- while training --------------------------------------------------------------------------------------------------


def held_out_metrics(
    model: Mistral, pairs: PairSet, reference: Tensor, world: World, budget: int, preference_loss: PreferenceLoss,
    last: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """`summarize` of P held-out pairs, with `eval_` before its names, and eval_runtime in seconds. With `last` also
    eval_slices, the slices of slices.py as dicts, if there are pairs enough.

    reference: (P, 2) on the CPU. budget: tokens of a micro-batch. All ranks call, and each scores its share.
    """
    began = time.monotonic()
    policy, reference = score(model, pairs, budget, world), reference.double()
    figures, found = summarize(preference_loss, policy, reference, pairs, read_sources(pairs) if last else None)
    line: dict[str, Any] = {f"eval_{name}": value for name, value in figures.items()}
    line["eval_runtime"] = round(time.monotonic() - began, 3)
    return line | ({"eval_slices": [each._asdict() for each in found]} if last and found else {})


def score(model: Mistral, pairs: PairSet, budget: int, world: World | None = None) -> Tensor:
    """P pairs -> (P, 2) on the CPU: log-probabilities of the chosen and the rejected answers, in nats. `budget`: tokens
    of a micro-batch. With a world all its ranks call, score a share each, and get all pairs."""
    device = model.model.embed_tokens.weight.device
    alone, world = world is None, world or World(rank=0, size=1, device=device, mesh=None)
    logps = torch.zeros(len(pairs), 2, dtype=torch.float64, device=world.device)
    with tqdm(total=len(pairs), leave=False, disable=None if alone else True) as progress:

        def keep(rows: list[int], scored: Tensor) -> None:
            logps[rows] = scored.double()
            progress.update(len(rows))

        score_pairs(model, pairs, world, budget, keep)
    # Each row is the number of one rank plus zeros, so the sum is exact however the pairs were dealt.
    return (sum_over_ranks(logps) if world.size > 1 else logps).cpu()


def summarize(
    preference_loss: PreferenceLoss, policy: Tensor, reference: Tensor, pairs: PairSet, sources: list[str] | None
) -> tuple[dict[str, float], list[slices.Slice]]:
    """policy, reference (P, 2) in float64 on the CPU -> the slices of slices.py, and means by METRICS' names, with

    logratios/chosen, /rejected   log pi(y|x) - log pi_ref(y|x), if the loss has a reference. The policy did not write
                                  these answers, so this estimates no KL divergence
    rewards/length_correlation    Pearson's, of reward and tokens over all 2P answers. Left out where one is constant,
                                  and where the policy is the reference but for float32's rounding
    """
    tokens = answer_tokens(pairs)
    rewards = preference_loss.rewards(policy, reference, tokens)
    metrics = preference_loss.metrics(preference_loss(policy, reference, tokens), policy, reference, tokens)
    found = dict(zip(METRICS, metrics.mean(0).tolist(), strict=True))
    correlation = torch.corrcoef(torch.stack([rewards.flatten(), tokens.double().flatten()]))[0, 1].item()
    if preference_loss.member.reference:
        ratios = policy - reference
        found |= zip(("logratios/chosen", "logratios/rejected"), ratios.mean(0).tolist(), strict=True)
        if (ratios.abs() <= rounding(tokens, reference, torch.float32)).all():
            correlation = math.nan
    found |= {"rewards/length_correlation": correlation} if math.isfinite(correlation) else {}
    return found, slices.slices(rewards.numpy(), policy.numpy(), tokens.numpy(), sources)


def answer_tokens(pairs: PairSet) -> Tensor:
    """(P, 2): tokens of the chosen and of the rejected answer."""
    return torch.from_numpy(pairs.lengths[:, 1:])


def sample_answers(
    model: Mistral, base: Base, pairs: PairSet, count: int, world: World, max_new_tokens: int = 64
) -> list[dict[str, str]]:
    """Greedy answers to `count` prompts, spread over the pairs: {"prompt", "answer"}, as text. All ranks call.

    Compiled layers run uncompiled here: their graphs are of packed streams.
    """
    count = min(count, len(pairs))
    prompts = [pairs[i * len(pairs) // count].prompt.tolist() for i in range(count)]
    if not prompts:
        return []
    with torch.compiler.set_stance("force_eager"):
        answers = generate(model, prompts, max_new_tokens, base.stop_ids, world=world)
    reshard(model)
    texts = [[base.tokenizer.decode(ids) for ids in both] for both in zip(prompts, answers, strict=True)]
    return [{"prompt": prompt, "answer": answer} for prompt, answer in texts]


def read_sources(pairs: PairSet) -> list[str] | None:
    """The `source` of each pair's row, if every row of its files has one."""
    files = dict.fromkeys(Path(where.rpartition(":")[0]) for where in pairs.where.tolist())
    try:
        known = read_subsets(list(files), "source")
        return [known[where] for where in pairs.where.tolist()]
    except (ValueError, OSError, KeyError, TypeError):  # rows without it, rows from Python, or a file that changed
        return None


# --- exact-match ---------------------------------------------------------------------------------------------------


QUESTIONS = 'rows look like {"instruction": "...", "correct_answers": ["...", "..."]}'


class Question(NamedTuple):
    where: str  # file:line
    instruction: str
    correct_answers: list[str]

    def accepts(self, answer: str) -> bool:
        return answer.strip() in (correct.strip() for correct in self.correct_answers)


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The first `limit` rows of JSON Lines or of a JSON array. ValueError names file, line and value."""
    check_file(Path(path))
    try:
        questions = [parse_question(*each) for each in islice(read_records(Path(path)), limit)]
        if not questions:
            raise ValueError(f"{path}: no questions in it")
    except ValueError as error:
        raise ValueError(f"{error}; {QUESTIONS}") from None
    return questions


def parse_question(where: str, record: Any) -> Question:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a row must be an object, not {record!r:.80}")
    instruction, answers = check_text(where, "instruction", record.get("instruction")), record.get("correct_answers")
    if not instruction.strip():
        raise ValueError(f"{where}: the instruction is empty")
    if not isinstance(answers, list) or not answers:
        raise ValueError(f"{where}: correct_answers must be a list of texts, not {answers!r:.80}")
    if not all(check_text(where, "a correct answer", answer).strip() for answer in answers):
        raise ValueError(f"{where}: a correct answer is empty: {answers!r:.80}")
    if answers == ["None"]:
        raise ValueError(f'{where}: correct_answers is ["None"]: UltraFeedback knows none; leave such rows out')
    return Question(where, instruction, answers)


def greedy_answers(
    base: Base, frame: Frame, questions: Sequence[Question], device: torch.device, dtype: torch.dtype,
    max_new_tokens: int, batch_size: int,
) -> list[str]:  # fmt: skip
    """Greedy answers, as text. Prompts of similar length are decoded together."""
    requests = [
        Request(question.where, [{"role": "user", "content": question.instruction}], max_new_tokens)
        for question in questions
    ]
    answers = Checkpoint(base, frame, device, dtype, batch_size).ask(requests)
    bar = tqdm(answers, total=len(requests), desc=str(base.path), leave=False, disable=None)
    texts = {i: answer.text for i, answer in bar}
    return [texts[i] for i in range(len(requests))]


def exact_match(
    models: Sequence[tuple[Base, Frame]], questions: Sequence[Question], device: torch.device, dtype: torch.dtype, *,
    max_new_tokens: int = 64, batch_size: int = 16, samples: int = 3, output: Path | None = None,
) -> list[str]:  # fmt: skip
    """The lines of the report. `output` gets all answers as JSON."""
    answers, right = {}, {}
    for base, frame in models:
        name = str(base.path)
        answers[name] = greedy_answers(base, frame, questions, device, dtype, max_new_tokens, batch_size)
        right[name] = [question.accepts(answer) for question, answer in zip(questions, answers[name], strict=True)]
    if output:
        rows = [
            question._asdict() | {"answers": {name: found[i] for name, found in answers.items()}}
            for i, question in enumerate(questions)
        ]
        report = {"exact_match": {name: sum(marks) / len(questions) for name, marks in right.items()}, "rows": rows}
        write_atomically(output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    width = max(len("right answer"), *map(len, answers))
    lines = [f"{'model':{width}}  exact match"]
    for name, marks in right.items():
        lines.append(f"{name:{width}}  {sum(marks) / len(questions):>11.1%}  {sum(marks)} of {len(questions)}")
    samples = min(samples, len(questions))
    for i in (k * len(questions) // samples for k in range(samples)):  # spread over the file
        lines += ["", f"{'prompt':{width}}  {one_line(questions[i].instruction, 80)}"]
        for name, found in answers.items():
            lines.append(f"{name:{width}}  {'right' if right[name][i] else 'wrong'}  {one_line(found[i], 80)}")
        lines.append(f"{'right answer':{width}}  {'':5}  {one_line(' | '.join(questions[i].correct_answers), 80)}")
    return [*lines, f"\nall answers: {output}"] if output else lines


# --- preferences ---------------------------------------------------------------------------------------------------


def preferences(
    model: tuple[Base, Frame], reference: Base, data: Sequence[Path], device: torch.device, dtype: torch.dtype,
    micro_batch_tokens: int = 16384, test_size: float = 0.0, by: str | None = None,
) -> list[str]:  # fmt: skip
    """The lines of the report: `model` against `reference`, both in the model's frame, whose lengths and loss are those
    of the report. Pairs with nothing to tell apart are left out, and counted. by: a key of the rows, for the accuracy
    of each subset."""
    base, frame = model
    preference_loss = frame.preference_loss
    pairs, reference_pairs = (
        load_pairs(
            data, each.encoder(frame), max_length=frame.max_length, max_prompt_length=frame.max_prompt_length,
            drop_bad_pairs=True, test_size=test_size, held_out=True,
        )
        for each in (base, reference)
    )  # fmt: skip
    if pairs.keys != reference_pairs.keys:
        raise ValueError(
            f"{base.path} and {reference.path} make different tokens of the same pairs: a model can only be compared "
            "with a base that has its tokenizer and chat template"
        )
    known = read_subsets(data, by) if by else {}
    logps = []
    for each in (base, reference) if preference_loss.member.reference else (base,):
        loaded = load_model(each, device, dtype)
        logps.append(score(loaded, pairs, micro_batch_tokens))
        del loaded  # before the next one is read
    mean, found = summarize(preference_loss, logps[0], logps[-1], pairs, None if by else read_sources(pairs))

    lines = [describe_counts(pairs.counts)]
    start = "" if preference_loss.start is None else f"; {preference_loss.start:.4f} where model = base"
    explained = {
        "rewards/accuracies": "of the pairs: the chosen answer has the higher reward; a tie counts as wrong",
        "rewards/margins": "nats: reward of the chosen - reward of the rejected answer",
        "rewards/chosen": f"nats: {preference_loss.reward('model', 'base')}",
        "rewards/rejected": "nats",
        "rewards/length_correlation": "of reward and tokens of all answers",
        "logratios/chosen": "nats: log(model / base)",
        "logratios/rejected": "nats",
        "loss": f"{preference_loss}{start}",
    }
    for name in (name for name in explained if name in mean):
        number = f"{mean[name]:{'9.1%' if name == 'rewards/accuracies' else '9.4f'}}"
        lines.append(f"{name:26}  {number}  {explained[name]}")
    lines += ["", *slices.table(found)] if found else []
    if not by:
        return lines
    rewards = preference_loss.rewards(logps[0], logps[-1], answer_tokens(pairs))
    accurate = (rewards[:, 0] > rewards[:, 1]).double().numpy()
    return lines + judge.by_subset([known[str(where)] for where in pairs.where], accurate, "accuracy")


def read_subsets(data: Sequence[Path], by: str) -> dict[str, str]:
    """file:line -> the row's value of the key `by`."""
    found = {}
    for path in data:
        for where, row in read_records(path):
            if by not in row:
                raise ValueError(f"{where}: has no {by!r}, by which --by divides the rows; its keys: {', '.join(row)}")
            found[where] = str(row[by])
    return found


# --- the command line ----------------------------------------------------------------------------------------------


def open_source(
    model: str, endpoint: str | None, concurrency: int, timeout: float, batch_size: int, device: str, dtype: str,
    bos: bool | None, system: str | None, no_system: bool,
) -> Source:  # fmt: skip
    """What answers: a directory, or a model's name on a server. A server uses the template that it was given. If the
    name is the directory of a model that notus trained, its system turn is inserted."""
    if not endpoint:
        base = read_base(model)
        return Checkpoint(base, choose_frame(base, bos, system, no_system), *place(device, dtype), batch_size)
    frame, _ = read_frame(Path(model))
    if system is None and frame and not no_system:
        system = frame.system_prompt
    inserts = "inserts no system turn; --system TEXT does" if system is None else f"inserts the system turn {system!r}"
    print(f"{endpoint}: note: the server applies its own chat template, and notus {inserts}", file=sys.stderr)
    return Server(endpoint, model, system, bos, concurrency, timeout)


def check_output(path: Path) -> None:
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}: no such directory, so --output cannot be written there")
    if path.is_dir():
        raise ValueError(f"{path}: a directory, so --output cannot be written there")


def run_alpaca(
    questions: Path, output: Path, generator: str | None, limit: int | None, max_new_tokens: int, temperature: float,
    top_p: float, seed: int, **source: Any,
) -> list[str]:  # fmt: skip
    check_output(output)
    rows = outputs.read_instructions(questions, limit)
    name = generator or source["model"].strip("/").replace("/", "-")
    if "/" in name:
        raise ValueError(f"--generator {name}: must not hold a /, because alpaca_eval makes folders by this name")
    return outputs.alpaca(open_source(**source), rows, name, output, max_new_tokens, temperature, top_p, seed)


def run_mtbench(
    questions: Path, output: Path, model_id: str, limit: int | None, max_new_tokens: int, seed: int, **source: Any
) -> list[str]:
    check_output(output)
    rows = outputs.read_mtbench(questions, limit)
    return outputs.mtbench(open_source(**source), rows, model_id, output, max_new_tokens, seed)


def run_pairwise(
    first: Path, second: Path, judge_url: str, judge_model: str, output: Path, max_new_tokens: int, temperature: float,
    seed: int, concurrency: int, timeout: float,
) -> list[str]:  # fmt: skip
    check_output(output)
    server = Server(judge_url, judge_model, concurrency=concurrency, timeout=timeout)
    judged = judge.judge_pairs(server, first, second, output, max_new_tokens, temperature, seed)
    return [*judge.describe_judged(judged, str(first), str(second)), f"prompts and verdicts: {output}"]


def positive(kind: type[float], zero: bool = False, largest: float = sys.float_info.max) -> Callable[[str], float]:
    """An `argparse` type: a number above 0, or from 0 on. (To the type system an int is a float.)"""

    def convert(text: str) -> float:
        value = kind(text)
        if not (0 < value <= largest or (zero and value == 0)):
            bounds = "0 or more" if zero else "above 0" if largest > 1 else f"above 0 and at most {largest:g}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    convert.__name__ = kind.__name__  # for "invalid int value"
    return convert


def run_exact_match(
    model: list[Path], prompts: Path, limit: int | None, samples: int, max_new_tokens: int, batch_size: int,
    output: Path | None, device: str, dtype: str, **frame: Any,
) -> list[str]:  # fmt: skip
    if output:
        check_output(output)
    questions = read_questions(prompts, limit)
    bases = [read_base(path) for path in dict.fromkeys(model)]
    return exact_match(
        [(base, choose_frame(base, **frame)) for base in bases], questions, *place(device, dtype),
        max_new_tokens=max_new_tokens, batch_size=batch_size, samples=samples, output=output,
    )  # fmt: skip


def run_preferences(
    model: Path, base: Path, data: list[Path], test_size: float, by: str | None, micro_batch_tokens: int, device: str,
    dtype: str, bos: bool | None, system: str | None, no_system: bool, **lengths_and_beta: float | None,
) -> list[str]:  # fmt: skip
    policy = read_base(model)
    given: dict[str, Any] = {name: value for name, value in lengths_and_beta.items() if value is not None}
    frame = replace(choose_frame(policy, bos, system, no_system), **given)
    if frame.max_prompt_length >= frame.max_length:
        raise ValueError(f"--max-prompt-length {frame.max_prompt_length} must be below --max-length {frame.max_length}")
    where = place(device, dtype)
    return preferences((policy, frame), read_base(base), data, *where, micro_batch_tokens, test_size, by)


def main(argv: list[str] | None = None) -> int:
    about: dict[str, Any] = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m notus.evaluate", **about)
    commands = parser.add_subparsers(required=True, metavar="{exact-match,preferences,alpaca,mtbench,pairwise,winrate}")
    common = model_arguments()

    command = commands.add_parser(
        "exact-match", parents=[common], **about, help="greedy answers against the correct ones"
    )
    command.set_defaults(run=run_exact_match)
    command.add_argument(
        "--model", type=Path, action="append", required=True, metavar="DIR", help="a checkpoint; may be given again"
    )
    command.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="rows as shown above")
    command.add_argument("--limit", type=positive(int), metavar="N", help="use the first N rows only")
    command.add_argument("--samples", type=int, default=3, metavar="N", help="prompts to show (default: 3)")
    command.add_argument("--max-new-tokens", type=positive(int), default=64, metavar="N", help="default: 64")
    command.add_argument(
        "--batch-size", type=positive(int), default=16, metavar="N", help="prompts decoded at once (default: 16)"
    )
    command.add_argument("--output", type=Path, metavar="FILE.json", help="write all answers there")

    command = commands.add_parser("preferences", parents=[common], **about, help="how often the chosen answer wins")
    command.set_defaults(run=run_preferences)
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="the trained model")
    command.add_argument("--base", type=Path, required=True, metavar="DIR", help="what it was trained from")
    command.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="preference pairs")
    command.add_argument(
        "--test-size",
        type=positive(float),
        default=0.0,
        metavar="X",
        help="only the rows that data.test_size=X held out",
    )
    command.add_argument("--beta", type=positive(float), metavar="B", help="default: as trained, else 0.1")
    command.add_argument("--max-length", type=positive(int), metavar="N", help="default: as trained, else 1024")
    command.add_argument("--max-prompt-length", type=positive(int), metavar="N", help="default: as trained, else 512")
    command.add_argument(
        "--micro-batch-tokens", type=positive(int), default=16384, metavar="N", help="changes speed and memory only"
    )

    command.add_argument("--by", metavar="KEY", help="the accuracy for each value of this key of the rows, too")

    network = argparse.ArgumentParser(add_help=False)
    network.add_argument("--concurrency", type=positive(int), default=8, metavar="N", help="requests at once (8)")
    network.add_argument("--timeout", type=positive(float), default=600.0, metavar="S", help="seconds a reply may take")
    network.add_argument("--seed", type=int, default=0, help="each question gets a seed of its own from it (0)")
    asking = argparse.ArgumentParser(add_help=False, parents=[common, network])
    asking.add_argument("--model", required=True, metavar="DIR|NAME", help="a checkpoint, or the server's name for it")
    asking.add_argument("--endpoint", metavar="URL", help="ask this server, e.g. http://localhost:8000/v1")
    asking.add_argument("--questions", type=Path, required=True, metavar="FILE")
    asking.add_argument("--output", type=Path, required=True, metavar="FILE")
    asking.add_argument("--limit", type=positive(int), metavar="N", help="use the first N questions only")
    asking.add_argument(
        "--batch-size", type=positive(int), default=16, metavar="N", help="prompts decoded at once here (16)"
    )

    command = commands.add_parser("alpaca", parents=[asking], **about, help="write AlpacaEval's model_outputs.json")
    command.set_defaults(run=run_alpaca)
    command.add_argument(
        "--generator", metavar="NAME", help="the model's name in the file (default: --model, with - for /)"
    )
    command.add_argument("--max-new-tokens", type=positive(int), default=2048, metavar="N", help="default: 2048")
    command.add_argument(
        "--temperature", type=positive(float, zero=True), default=0.7, metavar="T", help="default: 0.7, as Notus"
    )
    command.add_argument("--top-p", type=positive(float, largest=1.0), default=1.0, metavar="P", help="default: 1")

    command = commands.add_parser("mtbench", parents=[asking], **about, help="write FastChat's model_answer file")
    command.set_defaults(run=run_mtbench)
    command.add_argument("--model-id", required=True, metavar="NAME", help="the model's name in the file")
    command.add_argument("--max-new-tokens", type=positive(int), default=1024, metavar="N", help="default: 1024")

    command = commands.add_parser("pairwise", parents=[network], **about, help="two models before a judge")
    command.set_defaults(run=run_pairwise)
    command.add_argument("first", type=Path, metavar="A.json", help="model_outputs.json of the base")
    command.add_argument("second", type=Path, metavar="B.json", help="that of the tuned model; the win rate is its own")
    command.add_argument("--judge", dest="judge_url", required=True, metavar="URL", help="as --endpoint of alpaca")
    command.add_argument("--judge-model", required=True, metavar="NAME")
    command.add_argument(
        "--output", type=Path, required=True, metavar="FILE.jsonl", help="keeps prompts and verdicts; may be resumed"
    )
    command.add_argument("--max-new-tokens", type=positive(int), default=2048, metavar="N", help="default: 2048")
    command.add_argument(
        "--temperature", type=positive(float, zero=True), default=0.0, metavar="T", help="default: 0, as MT-Bench"
    )

    command = commands.add_parser("winrate", **about, help="count AlpacaEval's annotations")
    command.set_defaults(run=judge.describe_annotations)
    command.add_argument("path", type=Path, metavar="annotations.json")

    arguments = vars(parser.parse_args(argv))
    run: Callable[..., list[str]] = arguments.pop("run")
    try:
        print("\n".join(run(**arguments)))
    except (ValueError, OSError) as error:
        print(f"notus.evaluate: error: {sentence(error)}", file=sys.stderr)
        return 1 if isinstance(error, ConnectionError) else 2  # a server failed, or the input is bad
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
