"""tokens.py: what is trained on is the text that transformers renders: one BOS, one EOS, TRL 0.7's truncation. Pairs
that teach nothing are refused or counted. The token cache gives the same pairs, or it is made again."""

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_chat import INST_TEMPLATE
from test_rows import SHAPES, USER, row_of, table, turns, write
from transformers import PreTrainedTokenizerFast

from notus import tokens
from notus.chat import ZEPHYR_TEMPLATE, ChatTemplate, load_chat_template
from notus.tokenizer import Tokenizer, load_tokenizer
from notus.tokens import (
    Encoder,
    Pair,
    PairSet,
    describe_counts,
    describe_pair,
    load_pairs,
    pair_key,
    read_pairs,
    strip_eos,
    truncate,
)

BOS, EOS = 1, 2
READ = "read as chosen/rejected messages"


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(mistral_tokenizer_dir)


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer, mistral_tokenizer_dir: Path) -> Encoder:
    """Zephyr's frame."""
    template = load_chat_template(mistral_tokenizer_dir)
    return Encoder(tokenizer, template, bos=True, system_prompt="", vocab_size=32000)


@pytest.fixture(scope="module")
def oracle(mistral_tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(mistral_tokenizer_dir / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture
def load(tmp_path: Path, encoder: Encoder):
    """Rows -> pairs. Settings are those of the encoder or of load_pairs."""

    def load(*rows: object, max_length: int = 1024, max_prompt_length: int = 512, drop: bool = False, **frame):
        path = write(tmp_path / "pairs.jsonl", *rows)
        lengths = {"max_length": max_length, "max_prompt_length": max_prompt_length}
        return load_pairs([path], replace(encoder, **frame), **lengths, drop_bad_pairs=drop)

    return load


# --- pairs that teach nothing --------------------------------------------------------------------------------------


def answers(chosen: str, rejected: str) -> dict:
    """The implicit row with other answers."""
    return {name: [USER, {"role": "assistant", "content": text}] for name, text in
            (("chosen", chosen), ("rejected", rejected))}  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("No.", "No.", 'the chosen and the rejected answer are both "No."'),
        ("ABC</s>", "ABC", 'the chosen and the rejected answer are both "ABC</s>"'),
        ("ABC", "ABC</s></s>\n", 'the chosen and the rejected answer are both "ABC"'),
        ("Yes.", "", "the rejected answer is empty"),
        (" \n", "No.", "the chosen answer is empty"),
        ("</s>", "No.", "the chosen answer is empty"),
        ("Yes.", " </s> </s>\n", "the rejected answer is empty"),
    ],
)
def test_a_pair_that_teaches_nothing_is_refused_with_its_file_and_line(load, tmp_path, chosen, rejected, message):
    with pytest.raises(ValueError) as caught:
        load(SHAPES["implicit"], answers(chosen, rejected))
    cure = "data.drop_bad_pairs=true leaves such pairs out and counts them"
    assert str(caught.value) == f"{tmp_path / 'pairs.jsonl'}:2: {message}; {cure}"


def test_bad_pairs_are_left_out_and_counted_where_that_is_asked_for(load):
    empty, equal = answers(" ", "No."), answers("No.", "No.</s>")
    loaded = load(SHAPES["implicit"], equal, empty, equal, SHAPES["argilla"], drop=True)
    assert [pair.where.rpartition(":")[2] for pair in loaded] == ["1", "5"]
    assert loaded.counts == Counter(
        {"rows": 5, "pairs": 2, "dropped: answers are equal": 2, "dropped: an answer is empty": 1, READ: 4,
         "read as instruction/chosen_response/rejected_response strings": 1}
    )  # fmt: skip
    assert describe_counts(loaded.counts) == (
        "2 pairs of 5 rows (dropped: answers are equal 2, dropped: an answer is empty 1): 4 chosen/rejected messages, "
        "1 instruction/chosen_response/rejected_response strings"
    )


def test_where_no_pair_is_left_the_reasons_are_counted(load, tmp_path: Path):
    empty, equal = answers(" ", "No."), answers("No.", "No.")
    with pytest.raises(ValueError) as caught:
        load(equal, empty, equal, drop=True)
    reasons = "2 dropped: answers are equal, 1 dropped: an answer is empty"
    assert str(caught.value) == f"{tmp_path / 'pairs.jsonl'}: no pair is left of 3 rows ({reasons})"
    with pytest.raises(ValueError, match=r"no pair is left of 1 rows \(1 dropped: equal after truncation\)"):
        load(row_of("word " * 80 + "a", "word " * 80 + "b"), max_length=60, max_prompt_length=40)


def test_answers_that_differ_as_text_but_not_as_tokens_are_left_out_and_counted(load):
    """Some templates strip what they are given."""
    trims = ChatTemplate(ZEPHYR_TEMPLATE.replace("message['content']", "message['content'] | trim"))
    loaded = load(row_of("Yes", " Yes \n"), row_of("Yes", "No"), template=trims, drop=True)
    assert [pair.where.rpartition(":")[2] for pair in loaded] == ["2"]
    assert loaded.counts == Counter({"rows": 2, READ: 2, "pairs": 1, "dropped: equal as tokens": 1})
    cut = load(row_of("Yes" * 80, "Yes" * 80 + " "), row_of("Yes", "No"), template=trims, max_length=60,
               max_prompt_length=40)  # fmt: skip
    assert cut.counts["dropped: equal as tokens"] == 1 and "dropped: equal after truncation" not in cut.counts


def test_no_files_are_no_pairs(encoder: Encoder, tmp_path: Path):
    """data.test may be empty."""
    for cache_dir in (None, tmp_path / "tokens"):
        pairs = load_pairs([], encoder, max_length=64, max_prompt_length=32, cache_dir=cache_dir)
        assert len(pairs) == 0 and pairs.keys == [] and pairs.counts == Counter() and list(pairs) == []


def test_what_is_no_file_is_refused_with_and_without_a_cache(encoder: Encoder, tmp_path: Path):
    (tmp_path / "dataset_dict.json").touch()
    for cache_dir in (None, tmp_path / "tokens"):
        with pytest.raises(ValueError, match="is a folder; a file of rows is wanted; load it with `datasets`"):
            load_pairs([tmp_path], encoder, max_length=64, max_prompt_length=32, cache_dir=cache_dir)


# --- text to ids ---------------------------------------------------------------------------------------------------


def ids_of(pair: Pair, answer: str) -> list[int]:
    return [*pair.prompt.tolist(), *getattr(pair, answer).tolist()]


CASES = {
    "plain": row_of("Hello!", "Go away."),
    "many turns": row_of("4", "5", "1+1?", "2", "2+2?"),
    "own system turn": {
        side: [{"role": "system", "content": "Be brief."}, *turns("Hi", answer)]
        for side, answer in (("chosen", "Hello!"), ("rejected", "Well, hello!"))
    },
    "whitespace at both ends": row_of("  Hello \n\n", "\n\tHello", "  Hi\n "),
    "unicode": row_of("你好，世界 🙂", "e\u0301 \u200b ▁", "👩‍👩‍👧‍👦?"),
    "one answer begins the other": row_of("Yes", "Yes and no"),
}


@pytest.mark.parametrize("system_prompt", [None, "", "You are terse."])
@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_transformers_chat_template(load, oracle, case: str, system_prompt: str | None):
    """Up to EOS: after it the template writes a line end, `</s> ▁ \\n`, which is never sampled."""
    row = CASES[case]
    (pair,) = load(row, system_prompt=system_prompt)
    for side in ("chosen", "rejected"):
        messages = row[side]
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        options = {"chat_template": ZEPHYR_TEMPLATE, "return_dict": False}
        whole = oracle.apply_chat_template(messages, **options)
        assert whole[-3:] == [EOS, 28705, 13]
        assert ids_of(pair, side) == [BOS, *whole[:-2]]
        prompt = oracle.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
        assert pair.prompt.tolist() == [BOS, *prompt]
        assert getattr(pair, side).tolist().count(EOS) == 1
    assert pair.prompt.dtype == pair.chosen.dtype == pair.rejected.dtype == np.int32


# The shapes of messages that TRL reads. (It fails on a prompt as text beside conversations.)
OF_TRL = {
    "implicit": SHAPES["implicit"],
    "explicit": SHAPES["explicit"],
    "many turns and a system turn": {
        "prompt": [{"role": "system", "content": "Be brief."}, *turns("1+1?", "2", "2+2?")],
        "chosen": [{"role": "assistant", "content": "4"}],
        "rejected": [{"role": "assistant", "content": "5 "}],
    },
    "answers that begin alike": row_of("Yes, it is.", "Yes, it is not.", "1+1?", "2", "Is that so?"),
}


def trl_ids(oracle: PreTrainedTokenizerFast, row: dict) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected as in TRL 1.16's DPOTrainer: `extract_prompt`, then `tokenize_fn`."""
    prompt, sides = row.get("prompt"), [row["chosen"], row["rejected"]]
    if not isinstance(prompt, list):
        same = next(i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b)
        prompt, sides = sides[0][:same], [side[same:] for side in sides]
    options = {"chat_template": ZEPHYR_TEMPLATE, "return_dict": False}
    ids = oracle.apply_chat_template(prompt, add_generation_prompt=True, **options)
    wholes = [oracle.apply_chat_template(prompt + side, **options) for side in sides]
    assert all(whole[: len(ids)] == ids for whole in wholes)
    return ids, *(whole[len(ids) :] for whole in wholes)


@pytest.mark.parametrize("shape", OF_TRL)
def test_ids_are_those_of_trl(load, oracle, shape: str):
    """TRL adds neither BOS nor a system turn. After EOS it scores the template's line end, `▁ \\n`, too."""
    (pair,) = load(OF_TRL[shape], bos=False, system_prompt=None)
    prompt, chosen, rejected = trl_ids(oracle, OF_TRL[shape])
    assert pair.prompt.tolist() == prompt
    assert [*pair.chosen.tolist(), 28705, 13] == chosen and [*pair.rejected.tolist(), 28705, 13] == rejected


def test_all_shapes_of_the_readme_have_the_same_ids(encoder: Encoder):
    rows = [row for _, row in table()]
    lengths = {"max_length": 64, "max_prompt_length": 32}
    pairs = load_pairs(rows, encoder, **lengths)
    assert len(pairs) == len(rows) == 9 and len(set(pairs.keys)) == 1
    assert load_pairs(rows[0], encoder, **lengths).keys == pairs.keys[:1]  # one row, without a list
    assert sum(count for name, count in pairs.counts.items() if name.startswith("read as ")) == 9
    parts = load_pairs(
        [
            {
                "chosen": [
                    {"role": "user", "content": [{"type": "text", "text": part} for part in ("Is 7 ", "prime?")]},
                    yes,
                ],
                "rejected": [USER, no],
            }
            for yes, no in [(row["chosen"][1], row["rejected"][1]) for row in rows[:1]]
        ],
        encoder,
        **lengths,
    )
    assert parts.keys == pairs.keys[:1]


TOOL_ROW = {
    "prompt": [USER, {"role": "assistant", "content": "is_prime(7)"}, {"role": "tool", "content": 'true, "prime"'}],
    "chosen": "Yes.",
    "rejected": "No.",
}


def test_the_turns_of_a_tool_go_to_the_template(load, oracle, tmp_path: Path):
    """Or, if it would drop them, as Zephyr's does, the row is refused."""
    with pytest.raises(ValueError, match=rf"{tmp_path}/pairs\.jsonl:2: .*the chat template leaves out what tools say"):
        load(SHAPES["implicit"], TOOL_ROW)
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    chatml += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (pair,) = load(TOOL_ROW, template=ChatTemplate(chatml), bos=False, system_prompt=None)
    expected = oracle.apply_chat_template(
        TOOL_ROW["prompt"], add_generation_prompt=True, chat_template=chatml, return_dict=False
    )
    assert pair.prompt.tolist() == expected and "tool\n" in oracle.decode(expected)
    # Quotes may be escaped: what counts is whether anything is written.
    (pair,) = load(TOOL_ROW, template=ChatTemplate(chatml.replace("m.content", "m.content | tojson")), bos=False)
    assert '\\"prime\\"' in oracle.decode(pair.prompt)


def test_a_row_that_the_template_rejects_is_named(load, tmp_path: Path):
    rows = [row_of("Yes", "No"), {"prompt": [USER, USER], "chosen": "Yes.", "rejected": "No."}]
    with pytest.raises(ValueError, match=rf"^{tmp_path}/pairs\.jsonl:2: .*the chat template rejects .*must alternate"):
        load(*rows, template=ChatTemplate(INST_TEMPLATE), system_prompt=None)


def test_golden_ids_of_zephyrs_frame(load):
    (pair,) = load(row_of("Hello!", "No."))
    prompt = [
        *(BOS, 523, 28766, 6574, 28766, 28767, 13),  # <s> ▁< | system | > \n
        *(EOS, 28705, 13, 28789, 28766, 1838, 28766, 28767, 13),  # </s> ▁ \n < | user | > \n
        *(23809, EOS, 28705, 13, 28789, 28766, 489, 11143, 28766, 28767, 13),  # Hi </s> ▁ \n < | ass istant | > \n
    ]
    assert pair.prompt.tolist() == prompt
    assert (pair.chosen.tolist(), pair.rejected.tolist()) == ([16230, 28808, EOS], [2501, 28723, EOS])
    assert load(row_of("Hello!", "No.")).num_tokens.tolist() == [len(prompt) + 6]


def test_bos_is_a_setting(load):
    (with_bos,) = load(CASES["plain"])
    (without,) = load(CASES["plain"], bos=False)
    assert with_bos.prompt.tolist() == [BOS, *without.prompt.tolist()]
    assert BOS not in without.prompt
    assert np.array_equal(with_bos.chosen, without.chosen)


def test_the_system_turn_is_none_empty_or_text(load, tokenizer: Tokenizer):
    def text(system_prompt: str | None) -> str:
        (pair,) = load(CASES["plain"], system_prompt=system_prompt)
        return tokenizer.decode(pair.prompt.tolist()[1:], skip_special_tokens=False)

    assert text(None).startswith("<|user|>\nHi</s>")
    assert text("").startswith("<|system|>\n</s> \n<|user|>\nHi</s>")
    assert text("Be kind.").startswith("<|system|>\nBe kind.</s> \n<|user|>\nHi</s>")


@pytest.mark.parametrize(
    ("answer", "eos", "end"),
    [
        ("Stop</s>", 1, "Stop</s>"),  # the user's own, and the template's: one
        ("Stop</s></s></s>", 1, "Stop</s>"),
        ("Stop</s>\n", 1, "Stop</s>"),  # what stands after EOS is never sampled
        ("Stop</s> </s>\n\n", 1, "Stop</s>"),
        ("Stop \n</s>\n", 1, "Stop \n</s>"),
        ("Stop</s> now", 2, "Stop</s> now</s>"),  # in the middle it is the token that the text says
        ("Stop  \n", 1, "Stop  \n</s>"),  # an answer's own whitespace is text
        ("<|user|>\nStop", 1, "<|user|>\nStop</s>"),
    ],
)
def test_an_answer_ends_with_exactly_one_eos(load, tokenizer: Tokenizer, answer: str, eos: int, end: str):
    (pair,) = load(row_of(answer, "Go"))
    ids = pair.chosen.tolist()
    assert ids[-1] == EOS and ids[-2] != EOS and ids.count(EOS) == eos
    assert tokenizer.decode(ids, skip_special_tokens=False).replace("</s>  ", "</s> ") == end


def test_a_template_that_writes_bos_itself_still_gives_one(load, oracle):
    row = CASES["many turns"]
    (pair,) = load(row, template=ChatTemplate(INST_TEMPLATE), system_prompt=None)
    for side in ("chosen", "rejected"):
        whole = oracle.apply_chat_template(row[side], chat_template=INST_TEMPLATE, return_dict=False)
        assert whole[0] == BOS and whole.count(BOS) == 1
        last_eos = len(whole) - 1 - whole[::-1].index(EOS)
        assert ids_of(pair, side) == whole[: last_eos + 1]


def test_a_token_over_the_border_belongs_to_the_answers(load, tokenizer: Tokenizer):
    """Where a template ends its prompt in "[/INST]", with no line end, an answer ")" makes the token "])"."""
    template = ChatTemplate(INST_TEMPLATE)
    loaded = load(row_of(")", "Fine", "Hi"), row_of("Good", "Fine", "Hi"), template=template, system_prompt=None)
    assert loaded.counts["prompt and answer share a token"] == 1
    merged, apart = loaded
    assert merged.prompt.tolist() == apart.prompt.tolist()[:-1]
    assert merged.chosen.tolist() == [2803, EOS]  # "])"
    for pair, side, text in ((merged, "chosen", ")"), (merged, "rejected", "Fine"), (apart, "chosen", "Good")):
        assert ids_of(pair, side) == [BOS, *tokenizer.encode(f"[INST] Hi [/INST]{text}</s>")]


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("", ""), ("</s>", ""), (" </s>\n</s> ", " "), ("a</s>", "a"), ("a </s>\n", "a "), ("a \n", "a \n"),
        ("</s>a", "</s>a"), ("a</s", "a</s"),
    ],
)  # fmt: skip
def test_strip_eos(text: str, stripped: str):
    assert strip_eos(text, "</s>") == stripped


def test_the_text_of_a_special_token_in_an_answer_is_counted(load, tokenizer: Tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "special_ids", frozenset({0, BOS, EOS}), raising=False)
    rows = [row_of("a</s>b", "No"), row_of("<s>", "<unk>"), row_of("Yes</s>", "No"), row_of("Yes", "No", "Hi</s>")]
    loaded = load(*rows)
    assert loaded.counts == Counter({"rows": 4, READ: 4, "pairs": 4, "answers with the text of a special token": 3})
    assert loaded[1].chosen.tolist()[-2:] == [BOS, EOS] and loaded[2].chosen.tolist().count(EOS) == 1


def test_an_id_beyond_the_embedding_is_refused(load, tokenizer: Tokenizer, monkeypatch):
    row = row_of("Hello!", "No.")  # the largest id is that of "!", 28808
    assert len(load(row, vocab_size=28809)) == 1
    for row in (row_of("Hello!", "No."), row_of("No.", "Hello!"), row_of("a", "b", "Hello!")):
        with pytest.raises(ValueError) as caught:
            load(row, vocab_size=28808)
        asked = row["chosen"][0]["content"]
        assert str(caught.value) == (
            f'{tokenizer.path}: "{asked}" or an answer to it has token id 28808, but the model\'s embedding has only '
            "28808 rows: tokenizer and weights do not belong together"
        )
    monkeypatch.setattr(tokenizer, "bos_id", 32000)
    with pytest.raises(ValueError, match="has token id 32000, but the model's embedding has only 32000 rows"):
        load(row)
    assert len(load(row, bos=False)) == 1


def test_a_prompt_alone_has_the_ids_of_the_pairs_prompt(load, encoder: Encoder):
    for row in CASES.values():
        assert encoder.prompt(row["chosen"][:-1]) == load(row)[0].prompt.tolist()


def test_the_size_of_a_block_changes_nothing(encoder: Encoder):
    conversations = [(turns("Hi"), ["Hello!", "No."]), (turns("1+1?", "2", "2+2?"), []), (turns("Go"), ["4"])] * 2
    whole = list(encoder.encode(conversations))
    assert [len(answers) for _, answers, _ in whole] == [2, 0, 1] * 2
    for block in (1, 2, 5, 6):
        assert list(encoder.encode(conversations, block=block)) == whole


def test_the_identity_names_everything_that_can_change_an_id(encoder: Encoder):
    parts = encoder.tokenizer.identity | encoder.template.identity
    assert {name: encoder.identity[name] for name in parts} == parts
    changes = [{"bos": False}, {"system_prompt": None}, {"system_prompt": "x"}, {"template": ChatTemplate("x")}]
    identities = [replace(encoder, **change).identity for change in changes]
    assert all(identity != encoder.identity for identity in identities)


def test_describe_pair_shows_special_tokens_and_line_ends(load, tokenizer: Tokenizer):
    (pair,) = load(row_of("Hello! " * 99, "No."))
    prompt, chosen, rejected = describe_pair(pair, tokenizer, max_characters=60).splitlines()
    assert "<|system|>\\n</s>" in describe_pair(pair, tokenizer) and "<s>" in prompt
    assert f"{len(pair.prompt)} tokens, context" in prompt
    assert "[...]" in chosen and len(chosen) < 110
    assert rejected.endswith("3 tokens, scored :  No.</s>")


# --- truncation ----------------------------------------------------------------------------------------------------


def trl_truncate(prompt: list, chosen: list, rejected: list, max_length: int, max_prompt_length: int) -> tuple:
    """TRL 0.7.4's DPODataCollatorWithPadding.tokenize_batch_element with truncation_mode keep_end."""
    longer_response_length = max(len(chosen), len(rejected))
    # if combined sequence is too long, truncate the prompt
    if len(prompt) + longer_response_length > max_length:
        prompt = prompt[-max_prompt_length:]
    # if that's still too long, truncate the response
    if len(prompt) + longer_response_length > max_length:
        chosen = chosen[: max_length - max_prompt_length]
        rejected = rejected[: max_length - max_prompt_length]
    return prompt, chosen, rejected


def test_truncation_is_trl_07s_on_random_lengths():
    rng = np.random.default_rng(0)
    cut = Counter()
    for _ in range(5000):
        max_length = int(rng.integers(2, 24))
        max_prompt_length = int(rng.integers(1, max_length))
        lengths = rng.integers(1, 30, 3)
        prompt, chosen, rejected = (list(range(100 * i, 100 * i + n)) for i, n in enumerate(lengths))
        ours = truncate(prompt, chosen, rejected, max_length, max_prompt_length)
        theirs = trl_truncate(prompt, chosen, rejected, max_length, max_prompt_length)
        assert ours == theirs
        cut.update(i for i, n in enumerate(lengths) if len(ours[i]) < n)

        kept = truncate(prompt, chosen, rejected, max_length, max_prompt_length, keep=1)
        assert kept[0][0] == prompt[0]  # BOS
        assert kept[0][1:] == (theirs[0][1:] if len(theirs[0]) < len(prompt) else prompt[1:])
        assert kept[1:] == theirs[1:]
        assert len(kept[0]) + max(map(len, kept[1:])) <= max_length
    assert min(cut[i] for i in range(3)) > 500  # the random lengths do reach every branch


def test_truncated_pairs_keep_bos_lose_eos_and_are_counted(load):
    def words(n: int, word: str) -> str:
        return " ".join([word] * n)

    frame = len(load(row_of("a", "b", "x"), system_prompt=None)[0].prompt) - 1  # tokens around one word
    rows = [
        row_of("yes", "no", words(40, "x")),  # the prompt alone is too long
        row_of(words(60, "yes"), "no", "x"),  # one answer
        row_of(words(60, "yes"), words(60, "no"), words(40, "x")),  # all three
        row_of("yes", "no", "x"),
    ]
    whole = load(*rows, system_prompt=None)
    assert whole.counts == Counter({"rows": 4, READ: 4, "pairs": 4})
    loaded = load(*rows, system_prompt=None, max_length=frame + 30, max_prompt_length=frame + 10)
    assert loaded.counts == Counter({"rows": 4, READ: 4, "pairs": 4, "prompts cut": 2, "answers cut (no EOS)": 3})
    for pair, before in zip(loaded, whole, strict=True):
        expected = trl_truncate(*(ids.tolist() for ids in before[1:]), frame + 30, frame + 10)
        assert pair.prompt.tolist()[1:] == expected[0][1:] or pair.prompt.tolist() == before.prompt.tolist()
        assert (pair.chosen.tolist(), pair.rejected.tolist()) == expected[1:]
        assert pair.prompt[0] == BOS and BOS not in pair.prompt[1:]
        for ids, uncut in ((pair.chosen, before.chosen), (pair.rejected, before.rejected)):
            assert (ids[-1] == EOS) == (len(ids) == len(uncut))
    assert [len(pair.prompt) for pair in loaded] == [frame + 10, frame + 1, frame + 10, frame + 1]
    assert [(len(pair.chosen), len(pair.rejected)) for pair in loaded] == [(2, 2), (20, 2), (20, 20), (2, 2)]


def test_pairs_that_truncation_makes_equal_are_left_out_and_counted(load):
    same = "word " * 80
    loaded = load(row_of(same + "a", same + "b"), row_of("a", "b"), max_length=60, max_prompt_length=40)
    assert [pair.where.rpartition(":")[2] for pair in loaded] == ["2"]
    assert loaded.counts == Counter(
        {"rows": 2, READ: 2, "pairs": 1, "answers cut (no EOS)": 2, "dropped: equal after truncation": 1}
    )


# --- held-out rows -------------------------------------------------------------------------------------------------


def questions(count: int) -> list[dict]:
    return [{"prompt": f"Question {n}?", "chosen": f"Yes {n}.", "rejected": f"No {n}."} for n in range(count)]


def halves(encoder: Encoder, rows: list[dict], test_size: float) -> tuple[PairSet, PairSet]:
    settings = {"max_length": 64, "max_prompt_length": 32, "test_size": test_size}
    train, test = (load_pairs(rows, encoder, **settings, held_out=held_out) for held_out in (False, True))
    return train, test


@pytest.mark.parametrize("test_size", [0.25, 100])
def test_rows_are_held_out_by_their_prompt_whatever_the_order(encoder: Encoder, test_size: float):
    rows = questions(400)
    train, test = halves(encoder, rows, test_size)
    assert len(train) + len(test) == train.counts["rows"] + test.counts["rows"] == 400
    assert len(test) == 100 if test_size == 100 else 70 < len(test) < 130  # 3.5 standard deviations
    whole = load_pairs(rows, encoder, max_length=64, max_prompt_length=32)
    assert sorted([*train.keys, *test.keys]) == sorted(whole.keys)
    random.Random(0).shuffle(rows)
    again = halves(encoder, rows, test_size)
    assert {*again[0].keys} == {*train.keys} and {*again[1].keys} == {*test.keys}


def test_more_rows_move_none_and_equal_prompts_stay_together(encoder: Encoder):
    first, more = halves(encoder, questions(50), 0.3), halves(encoder, questions(200), 0.3)
    assert {*first[0].keys} < {*more[0].keys} and {*first[1].keys} < {*more[1].keys}
    twice = [*questions(50), *(row | {"chosen": "Aye."} for row in questions(50))]
    assert [len(half) for half in halves(encoder, twice, 0.3)] == [2 * len(half) for half in first]


def test_the_prompt_is_what_counts_in_every_shape(encoder: Encoder):
    """The system turn that a frame adds is none of the row, and the answers are not hashed."""
    rows = [row | {"score": n} for n, (_, row) in enumerate(table())]
    train, test = (
        [len(half) for half in halves(each, rows + questions(20), 0.5)]
        for each in (encoder, replace(encoder, system_prompt=None, bos=False))
    )
    assert train == test and min(train) > 5


@pytest.mark.parametrize(
    ("count", "test_size", "what"), [(3, 0.001, "hold out"), (3, 3, "train on"), (1, 1, "train on")]
)
def test_a_half_without_rows_is_refused(encoder: Encoder, count: int, test_size: float, what: str):
    with pytest.raises(ValueError, match=rf"^data.test_size = {test_size:g} leaves no row of {count} to {what}$"):
        halves(encoder, questions(count), test_size)


# --- sets of pairs -------------------------------------------------------------------------------------------------


def test_a_set_gives_back_its_pairs():
    made = [Pair(f"a:{n}", *(np.arange(k, dtype=np.int32) + n for k in lengths)) for n, lengths in
            enumerate([(1, 2, 3), (4, 1, 1), (2, 5, 1)])]  # fmt: skip
    pairs = PairSet.of(made, Counter(rows=3, pairs=3))
    assert len(pairs) == 3 and pairs.ids.dtype == np.int32
    assert pairs.lengths.tolist() == [[1, 2, 3], [4, 1, 1], [2, 5, 1]] and pairs.num_tokens.tolist() == [6, 6, 8]
    for ours, theirs in zip(pairs, made, strict=True):
        assert ours.where == theirs.where and all(map(np.array_equal, ours[1:], theirs[1:]))


def test_keys_name_the_ids_of_each_pair_and_nothing_else(load):
    rows = [row_of("Hello!", "No."), row_of("No.", "Hello!"), row_of("Hello!", "No."), row_of("Hello!", "No.", "Ho")]
    pairs = load(*rows)
    assert pairs.keys == [pair_key(pair) for pair in pairs] and {len(key) for key in pairs.keys} == {16}
    assert pairs.keys[0] == pairs.keys[2] and len(set(pairs.keys)) == 3
    assert pairs.keys is pairs.keys  # hashed once
    assert load(*rows[1:], *rows[:1]).keys == [*pairs.keys[1:], pairs.keys[0]]


# --- the token cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path, encoder: Encoder):
    """Load with a cache -> the pairs; `cached.made` counts how often they were made from the text."""
    rows = write(tmp_path / "rows.jsonl", row_of("Yes, of course.", "No."), row_of("Why not?", "Because."))

    def cached(*paths: Path, **changes) -> PairSet:
        names = ("max_length", "max_prompt_length", "drop_bad_pairs", "test_size", "held_out")
        settings = {"max_length": 64, "max_prompt_length": 32}
        settings |= {name: changes.pop(name) for name in names if name in changes}
        return load_pairs(paths or [rows], replace(encoder, **changes), cache_dir=tmp_path / "tokens", **settings)

    cached.made, make = 0, tokens.make_pairs

    def counted(*arguments, **settings) -> PairSet:
        cached.made += 1
        return make(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "make_pairs", counted)
        cached.rows = rows
        yield cached


def folder_of(tmp_path: Path) -> Path:
    """The one folder of a cache."""
    (counts,) = (tmp_path / "tokens").glob("*/counts.json")
    return counts.parent


def assert_same_pairs(ours: PairSet, theirs: PairSet) -> None:
    assert ours.counts == theirs.counts
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.where == other.where and all(map(np.array_equal, mine[1:], other[1:]))


def test_the_second_time_pairs_are_mapped_from_the_disk(cached):
    first, second = cached(), cached()
    assert cached.made == 1 and isinstance(second.ids, np.memmap)
    assert_same_pairs(first, second)
    assert_same_pairs(second, cached(max_length=1000))  # short enough for either, but made again
    assert cached.made == 2


def test_what_is_cached_is_what_is_made(cached, encoder: Encoder):
    made = load_pairs([cached.rows], encoder, max_length=64, max_prompt_length=32)
    assert_same_pairs(cached(), made)


def test_whatever_changes_the_tokens_misses_the_cache(cached, monkeypatch, tokenizer: Tokenizer, tmp_path: Path):
    cached()
    changes = [
        {"max_length": 63}, {"max_prompt_length": 31}, {"bos": False}, {"system_prompt": None},
        {"system_prompt": "Be brief."}, {"drop_bad_pairs": True}, {"vocab_size": 32001},
        {"system_prompt": None, "template": ChatTemplate(INST_TEMPLATE)},
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        cached(**change)
        assert cached.made == number, change
    text = cached.rows.read_text()
    cached.rows.write_text(text.replace("Yes", "Aye"))
    cached()
    cached(cached.rows, cached.rows)
    monkeypatch.setattr(tokens, "TOKENS_VERSION", tokens.TOKENS_VERSION + 1)
    cached()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer.path.parent / name).read_bytes() + b"\n")
    cached(tokenizer=load_tokenizer(tmp_path))
    assert cached.made == len(changes) + 5
    monkeypatch.undo()
    cached.rows.write_text(text)
    cached()
    assert cached.made == len(changes) + 5  # what was made stays


def test_python_rows_and_the_counts_of_shapes_are_cached(cached):
    rows = [row for _, row in table()]
    first, second = cached(*rows), cached(*rows)
    assert cached.made == 1 and isinstance(second.ids, np.memmap)
    assert_same_pairs(first, second)
    assert second.counts["read as prompt/chosen/rejected messages"] == 2
    cached(*rows[:-1], rows[-1] | {"system": "Be brief."})
    cached(*rows[:-1], rows[-1] | {"rejected": np.array([{"role": "assistant", "content": "x"}] * 1)})
    assert cached.made == 3
    cached(cached.rows, held_out=True)
    cached(cached.rows)
    assert cached.made == 4  # without a test_size there are no halves
    halves = [{"test_size": size, "held_out": held_out} for size in (2, 0.5) for held_out in (False, True)]
    made = [cached(*questions(20), **half) for half in halves]
    assert cached.made == 8 and [len(half) for half in made[:2]] == [18, 2]
    for half, pairs in zip(halves, made, strict=True):
        assert_same_pairs(cached(*questions(20), **half), pairs)
    assert cached.made == 8


def test_a_copy_of_the_file_elsewhere_hits_the_cache(cached, tmp_path: Path):
    cached()
    copy = tmp_path / "copy.jsonl"
    copy.write_text(cached.rows.read_text())
    cached(copy)
    assert cached.made == 1


def test_bad_data_leaves_no_cache(cached, tmp_path: Path):
    cached.rows.write_text("{}\n")
    with pytest.raises(ValueError):
        cached()
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".lock"]


FILES = ("ids.npy", "bounds.npy", "where.npy", "counts.json")


def test_a_flipped_bit_at_any_byte_of_any_file_of_the_cache_is_found(cached, tmp_path: Path):
    cached()
    folder, rng = folder_of(tmp_path), random.Random(0)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    for name in FILES:
        whole = (folder / name).read_bytes()
        with (folder / name).open("r+b", buffering=0) as file:
            for place in range(len(whole)):
                for bit in range(8) if name == "counts.json" else [rng.randrange(8)]:
                    file.seek(place)
                    file.write(bytes([whole[place] ^ 1 << bit]))
                    assert read_pairs(folder) is None, (name, place, bit)
                file.seek(place)
                file.write(whole[place : place + 1])
    assert read_pairs(folder) is not None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-8]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "emptied": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_set_aside_and_made_again(cached, tmp_path: Path, capsys, damage: str):
    first = cached()
    folder = folder_of(tmp_path)
    copy = PairSet.of(list(first), first.counts)  # the pairs are views of a file that is about to be spoiled
    for number, name in enumerate(FILES, 1):
        DAMAGES[damage](folder / name)
        assert_same_pairs(cached(), copy)
        assert cached.made == number + 1
        aside = folder.with_name(f"{folder.name}.damaged" + (f"-{number}" if number > 1 else ""))
        assert capsys.readouterr().out == (
            f"tokens      {folder} is damaged; it was moved to {aside} and is made again\n"
        )
        assert aside.is_dir()
    cached()
    assert cached.made == len(FILES) + 1 and capsys.readouterr().out == ""


def test_an_older_or_another_cache_under_this_name_is_made_again(cached, tmp_path: Path):
    first = cached()
    folder = folder_of(tmp_path)
    cached(max_length=20, max_prompt_length=10)
    (other,) = {path.parent for path in (tmp_path / "tokens").glob("*/counts.json")} - {folder}
    shutil.rmtree(folder)
    shutil.copytree(other, folder)  # whole, but not what its name says
    assert_same_pairs(cached(), PairSet.of(list(first), first.counts))
    assert cached.made == 3
    manifest = json.loads((folder / "counts.json").read_text())
    (folder / "counts.json").write_text(json.dumps(manifest["counts"]))  # as version 1 had it
    cached()
    assert cached.made == 4


def test_what_a_killed_process_left_is_no_cache(cached, tmp_path: Path):
    cached()
    folder = folder_of(tmp_path)
    folder.rename(folder.with_suffix(".tmp"))
    (folder.with_suffix(".tmp") / "counts.json").unlink()
    cached()
    assert cached.made == 2 and {path.name for path in folder.iterdir()} == set(FILES)
    assert not folder.with_suffix(".tmp").exists()


def test_a_cache_is_read_without_a_lock(cached, tmp_path: Path, monkeypatch):
    """It may stand in a folder in which nobody may write."""
    cached()
    for path in (tmp_path / "tokens").glob("*.lock"):
        path.unlink()
    monkeypatch.setattr(tokens, "lock", lambda *_: pytest.fail("locked"))
    (tmp_path / "tokens").chmod(0o555)
    cached()
    (tmp_path / "tokens").chmod(0o755)
    assert cached.made == 1 and [path.suffix for path in (tmp_path / "tokens").iterdir()] == [""]


PROCESS = """
import sys, time
from pathlib import Path
from notus import tokens
from notus.chat import load_chat_template
from notus.tokenizer import load_tokenizer

rows, model, cache = map(Path, sys.argv[1:])
made, make = [], tokens.make_pairs

def slowly(*arguments, **settings):
    made.append(1)
    time.sleep(0.5)
    return make(*arguments, **settings)

tokens.make_pairs = slowly
encoder = tokens.Encoder(load_tokenizer(model), load_chat_template(model), True, "", 32000)
pairs = tokens.load_pairs([rows], encoder, max_length=64, max_prompt_length=32, cache_dir=cache)
print(len(made), len(pairs), sum(pairs.ids.tolist()))
"""


def test_of_many_processes_one_does_the_work(tmp_path: Path, mistral_tokenizer_dir: Path):
    rows = write(tmp_path / "rows.jsonl", *(row_of(f"Yes {i}", f"No {i}") for i in range(50)))
    command = [sys.executable, "-c", PROCESS, str(rows), str(mistral_tokenizer_dir), str(tmp_path / "tokens")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=300)[0].split() for process in processes]
    assert sorted(int(made) for made, _, _ in said) == [0, 0, 1]
    assert {tuple(rest) for _, *rest in said} == {("50", said[0][2])}
