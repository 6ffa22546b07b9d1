"""DPO, the whole recipe: torchrun --nproc-per-node 8 train.py configs/notus-7b-v1.toml [section.key=value ...]

Top to bottom: load the policy in shards, let it score every pair once before its first step (that is the reference
model), then step, evaluate and checkpoint, and export at the end. On the folder of an unfinished run it goes on by
itself. Without arguments it runs configs/demo.toml, for which `python -m notus.demo` makes data and a base model.
"""

import argparse
import fcntl
import json
import math
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from notus import config as configuration
from notus import distributed, weights
from notus.card import model_card
from notus.checkpoint import Checkpoints, Preempted, StopSignal
from notus.config import Config
from notus.data import ahead, batch, describe_counts, describe_pair, steps_per_epoch
from notus.distributed import World, from_rank_zero, full_tensor, on_rank_zero, sum_over_ranks
from notus.inputs import Inputs, read_inputs
from notus.losses import dpo_loss, preference_metrics
from notus.metrics import Console, MetricsLog, duration, environment, peak_memory_gib
from notus.model import pair_logps
from notus.optim import lr_at, make_optimizer
from notus.packing import Stream, deal, pack_pairs, to_device
from notus.plan import GIB, describe_cost, forward_flops, least_recomputation, memory_arguments, peak_flops
from notus.plot import plot
from notus.reference import ReferenceCache, cache_header, check_same, reference_logps, score_pairs, verify
from notus.weights import write_atomically

METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """An output folder that is ours, new or to be gone on with."""

    output: Path
    facts: dict  # environment.json
    checkpoints: Checkpoints
    manifest: dict | None  # of the checkpoint to start from
    stop: StopSignal

    def status(self, world: World, state: str, step: int | None = None) -> None:
        """`step`: the last one that a checkpoint holds, or is about to; None keeps what was written before."""
        path = self.output / "status.json"
        if world.rank == 0:
            if step is None:
                step = json.loads(path.read_text())["step"] if path.is_file() else 0
            write_atomically(path, json.dumps({"state": state, "step": step}) + "\n")


def train(config: Config, inputs: Inputs, world: World, run: Run) -> None:
    setup, output = config.train, run.output
    pairs, held_out = inputs.train, inputs.test
    epoch_steps = steps_per_epoch(len(pairs), setup.pairs_per_step)
    total_steps = epoch_steps * setup.num_train_epochs
    first_step = run.manifest["step"] if run.manifest else 0
    started = time.monotonic()
    say = print if world.rank == 0 else lambda *_: None
    say(banner(config, inputs, world, total_steps, first_step))

    # --- the policy, in shards ---
    compute_dtype = getattr(torch, setup.compute_dtype)
    model = weights.meta_model(inputs.dims)
    model.model.recompute = recomputation(config, inputs, world)
    if setup.compile:
        model.model.compile_layers()
    distributed.shard(model, model.model.layers, world, compute_dtype, config.distributed.cpu_offload)
    host = torch.device("cpu")
    weights.load_weights(model, config.model.path, host if config.distributed.cpu_offload else world.device)

    # --- the reference: the policy itself, before its first step and before any checkpoint is loaded ---
    header = cache_header(run.facts["model_sha256"], inputs.dims, setup.compute_dtype)
    cache = ReferenceCache(config.reference.cache_dir, header, world.rank)
    references = []
    for name, pair_set in (("pairs", pairs), ("held-out pairs", held_out)):
        with Console(len(pair_set), enabled=world.rank == 0, unit="pair", every=0.1) as console:

            def progress(done: int, console: Console = console) -> None:
                console.step(min(done * world.size, console.total_steps), {})
                if sum_over_ranks(torch.tensor(int(run.stop.received))) > 0:
                    raise Preempted(first_step)

            budget = setup.micro_batch_tokens
            reference, computed = reference_logps(model, pair_set, cache, world, budget, progress)
        found = len(pair_set) - computed
        say(f"reference   {computed:,} {name} scored, {found:,} found in {cache.directory}")
        if found:
            verify(model, pair_set, reference, world, budget, compute_dtype)
        references.append(reference)
    reference, held_out_reference = references

    # --- where the run stands ---
    optimizer = make_optimizer(model.parameters(), setup.optimizer, setup.learning_rate, setup.weight_decay)
    if run.manifest:
        run.checkpoints.load(run.manifest, model, optimizer)
    warmup_steps = math.ceil(setup.warmup_ratio * total_steps)
    peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    log = MetricsLog(output / "metrics.jsonl", enabled=world.rank == 0, last_step=first_step or None)
    evaluations = [record for record in log.kept if "eval_loss" in record]
    console = Console(total_steps, enabled=world.rank == 0, first_step=first_step, every=0.01)

    def evaluate(step: int) -> None:
        began = time.monotonic()
        totals = torch.zeros(len(METRICS), dtype=torch.float64, device=world.device)
        score_pairs(
            model, held_out, world, setup.micro_batch_tokens,
            lambda rows, policy: totals.add_(sums(policy, held_out_reference[rows].to(world.device), config)[1]),
        )  # fmt: skip
        means = (sum_over_ranks(totals) / len(held_out)).tolist()
        evaluation = {f"eval_{name}": mean for name, mean in zip(METRICS, means, strict=True)}
        evaluation["eval_runtime"] = round(time.monotonic() - began, 3)
        evaluations.append(evaluation)
        log.write({"step": step, "epoch": step / epoch_steps, **evaluation})
        console.say(
            f"held out    step {step}  loss {evaluation['eval_loss']:.4f}  "
            f"acc {evaluation['eval_rewards/accuracies']:.3f}  margin {evaluation['eval_rewards/margins']:.3f}"
        )

    if len(held_out) and first_step == 0:
        evaluate(0)

    # --- the loop ---
    run.status(world, "running", first_step)
    skipped_in_a_row = 0
    # Since the last line of the log: sums of METRICS, pairs and stream tokens; FLOPs; and when that was.
    window = np.array(run.manifest["window"]) if run.manifest else np.zeros(len(METRICS) + 2)
    flops, since = 0.0, time.monotonic()
    pair_flops = 3 * forward_flops(inputs.dims, pairs.lengths)  # (P,) forward and backward

    def prepared(step: int) -> tuple[int, np.ndarray, list[tuple[np.ndarray, Stream]]]:
        """The pairs of a step, and this rank's micro-batches: which of them (none, if there are fewer than ranks), and
        their stream."""
        rows = batch(len(pairs), setup.pairs_per_step, setup.seed, step)
        plan = deal(pairs.num_tokens[rows], pair_flops[rows], world.size, setup.micro_batch_tokens)[world.rank]
        return step, rows, [(rows[part], pack_pairs([pairs[i] for i in rows[part]])) for part in plan]

    for step, rows, micro_batches in ahead(map(prepared, range(first_step, total_steps))):
        learning_rate = lr_at(step, total_steps, warmup_steps, setup.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # Sums of METRICS over pairs, and how many ranks were asked to stop.
        totals = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=world.device)
        for members, stream in micro_batches:
            policy = pair_logps(model, stream.to(world.device))  # (P, 2)
            reference_logps_ = to_device(reference[members], world.device)  # (P, 2)
            if step == 0:
                check_same(pairs, members, policy, reference_logps_, compute_dtype)
            losses, metric_sums = sums(policy, reference_logps_, config)
            (losses.sum() / len(rows)).backward()  # over the pairs of the whole step, whatever the micro-batch
            totals[:-1] += metric_sums
        totals[-1] = run.stop.received
        grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), setup.max_grad_norm))

        # All that is known of the step, on every rank: the one place where the host waits for the device.
        *totals, stops, grad_norm = [*sum_over_ranks(totals).tolist(), grad_norm.item()]
        done = step + 1
        finite = math.isfinite(totals[0]) and math.isfinite(grad_norm)
        if finite:  # what is not never reaches the weights
            optimizer.step()
            window += [*totals, len(rows), pairs.num_tokens[rows].sum()]
            flops += pair_flops[rows].sum()
            skipped_in_a_row = 0
        else:
            skipped_in_a_row += 1
            places = [pairs[i].where for i in rows]
            log.write({"step": done, "epoch": done / epoch_steps, "skipped_pairs": places})
            console.say(f"skipped     step {done}: loss or gradient is not finite; its pairs are in metrics.jsonl")
        optimizer.zero_grad()

        if finite and (done % setup.log_steps == 0 or done == total_steps):
            *sizes, num_pairs, num_tokens = window.tolist()
            seconds = time.monotonic() - since
            metrics = {name: size / num_pairs for name, size in zip(METRICS, sizes, strict=True)}
            metrics |= {"grad_norm": grad_norm, "learning_rate": learning_rate}
            metrics |= {"tokens_per_second": num_tokens / seconds, "memory_gib": peak_memory_gib(world.device)}
            if peak:
                metrics["mfu"] = flops / seconds / (peak * world.size)
            log.write({"step": done, "epoch": done / epoch_steps, **metrics})
            console.step(done, metrics)
            window, flops, since = np.zeros_like(window), 0.0, time.monotonic()

        paused = time.monotonic()
        if len(held_out) and (done % setup.eval_steps == 0 or done == total_steps):
            evaluate(done)
        hopeless = skipped_in_a_row >= setup.max_skipped_steps
        if not hopeless and (done % setup.save_steps == 0 or done == total_steps or stops):
            facts = {"identity": run.facts["identity"], "window": window.tolist()}
            stall = run.checkpoints.save(model, optimizer, done, facts)
            log.write({"step": done, "checkpoint_stall_seconds": round(stall, 3)})
            run.status(world, "running", done)
        since += time.monotonic() - paused
        if hopeless:
            run.checkpoints.wait()
            raise FloatingPointError(
                f"loss or gradient was not finite in {skipped_in_a_row} steps in a row, up to {done}"
            )
        if stops and done < total_steps:
            run.checkpoints.wait()
            raise Preempted(done)
    console.close()
    run.checkpoints.wait()

    # --- the result ---
    last = evaluations[-1] if evaluations else {}
    card = model_card(config, run.facts, last)
    weights.export(model, config.model.path, output / "final", getattr(torch, setup.export_dtype), card, world.rank)
    log.close()
    if world.rank == 0:
        seconds = time.monotonic() - started
        first = evaluations[0] if evaluations else {}
        result = {"steps": total_steps, "seconds": round(seconds, 1), "first": first, "last": last}
        write_atomically(output / "summary.json", json.dumps(result, indent=1) + "\n")
        say(summary(config, first, last, total_steps, seconds))
    run.status(world, "finished", total_steps)


def sums(policy: Tensor, reference: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """policy, reference (P, 2) -> losses (P,), with gradient, and the sum over pairs of each of METRICS, without."""
    logps = (*policy.unbind(1), *reference.unbind(1))
    losses = dpo_loss(*logps, config.dpo.beta, config.dpo.label_smoothing)
    values = {"loss": losses.detach(), **preference_metrics(*logps, config.dpo.beta)}
    return losses, torch.stack([values[name].double().sum() for name in METRICS])


def recomputation(config: Config, inputs: Inputs, world: World) -> str:
    """train.activation_checkpointing, with `auto` made one of model.RECOMPUTE."""
    if config.train.activation_checkpointing != "auto":
        return config.train.activation_checkpointing
    if world.device.type == "cpu":
        return "none"
    memory = torch.cuda.get_device_properties(world.device).total_memory / GIB
    return least_recomputation(memory, *memory_arguments(config, inputs.dims, world.size))


# --- the output folder -----------------------------------------------------------------------------------------------


def open_run(config: Config, inputs: Inputs, world: World, fresh: bool, held: ExitStack) -> Run:
    """A new folder, or that of an unfinished run of the same identity; ValueError, with what differs, for any other."""
    output = Path(config.train.output_dir)
    unfinished = from_rank_zero(world, lambda: claim(output, fresh, held))
    if unfinished:
        old = from_rank_zero(world, lambda: json.loads((output / "environment.json").read_text()))
    total_steps = steps_per_epoch(len(inputs.train), config.train.pairs_per_step) * config.train.num_train_epochs
    facts = from_rank_zero(world, lambda: environment([*config.data.train, *config.data.test])) | {
        "model_sha256": weights.digest(config.model.path, world, config.reference.cache_dir),
        "processes": world.size,
        "seed": config.train.seed,
        "train_pairs": len(inputs.train),
        "test_pairs": len(inputs.test),
        "steps": total_steps,
    }
    facts["identity"] = configuration.identity(config) | {
        "sha256 of data.train": [facts["data_sha256"][path] for path in config.data.train],
        "sha256 of data.test": [facts["data_sha256"][path] for path in config.data.test],
        "sha256 of model.path": facts["model_sha256"],
    }
    if unfinished:
        differs = [
            f"{name} was {old['identity'].get(name)!r} and is {value!r}"
            for name, value in json.loads(json.dumps(facts["identity"])).items()
            if old["identity"].get(name) != value
        ]
        if differs:
            raise ValueError(
                f"{output}: holds an unfinished run of another kind: {'; '.join(differs)}. "
                "Name another train.output_dir, or begin anew with --fresh"
            )

    def write_papers() -> None:
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "environment.json", json.dumps(facts, indent=1) + "\n")
        write_atomically(output / "config.toml", configuration.to_toml(config))

    on_rank_zero(world, write_papers)
    say = print if world.rank == 0 else lambda *_: None
    timeout = config.distributed.timeout_minutes
    checkpoints = Checkpoints(output / "checkpoints", config.train.keep_checkpoints, world, say, timeout)
    return Run(output, facts, checkpoints, checkpoints.find() if unfinished else None, StopSignal())


def find_run(output: Path, fresh: bool) -> bool:
    """Whether `output` holds an unfinished run; with `fresh`, which moves it aside, any run will do. ValueError if it
    holds anything else, or if the run is finished. What a kill leaves of a run's first moment is nothing."""
    nothing = {"run.lock", "environment.json.tmp"}
    if not output.exists() or (output.is_dir() and {path.name for path in output.iterdir()} <= nothing):
        return False
    if not (output / "environment.json").is_file():
        raise ValueError(f"{output}: is not empty, and holds no run; name another train.output_dir")
    status = output / "status.json"
    if not fresh and status.is_file() and json.loads(status.read_text())["state"] == "finished":
        raise ValueError(f"{output}: holds a finished run; name another train.output_dir, or begin anew with --fresh")
    return True


def claim(output: Path, fresh: bool, held: ExitStack) -> bool:
    """Make `output` ours, an old run in it moved aside if `fresh`; whether there is a run to go on with. Two processes
    in one folder (a requeued job beside its old self) would spoil each other's files: ValueError for the second."""
    found = find_run(output, fresh)
    output.mkdir(parents=True, exist_ok=True)
    lock = held.enter_context((output / "run.lock").open("a"))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until closed; a killed process lets go as well
    except BlockingIOError:
        raise ValueError(f"{output}: another process is at work in it") from None
    if not (found and fresh):
        return found
    aside = output.with_name(f"{output.name}.before-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    output.replace(aside)
    print(f"the run in {output} was moved to {aside}")
    return claim(output, False, held)


# --- what the run says of itself -------------------------------------------------------------------------------------


def banner(config: Config, inputs: Inputs, world: World, total_steps: int, first_step: int) -> str:
    layers, rest = inputs.dims.num_hidden_layers, inputs.dims.hidden_size
    where = f"{world.size} x {torch.cuda.get_device_name()}" if world.device.type == "cuda" else f"{world.size} x CPU"
    lines = [
        f"model       {config.model.path}: {layers} layers x {rest}, {config.train.compute_dtype} on {where}",
        f"train       {', '.join(config.data.train)}: {describe_counts(inputs.train.counts)}",
        f"steps       {total_steps:,} of {config.train.pairs_per_step} pairs, {config.train.num_train_epochs} epochs; "
        f"beta {config.dpo.beta}, {config.train.optimizer}, peak learning rate {config.train.learning_rate}",
    ]
    if len(inputs.test):
        lines.insert(2, f"held out    {', '.join(config.data.test)}: {describe_counts(inputs.test.counts)}")
    if first_step:
        lines.append(f"resuming    after step {first_step:,}")
    return "\n".join(lines)


def summary(config: Config, first: dict, last: dict, total_steps: int, seconds: float) -> str:
    output = Path(config.train.output_dir)
    lines = [f"\ndone: {total_steps:,} steps in {duration(seconds)}"]
    if last:
        names = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
        changes = (f"{name} {first[key]:.3f} -> {last[key]:.3f}" for name, key in names.items())
        lines.append(f"  held out  {'   '.join(changes)}")
    try:
        curves = str(plot(output))
    except (ImportError, OSError) as error:
        curves = f"not drawn: {error}"
    lines += [
        f"  model     {output / 'final'}  (Hugging Face layout, {config.train.export_dtype})",
        f"  metrics   {output / 'metrics.jsonl'}",
        f"  curves    {curves}",
        "next:",
        f"  python -m notus.generate --model {output / 'final'}",
    ]
    if last:
        compare = f"--model {output / 'final'} --base {config.model.path} --data {' '.join(config.data.test)}"
        lines.append(f"  python -m notus.evaluate preferences {compare}")
    return "\n".join(lines)


def dry_run(config: Config, inputs: Inputs, num_gpus: int) -> str:
    return (
        f"train       {describe_counts(inputs.train.counts)}\n"
        f"held out    {describe_counts(inputs.test.counts) if len(inputs.test) else 'none'}\n"
        f"{describe_cost(config, inputs.dims, inputs.train.lengths, inputs.test.lengths, num_gpus)}\n\n"
        f"the first pair, {inputs.train[0].where}:\n"
        f"{describe_pair(inputs.train[0], inputs.tokenizer)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failure, 2 bad input, 75 preempted (asked to stop, and can go on)."""
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, epilog=configuration.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    default = Path(__file__).parent / "configs" / "demo.toml"
    parser.add_argument("config", nargs="?", default=str(default), help="a TOML file (default: configs/demo.toml)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--fresh", action="store_true", help="move what is in train.output_dir aside and begin anew")
    parser.add_argument("--print-config", action="store_true", help="print all settings as TOML and stop")
    parser.add_argument("--dry-run", action="store_true", help="check data and tokenizer, print the cost, and stop")
    parser.add_argument("--gpus", type=int, metavar="N", help="for --dry-run: GPUs to plan for (torchrun's, else 8)")
    argv = sys.argv[1:] if argv is None else argv
    args, extra = parser.parse_known_args(argv)
    given = {*args.overrides, *extra}
    if "=" in args.config:  # no file given, only settings
        given.add(args.config)
        args.config = str(default)
    settings = [argument for argument in argv if argument in given]  # in their order: the last one wins

    def fail(error: Any, code: int) -> int:
        if code == 1 or distributed.rank() == 0:  # bad input is the same on every rank
            print(f"train.py: error: {error}", file=sys.stderr, flush=True)
        return code

    with ExitStack() as held:  # the process group, and the claim on the output folder
        try:
            config = configuration.load(args.config, settings)
            if args.print_config:
                print(configuration.to_toml(config), end="")
                return 0
            find_run(Path(config.train.output_dir), args.fresh)
            inputs = read_inputs(config, need_weights=not args.dry_run)
            if args.dry_run:
                print(dry_run(config, inputs, args.gpus or distributed.world_size() or 8))
                return 0
            held.callback(distributed.stop)
            parallel = config.distributed
            world = distributed.start(config.train.device, parallel.replicate, parallel.timeout_minutes)
            run = open_run(config, inputs, world, args.fresh, held)
        except ValueError as error:
            return fail(error, 2)
        try:
            train(config, inputs, world, run)
            return 0
        except Preempted as preempted:
            (step,) = preempted.args
            run.status(world, "preempted", step)
            if world.rank == 0:
                print(f"stopped after step {step:,}, as asked; the same command goes on from there", flush=True)
            return 75
        except Exception as error:
            run.status(world, "failed")
            silent = distributed.silent_ranks() if world.size > 1 else ""
            fail(f"rank {world.rank}: {silent or error}", 1)
            raise


if __name__ == "__main__":
    sys.exit(main())
