"""What a client may take from the server: bytes of a head, connections, time."""

import asyncio
import gc
import json
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from engine.types import TokenLogprob
from server import body_room
from server.admission import Gate
from server.app import create_app
from server.http import Connections
from server.http.connections import REASONS
from server.settings import ServerSettings
from tests.conftest import COMMAND, ROOT
from tests.raw_http import connected, post
from tests.scripted_server import ScriptedClient, body, listening, until

GET = b"GET /version HTTP/1.1\r\nhost: x\r\n"
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
)


class Served:
    """A server with a scripted engine, and what it counts."""

    make_client = ScriptedClient

    def __init__(self, port: int, client: ScriptedClient, app: FastAPI) -> None:
        self.port = port
        self.client = client
        self.gate: Gate = app.state.gate
        self.connections: Connections = app.state.connections


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[Served]:
    client, chosen = Served.make_client(), ServerSettings(**settings)
    app = create_app(chosen, client)
    async with listening(app, chosen) as port:
        yield Served(port, client, app)
        client.release.set()


WAYS_IN = {
    "plain": b"",
    "after another request": GET + b"\r\n",
    "with an offer of h2c": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n",
}


@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize(
    ("headers", "fits"),
    [
        ([b"x" * 1800], True),
        ([b"x" * 2100], False),
        ([b"x" * 400_000], False),
        ([b"1"] * 12, True),
        ([b"1"] * 21, False),
        ([b"1"] * 30_000, False),
    ],
    ids=["a long one", "one too long", "a huge one", "many", "too many", "far too many"],
)
async def test_header_size_is_bounded_for_every_kind_of_request(way: str, headers: list[bytes], fits: bool) -> None:
    async with serving(max_header_bytes=2048, max_headers=20) as served, connected(served.port) as raw:
        first = WAYS_IN[way] if way == "after another request" else b""
        lines = b"".join(b"a%d: %b\r\n" % (number, value) for number, value in enumerate(headers))
        offer = WAYS_IN[way] if "h2c" in way else b""
        # A server that refuses may close while this is still being sent.
        with suppress(ConnectionError):
            await raw.send(first + GET + offer + lines + b"\r\n")
        answers = await raw.answers(*[b"GET"] * (2 if first else 1))
        assert [answer.status for answer in answers] == [200] * (len(answers) - 1) + [200 if fits else 431]
        if not fits:
            assert answers[-1].code == "headers_too_large" and answers[-1].headers["x-request-id"]
            assert "2048 bytes and 20 headers" in answers[-1].json()["error"]["message"]
            assert await raw.is_closed()


async def test_an_endless_header_is_refused() -> None:
    async with serving(max_header_bytes=4096) as served, connected(served.port) as raw:
        await raw.send(GET + b"a: ")
        with suppress(ConnectionError):
            for _ in range(200):
                await raw.send(b"x" * 65536)
        assert (await raw.answer()).status == 431


async def test_url_and_trailers_count_towards_the_header_limit() -> None:
    async with serving(max_header_bytes=2048) as served:
        async with connected(served.port) as raw:
            await raw.send(b"GET /" + b"x" * 3000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await raw.answer()).status == 431
        async with connected(served.port) as raw:
            await raw.send(CHUNKED + b"2\r\n{}\r\n0\r\n")
            await raw.send(b"".join(b"t%d: %b\r\n" % (i, b"x" * 100) for i in range(30)) + b"\r\n")
            assert (await raw.answer(b"POST")).status == 431


async def test_bytes_that_are_not_http_are_refused_with_the_standard_error_body() -> None:
    wrong = [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x00",
    ]
    async with serving() as served:
        for data in wrong:
            async with connected(served.port) as raw:
                await raw.send(data)
                answer = await raw.answer()
                assert (answer.status, answer.code) == (400, "invalid_http")
                assert answer.headers["connection"] == "close"
                assert await raw.is_closed()
        async with connected(served.port) as raw:
            await raw.send(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n")
            assert (await raw.answer()).status == 405
        async with connected(served.port) as raw:
            await raw.send(CHUNKED + b"no length\r\n")
            assert (await raw.answer(b"POST")).code == "invalid_http"


async def test_a_request_that_another_server_could_read_differently_is_refused() -> None:
    chunked = b"transfer-encoding: chunked\r\n"
    offer = b"connection: upgrade\r\nupgrade: h2c\r\n"
    wrong = {
        b"GET /version\r\n\r\n": "HTTP/1.0 or HTTP/1.1",
        b"GET /version HTTP/2.0\r\nhost: x\r\n\r\n": "HTTP/1.0 or HTTP/1.1",
        GET + chunked + b"content-length: 5\r\n\r\n0\r\n\r\n": "Content-Length",
        GET + chunked + chunked + b"\r\n0\r\n\r\n": "Transfer-Encoding",
        GET + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n": "Transfer-Encoding",
        GET + b"transfer-encoding: gzip\r\n\r\n": "Transfer-Encoding",
        GET + b"host:\r\n" + offer + b"\r\n": "one Host header",
        b"GET /version HTTP/1.0\r\nhost: x\r\nhost: y\r\n\r\n": "one Host header",
        GET + b"a: b\n\r\n": "CR",
    }
    async with serving() as served:
        for data, why in wrong.items():
            async with connected(served.port) as raw:
                await raw.send(data + GET + b"\r\n")
                answer = await raw.answer()
                assert (answer.status, answer.code) == (400, "invalid_http"), data
                assert why in answer.json()["error"]["message"]
                assert await raw.is_closed()


async def test_a_trailer_that_ends_the_connection_does_not_leave_it_open() -> None:
    async with serving() as served, connected(served.port) as raw:
        await raw.send(CHUNKED + b"0\r\nconnection: close\r\n\r\n" + GET + b"\r\n")
        assert (await raw.answer(b"POST")).code == "invalid_json"
        assert await raw.is_closed()


async def test_whitespace_around_a_header_is_not_part_of_it() -> None:
    async with serving() as served, connected(served.port) as raw:
        text = json.dumps(body("x")).encode()
        await raw.send(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"transfer-encoding: \t chunked \r\nexpect:100-continue \r\n\r\n"
        )
        async with asyncio.timeout(5):
            assert await raw.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await raw.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(text), text))
        assert (await raw.answer(b"POST")).status == 200


async def test_an_empty_host_header_survives_an_offer_of_another_protocol() -> None:
    offer = b"connection: upgrade\r\nupgrade: h2c\r\n"
    async with serving() as served, connected(served.port) as raw:
        await raw.send(b"GET /version HTTP/1.1\r\nhost:\r\n" + offer + b"\r\n")
        assert (await raw.answer()).status == 200


async def test_headers_bodies_and_idle_connections_have_timeouts() -> None:
    limits = {"head_timeout": 0.2, "request_timeout": 0.4, "idle_timeout": 0.3}
    async with serving(**limits) as served:

        async def silent() -> None:
            async with connected(served.port) as raw:
                assert await raw.is_closed()

        async def half_a_head() -> None:
            async with connected(served.port) as raw:
                await raw.send(GET)
                answer = await raw.answer()
                assert (answer.status, answer.code) == (408, "request_timeout")
                assert "0.2 s" in answer.json()["error"]["message"]
                assert await raw.is_closed()

        async def head_in_drops() -> None:
            async with connected(served.port) as raw:
                with suppress(ConnectionError):
                    for byte in GET:
                        await raw.send(bytes((byte,)))
                        await asyncio.sleep(0.02)
                assert (await raw.answer()).status == 408

        async def body_in_drops() -> None:
            async with connected(served.port) as raw:
                began = time.monotonic()
                await raw.send(post(b" " * 100)[:-100])
                for _ in range(60):
                    await raw.send(b" ")
                    await asyncio.sleep(0.01)
                answer = await raw.answer(b"POST")
                assert (answer.status, answer.code) == (408, "request_timeout")
                assert 0.3 < time.monotonic() - began < 2
                assert await raw.is_closed()

        async def body_that_is_not_wanted() -> None:
            async with connected(served.port) as raw:
                await raw.send(post(b" " * 100, path="/nowhere")[:-50])
                assert (await raw.answer(b"POST")).status == 404
                assert await raw.is_closed()

        async def idle() -> None:
            async with connected(served.port) as raw:
                for _ in range(2):
                    await raw.send(GET + b"\r\n")
                    assert (await raw.answer()).status == 200
                    await asyncio.sleep(0.2)
                assert await raw.is_closed()

        await asyncio.gather(
            silent(), half_a_head(), head_in_drops(), body_in_drops(), body_that_is_not_wanted(), idle()
        )
        assert served.connections.ended == {"head_timeout": 3, "request_timeout": 2, "idle_timeout": 1}
        await until(lambda: served.connections.count == 0)


async def test_a_request_that_waits_for_the_engine_has_no_timeout() -> None:
    limits = {"head_timeout": 0.1, "request_timeout": 0.1, "idle_timeout": 0.1, "write_timeout": 0.1}
    async with serving(**limits) as served, connected(served.port) as raw:
        await raw.send(post(body("wait")))
        await asyncio.sleep(0.5)
        served.client.release.set()
        assert (await raw.answer(b"POST")).status == 200


@pytest.mark.parametrize("drops", [False, True], ids=["nothing", "a byte now and then"])
async def test_a_stream_to_a_stalled_client_is_aborted(drops: bool) -> None:
    async with serving(write_timeout=0.5) as served:
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(("127.0.0.1", served.port))
        stalled.sendall(post(body("flood", max_tokens=900, stream=True)))
        await until(lambda: served.client.open == 1)
        began = time.monotonic()
        while served.client.open:
            assert time.monotonic() - began < 8
            if drops:
                with suppress(BlockingIOError):
                    stalled.recv(1, socket.MSG_DONTWAIT)
            await asyncio.sleep(0.05)
        assert served.connections.ended == {"write_timeout": 1}
        assert len(served.client.requests) == 1
        stalled.close()


async def test_a_slow_client_receives_the_whole_stream() -> None:
    async with serving(write_timeout=2) as served, connected(served.port, limit=4096) as raw:
        await raw.send(post(body("flood", max_tokens=300, stream=True), "connection: close"))
        read = b""
        while part := await raw.reader.read(16384):
            read += part
            await asyncio.sleep(0.001)
        assert read.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert not served.connections.ended


async def test_the_longest_idle_connection_is_closed_for_a_new_one() -> None:
    async with serving(max_connections=4) as served, AsyncExitStack() as stack:
        busy = await stack.enter_async_context(connected(served.port))
        await busy.send(post(body("wait")))
        await until(lambda: served.client.open == 1)
        idle = [await stack.enter_async_context(connected(served.port)) for _ in range(3)]
        await until(lambda: served.connections.count == 4)
        await idle[0].send(GET + b"\r\n")
        assert (await idle[0].answer()).status == 200
        new = await stack.enter_async_context(connected(served.port))
        await new.send(GET + b"\r\n")
        assert (await new.answer()).status == 200
        # Not the one that has just been used, and not the one that waits for the engine.
        assert await idle[1].is_closed()
        await idle[0].send(GET + b"\r\n")
        assert (await idle[0].answer()).status == 200
        served.client.release.set()
        assert (await busy.answer(b"POST")).status == 200
        assert served.connections.ended == {"displaced": 1}


async def test_a_new_connection_is_refused_when_all_connections_are_busy() -> None:
    settings = {"max_connections": 10, "max_connections_per_address": 2, "retry_after": 7}
    async with serving(**settings) as served, AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(connected(served.port)) for _ in range(2)]
        for raw in busy:
            await raw.send(post(body("wait")))
        await until(lambda: served.client.open == 2)
        async with connected(served.port) as refused:
            answer = await refused.answer()
            assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "too_many_connections", "7")
        assert served.connections.ended == {"refused": 1}
        served.client.release.set()
        for raw in busy:
            assert (await raw.answer(b"POST")).status == 200
        assert (await busy[0].answers()) == []


def test_a_trusted_proxy_is_exempt_from_the_limit_per_address() -> None:
    settings = ServerSettings(
        max_connections=10,
        max_connections_per_address=1,
        trusted_proxies="10.0.0.0/8",  # type: ignore[arg-type]
    )
    connections = Connections(settings)
    slots = [connections.enter(address, lambda: None) for address in ["10.0.0.1"] * 3 + ["9.9.9.9", "::1"]]
    assert all(slots) and connections.count == 5
    # As a socket for both kinds of addresses says it.
    mapped = connections.enter("::ffff:10.0.0.1", lambda: None)
    assert mapped
    mapped.release()
    other = connections.enter("9.9.9.9", lambda: None)
    assert other and slots[3] and slots[3].released and connections.count == 5
    other.work()
    assert connections.enter("9.9.9.9", lambda: None) is None
    for slot in [*slots, other]:
        assert slot
        slot.release()
    assert connections.count == 0
    assert connections.ended == {"displaced": 1, "refused": 1}


async def test_memory_for_bodies_of_all_connections_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body_room, "BODIES_AT_ONCE", 2)
    async with serving(max_body_bytes=4096) as served, AsyncExitStack() as stack:
        slow = [await stack.enter_async_context(connected(served.port)) for _ in range(2)]
        for raw in slow:
            await raw.send(post(b" " * 4096)[:-1])
            await asyncio.sleep(0.05)
        async with connected(served.port) as another:
            await another.send(post(body("x")))
            assert (await another.answer(b"POST")).status == 200
        # The one that has been arriving for longest had to give way.
        refused = await slow[0].answer(b"POST")
        assert (refused.status, refused.code) == (429, "queue_full") and refused.headers["retry-after"] == "1"
        await slow[1].send(b" ")
        assert (await slow[1].answer(b"POST")).code == "invalid_json"


async def test_refusing_a_large_body_leaves_the_connection_usable() -> None:
    async with serving() as served, connected(served.port) as raw:
        await raw.send(post(b" " * 400_000, path="/nowhere") + GET + b"\r\n")
        answers = await raw.answers(b"POST", b"GET")
        assert [answer.status for answer in answers] == [404, 200]


async def test_pipelined_requests_wait_until_the_client_reads_earlier_responses() -> None:
    async with serving() as served:
        requests = GET.replace(b"/version", b"/openapi.json") + b"\r\n"
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", served.port))
            # Those beyond the longest pipeline end the connection.
            with suppress(ConnectionError):
                for _ in range(100):
                    stalled.sendall(requests)
                    await asyncio.sleep(0.005)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as http:
                text = (await http.get("/metrics")).text
                size = len((await http.get("/openapi.json")).content)
        (line,) = [line for line in text.splitlines() if "http_responses_total{" in line and 'status="200"' in line]
        assert 100 * size > 2 << 20
        # What the kernel keeps, and one answer beyond what the server does.
        assert float(line.split()[-1]) * size < 2 * (256 << 10) + (64 << 10) + 4 * size


async def test_a_response_that_the_client_never_reads_does_not_block_shutdown() -> None:
    async with serving(write_timeout=0.3) as served:
        with socket.socket() as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stalled.connect(("127.0.0.1", served.port))
            stalled.sendall(post(body("flood", max_tokens=900)))
            await until(lambda: served.client.open == 0 and bool(served.client.requests))
            await asyncio.sleep(0.1)
            stalled.shutdown(socket.SHUT_WR)
            await until(lambda: served.connections.count == 0)
        assert served.connections.ended == {"write_timeout": 1}


@asynccontextmanager
async def unread(served: Served, request: bytes, address: str = "127.0.0.1") -> AsyncIterator[socket.socket]:
    """A client that reads nothing of a large answer."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.bind((address, 0))
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(client, ("127.0.0.1", served.port))
        await loop.sock_sendall(client, request)
        yield client


async def read_slowly(client: socket.socket) -> int:
    """How many bytes come until the server closes."""
    size = 0
    while part := await asyncio.get_running_loop().sock_recv(client, 1 << 18):
        size += len(part)
        await asyncio.sleep(0)
    return size


FLOOD = post(body("flood", max_tokens=900), "connection: close")
"""Its answer is larger than what the kernel keeps."""


async def test_a_whole_answer_holds_its_place_until_its_last_byte_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(max_requests_per_key=1) as served:
        gate = served.gate
        async with unread(served, FLOOD) as client:
            await until(lambda: served.client.open == 0 and bool(served.client.requests))
            await asyncio.sleep(0.1)
            idle = asyncio.create_task(gate.wait_idle())
            async with connected(served.port) as another:
                await another.send(post(body("x")))
                assert (await another.answer(b"POST")).code == "too_many_requests"
            assert gate.num_requests == 1 and not idle.done()
            assert await read_slowly(client) > 900 * 2048
        await until(idle.done)
        with caplog.at_level("INFO", "fastblt.access"):
            async with unread(served, FLOOD):
                await until(lambda: gate.num_requests == 1 and served.client.open == 0)
                await asyncio.sleep(0.1)
            # The client has left.
            await until(lambda: gate.num_requests == 0)
    (line,) = [record for record in caplog.records if record.name == "fastblt.access"]
    assert line.status == 200 and line.client_left  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_memory_for_answers_of_all_connections_is_bounded(path: str) -> None:
    """Those of the address that has most give way, the longest unread first."""
    asked = {"prompt": "é" * 150_000, "return_token_strs": True} if "token" in path else body("flood", max_tokens=900)
    async with serving() as served, AsyncExitStack() as stack:
        connections, clients, size = served.connections, list[socket.socket](), 0
        for held, address in enumerate(["127.0.0.2", *["127.0.0.1"] * 3], 1):
            request = post(asked, "connection: close", path=path)
            clients.append(await stack.enter_async_context(unread(served, request, address)))
            if held < 4:
                await until(lambda least=(held - 0.5) * size: connections.unsent > least)  # type: ignore[misc]
            if not size:
                size = connections.unsent
                # Three fit.
                connections.unsent_capacity = size * 7 // 2
        await until(lambda: connections.ended == {"unread": 1})
        read = await asyncio.gather(*map(read_slowly, clients), return_exceptions=True)
        assert [isinstance(got, int) and got >= size - 100 for got in read] == [True, False, True, True]
        assert connections.unsent == 0 and connections.ended == {"unread": 1}


async def test_an_answer_that_waits_to_be_sent_keeps_no_scores() -> None:
    async with serving() as served:
        flood = body("flood", max_tokens=900, prompt_logprobs=2, n=2)
        async with unread(served, post(flood)):
            await until(lambda: served.client.open == 0 and bool(served.client.requests))
            await asyncio.sleep(0.1)
            assert served.gate.num_requests == 1
            assert not [entry for entry in gc.get_objects() if type(entry) is TokenLogprob]


async def test_a_connection_whose_answer_is_not_sent_is_not_closed_for_a_new_one() -> None:
    async with serving(max_connections=1) as served:
        async with unread(served, FLOOD) as client:
            await until(lambda: served.client.open == 0 and bool(served.client.requests))
            await asyncio.sleep(0.1)
            async with connected(served.port) as new:
                assert (await new.answer()).code == "too_many_connections"
            assert await read_slowly(client) > 900 * 2048
        assert served.connections.ended == {"refused": 1}


async def test_the_write_timeout_does_not_end_a_large_response_to_a_slow_client() -> None:
    async with serving(write_timeout=0.4) as served, connected(served.port, limit=4096) as raw:
        await raw.send(post(body("flood", max_tokens=900), "connection: close"))
        size = 0
        while part := await raw.reader.read(32768):
            size += len(part)
            await asyncio.sleep(0.02)
        assert size > 900 * 2048 and not served.connections.ended


async def test_a_connection_with_an_incomplete_second_request_is_closed_for_a_new_one() -> None:
    async with serving(max_connections=1) as served, connected(served.port) as raw:
        await raw.send(post(body("x")) + post(body("x"))[:-5])
        assert (await raw.answer(b"POST")).status == 200
        async with connected(served.port) as new:
            await new.send(GET + b"\r\n")
            assert (await new.answer()).status == 200
        assert served.connections.ended == {"displaced": 1}


async def test_connections_displaced_at_once_are_all_closed() -> None:
    async with serving(max_connections=4) as served:
        clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
        await until(lambda: served.connections.ended["displaced"] == 36)
        await asyncio.sleep(0.1)
        for client in clients[:36]:
            client.settimeout(1)
            with suppress(ConnectionResetError):
                assert client.recv(10) == b""
        assert served.connections.count == 4
        for client in clients:
            client.close()
        await until(lambda: served.connections.count == 0)


async def test_oversized_headers_are_refused_with_431_even_without_a_readable_api_key() -> None:
    app = create_app(ServerSettings(), ScriptedClient(), (b"k",))
    async with listening(app, ServerSettings()) as port, connected(port) as raw:
        with suppress(ConnectionError):
            await raw.send(GET + b"cookie: " + b"x" * 70_000 + b"\r\nauthorization: Bearer k\r\n\r\n")
        assert (await raw.answer()).status == 431


async def test_metrics_count_http_connections() -> None:
    async with serving() as served, httpx.AsyncClient(base_url=f"http://127.0.0.1:{served.port}") as http:
        text = (await http.get("/metrics")).text
        assert "fastblt_http_connections 1.0" in text and "fastblt_http_connections_capacity 4096.0" in text
        for reason in REASONS:
            assert f'fastblt_http_connections_ended_total{{reason="{reason}"}} 0.0' in text


def test_more_idle_connections_than_open_files_leave_every_route_answering(tiny_model: Path, tmp_path: Path) -> None:
    command = ["bash", "-c", 'ulimit -n 256; exec "$@"', "-", *COMMAND, "serve", "--model", str(tiny_model)]
    log = tmp_path / "log"
    flags = ["--port", "0", "--num-threads", "1", "--cache-bytes", str(1 << 26)]
    with log.open("wb") as out, subprocess.Popen([*command, *flags], cwd=ROOT, stderr=out) as process:
        try:
            deadline = time.monotonic() + 60
            while "serving tiny on http://127.0.0.1:" not in log.read_text():
                assert time.monotonic() < deadline and process.poll() is None, log.read_text()
                time.sleep(0.05)
            assert "at most 128 connections" in log.read_text()
            port = int(log.read_text().rpartition("http://127.0.0.1:")[2].split()[0])
            idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(600)]
            began = time.monotonic()
            for path in ("/health/live", "/health/ready", "/metrics", "/v1/models"):
                assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200
            answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json={"prompt": "a", "max_tokens": 1})
            assert answer.status_code == 200
            assert time.monotonic() - began < 5
            for connection in idle:
                connection.close()
        finally:
            process.terminate()
            assert process.wait(20) == 0
    assert "Traceback" not in log.read_text()


class Piling(ScriptedClient):
    """What it generates for clients that do not read takes ever more memory, as scores do."""

    def unread_bytes(self, request_id: str) -> int:
        return self.pile

    pile = 1 << 20


async def test_what_is_generated_for_streams_that_are_not_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own stream ends, and not the answer of another that holds little."""
    monkeypatch.setattr("server.http.connection.COUNT_SECONDS", 0.05)
    monkeypatch.setattr(Served, "make_client", Piling)
    stream = post(body("flood", max_tokens=900, n=3, stream=True))
    async with serving() as served, unread(served, FLOOD, "127.0.0.2") as whole:
        connections, client = served.connections, served.client
        assert isinstance(client, Piling)
        await until(lambda: connections.unsent > 900 * 2048)
        small = connections.unsent
        async with unread(served, stream):
            await until(lambda: connections.unsent >= small + (1 << 20))
            client.pile = 1 << 40
            await until(lambda: connections.count == 1 and client.open == 0)
            assert connections.ended == {"unread": 1} and connections.unsent == small
        assert await read_slowly(whole) > 900 * 2048
        client.pile = 1 << 20
        async with connected(served.port) as raw:
            await raw.send(post(body("flood", max_tokens=900, n=3, stream=True)))
            await until(lambda: connections.unsent >= 1 << 20)
            while not (await raw.reader.read(1 << 20)).endswith(b"0\r\n\r\n"):
                pass
            # Nothing counts on a connection that goes on.
            await until(lambda: connections.unsent == 0)
            assert connections.count == 1
