"""Measure a trained model against its base, or any checkpoints against each other.

    python -m notus.evaluate exact-match --model BASE --model TRAINED --prompts questions.jsonl
    python -m notus.evaluate preferences --model TRAINED --base BASE --data test.jsonl

exact-match     rows are {"instruction": "...", "correct_answers": ["...", ...]}, UltraFeedback's names. The share of
                prompts whose greedy answer is a correct one, spaces around it aside; and some answers side by side
preferences     any file that train.py reads. What training logs as eval_loss and eval_rewards/*

Models are read one after another: there is never more than one in memory.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from notus.data import PairSet, check_text, load_pairs, read_records
from notus.distributed import World
from notus.generate import check_model, generate, load_model, model_arguments, place, prompt_ids, stop_ids
from notus.losses import dpo_loss, preference_metrics
from notus.model import Mistral
from notus.reference import pair_key, score_pairs
from notus.weights import write_atomically

# --- exact-match ---------------------------------------------------------------------------------------------------


class Question(NamedTuple):
    where: str  # file:line
    instruction: str
    correct_answers: list[str]

    def accepts(self, answer: str) -> bool:
        return answer.strip() in (correct.strip() for correct in self.correct_answers)


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """The first `limit` rows of a .jsonl, .jsonl.gz or .json file. ValueError names file, line and value."""
    questions = []
    for where, record in read_records(Path(path)):
        if len(questions) == limit:
            break
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a row must be an object, not {record!r:.80}")
        instruction, answers = (
            check_text(where, "instruction", record.get("instruction")),
            record.get("correct_answers"),
        )
        if not instruction.strip():
            raise ValueError(f"{where}: the instruction is empty")
        if not isinstance(answers, list) or not answers:
            raise ValueError(f"{where}: correct_answers must be a list of texts, not {answers!r:.80}")
        if not all(check_text(where, "a correct answer", answer).strip() for answer in answers):
            raise ValueError(f"{where}: a correct answer is empty: {answers!r:.80}")
        if answers == ["None"]:
            raise ValueError(f'{where}: correct_answers is ["None"]: UltraFeedback knows none; leave such rows out')
        questions.append(Question(where, instruction, answers))
    if not questions:
        raise ValueError(f"{path}: no questions in it")
    return questions


def answer_all(model_dir: Path, questions: Sequence[Question], arguments: argparse.Namespace) -> list[str]:
    """Greedy answers, as text. Prompts of similar length are decoded together."""
    model, tokenizer, template = load_model(model_dir, *place(arguments.device, arguments.dtype))
    stop = stop_ids(model_dir, tokenizer)
    prompts = [
        prompt_ids([{"role": "user", "content": q.instruction}], tokenizer, template, arguments.system, arguments.bos)
        for q in questions
    ]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(order), arguments.batch_size), desc=str(model_dir), leave=False, disable=None):
        batch = order[start : start + arguments.batch_size]
        ids = generate(model, [prompts[i] for i in batch], arguments.max_new_tokens, stop)
        for i, answer in zip(batch, ids, strict=True):
            answers[i] = tokenizer.decode(answer)
    return answers


def exact_match(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the report; `--output` is written before the first."""
    models = list(dict.fromkeys(arguments.model))
    questions = read_questions(arguments.prompts, arguments.limit)
    if arguments.output and not arguments.output.parent.is_dir():
        raise ValueError(f"{arguments.output.parent}: no such directory, so --output cannot be written there")
    for model_dir in models:
        check_model(model_dir)
    answers = {model_dir: answer_all(model_dir, questions, arguments) for model_dir in models}
    right = {m: [q.accepts(a) for q, a in zip(questions, answers[m], strict=True)] for m in models}

    if arguments.output:
        rows = [
            {**question._asdict(), "answers": {str(m): answers[m][i] for m in models}}
            for i, question in enumerate(questions)
        ]
        accuracy = {str(m): sum(right[m]) / len(questions) for m in models}
        report = {"exact_match": accuracy, "rows": rows}
        write_atomically(arguments.output, json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    width = max(len("right answer"), *(len(str(model_dir)) for model_dir in models))
    yield f"{'model':{width}}  exact match"
    for model_dir in models:
        count = sum(right[model_dir])
        yield f"{model_dir!s:{width}}  {count / len(questions):>11.1%}  {count} of {len(questions)}"
    samples = min(arguments.samples, len(questions))
    for i in (k * len(questions) // samples for k in range(samples)):  # spread over the file
        yield ""
        yield f"{'prompt':{width}}  {one_line(questions[i].instruction)}"
        for model_dir in models:
            mark = "right" if right[model_dir][i] else "wrong"
            yield f"{model_dir!s:{width}}  {mark}  {one_line(answers[model_dir][i])}"
        yield f"{'right answer':{width}}  {'':5}  {one_line(' | '.join(questions[i].correct_answers))}"
    if arguments.output:
        yield f"\nall answers: {arguments.output}"


def one_line(text: str, width: int = 80) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


# --- preferences ---------------------------------------------------------------------------------------------------


def score(model: Mistral, pairs: PairSet, budget: int) -> Tensor:
    """P pairs -> (P, 2) on the CPU: log-probabilities of the chosen and the rejected answers, in nats. `budget`: tokens
    of a micro-batch."""
    alone = World(rank=0, size=1, device=model.model.embed_tokens.weight.device, mesh=None)
    logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
    with tqdm(total=len(pairs), leave=False, disable=None) as progress:

        def keep(rows: list[int], scored: Tensor) -> None:
            logps[rows] = scored.double().cpu()
            progress.update(len(rows))

        score_pairs(model, pairs, alone, budget, keep)
    return logps


def read_pairs(model_dir: Path, arguments: argparse.Namespace) -> PairSet:
    """The pairs as this model's tokenizer and template write them. Those with nothing to tell apart are left out, and
    counted."""
    _, tokenizer, template = check_model(model_dir)
    return load_pairs(
        arguments.data,
        tokenizer,
        template,
        max_length=arguments.max_length,
        max_prompt_length=arguments.max_prompt_length,
        bos=arguments.bos,
        system_prompt=arguments.system,
        drop_bad_pairs=True,
    )


def preferences(arguments: argparse.Namespace) -> Iterator[str]:
    """The lines of the report."""
    if arguments.max_prompt_length >= arguments.max_length:
        raise ValueError(
            f"--max-prompt-length {arguments.max_prompt_length} must be below --max-length {arguments.max_length}"
        )
    pairs, base_pairs = (read_pairs(model_dir, arguments) for model_dir in (arguments.model, arguments.base))
    if [pair_key(pair) for pair in pairs] != [pair_key(pair) for pair in base_pairs]:
        raise ValueError(
            f"{arguments.model} and {arguments.base} make different tokens of the same pairs: a model can only be "
            "compared with a base that has its tokenizer and chat template"
        )
    logps = []
    for model_dir in (arguments.model, arguments.base):
        model = load_model(model_dir, *place(arguments.device, arguments.dtype))[0]
        logps.append(score(model, pairs, arguments.micro_batch_tokens))
        del model  # before the next one is read
    four = (*logps[0].unbind(1), *logps[1].unbind(1))  # policy chosen, rejected, reference chosen, rejected: (P,) each
    metrics = preference_metrics(*four, arguments.beta) | {"loss": dpo_loss(*four, arguments.beta)}
    mean = {name: values.mean().item() for name, values in metrics.items()}

    yield ", ".join(f"{count:,} {what}" for what, count in pairs.counts.items())
    explained = {
        "rewards/accuracies": "of the pairs: the chosen answer has the higher reward; a tie counts as wrong",
        "rewards/margins": "nats: reward of the chosen - reward of the rejected answer",
        "rewards/chosen": "nats: beta * log(model / base)",
        "rewards/rejected": "nats",
        "loss": f"nats: DPO at beta {arguments.beta:g}; log 2 = 0.6931 where model = base",
    }
    for name, meaning in explained.items():
        yield f"{name:18}  {mean[name]:{'9.1%' if name == 'rewards/accuracies' else '9.4f'}}  {meaning}"


# --- the command line ----------------------------------------------------------------------------------------------


def positive(kind: type[float]) -> Callable[[str], float]:
    """An `argparse` type: a number above 0. (To the type system an int is a float.)"""

    def convert(text: str) -> float:
        if not 0 < (value := kind(text)) < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} must be above 0")
        return value

    convert.__name__ = kind.__name__  # for "invalid int value"
    return convert


def main(argv: list[str] | None = None) -> int:
    about = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(prog="python -m notus.evaluate", **about)
    commands = parser.add_subparsers(required=True, metavar="{exact-match,preferences}")
    common = model_arguments()

    command = commands.add_parser(
        "exact-match", parents=[common], **about, help="greedy answers against the correct ones"
    )
    command.set_defaults(report=exact_match)
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
    command.set_defaults(report=preferences)
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="the trained model")
    command.add_argument("--base", type=Path, required=True, metavar="DIR", help="what it was trained from")
    command.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="preference pairs")
    command.add_argument("--beta", type=positive(float), default=0.1, help="of the loss and the rewards (default: 0.1)")
    command.add_argument("--max-length", type=positive(int), default=1024, metavar="N", help="as in data.max_length")
    command.add_argument(
        "--max-prompt-length", type=positive(int), default=512, metavar="N", help="as in data.max_prompt_length"
    )
    command.add_argument(
        "--micro-batch-tokens", type=positive(int), default=16384, metavar="N", help="changes speed and memory only"
    )

    arguments = parser.parse_args(argv)
    try:
        for line in arguments.report(arguments):
            print(line)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
