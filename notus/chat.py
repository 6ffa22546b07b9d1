"""Messages -> text, by the chat template that the checkpoint brings.

A chat template is a small Jinja program that a checkpoint ships as text beside its weights. Preferences must be learned
in exactly the frame in which the model was fine-tuned and will be asked, so the template is run, not imitated. For the
Zephyr family the frame is

    <|system|>
    </s>
    <|user|>
    {prompt}</s>
    <|assistant|>
    {answer}</s>

The role markers are ordinary text to the tokenizer; only `</s>` is a special token.

A template is also code from a download. So it runs in a sandbox, within `MAX_SECONDS` and `MAX_BYTES`, and it must
give the same text tomorrow.
"""

import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from notus.files import read_json, read_text, text_digest

MAX_SECONDS = 10.0  # of one rendering
MAX_CHARACTERS = 1 << 24  # of one rendering
MAX_BYTES = 1 << 28  # of memory, while a template is compiled or checked
MAX_FILE_BYTES = 1 << 20  # of chat_template.jinja; the longest in use have about 30 KB

# What `strftime_now` says. Llama 3.2's template writes this date itself where a program offers no `strftime_now`.
TODAY = datetime(2024, 7, 26)

OTHER_TOKENS = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")  # not passed to a template

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant" | "tool", "content": text}

# Byte for byte the `chat_template` of zephyr-7b-sft-full, zephyr-7b-beta and notus-7b-v1.
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}\n"
    "{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n"
    "{% endif %}\n"
    "{% endfor %}"
)


class ChatTemplate:
    """A compiled template and the two special tokens that it may write.

    bos_token: None for a tokenizer without BOS; the template then sees no `bos_token` at all, as in transformers.
    origin: the file that the template came from; every error and warning names it.
    is_default: the checkpoint has no template, so this is Zephyr's.
    warnings: problems with the files that it came from, a sentence each; `check_template` returns them too.
    """

    def __init__(
        self, source: str, bos_token: str | None = "<s>", eos_token: str = "</s>", origin: str = "chat template"
    ):
        self.source, self.bos_token, self.eos_token, self.origin = source, bos_token, eos_token, origin
        self.is_default = False
        self.warnings: list[str] = []
        try:
            with _memory_limit(), _time_limit():  # constant expressions are computed already here
                self._compiled = _ENVIRONMENT.from_string(source)
            self._digest = text_digest(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{origin}: chat template, line {error.lineno}: {error.message}") from error
        except Exception as error:
            raise ValueError(f"{origin}: the chat template cannot be compiled: {_reason(error)}") from error

    @property
    def identity(self) -> dict[str, Any]:
        """Everything of the template that can change a text."""
        return {"template": self._digest, "bos_token": self.bos_token, "eos_token": self.eos_token}

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; `add_generation_prompt` ends it where the assistant's answer begins.

        The text is exactly what the template writes. Some templates write BOS (Mistral's own), some leave it to the
        tokenizer (Zephyr's): `Tokenizer.encode(text, bos=True)` adds it only if the text does not begin with it.

        ValueError if the template refuses the messages, writes more than `MAX_CHARACTERS` or runs for longer than
        `MAX_SECONDS`. Outside the main thread the time is only checked whenever the template writes something, so a
        loop that writes nothing is not stopped there: let `check_template` run in the main thread first.
        """
        variables = {
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            "eos_token": self.eos_token,
            "tools": None,  # templates ask `tools is not none`, and an undefined name is not none
            "documents": None,
        }
        if self.bos_token is not None:
            variables["bos_token"] = self.bos_token
        parts, size, deadline = [], 0, time.monotonic() + MAX_SECONDS
        try:
            with _time_limit():
                for part in self._compiled.generate(variables):
                    parts.append(part)
                    size += len(part)
                    if size > MAX_CHARACTERS:
                        raise OverflowError(f"it writes more than {MAX_CHARACTERS:,} characters")
                    if time.monotonic() > deadline:
                        raise _too_long()
        except Exception as error:  # a template is foreign code: it may raise anything
            raise ValueError(f"{self.origin}: the chat template rejects {messages!r:.300}: {_reason(error)}") from error
        return "".join(parts)


def _too_long() -> TimeoutError:
    return TimeoutError(f"it ran for more than {MAX_SECONDS:g} s and was stopped")


def _reason(error: Exception) -> str:
    return f"{error!s:.500}" or type(error).__name__  # MemoryError says nothing


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError inside the block after `MAX_SECONDS`, by SIGALRM; no limit outside the main thread.

    The handler and the timer of other users of SIGALRM are put back afterwards. A timer of theirs that would have
    expired inside the block expires right after it.
    """

    def strike(*_: Any) -> None:
        raise _too_long()

    # None is a handler that was not installed from Python, which could not be put back.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGALRM) is None:
        yield
        return
    handler = signal.signal(signal.SIGALRM, strike)
    started = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-6), interval)


@contextmanager
def _memory_limit() -> Iterator[None]:
    """Raise MemoryError inside the block, where `'x' * 10**11` would otherwise take the machine's memory. The limit is
    that of the process, on its address space; there is none where Linux does not tell how large that is."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + MAX_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- checks, on a conversation of marked texts -----------------------------------------------------------------------

_SYSTEM, _USER, _ANSWER, _TOOL = (f"marked {part} text" for part in ("system", "user", "answer", "tool"))


@_memory_limit()
def check_template(template: ChatTemplate, system_prompt: str | None, bos: bool) -> list[str]:
    """What a user should know about the template, a sentence each; ValueError if no model can be trained with it.

    system_prompt: the system turn that training inserts, None for none (see `with_system_turn`).
    bos: whether the ids begin with BOS.

    The template is run on a conversation of three known texts, with and without a generation prompt.
    """
    origin = f"{template.origin}: the chat template"
    warnings = list(template.warnings)
    if system_prompt is not None:
        warnings += _check_system_turn(template, system_prompt)
    prompt = with_system_turn([{"role": "user", "content": _USER}], system_prompt)
    answered = [*prompt, {"role": "assistant", "content": _ANSWER}]
    asked, told = template.render(prompt, add_generation_prompt=True), template.render(answered)

    if _USER not in asked:
        raise ValueError(f"{origin} leaves out what the user says: it writes {asked!r:.200} for {prompt}")
    if _ANSWER not in told:
        raise ValueError(f"{origin} leaves out the answer: it writes {told!r:.200} for {answered}")
    if (asked, told) != (template.render(prompt, add_generation_prompt=True), template.render(answered)):
        raise ValueError(f"{origin} writes two different texts for {answered}: training needs the same text every time")

    # What training puts in front of an answer and behind it, against what generation will.
    before, _, after = told.partition(_ANSWER)
    if not before.startswith(asked):
        warnings.append(
            f"{origin} ends the prompt with {asked[-40:]!r} at generation, but writes {before[-40:]!r} before an "
            "answer: the prompt at generation differs from the trained one."
        )
    if after.strip() and template.eos_token not in after:
        warnings.append(
            f"{origin} ends an answer with {after!r:.40} and not with EOS {template.eos_token!r}: training puts EOS "
            "behind it."
        )
    bos_token = template.bos_token
    if bos and bos_token and asked.removeprefix(bos_token).lstrip().startswith(bos_token):
        warnings.append(f"{origin} writes BOS {bos_token!r} where a prompt has one already: {asked[:40]!r}.")
    if named := [name for name in OTHER_TOKENS if name in template.source]:
        warnings.append(
            f"{origin} names {' and '.join(named)}, empty here, while other tools write the token. Put its text there."
        )
    if "strftime_now" in template.source:
        warnings.append(
            f"{origin} writes the day's date: here it is always {TODAY:%d %B %Y}, so that a text stays the same, while "
            "other tools write the real date."
        )
    return warnings


def _check_system_turn(template: ChatTemplate, system_prompt: str) -> list[str]:
    """What becomes of the system turn that training inserts; ValueError if the template rejects it."""
    origin = f"{template.origin}: the chat template"
    user = [{"role": "user", "content": _USER}]
    try:
        plain = template.render(user, add_generation_prompt=True)
    except ValueError:  # some templates insist on a system turn
        plain = None
    try:
        template.render(with_system_turn(user, system_prompt), add_generation_prompt=True)
        text = template.render(with_system_turn(user, _SYSTEM), add_generation_prompt=True)
    except ValueError as error:
        if plain is None:
            raise
        raise ValueError(
            f"{error}. Without the system turn that training inserts it accepts them: set data.insert_system=false"
        ) from error
    if _SYSTEM not in text:
        return [f"{origin} leaves out system turns, so the one that training inserts has no effect."]
    before, _, after = text.partition(_SYSTEM)
    own = (plain or "").removeprefix(before).removesuffix(after)
    if plain == before + own + after and own.strip() and own.strip() != system_prompt.strip():
        return [
            f"{origin} has a system prompt of its own, {own!r:.100}, and training inserts {system_prompt!r:.100} "
            "instead; data.insert_system=false keeps the template's own."
        ]
    return []


def check_tool_turns(template: ChatTemplate, messages: Sequence[Message]) -> None:
    """ValueError if the conversation has turns of a tool and the template leaves them out, as Zephyr's does."""
    marked = [message | {"content": _TOOL} if message["role"] == "tool" else message for message in messages]
    if marked != messages and _TOOL not in template.render(marked):
        raise ValueError(
            f"{template.origin}: the chat template leaves out what tools say. Write it into a user turn, or use a base "
            "whose template has tool turns"
        )


def with_system_turn(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """`messages`, opened by a system turn where they have none.

    Zephyr's fine-tuning and Notus's DPO open with an empty one, so `""` is the faithful value: it writes
    `<|system|>\\n</s>\\n`. None inserts nothing.
    """
    if system_prompt is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


# --- a checkpoint's files --------------------------------------------------------------------------------------------


def load_chat_template(model_dir: str | Path) -> ChatTemplate:
    """The template of a checkpoint: chat_template.jinja, else chat_template.json's (an older form, of processors), else
    tokenizer_config.json's, else Zephyr's. additional_chat_templates/ is not read: it holds templates for other uses,
    such as tools."""
    directory = Path(model_dir)
    config = read_tokenizer_config(directory)
    found: dict[Path, str] = {}
    jinja_file = directory / "chat_template.jinja"
    if os.path.lexists(jinja_file):
        found[jinja_file] = read_text(jinja_file, MAX_FILE_BYTES)
    legacy = read_json(directory / "chat_template.json")
    unusable = None
    for name, value in (("chat_template.json", legacy), ("tokenizer_config.json", config)):
        if value.get("chat_template") is not None:
            source = _default_template(directory / name, value["chat_template"])
            if source is None:
                unusable = directory / name
            else:
                found[directory / name] = source
    if unusable and not found:
        raise ValueError(f"{unusable}: chat_template is a list without a template named 'default'")

    bos, eos = config.get("bos_token", "<s>") or None, config.get("eos_token") or "</s>"
    if not found:
        template = ChatTemplate(ZEPHYR_TEMPLATE, bos, eos, f"{directory} (no chat template there, Zephyr's is used)")
        template.is_default = True
        return template
    (origin, source), *others = found.items()
    template = ChatTemplate(source, bos, eos, str(origin))
    for path, text in others:
        if text != source:
            template.warnings.append(
                f"{origin} and {path.name} hold different chat templates; {origin.name}'s is used."
            )
    return template


def _default_template(path: Path, value: Any) -> str | None:
    """Of a string the string, of a list the template named "default", None where none is."""
    if isinstance(value, str):
        return value
    entries = value if isinstance(value, list) else [None]
    named: dict[str, str] = {}
    for entry in entries:
        match entry:
            case {"name": str(name), "template": str(template)}:
                named[name] = template
            case _:
                raise ValueError(
                    f"{path}: chat_template is {value!r:.80}; it must be a string, or a list of objects that have a "
                    "name and a template"
                )
    return named.get("default")


# Keys of tokenizer_config.json that are not read, but that an export hands on, and what transformers takes there.
UNREAD: dict[str, Callable[[Any], bool]] = {
    "tokenizer_class": lambda name: isinstance(name, str),
    "model_max_length": lambda length: type(length) in (int, float),
    "padding_side": lambda side: side in ("left", "right"),
    "truncation_side": lambda side: side in ("left", "right"),
}


def read_tokenizer_config(model_dir: str | Path) -> dict[str, Any]:
    """tokenizer_config.json, completed from special_tokens_map.json; {} where neither exists.

    `bos_token` and `eos_token` are plain strings; None where a file says that there is none; absent where no file names
    them. As in transformers, special_tokens_map.json counts more than tokenizer_config.json unless the latter has an
    `added_tokens_decoder`.
    """
    directory = Path(model_dir)
    config, token_map = (read_json(directory / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map"))
    for name, values in (("tokenizer_config.json", config), ("special_tokens_map.json", token_map)):
        for key, value in [(key, value) for key, value in values.items() if key.endswith("_token")]:
            text = token_text(directory / name, key, value) if key in ("bos_token", "eos_token") else value
            if isinstance(value, dict) and values is config and value.get("__type") != "AddedToken":
                raise ValueError(
                    f"{directory / name}: {key} is {value!r:.120}, which transformers cannot load without "
                    '"__type": "AddedToken"; write the text of the token alone'
                )
            values[key] = text
    for key, fits in UNREAD.items():
        if config.get(key) is not None and not fits(config[key]):
            where = directory / "tokenizer_config.json"
            raise ValueError(f"{where}: {key} is {config[key]!r:.80}, which transformers cannot load")
    if "added_tokens_decoder" in config:
        return {key: token_map[key] for key in ("bos_token", "eos_token") if key in token_map} | config
    return config | {key: value for key, value in token_map.items() if value is not None}


# An added token's flags: it takes in whitespace on its left or right, it must be a whole word, it is searched for in
# normalized text, it is left out of decoded text.
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


def token_text(path: Path, key: str, value: Any) -> str | None:
    """The text of a token in a JSON file: of a string, or of a serialized AddedToken, {"content": "</s>", ...}."""
    text = value.get("content") if isinstance(value, dict) else value
    if value is not None and not isinstance(text, str):
        raise ValueError(f"{path}: {key} is {value!r:.80}; it must be a string, or an object whose content is a string")
    if isinstance(value, dict) and any(type(value[flag]) is not bool for flag in FLAGS if flag in value):
        raise ValueError(f"{path}: {key} is {value!r:.200}; its flags must be true or false")
    return text


# What a template may rely on, as Hugging Face defines it: the same whitespace rules, the same extra tags, filters and
# functions. The sandbox is immutable because a template is code from a download.


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for SFT loss masks; the text inside is all that matters here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _refuse_random(*_: Any) -> None:
    raise jinja2.TemplateError("the filter `random` gives another text every time")


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own filter escapes HTML


class _Sandbox(ImmutableSandboxedEnvironment):
    """No signal stops a single computation with huge integers, such as 10**(10**9), so they are refused."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > 10_000:
                raise jinja2.TemplateError(f"the result of {operator} has some {bits:,} bits")
        return super().call_binop(context, operator, left, right)


_ENVIRONMENT = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals["raise_exception"] = _raise_exception
_ENVIRONMENT.globals["strftime_now"] = TODAY.strftime  # not the real date: the text would change every day
_ENVIRONMENT.filters["random"] = _refuse_random
