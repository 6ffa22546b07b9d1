"""base.py: what a checkpoint directory is. Train, generate and evaluate refuse the same ones, in the same words."""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny import logits_of, save_base, save_checkpoint, tiny_config, tiny_model

from notus import base, config, evaluate, generate
from notus.base import FRAME_FILE, Frame, load_model, load_sharded, read_base, read_frame, write_frame
from notus.distributed import World
from notus.files import file_digest
from notus.run import read_inputs

CPU = torch.device("cpu")
HI = [{"role": "user", "content": "a b"}]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base")


def refusal(directory: Path) -> str:
    with pytest.raises(ValueError) as caught:
        read_base(directory)
    return str(caught.value)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


# --- what is read --------------------------------------------------------------------------------------------------


def test_a_base_is_read(directory: Path):
    found = read_base(str(directory))
    assert found.path == directory and found.dims == tiny_config(vocab_size=15)
    assert found.tokenizer.vocab_size == 15 and found.template.eos_token == "</s>"
    assert (found.stop_ids, found.frame, found.notes) == ({2}, None, ())
    encoder = found.encoder(Frame(bos=False, system_prompt="c"))
    assert (encoder.bos, encoder.system_prompt, encoder.vocab_size) == (False, "c", 15)
    #                                <| system |> c </s> <| user |> a b </s> <| assistant |>
    assert encoder.prompt(HI) == [3, 6, 4, 10, 2, 3, 5, 4, 8, 9, 2, 3, 7, 4]


def test_the_identity_names_everything_but_the_weights(directory: Path):
    identity = read_base(directory).identity
    assert identity["config.json: hidden_size"] == 20 and identity["config.json: sliding_window"] is None
    config = json.loads((directory / "config.json").read_text())
    assert {f"config.json: {name}" for name in config} == {name for name in identity if "config.json: " in name}
    assert any("tokenizer" in name for name in identity) and any("template" in name for name in identity)
    json.dumps(identity)


def test_the_identity_holds_every_file_that_the_result_takes_over(directory: Path):
    """One that is lost or changed between start and resume would be missing from the result, or be another there."""
    change_json(directory / "generation_config.json", eos_token_id=2)
    before = read_base(directory).identity
    for name in ("tokenizer_config.json", "generation_config.json"):
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content + b"\n")
        assert read_base(directory).identity.items() ^ before.items() >= {
            (f"sha256 of {name}", file_digest(directory / name)), (f"sha256 of {name}", before[f"sha256 of {name}"]),
        }  # fmt: skip
        (directory / name).write_bytes(content)
    (directory / "LICENSE").write_text("MIT")
    assert read_base(directory).identity.keys() - before.keys() == {"sha256 of LICENSE"}


def test_weights_may_be_missing_where_none_are_needed(directory: Path):
    (directory / "model.safetensors").unlink()
    assert read_base(directory, need_weights=False).dims.hidden_size == 20
    assert refusal(directory).startswith(f"{directory}: no weights")


@pytest.mark.parametrize(("value", "ids"), [(None, {2}), (2, {2}), (7, {2, 7}), ([7, 9], {2, 7, 9}), ([], {2})])
def test_stop_ids_are_eos_and_what_generation_config_adds(directory: Path, value: object, ids: set[int]):
    change_json(directory / "generation_config.json", eos_token_id=value, temperature=0.7)
    assert read_base(directory).stop_ids == ids


@pytest.mark.parametrize("value", ["2", [2, "x"], True, 2.0, -2, {"id": 2}])
def test_other_stop_ids_are_refused(directory: Path, value: object):
    change_json(directory / "generation_config.json", eos_token_id=value)
    path = directory / "generation_config.json"
    assert refusal(directory) == f"{path}: eos_token_id is {value!r}; it must be an id or a list of ids"


# --- the frame -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        Frame(),
        Frame(bos=False, system_prompt=None),
        Frame(True, "Be brief. é", 48, 24, 0.05),
        Frame(beta=1),
        Frame(beta=2.0, loss="simpo", margin=0.5, nll_weight=0.1),
        Frame(loss="dpo_norm", label_smoothing=0.2),
    ],
)
def test_the_frame_of_a_trained_model_is_read_back(directory: Path, frame: Frame):
    (directory / FRAME_FILE).write_text(json.dumps(asdict(frame) | {"added later": 1}))
    assert read_base(directory).frame == frame


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bos", 1), ("bos", None), ("system_prompt", 7), ("max_length", "1024"), ("max_length", True),
        ("max_length", 1024.0), ("max_prompt_length", 0), ("max_prompt_length", -5), ("beta", "0.1"), ("beta", None),
        ("beta", False), ("beta", 10**400), ("beta", 0.0), ("beta", math.nan), ("beta", math.inf),
        ("loss", None), ("margin", "1"), ("margin", True), ("nll_weight", math.inf), ("label_smoothing", -(10**400)),
    ],
)  # fmt: skip
def test_a_damaged_frame_is_refused(directory: Path, name: str, value: object):
    path = directory / FRAME_FILE
    path.write_text(json.dumps(asdict(Frame()) | {name: value}))
    assert refusal(directory) == f"{path}: {name} is {value!r:.80}; delete the file to use Zephyr's frame"


def test_a_frame_whose_lengths_contradict_each_other_is_refused(directory: Path):
    path = directory / FRAME_FILE
    path.write_text(json.dumps(asdict(Frame(max_length=32, max_prompt_length=32))))
    assert refusal(directory) == (
        f"{path}: max_prompt_length is 32, which must be below max_length 32; delete the file to use Zephyr's frame"
    )


@pytest.fixture
def trained(directory: Path) -> Path:
    """As a run leaves it."""
    (directory / "README.md").write_text("A card")
    change_json(directory / "generation_config.json", eos_token_id=2)
    write_frame(Frame(beta=0.3), directory)
    return directory


def test_a_trained_model_is_checked_file_by_file(trained: Path):
    base = read_base(trained)
    load_model(base, CPU, torch.float32)
    assert base.frame == Frame(beta=0.3)
    names = {path.name for path in trained.iterdir()} - {"README.md", FRAME_FILE}
    assert base.checksums.keys() == names >= {"config.json", "model.safetensors", "tokenizer.json"}
    (trained / "README.md").write_text("Another card")
    for name in sorted(names):
        content = (trained / name).read_bytes()
        (trained / name).write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with pytest.raises(ValueError) as caught:
            load_model(read_base(trained), CPU, torch.float32)
        assert str(trained / name) in str(caught.value), name
        (trained / name).write_bytes(content)
    (trained / "generation_config.json").unlink()
    assert refusal(trained).startswith(
        f"{trained / 'generation_config.json'}: not the file that training wrote, by its checksum in notus.json. Copy"
    )
    (trained / FRAME_FILE).unlink()
    assert read_base(trained).frame is None


def test_a_flipped_bit_anywhere_in_notus_json_is_refused_or_changes_nothing(trained: Path):
    path, whole = trained / FRAME_FILE, read_frame(trained)
    content = path.read_bytes()
    for place, bit in itertools.product(range(len(content)), range(8)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            assert read_frame(trained) == whole, bytes(flipped)
        except ValueError as error:
            assert str(error).startswith(str(path))


@pytest.mark.parametrize("files", [[], None, "config.json"])
def test_checksums_that_are_none_are_refused(directory: Path, files: object):
    path = directory / FRAME_FILE
    path.write_text(json.dumps(asdict(Frame()) | {"files": files}))
    assert refusal(directory) == f"{path}: files is {files!r}; delete the file to use Zephyr's frame"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss", "kto", "there is no loss 'kto'; there are dpo, dpo_norm, ipo, simpo, apo_zero"),
        ("margin", 0.5, "dpo has no margin"), ("label_smoothing", 0.5, "label_smoothing 0.5 is out of range"),
        ("nll_weight", -1, "nll_weight -1.0 is out of range"),
    ],
)  # fmt: skip
def test_a_frame_whose_loss_cannot_be_is_refused(directory: Path, name: str, value: object, message: str):
    path = directory / FRAME_FILE
    path.write_text(json.dumps(asdict(Frame()) | {name: value}))
    assert refusal(directory) == f"{path}: {message}; delete the file to use Zephyr's frame"


def test_a_frame_of_a_version_that_had_one_loss_is_read(directory: Path):
    names = ("bos", "system_prompt", "max_length", "max_prompt_length", "beta")
    (directory / FRAME_FILE).write_text(json.dumps({name: asdict(Frame(beta=0.3))[name] for name in names}))
    assert read_base(directory).frame == Frame(beta=0.3)


@pytest.mark.parametrize("name", ["bos", "system_prompt", "max_length", "max_prompt_length", "beta"])
def test_a_frame_without_one_of_its_values_is_refused(directory: Path, name: str):
    path = directory / FRAME_FILE
    path.write_text(json.dumps({key: value for key, value in asdict(Frame()).items() if key != name}))
    assert refusal(directory) == f"{path}: {name} is missing; delete the file to use Zephyr's frame"


def test_a_template_that_cannot_be_used_in_a_frame_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []

    def check(template, system_prompt, bos) -> list[str]:
        seen.append((template.origin, system_prompt, bos))
        if system_prompt is not None:
            raise ValueError("no system turn in this template")
        return ["a note"]

    monkeypatch.setattr(base, "check_template", check)
    found = read_base(directory)
    assert found.frame_notes(Frame(system_prompt=None)) == ["a note"]
    found.encoder(Frame(system_prompt=None, bos=False))
    with pytest.raises(ValueError, match="no system turn in this template"):
        found.encoder(Frame(system_prompt="x"))
    assert [rest for _, *rest in seen] == [[None, True], [None, False], ["x", True]]


# --- the vocabulary ------------------------------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding_is_fine_while_no_id_beyond_it_is_used(tmp_path: Path):
    directory = save_base(tmp_path / "base", vocab_size=13)  # of 15 ids: no row for f and g
    found = read_base(directory)
    assert found.notes == (
        "the tokenizer has 15 ids and the embedding 13 rows, which is fine as long as no id beyond the embedding is "
        "used",
    )
    encoder = found.encoder(Frame())
    assert max(encoder.prompt([{"role": "user", "content": "a b c d e"}])) == 12
    with pytest.raises(ValueError) as caught:
        encoder.prompt([{"role": "user", "content": "a g"}])
    assert str(caught.value).startswith(f'{directory / "tokenizer.json"}: "a g" or an answer to it has token id 14, ')


def test_an_embedding_with_rows_to_spare_says_nothing(tmp_path: Path):
    assert read_base(save_base(tmp_path / "base", vocab_size=64)).notes == ()


# --- one check for all ---------------------------------------------------------------------------------------------

ROW = {"instruction": "a b", "chosen_response": "a", "rejected_response": "b"}


def asked_by_train(directory: Path) -> str:
    pairs = directory.parent / "pairs.jsonl"
    pairs.write_text(json.dumps(ROW))
    lines = [f'[model]\npath = "{directory}"', f'[data]\ntrain = "{pairs}"']
    lines += [f'cache_dir = "{directory.parent / "tokens"}"', f'[train]\noutput_dir = "{directory.parent / "out"}"']
    (directory.parent / "run.toml").write_text("\n".join(lines))
    try:
        notes = read_inputs(config.load(directory.parent / "run.toml")).notes
    except ValueError as error:
        return str(error)
    return "\n".join(notes)


def asked_by_command(main: Callable, capsys: pytest.CaptureFixture, *arguments: str) -> str:
    capsys.readouterr()
    code, said = main([*arguments, "--device", "cpu"]), capsys.readouterr().err
    assert (code == 2) == ("error: " in said)
    return said.partition("error: ")[2].rstrip()


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: no such file"),
    "dimensions": (lambda d: change_json(d / "config.json", intermediate_size=37), "37"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
    "template": (lambda d: (d / "chat_template.jinja").write_text("{% if %}"), "chat_template.jinja: "),
    "stop ids": (lambda d: change_json(d / "generation_config.json", eos_token_id="x"), "eos_token_id is 'x'"),
    "frame": (lambda d: change_json(d / FRAME_FILE, bos=1), "bos is 1"),
    "ids": (lambda d: save_checkpoint(tiny_model(tiny_config(vocab_size=9)), d), "has token id 9, but"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_train_generate_and_evaluate_refuse_the_same_in_the_same_words(directory: Path, capsys, defect: str):
    spoil, message = DEFECTS[defect]
    spoil(directory)
    said = asked_by_train(directory)
    assert said.startswith(str(directory)) and message in said
    questions = directory.parent / "questions.jsonl"
    questions.write_text(json.dumps({"instruction": "a b", "correct_answers": ["c"]}))
    model = ("--model", str(directory))
    assert asked_by_command(generate.main, capsys, *model, "--prompt", "a b") == said
    assert asked_by_command(evaluate.main, capsys, "exact-match", *model, "--prompts", str(questions)) == said
    compare = ("--base", str(directory), "--data", str(directory.parent / "pairs.jsonl"))
    assert asked_by_command(evaluate.main, capsys, "preferences", *model, *compare) == said


def test_what_can_be_trained_can_be_asked(tmp_path: Path, capsys):
    """With a tokenizer larger than the embedding, too; training says so, once."""
    directory = save_base(tmp_path / "base", vocab_size=13)
    assert asked_by_train(directory).count("the tokenizer has 15 ids and the embedding 13 rows") == 1
    asked = ("--model", str(directory), "--prompt", "a b", "--max-new-tokens", "1")
    assert asked_by_command(generate.main, capsys, *asked) == ""


# --- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_to_ask_has_the_weights_in_the_dtype_asked_for(directory: Path, dtype: torch.dtype):
    model, truth = load_model(read_base(directory), CPU, dtype), tiny_model(tiny_config(vocab_size=15)).to(dtype)
    assert model.state_dict().keys() == truth.state_dict().keys()
    for (name, ours), theirs in zip(model.named_parameters(), truth.parameters(), strict=True):
        assert ours.dtype == dtype and not ours.requires_grad and torch.equal(ours, theirs), name
    ids = torch.tensor([1, 3, 5, 4, 8])
    assert torch.equal(logits_of(model, ids), logits_of(truth, ids))


def test_a_model_to_train_has_float32_weights_by_their_own_names(directory: Path):
    truth = tiny_model(tiny_config(vocab_size=15)).float()
    world = World(0, 1, CPU, None)
    for recompute in ("none", "half"):
        model = load_sharded(read_base(directory), world, torch.float32, recompute=recompute)
        assert model.model.recompute == recompute
        ours, theirs = dict(model.named_parameters()), dict(truth.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(p.requires_grad and p.dtype == torch.float32 and torch.equal(p, theirs[n]) for n, p in ours.items())
