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
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]  # {"role": "system" | "user" | "assistant", "content": text}

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

    `origin` is the file that the template came from; every error names it.
    """

    def __init__(self, source: str, bos_token: str = "<s>", eos_token: str = "</s>", origin: str = "chat template"):
        self.source, self.bos_token, self.eos_token, self.origin = source, bos_token, eos_token, origin
        try:
            self._compiled = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{origin}: chat template, line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """The text of a conversation; `add_generation_prompt` ends it where the assistant's answer begins.

        The text is what the template writes, minus one leading `bos_token`. Some templates write BOS (Mistral's own),
        some leave it to the tokenizer (Zephyr's). Here none does: whoever builds the ids puts BOS first, exactly once.
        """
        try:
            text = self._compiled.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self.bos_token,
                eos_token=self.eos_token,
                tools=None,  # templates ask `tools is not none`, and an undefined name is not none
                documents=None,
            )
        except Exception as error:  # a template is foreign code: it may raise anything
            raise ValueError(f"{self.origin}: the chat template rejects {messages!r:.300}: {error}") from error
        return text.removeprefix(self.bos_token)


def load_chat_template(model_dir: str | Path) -> ChatTemplate:
    """The template of a checkpoint: chat_template.jinja, else tokenizer_config.json's, else Zephyr's."""
    directory = Path(model_dir)
    config = read_tokenizer_config(directory)
    origin = directory / "chat_template.jinja"
    if origin.is_file():
        try:
            source = origin.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{origin}: not UTF-8 text: {error}") from error
    else:
        origin = directory / "tokenizer_config.json"
        source = config.get("chat_template") or ZEPHYR_TEMPLATE
        if isinstance(source, list):  # several templates, each with a name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not isinstance(source, str):
            raise ValueError(f"{origin}: chat_template is neither a string nor a list with one named 'default'")
    tokens = {name: config[name] for name in ("bos_token", "eos_token") if name in config}
    return ChatTemplate(source, **tokens, origin=str(origin))


def with_system_turn(messages: Sequence[Message], system_prompt: str | None) -> list[Message]:
    """`messages`, opened by a system turn where they have none.

    Zephyr's fine-tuning and Notus's DPO open with an empty one, so `""` is the faithful value: it writes
    `<|system|>\\n</s>\\n`. None inserts nothing.
    """
    if system_prompt is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def read_tokenizer_config(model_dir: str | Path) -> dict[str, Any]:
    """tokenizer_config.json, its special tokens completed from special_tokens_map.json; {} where neither exists.

    `bos_token` and `eos_token` are plain strings, or absent where no file names them.
    """
    directory = Path(model_dir)
    config = read_json(directory / "tokenizer_config.json")
    fallback = read_json(directory / "special_tokens_map.json")
    for name in ("bos_token", "eos_token"):
        token = config.pop(name, None) or fallback.get(name)
        if isinstance(token, dict):  # a serialized AddedToken: {"content": "</s>", "lstrip": false, ...}
            token = token.get("content")
        if token:
            config[name] = token
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {value!r:.80}")
    return value


# What a template may rely on, as Hugging Face defines it: the same whitespace rules, the same extra tags, filters and
# functions. The sandbox is immutable because a template is code from a download.


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's part for SFT loss masks; the text inside is all that matters here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)  # Jinja's own filter escapes HTML


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
)
_ENVIRONMENT.filters["tojson"] = _tojson
_ENVIRONMENT.globals["raise_exception"] = _raise_exception
_ENVIRONMENT.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
