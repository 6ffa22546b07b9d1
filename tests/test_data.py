"""data.py: every accepted shape is the same pair, every bad row is refused by its place, and what is trained on is
the text that transformers renders: one BOS, one EOS, TRL 0.7's truncation."""

import gzip
import json
import multiprocessing
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_chat import INST_TEMPLATE
from transformers import PreTrainedTokenizerFast

from notus import data
from notus.chat import ZEPHYR_TEMPLATE, ChatTemplate, load_chat_template
from notus.data import (
    Pair,
    PairSet,
    ahead,
    batch,
    describe_counts,
    describe_pair,
    load_pairs,
    read_rows,
    steps_per_epoch,
    truncate,
)
from notus.tokenizer import Tokenizer, load_tokenizer

BOS, EOS = 1, 2
USER = {"role": "user", "content": "Is 7 prime?"}
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes, it is.", "No."))


@pytest.fixture(scope="module")
def tokenizer(mistral_tokenizer_dir: Path) -> Tokenizer:
    return load_tokenizer(mistral_tokenizer_dir)


@pytest.fixture(scope="module")
def template(mistral_tokenizer_dir: Path) -> ChatTemplate:
    return load_chat_template(mistral_tokenizer_dir)


@pytest.fixture(scope="module")
def oracle(mistral_tokenizer_dir: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(mistral_tokenizer_dir / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )


def write(path: Path, *rows: object) -> Path:
    """One row a line; .json as an array; .gz compressed."""
    name = path.name.removesuffix(".gz")
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def turns(*contents: str) -> list[dict]:
    """A conversation of alternating turns, opened by the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def row_of(chosen: str, rejected: str, *prompt: str) -> dict:
    return {"chosen": turns(*prompt or ("Hi",), chosen), "rejected": turns(*prompt or ("Hi",), rejected)}


@pytest.fixture
def load(tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate):
    def load(*rows: object, **settings) -> PairSet:
        defaults = {
            "max_length": 1024,
            "max_prompt_length": 512,
            "bos": True,
            "system_prompt": "",
            "template": template,
        }
        return load_pairs([write(tmp_path / "pairs.jsonl", *rows)], tokenizer, **defaults | settings)

    return load


# --- reading -------------------------------------------------------------------------------------------------------

SHAPES = {
    "implicit": {"chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 5.0, "score_rejected": 1.0},
    "prompt as text too": {"prompt": USER["content"], "chosen": [USER, YES], "rejected": [USER, NO]},
    "explicit": {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
    "argilla": {
        "instruction": USER["content"],
        "chosen_response": YES["content"],
        "rejected_response": NO["content"],
        "source": "flan",
    },
}


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.json", "pairs.json.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_file_is_the_same_row(tmp_path: Path, shape: str, name: str):
    path = write(tmp_path / name, SHAPES[shape])
    (row,) = read_rows([path])
    assert row.where == (f"{path}: row 1" if ".json" in name and "jsonl" not in name else f"{path}:1")
    assert row[1:] == ([{"role": "user", "content": "Is 7 prime?"}], "Yes, it is.", "No.")


def test_conversations_of_many_turns_with_a_system_turn(tmp_path: Path):
    prompt = [{"role": "system", "content": "Be brief."}, *turns("1+1?", "2", "2+2?")]
    whole = {"prompt": "1+1?", "chosen": [*prompt, YES], "rejected": [*prompt, NO]}
    apart = {"prompt": prompt, "chosen": [YES], "rejected": [NO]}
    rows = list(read_rows([write(tmp_path / "a.jsonl", whole), write(tmp_path / "b.jsonl", apart, whole)]))
    assert [row.where.rpartition("/")[2] for row in rows] == ["a.jsonl:1", "b.jsonl:1", "b.jsonl:2"]
    assert [row[1:] for row in rows] == [(prompt, "Yes, it is.", "No.")] * 3


def test_blank_lines_are_no_rows_but_are_counted_as_lines(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n" + json.dumps(SHAPES["implicit"]) + "\r\n\n  \n" + json.dumps(SHAPES["explicit"]))
    assert [row.where for row in read_rows([path])] == [f"{path}:2", f"{path}:5"]


def changed(**values: object) -> dict:
    """The implicit row with other values; None takes a key away."""
    row = SHAPES["implicit"] | values
    return {name: value for name, value in row.items() if value is not None}


RAW = {"instruction": "Hi", "source": "flan", "completions": [{"response": "Hello", "annotations": {}}]}
TOOL = {"role": "tool", "content": "7"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RAW, "a raw UltraFeedback record; make pairs of it first: python binarize.py"),
        ([1, 2], "a row must be an object, not [1, 2]"),
        ("text", 'a row must be an object, not "text"'),
        (None, "a row must be an object, not null"),
        ({}, "'chosen' is missing"),
        (changed(chosen=None), "'chosen' is missing; the keys are 'rejected', 'score_chosen', 'score_rejected'"),
        (changed(rejected=None), "'rejected' is missing"),
        ({"instruction": "Hi", "chosen_response": "Hello"}, "'chosen' is missing; the keys are 'instruction', "),
        (changed(chosen="Yes, it is."), 'chosen must be a list of messages, not "Yes, it is."'),
        (changed(rejected=[]), "rejected must be a list of messages, not []"),
        (changed(chosen={"role": "user"}), 'chosen must be a list of messages, not {"role": "user"}'),
        (changed(rejected=[USER, "No."]), 'rejected holds "No."; a message has a role and a content'),
        (changed(rejected=[USER, {"role": "assistant"}]), 'rejected holds {"role": "assistant"}; a message has a role'),
        (changed(chosen=[USER, TOOL]), 'chosen has the role "tool"; known: system, user, assistant'),
        (changed(chosen=[USER, {"role": 7, "content": ""}]), "chosen has the role 7; known: system, user, assistant"),
        (changed(chosen=[USER, {"role": "assistant", "content": 42}]), "chosen content must be a string, not 42"),
        (changed(chosen=[{"role": "user", "content": None}, YES]), "chosen content must be a string, not null"),
        (SHAPES["argilla"] | {"instruction": ["Hi"]}, 'instruction must be a string, not ["Hi"]'),
        (SHAPES["argilla"] | {"rejected_response": None}, "rejected_response must be a string, not null"),
        (changed(rejected=[*turns("Is 8 prime?"), NO]), "chosen and rejected answer different prompts"),
        (changed(rejected=[USER, NO, USER, NO]), "chosen and rejected answer different prompts"),
        (changed(chosen=[USER], rejected=[USER]), "chosen must be a prompt and then an assistant turn, not [{"),
        (changed(chosen=[YES], rejected=[NO]), "chosen must be a prompt and then an assistant turn, not [{"),
        (changed(rejected=[USER, USER]), "rejected must be a prompt and then an assistant turn, not [{"),
        (changed(prompt="Is 8 prime?"), 'prompt is "Is 8 prime?", but no turn before the answers says that'),
        (changed(prompt=YES["content"]), "but no turn before the answers says that"),
        (SHAPES["explicit"] | {"prompt": []}, "prompt must be a list of messages, not []"),
        (SHAPES["explicit"] | {"prompt": [TOOL]}, 'prompt has the role "tool"'),
        (
            changed(chosen=[USER, {"role": "assistant", "content": "\ud83d"}]),
            "chosen content holds '\\ud83d', which is",
        ),
        (SHAPES["argilla"] | {"instruction": "a\udc00"}, "instruction holds 'a\\udc00', which is not text"),
        (changed(chosen=[USER, NO]), 'the chosen and the rejected answer are both "No."; data.drop_bad_pairs=true'),
        (changed(rejected=[USER, {"role": "assistant", "content": ""}]), "the rejected answer is empty; data.drop_bad"),
        (changed(chosen=[USER, {"role": "assistant", "content": " \n"}]), "the chosen answer is empty; data.drop_bad"),
    ],
)
def test_a_bad_row_is_refused_with_its_file_line_and_value(load, tmp_path: Path, row: object, message: str):
    with pytest.raises(ValueError) as caught:
        load(SHAPES["implicit"], row)
    assert str(caught.value).startswith(f"{tmp_path / 'pairs.jsonl'}:2: ")
    assert message in str(caught.value)


GOOD_LINE = json.dumps(SHAPES["implicit"]).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD_LINE + b'{"chosen": [}\n', ":2: not JSON: Expecting value at column 13"),
        ("a.jsonl", GOOD_LINE + GOOD_LINE[:-20], ":2: not JSON: "),
        ("a.jsonl.gz", gzip.compress(GOOD_LINE + b"{'chosen'"), ":2: not JSON: "),
        ("a.json", b"[\n{},\n{]", ":3: not JSON: "),
        ("a.json", GOOD_LINE, ": a .json file must hold an array of rows; one object a line is .jsonl"),
        ("a.json", b"[]", ": no rows in it"),
        ("a.json", b"", ":1: not JSON: "),
        ("a.jsonl", b"", ": no rows in it"),
        ("a.jsonl", b"\n \n", ": no rows in it"),
        ("a.jsonl.gz", gzip.compress(b""), ": no rows in it"),
        ("a.jsonl.gz", GOOD_LINE, ": cannot be read as text: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(GOOD_LINE * 99)[:-9], ": cannot be read as text: Compressed file ended"),
        ("a.jsonl.gz", gzip.compress(GOOD_LINE)[:10] + b"\xff" * 50, ": cannot be read as text: "),  # zlib's own error
        ("a.jsonl", gzip.compress(GOOD_LINE), ": cannot be read as text: "),
        ("a.jsonl", GOOD_LINE + b'{"chosen": "\xe9"}\n', ": cannot be read as text: "),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else None,
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, name: str, content: bytes, message: str):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        list(read_rows([path]))
    assert str(caught.value).startswith(f"{path}{message}")


def test_a_missing_file_and_a_directory_are_refused(tmp_path: Path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(ValueError) as caught:
            list(read_rows([path]))
        assert str(caught.value) == f"{path}: no such file"


def test_bad_pairs_are_left_out_and_counted_where_that_is_asked_for(load):
    empty, equal = changed(chosen=[USER, {"role": "assistant", "content": " "}]), changed(chosen=[USER, NO])
    loaded = load(SHAPES["implicit"], equal, empty, equal, SHAPES["argilla"], drop_bad_pairs=True)
    assert [pair.where.rpartition(":")[2] for pair in loaded] == ["1", "5"]
    assert loaded.counts == Counter(
        {"rows": 5, "pairs": 2, "dropped: answers are equal": 2, "dropped: an answer is empty": 1}
    )
    assert describe_counts(loaded.counts) == (
        "2 pairs of 5 rows (dropped: answers are equal 2, dropped: an answer is empty 1)"
    )
    with pytest.raises(ValueError, match=r"pairs\.jsonl: no pair is left of 2 rows"):
        load(equal, empty, drop_bad_pairs=True)


def test_no_files_are_no_pairs(tokenizer: Tokenizer, template: ChatTemplate):
    """data.test may be empty."""
    settings = {"max_length": 64, "max_prompt_length": 32, "bos": True, "system_prompt": ""}
    assert len(load_pairs([], tokenizer, template, **settings)) == 0


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
    assert whole.counts == Counter({"rows": 4, "pairs": 4})
    loaded = load(*rows, system_prompt=None, max_length=frame + 30, max_prompt_length=frame + 10)
    assert loaded.counts == Counter({"rows": 4, "pairs": 4, "prompts cut": 2, "answers cut (no EOS)": 3})
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
        {"rows": 2, "pairs": 1, "answers cut (no EOS)": 2, "dropped: equal after truncation": 1}
    )


# --- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_pairs", "pairs_per_step"), [(1, 1), (10, 4), (64, 64), (65, 64), (7, 100), (100, 10)])
def test_an_epoch_takes_every_pair_once(num_pairs: int, pairs_per_step: int):
    steps = steps_per_epoch(num_pairs, pairs_per_step)
    orders = []
    for epoch in range(3):
        batches = [batch(num_pairs, pairs_per_step, 42, epoch * steps + k) for k in range(steps)]
        assert [len(b) for b in batches[:-1]] == [pairs_per_step] * (steps - 1)
        assert len(batches[-1]) == num_pairs - (steps - 1) * pairs_per_step > 0
        orders.append(np.concatenate(batches).tolist())
        assert sorted(orders[-1]) == list(range(num_pairs))
    if num_pairs > 5:
        assert orders[0] != orders[1] != orders[2] != orders[0]


# numpy.random.RandomState([42, epoch]).permutation(10), four at a time
GOLDEN = [[5, 0, 6, 4], [2, 7, 3, 1], [8, 9], [3, 1, 2, 9]]


def test_the_order_is_a_function_of_seed_and_epoch_and_frozen():
    assert [batch(10, 4, 42, step).tolist() for step in range(4)] == GOLDEN
    assert batch(10, 4, 42, 1).tolist() == GOLDEN[1]  # no state between calls
    assert batch(10, 4, 43, 0).tolist() != GOLDEN[0]
    assert np.concatenate([batch(10, 5, 42, step) for step in (0, 1)]).tolist() == [*GOLDEN[0], *GOLDEN[1], *GOLDEN[2]]


def test_the_yardsticks_steps():
    assert steps_per_epoch(61_619, 64) == 963
    assert len(batch(61_619, 64, 42, 962)) == 61_619 - 962 * 64


# --- the token cache -----------------------------------------------------------------------------------------------


@pytest.fixture
def cached(tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate):
    """Load with a cache -> the pairs; `cached.made` counts how often they were made from the text."""
    rows = write(tmp_path / "rows.jsonl", row_of("Yes, of course.", "No."), row_of("Why not?", "Because."))

    def cached(*paths: Path, **changes) -> PairSet:
        settings = {"max_length": 64, "max_prompt_length": 32, "bos": True, "system_prompt": ""}
        changed = {"template": template} | changes
        return load_pairs(
            paths or [rows], tokenizer, changed.pop("template"), cache_dir=tmp_path / "tokens", **settings | changed
        )

    cached.made = 0
    make = data._make_pairs

    def counted(*arguments) -> PairSet:
        cached.made += 1
        return make(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "_make_pairs", counted)
        cached.rows = rows
        yield cached


def assert_same_pairs(ours: PairSet, theirs: PairSet) -> None:
    assert ours.counts == theirs.counts
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.where == other.where and all(map(np.array_equal, mine[1:], other[1:]))


def test_the_second_time_pairs_are_mapped_from_the_disk(cached):
    first, second = cached(), cached()
    assert cached.made == 1 and isinstance(second.ids, np.memmap)
    assert_same_pairs(first, second)
    assert_same_pairs(second, cached(max_length=1000))  # short enough for either, but made anew
    assert cached.made == 2


def test_whatever_changes_the_tokens_misses_the_cache(cached, monkeypatch):
    cached()
    changes = [
        {"max_length": 63}, {"max_prompt_length": 31}, {"bos": False}, {"system_prompt": None},
        {"system_prompt": "Be brief."}, {"drop_bad_pairs": True},
        {"system_prompt": None, "template": ChatTemplate(INST_TEMPLATE)},
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        cached(**change)
        assert cached.made == number, change
    text = cached.rows.read_text()
    cached.rows.write_text(text.replace("Yes", "Aye"))
    cached()
    monkeypatch.setattr(data, "TOKENS_VERSION", data.TOKENS_VERSION + 1)
    cached()
    assert cached.made == len(changes) + 3
    monkeypatch.undo()
    cached.rows.write_text(text)
    cached()
    assert cached.made == len(changes) + 3  # what was made stays


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


def test_a_damaged_cache_is_refused_by_name(cached, tmp_path: Path):
    cached()
    (ids,) = (tmp_path / "tokens").rglob("ids.npy")
    ids.write_bytes(ids.read_bytes()[:-8])
    with pytest.raises(ValueError, match="damaged token cache, delete it") as caught:
        cached()
    assert str(caught.value).startswith(str(ids.parent))


def _load_in_another_process(rows: Path, directory: Path, cache: Path, results) -> None:
    made = []
    make = data._make_pairs
    data._make_pairs = lambda *arguments: made.append(1) or make(*arguments)
    settings = {"max_length": 64, "max_prompt_length": 32, "bos": True, "system_prompt": ""}
    pairs = load_pairs([rows], load_tokenizer(directory), load_chat_template(directory), cache_dir=cache, **settings)
    results.put((len(made), len(pairs)))


def test_of_many_processes_one_does_the_work(tmp_path: Path, mistral_tokenizer_dir: Path):
    rows = write(tmp_path / "rows.jsonl", *(row_of(f"Yes {i}", f"No {i}") for i in range(500)))
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (rows, mistral_tokenizer_dir, tmp_path / "tokens", results)
    processes = [context.Process(target=_load_in_another_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(found) == [(0, 500), (0, 500), (1, 500)]


def test_items_are_made_one_ahead_in_order_and_an_error_comes_in_its_place():
    made, used = [], []

    def make(number: int) -> int:
        if number == 4:
            raise ValueError("no fourth")
        made.append(number)
        return number

    items = ahead(map(make, range(6)))
    with pytest.raises(ValueError, match="no fourth"):
        for number in items:
            used.append(number)
            while len(made) < min(number + 2, 4):  # the next is made while this one is in use
                time.sleep(0.001)
            assert len(made) <= number + 2
    assert used == made == [0, 1, 2, 3]
    assert list(ahead([])) == []
    before = threading.active_count()
    first = ahead(iter(range(10**9)))
    assert next(first) == 0
    first.close()  # a run that ends early leaves no thread behind
    assert threading.active_count() == before
