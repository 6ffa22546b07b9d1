"""Greedy generation beside transformers' `generate`, on one random checkpoint and one batch.

    python benchmarks/generation.py [--hidden 512 --layers 8 --batch 16 --new-tokens 64 --rounds 3]

Both read the same weights in float32 and continue the same prompts of random length, with no stop token, so both make
batch * new_tokens tokens. transformers pads on the left. The two take turns, each in a process of its own. Printed are
tokens per second of CPU time (other processes then disturb less) and of wall time, and the peak of the resident memory.
The answers must be equal.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

VOCAB = 32000


def work(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, arguments.longest + 1, arguments.batch)
    prompts = [rng.integers(3, VOCAB, length).tolist() for length in lengths]
    if arguments.work == "notus":
        from notus.dims import MistralConfig
        from notus.generate import generate
        from notus.weights import load_weights, meta_model

        model = meta_model(MistralConfig.read(arguments.path)).requires_grad_(False)
        load_weights(model, arguments.path, torch.device("cpu"))

        def run(new_tokens: int) -> list[list[int]]:
            return generate(model, prompts, new_tokens, ())
    else:
        from tiny import hf_load

        twin = hf_load(arguments.path)
        twin.set_attn_implementation("sdpa")
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, -len(prompt) :], mask[i, -len(prompt) :] = torch.tensor(prompt), 1

        def run(new_tokens: int) -> list[list[int]]:
            out = twin.generate(
                ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                pad_token_id=0, use_cache=True,
            )  # fmt: skip
            return out[:, ids.shape[1] :].tolist()

    run(2)
    wall, cpu = time.perf_counter(), time.process_time()
    answers = run(arguments.new_tokens)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"wall": wall, "cpu": cpu, "gib": peak, "answers": answers}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"hidden": 512, "layers": 8, "batch": 16, "new_tokens": 64, "longest": 200, "rounds": 3, "threads": 1}
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--work", choices=("notus", "transformers"), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments)

    from tiny import save_checkpoint, tiny_config, tiny_model

    config = tiny_config(
        vocab_size=VOCAB, hidden_size=arguments.hidden, intermediate_size=3 * arguments.hidden, head_dim=64,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.hidden // 64,
        num_key_value_heads=arguments.hidden // 128, initializer_range=0.02,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(tiny_model(config, dtype=torch.float32), Path(folder))
        found: dict[str, list[dict]] = {"notus": [], "transformers": []}
        for _ in range(arguments.rounds):
            for name, rounds in found.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--work", name, "--path", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
    answers = [each["answers"] for rounds in found.values() for each in rounds]
    equal = sum(a == b for a, b in zip(answers[0], answers[-1], strict=True))
    tokens = arguments.batch * arguments.new_tokens
    print(f"{'':12}  tokens/s CPU time  tokens/s wall time  peak GiB   (medians of {arguments.rounds})")
    for name, rounds in found.items():
        wall, cpu, gib = (statistics.median(each[key] for each in rounds) for key in ("wall", "cpu", "gib"))
        print(f"{name:12}  {tokens / cpu:17.1f}  {tokens / wall:18.1f}  {gib:8.2f}")
    print(f"answers equal: {equal} of {arguments.batch}")


if __name__ == "__main__":
    main()
