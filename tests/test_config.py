"""config.py: the written value is the used value; an unusable one is refused with its name, its value and its place."""

import json
import os
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from notus import config

SHIPPED = sorted(config.CONFIGS.glob("*.toml"))
REQUIRED = '[model]\npath = "base"\n[data]\ntrain = "a.jsonl"\n[train]\noutput_dir = "out"\n'


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.toml"
    path.write_text(REQUIRED)
    return path


# --- the shipped files ---------------------------------------------------------------------------------------------


def test_shipped_configs_are_there():
    recipes = {"notus-7b-v1", "notus-7b-v1-a100-40gb", "notus-7b-v1-lora", "zephyr-7b-beta", "zephyr-7b-2024"}
    families = {"smollm2-135m", "llama-3.2-1b", "llama-3.1-tulu-3-8b", "qwen2.5-0.5b", "qwen2.5-7b", "qwen3-0.6b"}
    labels = {"notus-7b-v1-scores", "notus-7b-v1-repaired"}
    assert {path.stem for path in SHIPPED} == {"demo", *recipes, *labels, *families, "qwen3-8b"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_line_changes_a_value_or_has_a_comment(path):
    tree, lines = config.parse_file(path)
    base = tree.pop("extends", None)
    without = (
        config.flat(config.load(path.parent / base)) if base else {n: f.default for n, f in config.SETTINGS.items()}
    )
    text = path.read_text().splitlines()
    for name, value in ((f"{s}.{key}", value) for s, table in tree.items() for key, value in table.items()):
        assert config.convert(name, value, "") != without[name] or "#" in text[lines[name] - 1], name


def test_the_recipe_names_its_optimizer():
    """The default is adamw, which is not what Notus and Zephyr of 2023 used."""
    assert config.SETTINGS["train.optimizer"].default == "adamw"
    notus = {f"notus-7b-v1{name}" for name in ("", "-a100-40gb", "-lora", "-scores", "-repaired")}
    rmsprop = {"demo", *notus, "zephyr-7b-beta"}
    named = {path.stem: config.load(path).train.optimizer for path in SHIPPED}
    assert named == dict.fromkeys(named, "adamw") | dict.fromkeys(rmsprop, "rmsprop")


def test_the_handbooks_recipe_of_2024_beside_that_of_2023():
    """recipes/zephyr-7b-beta/dpo/config_full.yaml: beta 0.01, adamw_torch, cosine, one epoch, 8 x 8 x 2 pairs."""
    new = config.load(config.CONFIGS / "zephyr-7b-2024.toml")
    assert (new.dpo.beta, new.train.optimizer, new.train.schedule) == (0.01, "adamw", "cosine")
    assert (new.train.num_train_epochs, new.train.pairs_per_step, new.train.learning_rate) == (1, 128, 5e-7)
    assert (new.data.max_length, new.data.max_prompt_length, new.train.warmup_ratio) == (1024, 512, 0.1)
    old = config.load(config.CONFIGS / "zephyr-7b-beta.toml")
    assert (old.dpo.beta, old.train.optimizer, old.train.schedule) == (0.1, "rmsprop", "linear")


def test_a_lora_run_differs_from_the_recipe_by_lora_and_its_folder():
    full, lora = (config.flat(config.load(config.CONFIGS / f"notus-7b-v1{suffix}.toml")) for suffix in ("", "-lora"))
    assert {name for name in full if full[name] != lora[name]} == {"lora.rank", "train.output_dir"}


def test_models_without_bos_and_templates_with_a_system_turn_of_their_own_are_left_so():
    """What a Qwen or a Llama 3 was fine-tuned with: its own frame, not Zephyr's."""
    for path in SHIPPED:
        zephyr, data = path.stem.startswith(("notus", "zephyr", "demo")), config.load(path).data
        assert (data.bos, data.insert_system) == (not path.stem.startswith("qwen"), zephyr), path


def test_the_40_gb_run_is_the_same_run():
    large, small = (
        config.flat(config.load(config.CONFIGS / f"notus-7b-v1{suffix}.toml")) for suffix in ("", "-a100-40gb")
    )
    assert {name for name in large if large[name] != small[name]} == {"train.micro_batch_tokens"}


# --- reading -------------------------------------------------------------------------------------------------------

NASTY = 'a"b\\c\n\t\x7f\x01é🙂\u2028 # not a comment'


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_round_trip(path, tmp_path):
    c = config.load(
        path,
        [
            "data.train=['x.jsonl', 'y z.jsonl']",
            "dpo.beta=1e-5",
            "train.seed=0",
            "data.bos=false",
            "data.insert_system=true",
        ],
    )
    c = replace(c, model=config.Model(path=NASTY), data=replace(c.data, system_prompt=NASTY))
    saved = tmp_path / "elsewhere" / "resolved.toml"
    saved.parent.mkdir()
    saved.write_text(config.to_toml(c), encoding="utf-8")
    assert config.load(saved) == c
    assert "extends" not in config.to_toml(c)


def test_overrides(minimal):
    c = config.load(
        minimal,
        [
            "model.path=2024",  # text stays text
            "--data.test=dir/a b=c.jsonl",
            'data.train=["x", "y"]',
            "dpo.beta=1",  # a whole number is a number
            "train.optimizer=rmsprop",
            "train.seed=1",
            "--train.seed=4294967295",  # the last one wins
            "data.system_prompt=[1]",
        ],
    )
    assert c.model.path == "2024" and c.data.test == ("dir/a b=c.jsonl",) and c.data.train == ("x", "y")
    assert c.dpo.beta == 1.0 and type(c.dpo.beta) is float
    assert (c.train.optimizer, c.train.seed, c.data.system_prompt) == ("rmsprop", 2**32 - 1, "[1]")
    assert config.load(minimal, ["data.test=a", "data.test="]).data.test == ()
    assert config.load(minimal, [r'data.system_prompt="a\nb"']).data.system_prompt == "a\nb"


def test_frozen(minimal):
    with pytest.raises(FrozenInstanceError):
        config.load(minimal).dpo.beta = 0.2


def test_a_file_with_a_byte_order_mark_is_read(minimal):
    plain = config.load(minimal)
    minimal.write_text("\ufeff" + REQUIRED, encoding="utf-8")
    assert config.load(minimal) == plain


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [name for name, f in config.SETTINGS.items() if f.metadata["path"]]
    plain = ("data.train", "data.test", "dpo.reference")
    assert names == [n for n in config.SETTINGS if n in plain or n.endswith(("path", "_dir"))]
    path = tmp_path / "home.toml"
    path.write_text("".join(f'{name} = "~/{name}"\n' for name in names) + 'data.system_prompt = "~"\n')
    for c in (config.load(path), config.load("~/home.toml", [f"{name}=~/{name}" for name in names])):
        for name in names:
            assert config.flat(c)[name] in (f"{tmp_path}/{name}", (f"{tmp_path}/{name}",))
        assert c.data.system_prompt == "~"
    assert config.load(path, ["model.path=./~"]).model.path == "./~"
    with pytest.raises(ValueError, match=r"^command line: model\.path = '~nobody-here/x': there is no such home"):
        config.load(path, ["model.path=~nobody-here/x"])


def test_a_typo_is_refused_without_importing_more_than_the_standard_library():
    code = "import sys; before = {*sys.modules}; import notus.config; print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {name.partition(".")[0] for name in done.stdout.split()} <= sys.stdlib_module_names | {"notus"}


def test_train_py_reports_a_typo_before_it_imports_torch():
    """In a tenth of a second of CPU, then; torch and the rest take seconds."""
    command = [sys.executable, "-X", "importtime", Path(__file__).parent.parent / "train.py", "dpo.bta=0.1"]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert said == ["train.py: error: command line: unknown setting dpo.bta; did you mean dpo.beta?"]
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert done.returncode == 2 and "notus" in loaded
    assert not loaded & {"torch", "numpy", "tokenizers", "safetensors", "jinja2", "tqdm", "sentencepiece"}


# --- extends -------------------------------------------------------------------------------------------------------


def test_extends_reads_the_other_file_first(minimal, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "middle.toml").write_text('extends = "../minimal.toml"\n[dpo]\nbeta = 0.2\n[train]\nseed = 1\n')
    (tmp_path / "top.toml").write_text('extends = "sub/middle.toml"\n[train]\nseed = 2\n')
    c = config.load(tmp_path / "top.toml", ["train.log_steps=7"])
    assert (c.model.path, c.dpo.beta, c.train.seed, c.train.log_steps) == ("base", 0.2, 2, 7)

    minimal.write_text(REQUIRED + "[dpo]\nlabel_smoothing = 1\n")
    with pytest.raises(ValueError, match=r"sub/\.\./minimal\.toml:8: dpo\.label_smoothing = 1\.0 is outside"):
        config.load(tmp_path / "top.toml")

    monkeypatch.setenv("HOME", str(tmp_path))
    minimal.write_text(REQUIRED)
    (tmp_path / "sub" / "middle.toml").write_text('extends = "~/minimal.toml"\n')
    assert config.load(tmp_path / "top.toml").model.path == "base"


@pytest.mark.parametrize(
    "extends, message",
    [
        ('"none.toml"', ":2: extends = 'none.toml', but there is no file "),
        ('""', ":2: extends = '', but there is no file "),
        ('["a", "b"]', ":2: extends must be the path of one file, not ['a', 'b']"),
        ('"bad.toml"', ":2: extends = 'bad.toml' leads back to the same file"),
        ('"circle.toml"', ":1: extends = './bad.toml' leads back to the same file"),
    ],
)
def test_refusals_of_extends(tmp_path, extends, message):
    (tmp_path / "circle.toml").write_text('extends = "./bad.toml"\n')
    (tmp_path / "bad.toml").write_text(f"\nextends = {extends}\n{REQUIRED}")
    with pytest.raises(ValueError) as error:
        config.load(tmp_path / "bad.toml")
    assert message in str(error.value)


# --- the words of a command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, path",
    [
        ([], None),
        (["dpo.beta=0.1", "--train.seed=2", "dpo.beta=0.2"], None),
        (["some.toml", "dpo.beta=0.1"], "some.toml"),
        (["train.toml"], "train.toml"),  # a section's name, but no "="
        (["/dev/fd/63"], "/dev/fd/63"),
        (["runs/lr=1/config.toml", "train.seed=1"], "runs/lr=1/config.toml"),
        (["./train.seed=1/config.toml"], "./train.seed=1/config.toml"),
        (["exists=1", "train.seed=1"], "exists=1"),
        (["data.train=pairs.toml"], None),
        (["--model.path=base.toml"], None),
        (["lr=1"], None),  # `load` refuses the name
        (["data.system_prompt=" + "long" * 1000], None),
    ],
)
def test_split_words(words, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exists=1").write_text(REQUIRED)
    assert config.split_words(words) == (path, words[path is not None :])


@pytest.mark.parametrize(
    "words, message",
    [
        (["a.toml", "beta"], "'beta' is not of the form section.key=value; did you mean dpo.beta?"),
        (["dpo.beta", "0.1"], "'dpo.beta' is not of the form section.key=value; write dpo.beta=VALUE"),
        (["--resume"], "'--resume' is not of the form section.key=value; sections are model,"),
        (["--config", "a.toml"], "give one config file, as the first word, without a flag"),
        (
            ["dpo.beta=1", "a.toml"],
            "'a.toml' is not of the form section.key=value; give one config file, as the first word",
        ),
        (
            ["a.toml", "b.toml"],
            "'b.toml' is not of the form section.key=value; give one config file, as the first word",
        ),
        ([""], "'' is not of the form section.key=value"),
    ],
)
def test_refused_words(words, message):
    with pytest.raises(ValueError) as error:
        config.split_words(words)
    assert str(error.value).startswith("command line: ") and message in str(error.value)


def test_lora_without_a_target_is_refused(minimal):
    with pytest.raises(ValueError, match=r"lora\.rank = 8, but lora\.targets is empty, so nothing would be trained"):
        config.load(minimal, ["lora.rank=8", "lora.targets=[]"])
    assert config.load(minimal, ["lora.rank=8", "lora.targets=up_proj"]).lora.targets == ("up_proj",)
    assert config.load(minimal, ["dpo.reference="]).dpo.reference == ""


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, message",
    [
        ("dpo.beta", "'dpo.beta' is not of the form section.key=value"),
        ("data.max_lenght=5", "unknown setting data.max_lenght; did you mean data.max_length?"),
        ("data.cach_dir=x", "unknown setting data.cach_dir; did you mean data.cache_dir?"),
        ("train.cache_dir=x", "did you mean data.cache_dir or reference.cache_dir?"),
        ("train.beta=0.1", "did you mean dpo.beta?"),
        ("beta=0.1", "did you mean dpo.beta?"),
        ("train.lr=0.1", "unknown setting train.lr; [train] has output_dir, learning_rate,"),
        ("train.schedule=constant", 'train.schedule must be "linear" or "cosine", not \'constant\''),
        ("lora.rank=-1", "lora.rank = -1 is outside [0, 65536]"),
        ("lora.rank=65537", "lora.rank = 65537 is outside [0, 65536]"),
        ("lora.alpha=0", "lora.alpha = 0.0 is outside (0, inf)"),
        ("lora.targets=qproj", "lora.targets has 'qproj'; it must be of q_proj, k_proj, v_proj, o_proj, gate_proj, up"),
        ("lora.targets=[7]", "lora.targets must be a text or a list of texts, not [7]"),
        ("lora.targets=['']", "lora.targets must be a text or a list of texts, not ['']"),
        ("lora.export=adapter", 'lora.export = "adapter", but lora.rank = 0: there is no adapter without LoRA'),
        ("zz.zzz=x", "sections are model, data, dpo, lora, train, log, reference"),
        ("--config=x.toml", "unknown setting config; give one config file, as the first word, without a flag"),
        ("extends=x.toml", "unknown setting extends; write extends in a file, above its first [section]"),
        ("dpo.beta=true", "dpo.beta must be a number, not True"),
        ("dpo.beta=", "dpo.beta must be a number, not ''"),
        ("dpo.beta=0", "dpo.beta = 0.0 is outside (0, inf)"),
        ("dpo.beta=nan", "dpo.beta = nan is outside (0, inf)"),
        ("dpo.beta=inf", "dpo.beta = inf is outside (0, inf)"),
        ("dpo.beta=1e999", "dpo.beta = inf is outside (0, inf)"),
        ("train.weight_decay=nan", "train.weight_decay = nan is outside [0, inf)"),
        ("dpo.label_smoothing=0.5", "dpo.label_smoothing = 0.5 is outside [0, 0.5)"),
        ("train.warmup_ratio=1.1", "train.warmup_ratio = 1.1 is outside [0, 1]"),
        ("distributed.timeout_minutes=1e300", "distributed.timeout_minutes = 1e+300 is outside (0, 1e6]"),
        ("train.seed=true", "train.seed must be a whole number, not True"),
        ("train.seed=1.0", "train.seed must be a whole number, not 1.0"),
        ("train.seed=-1", "train.seed = -1 is outside [0, 4294967296)"),
        ("train.seed=4294967296", "train.seed = 4294967296 is outside [0, 4294967296)"),
        ("data.max_length=9223372036854775808", "data.max_length is a whole number beyond 64 bits"),
        ("dpo.beta=" + "9" * 400, "dpo.beta is a whole number beyond 64 bits"),
        ("dpo.beta=" + "9" * 5000, "dpo.beta must be a number, not '999"),  # int() itself refuses so many digits
        ("dpo.beta=" + "[" * 5000, "dpo.beta must be a number, not '[[["),
        ("data.train=[0x" + "f" * 5000 + "]", "a path or a list of paths, not a list too large to show"),
        ("data.bos=1", "data.bos must be true or false, not 1"),
        ("data.train=[1]", "data.train must be a path or a list of paths, not [1]"),
        ("data.train=", "data.train is required"),
        ("data.cache_dir=", "data.cache_dir must be a path, not ''"),
        (r'model.path="a\u0000b"', r"model.path = 'a\x00b' is not a path"),
        ("train.optimizer=sgd", 'train.optimizer must be "rmsprop" or "adamw", not \'sgd\''),
        ("dpo.beta=0.1\n[train]\nseed = 1", r"'dpo.beta=0.1\n[train]\nseed = 1' has a line break"),
        ("train.output_dir=out\r", r"'train.output_dir=out\r' has a line break"),
        ("model.path=\udce9", r"'model.path=\udce9' is not UTF-8"),
        ("data.max_prompt_length=1024", "data.max_prompt_length = 1024 must be below data.max_length = 1024"),
    ],
)
def test_refusals_on_the_command_line(minimal, override, message):
    with pytest.raises(ValueError) as error:
        config.load(minimal, [override])
    assert message in str(error.value) and len(str(error.value)) < 500
    assert str(error.value).startswith(("command line", str(minimal)))


@pytest.mark.parametrize(
    ("file", "overrides", "message"),
    [
        ('loss = "ipo"', [], '{path}:8: dpo.loss = "ipo" needs a dpo.beta beside it, usually 0.01 to 1'),
        ("", ["dpo.loss=dpo"], 'command line: dpo.loss = "dpo" needs a dpo.beta beside it, usually 0.01 to 0.5'),
        # The beta below was meant for another loss.
        ("beta = 0.1", ["dpo.loss=simpo"], 'line: dpo.loss = "simpo" needs a dpo.beta beside it, usually 2 to 10'),
        ("beta = 0.1", ["dpo.loss=dpo_norm"], "usually 2 to 10"), ("", ["dpo.loss=apo_zero"], "usually 0.05 to 0.5"),
        ("", ["dpo.loss=simpo", "dpo.beta=2"], 'dpo.loss = "simpo" needs a dpo.margin, usually 0.3 to 1.6; 0 is none'),
        (
            "label_smoothing = 0.1",
            ["dpo.loss=ipo", "dpo.beta=1"],
            "{path}:8, command line: dpo.label_smoothing = 0.1 would never be used: only dpo and dpo_norm can have it, "
            'and dpo.loss is "ipo"',
        ),
        ("margin = 0.5", [], "{path}:8, default: dpo.margin = 0.5 would never be used: only simpo can have it"),
        (
            'reference = "x"',
            ["dpo.loss=simpo", "dpo.beta=2", "dpo.margin=0"],
            "dpo.reference = 'x' would never be used: dpo.loss is \"simpo\", which has no reference",
        ),
        ("", ["dpo.loss=hinge"], 'dpo.loss must be "dpo" or "dpo_norm" or "ipo" or "simpo" or "apo_zero"'),
        ("", ["dpo.nll_weight=-1"], "dpo.nll_weight = -1.0 is outside [0, inf)"),
    ],
)  # fmt: skip
def test_a_loss_has_a_beta_of_its_own_and_no_setting_that_it_ignores(tmp_path, file, overrides, message):
    path = tmp_path / "run.toml"
    path.write_text(REQUIRED + f"[dpo]\n{file}\n")
    with pytest.raises(ValueError, match=re.escape(message.format(path=path))):
        config.load(path, overrides)


def test_a_beta_is_inherited_with_its_loss_only(tmp_path):
    """Without a loss named, all is as before there were others."""
    base, path = tmp_path / "base.toml", tmp_path / "run.toml"
    base.write_text(REQUIRED + '[dpo]\nloss = "ipo"\nbeta = 0.5\n')
    path.write_text('extends = "base.toml"\n[dpo]\nbeta = 0.7\n')
    assert config.load(path).dpo == config.DPO(loss="ipo", beta=0.7)
    assert config.load(path, ["dpo.beta=0.9"]).dpo == config.DPO(loss="ipo", beta=0.9)
    path.write_text('extends = "base.toml"\n[dpo]\nloss = "apo_zero"\n')
    with pytest.raises(ValueError, match=r'run\.toml:3: dpo\.loss = "apo_zero" needs a dpo\.beta beside it'):
        config.load(path)
    assert config.load(path, ["dpo.beta=0.1"]).dpo == config.DPO(loss="apo_zero", beta=0.1)
    base.write_text(REQUIRED)
    assert config.load(base).dpo == config.DPO(loss="dpo", beta=0.1)
    assert config.load(base, ["dpo.beta=0.2", "dpo.label_smoothing=0.1"]).dpo.label_smoothing == 0.1
    words = ["dpo.loss=simpo", "dpo.margin=0", "dpo.beta=2", "dpo.nll_weight=0.1"]
    path.write_text(config.to_toml(config.load(base, words)))
    assert config.load(path).dpo == config.DPO(loss="simpo", beta=2.0, nll_weight=0.1)


@pytest.mark.parametrize(
    "text, place, message",
    [
        ("[dpo]\n# comment\nbeta = -1\n", ":9: ", "dpo.beta = -1.0 is outside (0, inf)"),
        ("[dpo]\n# a \u2028 b\nbeta = -1\n", ":9: ", "dpo.beta = -1.0 is outside (0, inf)"),
        ("[dpo]\nbeta = '0.1'\n", ":8: ", "dpo.beta must be a number, not '0.1'"),
        ("[dop]\nbeta = 0.1\n", ":8: ", "unknown setting dop.beta; did you mean dpo.beta?"),
        ("[optimizer]\n", ":7: ", "unknown setting optimizer; did you mean train.optimizer?"),
        ("extends = 'a.toml'\n", ":7: ", "unknown setting train.extends; write extends in a file, above its first"),
        ("[dpo\n", ": ", "at line 7"),
        ("[model]\n", ": ", "Cannot declare ('model',) twice (at line 7, column 7)"),
        ("[reference]\ncache_dir = 7\n", ":8: ", "reference.cache_dir must be a path, not 7"),
        ("[dpo]\nbeta = 0x" + "f" * 5000 + "\n", ":8: ", "dpo.beta is a whole number beyond 64 bits"),
        ("[dpo]\nbeta = " + "9" * 5000 + "\n", ": ", "a number has too many digits, or values are nested too deeply"),
        ("[dpo]\nbeta = " + "[" * 5000 + "\n", ": ", "a number has too many digits, or values are nested too deeply"),
        ("[dpo.beta" + ".a" * 5000 + "]\n", ": ", "dpo.beta must be a number, not "),  # a dict
    ],
)
def test_refusals_in_the_file(tmp_path, text, place, message):
    path = tmp_path / "bad.toml"
    path.write_text(REQUIRED + text, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        config.load(path)
    assert str(error.value).startswith(f"{path}{place}") and message in str(error.value)


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[model]\npath = "\xe9"\n', r":2: not UTF-8 text: invalid continuation byte; save it as UTF-8"),
        (REQUIRED.encode("utf-16"), ": looks like UTF-16 text; save it as UTF-8"),
        (REQUIRED.encode("utf-16-le"), ": looks like UTF-16 text; save it as UTF-8"),
        (REQUIRED.encode("utf-16-be"), ": looks like UTF-16 text; save it as UTF-8"),
        (b"", r": model\.path is required"),
    ],
)
def test_refusals_of_the_file_itself(tmp_path, content, message):
    (tmp_path / "bad.toml").write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.toml{message}"):
        config.load(tmp_path / "bad.toml")


def test_a_path_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"missing\.toml: cannot be read: No such file"):
        config.load(tmp_path / "missing.toml")
    with pytest.raises(ValueError, match=r": not a regular file$"):
        config.load(tmp_path)

    def denied(path):  # root may read everything, so chmod would not show it
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "secret.toml").touch()
    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(ValueError, match=r"secret\.toml: cannot be read: Permission denied$"):
        config.load(tmp_path / "secret.toml")
    os.mkfifo(tmp_path / "pipe.toml")  # opening it would wait forever
    with pytest.raises(ValueError, match=r"pipe\.toml: not a regular file$"):
        config.load(tmp_path / "pipe.toml")


@pytest.mark.parametrize("gpus", ["0", "-1", "100001"])
def test_gpus_to_plan_for_are_counted_from_1(minimal, gpus):
    assert config.command_line([str(minimal), "--gpus", "1"], None).gpus == 1
    with pytest.raises(ValueError, match=f"^command line: --gpus {gpus}: must be from 1 to 100,000"):
        config.command_line([str(minimal), "--gpus", gpus], None)


def test_contradictions_name_every_place(minimal):
    with pytest.raises(ValueError, match=r"^default, command line: data\.max_prompt_length = 512 must be below"):
        config.load(minimal, ["data.max_length=512"])
    with pytest.raises(ValueError, match=r"^command line: data\.system_prompt = 'Be brief\.' would never be used"):
        config.load(minimal, ["data.system_prompt=Be brief.", "data.insert_system=false"])
    with pytest.raises(
        ValueError, match=r"^command line: data\.test_size = 0\.1 holds out rows of data\.train, but data"
    ):
        config.load(minimal, ["data.test_size=0.1", "data.test=b.jsonl"])
    with pytest.raises(
        ValueError, match=r"^command line: data\.test_size = 1\.5 must be a share below 1 or a whole number"
    ):
        config.load(minimal, ["data.test_size=1.5"])
    assert [config.load(minimal, [f"data.test_size={size}"]).data.test_size for size in ("0.1", "2000")] == [
        0.1,
        2000.0,
    ]


def test_a_file_of_pairs_is_named_once(minimal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for path in ("a.jsonl", "./a.jsonl", str(tmp_path / "a.jsonl"), "link.jsonl", "missing/../a.jsonl"):
        with pytest.raises(ValueError, match=r"minimal\.toml:4, command line: data\.test has .*must not be trained on"):
            config.load(minimal, [f"data.test={path}"])
        for name, other in (("data.train", "data.test"), ("data.test", "data.train")):
            twice = [f"{name}={json.dumps(['b.jsonl', 'link.jsonl', path])}", f"{other}=c.jsonl"]
            with pytest.raises(ValueError, match=rf"^command line: {name} has .*: the same file; .*count twice"):
                config.load(minimal, twice)
    assert config.load(minimal, ["data.test=b.jsonl"]).data.test == ("b.jsonl",)


@pytest.mark.parametrize("name", ["train.output_dir", "data.cache_dir", "reference.cache_dir"])
def test_nothing_is_written_into_the_models_folder(minimal, name: str):
    path = config.load(minimal).model.path
    with pytest.raises(ValueError, match=rf"{name} = '\./{path}/' is the folder of the model, which is only read"):
        config.load(minimal, [f"{name}=./{path}/"])


def test_help_names_every_setting():
    lines = [line.split()[0] for line in config.help_text().splitlines() if line.startswith("  ") and line[2] != " "]
    assert lines == [name.rpartition(".")[2] for name in config.SETTINGS]
    assert max(map(len, config.help_text().splitlines())) <= 120
