"""card.py: front matter that the Hub can parse, the facts of the run, and no claim beyond them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from notus import config as configuration
from notus.card import model_card

RECIPE = configuration.load(Path(__file__).parent.parent / "configs" / "notus-7b-v1.toml")
FACTS = {
    "versions": {"notus": "1.2.3", "python": "3.11.7", "torch": "2.99.0"},
    "git_commit": "0123abc with changes",
    "model_sha256": "ab" * 32,
    "data_sha256": {"data/ultrafeedback/train.jsonl": "cd" * 32, "elsewhere/test.jsonl": "ef" * 32},
    "train_pairs": 61_619,
    "test_pairs": 2000,
    "steps": 2889,
}
METRICS = {"eval_loss": 0.49876, "eval_rewards/accuracies": 0.7812, "eval_rewards/margins": 1.5, "eval_runtime": 3.25}


def parse(card: str) -> tuple[dict, str]:
    empty, front, body = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(front), body


def test_front_matter_names_the_base_and_how_to_load_it():
    front, _ = parse(model_card(RECIPE, FACTS, METRICS))
    assert front == {
        "base_model": "zephyr-7b-sft-full",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "preference", "notus"],
    }


@pytest.mark.parametrize("name", ['a "quoted": name', "null", "1.0", "# not a comment", "base: {x}", "基座"])
def test_front_matter_holds_any_name(name: str):
    front, _ = parse(model_card(replace(RECIPE, model=configuration.Model(path=f"models/{name}")), FACTS, {}))
    assert front["base_model"] == name


def test_the_facts_are_those_of_the_run():
    _, body = parse(model_card(RECIPE, FACTS, METRICS))
    table = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", body, re.MULTILINE))
    assert table["pairs"] == "61,619"
    assert table["beta, label smoothing"] == "0.1, 0.0"
    assert table["optimizer, peak learning rate"] == "rmsprop, 5e-07"
    assert table["schedule"] == "linear, warmup over 10% of 2,889 steps"
    assert table["epochs, pairs a step"] == "3, 64"
    assert table["maximal length, of the prompt"] == "1024, 512 tokens"
    assert table["precision"] == "bfloat16 compute, float32 weights; exported in bfloat16"
    assert table["seed"] == "42"
    assert "runtime" not in table
    assert (table["loss"], table["rewards/accuracies"], table["rewards/margins"]) == ("0.4988", "0.7812", "1.5000")
    assert "# notus-7b-v1\n" in body and "notus\n1.2.3, commit `0123abc with changes`" in body
    assert f"- `train.jsonl`, sha256 `{'cd' * 32}`\n- `test.jsonl`, sha256 `{'ef' * 32}`" in body
    assert f"sha256 over files: `{'ab' * 32}`" in body
    assert "torch 2.99.0" in body and "data/ultrafeedback" not in body  # no path of the machine that trained


@pytest.mark.parametrize("metrics", [{}, METRICS])
def test_no_evaluation_is_claimed_that_was_not_run(metrics: dict):
    _, body = parse(model_card(RECIPE, FACTS, metrics))
    assert ("nothing was evaluated" in body) == (not metrics)
    assert ("On the held-out pairs" in body) == bool(metrics)
    assert not re.search(r"MT-Bench|AlpacaEval|win rate|state of the art|MMLU", body, re.IGNORECASE)


def test_the_text_section_says_what_training_put_around_the_text():
    def text(**changes) -> str:
        return model_card(replace(RECIPE, data=replace(RECIPE.data, **changes)), FACTS, {})

    assert "Training put one BOS in front, a system turn ('') where there was none, and" in text()
    assert "Training put no BOS in front, no system turn, and" in text(bos=False, insert_system=False)
    assert "a system turn ('Be kind.') where there was none" in text(system_prompt="Be kind.")
