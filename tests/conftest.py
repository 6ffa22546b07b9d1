"""Fixtures that several test files share.

Mistral's real vocabulary as a checkpoint's tokenizer files (32,000 pieces, which mistral-common ships), and the small
runs of forked.py.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import sentencepiece
import torch

# This checkout is what is tested, here and in the processes that tests start, whatever is installed.
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

from notus.chat import ZEPHYR_TEMPLATE  # noqa: E402

SENTENCEPIECE = files("mistral_common") / "data" / "tokenizer.model.v1"
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@cache
def mistral_tokenizer_json() -> str:
    """Mistral-7B-v0.1's tokenizer.json, in the form in which the Zephyr family ships it, derived from the pieces."""
    model = sentencepiece.SentencePieceProcessor(model_proto=SENTENCEPIECE.read_bytes())
    vocab = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []  # a piece is made of any two pieces it divides into; the best-scored piece is made first
    for piece, i in vocab.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        halves = [(left, right) for left, right in halves if left in vocab and right in vocab]
        halves.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(model.get_score(i), left, right) for left, right in halves]
    merges.sort(key=lambda merge: (-merge[0], -len(merge[1]), -len(merge[2])))
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": i} | _added_token(token) for i, token in enumerate(SPECIAL_TOKENS)],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [
                    {"type": "Prepend", "prepend": "▁"},
                    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
                ],
            },
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [bos, first],
                "pair": [bos, first, {"SpecialToken": {"id": "<s>", "type_id": 1}}, second],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
            },
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": "<unk>",
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocab,
                "merges": [f"{left} {right}" for _, left, right in merges],
            },
        },
        ensure_ascii=False,
    )


def _added_token(content: str) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": content} | flags | {"special": True}


def write_mistral_tokenizer(directory: Path) -> Path:
    """Write Mistral's tokenizer.json and tokenizer.model, and Zephyr's tokenizer_config.json, into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(mistral_tokenizer_json(), encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(SENTENCEPIECE.read_bytes())
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): _added_token(token) for i, token in enumerate(SPECIAL_TOKENS)},
        "bos_token": "<s>",
        "chat_template": ZEPHYR_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": 2048,
        "pad_token": "</s>",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def mistral_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with Mistral's tokenizer files and Zephyr's chat template. Read-only: the whole session shares it."""
    return write_mistral_tokenizer(tmp_path_factory.mktemp("mistral"))


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the runs of forked.py are started in: a base, its data and a configuration."""
    import forked  # here: most tests need no train.py

    forked.start_server()
    return forked.make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="session")
def truth(home: Path) -> Path:
    """The run in `home` that nothing interrupts."""
    import forked

    out = home / "truth"
    forked.finish(out, home, *forked.own_caches(out))
    return out


@pytest.fixture
def serve() -> Iterator[Callable]:
    """`serve(behave=echo)` starts a server of chat_server.py. All are closed after the test."""
    from chat_server import Fake, echo  # here: few tests need it

    started: list[Fake] = []

    def start(behave: Callable = echo) -> Fake:
        started.append(Fake(behave))
        return started[-1]

    yield start
    for fake in started:
        fake.close()
