"""The client and the terminal, against a real server over a socket."""

import base64
import json
import random
import re
import signal
import socket
import subprocess
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from clients.fastblt_client import (
    UNSTREAMED,
    Answer,
    ApiError,
    AsyncClient,
    Client,
    Completion,
    ConnectionFailed,
    Events,
    FastBltError,
    NoConnection,
)
from server.cli import app
from tests.conftest import COMMAND, ROOT
from tests.serving import TINY_NAMES, free_port, running_server

CHUNK = {"id": "c", "model": "m", "choices": [{"index": 0, "text": "ä\u2028\n", "finish_reason": None}]}


def received(connection: socket.socket) -> bytes:
    """A whole request."""
    data = b""
    while True:
        if not (more := connection.recv(65536)):
            return data
        data += more
        head, ended, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head.lower())
        if ended and len(body) >= int(length[1] if length else 0):
            return data


@contextmanager
def scripted(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers one connection after another with these bytes; the requests it got."""
    seen: list[bytes] = []

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                seen.append(received(connection))
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        thread.join(timeout=10)
        assert not thread.is_alive()


def answer(status: int, body: bytes, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status} X", "connection: close", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*head, "", ""]).encode() + body


def without_times(usage: dict[str, Any] | None) -> dict[str, Any]:
    assert usage
    cost = {name: value for name, value in usage["fastblt"].items() if not name.endswith("_seconds")}
    return usage | {"fastblt": cost}


def test_a_client_stream_adds_up_to_the_completion(tiny_server: str) -> None:
    with Client(tiny_server) as client:
        whole = client.complete("def f(", max_tokens=30, temperature=0, ignore_eos=True)
        events = list(client.stream("def f(", max_tokens=30, temperature=0, ignore_eos=True))
    assert "".join(event.text for event in events) == whole.text
    assert [event.finish_reason for event in events if event.finish_reason] == [whole.finish_reason] == ["length"]
    assert without_times(events[-1].usage) == without_times(whole.usage)


async def test_the_async_client_gets_the_same_responses(tiny_server: str) -> None:
    fields = {"max_tokens": 20, "temperature": 1, "seed": 7, "logprobs": 0}
    with Client(tiny_server) as client:
        models, whole = client.models(), client.complete("x", **fields)
    async with AsyncClient(tiny_server) as client:
        assert await client.models() == models == TINY_NAMES
        assert (await client.complete("x", **fields)).choices == whole.choices
        pieces = [event.choices[0].data async for event in client.stream("x", **fields) if event.choices]
    assert b"".join(pieces) == whole.choices[0].data
    assert whole.choices[0].data.decode(errors="replace") == whole.text


def test_the_client_raises_errors_of_their_types(tiny_server: str) -> None:
    with Client(tiny_server) as client:
        with pytest.raises(ApiError) as caught:
            client.complete("x", model="none")
        assert (caught.value.status, caught.value.code) == (404, "model_not_found")
        with pytest.raises(ApiError) as caught:
            list(client.stream("x", decoder="blt-d", block_size=99))
        assert (caught.value.status, caught.value.param) == (400, "block_size")


def test_the_client_sends_and_returns_bytes(tiny_server: str) -> None:
    data, asked = b"\xff\x00\xe2\x82", {"max_tokens": 6, "temperature": 0, "echo": True, "return_bytes": True}
    with Client(tiny_server) as client:
        one, two = client.complete([data, b"a"], **asked).choices
        pieces = [event.choices[0].data for event in client.stream(data, **asked) if event.choices]
        by_ids = client.complete([1, *(byte + 4 for byte in data)], **asked).choices[0]
    assert one.data == b"".join(pieces) == by_ids.data and one.data.startswith(data) and two.data.startswith(b"a")
    assert one.data.decode(errors="replace") == one.text


ALL = {
    "return_token_ids": True,
    "prompt_logprobs": 2,
    "trace": True,
    "patches": True,
    "return_bytes": True,
    "logprobs": 1,
}


def test_the_client_returns_all_that_a_completion_has(tiny_server: str) -> None:
    asked = {"prompt": "def f(", "max_tokens": 8, "seed": 1, "model": "tiny", **ALL}
    told = httpx.post(f"{tiny_server}/v1/completions", json=asked, timeout=60).json()["choices"][0]
    with Client(tiny_server) as client:
        choice = client.complete(**asked).choices[0]
        stopped = client.complete("def f(", max_tokens=8, seed=1, stop_token_ids=choice.token_ids).choices[0]
        ended = [
            piece.stop_reason
            for event in client.stream("def f(", max_tokens=8, seed=1, stop_token_ids=choice.token_ids)
            for piece in event.choices
        ]
    assert asdict(choice) == {"encoded" if name == "bytes" else name: value for name, value in told.items()}
    assert choice.token_ids and ended == [choice.token_ids[0]] == [stopped.stop_reason]


@pytest.mark.parametrize("name", UNSTREAMED)
async def test_a_stream_refuses_what_it_could_not_continue(name: str) -> None:
    for value in (True, 0):
        with pytest.raises(
            ValueError, match=f"{name}: must be left out of a stream, not {value}; `complete` returns it"
        ):
            next(Client().stream("a", model="m", **{name: value}))
        with pytest.raises(ValueError, match=name):
            await anext(AsyncClient().stream("a", model="m", **{name: value}))


def test_the_client_does_not_guess_bytes_from_text(tiny_server: str) -> None:
    with Client(tiny_server) as client, pytest.raises(ValueError, match="return_bytes=True"):
        _ = client.complete("x", max_tokens=1).choices[0].data


async def test_a_refused_connection_names_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    where, question = f"no connection to http://127.0.0.1:{port}: ", "; is the server running there?"
    with Client(f"http://127.0.0.1:{port}", retries=0) as client, pytest.raises(NoConnection) as refused:
        client.models()
    assert str(refused.value) == f"{where}Connection refused{question}"
    async with AsyncClient(f"http://127.0.0.1:{port}", retries=0) as client:
        with pytest.raises(NoConnection) as refused:
            await client.models()
    assert str(refused.value).startswith(where) and str(refused.value).endswith(question)


ANOTHERS_MODELS = [
    (b'{"data": []}', "the server offers no model"),
    (b'{"models": []}', "the answer is not OpenAI's list of models: {'models': []}"),
    (b'{"data": ["m"]}', "the answer is not OpenAI's list of models: "),
]


@pytest.mark.parametrize(("body", "message"), ANOTHERS_MODELS)
@pytest.mark.parametrize("command", [["client", "--prompt=a"], ["load", "--concurrency=1", "--requests=1"]])
def test_another_kind_of_server_is_one_line(command: list[str], body: bytes, message: str) -> None:
    with scripted(answer(200, body)) as (url, _):
        done = CliRunner().invoke(app, [*command, "--url", url])
    assert done.exit_code == 1 and done.stderr.startswith(f"fastblt: {message}"), done.output


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"model": "m", "choices": []}', "the answer is not OpenAI's completion: {'model': 'm'"),
        (b'{"id": "c", "model": "m", "choices": [1]}', "the answer is not OpenAI's completion: "),
        (b'{"error": "no room"}', "no room"),
    ],
)
def test_what_is_no_completion_is_an_error_of_the_client(body: bytes, message: str) -> None:
    with scripted(answer(200, body), answer(200, b"data: " + body + b"\n\n")) as (url, _), Client(url) as client:
        for ask in (client.complete, lambda *of, **more: list(client.stream(*of, **more))):
            with pytest.raises(FastBltError, match=re.escape(message)):
                ask("x", model="m")


@pytest.mark.parametrize("status", [429, 503])
def test_the_client_retries_after_the_time_that_the_server_names(status: int) -> None:
    busy = answer(status, b'{"error": {"message": "busy"}}', "retry-after: 0")
    with (
        scripted(busy, busy, answer(200, b'{"data": [{"id": "m"}]}')) as (url, seen),
        Client(url, api_key="k") as client,
    ):
        assert client.models() == ["m"]
    assert len(seen) == 3 and all(b"authorization: bearer k" in request.lower() for request in seen)


async def test_the_client_gives_up_after_its_retries() -> None:
    busy = answer(429, b'{"error": {"message": "busy", "code": "queue_full"}}', "retry-after: 0")
    with scripted(busy, busy) as (url, seen):
        async with AsyncClient(url, retries=1) as client:
            with pytest.raises(ApiError, match="busy"):
                await client.models()
    assert len(seen) == 2


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, b"<html>no</html>", "HTTP status 400: <html>no"),
        (504, b"<html>no</html>", "HTTP status 504: <html>no"),
        (500, b'{"error": {"message": "a NaN", "type": "server_error"}}', "a NaN"),
    ],
)
def test_the_client_does_not_retry_permanent_errors(status: int, body: bytes, message: str) -> None:
    with scripted(answer(status, body)) as (url, _), Client(url) as client, pytest.raises(ApiError, match=message):
        client.models()


@pytest.mark.parametrize("status", [500, 502])
def test_the_client_retries_when_a_proxy_has_lost_its_server(status: int) -> None:
    lost = answer(status, b"Internal Server Error")
    with scripted(lost, answer(200, b'{"data": [{"id": "m"}]}')) as (url, _), Client(url) as client:
        assert client.models() == ["m"]
    with scripted(lost) as (url, _), Client(url, retries=0) as client, pytest.raises(ApiError, match="Internal"):
        client.models()


def test_a_stream_that_breaks_off_raises_connection_failed() -> None:
    broken = answer(200, f"data: {json.dumps(CHUNK)}\n\n".encode())
    with scripted(broken) as (url, _), Client(url, retries=0) as client:
        stream = client.stream("x", model="m")
        assert next(stream).text == "ä\u2028\n"
        with pytest.raises(ConnectionFailed, match="broke off"):
            next(stream)


def chunks(texts: Sequence[str], sizes: Sequence[int], name: str) -> list[dict[str, Any]]:
    """The events of an answer with a choice for each text, cut into pieces of these sizes."""
    found: list[dict[str, Any]] = []
    at = [0] * len(texts)
    number = 0
    while any(place < len(text) for place, text in zip(at, texts, strict=True)):
        size = sizes[number % len(sizes)]
        index = number % len(texts)
        number += 1
        piece = texts[index][at[index] : at[index] + size]
        if not piece:
            continue
        at[index] += size
        data = piece.encode()
        names = [chr(byte) for byte in data]
        choice = {"index": index, "text": piece, "bytes": base64.b64encode(data).decode()}
        choice["logprobs"] = {"tokens": names, "token_logprobs": [-1.0] * len(data), "bytes": list(data)}
        choice["finish_reason"] = "length" if at[index] >= len(texts[index]) else None
        found.append({"id": name, "model": "m", "choices": [choice]})
    return [*found, {"id": name, "model": "m", "choices": [], "usage": {"completion_tokens": 1}}]


def sent(events: list[dict[str, Any]], *, done: bool = True) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events) + b"data: [DONE]\n\n" * done


def together(events: Sequence[Completion]) -> dict[int, tuple[str, bytes, list[str], list[str]]]:
    """Text, bytes, tokens and finish reasons of each choice."""
    found: dict[int, tuple[str, bytes, list[str], list[str]]] = defaultdict(lambda: ("", b"", [], []))
    for event in events:
        for choice in event.choices:
            assert choice.logprobs
            text, data, tokens, reasons = found[choice.index]
            reasons = reasons + [choice.finish_reason] if choice.finish_reason else reasons
            found[choice.index] = (text + choice.text, data + choice.data, tokens + choice.logprobs["tokens"], reasons)
    return found


TEXTS = st.lists(st.text("aä€\U0001f600\n", min_size=1, max_size=12), min_size=1, max_size=3)
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(TEXTS, st.lists(st.tuples(SIZES, st.floats(0, 1)), max_size=3), SIZES)
def test_an_answer_over_many_connections_gives_each_piece_once(
    texts: list[str], broken: list[tuple[list[int], float]], sizes: list[int]
) -> None:
    """Each connection cuts the text into other pieces, and breaks at any byte."""
    whole = Answer({"prompt": "x"})
    assert not whole.is_whole
    events: list[Completion] = []
    for number, (other, share) in enumerate(broken):
        whole.request()
        data = sent(chunks(texts, other, f"c{number}")[:-1], done=False)
        events += whole.feed(data[: int(share * (len(data) - 1))])
        with pytest.raises(ConnectionFailed, match="broke off"):
            whole.check_done()
    whole.request()
    events += whole.feed(sent(chunks(texts, sizes, "last")))
    whole.check_done()
    want = {i: (text, text.encode(), [chr(b) for b in text.encode()], ["length"]) for i, text in enumerate(texts)}
    assert together(events) == want
    assert len({event.id for event in events}) == 1 and events[-1].usage


async def test_a_broken_stream_is_asked_for_again_with_the_same_seed() -> None:
    """What was given is not repeated, also if the server is not back at once."""
    first, again = chunks(["abcdef"], [2], "c"), chunks(["abcdef"], [3], "d")
    shutting = {"error": {"message": "draining", "type": "service_unavailable", "code": "draining"}}
    answers = [
        answer(200, sent([*first[:2], shutting])),
        answer(503, b'{"error": {"message": "draining"}}', "retry-after: 0"),
        answer(200, sent(again)),
    ]
    gave_way = {"error": {"message": "the queue is full", "type": "rate_limit_error", "code": "queue_full"}}
    for script in (answers, [answer(200, sent([gave_way])), *answers[1:]]):
        with scripted(*script) as (url, seen), Client(url) as client:
            events = list(client.stream("x", model="m"))
        assert together(events)[0][::3] == ("abcdef", ["length"])
        assert [bool(event.usage) for event in events] == [False] * (len(events) - 1) + [True]
        assert {event.id for event in events} == {"c" if script is answers else "d"}
        seeds = [body_of(request)["seed"] for request in seen]
        assert len(seeds) == 3 and len({*seeds}) == 1
        with scripted(*script) as (url, _):
            async with AsyncClient(url) as client:
                events = [event async for event in client.stream("x", model="m", seed=3)]
        assert together(events)[0][::3] == ("abcdef", ["length"])


def body_of(request: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request.partition(b"\r\n\r\n")[2])
    return found


def test_a_stream_that_has_told_its_usage_is_not_asked_for_again() -> None:
    broken = answer(200, sent(chunks(["abcdef"], [2], "c"), done=False))
    with scripted(broken) as (url, _), Client(url) as client:
        events = list(client.stream("x", model="m"))
    assert together(events)[0][::3] == ("abcdef", ["length"]) and sum(bool(event.usage) for event in events) == 1


async def test_a_whole_stream_does_not_fail_when_its_connection_does() -> None:
    whole = sent(chunks(["abcdef"], [2], "c"), done=False)
    broken = answer(200, whole + b" ").replace(b": %d\r" % (len(whole) + 1), b": %d\r" % (len(whole) + 9))
    with scripted(broken) as (url, _), Client(url, retries=0) as client:
        assert list(client.stream("x", model="m"))[-1].usage
    with scripted(broken) as (url, _):
        async with AsyncClient(url, retries=0) as client:
            assert [event async for event in client.stream("x", model="m")][-1].usage


def test_the_users_random_numbers_are_not_the_clients() -> None:
    random.seed(42)
    before = random.getstate()
    seeds = {Answer({"prompt": "x"}).request()["seed"] for _ in range(50)}
    assert random.getstate() == before and len(seeds) == 50 and max(seeds) > 2**32


def test_equal_prompts_of_a_request_get_no_seed_that_the_user_did_not_give() -> None:
    """From one seed they would get equal texts."""
    bodies = [Answer({"prompt": prompt}).request() for prompt in ("x", [5, 6], ["x"], ["x", "x"], [[5], [5]])]
    assert ["seed" in body for body in bodies] == [True, True, True, False, False]
    assert Answer({"prompt": ["x", "x"], "seed": 3}).request()["seed"] == 3


@pytest.mark.parametrize("first", [b"", sent(chunks(["abcdef"], [2], "c")[:1], done=False)], ids=["waiting", "begun"])
def test_deadlines_of_a_broken_stream_count_from_its_beginning(first: bytes) -> None:
    """But for refusals, which begin nothing."""
    busy = answer(429, b'{"error": {"message": "busy"}}', "retry-after: 0")
    whole = answer(200, sent(chunks(["abcdef"], [2], "c")))
    with scripted(busy, answer(200, first), whole) as (url, seen), Client(url) as client:
        list(client.stream("x", model="m", timeout=100, seed=5))
    bodies = [body_of(request) for request in seen]
    assert [body["timeout"] for body in bodies[:2]] == [100, 100]
    assert 90 < bodies[2]["timeout"] <= 99.5 and bodies[2]["seed"] == 5


def test_a_stream_does_not_wait_for_longer_than_its_deadline() -> None:
    broken = Answer({"prompt": "x", "timeout": 0.2})
    broken.request()
    assert broken.left_of(30.0, ApiError(503, {}, "30")) == 30.0, "refused, so nothing has begun"
    broken.request()
    assert broken.left_of(30.0, ConnectionFailed("gone")) <= 0.2
    assert broken.left_of(30.0, ApiError(503, {}, "30")) <= 0.2
    assert Answer({"prompt": "x"}).left_of(30.0, ConnectionFailed("gone")) == 30.0


@pytest.mark.parametrize("end", [{"finish_reason": "timeout"}, {"finish_reason": "length", "stop_reason": "timeout"}])
def test_a_deadline_within_a_character_does_not_make_it_another_text(end: dict[str, str]) -> None:
    """The second answer ends earlier than the first had come."""
    events = chunks(["ab\ufffd"], [3], "d")
    last = events[0]["choices"][0]
    last |= end | {"bytes": base64.b64encode(b"ab\xc3").decode()}
    last["logprobs"] = {"tokens": ["a", "b", "c"], "bytes": [*b"ab\xc3"]}
    with (
        scripted(answer(200, sent(chunks(["abäöü"], [4], "c")[:1], done=False)), answer(200, sent(events))) as (url, _),
        Client(url) as client,
    ):
        found = list(client.stream("x", model="m"))
    assert [event.text for event in found] == ["abäö", "", ""] and found[1].finish_reason == end["finish_reason"]


def test_a_server_that_falls_silent_is_asked_again() -> None:
    """As one whose machine has lost its power."""
    silent, whole = threading.Event(), answer(200, sent(chunks(["abcdef"], [2], "c")))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            first, _ = listener.accept()
            received(first)
            first.sendall(whole[:-20])
            second, _ = listener.accept()
            with first, second:
                received(second)
                second.sendall(whole)
                silent.wait(10)

        threading.Thread(target=serve, daemon=True).start()
        with Client(f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3) as client:
            events = list(client.stream("x", model="m"))
        silent.set()
    assert together(events)[0][::3] == ("abcdef", ["length"])


@pytest.mark.parametrize(("text", "what"), [("abXdef", "another text"), ("abc", "a shorter text")])
def test_a_server_that_gives_another_text_cannot_continue_a_stream(text: str, what: str) -> None:
    broken = answer(200, sent(chunks(["abcdef"], [4], "c")[:1], done=False))
    with scripted(broken, answer(200, sent(chunks([text], [1], "d")))) as (url, _), Client(url) as client:
        stream = client.stream("x", model="m")
        assert next(stream).text == "abcd"
        with pytest.raises(ConnectionFailed, match=what):
            _ = list(stream)


def test_an_answer_outlives_its_server(tiny: Path, tmp_path: Path) -> None:
    """The HTTP process is killed in the middle of it, and another takes its port."""
    fields = {"max_tokens": 1500, "temperature": 1.0, "seed": 7, "n": 2, "return_bytes": True, "ignore_eos": True}
    flags = ["--port", str(free_port())]
    with (
        running_server(tiny, tmp_path / "first", *flags) as server,
        Client(server.url, retries=30) as client,
        ThreadPoolExecutor() as threads,
    ):
        whole = threads.submit(client.complete, "def f(", **fields)
        stream = client.stream("def f(", **fields)
        events = [next(stream) for _ in range(20)]
        server.process.kill()
        server.process.wait()
        with running_server(tiny, tmp_path / "second", *flags):
            events += stream
            for choice in whole.result().choices:
                pieces = [piece.data for event in events for piece in event.choices if piece.index == choice.index]
                assert b"".join(pieces) == choice.data and len(choice.data) > 1000


def test_an_error_event_in_a_stream_raises_an_error() -> None:
    with pytest.raises(ApiError, match="sorry"):
        list(Events().feed(b'data: {"error": {"message": "sorry"}}\n\n'))


@given(st.lists(st.integers(0, 400)), st.sampled_from([b"\n", b"\r\n"]))
def test_parsed_events_do_not_depend_on_where_bytes_are_cut(cuts: list[int], newline: bytes) -> None:
    event = json.dumps(CHUNK, ensure_ascii=False).encode()
    lines = [
        b": keep-alive",
        b"",
        b"data: " + event,
        b"",
        b"event: x",
        b"data:" + event,
        b"",
        b"data: [DONE]",
        b"",
        b"",
    ]
    data = newline.join(lines)
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    events = Events()
    found = [e.text for a, b in zip(places, places[1:], strict=False) for e in events.feed(data[a:b])]
    assert found == ["ä\u2028\n"] * 2
    events.check_done()


def test_the_terminal_client_prints_text_to_stdout_and_notes_to_stderr(tiny_server: str) -> None:
    with Client(tiny_server) as client:
        text = client.complete("abc", max_tokens=20, temperature=0).text
    command = [*COMMAND, "client", "--url", tiny_server, "--prompt=abc", "--max-tokens=20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode() == text + "\n"
    assert b"bytes/s" in done.stderr


def test_the_terminal_client_fails_with_one_line(tiny_server: str) -> None:
    command = [*COMMAND, "client", "--url", tiny_server, "--prompt=abc", "--model=none"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "'none' does not exist" in done.stderr


def test_ctrl_c_ends_a_stream_and_not_the_terminal_client(tiny_server: str) -> None:
    command = [*COMMAND, "client", "--url", tiny_server, "--max-tokens=4000", "--temperature=1", "--seed=1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def heed_interrupts() -> None:
        # When the tests run in the background of a shell, their child processes ignore interrupts.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=ROOT, bufsize=0, preexec_fn=heed_interrupts, **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"abc\n")
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        notes = b""
        while b"> " not in notes.partition(b"interrupted")[2]:
            byte = process.stderr.read(1)
            assert byte, notes
            notes += byte
        process.stdin.close()
        process.stdout.read()
    assert process.returncode == 0
