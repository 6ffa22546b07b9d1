"""tokenizer.py on Mistral's real vocabulary: tokenizer.json, tokenizer.model and transformers agree, id for id."""

import json
import random
import shutil
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from notus import tokenizer as tokenizer_module
from notus.chat import load_chat_template, with_system_turn
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


@pytest.fixture(params=["tokenizer.json", "tokenizer.model"])
def chatml_dir(request: pytest.FixtureRequest, mistral_tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A fine-tune that added ChatML's tokens, one of them as its EOS, and left the old id in config.json."""
    added = [
        {"content": "<|im_end|>", "special": True},
        {"content": "<|im_start|>", "special": True},
        {"content": "<tool>", "special": False},
    ]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    if request.param == "tokenizer.json":
        saved = json.loads((mistral_tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
        saved["added_tokens"] += [{"id": 32000 + i} | token | flags for i, token in enumerate(added)]
        (tmp_path / "tokenizer.json").write_text(json.dumps(saved), encoding="utf-8")
    else:
        shutil.copy(mistral_tokenizer_dir / "tokenizer.model", tmp_path)
    config = {"added_tokens_decoder": {str(32000 + i): token | flags for i, token in enumerate(added)}}
    config |= {"bos_token": "<s>", "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}', encoding="utf-8")
    return tmp_path


def test_added_tokens(chatml_dir: Path) -> None:
    tokenizer = load_tokenizer(chatml_dir)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 32000, 32003)
    ids = tokenizer.encode("<|im_start|>Hello<tool><|im_end|>")
    assert ids == [32001, 22557, 32002, 32000]
    assert tokenizer.decode(ids) == "Hello<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|> Hello<tool><|im_end|>"


def test_vocab_size_counts_up_to_the_largest_id(sentencepiece_dir: Path, tmp_path: Path) -> None:
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    config = {"added_tokens_decoder": {"32007": {"content": "<far>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert load_tokenizer(tmp_path).vocab_size == 32008


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


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\x00 not a tokenizer"])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_broken_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path / name}: not a "):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_special_token_missing_from_the_vocabulary(sentencepiece_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(sentencepiece_dir / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({name: "<|absent|>"}), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{tmp_path}.*{name} '<\|absent\|>' is not in the vocabulary"):
        load_tokenizer(tmp_path)
