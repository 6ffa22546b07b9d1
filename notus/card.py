"""The model card of an exported checkpoint: README.md in Hugging Face's form, from the facts of the run alone.

No evaluation that was not run is claimed; what the run measured on its held-out pairs is.
"""

import json
from pathlib import Path

from notus.config import Config


def model_card(config: Config, environment: dict, metrics: dict[str, float]) -> str:
    """`metrics`: the last evaluation, by TRL's names; {} if there were no held-out pairs."""
    base, dpo, train, data = Path(config.model.path).name, config.dpo, config.train, config.data
    names = [name for name in metrics if name.startswith("eval_") and name != "eval_runtime"]
    results = "\n".join(f"| {name.removeprefix('eval_')} | {metrics[name]:.4f} |" for name in names)
    evaluation = f"On the held-out pairs, after the last step:\n\n| metric | value |\n|---|---|\n{results}"
    files = "\n".join(f"- `{Path(name).name}`, sha256 `{sha}`" for name, sha in environment["data_sha256"].items())
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"""---
base_model: {json.dumps(base)}
library_name: transformers
pipeline_tag: text-generation
tags:
- dpo
- preference
- notus
---

# {Path(train.output_dir).name}

`{base}` tuned by Direct Preference Optimization ([Rafailov et al. 2023](https://arxiv.org/abs/2305.18290)) with notus
{environment["versions"]["notus"]}, commit `{environment["git_commit"]}`.

## Training

| setting | value |
|---|---|
| pairs | {environment["train_pairs"]:,} |
| beta, label smoothing | {dpo.beta}, {dpo.label_smoothing} |
| optimizer, peak learning rate | {train.optimizer}, {train.learning_rate} |
| schedule | linear, warmup over {train.warmup_ratio:.0%} of {environment["steps"]:,} steps |
| epochs, pairs a step | {train.num_train_epochs}, {train.pairs_per_step} |
| maximal length, of the prompt | {data.max_length}, {data.max_prompt_length} tokens |
| precision | {train.compute_dtype} compute, float32 weights; exported in {train.export_dtype} |
| seed | {train.seed} |

{evaluation if names else "There were no held-out pairs, so nothing was evaluated."}

Accuracy is the share of pairs whose chosen answer has the higher reward, beta x (log-prob - log-prob under the base).

## Text

Use the chat template of this repository. Training put {"one BOS" if data.bos else "no BOS"} in front, \
{"a system turn (" + repr(data.system_prompt) + ") where there was none" if data.insert_system else "no system turn"}, \
and ended each answer with one EOS.

## Provenance

Base weights, sha256 over files: `{environment["model_sha256"]}`. Training data:

{files}

Software: {versions}. The licences of the base and of the data apply.
"""
