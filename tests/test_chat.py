"""chat.py against transformers' apply_chat_template, which every downstream tool uses to ask the trained model."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from notus.chat import ZEPHYR_TEMPLATE, ChatTemplate, load_chat_template, read_tokenizer_config, with_system_turn

# Mistral-7B-Instruct's: writes BOS itself, and refuses turns out of order.
INST_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# Everything else that Hugging Face lets a template use.
KITCHEN_SINK_TEMPLATE = """{%- if tools is not none or documents is not none %}{{ raise_exception('') }}{% endif %}
{%- set ns = namespace(users=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- set ns.users = ns.users + 1 %}
    {{- ns.users ~ ' ' ~ message | tojson }} {{ message | tojson(indent=2) }}
    {% generation %}
    {{ message.content | trim }}{{ eos_token }}
    {% endgeneration %}
    {%- if ns.users == 3 %}{% break %}{% endif %}
{%- endfor %}
{{ dict(a=1)['a'] }} {{ strftime_now('%Y') | length }}
"""


def turns(*contents: str) -> list[dict]:
    """A conversation of alternating turns, opened by the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


CONVERSATIONS = [
    turns("Hi"),
    turns("Hi", "Hello!"),
    turns("What is 2+2?", "4", "And 3+3?", "6"),
    turns("你好，世界 🙂", "e\u0301 \u200b ﬁ ▁ \ufeff", "مرحبا"),
    turns("  two  spaces \n\n\ttab\r\n", "\n\n  indented\n\n", ""),
    turns("<s> literal </s> tokens", "{{ 7 * 7 }} {% raw %} <b>&amp; 'quotes'</b>"),
]
WITH_SYSTEM = [with_system_turn(messages, prompt) for messages in CONVERSATIONS for prompt in ("", "Be brief.\n")]


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize(
    ("source", "conversations"),
    [
        (ZEPHYR_TEMPLATE, CONVERSATIONS + WITH_SYSTEM),
        (INST_TEMPLATE, CONVERSATIONS),
        (KITCHEN_SINK_TEMPLATE, CONVERSATIONS + WITH_SYSTEM),
    ],
    ids=["zephyr", "inst", "kitchen sink"],
)
def test_renders_as_transformers_does(source: str, conversations: list, add_generation_prompt: bool) -> None:
    oracle = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>")
    template = ChatTemplate(source, bos_token="<s>", eos_token="</s>")
    for messages in conversations:
        expected = oracle.apply_chat_template(
            messages, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert template.render(messages, add_generation_prompt) == expected.removeprefix("<s>")


def test_zephyr_golden_text() -> None:
    template = ChatTemplate(ZEPHYR_TEMPLATE)
    prompt = with_system_turn(turns("Hi"), "")
    asked = "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert template.render(prompt, add_generation_prompt=True) == asked
    answered = [*prompt, {"role": "assistant", "content": "Hello!"}]
    assert template.render(answered) == asked + "Hello!</s>\n"


def test_only_one_leading_bos_is_dropped() -> None:
    assert ChatTemplate(INST_TEMPLATE).render(turns("<s>")) == "[INST] <s> [/INST]"
    assert ChatTemplate("{{ bos_token + bos_token + 'x' }}").render([]) == "<s>x"


def test_with_system_turn() -> None:
    messages = turns("Hi")
    opened = [{"role": "system", "content": ""}, *messages]
    assert with_system_turn(messages, "") == opened
    assert with_system_turn(messages, None) == messages == turns("Hi")
    assert with_system_turn(opened, "ignored") == opened


def write(directory: Path, name: str, value: object) -> None:
    text = value if isinstance(value, str) else json.dumps(value)
    (directory / name).write_text(text, encoding="utf-8")


def test_where_the_template_is_looked_for(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path).source == ZEPHYR_TEMPLATE
    write(tmp_path, "tokenizer_config.json", {"chat_template": None})
    assert load_chat_template(tmp_path).source == ZEPHYR_TEMPLATE
    write(tmp_path, "tokenizer_config.json", {"chat_template": "in config"})
    assert load_chat_template(tmp_path).source == "in config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default of two"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert load_chat_template(tmp_path).source == "default of two"
    write(tmp_path, "chat_template.jinja", "in its own file")
    assert load_chat_template(tmp_path).source == "in its own file"


def test_where_the_special_tokens_are_looked_for(tmp_path: Path) -> None:
    template = load_chat_template(tmp_path)
    assert (template.bos_token, template.eos_token) == ("<s>", "</s>")
    assert read_tokenizer_config(tmp_path) == {}
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<map>", "eos_token": {"content": "</map>"}})
    template = load_chat_template(tmp_path)
    assert (template.bos_token, template.eos_token) == ("<map>", "</map>")
    write(tmp_path, "tokenizer_config.json", {"bos_token": {"content": "<cfg>"}, "eos_token": None})
    template = load_chat_template(tmp_path)
    assert (template.bos_token, template.eos_token) == ("<cfg>", "</map>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"chat_template": ', "not JSON"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": ""}]}, "named 'default'"),
        ("tokenizer_config.json", {"chat_template": 7}, "neither a string"),
        ("tokenizer_config.json", {"chat_template": "one\n{% if %}"}, "line 2"),
        ("special_tokens_map.json", "{", "not JSON"),
        ("chat_template.jinja", "{% for m in messages %}", "line 1"),
        ("chat_template.jinja", "{% nonsense %}", "nonsense"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: object, message: str) -> None:
    write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_chat_template(tmp_path)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (INST_TEMPLATE, turns("Hi", "Hello!")[1:]),  # the template's own complaint
        (ZEPHYR_TEMPLATE, [{"role": "user"}]),  # no content
        (ZEPHYR_TEMPLATE, [{"role": "user", "content": None}]),
        ("{{ ''.__class__.__mro__ }}", turns("Hi")),  # out of the sandbox
        ("{{ messages.append(1) }}", turns("Hi")),  # writes to its input
    ],
)
def test_a_failing_render_names_the_file(tmp_path: Path, source: str, messages: list) -> None:
    write(tmp_path, "chat_template.jinja", source)
    template = load_chat_template(tmp_path)
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template rejects \["):
        template.render(messages)
