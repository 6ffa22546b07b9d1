"""DPO, the whole recipe from top to bottom. One process, or one for each GPU:

    python train.py configs/demo.toml [section.key=value ...]
    torchrun --nproc-per-node 8 train.py configs/notus-7b-v1.toml

There is no Trainer. `train` is the order of things: the policy, its reference, the loop. `train_step` holds the loss.
`main` reads and checks what a user can get wrong before any weight is loaded. Rerun the same command to resume an
unfinished run. Without arguments configs/demo.toml is used, for which `python -m notus.demo` makes data and a base.

What was deleted from DPO as others run it: the second model (the reference is the policy before its first step, or
another model, scored once and cached), padding (a micro-batch is one stream of tokens, see packing.py), and the
(tokens, vocabulary) matrix of logits (only answer tokens meet the head, in chunks, see logprobs.py).

Legend: P pairs of a micro-batch, M metrics.
"""

import os
import signal
import sys

from notus.config import Config, command_line, to_toml

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the seconds that torch takes: no traceback
    if "RANK" not in os.environ:
        command_line(sys.argv[1:], __doc__, early=True)  # a typo is reported now, and not after them
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Streams have other lengths in every step. In segments that cannot grow they leave as many gaps as tensors.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from notus import distributed, report
from notus.base import load_sharded
from notus.cost import training_flops
from notus.evaluate import answer_tokens, held_out_metrics, sample_answers
from notus.losses import METRICS, PreferenceLoss
from notus.metrics import lasting_console
from notus.model import Mistral, pair_logps
from notus.optim import lr_at, make_optimizer
from notus.packing import MicroBatch, to_device, training_steps
from notus.reference import check_same, score_reference
from notus.run import Inputs, Preempted, Run, job_of, open_run, read_inputs, recomputation


class Step(NamedTuple):
    """What every rank knows after a step."""

    sums: list[float]  # (M,) of METRICS over the step's pairs
    grad_norm: float  # before clipping
    finite: bool  # if not, the weights were left as they were
    stopping: bool  # whether any rank was asked to stop


def train_step(
    model: Mistral, optimizer: torch.optim.Optimizer, micro_batches: Sequence[MicroBatch], reference: Tensor,
    num_pairs: int, world: distributed.World, *, preference_loss: PreferenceLoss, max_grad_norm: float = 1.0,
    stopping: bool = False, check: Callable[[np.ndarray, Tensor, Tensor], None] | None = None,
) -> Step:  # fmt: skip
    """One step over `num_pairs` pairs, of which this rank's are in `micro_batches`. All ranks call.

    reference: (all pairs, 2) on the CPU. `check` is shown members, policy and reference of every micro-batch.
    """
    totals = torch.zeros(len(METRICS) + 1, dtype=torch.float64, device=world.device)
    for members, stream in micro_batches:
        stream = stream.to(world.device)
        policy = pair_logps(model, stream)  # (P, 2) log pi(y|x), chosen and rejected
        old = to_device(reference[members], world.device)  # (P, 2) log pi_ref(y|x)
        tokens = stream.tokens.view(-1, 2)  # (P, 2) of the answers
        if check:
            check(members, policy, old)

        losses = preference_loss(policy, old, tokens)  # (P,) equation 7 for dpo, the first function of losses.py
        (losses.sum() / num_pairs).backward()  # over the pairs of the whole step, however they were dealt

        metrics = preference_loss.metrics(losses, policy, old, tokens)  # (P, M)
        totals[:-1] += metrics.double().sum(0)
    totals[-1] = stopping
    norm = distributed.full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm))

    # The one place where the host waits for the device, so that a non-finite step never reaches the weights.
    *sums, stops, grad_norm = [*distributed.sum_over_ranks(totals).tolist(), norm.item()]
    finite = math.isfinite(sums[0]) and math.isfinite(grad_norm)
    if finite:
        optimizer.step()
    optimizer.zero_grad()
    return Step(sums, grad_norm, finite, stops > 0)


def train(config: Config, inputs: Inputs, world: distributed.World, run: Run) -> None:
    setup, pairs = config.train, inputs.train
    preference_loss = inputs.frame.preference_loss
    started, first_step, total_steps = time.monotonic(), run.first_step, run.facts["steps"]
    warmup_steps, dtype = math.ceil(setup.warmup_ratio * total_steps), getattr(torch, setup.compute_dtype)
    world.say(report.banner(run.facts, inputs, world, [*inputs.notes, *run.disk_notes(inputs)], first_step))

    # The policy: what is trained is float32, because at a learning rate of 5e-7 bfloat16 weights would hardly move.
    level, parallel = recomputation(config, inputs, world), config.distributed
    load = partial(
        load_sharded, world=world, dtype=dtype, cpu_offload=parallel.cpu_offload,
        reshard_after_forward=parallel.reshard_after_forward,
    )  # fmt: skip
    policy = partial(load, inputs.base, recompute=level, compile_layers=setup.compile, lora=run.lora, seed=setup.seed)

    # The reference is the policy itself before its first step (with LoRA, B = 0), so it is scored before any checkpoint
    # is loaded. Another model, by dpo.reference, is scored and gone before the policy is loaded.
    same = inputs.reference.dims == inputs.base.dims and run.facts["reference_sha256"] == run.facts["model_sha256"]
    model = policy() if same else load(inputs.reference, frozen=True)

    def stop_if_asked() -> None:
        if distributed.sum_over_ranks(torch.tensor(int(run.stop.received))) > 0:
            raise Preempted(first_step)

    if preference_loss.member.reference:
        (reference, held_out), sentences = score_reference(
            model, {"pairs": pairs, "held-out pairs": inputs.test}, world, cache_dir=config.reference.cache_dir,
            model_sha256=run.facts["reference_sha256"], compute_dtype=dtype, budget=setup.micro_batch_tokens,
            stopping=stop_if_asked,
        )  # fmt: skip
    else:
        reference, held_out = (torch.zeros(len(each), 2) for each in (pairs, inputs.test))
        sentences = [f"{preference_loss.name} has none"]
    world.say("\n".join(f"reference   {sentence}" for sentence in sentences))
    preference_loss.check_start(reference, answer_tokens(pairs))
    if not same:
        del model
        distributed.free_memory()
        model = policy()

    # Where the run stands: at its beginning, or where a checkpoint left weights, optimizer and log.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained, setup.optimizer, setup.learning_rate, setup.weight_decay)
    run.restore(model, optimizer)
    log = run.open_log(world)

    def evaluate(step: int) -> None:
        if len(inputs.test):
            budget, last = setup.micro_batch_tokens, step == total_steps
            log.evaluated(step, held_out_metrics(model, inputs.test, held_out, world, budget, preference_loss, last))
            began = time.monotonic()
            samples = sample_answers(model, inputs.base, inputs.test, setup.sample_prompts, world)
            log.sampled(step, samples, time.monotonic() - began)

    if first_step == 0:
        with log.between_steps():
            evaluate(0)

    # --- the loop ---
    skipped_in_a_row = 0
    pair_flops = training_flops(inputs.base.dims, pairs.lengths, run.lora)  # (all pairs,) forward and backward
    for step, rows, micro_batches in training_steps(
        pairs, pair_flops, range(first_step, total_steps), pairs_per_step=setup.pairs_per_step, seed=setup.seed,
        budget=setup.micro_batch_tokens, rank=world.rank, num_ranks=world.size,
    ):  # fmt: skip
        learning_rate = lr_at(step, total_steps, warmup_steps, setup.learning_rate, setup.schedule)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        # Law 1: before the first step the policy is its reference, pair by pair. So loss and gradient are what
        # check_start has found where the two are equal: log 2 for dpo, 1 / (4 beta^2) for ipo.
        law_1 = partial(check_same, pairs, dtype) if same and step == 0 and preference_loss.member.reference else None
        result = train_step(
            model, optimizer, micro_batches, reference, len(rows), world, preference_loss=preference_loss,
            max_grad_norm=setup.max_grad_norm, stopping=run.stop.received, check=law_1,
        )  # fmt: skip
        done, last = step + 1, step + 1 == total_steps

        # A skipped step is logged with its pairs. With too many in a row the run is beyond help.
        skipped_in_a_row = 0 if result.finite else skipped_in_a_row + 1
        if result.finite:
            log.add(result.sums, len(rows), pairs.num_tokens[rows].sum(), pair_flops[rows].sum())
            if done % setup.log_steps == 0 or last:
                log.step(done, {"grad_norm": result.grad_norm, "learning_rate": learning_rate})
        else:
            log.skipped(done, pairs.where[rows].tolist())

        # Neither evaluating nor saving counts as time of a step.
        with log.between_steps():
            if skipped_in_a_row >= setup.max_skipped_steps:
                raise FloatingPointError(
                    f"loss or gradient was not finite in {skipped_in_a_row} steps in a row, up to step {done}. Lower "
                    "train.learning_rate, or look at the pairs that metrics.jsonl names"
                )
            if done % setup.eval_steps == 0 or last:
                evaluate(done)
            if done % setup.save_steps == 0 or last or result.stopping:
                facts = {"identity": run.facts["identity"], **log.state()}
                stall = run.checkpoints.save(model, optimizer, done, facts)
                log.write(done, {"checkpoint_stall_seconds": round(stall, 3)})
        if result.stopping and not last:
            raise Preempted(done)
    run.checkpoints.wait()
    log.close()

    # The result: a directory that every Hugging Face tool loads, and that knows the frame it was trained in.
    evaluations = log.evaluations() or [{}]
    curves = report.export_model(model, run.facts, inputs, evaluations[-1], world.rank)
    if world.rank == 0:
        world.say(report.finish(run.facts, evaluations[0], evaluations[-1], time.monotonic() - started, curves))
    run.status("finished")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 failure, 2 bad input, 75 preempted (asked to stop, can be resumed), 130 interrupted before
    there was anything to save."""

    def fail(error: object, code: int) -> int:
        if code == 1 or distributed.rank() == 0:  # bad input is the same on every rank
            report.error(error)
        return code

    with ExitStack() as held:  # the console, the process group, and the claim on the output folder
        held.enter_context(lasting_console())
        try:
            arguments = command_line(sys.argv[1:] if argv is None else argv, __doc__)
            config = arguments.config
            if arguments.print_config:
                print(to_toml(config), end="")
                return 0
            inputs = read_inputs(config, arguments.fresh, need_weights=not arguments.dry_run)
            if arguments.dry_run:
                print(report.dry_run(inputs, job_of(config, arguments.gpus or distributed.world_size() or 8)))
                return 0
            held.callback(distributed.stop)
            parallel = config.distributed
            world = distributed.start(config.train.device, parallel.replicate, parallel.timeout_minutes)
            run = open_run(config, inputs, world, arguments.fresh, held)
        except (ValueError, OSError) as error:
            return fail(error, 2)
        except KeyboardInterrupt:
            return fail("interrupted before the first step; nothing is lost", 130)

        try:
            train(config, inputs, world, run)
            return 0
        except Preempted as preempted:
            run.checkpoints.wait()
            run.status("preempted")
            world.say(run.describe_stop(preempted.step, arguments.fresh))
            return 75
        except (ValueError, OSError, ArithmeticError) as error:  # with nothing to learn from a traceback
            run.checkpoints.wait()
            run.status("failed")
            return fail(error, 2 if isinstance(error, ValueError) else 1)
        except Exception as error:
            run.status("failed")
            silent = distributed.silent_ranks() if world.size > 1 else ""
            fail(f"rank {world.rank}: {silent or error}", 1)
            if not silent:  # otherwise the checkpoint that is being written has lost a part
                run.checkpoints.wait()
            raise


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
