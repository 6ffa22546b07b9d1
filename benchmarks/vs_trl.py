"""notus and TRL's DPOTrainer side by side: the same checkpoint, pairs, order and settings, the same losses.

    pip install -e .[bench]
    OMP_NUM_THREADS=2 python benchmarks/vs_trl.py      ten minutes on a CPU, in float32; on a GPU in bfloat16

TRL on a CPU: `shipped`, all pairs of a step in one batch, which pads and gives every position to the language model
head; `kept`, the same with freed memory kept for the next step, as notus does it by itself on a CPU; and `strongest`,
the fastest found: memory kept, one pair a micro-batch, accumulated, and the head on completion rows only, in tiles of
256 (`run_trl` replaces two names in its modules). On a GPU TRL selects these rows by itself: `shipped`; `single`, one
pair a micro-batch; `liger`, with Liger's kernels for norms, rotary positions and SwiGLU; `inductor`, with
torch_compile. `compiled` is notus with train.compile.

All with the reference precomputed, no gradient checkpointing, no dropout. Every run is a process of its own, and rounds
alternate between the trainers; a ratio is the median over rounds of the ratio within a round. Steps are timed from
one's end to the next one's, data loading included; the first two are left out, and the median of the others counts. The
reference pass is timed as a whole: notus's with its cache, TRL's without.

Exits with 1 if a loss of any step differs by more than 1e-3 (in bfloat16 0.05: each rounds elsewhere).
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import torch
from step import BETA, LEARNING_RATE, LEFT_OUT, MAX_GRAD_NORM, SEED, draw_pairs, markdown, run_steps, shape

from notus import distributed, weights
from notus.dims import MistralConfig
from notus.metrics import peak_memory_gib
from notus.model import Mistral
from notus.reference import ReferenceCache, cache_header, reference_logps
from notus.tokens import PairSet

TRAINERS = ("notus", "compiled", "shipped", "kept", "strongest", "single", "liger", "inductor")
DEFAULTS = {
    "cpu": {
        "shapes": ["bal", "tiny"],
        "peers": ("shipped", "kept", "strongest"),
        "pairs": 4,
        "scale": 0.25,
        "budget": 2048,
    },
    "cuda": {
        "shapes": ["7b:4"],
        "peers": ("compiled", "shipped", "single", "liger"),
        "pairs": 8,
        "scale": 1.0,
        "budget": 16384,
    },
}
TOLERANCE = {"cpu": 1e-3, "cuda": 0.05}


def write_checkpoint(directory: Path, dims: MistralConfig) -> None:
    """Random weights in Hugging Face layout. There is no tokenizer in it: see `word_tokenizer`."""
    config = asdict(dims) | {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    model = Mistral(dims)
    model.initialize(SEED)
    weights.write_weights(model, directory, torch.float32, rank=0, max_shard_bytes=5_000_000_000)


def run_notus(
    directory: Path, dims: MistralConfig, pairs: PairSet, arguments: argparse.Namespace, compile_layers: bool
) -> dict:
    """As train.py does it, in the order of the file."""
    world = distributed.start(arguments.device)
    model, dtype = weights.meta_model(dims), torch.float32 if arguments.device == "cpu" else torch.bfloat16
    if compile_layers:
        model.model.compile_layers()
    distributed.shard(model, model.model.layers, world, dtype)
    weights.load_weights(model, directory, world.device)
    with tempfile.TemporaryDirectory() as cache_dir:
        cache = ReferenceCache(cache_dir, cache_header("", dims, dtype))
        start = time.perf_counter()
        reference, _ = reference_logps(model, pairs, cache, world, arguments.budget)
        reference_seconds = time.perf_counter() - start

    steps = np.arange(len(pairs)).reshape(-1, arguments.pairs)
    losses, ends = run_steps(model, pairs, steps, reference, world, arguments.budget)
    distributed.stop()
    return {"losses": losses, "ends": ends, "reference_seconds": reference_seconds}


def run_trl(directory: Path, dims: MistralConfig, pairs: PairSet, arguments: argparse.Namespace, peer: str) -> dict:
    import trl.kernels.chunked_logprob
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    micro_batch, on_cpu = 1 if peer in ("strongest", "single") else arguments.pairs, arguments.device == "cpu"
    if peer != "shipped" and on_cpu:
        distributed.keep_freed_memory()
    if peer == "strongest" and on_cpu:
        trl.kernels.chunked_logprob.TOKEN_CHUNK_SIZE = 256  # instead of 4096
        trl.trainer.utils._use_triton = lambda _device: True  # asked only whether to select completion rows

    ends, losses, reference_times = [], [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_arguments, **_named):
            ends.append(time.perf_counter())

        def on_step_end(self, *_arguments, **_named):
            ends.append(time.perf_counter())

        def on_log(self, _args, _state, _control, logs, **_named):
            losses.extend([logs["loss"]] if "loss" in logs else [])

    class Trainer(DPOTrainer):
        def compute_ref_log_probs(self, *arguments):
            reference_times.append(time.perf_counter())
            logps = super().compute_ref_log_probs(*arguments)
            reference_times.append(time.perf_counter())
            return logps

    num_steps = len(pairs) // arguments.pairs
    with tempfile.TemporaryDirectory() as output_dir:
        config = DPOConfig(
            output_dir=output_dir, per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=arguments.pairs // micro_batch, num_train_epochs=1,
            learning_rate=LEARNING_RATE, lr_scheduler_type="linear", warmup_steps=math.ceil(0.1 * num_steps),
            optim="rmsprop", weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM, beta=BETA, max_length=1024,
            precompute_ref_log_probs=True, activation_checkpointing=False, disable_dropout=True,
            train_sampling_strategy="sequential", model_init_kwargs={"dtype": "float32"},
            bf16=not on_cpu, use_cpu=on_cpu, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
            use_liger_kernel=peer == "liger", torch_compile=peer == "inductor",
        )  # fmt: skip
        trainer = Trainer(
            model=str(directory), args=config, train_dataset=Dataset.from_list([as_text(pair) for pair in pairs]),
            processing_class=word_tokenizer(dims.vocab_size), callbacks=[Clock()],
        )  # fmt: skip
        for pair, row in zip(pairs, trainer.train_dataset, strict=True):
            ids = [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]]
            assert ids == [part.tolist() for part in pair[1:]], f"{pair.where}: TRL sees other tokens: {ids}"
        trainer.train()
    return {"losses": losses, "ends": ends, "reference_seconds": reference_times[-1] - reference_times[0]}


def as_text(pair) -> dict[str, str]:
    """Text that TRL turns into the very ids of the pair: it puts BOS in front and EOS at the end by itself."""
    prompt, chosen, rejected = (" ".join(f"w{i}" for i in part if i > 2) for part in pair[1:])
    return {"prompt": f"{prompt} ", "chosen": chosen, "rejected": rejected}


def word_tokenizer(vocab_size: int):
    """Id 17 is the word `w17`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def run(trainer: str, directory: Path, arguments: argparse.Namespace) -> dict:
    """One run, in this process."""
    name, dims = arguments.shapes[0]
    pairs = draw_pairs(arguments.pairs * arguments.steps, dims.vocab_size, arguments.scale)
    if trainer in ("notus", "compiled"):
        result = run_notus(directory, dims, pairs, arguments, trainer == "compiled")
    else:
        result = run_trl(directory, dims, pairs, arguments, trainer)
    seconds = np.diff(result["ends"])
    assert len(result["losses"]) == len(seconds) == arguments.steps
    return {
        "shape": name, "trainer": trainer, "losses": result["losses"],
        "pairs_per_second": arguments.pairs / np.median(seconds[LEFT_OUT:]),
        "reference_pairs_per_second": len(pairs) / result["reference_seconds"],
        "memory_gib": peak_memory_gib(torch.device(arguments.device)),
    }  # fmt: skip


def compare(shape_name: str, rounds: list[dict[str, dict]]) -> dict:
    """rounds: trainer -> run. What the table says of one shape, each number a median over rounds."""
    rows = {}
    for trainer in rounds[0]:
        runs = [one[trainer] for one in rounds]
        rows[trainer] = {key: median(r[key] for r in runs) for key in runs[0] if key.endswith(("second", "gib"))}
        for key in ("pairs_per_second", "reference_pairs_per_second"):
            ratios = [one["notus"][key] / one[trainer][key] for one in rounds]
            rows[trainer][key.replace("pairs_per_second", "ratio")] = median(ratios)
        rows[trainer]["largest_loss_difference"] = max(
            abs(a - b) for one in rounds for a, b in zip(one["notus"]["losses"], one[trainer]["losses"], strict=True)
        )
        rows[trainer]["last_loss"] = runs[0]["losses"][-1]
    return {"shape": shape_name, "rows": rows}


def table(result: dict) -> str:
    names = {"notus": "notus", "compiled": "notus, compiled"}
    rows = [{"name": names.get(name, f"TRL, {name}"), **row} for name, row in result["rows"].items()]
    columns = [
        ("", "{name}"), ("pairs/s", "{pairs_per_second:.2f}"), ("notus is", "{ratio:.2f}x"),
        ("reference pairs/s", "{reference_pairs_per_second:.2f}"), ("notus is", "{reference_ratio:.2f}x"),
        ("peak GiB", "{memory_gib:.2f}"), ("last loss", "{last_loss:.5f}"),
        ("differs at most", "{largest_loss_difference:.1e}"),
    ]  # fmt: skip
    return f"\n{result['shape']}\n\n{markdown(rows, columns)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="SHAPE", help="as step.py (default: bal and tiny)")
    parser.add_argument("--peers", nargs="+", choices=TRAINERS[1:])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, help="of the lengths (default: 0.25 on a CPU, 1 on a GPU)")
    parser.add_argument("--pairs", type=int, help="a step (default: 4 on a CPU, 8 on a GPU)")
    parser.add_argument("--budget", type=int, help="tokens of notus's micro-batches (default: 2048, on a GPU 16384)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--run", nargs=2, metavar=("TRAINER", "CHECKPOINT"), help="one run alone, by the parent process"
    )
    arguments = parser.parse_args()
    for name, value in DEFAULTS[arguments.device].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, [shape(one) for one in value] if name == "shapes" else value)
    if arguments.steps <= LEFT_OUT:
        parser.error(f"--steps is {arguments.steps}; the first {LEFT_OUT} do not count")
    if arguments.run:
        print(json.dumps(run(arguments.run[0], Path(arguments.run[1]), arguments)))
        return 0

    results = []
    quiet = {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment = os.environ | quiet
    for name, dims in arguments.shapes:
        rounds = []
        with tempfile.TemporaryDirectory() as directory:
            write_checkpoint(Path(directory), dims)
            environment["HF_HOME"] = directory  # and TRL's caches
            for number in range(arguments.rounds):
                rounds.append({})
                for trainer in ("notus", *arguments.peers):
                    command = [sys.executable, __file__, "--shapes", name, "--run", trainer, directory]
                    for setting in ("steps", "scale", "pairs", "budget", "device"):
                        command += [f"--{setting}", str(getattr(arguments, setting))]
                    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                    rounds[-1][trainer] = result = json.loads(done.stdout.splitlines()[-1])
                    print(
                        f"{name} round {number + 1} {trainer:10} {result['pairs_per_second']:.2f} pairs/s", flush=True
                    )
        results.append(compare(name, rounds))
    for result in results:
        print(table(result))
    print("\n" + json.dumps(results))
    worst = max(row["largest_loss_difference"] for result in results for row in result["rows"].values())
    tolerance = TOLERANCE[arguments.device]
    if not worst <= tolerance:
        print(f"vs_trl.py: error: losses differ by {worst:.1e}, more than {tolerance}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
