"""report.py: what a run says is what it knows, and the commands it prints run as printed."""

import importlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from notus import config as configuration
from notus import demo, run
from notus.base import read_base
from notus.config import Config
from notus.cost import num_parameters
from notus.distributed import World
from notus.model import Mistral
from notus.report import banner, dry_run, finish
from notus.run import job_of, read_inputs
from notus.slices import Slice

FOLDER = "it's a $HOME; run & more"  # what a shell would take apart
SHAPE = "instruction/chosen_response/rejected_response strings"
FIRST = {"eval_loss": 0.6931, "eval_rewards/accuracies": 0.0, "eval_rewards/margins": 0.0, "eval_runtime": 1.0}
LAST = {"eval_loss": 0.25, "eval_rewards/accuracies": 0.875, "eval_rewards/margins": 2.0, "eval_runtime": 1.0}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's checkpoint, very small and untrained, and a few pairs."""
    home = tmp_path_factory.mktemp("home") / FOLDER
    (home / "base").mkdir(parents=True)
    demo.write_shell(home / "base", demo.Settings(hidden_size=16, num_layers=1))
    model = Mistral(read_base(home / "base", need_weights=False).dims)
    model.initialize(seed=0)
    save_file(dict(model.state_dict()), home / "base" / "model.safetensors", metadata={"format": "pt"})
    row = {"instruction": "Say yes.", "chosen_response": "Yes.", "rejected_response": "No."}
    rows = [row | {"instruction": f"Say yes {n} times."} for n in range(3)]
    rows.append(row | {"rejected_response": ""})
    (home / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    (home / "test.jsonl").write_text(json.dumps(row) + "\n")
    return home


@pytest.fixture
def settings(home: Path, tmp_path: Path) -> Config:
    return configuration.load(configuration.CONFIGS / "demo.toml", overrides(home, tmp_path))


def overrides(home: Path, output: Path) -> list[str]:
    return [
        f"model.path={home / 'base'}", f"data.train={home / 'train.jsonl'}", f"data.test={home / 'test.jsonl'}",
        f"data.cache_dir={home / 'tokens'}", "data.drop_bad_pairs=true", f"train.output_dir={output / FOLDER}",
    ]  # fmt: skip


def facts_of(config: Config, steps: int = 12) -> dict[str, Any]:
    return run.environment([]) | {"settings": configuration.flat(config), "steps": steps}


def world(size: int = 1) -> World:
    return World(0, size, torch.device("cpu"), None)


# --- before a run ----------------------------------------------------------------------------------------------------


def test_the_banner_names_model_template_frame_data_and_schedule(home: Path, settings: Config):
    inputs = read_inputs(settings)
    lines = banner(facts_of(settings), inputs, world(2), ["the first note", "the second note"], step=0).splitlines()
    assert lines == [
        f"model       {home / 'base'}: 1 layers x 16, float32 on 2 x CPU",
        f"template    {inputs.base.template.origin}; BOS added, system turn inserted: ''",
        f"train       {home / 'train.jsonl'}: 3 pairs of 4 rows (dropped: an answer is empty 1): 4 {SHAPE}",
        f"held out    {home / 'test.jsonl'}: 1 pairs of 1 rows: 1 {SHAPE}",
        "steps       12 of 32 pairs, 2 epochs; dpo, beta 0.1, rmsprop, peak learning rate 2e-05, linear",
        "note        the first note",
        "note        the second note",
    ]
    words = [*overrides(home, Path(settings.train.output_dir)), "data.test=", "data.test_size=1"]
    split = configuration.load(configuration.CONFIGS / "demo.toml", words)
    halves = banner(facts_of(split), read_inputs(split), world(), [], step=0).splitlines()[2:4]
    assert halves[0].endswith(f"train.jsonl: 2 pairs of 3 rows (dropped: an answer is empty 1): 3 {SHAPE}")
    assert halves[1] == f"held out    data.test_size 1: 1 pairs of 1 rows: 1 {SHAPE}"
    resumed = banner(facts_of(settings, 2889), inputs, world(), [], step=1400).splitlines()
    assert resumed[-2].startswith("steps       2,889 of 32 pairs") and resumed[-1] == "resuming    after step 1,400"


@pytest.mark.parametrize(
    ("changes", "frame"),
    [
        (["data.bos=false", "data.insert_system=false"], "; BOS not added, system turn inserted: none"),
        (["data.system_prompt=Be kind."], "; BOS added, system turn inserted: 'Be kind.'"),
    ],
)
def test_the_banner_says_the_frame_and_where_the_template_comes_from(
    home: Path, tmp_path: Path, changes: list[str], frame: str
):
    """A chat_template.jinja beside the weights is what transformers takes, and so is what is named."""
    base = shutil.copytree(home / "base", tmp_path / "base")
    template = json.loads((base / "tokenizer_config.json").read_text())["chat_template"]
    (base / "chat_template.jinja").write_text(template)
    for directory, origin in ((base, "chat_template.jinja"), (home / "base", "tokenizer_config.json")):
        words = [*overrides(home, tmp_path), f"model.path={directory}", *changes, "data.test="]
        config = configuration.load(configuration.CONFIGS / "demo.toml", words)
        lines = banner(facts_of(config), read_inputs(config), world(), [], step=0).splitlines()
        assert lines[1].startswith(f"template    {directory / origin}") and lines[1].endswith(frame)
        assert not any(line.startswith("held out") for line in lines)


def test_a_dry_run_shows_data_cost_and_a_pair_as_the_model_reads_it(home: Path, settings: Config, tmp_path: Path):
    inputs = read_inputs(settings, need_weights=False)._replace(notes=["a note"])
    report = dry_run(inputs, job_of(settings, num_gpus=3))
    assert f"template    {inputs.base.template.origin}\n" in report
    assert f"train       3 pairs of 4 rows (dropped: an answer is empty 1): 4 {SHAPE}\n" in report
    assert (
        f"held out    1 pairs of 1 rows: 1 {SHAPE}\nnote        a note\nsteps       2: 2 epochs of 3 pairs, 32 each\n"
        in report
    )
    assert f"parameters  {sum(num_parameters(inputs.base.dims)):,}\n" in report
    assert "GiB a GPU, estimated, with 3 GPUs and 4,096 tokens each, recomputing none\n" in report
    assert f"the first pair, {home / 'train.jsonl'}:1:\n" in report
    assert "scored :  Yes.</s>\n" in report and report.endswith("scored :  No.</s>")
    assert "<s><|system|>\\n</s>\\n<|user|>\\nSay yes 0 times.</s>\\n<|assistant|>\\n\n" in report
    alone = configuration.load(configuration.CONFIGS / "demo.toml", [*overrides(home, tmp_path), "data.test="])
    assert "held out    none\n" in dry_run(read_inputs(alone), job_of(alone, 1))


# --- after a run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(home: Path, settings: Config) -> Path:
    """An output folder as training leaves it: its model ends each answer at the first token."""
    output = Path(settings.train.output_dir)
    shutil.copytree(home / "base", output / "final")
    vocabulary = read_base(home / "base").dims.vocab_size
    (output / "final" / "generation_config.json").write_text(json.dumps({"eos_token_id": [*range(vocabulary)]}))
    (output / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5, "loss": 0.69}\n')
    return output


def test_the_end_sums_up_and_says_where_everything_is(finished: Path, settings: Config):
    said = finish(facts_of(settings), FIRST, LAST, seconds=200.04, curves="runs/curves.png")
    summary = json.loads((finished / "summary.json").read_text())
    assert summary == {"steps": 12, "seconds": 200.0, "first": FIRST, "last": LAST}
    assert "done: 12 steps in 3m20s\n" in said
    assert "  held out  loss 0.693 -> 0.250  accuracy 0.000 -> 0.875  margin 0.000 -> 2.000\n" in said
    assert f"  model     {finished / 'final'}  (Hugging Face layout, float32)\n" in said
    assert f"  metrics   {finished / 'metrics.jsonl'}\n" in said and "  curves    runs/curves.png\n" in said


def test_the_slices_of_the_last_evaluation_are_a_table_and_kept(finished: Path, settings: Config):
    part = Slice("source", "wiki", 42, 0.875, 0.75, 0.95, 101.6, 98.0)._asdict()
    said = finish(facts_of(settings), FIRST, LAST | {"eval_slices": [part]}, seconds=1.0, curves="")
    assert "  source: wiki                          42    87.5 %    75.0 to 95.0     102, 98\n" in said
    assert json.loads((finished / "summary.json").read_text())["last"]["eval_slices"] == [part]


def test_an_evaluation_that_is_not_finite_is_said_and_null(finished: Path, settings: Config):
    said = finish(facts_of(settings), FIRST, LAST | {"eval_loss": None}, seconds=1.0, curves="")
    assert "loss 0.693 -> not finite  accuracy 0.000 -> 0.875" in said
    assert '"eval_loss": null' in (finished / "summary.json").read_text()


def test_a_run_without_held_out_pairs_has_nothing_to_compare(finished: Path, settings: Config):
    said = finish(facts_of(settings), {}, {}, seconds=1.0, curves="")
    assert "held out" not in said and "notus.evaluate" not in said  # there is nothing to compare on
    assert json.loads((finished / "summary.json").read_text())["last"] == {}


@pytest.mark.usefixtures("finished")
@pytest.mark.parametrize("held_out", [[], ["data.test=", "data.test_size=0.3"]])
def test_the_commands_of_the_end_run_as_printed(home: Path, settings: Config, monkeypatch, capsys, held_out: list[str]):
    """With the arguments that a real shell makes of them. Without quotes it would take the paths apart."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = [*overrides(home, Path(settings.train.output_dir).parent), *held_out]
    settings = configuration.load(configuration.CONFIGS / "demo.toml", words)
    lines = finish(facts_of(settings), FIRST, LAST, seconds=1.0, curves="").splitlines()
    printed = lines[lines.index("next:") + 1 :]
    shell = [subprocess.check_output(["sh", "-c", f"printf '%s\\0' {line}"], text=True) for line in printed]
    commands = [words.split("\0")[:-1] for words in shell]
    assert [words[:3] for words in commands] == [["python", "-m", f"notus.{name}"] for name in ("generate", "evaluate")]
    for _, _, module, *arguments in commands:
        monkeypatch.setattr("sys.stdin", io.StringIO("Say yes."))
        assert importlib.import_module(module).main(arguments) == 0
    report = capsys.readouterr().out
    assert "0.6931  dpo, beta 0.1; 0.6931 where model = base" in report  # the trained model is the base here
