"""The model card of an exported checkpoint: README.md in Hugging Face's form, from the facts of the run alone.

It claims only what the run itself measured on its held-out pairs.
"""

import re
from pathlib import Path
from typing import Any

from notus.run import loss_of


def model_card(
    facts: dict[str, Any], metrics: dict[str, float | None], base_card: str = "", curves: bool = False
) -> str:
    """facts: what environment.json holds (run.py). metrics: the last evaluation, by TRL's names, None where a value is
    not finite; {} if there were no held-out pairs. base_card: the text of the base's own card, for license and
    language. curves: whether curves.png lies beside the card."""
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
    hub_id, of_base = base_id(settings), code(base)
    front = [*inherited(base_card), f"library_name: {'peft' if is_adapter else 'transformers'}"]
    front += ["pipeline_tag: text-generation", "tags:", "- dpo", "- preference", "- notus", *["- lora"] * bool(rank)]
    if hub_id:
        of_base = f"[{hub_id}](https://huggingface.co/{hub_id})"
        front += [f"base_model: {hub_id}", f"base_model_relation: {'adapter' if is_adapter else 'finetune'}"]
    if settings["data.hub_ids"]:
        front += ["datasets:", *(f"- {name}" for name in settings["data.hub_ids"])]
    lines = "\n".join(front)
    return f"""---
{lines}
---

# {plain(output)}

{of_base} tuned by {loss.member.title} ([{loss.member.paper}]({loss.member.url})) with
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

{"![Curves of loss, rewards, accuracy, margin, gradient norm and learning rate](curves.png)" if curves else ""}

{evaluation if names else "There were no held-out pairs, so nothing was evaluated."}

Accuracy is the share of pairs whose chosen answer has the higher reward, \
{loss.reward("model", "reference" if settings["dpo.reference"] else "base")}.

## How to use it

```python
{usage(settings, is_adapter)}```

Training put {"one BOS" if settings["data.bos"] else "no BOS"} in front, inserted {plain(frame)}, and ended each \
answer with one EOS. These lines do the same, and notus's tests run them. vLLM (`vllm serve`) and llama.cpp (its \
`convert_hf_to_gguf.py`) read such files{" once the adapter is merged" if is_adapter else ""}; they were not tried \
with this model.

## Provenance

Base weights, sha256 over files: `{facts["model_sha256"]}`.{reference} Data:

{files}

Trained on {facts["train_rows"]}. Held out: {facts["test_rows"]}.

Software: {versions}. The licences of the base and of the data apply.
"""


def base_id(settings: dict[str, Any]) -> str:
    """The base's id on the Hub: model.hub_id, or what the Hub's own cache calls its folder. "" if neither says: the
    base's card and config.json name what it was trained from, and a wrong id is worse than none."""
    found = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", f"/{settings['model.path']}/".replace("\\", "/"))
    return settings["model.hub_id"] or (f"{found[1]}/{found[2]}" if found else "")


def inherited(base_card: str) -> list[str]:
    """The lines of the base's front matter that hold for what was trained from it: license and language."""
    front = re.match(r"---\n(.*?)\n---", base_card, re.DOTALL)
    keys = r"^(?:license|license_name|license_link|language):(?: *[\w.:/,\[\]\' -]+| *(?:\n- [\w-]+)+)$"
    return re.findall(keys, front[1], re.MULTILINE) if front else []


def usage(settings: dict[str, Any], is_adapter: bool) -> str:
    """Python that asks the model in the frame of its training."""
    system = repr({"role": "system", "content": settings["data.system_prompt"]})
    turns = [system] * settings["data.insert_system"] + [repr({"role": "user", "content": "Why is the sky blue?"})]
    auto, imports = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if is_adapter:
        auto = "AutoPeftModelForCausalLM"
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    bos = 'tokenizer.bos_token or ""' if settings["data.bos"] else '""'
    return f"""\
{imports}

path = "."  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained(path)
model = {auto}.from_pretrained(path, dtype="auto")
messages = [{", ".join(turns)}]
text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
bos = {bos}
inputs = tokenizer(bos + text.removeprefix(bos), add_special_tokens=False, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def plain(text: str) -> str:
    """Text inside Markdown, where a file name must not become a heading, a link or HTML."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]()#+!|<>~&" else " " if c < " " else c for c in text)


def code(text: str) -> str:
    """A name as inline code."""
    return f"`{''.join(c for c in text if c >= ' ' and c != '`')}`"
