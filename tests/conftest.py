"""Fixtures that several test files share.

Mistral's real vocabulary as a checkpoint's tokenizer files (32,000 pieces, which mistral-common ships), and the small
runs of forked.py.
"""

import gc
import json
import logging
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
from notus.demo import SPECIAL_TOKENS, added_token, tokenizer_json, train_bpe  # noqa: E402

# The compiler's trace, which pytest would have it write line by line: a third of the time of a compilation.
logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)

MISTRAL = sentencepiece.SentencePieceProcessor(
    model_proto=(files("mistral_common") / "data" / "tokenizer.model.v1").read_bytes()
)


LONGEST = ["test_checkpoint", "test_train", "test_compile", "test_cost", "test_lora", "test_memory", "test_pretend_gpu"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that the workers end at about the same time. What is imported by now stays, so
    the garbage collector need not look through it again, which takes a quarter of a second each time."""
    gc.freeze()
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@cache
def mistral_tokenizer_json(vocabulary: sentencepiece.SentencePieceProcessor) -> str:
    """Mistral-7B-v0.1's tokenizer.json, in the form in which the Zephyr family ships it, derived from the pieces."""
    return tokenizer_json(vocabulary, dummy_prefix=True)


def small_vocabulary(text: str) -> sentencepiece.SentencePieceProcessor:
    """A vocabulary of Mistral's kind with the words of `text` and of Zephyr's frame in it, for runs that are the same
    with any. A tokenizer of 32,000 pieces takes 0.2 s to load, and so many logits cost more than a tiny model."""
    return train_bpe([*text.split("\n"), "<|system|>", "<|user|>", "<|assistant|>"], 440)


def write_mistral_tokenizer(directory: Path, vocabulary: sentencepiece.SentencePieceProcessor = MISTRAL) -> Path:
    """Write Mistral's tokenizer.json and tokenizer.model, and Zephyr's tokenizer_config.json, into `directory`, or
    another vocabulary in the same form."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(mistral_tokenizer_json(vocabulary), encoding="utf-8")
    (directory / "tokenizer.model").write_bytes(vocabulary.serialized_model_proto())
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): added_token(token) for i, token in enumerate(SPECIAL_TOKENS)},
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
