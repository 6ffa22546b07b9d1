"""Answers from a server that speaks OpenAI's chat completions: vLLM, llama.cpp, `transformers serve`, a company's API.

A request that fails for a reason that may pass (no connection, no reply in time, a busy server, a reply that is not an
answer) is sent again a few times. Then the run ends with a sentence. What was answered until then is kept.
"""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from http.client import HTTPException
from queue import Empty, SimpleQueue
from typing import Any

from notus.answers import Answer, Request
from notus.chat import with_system_turn
from notus.files import parse_json, text_digest

MAX_BYTES = 1 << 24  # of a server's reply
PAUSES = (1.0, 3.0, 9.0, 27.0)  # seconds before another try
WORTH_ANOTHER_TRY = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # HTTP statuses that may pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key along to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Server:
    """POST url/chat/completions, `concurrency` at a time.

    system_prompt: of the system turn to insert; None inserts none. bos: what to send as vLLM's `add_special_tokens`;
    None sends nothing. The environment's OPENAI_API_KEY is sent if there is one. timeout: seconds for a whole reply.
    """

    def __init__(
        self, url: str, model: str, system_prompt: str | None = None, bos: bool | None = None, concurrency: int = 8,
        timeout: float = 600.0,
    ):  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url}: the address of a server begins with http:// or https://, and often ends with /v1")
        self.url, self.model = url.rstrip("/") + "/chat/completions", model
        self.system_prompt, self.bos = system_prompt, bos
        self.concurrency, self.timeout = concurrency, timeout
        self._limit = "max_tokens"  # its name, until the server asks for another
        self._opener = urllib.request.build_opener(_NoRedirect)

    @property
    def identity(self) -> dict[str, Any]:
        """Not the address: the same model may be served elsewhere."""
        return {"model": self.model, "system turn": self.system_prompt, "bos": self.bos}

    def ask(self, requests: Sequence[Request]) -> Iterator[tuple[int, Answer]]:
        """ConnectionError at the first request that fails for good. Those under way are awaited, and no new one is
        sent."""
        todo: SimpleQueue[int] = SimpleQueue()
        done: SimpleQueue[tuple[int, Answer] | Exception | None] = SimpleQueue()
        stop = threading.Event()
        for i in range(len(requests)):
            todo.put(i)

        def work() -> None:
            try:
                while not stop.is_set():
                    i = todo.get_nowait()
                    done.put((i, self._try(requests[i], stop)))
            except Empty:
                pass
            except Exception as error:
                stop.set()
                done.put(error)
            done.put(None)

        failure, running = None, min(self.concurrency, len(requests))
        for _ in range(running):
            threading.Thread(target=work, daemon=True).start()  # a daemon does not hold up Ctrl-C
        try:
            while running:
                if (result := done.get()) is None:
                    running -= 1
                elif isinstance(result, Exception):
                    failure = failure or result
                else:
                    yield result
        finally:
            stop.set()
        if failure:
            raise failure

    def _try(self, request: Request, stop: threading.Event) -> Answer:
        tries = 0
        for pause in (*PAUSES, None):
            tries += 1
            try:
                return self._post(request)
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}: {_beginning(error)}"
                if "'max_completion_tokens' instead" in reason:  # as OpenAI's reasoning models call it
                    self._limit, pause = "max_completion_tokens", 0.0
                elif error.code not in WORTH_ANOTHER_TRY:
                    pause = None
            except (OSError, HTTPException, ValueError) as error:  # no connection, no time left, not an answer
                reason = f"{getattr(error, 'reason', None) or error or type(error).__name__}"
            if pause is None or stop.wait(pause):
                break
        reason = " ".join(reason.split())[:300]
        raise ConnectionError(
            f"{self.url}: question {request.id}: {reason} (tries: {tries}). The answers so far are kept; run the same "
            "command to ask for the rest"
        )

    def _post(self, request: Request) -> Answer:
        body = {
            "model": self.model, "messages": with_system_turn(request.messages, self.system_prompt),
            self._limit: request.max_new_tokens, "temperature": request.temperature, "top_p": request.top_p,
            "seed": question_seed(request),
        }  # fmt: skip
        if self.bos is not None:
            body["add_special_tokens"] = self.bos
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        deadline = time.monotonic() + self.timeout
        post = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        data = b""
        with self._opener.open(post, timeout=self.timeout) as reply:
            while piece := reply.read1(1 << 16):  # a server that sends byte by byte must end in time, too
                data += piece
                if time.monotonic() > deadline or len(data) > MAX_BYTES:
                    raise TimeoutError(f"no complete reply in {self.timeout:g} s and {MAX_BYTES:,} bytes")
        return parse_reply(data)


def question_seed(request: Request) -> int:
    """A seed from 0 to 2^31 - 1, of a run's seed and a question's id."""
    return int(text_digest(f"{request.seed} {request.id}")[:8], 16) >> 1


def parse_reply(data: bytes) -> Answer:
    """The answer in a chat completion. A null content is an empty answer, as from a model that only thought."""
    reply = parse_json(data, "the reply")
    try:
        choice = reply["choices"][0]
        text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (TypeError, KeyError, IndexError, AttributeError):
        text, cut = ..., False
    if not isinstance(text, str | None):
        raise ValueError(f"the reply is not a chat completion: {reply!r:.200}")
    return Answer((text or "").encode(errors="replace").decode(), cut)


def _beginning(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(300).decode(errors="replace")
    except (OSError, HTTPException):
        return ""
