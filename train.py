"""DPO, the whole recipe: torchrun --nproc-per-node 8 train.py configs/notus-7b-v1.toml [section.key=value ...]

Top to bottom: read and check everything that can be wrong (`read_inputs`), then `train`: load the policy in shards, let
it score every pair once before its first step (that is the reference model), step, evaluate, export. Without arguments
it runs configs/demo.toml, for which `python -m notus.demo` makes data and a base model.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from notus import distributed, weights
from notus.card import model_card
from notus.chat import ChatTemplate, load_chat_template
from notus.config import Config, help_text, load, to_toml
from notus.data import Pair, PairSet, batch, describe_counts, describe_pair, largest_id, load_pairs, steps_per_epoch
from notus.distributed import World, full_tensor, on_rank_zero, sum_over_ranks
from notus.losses import dpo_loss, preference_metrics
from notus.metrics import Console, MetricsLog, duration, environment, peak_memory_gib, write_atomically
from notus.model import MistralConfig, pair_logps
from notus.optim import lr_at, make_optimizer
from notus.packing import deal, pack
from notus.plan import describe_cost, forward_flops, peak_flops
from notus.plot import plot
from notus.reference import ReferenceCache, reference_logps, score_pairs
from notus.tokenizer import Tokenizer, load_tokenizer

METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected",
)  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """All that is known before a weight is read."""

    dims: MistralConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    train: PairSet
    test: PairSet


def read_inputs(config: Config, need_weights: bool = True) -> Inputs:
    """Everything that a user can have got wrong is refused here, with file, line and value: ValueError."""
    output = Path(config.train.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: is not empty; name another train.output_dir, or delete it")
    dims = MistralConfig.read(config.model.path)
    if need_weights:
        weights.check_weights(config.model.path, dims)
    tokenizer, template = load_tokenizer(config.model.path), load_chat_template(config.model.path)

    def read(paths: tuple[str, ...]) -> PairSet:
        data = config.data
        pair_set = load_pairs(
            paths, tokenizer, template,
            max_length=data.max_length, max_prompt_length=data.max_prompt_length, bos=data.bos,
            system_prompt=data.system_prompt if data.insert_system else None, drop_bad_pairs=data.drop_bad_pairs,
        )  # fmt: skip
        if (largest := largest_id(pair_set.pairs)) >= dims.vocab_size:
            raise ValueError(
                f"{config.model.path}: the tokenizer gives id {largest}, but config.json has a vocab_size of "
                f"{dims.vocab_size}: tokenizer and weights do not belong together"
            )
        return pair_set

    return Inputs(dims, tokenizer, template, read(config.data.train), read(config.data.test))


def train(config: Config, inputs: Inputs, world: World) -> None:
    setup = config.train
    output = Path(setup.output_dir)
    pairs, held_out = inputs.train.pairs, inputs.test.pairs
    epoch_steps = steps_per_epoch(len(pairs), setup.pairs_per_step)
    total_steps = epoch_steps * setup.num_train_epochs
    started = time.monotonic()
    say = print if world.rank == 0 else lambda *_: None
    say(banner(config, inputs, world, total_steps))

    # --- the policy, in shards ---
    compute_dtype = getattr(torch, setup.compute_dtype)
    model = weights.meta_model(inputs.dims)
    model.model.recompute_every = setup.activation_checkpointing
    distributed.shard(model, model.model.layers, world, compute_dtype)
    weights.load_weights(model, config.model.path, world.device)

    # --- the run's papers ---
    facts = on_rank_zero(world, lambda: run_facts(config, inputs, total_steps, world))
    log = MetricsLog(output / "metrics.jsonl", enabled=world.rank == 0)

    # --- the reference: the policy itself, before its first step ---
    header = {"weights": facts["model_sha256"], "model": asdict(inputs.dims), "compute_dtype": setup.compute_dtype}
    cache = ReferenceCache(config.reference.cache_dir, header, world.rank)
    with Console(len(pairs) + len(held_out), enabled=world.rank == 0, unit="pair", every=0.1) as console:
        reference, computed = reference_logps(
            model, pairs + held_out, cache, world, setup.micro_batch_tokens,
            lambda done: console.step(done * world.size, {}),
        )  # fmt: skip
    say(f"reference   {computed:,} pairs scored, {len(reference) - computed:,} found in {cache.directory}")
    reference, held_out_reference = reference.to(world.device).split([len(pairs), len(held_out)])

    # --- the loop ---
    optimizer = make_optimizer(model.parameters(), setup.optimizer, setup.learning_rate, setup.weight_decay)
    warmup_steps = math.ceil(setup.warmup_ratio * total_steps)
    peak = peak_flops(torch.cuda.get_device_name(world.device)) if world.device.type == "cuda" else None
    console = Console(total_steps, enabled=world.rank == 0)
    evaluation: dict[str, float] = {}

    def evaluate(step: int) -> None:
        if held_out:
            totals = torch.zeros(len(METRICS), dtype=torch.float64, device=world.device)
            score_pairs(
                model, held_out, world, setup.micro_batch_tokens,
                lambda rows, policy: totals.add_(sums(policy, held_out_reference[rows], config)[1]),
            )  # fmt: skip
            means = (sum_over_ranks(totals) / len(held_out)).tolist()
            evaluation.update({f"eval_{name}": mean for name, mean in zip(METRICS, means, strict=True)})
            log.write({"step": step, "epoch": step / epoch_steps, **evaluation})
            console.say(
                f"held out    step {step}  loss {evaluation['eval_loss']:.4f}  "
                f"acc {evaluation['eval_rewards/accuracies']:.3f}  margin {evaluation['eval_rewards/margins']:.3f}"
            )

    evaluate(0)
    first_evaluation = dict(evaluation)
    model.train()
    totals = torch.zeros(len(METRICS) + 2, dtype=torch.float64, device=world.device)  # METRICS, pairs, tokens
    flops, since = 0.0, time.monotonic()
    for step in range(total_steps):
        rows = batch(len(pairs), setup.pairs_per_step, setup.seed, step)
        learning_rate = lr_at(step, total_steps, warmup_steps, setup.learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        plan = deal([pairs[i].num_tokens for i in rows], world.size, setup.micro_batch_tokens)
        for micro_batch in plan[world.rank]:
            members = rows[micro_batch]  # the pairs of this rank's micro-batch
            stream = pack([(pairs[i].prompt, (pairs[i].chosen, pairs[i].rejected)) for i in members])
            policy = pair_logps(model, stream.to(world.device))  # (P, 2)
            if step == 0:
                check_policy_is_reference([pairs[i] for i in members], policy, reference[members], compute_dtype)
            losses, sizes = sums(policy, reference[members], config)
            (losses.sum() / len(rows)).backward()  # over the pairs of the whole step, whatever the micro-batch
            totals[:-2] += sizes
            totals[-2:] += torch.tensor([len(members), len(stream.input_ids)])

        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), setup.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        done = step + 1
        flops += 3 * forward_flops(inputs.dims, [pairs[i] for i in rows])
        if done % setup.log_steps == 0 or done == total_steps:
            *sizes, num_pairs, num_tokens = sum_over_ranks(totals).tolist()
            metrics = {name: size / num_pairs for name, size in zip(METRICS, sizes, strict=True)}
            metrics |= {"grad_norm": full_tensor(grad_norm).item(), "learning_rate": learning_rate}
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                places = ", ".join(pairs[i].where for i in rows)
                raise FloatingPointError(f"step {done}: loss or gradient is not finite; its pairs are {places}")
            seconds = time.monotonic() - since
            metrics |= {"tokens_per_second": num_tokens / seconds, "memory_gib": peak_memory_gib(world.device)}
            if peak:
                metrics["mfu"] = flops / seconds / (peak * world.size)
            log.write({"step": done, "epoch": done / epoch_steps, **metrics})
            console.step(done, metrics)
            totals.zero_()
            flops, since = 0.0, time.monotonic()
        if done % setup.eval_steps == 0 or done == total_steps:
            paused = time.monotonic()
            evaluate(done)
            since += time.monotonic() - paused
    console.close()

    # --- the result ---
    card = model_card(config, facts, evaluation)
    weights.export(
        model, config.model.path, output / "final", getattr(torch, setup.export_dtype), card, rank=world.rank
    )
    if world.rank == 0:
        log.close()
        seconds = time.monotonic() - started
        say(summary(config, first_evaluation, evaluation, total_steps, seconds))
        result = {"steps": total_steps, "seconds": round(seconds, 1), "first": first_evaluation, "last": evaluation}
        write_atomically(output / "summary.json", json.dumps(result, indent=1) + "\n")


def sums(policy: Tensor, reference: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """policy, reference (P, 2) -> losses (P,), with gradient, and the sum over pairs of each of METRICS, without."""
    logps = (*policy.unbind(1), *reference.unbind(1))
    losses = dpo_loss(*logps, config.dpo.beta, config.dpo.label_smoothing)
    values = {"loss": losses.detach(), **preference_metrics(*logps, config.dpo.beta)}
    return losses, torch.stack([values[name].double().sum() for name in METRICS])


def check_policy_is_reference(pairs: list[Pair], policy: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    """Before its first step the policy IS the reference: every margin is 0 and the loss is log 2, up to rounding.

    Rounding is all that may differ, where two passes put a pair into other micro-batches: a token's log-prob by some
    16 eps of the compute dtype, in either direction, so a sum of n by 16 eps sqrt(n); and the stored float32 sum by
    4 eps. A reference of other weights, another template or other lengths is off by whole nats.
    """
    tokens = torch.tensor([[len(pair.chosen), len(pair.rejected)] for pair in pairs]).to(policy).view(-1, 2)
    tolerance = 16 * torch.finfo(dtype).eps * tokens.sqrt() + 4 * torch.finfo(torch.float32).eps * reference.abs()
    difference = (policy.detach() - reference).abs()
    wrong = (~(difference <= tolerance)).any(dim=1).nonzero().squeeze(1).tolist()  # NaN is wrong too
    if wrong:
        worst = max(wrong, key=lambda i: difference[i].nan_to_num(math.inf).max().item())
        raise RuntimeError(
            f"the untrained policy differs from its reference in {len(wrong)} of {len(pairs)} pairs, most in "
            f"{pairs[worst].where}: policy {policy[worst].tolist()}, reference {reference[worst].tolist()} nats. "
            "The loss would not begin at log 2. Delete reference.cache_dir to compute the reference anew."
        )


# --- what the run says of itself -------------------------------------------------------------------------------------


def run_facts(config: Config, inputs: Inputs, total_steps: int, world: World) -> dict:
    """Write config.toml and environment.json into the output folder; what is in the latter, for the model card."""
    output = Path(config.train.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    facts = environment([*config.data.train, *config.data.test]) | {
        "model_sha256": weights.digest(config.model.path),
        "gpus": world.size if world.device.type == "cuda" else 0,
        "processes": world.size,
        "seed": config.train.seed,
        "train_pairs": len(inputs.train.pairs),
        "test_pairs": len(inputs.test.pairs),
        "steps": total_steps,
    }
    write_atomically(output / "config.toml", to_toml(config))
    write_atomically(output / "environment.json", json.dumps(facts, indent=1) + "\n")
    return facts


def banner(config: Config, inputs: Inputs, world: World, total_steps: int) -> str:
    layers, rest = inputs.dims.num_hidden_layers, inputs.dims.hidden_size
    where = f"{world.size} x {torch.cuda.get_device_name()}" if world.device.type == "cuda" else f"{world.size} x CPU"
    lines = [
        f"model       {config.model.path}: {layers} layers x {rest}, {config.train.compute_dtype} on {where}",
        f"train       {', '.join(config.data.train)}: {describe_counts(inputs.train.counts)}",
        f"steps       {total_steps:,} of {config.train.pairs_per_step} pairs, {config.train.num_train_epochs} epochs; "
        f"beta {config.dpo.beta}, {config.train.optimizer}, peak learning rate {config.train.learning_rate}",
    ]
    if inputs.test.pairs:
        lines.insert(2, f"held out    {', '.join(config.data.test)}: {describe_counts(inputs.test.counts)}")
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
    except ImportError as error:
        curves = f"not drawn: {error}"
    lines += [
        f"  model     {output / 'final'}  (Hugging Face layout, {config.train.export_dtype})",
        f"  metrics   {output / 'metrics.jsonl'}",
        f"  curves    {curves}",
        "next:",
        f"  python -m notus.generate --model {output / 'final'}",
    ]
    return "\n".join(lines)


def dry_run(config: Config, inputs: Inputs, num_gpus: int) -> str:
    setup = config.train
    num_pairs = len(inputs.train.pairs)
    steps = steps_per_epoch(num_pairs, setup.pairs_per_step) * setup.num_train_epochs
    held_out = describe_counts(inputs.test.counts) if inputs.test.pairs else "none"
    cost = describe_cost(
        inputs.dims, inputs.train.pairs, inputs.test.pairs,
        epochs=setup.num_train_epochs, evaluations=2 + (steps - 1) // setup.eval_steps, num_gpus=num_gpus,
        dtype=getattr(torch, setup.compute_dtype), optimizer=setup.optimizer,
        micro_batch_tokens=setup.micro_batch_tokens, recompute_every=setup.activation_checkpointing,
    )  # fmt: skip
    return (
        f"train       {describe_counts(inputs.train.counts)}\n"
        f"held out    {held_out}\n"
        f"steps       {steps:,}: {setup.num_train_epochs} epochs of {num_pairs:,} pairs, {setup.pairs_per_step} each\n"
        f"{cost}\n\n"
        f"the first pair, {inputs.train.pairs[0].where}:\n"
        f"{describe_pair(inputs.train.pairs[0], inputs.tokenizer)}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, epilog=help_text(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).parent / "configs" / "demo.toml"
    parser.add_argument("config", nargs="?", default=str(default), help="a TOML file (default: configs/demo.toml)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--print-config", action="store_true", help="print all settings as TOML and stop")
    parser.add_argument("--dry-run", action="store_true", help="check data and tokenizer, print the cost, and stop")
    parser.add_argument("--gpus", type=int, metavar="N", help="for --dry-run: GPUs to plan for (torchrun's, else 8)")
    args, extra = parser.parse_known_args(argv)
    overrides = [*args.overrides, *extra]
    if "=" in args.config:  # no file given, only settings
        args.config, overrides = str(default), [args.config, *overrides]
    try:
        config = load(args.config, overrides)
        if args.print_config:
            print(to_toml(config), end="")
            return 0
        inputs = read_inputs(config, need_weights=not args.dry_run)
    except ValueError as error:
        if distributed.rank() == 0:
            print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        print(dry_run(config, inputs, args.gpus or distributed.world_size() or 8))
        return 0
    world = distributed.start(config.train.device)
    try:
        train(config, inputs, world)
    finally:
        distributed.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
