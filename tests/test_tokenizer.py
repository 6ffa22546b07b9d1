"""tokenizer.py on Mistral's real vocabulary: tokenizer.json, tokenizer.model and transformers agree, id for id."""

import json
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
from conftest import MISTRAL, mistral_tokenizer_json
from test_chat import CHATML_TEMPLATE, INST_TEMPLATE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from notus import tokenizer as tokenizer_module
from notus.chat import ZEPHYR_TEMPLATE, load_chat_template, with_system_turn
from notus.tokenizer import Tokenizer, load_tokenizer

FRAGMENTS = [
    *("Hello", " world", "  double  spaces  ", "\n", "\n\n\n", "\t", "\r\n", " ", "don't", "3.14159", "1,000,000"),
    *(
        "你好，世界",
        "東京タワー",
        "안녕",
        "Привет",
        "مرحبا",
        "ñandú",
        "e\u0301",
        "ﬁ½",
        "\u200b",
        "\ufeff",
        "\0",
        "\x7f",
    ),
    *(
        "🙂",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "𝔘𝔫𝔦",
        "\U0010ffff",
        "▁",
        "▁▁x",
        "def f(x):\n    return x ** 2\n",
        "if (a&&b) {\n\t++i;\n}",
    ),
    *("<s>", "</s>", "<unk>", "<0x0A>", "</s", "<|user|>", "<|assistant|>", "[INST]", "<pad>", "https://a.b/c?d=e#f"),
]


def varied_texts(model_dir: Path) -> list[str]:
    """Every fragment alone, random runs of them, and such runs as chats in the checkpoint's template."""
    draw = random.Random(0)
    runs = ["".join(draw.choices(FRAGMENTS, k=draw.randint(1, 30))) for _ in range(400)]
    template = load_chat_template(model_dir)
    chats = [
        template.render(with_system_turn([{"role": "user", "content": run}], ""), add_generation_prompt=True)
        for run in runs[:100]
    ]
    return ["", *FRAGMENTS, *runs, *chats]


@pytest.fixture(scope="module")
def sentencepiece_dir(mistral_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(mistral_tokenizer_dir / "tokenizer.model", directory)
    return directory


@pytest.fixture(scope="module", params=["tokenizer.json", "tokenizer.model"])
def tokenizer(request: pytest.FixtureRequest, mistral_tokenizer_dir: Path, sentencepiece_dir: Path) -> Tokenizer:
    return load_tokenizer(mistral_tokenizer_dir if request.param == "tokenizer.json" else sentencepiece_dir)


def test_same_ids_and_text_as_transformers(tokenizer: Tokenizer, mistral_tokenizer_dir: Path) -> None:
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(mistral_tokenizer_dir / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    oracle.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    texts = varied_texts(mistral_tokenizer_dir)
    expected = oracle(texts, add_special_tokens=False)["input_ids"]
    assert sum(map(len, expected)) > 20_000
    for text, ids, expected_ids in zip(texts, tokenizer.encode_batch(texts), expected, strict=True):
        assert ids == expected_ids, text
        for skip in (False, True):
            assert tokenizer.decode(ids, skip_special_tokens=skip) == oracle.decode(ids, skip_special_tokens=skip)


def test_decode_returns_the_text(tokenizer: Tokenizer) -> None:
    for text in ("Hello  world\n 你好 🙂 \0", " leading", "", "def f():\n\treturn"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([1, 22557, 32001, 2]) == "Hello"  # 32001 is beyond the vocabulary


def test_known_good_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("</s>\n<|user|>") == [2, 28705, 13, 28789, 28766, 1838, 28766, 28767]
    text = (
        "<|system|>\nYou are a friendly chatbot who always responds in the style of a pirate</s>\n"
        "<|user|>\nHow many helicopters can a human eat in one sitting?</s>\n<|assistant|>\n"
    )
    golden = """
        523 28766 6574 28766 28767 13 1976 460 264 10131 10706 10093 693 1743 2603 3673 297 272 3238 302 264 17368 380
        2 28705 13 28789 28766 1838 28766 28767 13 5660 1287 19624 410 1532 541 264 2930 5310 297 624 6398 28804
        2 28705 13 28789 28766 489 11143 28766 28767 13"""
    assert tokenizer.encode(text) == [int(token) for token in golden.split()]


def test_special_ids_and_size(tokenizer: Tokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 32000)


def test_batches_longer_than_one_call(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "TEXTS_PER_CALL", 3)
    texts = FRAGMENTS[:10]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_limits_in_the_file_are_lifted(mistral_tokenizer_dir: Path, tmp_path: Path) -> None:
    saved = json.loads((mistral_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    saved["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    saved["padding"] = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None}
    saved["padding"] |= {"pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    texts = ["one", "one two three four five six"]
    assert load_tokenizer(tmp_path).encode_batch(texts) == load_tokenizer(mistral_tokenizer_dir).encode_batch(texts)


# --- BOS -------------------------------------------------------------------------------------------------------------


def test_with_bos_there_is_exactly_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("Hello") == [22557]
    assert tokenizer.encode("Hello", bos=True) == [1, 22557]
    assert tokenizer.encode("<s>Hello") == tokenizer.encode("<s>Hello", bos=True) == [1, 22557]
    assert tokenizer.encode_batch(["", "<s>", "</s>"], bos=True) == [[1], [1], [1, 2]]
    assert (tokenizer.begin(True), tokenizer.begin(False)) == ([1], [])


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
SPECIAL_TOKENS = {str(i): {"content": text, "special": True} | FLAGS for i, text in enumerate(("<unk>", "<s>", "</s>"))}


def added(content: str, **flags: bool) -> dict:
    return {"content": content, "special": True} | FLAGS | flags


@cache
def small_tokenizer_json() -> str:
    """Mistral's first 700 pieces."""
    saved = json.loads(mistral_tokenizer_json(MISTRAL))
    vocab = {piece: i for piece, i in saved["model"]["vocab"].items() if i < 700}
    merges = [
        merge for merge in saved["model"]["merges"] if {*merge.split(" "), merge.replace(" ", "")} <= vocab.keys()
    ]
    return json.dumps(saved | {"model": saved["model"] | {"vocab": vocab, "merges": merges}})


def write_small(directory: Path, files: dict[str, object]) -> Path:
    """A small tokenizer.json, a config.json for AutoTokenizer, and JSON files beside them or instead."""
    (directory / "tokenizer.json").write_text(small_tokenizer_json(), encoding="utf-8")
    for name, value in ({"config.json": {"model_type": "mistral"}} | files).items():
        (directory / name).write_text(json.dumps(value), encoding="utf-8")
    return directory


CHATML_TOKENS = {"700": added("<|im_end|>"), "701": added("<|im_start|>")}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("template", "bos_token", "eos_token", "writes_bos"),
    [
        (ZEPHYR_TEMPLATE, "<s>", "</s>", False),
        (INST_TEMPLATE, "<s>", "</s>", True),
        (CHATML_TEMPLATE, "<|im_start|>", "<|im_end|>", True),  # SmolLM2's: the role marker is BOS
        (CHATML_TEMPLATE, "<s>", "<|im_end|>", False),
        (CHATML_TEMPLATE, None, "<|im_end|>", False),  # Qwen2's: no BOS
    ],
    ids=["zephyr", "inst", "smollm2", "chatml", "qwen2"],
)
def test_a_prompt_is_what_transformers_makes_of_it(
    tmp_path: Path, template: str, bos_token: str | None, eos_token: str, writes_bos: bool, bos: bool
) -> None:
    config = {"added_tokens_decoder": SPECIAL_TOKENS | CHATML_TOKENS, "chat_template": template}
    write_small(tmp_path, {"tokenizer_config.json": config | {"bos_token": bos_token, "eos_token": eos_token}})
    tokenizer, messages = load_tokenizer(tmp_path), [{"role": "user", "content": "he said <s> to them"}]
    text = load_chat_template(tmp_path).render(messages, add_generation_prompt=True)
    if bos and bos_token is None:
        with pytest.raises(ValueError, match=r"tokenizer\.json: this tokenizer has no BOS token: set data\.bos=false"):
            tokenizer.encode(text, bos)
        return
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.bos_id == oracle.bos_token_id
    assert (expected[0] == tokenizer.bos_id) == writes_bos
    assert tokenizer.encode(text, bos) == ([] if writes_bos or not bos else [tokenizer.bos_id]) + expected


# --- tokens in the files beside the vocabulary -----------------------------------------------------------------------

WITH_CHATML = [
    *("<|im_start|>user\nhe <|im_end|>\n", "<|im_start|> the <|im_end|> the", "a<|im_end|>b<|im_start|>", "<|im_end|>"),
    *("</s> the", " </s>he", "the[INST]the", "<pad> the<pad>", "x <s> <unk>", "  ", ""),
]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": SPECIAL_TOKENS | CHATML_TOKENS}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"700": added("<|im_end|>", rstrip=True, lstrip=True)}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"700": added("<|im_end|>", special=False)}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"700": added("<|im_end|>", normalized=True)}}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"700": added("<|im_end|>", single_word=True)}}},
        {
            "tokenizer_config.json": {"added_tokens_decoder": {"2": added("</s>", rstrip=True)}}
        },  # other flags than inside
        {"tokenizer_config.json": {"additional_special_tokens": ["<|im_end|>", "[INST]"], "pad_token": "<pad>"}},
        {"tokenizer_config.json": {"extra_special_tokens": {"a": "<|im_end|>"}, "image_token": "[INST]"}},
        {"tokenizer_config.json": {"split_special_tokens": True}},
        {"tokenizer_config.json": {"eos_token": "<|im_end|>"}, "added_tokens.json": {"<|im_end|>": 700, "[INST]": 701}},
        {"added_tokens.json": {"[INST]": 701, "<|im_end|>": 700}, "special_tokens_map.json": {"pad_token": "<pad>"}},
        {  # neither of the older files counts beside an added_tokens_decoder
            "tokenizer_config.json": {"added_tokens_decoder": {"700": added("<|im_start|>")}},
            "added_tokens.json": {"<|im_end|>": 700},
            "special_tokens_map.json": {"pad_token": "<pad>"},
        },
    ],
)
def test_added_tokens_as_in_transformers(tmp_path: Path, files: dict[str, dict]) -> None:
    write_small(tmp_path, files)
    tokenizer, oracle = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.vocab_size == len(oracle)
    expected = oracle(WITH_CHATML, add_special_tokens=False)["input_ids"]
    assert tokenizer.encode_batch(WITH_CHATML) == expected
    plain = load_tokenizer(write_small(tmp_path, {name: {} for name in files}))
    assert plain.encode_batch(WITH_CHATML) != expected
    assert plain.identity != tokenizer.identity
    for ids in expected:
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"705": added("<far>")}}},
            "'<far>' the id 705, but .* 700",
        ),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"7": added("</s>")}}}, "'</s>' the id 7, but .* has 2"),
        ({"added_tokens.json": {"<far>": 699}}, "'<far>' the id 699, but .* has 700"),
    ],
)
def test_an_id_that_a_token_cannot_have(tmp_path: Path, files: dict[str, dict], message: str) -> None:
    with pytest.raises(
        ValueError, match=f"{tmp_path}: tokenizer_config.json or added_tokens.json gives the token {message}"
    ):
        load_tokenizer(write_small(tmp_path, files))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": [1]},
            r"added_tokens_decoder is \[1\]; it must be an object",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": added("a")}},
            "added_tokens_decoder has 'x': {'content'",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9" * 5000: added("a")}}, "added_tokens_decoder has '999"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": "a"}},
            "added_tokens_decoder has '5': 'a'; it must be",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": {}}},
            r"added_tokens_decoder\[5\] is {}; it must be a string",
        ),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"5": added(7)}},
            r"\[5\] is {'content': 7.* must be a string",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": added("a", lstrip=1)}}, "flags must be true or false"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": added("")}}, r"\[5\] is .*; a token must have a text"),
        ("tokenizer_config.json", {"additional_special_tokens": False}, "tokens is False; it must be a list of tokens"),
        ("tokenizer_config.json", {"pad_token": [1]}, r"pad_token is \[1\]; it must be a string"),
        ("tokenizer_config.json", {"pad_token": "\ud800"}, "holds '.ud800', half of a surrogate pair"),
        (
            "tokenizer_config.json",
            {"additional_special_tokens": "a"},
            "additional_special_tokens is 'a'; it must be a list",
        ),
        (
            "tokenizer_config.json",
            {"additional_special_tokens": [1]},
            "additional_special_tokens is 1; it must be a string",
        ),
        ("tokenizer_config.json", {"split_special_tokens": "no"}, "split_special_tokens is 'no', not a boolean"),
        ("added_tokens.json", {"a": "x"}, "'a' has the id 'x'; it must be an integer"),
        ("added_tokens.json", {"a": True}, "'a' has the id True; it must be an integer"),
        ("added_tokens.json", {"a": -1}, "'a' has the id -1; it must be an integer"),
        ("added_tokens.json", [], "must hold a JSON object"),
    ],
)
def test_a_file_beside_the_vocabulary_is_bad(tmp_path: Path, name: str, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(write_small(tmp_path, {name: content}))
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def chatml_dir(request: pytest.FixtureRequest, mistral_tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A fine-tune that added ChatML's tokens, one of them as its EOS, and left the old id in config.json."""
    tokens = [added("<|im_end|>"), added("<|im_start|>"), added("<tool>", special=False)]
    if request.param == "tokenizer.json":
        saved = json.loads((mistral_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
        saved["added_tokens"] += [{"id": 32000 + i} | token for i, token in enumerate(tokens)]
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    else:
        shutil.copy(mistral_tokenizer_dir / "tokenizer.model", tmp_path)
    config = {"added_tokens_decoder": {str(32000 + i): token for i, token in enumerate(tokens)}}
    config |= {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}', encoding="utf-8")
    return tmp_path


def test_added_tokens(chatml_dir: Path) -> None:
    tokenizer = load_tokenizer(chatml_dir)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 32000, 32003)
    assert tokenizer.special_ids == {0, 1, 2, 32000, 32001}
    ids = tokenizer.encode("<|im_start|>Hello<tool><|im_end|>")
    assert ids == [32001, 22557, 32002, 32000]
    assert tokenizer.decode(ids) == "Hello<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|> Hello<tool><|im_end|>"


def test_added_tokens_json_beside_tokenizer_model(
    sentencepiece_dir: Path, mistral_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The same ids as of a tokenizer.json that holds the tokens; transformers 4 gives them for tokenizer.model too."""
    folders = [tmp_path / "json", tmp_path / "model"]
    config = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"], "pad_token": "<pad>"}
    for folder, name in zip(folders, ("tokenizer.json", "tokenizer.model"), strict=True):
        folder.mkdir()
        shutil.copy(mistral_tokenizer_dir / name, folder)
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        (folder / "added_tokens.json").write_text('{"<|im_start|>": 32001, "<|im_end|>": 32000}', encoding="utf-8")
    ours, theirs = map(load_tokenizer, reversed(folders))
    assert ours.eos_id == 32000
    assert ours.vocab_size == theirs.vocab_size == 32003
    assert ours.special_ids == theirs.special_ids == {0, 1, 2, 32000, 32001, 32002}
    assert ours.encode_batch(WITH_CHATML) == theirs.encode_batch(WITH_CHATML)
    assert ours.identity != load_tokenizer(sentencepiece_dir).identity


def test_transformers_5_reads_a_lone_tokenizer_model_differently(sentencepiece_dir: Path) -> None:
    """Its ids for "Hello" are [16230], without the space in front: a user must know before exporting such a folder."""
    (warning,) = load_tokenizer(sentencepiece_dir).warnings
    assert warning.startswith(
        f"{sentencepiece_dir / 'tokenizer.model'}: these ids are SentencePiece's and transformers 4"
    )
    assert "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)" in warning


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"legacy": False}, r"tokenizer_config\.json: legacy is False, which changes how tokenizer\.model is read"),
        ({"add_prefix_space": False}, r"tokenizer_config\.json: add_prefix_space is False"),
        ({"sp_model_kwargs": {"alpha": 0.1}}, r"tokenizer_config\.json: sp_model_kwargs is {'alpha': 0\.1}"),
        ({"tokenizer_class": "GemmaTokenizer"}, r"tokenizer_config\.json: tokenizer_class is 'GemmaTokenizer'"),
        ({"split_special_tokens": True}, r"tokenizer_config\.json: split_special_tokens is True"),
        ({"added_tokens_decoder": {"32000": added("<x>", rstrip=True)}}, r"flag of AddedToken\(\"<x>\", rstrip=True"),
        (
            {"added_tokens_decoder": {"32000": added("<x>", normalized=True)}},
            r"flag of AddedToken\(\"<x>\", .*normalized",
        ),
    ],
)
def test_what_tokenizer_model_cannot_do(
    sentencepiece_dir: Path, tmp_path: Path, config: dict[str, object], message: str
) -> None:
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(tmp_path)
    assert "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)" in str(error.value)


def test_an_added_token_has_the_id_that_its_file_says(mistral_tokenizer_dir: Path, tmp_path: Path) -> None:
    """The library would give it another one, and transformers a third."""
    saved = json.loads((mistral_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    saved["model"]["vocab"]["<t>"] = saved["model"]["vocab"].pop("<s>")
    (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ValueError, match="added_tokens gives '<s>' the id 1, but with this vocabulary it has 32000"):
        load_tokenizer(tmp_path)


def test_tokenizer_model_has_no_gaps_for_added_tokens(sentencepiece_dir: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    for i in (5, 32007):
        config = {"added_tokens_decoder": {str(i): added("<far>")}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(ValueError, match=f"'<far>' the id {i}, but with tokenizer.model it has 32000"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "warned"),
    [
        ("llama", "LlamaTokenizer", True),
        ("llama", "LlamaTokenizerFast", True),
        ("llama", "GPT2Tokenizer", True),
        ("mistral", "LlamaTokenizer", False),
        ("llama", "PreTrainedTokenizerFast", False),  # what the warning advises
    ],
)
def test_transformers_5_ignores_some_rules(tmp_path: Path, model_type: str, tokenizer_class: str, warned: bool) -> None:
    config = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_small(tmp_path, {"tokenizer_config.json": config, "config.json": {"model_type": model_type}})
    tokenizer, oracle = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert [f"tokenizer_class is '{tokenizer_class}'" in warning for warning in tokenizer.warnings] == [True] * warned
    theirs = oracle(["  the", "the"], add_special_tokens=False)["input_ids"]
    assert (tokenizer.encode_batch(["  the", "the"]) != theirs) == warned


# --- identity, BOS and EOS -------------------------------------------------------------------------------------------


def test_identity_is_all_that_can_change_an_id(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>"}

    def identity(**changes: object) -> dict:
        write_small(tmp_path, {"tokenizer_config.json": config | changes})
        return load_tokenizer(tmp_path).identity

    same = identity()
    assert set(same) == {"tokenizer.json", "added_tokens", "split_special_tokens", "bos_id", "eos_id"}
    assert same == identity(model_max_length=7, added_tokens_decoder=SPECIAL_TOKENS)
    others = [
        identity(bos_token="</s>"), identity(bos_token=None), identity(eos_token="<s>"), identity(pad_token="<pad>"),
        identity(split_special_tokens=True), identity(added_tokens_decoder={"2": added("</s>", rstrip=True)}),
    ]  # fmt: skip
    assert same not in others
    assert json.loads(json.dumps(others)) == others
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text() + "\n")
    assert load_tokenizer(tmp_path).identity["tokenizer.json"] != same["tokenizer.json"]


def test_special_token_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == {0, 1, 2}


@pytest.mark.parametrize("named", [{"bos_token": None}, {}])
def test_no_bos(tmp_path: Path, named: dict) -> None:
    """A file says so, or none names one and the vocabulary has no `<s>`."""
    write_small(tmp_path, {"tokenizer_config.json": named | {"eos_token": "</s>"}})
    if not named:
        text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
        (tmp_path / "tokenizer.json").write_text(text.replace('"<s>"', '"<other>"'), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id is None
    assert tokenizer.begin(False) == []
    assert tokenizer.encode("the", bos=False) == load_tokenizer(tmp_path).encode("the")
    with pytest.raises(ValueError, match=r"tokenizer\.json: this tokenizer has no BOS token: set data\.bos=false"):
        tokenizer.begin(True)


def test_no_eos(tmp_path: Path) -> None:
    write_small(tmp_path, {})
    text = (tmp_path / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text.replace('"</s>"', '"<other>"'), encoding="utf-8")
    with pytest.raises(ValueError, match="no file names eos_token, and '</s>' is not in the vocabulary; name it in"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("eos", [2, [2, 7], None])
def test_config_json_agrees_with_the_default_tokens(sentencepiece_dir: Path, tmp_path: Path, eos: object) -> None:
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}), encoding="utf-8")
    assert load_tokenizer(tmp_path).eos_id == 2


def test_config_json_contradicts_the_default_tokens(sentencepiece_dir: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"names eos_token; '</s>' has id 2, but config\.json says 7"):
        load_tokenizer(tmp_path)


def test_no_tokenizer_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a {name}: it is empty"),
        (b"{}", "not a "),
        (b"[]", "not a "),
        (b"\xff\x00 not a tokenizer", "not a "),
        (b"version https://git-lfs.github.com/spec/v1\n", "a git-lfs pointer, not the file itself. Run `git lfs pull`"),
        (None, "not a regular file"),
    ],
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_broken_file(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: {message.format(name=name)}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_file(mistral_tokenizer_dir: Path, tmp_path: Path, name: str) -> None:
    data = (mistral_tokenizer_dir / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=f"^{tmp_path / name}: not a "):
        load_tokenizer(tmp_path)


def test_an_unknown_token_that_is_not_in_the_vocabulary(tmp_path: Path) -> None:
    model = {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "unk_token": "absent"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}), encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [2]
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: a text cannot be encoded: WordLevel error: Missing \[UNK\]"
    ):
        tokenizer.encode("b")


def test_an_empty_vocabulary(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {}, "merges": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json: not a tokenizer: its vocabulary is empty"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_special_token_missing_from_the_vocabulary(
    mistral_tokenizer_dir: Path, tmp_path: Path, file: str, name: str
) -> None:
    shutil.copy(mistral_tokenizer_dir / file, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: "<|absent|>"}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{name} '<\|absent\|>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
