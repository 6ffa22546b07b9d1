"""card.py: front matter that the Hub can parse, the facts of the run, and no claim beyond them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt

from notus import config as configuration
from notus.card import model_card
from notus.files import file_digest
from notus.run import environment

RECIPE = configuration.CONFIGS / "notus-7b-v1.toml"


def facts_of(*overrides: str, files: tuple[str | Path, ...] = (), **changes: Any) -> dict[str, Any]:
    """As a run makes them, of the recipe."""
    more = {"model_sha256": "ab" * 32, "processes": 8, "train_pairs": 61_619, "test_pairs": 2000, "steps": 2889}
    more |= {"train_rows": "61,619 pairs of 61,620 rows; dropped: 1 equal answers", "test_rows": "none"}
    settings = configuration.flat(configuration.load(RECIPE, overrides))
    return environment(files) | {"settings": settings} | more | changes


METRICS = {"eval_loss": 0.49876, "eval_rewards/accuracies": 0.7812, "eval_rewards/margins": 1.5, "eval_runtime": 3.25,
           "eval_slices": [{"by": "all", "name": "all"}]}  # fmt: skip


def parse(card: str) -> tuple[dict, str]:
    empty, front, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


@pytest.mark.parametrize("exported", ["merged", "adapter"])
def test_lora_is_said(exported: str):
    settings = ("lora.rank=64", f"lora.export={exported}", "train.export_dtype=bfloat16", "train.schedule=cosine")
    front, body = parse(model_card(facts_of(*settings), METRICS))
    is_adapter = exported == "adapter"
    assert front["library_name"] == ("peft" if is_adapter else "transformers")
    assert front["tags"] == ["dpo", "preference", "notus", "lora"]
    what = "the adapter alone is here" if is_adapter else "merged"
    assert f"| trained | LoRA, rank 64, alpha 16, on q_proj, k_proj, v_proj, o_proj; {what} |" in body
    kept = "float32 LoRA weights, the rest frozen in bfloat16"
    assert f"bfloat16 compute, {kept}; exported in {'float32' if is_adapter else 'bfloat16'}" in body
    assert "| schedule | cosine, warmup over 10% of 2,889 steps |" in body
    assert "| trained | all weights |" in model_card(facts_of(), METRICS)


def test_another_reference_is_said():
    card = model_card(facts_of("dpo.reference=models/pi_0", reference_sha256="cd" * 32), METRICS)
    assert f"Weights of the reference, `pi_0`: `{'cd' * 32}`." in card
    assert "beta * log(model / reference)." in card.replace("\n", " ")
    assert "beta * log(model / base)." in model_card(facts_of(), METRICS).replace("\n", " ")


def test_front_matter_names_the_base_and_how_to_load_it():
    front, _ = parse(model_card(facts_of(), METRICS))
    assert front == {
        "base_model": "alignment-handbook/zephyr-7b-sft-full",
        "base_model_relation": "finetune",
        "datasets": ["openbmb/UltraFeedback"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "preference", "notus"],
    }
    adapter, _ = parse(model_card(facts_of("lora.rank=4", "lora.export=adapter"), METRICS))
    assert (adapter["base_model"], adapter["base_model_relation"]) == (front["base_model"], "adapter")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["model.hub_id=HuggingFaceTB/SmolLM2-135M"], "HuggingFaceTB/SmolLM2-135M"),
        (["model.path=/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/0a1b"], "Qwen/Qwen3-8B"),
        (["model.path=models/zephyr-7b-sft-full"], "alignment-handbook/zephyr-7b-sft-full"),  # the same path
        (["model.path=models/my-own-base"], None),  # the recipe's id does not go with another path
        (["model.path=models/my-own-base", "model.hub_id=me/own"], "me/own"),
    ],
)
def test_a_base_has_an_id_on_the_hub_or_none(settings: list[str], named: str | None):
    front, body = parse(model_card(facts_of(*settings), {}))
    assert front.get("base_model") == named and ("base_model_relation" in front) == bool(named)
    assert (f"[{named}](https://huggingface.co/{named})" if named else "`my-own-base`") in body
    if named:
        validate_repo_id(named)


BASE_CARDS = {
    "license: apache-2.0\nlanguage:\n- en\n- de\nbase_model: a/b": {"license": "apache-2.0", "language": ["en", "de"]},
    "language: en\ntags:\n- x\nlicense: other\nlicense_name: llama3.2\nlicense_link: https://a.b/c": {
        "license": "other", "license_name": "llama3.2", "license_link": "https://a.b/c", "language": "en",
    },
    "language: [en, fr]": {"language": ["en", "fr"]},
    "license: |\n  evil: text": {},
    "license:\n  nested: 1": {},
}  # fmt: skip


@pytest.mark.parametrize("front", BASE_CARDS)
def test_license_and_language_are_those_of_the_base(front: str):
    card = model_card(facts_of(), METRICS, f"---\n{front}\n---\n# license: mit\n")
    usual, _ = parse(model_card(facts_of(), METRICS, "# no front matter\nlicense: mit\n"))
    assert parse(card)[0] == usual | BASE_CARDS[front] and "license" not in usual
    read = ModelCard(card).data.to_dict()  # as the Hub's own tools read it
    assert read.items() >= (usual | BASE_CARDS[front]).items()


def test_curves_are_shown_where_they_are():
    assert "](curves.png)" in model_card(facts_of(), METRICS, curves=True)
    assert "curves.png" not in model_card(facts_of(), METRICS)


def test_the_facts_are_those_of_the_run(tmp_path: Path):
    files = [tmp_path / "data" / "train.jsonl", tmp_path / "data" / "test.jsonl"]
    files[0].parent.mkdir()
    for path in files:
        path.write_text(f"{path.name}\n")
    facts = facts_of(files=tuple(files), git_commit="0123abc with changes")
    _, body = parse(model_card(facts, METRICS))
    table = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body, re.MULTILINE))
    assert table["pairs"] == "61,619"
    assert table["preference loss"] == "dpo, beta 0.1"
    assert table["optimizer, peak learning rate"] == "rmsprop, 5e-07"
    assert table["schedule"] == "linear, warmup over 10% of 2,889 steps"
    assert table["epochs, pairs a step"] == "3, 64"
    assert table["maximum length, of the prompt"] == "1024, 512 tokens"
    assert table["precision"] == "bfloat16 compute, float32 weights; exported in bfloat16"
    assert table["seed"] == "42"
    assert "runtime" not in table
    assert (table["loss"], table["rewards/accuracies"], table["rewards/margins"]) == ("0.4988", "0.7812", "1.5000")
    versions = facts["versions"]
    assert "# notus-7b-v1\n" in body and f"notus {versions['notus']}, commit `0123abc with changes`" in body
    for path in files:
        assert f"- `{path.name}`, sha256 `{file_digest(path)}`\n" in body
    assert f"sha256 over files: `{'ab' * 32}`" in body
    assert f"torch {versions['torch']}" in body
    assert str(tmp_path) not in body and "data/" not in body  # no path of the machine that trained


def test_a_measured_value_that_is_not_finite_is_said():
    """metrics.jsonl, where the evaluation comes from, has null for it."""
    _, body = parse(model_card(facts_of(), METRICS | {"eval_loss": None}))
    assert "| loss | not finite |" in body and "| rewards/margins | 1.5000 |" in body


NAMES = [
    "# heading", "<script src=x>", "<img src=x onerror=y>", "[link](x)", "![image](x)", "*bold*",
    "__bold__", "~~struck~~", "`code`", "a | b", "&lt;b&gt;", "1. list", "+ list", "> quote", "a\n\n# heading", "\\",
    "<https:example.org>",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_and_neither_markdown_nor_html(name: str):
    """Of the output folder, the base and a data file, and the system prompt, as a renderer shows them."""
    facts = facts_of(data_sha256={f"data/{name}": "cd" * 32})
    facts["settings"] |= {"train.output_dir": f"runs/{name}", "model.path": f"models/{name}"}
    facts["settings"] |= {"data.system_prompt": name, "model.hub_id": ""}
    usual = facts_of("model.hub_id=", data_sha256={"data/x": "cd" * 32})
    tokens, usual = (render(model_card(each, {})) for each in (facts, usual))
    assert kinds(tokens) <= kinds(usual)
    assert tokens[0].tag == "h1" and "".join(t.content for t in tokens[1].children) == name.replace("\n", " ")
    codes = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    as_code = "".join(c for c in name if c not in "`\n").strip()
    assert codes.count(as_code) == 2, codes  # the base and the data file


def render(card: str) -> list:
    return MarkdownIt("gfm-like", {"linkify": False}).parse(parse(card)[1])


def kinds(tokens: list) -> set[str]:
    return {t.type for token in tokens for t in (token, *(token.children or ()))} - {"text_special"}  # escapes


@pytest.mark.parametrize("metrics", [{}, METRICS])
def test_no_evaluation_is_claimed_that_was_not_run(metrics: dict):
    _, body = parse(model_card(facts_of(), metrics))
    assert ("nothing was evaluated" in body) == (not metrics)
    assert ("On the held-out pairs" in body) == bool(metrics)
    assert not re.search(r"MT-Bench|AlpacaEval|win rate|state of the art|MMLU", body, re.IGNORECASE)


def test_the_text_section_says_what_training_put_around_the_text():
    def text(*overrides: str) -> str:
        return re.sub(r"\\([^\w\s])", r"\1", model_card(facts_of(*overrides), {}))  # without Markdown's escapes

    assert "Training put one BOS in front, inserted a system turn ('') where there was none, and" in text()
    assert "Training put no BOS in front, inserted no system turn, and" in text(
        "data.bos=false", "data.insert_system=false"
    )
    assert "a system turn ('Be kind.') where there was none" in text("data.system_prompt=Be kind.")
