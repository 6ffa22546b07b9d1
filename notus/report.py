"""What a run says of itself: at its start, at its end, and in a dry run.

`facts` is what environment.json holds (run.py): settings by name, counts, digests.
"""

import json
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from notus.base import write_frame
from notus.card import base_id, model_card
from notus.cost import Job, num_adapter_parameters, num_parameters
from notus.distributed import World
from notus.files import sentence, write_atomically
from notus.lora import peft_config
from notus.metrics import duration
from notus.model import Mistral
from notus.plan import describe_cost
from notus.plot import plot
from notus.run import Inputs, lora_of, run_name
from notus.slices import Slice, table
from notus.tokens import describe_counts, describe_pair
from notus.weights import export


def banner(facts: dict[str, Any], inputs: Inputs, world: World, notes: Sequence[str], step: int) -> str:
    """Before the first step, or the first one after `step`. notes: what a user should know, a sentence each."""
    settings, base, train, test = facts["settings"], inputs.base, inputs.train, inputs.test
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    layers, width = base.dims.num_hidden_layers, base.dims.hidden_size
    system = repr(settings["data.system_prompt"]) if settings["data.insert_system"] else "none"
    lines = [
        f"model       {base.path}: {layers} layers x {width}, {settings['train.compute_dtype']} on "
        f"{world.size} x {device}",
        f"template    {base.template.origin}; BOS {'added' if settings['data.bos'] else 'not added'}, system turn "
        f"inserted: {system}",
        f"train       {', '.join(settings['data.train'])}: {describe_counts(train.counts)}",
    ]
    if len(test):
        files = ", ".join(settings["data.test"]) or f"data.test_size {settings['data.test_size']:g}"
        lines.append(f"held out    {files}: {describe_counts(test.counts)}")
    epochs = settings["train.num_train_epochs"]
    lines.append(
        f"steps       {facts['steps']:,} of {settings['train.pairs_per_step']} pairs, "
        f"{epochs} epoch{'s' * (epochs > 1)}; {inputs.frame.preference_loss}, {settings['train.optimizer']}, "
        f"peak learning rate {settings['train.learning_rate']}, {settings['train.schedule']}"
    )
    if lora := lora_of(settings):
        trained, all_in_all = num_adapter_parameters(base.dims, lora), sum(num_parameters(base.dims))
        lines.append(
            f"lora        rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.targets)}: {trained:,} parameters "
            f"are trained, {all_in_all:,} frozen in {settings['train.compute_dtype']}"
        )
    if settings["log.to"]:
        lines.append(f"log         {', '.join(settings['log.to'])}, as {run_name(facts)}")
    lines += [f"note        {note}" for note in notes]
    if step:
        lines.append(f"resuming    after step {step:,}")
    return "\n".join(lines)


def export_model(
    model: Mistral, facts: dict[str, Any], inputs: Inputs, evaluation: dict[str, float | None], rank: int
) -> str:
    """Write the trained model, or its adapter alone (in float32, for it is small), to OUTPUT_DIR/final, with its model
    card, its curves and the frame that it was trained in. All ranks call. Returns where the curves are, or why not."""
    settings, base, lora = facts["settings"], inputs.base, lora_of(facts["settings"])
    output, card, picture = Path(settings["train.output_dir"]), base.path / "README.md", None
    try:
        picture = plot(output) if rank == 0 else None
        curves = str(picture)
    except (ImportError, OSError, ValueError) as error:
        curves = f"not drawn: {error}"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    base_name = base_id(settings) or settings["model.path"]
    adapter = peft_config(lora, base_name) if lora and settings["lora.export"] == "adapter" else None

    def complete(directory: Path) -> None:
        write_frame(inputs.frame, directory)
        if picture:
            shutil.copyfile(picture, directory / "curves.png")

    dtype = torch.float32 if adapter else getattr(torch, settings["train.export_dtype"])
    export(
        model, base.path, output / "final", dtype, model_card(facts, evaluation, text, picture is not None), rank,
        chat_template=base.template.source if base.template.is_default else None, eos_id=base.tokenizer.eos_id,
        adapter=adapter, finish=complete,
    )  # fmt: skip
    return curves


def finish(facts: dict[str, Any], first: dict[str, Any], last: dict[str, Any], seconds: float, curves: str) -> str:
    """Write summary.json, and say where everything is. first, last: evaluations, by metric name, None where a value is
    not finite; {} without held-out pairs."""

    def shown(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.3f}"

    settings = facts["settings"]
    output = Path(settings["train.output_dir"])
    result = {"steps": facts["steps"], "seconds": round(seconds, 1), "first": first, "last": last}
    write_atomically(output / "summary.json", json.dumps(result, indent=1) + "\n")
    lines = [f"\ndone: {facts['steps']:,} steps in {duration(seconds)}"]
    if last:
        names = {"loss": "eval_loss", "accuracy": "eval_rewards/accuracies", "margin": "eval_rewards/margins"}
        changes = (f"{name} {shown(first[key])} -> {shown(last[key])}" for name, key in names.items())
        lines.append(f"  held out  {'  '.join(changes)}")
        lines += [f"  {line}" for line in table([Slice(**each) for each in last.get("eval_slices", [])])]
    is_adapter = settings["lora.export"] == "adapter"
    layout = "PEFT's adapter, float32" if is_adapter else f"Hugging Face layout, {settings['train.export_dtype']}"
    lines += [
        f"  model     {output / 'final'}  ({layout})",
        f"  metrics   {output / 'metrics.jsonl'}",
        f"  curves    {curves}",
    ]
    if is_adapter:
        base = f"AutoModelForCausalLM.from_pretrained({settings['model.path']!r})"
        return "\n".join([*lines, "next:", f"  peft.PeftModel.from_pretrained({base}, {str(output / 'final')!r})"])
    lines += ["next:", f"  {shlex.join(['python', '-m', 'notus.generate', '--model', str(output / 'final')])}"]
    if last:
        size, base = settings["data.test_size"], settings["dpo.reference"] or settings["model.path"]
        data = [*settings["data.train"], "--test-size", str(size)] if size else settings["data.test"]
        compare = ["--model", str(output / "final"), "--base", base, "--data", *data]
        lines.append(f"  {shlex.join(['python', '-m', 'notus.evaluate', 'preferences', *compare])}")
    return "\n".join(lines)


def error(what: object) -> None:
    """Say why a run did not start, or ended."""
    print(f"train.py: error: {sentence(what)}", file=sys.stderr, flush=True)


def dry_run(inputs: Inputs, job: Job) -> str:
    """What is known without a GPU: the data, the cost, and one pair as the model sees it."""
    base, train, test = inputs.base, inputs.train, inputs.test
    lines = [
        f"template    {base.template.origin}",
        f"train       {describe_counts(train.counts)}",
        f"held out    {describe_counts(test.counts) if len(test) else 'none'}",
        *(f"note        {note}" for note in inputs.notes),
        describe_cost(base.dims, job, train.lengths, test.lengths),
        f"\nthe first pair, {train[0].where}:",
        describe_pair(train[0], base.tokenizer),
    ]
    return "\n".join(lines)
