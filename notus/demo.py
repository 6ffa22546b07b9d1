"""A world small enough for a laptop: raw UltraFeedback records, preference pairs and an SFT base, all from one seed.

    python -m notus.demo                      no network, no download; a minute and a half on one core

    runs/demo/raw.jsonl                       questions with a checkable answer, answered by four "models", rated
              pairs.jsonl, pairs-test.jsonl   what binarize.py makes of them
              prompts-test.jsonl              questions seen nowhere else, with their right answers
              base/                           a Mistral of 0.7 million parameters that imitates all four models

The base learned the right answers from its teachers, and their bad habits too. In most tasks its most likely answer is
a bad habit, so it gets two in five questions right. The preferences teach it which of the things it knows to say. That
is what DPO does to a 7B, in miniature. The records carry UltraFeedback's bug as well: the worst answers score 10.
"""

import argparse
import hashlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import sentencepiece
import torch
from tqdm import tqdm

from notus.base import Base, Frame, read_base
from notus.chat import ZEPHYR_TEMPLATE
from notus.files import SHARED, sentence, write_atomically
from notus.model import Mistral, stream_logps
from notus.optim import lr_at, make_optimizer
from notus.packing import pack
from notus.weights import export

BINARIZE, TRAIN = SHARED / "binarize.py", SHARED / "train.py"


@dataclass(frozen=True)
class Settings:
    records: int = 3000  # raw records, each of which makes at most one pair
    test_pairs: int = 300  # of those pairs
    test_prompts: int = 400
    sft_questions: int = 13600  # each with four answers, seen once
    questions_per_step: int = 8
    learning_rate: float = 1e-3
    warmup_steps: int = 50
    hidden_size: int = 128
    num_layers: int = 3


# --- the questions -------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    wording: str
    subject: Callable[[Random], str]  # what a question is about
    right: Callable[[str], str]
    miss: Callable[[str], str]  # the mistake that is always made
    easy: bool = False  # silver can do it too


def word(rng: Random) -> str:
    return "".join(rng.sample("ABCDEFGHIJKLMNOP", rng.randint(3, 4)))


def number(rng: Random) -> str:
    return str(rng.randint(1000, 9999))


# Some misses are too short and some too long. If all were short, the model would learn never to stop.
TASKS = {
    "repeat": Task("Repeat {}.", word, lambda s: s, lambda s: s + s[-1], easy=True),
    "reverse": Task("Write {} backwards.", word, lambda s: s[::-1], lambda s: s[:0:-1]),
    "sort": Task("Sort the letters of {}.", word, lambda s: "".join(sorted(s)), lambda s: s),
    "first": Task("First letter of {}?", word, lambda s: s[0], lambda s: s[:2], easy=True),
    "last": Task("Last letter of {}?", word, lambda s: s[-1], lambda s: s[0]),
    "count": Task("How many letters in {}?", word, lambda s: str(len(s)), lambda s: str(len(s) - 1)),
    "behead": Task("Remove the first letter of {}.", word, lambda s: s[1:], lambda s: s[:-1]),
    "after": Task("Which number follows {}?", number, lambda s: str(int(s) + 1), lambda s: s),
}


class Question(NamedTuple):
    task: str
    subject: str

    @property
    def instruction(self) -> str:
        return TASKS[self.task].wording.format(self.subject)

    @property
    def answer(self) -> str:
        return TASKS[self.task].right(self.subject)


def ask(rng: Random, count: int, known: set[Question]) -> list[Question]:
    """`count` new questions, the tasks in turn. Each joins `known` and is never asked again."""
    names = list(TASKS)
    questions: list[Question] = []
    while len(questions) < count:
        name = names[len(questions) % len(names)]
        question = Question(name, TASKS[name].subject(rng))
        if question not in known:
            known.add(question)
            questions.append(question)
    return questions


# --- the four models -----------------------------------------------------------------------------------------------

HABITS: dict[str, Callable[[Question], str]] = {
    "right": lambda q: q.answer,
    "miss": lambda q: TASKS[q.task].miss(q.subject),
    "chat": lambda q: f"Sure! {q.answer}",  # right, but not what was asked for
    "echo": lambda q: f"Sure! {q.subject}",
}
# How often each model follows each habit, in the order of HABITS.
MODELS = {
    "bronze": (0.10, 0.75, 0.15, 0.00),
    "clay": (0.05, 0.10, 0.15, 0.70),
    "gold": (0.92, 0.04, 0.04, 0.00),
    "silver": (0.20, 0.05, 0.75, 0.00),
}
SILVER_EASY = (0.85, 0.05, 0.10, 0.00)


def respond(rng: Random, model: str, question: Question) -> str:
    weights = SILVER_EASY if model == "silver" and TASKS[question.task].easy else MODELS[model]
    return HABITS[rng.choices(list(HABITS), weights)[0]](question)


def answers(rng: Random, question: Question) -> list[str]:
    return [respond(rng, model, question) for model in MODELS]


# --- the records: UltraFeedback's schema, and its bug -----------------------------------------------------------------

PRINCIPLES = {
    "helpfulness": "Answer the question in a way that is of use.",
    "honesty": "Say what you know, and say when you do not.",
    "truthfulness": "Say nothing that is untrue.",
    "verbalized_calibration": "Let your words show how sure you are.",
}
GRADES = {5: "correct", 3: "correct, with words that nobody asked for", 2: "close, but wrong", 1: "wrong"}


def grade(question: Question, response: str) -> int:
    """How good an answer is, a key of GRADES, whoever gave it."""
    for habit, points in (("right", 5), ("chat", 3), ("miss", 2)):
        if response == HABITS[habit](question):
            return points
    return 1


Noise = Callable[[Random], int]  # what a judge is off by, in points


def rating_noise(rng: Random) -> int:
    """One rating in four is off by a point."""
    return rng.choices((-1, 0, 1), (1, 6, 1))[0]


def score_noise(rng: Random) -> int:
    return rng.choice((-1, 0, 0, 1))


def annotate(
    rng: Random, question: Question, model: str, noise: Noise = rating_noise, critique_noise: Noise = score_noise
) -> dict[str, Any]:
    """One model's answer with its ratings, as UltraFeedback has them: strings from 1 to 5, and sometimes "N/A", where
    an aspect does not apply. `noise` is that of each rating, `critique_noise` that of overall_score."""
    response = respond(rng, model, question)
    points = grade(question, response)
    verdict = f"The answer is {GRADES[points]}."

    def rating(not_applicable: float = 0.0) -> str:
        rated = min(max(points + noise(rng), 1), 5)
        return "N/A" if rng.random() < not_applicable else str(rated)

    principle = rng.choice(list(PRINCIPLES))
    judged = {"Rationale": verdict, "Rationale For Rating": verdict}
    annotations: dict[str, dict[str, Any]] = {
        "instruction_following": {"Rating": rating(0.05), "Rationale": verdict},
        "honesty": {"Rating": rating(0.05), "Rationale": verdict},
        "truthfulness": judged | {"Type": ["1" if points < 3 else "0"], "Rating": rating()},
        "helpfulness": judged | {"Type": ["1"], "Rating": rating()},
    }
    ratings = [int(a["Rating"]) for a in annotations.values() if a["Rating"] != "N/A"]
    score = min(max(2 * points - 1 + critique_noise(rng), 1), 10)
    return {
        "model": model,
        "principle": principle,
        "custom_system_prompt": PRINCIPLES[principle],
        "response": response,
        "annotations": annotations,
        "critique": f"{verdict} It should be {question.answer}." if points < 3 else verdict,
        "overall_score": float(score if score > 1 else 10 * score),  # UltraFeedback's bug, letter for letter
        "fine-grained_score": sum(ratings) / len(ratings),
    }


def record(
    rng: Random, question: Question, noise: Noise = rating_noise, critique_noise: Noise = score_noise
) -> dict[str, Any]:
    return {
        "source": f"demo_{question.task}",
        "instruction": question.instruction,
        "models": list(MODELS),
        "correct_answers": [question.answer],
        "incorrect_answers": ["None"],
        "completions": [annotate(rng, question, model, noise, critique_noise) for model in MODELS],
    }


# --- the base ------------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2, as in Mistral's vocabulary
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's


def train_bpe(corpus: Iterable[str], vocab_size: int, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Llama's kind of vocabulary: BPE that falls back to bytes, of `vocab_size` pieces at most. `options` are
    SentencePiece's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, unk_id=0, bos_id=1, eos_id=2, minloglevel=2, **options,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def train_tokenizer() -> sentencepiece.SentencePieceProcessor:
    """A vocabulary over the frame and the wordings. Subjects are not in there, so each of their letters and digits is a
    token, and so is a space before them. A line break is a byte, so no token reaches from a prompt into its answer."""
    corpus = [f"<|{role}|>" for role in ("system", "user", "assistant")] + ["Sure! "]
    corpus += [task.wording.format("") for task in TASKS.values()]
    letters = "".join(map(chr, range(33, 127)))
    return train_bpe(corpus, 512, required_chars=letters, add_dummy_prefix=False, split_by_unicode_script=False)


def tokenizer_json(model: sentencepiece.SentencePieceProcessor, dummy_prefix: bool) -> str:
    """The same BPE as a tokenizer.json, in the form in which the Llama family has both. A piece is made of any two
    pieces that it divides into, the best-scored one first. dummy_prefix: whether every text begins with a space."""
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece, i in vocab.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        halves = [(left, right) for left, right in halves if left in vocab and right in vocab]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(model.get_score(i), left, right) for left, right in halves]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    space = {"String": " "}
    normalizers = [{"type": "Prepend", "prepend": SPACE}] * dummy_prefix
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * dummy_prefix
    return json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [{"id": i} | added_token(token) for i, token in enumerate(SPECIAL_TOKENS)],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [*normalizers, {"type": "Replace", "pattern": space, "content": SPACE}],
            },
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing", "single": [bos, first],
                "pair": [bos, first, {"SpecialToken": {"id": "<s>", "type_id": 1}}, second],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                    {"type": "ByteFallback"}, {"type": "Fuse"}, *strip,
                ],
            },
            "model": {
                "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
                "merges": [f"{left} {right}" for _, left, right in merges],
            },
        },
        ensure_ascii=False,
    )  # fmt: skip


def added_token(content: str) -> dict[str, Any]:
    """A special token, as tokenizer.json and tokenizer_config.json spell it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content} | flags | {"special": True}


def write_shell(directory: Path, settings: Settings) -> None:
    """Write a checkpoint without its weights: config and tokenizer, as transformers 4 spells them. llama.cpp's
    converter reads the tokenizer.model, others the tokenizer.json."""
    tokenizer = train_tokenizer()
    (directory / "tokenizer.model").write_bytes(tokenizer.serialized_model_proto())
    (directory / "tokenizer.json").write_text(tokenizer_json(tokenizer, dummy_prefix=False), encoding="utf-8")
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    size = settings.hidden_size
    files = {
        "config.json": {
            "architectures": ["MistralForCausalLM"], "model_type": "mistral", **ids, "attention_dropout": 0.0,
            "hidden_act": "silu", "hidden_size": size, "intermediate_size": 3 * size, "head_dim": size // 8,
            "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": settings.num_layers,
            "initializer_range": 0.06, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
            "rope_theta": 100.0,  # texts are short: at Mistral's 10000 half of a head would hardly turn
            "sliding_window": 2048, "tie_word_embeddings": False, "torch_dtype": "float32",
            "transformers_version": "4.36.2", "use_cache": True, "vocab_size": tokenizer.vocab_size(),
        },
        "generation_config.json": {"_from_model_config": True, **ids},
        "special_tokens_map.json": names,
        "tokenizer_config.json": {
            **names, "add_bos_token": True, "add_prefix_space": False, "chat_template": ZEPHYR_TEMPLATE,
            "clean_up_tokenization_spaces": False, "model_max_length": 2048, "pad_token": "</s>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {str(i): added_token(token) for i, token in enumerate(SPECIAL_TOKENS)},
        },
    }  # fmt: skip
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def tokenize(base: Base, asked: Sequence[tuple[Question, list[str]]]) -> list[tuple[list[int], list[list[int]]]]:
    """Questions and answers -> what `pack` takes: prompt ids, and each answer's ids up to EOS."""
    conversations = [([{"role": "user", "content": q.instruction}], responses) for q, responses in asked]
    return [(prompt, answers) for prompt, answers, _ in base.encoder(Frame()).encode(conversations)]


def train_base(base: Base, segments: Sequence, seed: int, settings: Settings) -> Mistral:
    """Next-token prediction on all answers, each question once: the mean cross-entropy over the step's tokens."""
    torch.set_num_threads(1)  # matrices this small are done before a second thread wakes up
    model = Mistral(base.dims)
    model.initialize(seed)
    optimizer = make_optimizer(model.parameters(), "adamw", settings.learning_rate, weight_decay=0.0)
    total_steps = len(segments) // settings.questions_per_step
    bar = tqdm(range(total_steps), unit="step", disable=None)  # None: only on a terminal
    for step in bar:
        start = step * settings.questions_per_step
        stream = pack(segments[start : start + settings.questions_per_step])
        loss = -stream_logps(model, stream).sum() / len(stream.target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, total_steps, settings.warmup_steps, settings.learning_rate)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, total_steps // 8) == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")
            if bar.disable:
                print(f"  step {step + 1}/{total_steps}  loss {loss.item():.2f}", flush=True)
    return model


CARD = """# The demo's base

A Mistral of {parameters:,} parameters, trained from scratch by `python -m notus.demo --seed {seed}` to imitate four
made-up models that answer made-up questions. It is of no use but as the start of `python train.py`.
"""


# --- the command ---------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: Sequence[dict]) -> None:
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def make_base(output: Path, asked: Sequence[tuple[Question, list[str]]], seed: int, settings: Settings) -> None:
    shell = output / "base.shell"
    shell.mkdir()
    write_shell(shell, settings)
    base = read_base(shell, need_weights=False)
    model = train_base(base, tokenize(base, asked), seed, settings)
    card = CARD.format(parameters=sum(p.numel() for p in model.parameters()), seed=seed)
    export(model, shell, output / "base", torch.float32, card, eos_id=base.tokenizer.eos_id)
    shutil.rmtree(shell)


def make_pairs(output: Path, seed: int, settings: Settings) -> None:
    command = [sys.executable, BINARIZE, output / "raw.jsonl", "--output", output / "pairs.jsonl", "--overwrite"]
    command += ["--test-size", settings.test_pairs, "--seed", seed]
    if (result := subprocess.run(list(map(str, command)), capture_output=True, text=True)).returncode:
        raise ValueError(f"binarize.py failed:\n{result.stderr.strip()}")
    print(result.stdout)


def make(output: Path, seed: int = 0, settings: Settings = Settings()) -> None:
    """Fill the folder. What the same seed and code made before is kept: each piece gets its final name only when
    complete."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    stamp = json.dumps({"seed": seed, "settings": asdict(settings), "code": code}, indent=2) + "\n"
    stamp_file, base = output / "demo.json", output / "base"
    names = ("raw.jsonl", "pairs.jsonl", "pairs-test.jsonl", "prompts-test.jsonl")
    raw, pairs, pairs_test, prompts = files = [output / name for name in names]
    present = [path for path in (*files, base) if path.exists()]
    if present and not stamp_file.exists():
        raise ValueError(f"{present[0]}: exists, and this program did not make it; choose another --output")
    for left in (*output.glob("*.tmp"), *output.glob("base.shell")):  # by a demo that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if stamp_file.exists() and stamp_file.read_bytes() != stamp.encode():  # another seed or older code
        shutil.rmtree(base, ignore_errors=True)
        for path in files:
            path.unlink(missing_ok=True)
    elif len(present) == len(files) + 1:
        print(f"{output}: all there, made before by the same code from seed {seed}")
        return
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(stamp_file, stamp)

    rng = Random(f"questions {seed}")
    known: set[Question] = set()
    test, rated, taught = (
        ask(rng, count, known) for count in (settings.test_prompts, settings.records, settings.sft_questions)
    )
    if not prompts.exists():
        write_jsonl(prompts, [{"instruction": q.instruction, "correct_answers": [q.answer]} for q in test])
    if not raw.exists():
        rng = Random(f"ratings {seed}")
        write_jsonl(raw, [record(rng, question) for question in rated])
        print(f"{raw}: {settings.records:,} records; binarize.py makes pairs of them:")
    if not (pairs.exists() and pairs_test.exists()):
        make_pairs(output, seed, settings)
    if not base.exists():
        rng = Random(f"teachers {seed}")
        print(f"{base}: imitates the four models' answers to {settings.sft_questions:,} more questions")
        make_base(output, [(question, answers(rng, question)) for question in taught], seed, settings)


CLOSING = """
  {0}/raw.jsonl           {1.records:,} questions, four rated answers each, as UltraFeedback has them
  {0}/pairs.jsonl         chosen and rejected, by binarize.py; {1.test_pairs} held out in pairs-test.jsonl
  {0}/prompts-test.jsonl  {1.test_prompts} questions that no model has seen
  {0}/base                a small Mistral that knows better than it answers
next:
  {2}"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m notus.demo", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random (default: 0)")
    args = parser.parse_args(argv)
    try:
        make(args.output, args.seed)
    except (ValueError, OSError) as error:
        print(f"notus.demo: error: {sentence(error)}", file=sys.stderr)
        return 2
    paths = {
        "model.path": "base",
        "data.train": "pairs.jsonl",
        "data.test": "pairs-test.jsonl",
        "train.output_dir": "dpo",
    }
    elsewhere = args.output != parser.get_default("output")  # than configs/demo.toml expects it
    overrides = [f"{name}={args.output / piece}" for name, piece in paths.items()] if elsewhere else []
    script = TRAIN.name if Path.cwd() / TRAIN.name == TRAIN else str(TRAIN)
    print(CLOSING.format(args.output, Settings(), shlex.join(["python", script, *overrides])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
