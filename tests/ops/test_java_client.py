"""The JDK's own HttpClient as it comes: its requests offer to go on in HTTP/2, and are answered in HTTP/1.1."""

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest

PROGRAM = Path(__file__).with_name("Completions.java")
SECONDS = 120
ASKED: dict[str, Any] = {"model": "tiny", "prompt": "héllo", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


class Answer(NamedTuple):
    status: str
    lines: list[str]


class Relay:
    """Passes connections on to a server, and keeps what clients send on each of them."""

    def __init__(self, listener: socket.socket, target: str) -> None:
        self.requests: list[bytearray] = []
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._listener = listener
        self._target = (urlsplit(target).hostname, urlsplit(target).port)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.requests.append(bytearray())
                threading.Thread(target=self._serve, args=(client, self.requests[-1]), daemon=True).start()

    def _serve(self, client: socket.socket, sent: bytearray) -> None:
        with client, socket.create_connection(self._target) as server:
            back = threading.Thread(target=self._pass_on, args=(server, client, bytearray()), daemon=True)
            back.start()
            self._pass_on(client, server, sent)
            back.join()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        with suppress(OSError):
            while part := source.recv(65536):
                kept += part
                sink.sendall(part)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def relay(target: str) -> Iterator[Relay]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield Relay(listener, target)
        # Closing alone would not wake the thread that waits for a connection.
        listener.shutdown(socket.SHUT_RDWR)


def java(url: str, *bodies: dict[str, Any]) -> list[Answer]:
    assert shutil.which("javac"), "needs a JDK"
    command = ["java", str(PROGRAM), f"{url}/v1/completions", *map(json.dumps, bodies)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    answers: list[Answer] = []
    # The text may hold other characters that end a line to Python.
    for line in done.stdout.removesuffix("\n").split("\n"):
        kind, _, rest = line.partition(" ")
        if kind == "status":
            answers.append(Answer(rest, []))
        else:
            answers[-1].lines.append(rest)
    return answers


@pytest.fixture(scope="module")
def text(tiny_server: str) -> str:
    """What any other client is told."""
    told: str = httpx.post(f"{tiny_server}/v1/completions", json=ASKED, timeout=60).json()["choices"][0]["text"]
    assert told
    return told


def test_the_java_client_reads_a_completion(tiny_server: str, text: str) -> None:
    with relay(tiny_server) as between:
        (answer,) = java(between.url, ASKED)
    head, _, body = between.requests[0].partition(b"\r\n\r\n")
    assert b"Upgrade: h2c" in head and json.loads(body) == ASKED
    assert answer.status == "200 HTTP_1_1"
    assert json.loads("".join(answer.lines))["choices"][0]["text"] == text


def test_the_java_client_reads_a_stream(tiny_server: str, text: str) -> None:
    (answer,) = java(tiny_server, ASKED | {"stream": True, "stream_options": {"include_usage": True}})
    assert answer.status == "200 HTTP_1_1"
    events = [line.removeprefix("data: ") for line in answer.lines if line]
    assert events.pop() == "[DONE]"
    *chunks, last = map(json.loads, events)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == ASKED["max_tokens"]


def test_requests_of_the_java_client_share_a_connection(tiny_server: str, text: str) -> None:
    with relay(tiny_server) as between:
        first, streamed, third = java(between.url, ASKED, ASKED | {"stream": True}, ASKED)
    assert len(between.requests) == 1
    assert between.requests[0].count(b"Upgrade: h2c") == 3
    assert [answer.status for answer in (first, streamed, third)] == ["200 HTTP_1_1"] * 3
    assert streamed.lines[-2:] == ["data: [DONE]", ""]
    for answer in (first, third):
        assert json.loads("".join(answer.lines))["choices"][0]["text"] == text


def test_the_java_client_reads_an_error(tiny_server: str) -> None:
    (answer,) = java(tiny_server, ASKED | {"max_tokens": -1})
    assert answer.status == "400 HTTP_1_1"
    assert json.loads("".join(answer.lines))["error"]["param"] == "max_tokens"
