"""chat.py against transformers' apply_chat_template, which every downstream tool uses to ask the trained model."""

import json
import re
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from notus import chat
from notus.chat import (
    ZEPHYR_TEMPLATE,
    ChatTemplate,
    check_template,
    load_chat_template,
    read_tokenizer_config,
    with_system_turn,
)

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
{%- set x = 1 %}{% generation %}{% set x = 2 %}{% endgeneration %}{{ x }}
"""
CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2's and SmolLM2's: a system prompt of their own where the conversation has none.
OWN_SYSTEM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}" + CHATML_TEMPLATE
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
# Llama 3.2's: today's date in a system turn that is always there.
DATED_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ 'system\nToday: ' + strftime_now('%d %b %Y') + '\n\n' + system + eos_token }}"
    "{% for message in messages %}{{ message['role'] + '\n' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


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
        assert template.render(messages, add_generation_prompt) == expected


def test_zephyr_golden_text() -> None:
    template = ChatTemplate(ZEPHYR_TEMPLATE)
    prompt = with_system_turn(turns("Hi"), "")
    asked = "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    assert template.render(prompt, add_generation_prompt=True) == asked
    answered = [*prompt, {"role": "assistant", "content": "Hello!"}]
    assert template.render(answered) == asked + "Hello!</s>\n"


def test_the_text_is_what_the_template_writes() -> None:
    assert ChatTemplate(INST_TEMPLATE).render(turns("<s>")) == "<s>[INST] <s> [/INST]"
    chatml = ChatTemplate(CHATML_TEMPLATE, bos_token="<|im_start|>", eos_token="<|im_end|>")
    assert chatml.render(turns("Hi")) == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_tokenizer_without_bos() -> None:
    for source in ("[{{ bos_token }}]", "[{% if bos_token is defined %}{{ bos_token }}{% endif %}]"):
        assert ChatTemplate(source, bos_token=None).render([]) == "[]"


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
    template = load_chat_template(tmp_path)
    assert (template.source, template.is_default, template.warnings) == (ZEPHYR_TEMPLATE, True, [])
    assert template.origin == f"{tmp_path} (no chat template there, Zephyr's is used)"
    write(tmp_path, "tokenizer_config.json", {"chat_template": None})
    assert load_chat_template(tmp_path).is_default
    write(tmp_path, "tokenizer_config.json", {"chat_template": "in config"})
    template = load_chat_template(tmp_path)
    assert (template.source, template.is_default, template.warnings) == ("in config", False, [])
    assert template.origin == str(tmp_path / "tokenizer_config.json")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default of two"}]
    write(tmp_path, "tokenizer_config.json", {"chat_template": named})
    assert load_chat_template(tmp_path).source == "default of two"
    write(tmp_path, "chat_template.json", {"chat_template": "of a processor"})
    template = load_chat_template(tmp_path)
    assert (template.source, template.origin) == ("of a processor", str(tmp_path / "chat_template.json"))
    write(tmp_path, "chat_template.jinja", "in its own file")
    template = load_chat_template(tmp_path)
    assert (template.source, template.origin) == ("in its own file", str(tmp_path / "chat_template.jinja"))


def test_templates_that_disagree_are_reported(tmp_path: Path) -> None:
    write(tmp_path, "chat_template.jinja", ZEPHYR_TEMPLATE)
    write(tmp_path, "tokenizer_config.json", {"chat_template": ZEPHYR_TEMPLATE})
    assert load_chat_template(tmp_path).warnings == []
    write(tmp_path, "tokenizer_config.json", {"chat_template": [{"name": "tool_use", "template": "tools"}]})
    assert load_chat_template(tmp_path).warnings == []  # it has no default
    write(tmp_path, "tokenizer_config.json", {"chat_template": ZEPHYR_TEMPLATE + " "})
    template = load_chat_template(tmp_path)
    assert template.source == ZEPHYR_TEMPLATE
    expected = "tokenizer_config.json hold different chat templates; chat_template.jinja's is used."
    assert [warning[-len(expected) :] for warning in check_template(template, "", bos=True)] == [expected]


def test_where_the_special_tokens_are_looked_for(tmp_path: Path) -> None:
    def tokens() -> tuple[str | None, str]:
        template = load_chat_template(tmp_path)
        return template.bos_token, template.eos_token

    assert tokens() == ("<s>", "</s>")
    assert read_tokenizer_config(tmp_path) == {}
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<map>", "eos_token": {"content": "</map>"}})
    assert tokens() == ("<map>", "</map>")
    # As in transformers: the map counts more, unless the config has an added_tokens_decoder.
    token = {"__type": "AddedToken", "content": "<cfg>"}
    write(tmp_path, "tokenizer_config.json", {"bos_token": token, "eos_token": None})
    assert tokens() == ("<map>", "</map>")
    write(tmp_path, "tokenizer_config.json", {"bos_token": token, "added_tokens_decoder": {}})
    assert tokens() == ("<cfg>", "</map>")
    write(tmp_path, "tokenizer_config.json", {"bos_token": None, "added_tokens_decoder": {}})
    assert tokens() == (None, "</map>")


NOT_A_TEMPLATE = "chat_template is .*; it must be a string, or a list of objects that have a name and a template"
NOT_A_TOKEN = "is .*; it must be a string, or an object whose content is a string"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", '{"chat_template": ', "not JSON"),
        ("tokenizer_config.json", "[]", "JSON object"),
        ("tokenizer_config.json", {"chat_template": [{"name": "rag", "template": ""}]}, "without .* named 'default'"),
        ("tokenizer_config.json", {"chat_template": 7}, NOT_A_TEMPLATE),
        ("tokenizer_config.json", {"chat_template": ["a"]}, NOT_A_TEMPLATE),
        ("tokenizer_config.json", {"chat_template": [{"template": "x"}]}, NOT_A_TEMPLATE),
        ("tokenizer_config.json", {"chat_template": [{"name": ["x"], "template": "x"}]}, NOT_A_TEMPLATE),
        ("tokenizer_config.json", {"chat_template": "\ud800"}, "holds '.ud800', half of a surrogate pair"),
        ("chat_template.json", {"chat_template": {"a": 1}}, NOT_A_TEMPLATE),
        ("tokenizer_config.json", {"eos_token": [1]}, NOT_A_TOKEN),
        ("tokenizer_config.json", {"bos_token": {"content": ["x"]}}, NOT_A_TOKEN),
        ("tokenizer_config.json", {"bos_token": "\ud800"}, "holds '.ud800', half of a surrogate pair"),
        ("special_tokens_map.json", {"bos_token": {"content": "<s>", "lstrip": 1}}, "its flags must be true or false"),
        ("tokenizer_config.json", {"pad_token": {"content": "<s>"}}, "which transformers cannot load without .*__type"),
        ("tokenizer_config.json", {"tokenizer_class": 0}, "tokenizer_class is 0, which transformers cannot load"),
        ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length is 'x', which transformers cannot"),
        ("tokenizer_config.json", {"padding_side": "x"}, "padding_side is 'x', which transformers cannot load"),
        ("special_tokens_map.json", {"eos_token": 2}, NOT_A_TOKEN),
        ("tokenizer_config.json", {"chat_template": "one\n{% if %}"}, "line 2"),
        ("special_tokens_map.json", "{", "not JSON"),
        ("chat_template.jinja", "{% for m in messages %}", "line 1"),
        ("chat_template.jinja", "{% nonsense %}", "nonsense"),
        ("chat_template.jinja", "{% for a in b %}" * 30 + "{% endfor %}" * 30, "cannot be compiled: too many"),
        ("chat_template.jinja", "{{" + "(" * 9999, "cannot be compiled: maximum recursion depth"),
        ("chat_template.jinja", "x" * 2**20 + "x", "has 1,048,577 bytes; such a file has at most 1,048,576"),
        ("chat_template.jinja", "{{ 1 }}".encode("utf-16"), "looks like UTF-16 text; save it as UTF-8"),
        ("chat_template.jinja", "{{ 1 }}".encode("utf-16-le"), "looks like UTF-16 text; save it as UTF-8"),
        ("chat_template.jinja", b"\xe4", "not UTF-8 text: "),
        ("chat_template.jinja", None, "not a regular file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: object, message: str) -> None:
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is None:
        (tmp_path / name).mkdir()
    else:
        write(tmp_path, name, content)
    with pytest.raises(ValueError, match=message) as error:
        load_chat_template(tmp_path)
    assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (INST_TEMPLATE, turns("Hi", "Hello!")[1:]),  # the template's own complaint
        (ZEPHYR_TEMPLATE, [{"role": "user"}]),  # no content
        (ZEPHYR_TEMPLATE, [{"role": "user", "content": None}]),
        ("{{ ''.__class__.__mro__ }}", turns("Hi")),  # out of the sandbox
        ("{{ messages.append(1) }}", turns("Hi")),  # writes to its input
        ("{{ [1, 2] | random }}", turns("Hi")),  # another text tomorrow
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", turns("Hi")),
    ],
)
def test_a_failing_render_names_the_file(tmp_path: Path, source: str, messages: list) -> None:
    write(tmp_path, "chat_template.jinja", source)
    template = load_chat_template(tmp_path)
    with pytest.raises(ValueError, match=r"chat_template\.jinja: the chat template rejects \[\{'role': .*: \S"):
        template.render(messages)


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("huge", ["10**(10**9)", "2**20000 * 2**20000", "(2**9000) * (2**9000)"])
def test_no_template_computes_with_huge_integers(huge: str) -> None:
    """No signal would stop that: it is one call into C."""
    template = ChatTemplate(f"{{{{ 2**9 * 3 }}}}{{% if 0 %}}{{{{ {huge} }}}}{{% endif %}}")
    assert template.render(turns("Hi")) == "1536"
    with pytest.raises(ValueError, match=r"the result of \*+ has some [\d,]+ bits"):
        ChatTemplate(f"{{{{ {huge} }}}}").render(turns("Hi"))


def test_a_template_that_never_ends_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 1.0)
    template = ChatTemplate(ENDLESS, origin="FILE")
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"^FILE: .* rejects \[.*Hi.*\]: it ran for more than 1 s and was stopped$"):
        template.render(turns("Hi"))
    assert time.monotonic() - started < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_template_that_writes_too_much_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_CHARACTERS", 1000)
    assert len(ChatTemplate("{{ 'x' * 1000 }}").render([])) == 1000
    with pytest.raises(ValueError, match=r"FILE: .*it writes more than 1,000 characters"):
        ChatTemplate("{% for a in range(99999) %}xy{% endfor %}", origin="FILE").render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10**11 }}",  # a constant, which is computed while the template is compiled
        "{{ messages[0]['content'] * 10**11 }}",
        "{% set ns = namespace(s='x') %}{% for i in range(50) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ],
)
def test_a_template_that_takes_too_much_memory_is_stopped(source: str) -> None:
    limits, before = resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"^FILE: the chat template (rejects|cannot be compiled)"):
        chat.check_template(ChatTemplate("{{ messages[0]['content'] }}" + source, origin="FILE"), None, False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_off_the_main_thread_a_template_is_stopped_when_it_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 1.0)
    template = ChatTemplate(ENDLESS.replace("{% endfor %}", "{{ '' }}{% endfor %}"))
    caught = []

    def work() -> None:
        try:
            template.render([])
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(30)
    assert len(caught) == 1
    assert "it ran for more than 1 s" in caught[0]


def test_other_users_of_the_alarm_keep_it() -> None:
    rung: list[float] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 60, 7)
        ChatTemplate(ZEPHYR_TEMPLATE).render(turns("Hi"))
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 50 < left <= 60
        assert interval == 7
        signal.setitimer(signal.ITIMER_REAL, 0.05)  # expires inside the rendering, so it rings right after
        ChatTemplate("{% for a in range(1000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}").render([])
        ended = time.monotonic()
        while not rung and time.monotonic() < ended + 5:
            time.sleep(0.01)
        assert len(rung) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_handler_that_could_not_be_put_back_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "getsignal", lambda _: None)  # one that was installed from C
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("the handler is replaced"))
    assert ChatTemplate("{{ 7 }}").render([]) == "7"


def test_the_date_is_always_the_same() -> None:
    assert ChatTemplate("{{ strftime_now('%d %b %Y') }}").render([]) == "26 Jul 2024"


def test_identity() -> None:
    def identity(source: str = "x", bos: str | None = "<s>", eos: str = "</s>", origin: str = "FILE") -> dict:
        return ChatTemplate(source, bos, eos, origin).identity

    assert identity() == identity(origin="OTHER")
    others = [identity("y"), identity(bos=None), identity(bos="<b>"), identity(eos="<e>")]
    assert identity() not in others
    json.dumps(others)


# --- check_template --------------------------------------------------------------------------------------------------


def test_good_templates_have_no_warning() -> None:
    for bos in (False, True):
        assert check_template(ChatTemplate(ZEPHYR_TEMPLATE), "", bos) == []
        assert check_template(ChatTemplate(INST_TEMPLATE), None, bos) == []
        chatml = ChatTemplate(CHATML_TEMPLATE, bos_token="<|im_start|>", eos_token="<|im_end|>")
        assert check_template(chatml, "", bos) == check_template(chatml, "Be brief.", bos) == []
        own = ChatTemplate(OWN_SYSTEM_TEMPLATE, bos_token=None, eos_token="<|im_end|>")
        assert check_template(own, None, bos) == check_template(own, "You are a helpful assistant", bos) == []


@pytest.mark.parametrize(
    ("source", "system_prompt", "message"),
    [
        ("{{ bos_token }}", None, r"leaves out what the user says: it writes '<s>' for \[.*marked user text"),
        ("{{ messages[0].content }}", None, "leaves out the answer: it writes 'marked user text' for "),
        (ZEPHYR_TEMPLATE + "{{ lipsum(n=1) }}", None, "writes two different texts for "),
        (INST_TEMPLATE, "", "Conversation roles must alternate.* set data.insert_system=false"),
        (GEMMA_TEMPLATE, "Be brief.", "System role not supported.* set data.insert_system=false"),
        ("{{ nothing.at.all }}", "", "rejects .*'nothing' is undefined$"),  # whatever the system turn
    ],
)
def test_a_template_that_no_model_can_be_trained_with(source: str, system_prompt: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^FILE: the chat template .*{message}"):
        check_template(ChatTemplate(source, origin="FILE"), system_prompt, bos=True)


OWN_SYSTEM = OWN_SYSTEM_TEMPLATE.replace("<|im_end|>", "</s>")
NEWLINE_MORE = ZEPHYR_TEMPLATE.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>\n' }}")


@pytest.mark.parametrize(
    ("source", "system_prompt", "expected"),
    [
        (
            NEWLINE_MORE, "", r"ends the prompt with '.*<\|assistant\|>\\n\\n' at generation, but writes "
            r"'.*<\|assistant\|>\\n' before an answer: the prompt at generation differs from the trained one\.",
        ),
        (
            OWN_SYSTEM, "", "has a system prompt of its own, 'You are a helpful assistant', and "
            r"training inserts '' instead; data\.insert_system=false keeps",
        ),
        (OWN_SYSTEM, "Be brief.", "and training inserts 'Be brief.' instead"),
        (ZEPHYR_TEMPLATE.replace("== 'system'", "== 'none'"), "", r"leaves out system turns, so the one that training"),
        (CHATML_TEMPLATE, "", r"ends an answer with '<\|im_end\|>\\n' and not with EOS '</s>'"),
        ("\n\n" + INST_TEMPLATE, None, "writes BOS '<s>' where a prompt has one already"),
        ("{{ bos_token }}" + INST_TEMPLATE, None, "writes BOS '<s>' where a prompt has one already"),
        (DATED_TEMPLATE, "", "writes the day's date: here it is always 26 July 2024"),
        (ZEPHYR_TEMPLATE + "{{ pad_token }}", "", "names pad_token, empty here, while other tools write the token"),
    ],
)  # fmt: skip
def test_what_a_user_should_know(source: str, system_prompt: str | None, expected: str) -> None:
    template = ChatTemplate(source, origin="FILE")
    (warning,) = check_template(template, system_prompt, bos=True)
    assert re.search(expected, warning), warning
    assert warning.startswith("FILE: the chat template ")
    assert ("BOS" in expected) == (check_template(template, system_prompt, bos=False) == [])


def test_a_template_that_insists_on_a_system_turn() -> None:
    insists = "{% if messages[0].role != 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    assert check_template(ChatTemplate(insists + ZEPHYR_TEMPLATE), "", bos=True) == []
    with pytest.raises(ValueError, match="no system turn"):
        check_template(ChatTemplate(insists + ZEPHYR_TEMPLATE), None, bos=True)
