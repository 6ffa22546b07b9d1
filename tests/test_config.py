"""What is written is what is used; what cannot be used is refused with its name, its value and its place."""

from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest

from notus import config

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))
REQUIRED = '[model]\npath = "base"\n[data]\ntrain = "a.jsonl"\n[train]\noutput_dir = "out"\n'


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.toml"
    path.write_text(REQUIRED)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load_and_show_every_setting(path):
    """A lab card leaves nothing to a default: what the run does can be read in the one file."""
    config.load(path)
    written = config.read_file(path)
    assert set(written) == set(config.SETTINGS)
    assert all(where.rpartition(":")[2].isdigit() for _, where in written.values())


def test_shipped_configs_are_there():
    assert {path.stem for path in CONFIGS} == {"demo", "notus-7b-v1", "notus-7b-v1-a100-40gb", "zephyr-7b-beta"}


def test_defaults_are_the_recipe_of_notus(minimal):
    defaults, recipe = config.load(minimal), config.load(FOLDER / "notus-7b-v1.toml")
    assert (defaults.dpo, defaults.reference) == (recipe.dpo, recipe.reference)
    assert replace(defaults.data, train=recipe.data.train, test=recipe.data.test) == recipe.data
    hardware = ("output_dir", "micro_batch_tokens", "activation_checkpointing", "device", "compile")
    assert replace(defaults.train, **{name: getattr(recipe.train, name) for name in hardware}) == recipe.train


def test_the_40_gb_run_is_the_same_run():
    large, small = (config.load(FOLDER / f"notus-7b-v1{suffix}.toml") for suffix in ("", "-a100-40gb"))
    differ = {f.name for f in fields(large.train) if getattr(large.train, f.name) != getattr(small.train, f.name)}
    assert differ <= {"micro_batch_tokens"}
    assert replace(small, train=large.train) == large


NASTY = 'a"b\\c\n\t\x7f\x01é🙂 # not a comment'


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_round_trip(path, tmp_path):
    c = config.load(path, ["data.train=['x.jsonl', 'y z.jsonl']", "dpo.beta=1e-5", "train.seed=0", "data.bos=false"])
    c = replace(c, model=config.Model(path=NASTY))
    saved = tmp_path / "resolved.toml"
    saved.write_text(config.to_toml(c), encoding="utf-8")
    assert config.load(saved) == c


def test_overrides(minimal):
    c = config.load(
        minimal,
        [
            "model.path=2024",  # text stays text
            "--data.test=dir/a b=c.jsonl",
            'data.train=["x", "y"]',
            "dpo.beta=1",  # a whole number is a number
            "train.optimizer=adamw",
            "train.seed=1",
            "--train.seed=7",  # the last one wins
            "data.insert_system=false",
        ],
    )
    assert c.model.path == "2024" and c.data.test == ("dir/a b=c.jsonl",) and c.data.train == ("x", "y")
    assert c.dpo.beta == 1.0 and type(c.dpo.beta) is float
    assert (c.train.optimizer, c.train.seed, c.data.insert_system) == ("adamw", 7, False)
    assert config.load(minimal, ["data.test=a", "data.test="]).data.test == ()


def test_frozen(minimal):
    with pytest.raises(FrozenInstanceError):
        config.load(minimal).dpo.beta = 0.2


@pytest.mark.parametrize(
    "override, message",
    [
        ("dpo.beta", "'dpo.beta' is not of the form section.key=value"),
        ("data.max_lenght=5", "unknown setting data.max_lenght; did you mean data.max_length?"),
        ("train.beta=0.1", "did you mean dpo.beta?"),
        ("beta=0.1", "did you mean dpo.beta?"),
        ("train.lr=0.1", "unknown setting train.lr; [train] has output_dir, learning_rate,"),
        ("log.to=x", "sections are model, data, dpo, train, reference"),
        ("dpo.beta=true", "dpo.beta must be a number, not True"),
        ("dpo.beta=", "dpo.beta must be a number, not ''"),
        ("dpo.beta=0", "dpo.beta = 0.0 is outside (0, inf)"),
        ("dpo.beta=nan", "dpo.beta = nan is outside (0, inf)"),
        ("train.learning_rate=inf", "train.learning_rate = inf is outside (0, inf)"),
        ("dpo.label_smoothing=0.5", "dpo.label_smoothing = 0.5 is outside [0, 0.5)"),
        ("train.warmup_ratio=1.1", "train.warmup_ratio = 1.1 is outside [0, 1]"),
        ("train.seed=true", "train.seed must be a whole number, not True"),
        ("train.seed=1.0", "train.seed must be a whole number, not 1.0"),
        ("train.seed=-1", "train.seed = -1 is outside [0, inf)"),
        ("data.bos=1", "data.bos must be true or false, not 1"),
        ("data.train=[1]", "data.train must be a path or a list of paths, not [1]"),
        ("data.train=", "data.train is required"),
        ("train.optimizer=sgd", 'train.optimizer must be "rmsprop" or "adamw", not \'sgd\''),
        ("data.max_prompt_length=1024", "data.max_prompt_length = 1024 must be below data.max_length = 1024"),
    ],
)
def test_refusals_on_the_command_line(minimal, override, message):
    with pytest.raises(ValueError) as error:
        config.load(minimal, [override])
    assert message in str(error.value)
    assert str(error.value).startswith(("command line", str(minimal)))


@pytest.mark.parametrize(
    "text, place, message",
    [
        ("[dpo]\n# comment\nbeta = -1\n", ":9: ", "dpo.beta = -1.0 is outside (0, inf)"),
        ("[dpo]\nbeta = '0.1'\n", ":8: ", "dpo.beta must be a number, not '0.1'"),
        ("[dop]\nbeta = 0.1\n", ":8: ", "unknown setting dop.beta; did you mean dpo.beta?"),
        ("[optimizer]\n", ":7: ", "unknown setting optimizer; did you mean train.optimizer?"),
        ("[dpo\n", ": ", "at line 7"),
        ("[reference]\ncache_dir = 7\n", ":8: ", "reference.cache_dir must be text, not 7"),
    ],
)
def test_refusals_in_the_file(tmp_path, text, place, message):
    path = tmp_path / "bad.toml"
    path.write_text(REQUIRED + text)
    with pytest.raises(ValueError) as error:
        config.load(path)
    assert str(error.value).startswith(f"{path}{place}") and message in str(error.value)


def test_refusals_of_the_file_itself(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.toml: No such file"):
        config.load(tmp_path / "missing.toml")
    (tmp_path / "latin.toml").write_bytes(b'[model]\npath = "\xe9"\n')
    with pytest.raises(ValueError, match=r"latin\.toml: .*utf-8"):
        config.load(tmp_path / "latin.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(ValueError, match=r"empty\.toml: model\.path is required"):
        config.load(tmp_path / "empty.toml")


def test_contradictions_name_every_place(minimal):
    with pytest.raises(ValueError, match=r"^default, command line: data\.max_prompt_length = 512 must be below"):
        config.load(minimal, ["data.max_length=512"])
    with pytest.raises(ValueError, match=r"^command line: data\.system_prompt = 'Be brief\.' would never be used"):
        config.load(minimal, ["data.system_prompt=Be brief.", "data.insert_system=false"])


def test_help_names_every_setting():
    lines = [line.split()[0] for line in config.help_text().splitlines() if line.startswith("  ") and line[2] != " "]
    assert lines == [name.rpartition(".")[2] for name in config.SETTINGS]
    assert max(map(len, config.help_text().splitlines())) <= 120
