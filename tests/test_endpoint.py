"""The client against a real HTTP server that answers, fails, stalls, and talks nonsense."""

import json
import threading
import time

import pytest
from chat_server import completion, echo, reply

from notus import endpoint
from notus.answers import Answer, Request, answer_all
from notus.endpoint import Server, parse_reply, question_seed


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSES", (0.01, 0.02))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def requests(count: int, **settings) -> list[Request]:
    settings = {"max_new_tokens": 32} | settings
    return [Request(f"q{i}", [{"role": "user", "content": f"number {i}"}], **settings) for i in range(count)]


def test_the_protocol(serve):
    fake = serve()
    asked = requests(2, max_new_tokens=50, temperature=0.7, top_p=0.9, seed=3)
    assert dict(Server(fake.url + "/", "some/model").ask(asked)) == {
        0: Answer("You said number 0", False),
        1: Answer("You said number 1", False),
    }
    body = min(fake.bodies, key=lambda body: body["messages"][0]["content"])
    assert body == {
        "model": "some/model", "messages": [{"role": "user", "content": "number 0"}], "max_tokens": 50,
        "temperature": 0.7, "top_p": 0.9, "seed": question_seed(asked[0]),
    }  # fmt: skip
    assert fake.paths == ["/v1/chat/completions"] * 2
    assert all(
        headers["Content-Type"] == "application/json" and "Authorization" not in headers for headers in fake.headers
    )


def test_a_key_a_system_turn_and_bos_are_sent_where_they_are_wanted(serve, monkeypatch):
    fake = serve()
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    list(Server(fake.url, "m", system_prompt="", bos=True).ask(requests(1)))
    assert fake.headers[0]["Authorization"] == "Bearer secret"
    assert fake.bodies[0]["messages"][0] == {"role": "system", "content": ""}
    assert fake.bodies[0]["add_special_tokens"] is True


def test_requests_run_at_once_up_to_the_limit(serve):
    for limit in (1, 4):
        together, lock, busy, most = threading.Barrier(limit, timeout=30), threading.Lock(), [0], [0]

        def behave(handler, body, number, together=together, lock=lock, busy=busy, most=most):
            with lock:
                busy[0] += 1
                most[0] = max(most[0], busy[0])
            together.wait()  # as many as the limit come before one is answered
            with lock:
                busy[0] -= 1
            echo(handler, body, number)

        assert len(dict(Server(serve(behave).url, "m", concurrency=limit).ask(requests(12)))) == 12
        assert most == [limit]


def test_seeds_differ_by_question_and_by_run():
    first, second = requests(2)
    seeds = [question_seed(first), question_seed(second), question_seed(first._replace(seed=1))]
    assert len(set(seeds)) == 3 and question_seed(first) == seeds[0]
    assert all(0 <= seed < 2**31 for seed in seeds)


def truncated(handler, *_):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')


def drop(handler, *_):
    handler.close_connection = True


def not_http(handler, *_):
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")


FAILURES = {
    "500": (lambda handler, *_: reply(handler, b"Internal  error", 500), "HTTP 500 Internal Server Error: Internal e"),
    "429": (lambda handler, *_: reply(handler, b"slow down", 429), "HTTP 429 Too Many Requests: slow down"),
    "nothing": (lambda handler, *_: reply(handler, b""), "not JSON"),
    "HTML": (lambda handler, *_: reply(handler, b"<html>"), "not JSON"),
    "not UTF-8": (lambda handler, *_: reply(handler, b'{"choices": "\xff"}'), "not JSON that can be read"),
    "another object": (lambda handler, *_: reply(handler, {"object": 1}), "not a chat completion: {'object': 1}"),
    "an array": (lambda handler, *_: reply(handler, []), "not a chat completion: []"),
    "no choices": (lambda handler, *_: reply(handler, {"choices": []}), "not a chat completion"),
    "no message": (lambda handler, *_: reply(handler, {"choices": [{"text": "a"}]}), "not a chat completion"),
    "parts": (lambda handler, *_: reply(handler, completion(["a"])), "not a chat completion"),
    "truncated": (truncated, "not JSON"),
    "dropped": (drop, "closed connection"),
    "not HTTP": (not_http, "SSH-2.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILURES)
def test_what_may_pass_is_tried_again(serve, name):
    fail, _ = FAILURES[name]
    fake = serve(lambda handler, body, number: (fail if number < 2 else echo)(handler, body, number))
    assert dict(Server(fake.url, "m").ask(requests(1))) == {0: Answer("You said number 0", False)}
    assert len(fake.bodies) == 3


@pytest.mark.parametrize("name", FAILURES)
def test_what_does_not_pass_ends_in_one_sentence(serve, name):
    fail, reason = FAILURES[name]
    fake = serve(fail)
    with pytest.raises(ConnectionError) as caught:
        dict(Server(fake.url, "m").ask(requests(1)))
    message = str(caught.value)
    assert message.startswith(f"{fake.url}/chat/completions: question q0: ") and reason in message
    assert "(tries: 3)" in message and "\n" not in message and len(message) < 600
    assert len(fake.bodies) == 3


@pytest.mark.parametrize("status", [302, 400, 401, 404, 422])
def test_what_cannot_pass_is_tried_once(serve, status):
    elsewhere = serve()

    def refuse(handler, *_):
        handler.send_response(status)
        handler.send_header("Location", elsewhere.url)
        handler.send_header("Content-Length", "12")
        handler.end_headers()
        handler.wfile.write(b"no such name")

    fake = serve(refuse)
    with pytest.raises(ConnectionError, match=rf"HTTP {status} .*: no such name \(tries: 1\)"):
        dict(Server(fake.url, "m").ask(requests(1)))
    assert len(fake.bodies) == 1 and not elsewhere.bodies  # a redirect is not followed: it would carry the key


def test_a_model_that_wants_the_limit_by_its_newer_name(serve):
    def reasoning(handler, body, number):
        if "max_tokens" in body:
            message = "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            return reply(handler, {"error": {"message": message, "param": "max_tokens"}}, 400)
        return echo(handler, body, number)

    fake = serve(reasoning)
    server = Server(fake.url, "m", concurrency=1)
    assert len(dict(server.ask(requests(3, max_new_tokens=50)))) == 3
    assert [body.get("max_tokens", 0) for body in fake.bodies] == [50, 0, 0, 0]  # asked once, and remembered
    assert all(body["max_completion_tokens"] == 50 for body in fake.bodies[1:])


def test_a_server_that_stalls_or_trickles(serve):
    def trickle(handler, *_):
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    for behave in (lambda *_: time.sleep(1), trickle):
        fake, began = serve(behave), time.monotonic()
        with pytest.raises(ConnectionError, match=r"(timed out|no complete reply in 0.1 s).* \(tries: 3\)"):
            dict(Server(fake.url, "m", timeout=0.1).ask(requests(1)))
        assert time.monotonic() - began < 3


def test_nobody_listens(serve):
    fake = serve()
    fake.close()
    with pytest.raises(ConnectionError, match=r"Connection refused.*\(tries: 3\)"):
        dict(Server(fake.url, "m").ask(requests(3)))


def test_an_endless_reply_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "MAX_BYTES", 1 << 18)
    fake = serve(lambda handler, *_: reply(handler, b" " * (1 << 20)))
    with pytest.raises(ConnectionError, match="262,144 bytes"):
        dict(Server(fake.url, "m").ask(requests(1)))


def test_a_failure_keeps_what_was_answered_and_a_rerun_asks_for_the_rest(serve, tmp_path):
    fake = serve(lambda handler, body, number: reply(handler, b"", 400) if number == 5 else echo(handler, body, number))
    path, asked = tmp_path / "answers", requests(8)
    with pytest.raises(ConnectionError, match="question q5: HTTP 400"):
        answer_all(Server(fake.url, "m", concurrency=1), asked, path)
    assert len(path.read_text().splitlines()) == 5 and len(fake.bodies) == 6
    answers = answer_all(Server(fake.url, "m", concurrency=1), asked, path)
    assert [answer.text for answer in answers] == [f"You said number {i}" for i in range(8)]
    assert len(fake.bodies) == 9


def test_requests_under_way_are_kept_when_another_fails(serve):
    together = threading.Barrier(3, timeout=30)

    def behave(handler, body, number):
        together.wait()
        if body["messages"][0]["content"] == "number 0":
            reply(handler, b"", 400)
        else:
            time.sleep(0.2)
            echo(handler, body, number)

    fake, found = serve(behave), []
    with pytest.raises(ConnectionError, match="question q0"):
        for i, _ in Server(fake.url, "m", concurrency=3).ask(requests(20)):
            found.append(i)
    assert sorted(found) == [1, 2] and len(fake.bodies) == 3


def test_replies():
    assert parse_reply(json.dumps(completion("a", "length")).encode()) == Answer("a", True)
    assert parse_reply(json.dumps(completion(None)).encode()) == Answer("", False)
    assert parse_reply(json.dumps(completion("a\ud800b")).encode()) == Answer("a?b", False)  # half a surrogate pair


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc/passwd", ""])
def test_an_address_that_is_none(url):
    with pytest.raises(ValueError, match="begins with http:// or https://"):
        Server(url, "m")
