"""All that is known before a weight is read, checked here: a run fails in its first second or not for such a reason."""

from dataclasses import dataclass

from notus.chat import ChatTemplate, load_chat_template
from notus.config import Config
from notus.data import PairSet, load_pairs
from notus.model import MistralConfig
from notus.tokenizer import Tokenizer, load_tokenizer
from notus.weights import check_weights


@dataclass(frozen=True)
class Inputs:
    dims: MistralConfig
    tokenizer: Tokenizer
    template: ChatTemplate
    train: PairSet
    test: PairSet


def read_inputs(config: Config, need_weights: bool = True) -> Inputs:
    """What a user can have got wrong in data, tokenizer or checkpoint is refused with file, line and value: ValueError.
    Of the weights only the headers are read, and with `need_weights=False` they may be missing."""
    dims = MistralConfig.read(config.model.path)
    if need_weights:
        check_weights(config.model.path, dims)
    tokenizer, template = load_tokenizer(config.model.path), load_chat_template(config.model.path)

    def read(paths: tuple[str, ...]) -> PairSet:
        data = config.data
        pairs = load_pairs(
            paths, tokenizer, template,
            max_length=data.max_length, max_prompt_length=data.max_prompt_length, bos=data.bos,
            system_prompt=data.system_prompt if data.insert_system else None,
            drop_bad_pairs=data.drop_bad_pairs, cache_dir=data.cache_dir,
        )  # fmt: skip
        if (largest := pairs.ids.max(initial=-1)) >= dims.vocab_size:
            raise ValueError(
                f"{config.model.path}: the tokenizer gives id {largest}, but config.json has a vocab_size of "
                f"{dims.vocab_size}: tokenizer and weights do not belong together"
            )
        return pairs

    return Inputs(dims, tokenizer, template, read(config.data.train), read(config.data.test))
