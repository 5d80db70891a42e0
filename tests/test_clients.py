"""The client and the terminal, against a real server over a socket."""

import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.fastblt_client import ApiError, AsyncClient, Client, ConnectionFailed, Events
from tests.conftest import COMMAND, ROOT
from tests.serving import TINY_NAMES

CHUNK = {"id": "c", "model": "m", "choices": [{"index": 0, "text": "ä\u2028\n", "finish_reason": None}]}


@contextmanager
def scripted(*answers: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers one connection after another with these bytes; the requests it got."""
    seen: list[bytes] = []

    def serve() -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                seen.append(connection.recv(65536))
                connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
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


def test_the_client_does_not_guess_bytes_from_text(tiny_server: str) -> None:
    with Client(tiny_server) as client, pytest.raises(ValueError, match="return_bytes=True"):
        _ = client.complete("x", max_tokens=1).choices[0].data


def test_a_refused_connection_raises_connection_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with Client(f"http://127.0.0.1:{port}", retries=0) as client, pytest.raises(ConnectionFailed):
        client.models()


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


@pytest.mark.parametrize("status", [400, 500])
def test_the_client_does_not_retry_permanent_errors(status: int) -> None:
    with (
        scripted(answer(status, b"<html>no</html>")) as (url, _),
        Client(url) as client,
        pytest.raises(ApiError, match=f"HTTP status {status}: <html>no"),
    ):
        client.models()


def test_a_stream_that_breaks_off_raises_connection_failed() -> None:
    with scripted(answer(200, f"data: {json.dumps(CHUNK)}\n\n".encode())) as (url, _), Client(url) as client:
        stream = client.stream("x", model="m")
        assert next(stream).text == "ä\u2028\n"
        with pytest.raises(ConnectionFailed, match="broke off"):
            next(stream)


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
