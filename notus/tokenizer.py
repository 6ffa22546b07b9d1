"""Text <-> token ids, by the checkpoint's own vocabulary.

tokenizer.json is read with `tokenizers`; a checkpoint that has only tokenizer.model is read with `sentencepiece`. Both
give the same ids, which takes one rule: the text is cut at special tokens, and each part between them is encoded as if
it stood alone. In Mistral's vocabulary a text is encoded with a space put in front, so a part that follows `</s>` gets
one as well:

    </s>\\n<|user|>   ->   2 | 28705 13 28789 28766 1838 28766 28767     (28705 is that space)

Special tokens are recognised in any text, a user's included, as everywhere in the Hugging Face ecosystem. No method
adds BOS or EOS: the ids are those of the text alone.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from notus.chat import read_json, read_tokenizer_config

# An encoding in `tokenizers` holds offsets and strings, over 100 bytes a token, beside the ids that we keep. Handing it
# this many texts at a time bounds that memory and still keeps every core busy.
TEXTS_PER_CALL = 1024


class Tokenizer:
    """What both formats offer; `load_tokenizer` makes one.

    vocab_size: the largest id + 1, added tokens included: the rows an embedding table must have at least.
    """

    def __init__(self, path: Path, vocab: dict[str, int]):
        self.path = path
        self.vocab_size = max(vocab.values()) + 1
        self.bos_id = _special_id(path, vocab, "bos_token", "<s>")
        self.eos_id = _special_id(path, vocab, "eos_token", "</s>")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, computed on all cores."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, without the space that encoding puts in front.

        Ids beyond the vocabulary, which a padded embedding table lets a model produce, write nothing.
        """
        raise NotImplementedError


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    directory = Path(model_dir)
    if (directory / "tokenizer.json").is_file():
        return JsonTokenizer(directory / "tokenizer.json")
    if (directory / "tokenizer.model").is_file():
        return SentencePieceTokenizer(directory / "tokenizer.model")
    raise ValueError(f"{directory}: no tokenizer: neither tokenizer.json nor tokenizer.model is there")


class JsonTokenizer(Tokenizer):
    """tokenizer.json: vocabulary, merges, normalizer and special tokens in one file."""

    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer.json: {error}") from error
        # The file may carry the limits of whoever saved it.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        super().__init__(path, self._tokenizer.get_vocab(with_added_tokens=True))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids = []
        for start in range(0, len(texts), TEXTS_PER_CALL):
            call = list(texts[start : start + TEXTS_PER_CALL])
            ids += [encoding.ids for encoding in self._tokenizer.encode_batch_fast(call, add_special_tokens=False)]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model: pieces and scores only, so special tokens are ours to cut out and to put back."""

    def __init__(self, path: Path):
        import sentencepiece  # here, because few checkpoints need it

        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error}") from error
        pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
        # Tokens that a fine-tune added, such as ChatML's, are known to tokenizer_config.json only.
        added = read_tokenizer_config(path.parent).get("added_tokens_decoder", {})

        self._special = {piece: i for i, piece in enumerate(pieces) if model.is_control(i) or model.is_unknown(i)}
        self._skipped = set(self._special.values()) | {int(i) for i, token in added.items() if token.get("special")}
        self._special |= {token["content"]: int(i) for i, token in added.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        # What each id writes. A byte piece, "<0xE2>", writes a part of a character, so decoding joins bytes.
        self._bytes = {
            i: bytes([int(piece[1:-1], 16)]) if model.is_byte(i) else piece.replace("▁", " ").encode()
            for i, piece in enumerate(pieces)
        }
        self._bytes |= {i: token.encode() for token, i in self._special.items()}
        super().__init__(path, {piece: i for i, piece in enumerate(pieces)} | self._special)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        cut = [self._cut.split(text) for text in texts]  # each: part, special token, part, ..., part
        encoded = iter(self._model.encode([part for parts in cut for part in parts[::2]]))
        ids = []
        for parts in cut:
            ids.append(next(encoded))
            for token in parts[1::2]:
                ids[-1] += [self._special[token], *next(encoded)]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        skipped = self._skipped if skip_special_tokens else ()
        text = b"".join(self._bytes.get(i, b"") for i in ids if i not in skipped)
        return text.decode(errors="replace").removeprefix(" ")


def _special_id(path: Path, vocab: dict[str, int], name: str, default: str) -> int:
    """The id of the token that the tokenizer's configuration names, so that it is the one the chat template writes.

    config.json's id is no substitute: fine-tunes that chose a new EOS often left the old id there. Only where no file
    names the token, and the default is assumed, must config.json agree with it.
    """
    config = read_tokenizer_config(path.parent)
    token = config.get(name, default)
    if token not in vocab:
        raise ValueError(f"{path}: {name} {token!r} is not in the vocabulary")
    if name not in config:
        expected = read_json(path.parent / "config.json").get(f"{name}_id")  # an id, a list of ids, null or nothing
        if expected is not None and vocab[token] not in (expected if isinstance(expected, list) else [expected]):
            raise ValueError(
                f"{path}: no tokenizer file names {name}; {token!r} has id {vocab[token]}, but config.json says "
                f"{expected}. Name it in tokenizer_config.json"
            )
    return vocab[token]
