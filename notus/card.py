"""The model card of an exported checkpoint: README.md in Hugging Face's form, from the facts of the run alone.

It claims only what the run itself measured on its held-out pairs.
"""

from pathlib import Path
from typing import Any

from notus.run import loss_of


def model_card(facts: dict[str, Any], metrics: dict[str, float | None]) -> str:
    """facts: what environment.json holds (run.py). metrics: the last evaluation, by TRL's names, None where a value is
    not finite; {} if there were no held-out pairs."""
    settings = facts["settings"]
    loss = loss_of(settings)
    is_adapter, rank = settings["lora.export"] == "adapter", settings["lora.rank"]
    base, output = (Path(settings[name]).resolve().name for name in ("model.path", "train.output_dir"))
    names = [name for name in metrics if name.startswith("eval_") and name not in ("eval_runtime", "eval_slices")]
    values = {name: "not finite" if metrics[name] is None else f"{metrics[name]:.4f}" for name in names}
    results = "\n".join(f"| {name.removeprefix('eval_')} | {value} |" for name, value in values.items())
    evaluation = f"On the held-out pairs, after the last step:\n\n| metric | value |\n|---|---|\n{results}"
    system = settings["data.insert_system"]
    frame = f"a system turn ({settings['data.system_prompt']!r}) where there was none" if system else "no system turn"
    files = "\n".join(f"- {code(Path(name).name)}, sha256 `{sha}`" for name, sha in facts["data_sha256"].items())
    trained, dtype = "all weights", "float32" if is_adapter else settings["train.export_dtype"]
    kept = "float32 weights"
    if rank:
        kept = f"float32 LoRA weights, the rest frozen in {settings['train.compute_dtype']}"
        targets = ", ".join(settings["lora.targets"])
        trained = f"LoRA, rank {rank}, alpha {settings['lora.alpha']:g}, on {targets}; "
        trained += "the adapter alone is here" if is_adapter else "merged"
    reference = ""
    if settings["dpo.reference"]:
        name = code(Path(settings["dpo.reference"]).resolve().name)
        reference = f" Weights of the reference, {name}: `{facts['reference_sha256']}`."
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"""---
base_model: {quoted(base)}
library_name: {"peft" if is_adapter else "transformers"}
pipeline_tag: text-generation
tags:
- dpo
- preference
- notus{
        '''
- lora'''
        if rank
        else ""
    }
---

# {plain(output)}

{code(base)} tuned by {loss.member.title} ([{loss.member.paper}]({loss.member.url})) with
notus {facts["versions"]["notus"]}, commit `{facts["git_commit"]}`.

## Training

| setting | value |
|---|---|
| pairs | {facts["train_pairs"]:,} |
| preference loss | {loss} |
| trained | {trained} |
| optimizer, peak learning rate | {settings["train.optimizer"]}, {settings["train.learning_rate"]} |
| schedule | {settings["train.schedule"]}, warmup over {settings["train.warmup_ratio"]:.0%} of {
        facts["steps"]:,} steps |
| epochs, pairs a step | {settings["train.num_train_epochs"]}, {settings["train.pairs_per_step"]} |
| maximum length, of the prompt | {settings["data.max_length"]}, {settings["data.max_prompt_length"]} tokens |
| precision | {settings["train.compute_dtype"]} compute, {kept}; exported in {dtype} |
| seed | {settings["train.seed"]} |

{evaluation if names else "There were no held-out pairs, so nothing was evaluated."}

Accuracy is the share of pairs whose chosen answer has the higher reward, \
{loss.reward("model", "reference" if settings["dpo.reference"] else "base")}.

## Text

Use the chat template of this repository. Training put {"one BOS" if settings["data.bos"] else "no BOS"} in front, \
inserted {plain(frame)}, and ended each answer with one EOS.

## Provenance

Base weights, sha256 over files: `{facts["model_sha256"]}`.{reference} Training data:

{files}

Software: {versions}. The licences of the base and of the data apply.
"""


def quoted(text: str) -> str:
    """A string in YAML. JSON's spelling will not do: its two escapes of an emoji are two characters there."""
    inner = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in text)
    return f'"{inner}"'


def plain(text: str) -> str:
    """Text inside Markdown, where a file name must not become a heading, a link or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+!|<>~&" else " " if c < " " else c for c in text)


def code(text: str) -> str:
    """A name as inline code."""
    return f"`{''.join(c for c in text if c >= ' ' and c != '`')}`"
