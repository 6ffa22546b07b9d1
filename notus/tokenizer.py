"""Text <-> token ids, by the checkpoint's own vocabulary.

tokenizer.json is read with `tokenizers`; a checkpoint that has only tokenizer.model is read with `sentencepiece`. Both
give the same ids, which takes one rule: the text is cut at special tokens, and each part between them is encoded as if
it stood alone. In Mistral's vocabulary a text is encoded with a space put in front, so a part that follows `</s>` gets
one as well:

    </s>\n<|user|>   ->   2 | 28705 13 28789 28766 1838 28766 28767     (28705 is that space)

Special tokens are recognised in any text, a user's included, as everywhere in the Hugging Face ecosystem. Some are
listed only in files beside the vocabulary (`_added_tokens`). The ids are those of transformers' AutoTokenizer, or the
checkpoint is refused. Where transformers 4 and 5 differ, they are those of version 4, and `Tokenizer.warnings` says so.
"""

import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from tokenizers.pre_tokenizers import ByteLevel, Metaspace

from notus.chat import FLAGS, read_tokenizer_config, token_text
from notus.files import read_bytes, read_json

# An encoding in `tokenizers` holds offsets and strings, over 100 bytes a token, beside the ids that we keep. Handing it
# this many texts at a time bounds that memory and still keeps every core busy.
TEXTS_PER_CALL = 1024


class Tokenizer:
    """What both formats offer; `load_tokenizer` makes one.

    vocab_size: the largest id + 1, added tokens included: the rows an embedding table must have at least.
    bos_id: None for a tokenizer without BOS, such as Qwen2's.
    special_ids: of special tokens, which `decode` leaves out. Text that holds one of them becomes the token.
    identity: everything of the tokenizer that can change an id, by name.
    warnings: where other tools read these files differently, a sentence each.
    """

    special_ids: frozenset[int]

    def __init__(self, path: Path, config: dict[str, Any], vocab: dict[str, int], identity: dict[str, Any]):
        if not vocab:
            raise ValueError(f"{path}: not a tokenizer: its vocabulary is empty")
        self.path = path
        self.vocab_size = max(vocab.values()) + 1
        self.bos_id = _special_id(path, config, vocab, "bos_token", "<s>")
        eos_id = _special_id(path, config, vocab, "eos_token", "</s>")
        if eos_id is None:
            raise ValueError(f"{path}: no file names eos_token, and '</s>' is not in the vocabulary; {_NAME_IT}")
        self.eos_id = eos_id
        self.identity = identity | {"bos_id": self.bos_id, "eos_id": self.eos_id}
        self.warnings: list[str] = []

    def begin(self, bos: bool) -> list[int]:
        """The ids before a text: BOS or none. ValueError if there is no BOS to put there."""
        if bos and self.bos_id is None:
            raise ValueError(f"{self.path}: this tokenizer has no BOS token: set data.bos=false, or say --no-bos")
        return [self.bos_id] if bos and self.bos_id is not None else []

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = False) -> list[list[int]]:
        """The ids of each text, computed on all cores.

        With `bos` each begins with BOS: one is put in front unless the text, written by a chat template, has its own.
        """
        begin = self.begin(bos)
        encoded = self._encode(texts)
        return [ids if ids[: len(begin)] == begin else begin + ids for ids in encoded]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, without the space that encoding puts in front.

        Ids beyond the vocabulary, which a padded embedding table lets a model produce, write nothing.
        """
        raise NotImplementedError


def load_tokenizer(model_dir: str | Path) -> Tokenizer:
    directory = Path(model_dir)
    if (directory / "tokenizer.json").exists():
        return JsonTokenizer(directory / "tokenizer.json")
    if (directory / "tokenizer.model").exists():
        return SentencePieceTokenizer(directory / "tokenizer.model")
    raise ValueError(
        f"{directory}: no tokenizer: neither tokenizer.json nor tokenizer.model is there. Download it: "
        f"hf download ID --include '*token*' --local-dir {shlex.quote(str(directory))}"
    )


class JsonTokenizer(Tokenizer):
    """tokenizer.json: vocabulary, merges, normalizer and most special tokens in one file."""

    def __init__(self, path: Path):
        data = _read(path)
        try:
            self._tokenizer = tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer.json: {error!s:.300}") from error
        # The file may carry the limits of whoever saved it.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # The library gives an added token that the vocabulary lacks the next free id, whatever id the file says.
        for entry in json.loads(data).get("added_tokens") or ():
            if (found := tokenizer.token_to_id(entry["content"])) != entry["id"]:
                raise ValueError(
                    f"{path}: added_tokens gives {entry['content']!r} the id {entry['id']}, but with this vocabulary "
                    f"it has {found}"
                )

        # Tokens from the files beside this one. The library picks their ids, so those asked for are compared.
        config = read_tokenizer_config(path.parent)
        own = tokenizer.get_added_tokens_decoder()
        added = _added_tokens(path.parent, config, tokenizer.get_added_tokens_decoder())
        _check_named(path, config, added, tokenizer.get_vocab(with_added_tokens=True))
        tokenizer.add_tokens([token for _, token in added])
        for asked, token in added:
            if asked not in (None, found := tokenizer.token_to_id(token.content)):
                raise _wrong_id(path, token, asked, found)
        split = _split_special_tokens(path.parent, config)
        tokenizer.encode_special_tokens = split

        # The identity lists only tokens that differ from the file's own, whose digest is in it.
        known = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in known.items() if token.special)
        others = [_describe(i, token) for i, token in sorted(known.items()) if i not in own or own[i] != token]
        identity = {path.name: _sha256(data), "added_tokens": others, "split_special_tokens": split}
        super().__init__(path, config, tokenizer.get_vocab(with_added_tokens=True), identity)
        self.warnings += _rebuilt_by_version_5(path, config, tokenizer)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids = []
        for start in range(0, len(texts), TEXTS_PER_CALL):
            call = list(texts[start : start + TEXTS_PER_CALL])
            try:
                encoded = self._tokenizer.encode_batch_fast(call, add_special_tokens=False)
            except Exception as error:  # an unknown word where the vocabulary lacks its own unk_token
                raise ValueError(f"{self.path}: a text cannot be encoded: {error!s:.300}") from error
            ids += [encoding.ids for encoding in encoded]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


class SentencePieceTokenizer(Tokenizer):
    """tokenizer.model: pieces and scores only, so special tokens are ours to cut out and to put back."""

    def __init__(self, path: Path):
        import sentencepiece  # here, because few checkpoints need it

        data = _read(path)
        try:
            self._model = model = sentencepiece.SentencePieceProcessor(model_proto=data)
            pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
        except (OSError, RuntimeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error!s:.300}") from error
        config = read_tokenizer_config(path.parent)
        _check_sentencepiece_fields(path, config)

        vocab = {piece: i for i, piece in enumerate(pieces)}
        special = {piece: i for piece, i in vocab.items() if model.is_control(i) or model.is_unknown(i)}
        added = _added_tokens(path.parent, config, {})
        _check_named(path, config, added, vocab)
        _append(path, added, vocab)
        self._special = special | {token.content: vocab[token.content] for _, token in added}
        plain = {token.content for _, token in added if not token.special}
        self.special_ids = frozenset(i for text, i in self._special.items() if text not in plain)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        self._bytes = {i: _piece_bytes(model, i, piece) for i, piece in enumerate(pieces)}
        self._bytes |= {i: token.encode() for token, i in self._special.items()}
        others = [_describe(self._special[token.content], token) for _, token in added]
        super().__init__(path, config, vocab, {path.name: _sha256(data), "added_tokens": others})
        self.warnings.append(
            f"{path}: these ids are SentencePiece's and transformers 4's; without a tokenizer.json transformers 5 "
            f"leaves out the space in front of a text and gives other ids. {_CONVERT}."
        )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        cut = [self._cut.split(text) for text in texts]  # each: part, special token, part, ..., part
        encoded = iter(self._model.encode([part for parts in cut for part in parts[::2]]))
        ids = []
        for parts in cut:
            ids.append(next(encoded))
            for token in parts[1::2]:
                ids[-1] += [self._special[token], *next(encoded)]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        skipped = self.special_ids if skip_special_tokens else ()
        text = b"".join(self._bytes.get(i, b"") for i in ids if i not in skipped)
        return text.decode(errors="replace").removeprefix(" ")


def _piece_bytes(model: Any, i: int, piece: str) -> bytes:
    """What an id writes. A byte piece, "<0xE2>", writes a part of a character, so decoding joins bytes."""
    return bytes([int(piece[1:-1], 16)]) if model.is_byte(i) else piece.replace("▁", " ").encode()


# --- the vocabulary's file -------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    data = read_bytes(path)
    if not data:
        raise ValueError(f"{path}: not a {path.name}: it is empty")
    return data


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- tokens and fields in the files beside it ------------------------------------------------------------------------

_NAME_IT = "name it in tokenizer_config.json"
_CONVERT = (
    "Make a tokenizer.json once, with transformers 4 (pip install 'transformers<5' sentencepiece protobuf): "
    "AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
)


def _special_id(path: Path, config: dict[str, Any], vocab: dict[str, int], name: str, default: str) -> int | None:
    """The id of the token that the tokenizer's configuration names, so that it is the one the chat template writes.
    None if there is none: no file names one and the vocabulary lacks the default, or a file says that BOS is null.

    config.json's id is no substitute: fine-tunes that chose a new EOS often left the old id there. Only where no file
    names the token, and the default is assumed, must config.json agree with it.
    """
    if token := config.get(name):
        return vocab[token]
    if default not in vocab or (name == "bos_token" and name in config):
        return None
    expected = read_json(path.parent / "config.json").get(f"{name}_id")  # an id, a list of ids, null or nothing
    if expected is not None and vocab[default] not in (expected if isinstance(expected, list) else [expected]):
        raise ValueError(
            f"{path}: no tokenizer file names {name}; {default!r} has id {vocab[default]}, but config.json says "
            f"{expected}; {_NAME_IT}"
        )
    return vocab[default]


def _added_tokens(
    directory: Path, config: dict[str, Any], own: dict[int, AddedToken]
) -> list[tuple[int | None, AddedToken]]:
    """The tokens that the files beside the vocabulary add to it or change, in the order in which transformers adds
    them. First those with an id, then those that are only named, as `pad_token` or in `additional_special_tokens`,
    which take the next free one. `own` are those that the vocabulary's file has already."""
    path = directory / "tokenizer_config.json"
    named = _named_tokens(path, config)
    extras = _extra_tokens(path, config)
    if "added_tokens_decoder" in config:
        numbered = _decoder(path, config["added_tokens_decoder"])
    else:
        numbered = _added_tokens_json(directory / "added_tokens.json", named.keys() | extras.keys()) | own
    for token in numbered.values():
        token.special |= token.content in named
    listed = {token.content for token in [*numbered.values(), *own.values()]}
    unlisted = [token for text, token in named.items() if text not in listed]
    unlisted += [token for text, token in extras.items() if text not in listed | named.keys()]
    return [*sorted(numbered.items()), *((None, token) for token in unlisted)]


_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _named_tokens(path: Path, config: dict[str, Any]) -> dict[str, AddedToken]:
    others = [key for key in config if key.endswith("_token") and isinstance(config[key], str | dict)]
    keys = [key for key in dict.fromkeys([*_NAMED, *others]) if token_text(path, key, config.get(key))]
    return {token.content: token for token in (_added_token(path, key, config[key]) for key in keys)}


def _extra_tokens(path: Path, config: dict[str, Any]) -> dict[str, AddedToken]:
    key = "extra_special_tokens" if config.get("extra_special_tokens") else "additional_special_tokens"
    extra = [] if config.get(key) is None else config[key]
    if not isinstance(extra, list | dict):
        raise ValueError(f"{path}: {key} is {extra!r:.80}; it must be a list of tokens")
    entries = extra.values() if isinstance(extra, dict) else extra
    return {token.content: token for token in (_added_token(path, key, entry) for entry in entries)}


def _decoder(path: Path, decoder: Any) -> dict[int, AddedToken]:
    if not isinstance(decoder, dict):
        raise ValueError(f"{path}: added_tokens_decoder is {decoder!r:.80}; it must be an object, id -> token")
    for key, value in decoder.items():
        if not (key.isdecimal() and len(key) < 10 and isinstance(value, dict)):
            raise ValueError(f"{path}: added_tokens_decoder has {key!r:.80}: {value!r:.80}; it must be id -> token")
    return {
        int(key): _added_token(path, f"added_tokens_decoder[{key}]", value, False) for key, value in decoder.items()
    }


def _added_tokens_json(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """This older file has ids and no flags."""
    ids = read_json(path)
    for text, i in ids.items():
        if type(i) is not int or not 0 <= i < 10**9:
            raise ValueError(f"{path}: {text!r:.80} has the id {i!r:.80}; it must be an integer from 0 on")
    return {i: AddedToken(text, normalized=text not in special, special=text in special) for text, i in ids.items()}


def _added_token(path: Path, key: str, value: Any, special: bool = True) -> AddedToken:
    """A token in one of the JSON files: its text, or an object of its text and flags."""
    text = token_text(path, key, value)
    if not text:
        raise ValueError(f"{path}: {key} is {value!r:.80}; a token must have a text")
    flags = {flag: value[flag] for flag in FLAGS if flag in value} if isinstance(value, dict) else {}
    return AddedToken(text, **({"special": special} | flags))


def _check_named(
    path: Path, config: dict[str, Any], added: list[tuple[int | None, AddedToken]], vocab: dict[str, int]
) -> None:
    """Refuse a BOS or EOS that no file gives an id. transformers would give it a new one, which no model was trained
    with."""
    numbered = {token.content for asked, token in added if asked is not None}
    for name in ("bos_token", "eos_token"):
        if (token := config.get(name)) and token not in vocab and token not in numbered:
            raise ValueError(f"{path}: {name} {token!r} is not in the vocabulary")


def _append(path: Path, added: list[tuple[int | None, AddedToken]], vocab: dict[str, int]) -> None:
    """Give tokens that are no pieces of a SentencePiece model the ids after the pieces, as transformers does."""
    for asked, token in added:
        if any(getattr(token, flag) for flag in FLAGS if flag != "special"):
            raise ValueError(f"{path}: a flag of {token!r} needs a tokenizer.json. {_CONVERT}")
        found = vocab.setdefault(token.content, len(vocab))
        if asked not in (None, found):
            raise _wrong_id(path, token, asked, found)


def _wrong_id(path: Path, token: AddedToken, asked: int | None, found: int | None) -> ValueError:
    return ValueError(
        f"{path.parent}: tokenizer_config.json or added_tokens.json gives the token {token.content!r} the id {asked}, "
        f"but with {path.name} it has {found}; make the files agree"
    )


def _describe(i: int, token: AddedToken) -> list[Any]:
    return [i, token.content, *(flag for flag in FLAGS if getattr(token, flag))]


def _split_special_tokens(directory: Path, config: dict[str, Any]) -> bool:
    """Whether the text of a special token is encoded as any other text."""
    split = config.get("split_special_tokens") or False
    if type(split) is not bool:
        raise ValueError(f"{directory / 'tokenizer_config.json'}: split_special_tokens is {split!r:.80}, not a boolean")
    return split


def _check_sentencepiece_fields(path: Path, config: dict[str, Any]) -> None:
    """Refuse what would change ids in transformers and is not done here."""
    for name, accepted in {
        "legacy": (None, True),
        "add_prefix_space": (None, True),
        "split_special_tokens": (None, False),
        "sp_model_kwargs": (None, {}),
        "tokenizer_class": (None, "LlamaTokenizer", "LlamaTokenizerFast"),
    }.items():
        if config.get(name) not in accepted:
            raise ValueError(
                f"{path.parent / 'tokenizer_config.json'}: {name} is {config[name]!r:.80}, which changes how "
                f"{path.name} is read in a way that notus does not know. {_CONVERT}"
            )


def _rebuilt_by_version_5(path: Path, config: dict[str, Any], tokenizer: Any) -> list[str]:
    """A warning if transformers 5 ignores a tokenizer.json's rules for spaces and words. It takes only vocabulary and
    merges from the file, and the rules from the class that tokenizer_config.json names, if it has that class
    (transformers 5.23; not for model types mistral and mixtral)."""
    name = str(config.get("tokenizer_class")).removesuffix("Fast")
    rules = tokenizer.pre_tokenizer
    expected: Any
    if name == "LlamaTokenizer" and "ByteLevel" not in repr(rules):
        scheme = "always" if config.get("legacy") else "first"
        expected = Metaspace("▁", "never" if config.get("add_prefix_space") is False else scheme, split=False)
    elif name == "GPT2Tokenizer":
        expected = ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    else:
        return []
    if tokenizer.normalizer is None and rules is not None and rules.__getstate__() == expected.__getstate__():
        return []
    if read_json(path.parent / "config.json").get("model_type") in ("mistral", "mixtral"):
        return []
    return [
        f"{path.parent / 'tokenizer_config.json'}: because tokenizer_class is {config['tokenizer_class']!r}, "
        f"transformers 5 ignores the rules in {path.name} and gives other ids than transformers 4 and training; with "
        "'PreTrainedTokenizerFast' all follow the file."
    ]
