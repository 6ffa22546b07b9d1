"""inputs.py: in what order a run's inputs are refused. What is refused, and how, is in test_train.py."""

from pathlib import Path

import pytest
from tiny import save_checkpoint, tiny_config, tiny_model

from notus import config, inputs
from notus.inputs import read_inputs

ROW = '{"instruction": "Say yes.", "chosen_response": "Yes.", "rejected_response": "No."}\n'


@pytest.fixture
def base(mistral_tokenizer_dir: Path, tmp_path: Path) -> Path:
    directory = save_checkpoint(tiny_model(tiny_config(vocab_size=32000, hidden_size=8)), tmp_path / "base")
    for path in mistral_tokenizer_dir.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> config.Config:
    (tmp_path / "pairs.jsonl").write_text(ROW)
    lines = [f'[model]\npath = "{base}"', f'[data]\ntrain = "{tmp_path / "pairs.jsonl"}"']
    lines += [f'cache_dir = "{tmp_path / "tokens"}"', '[train]\noutput_dir = "out"']
    (tmp_path / "run.toml").write_text("\n".join(lines))
    return config.load(tmp_path / "run.toml")


def test_all_is_read(settings: config.Config):
    read = read_inputs(settings)
    assert read.dims.hidden_size == 8 and read.tokenizer.vocab_size == 32000
    assert len(read.train) == 1 and len(read.test) == 0
    assert read.tokenizer.decode(read.train[0].chosen) == "Yes."


def test_weights_are_checked_before_data_is_read(settings: config.Config, base: Path, monkeypatch: pytest.MonkeyPatch):
    """Tokenizing takes a minute; a missing file of weights is known in a moment."""
    (base / "model.safetensors").unlink()
    monkeypatch.setattr(inputs, "load_pairs", lambda *_, **__: pytest.fail("data were read"))
    with pytest.raises(ValueError, match="no weights"):
        read_inputs(settings)


def test_a_dry_run_needs_no_weights(settings: config.Config, base: Path):
    (base / "model.safetensors").unlink()
    assert len(read_inputs(settings, need_weights=False).train) == 1
