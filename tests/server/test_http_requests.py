"""How requests arrive and answers leave: in any pieces, pipelined, from old clients and from those that leave."""

import asyncio
import json
import re
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import h11
import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.responses import Response, StreamingResponse

from server.app import create_app
from server.http import Connections
from server.settings import ServerSettings
from server.tls import make_context
from tests.raw_http import connected, post
from tests.scripted_server import ScriptedClient, body, listening, serving, settled, until

UPGRADE = ("connection: Upgrade, HTTP2-Settings", "upgrade: h2c", "http2-settings: AAMAAABkAARAAAAAAAIAAAAA")


def port_of(http: httpx.AsyncClient) -> int:
    assert http.base_url.port
    return http.base_url.port


def echo_app() -> FastAPI:
    """Says what it was asked, in the way that the path names."""
    app = FastAPI()
    chosen = ServerSettings()
    app.state.connections = Connections(chosen)

    @app.api_route("/{way}", methods=["GET", "POST", "HEAD"])
    async def answer(way: str, request: Request) -> Response:
        data = b"" if way == "unread" else await request.body()
        said = json.dumps([request.method, way, data.decode("latin-1"), request.headers.get("x-tag")]).encode()
        if way != "pieces":
            return Response(said)

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(said), 7):
                yield said[at : at + 7]
                await asyncio.sleep(0)

        return StreamingResponse(pieces())

    return app


REQUEST = st.tuples(
    st.sampled_from(["GET", "POST", "HEAD"]),
    st.sampled_from(["whole", "pieces", "unread"]),
    st.binary(max_size=40),
    st.sampled_from(["length", "chunks", "offer", "expect"]),
)


def written(number: int, method: str, way: str, data: bytes, framing: str) -> bytes:
    lines = [f"{method} /{way} HTTP/1.1", "host: x", f"x-tag: {number}"]
    if framing == "offer":
        lines += UPGRADE
    if method != "POST":
        return "\r\n".join([*lines, "", ""]).encode()
    # Unread, it would be the last: nothing tells whether its body comes.
    if framing == "expect" and way != "unread":
        lines.append("expect: 100-continue")
    if framing == "chunks":
        chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(part), part) for part in (data[:3], data[3:]) if part)
        return "\r\n".join([*lines, "transfer-encoding: chunked", "", ""]).encode() + chunks + b"0\r\n\r\n"
    return "\r\n".join([*lines, f"content-length: {len(data)}", "", ""]).encode() + data


@pytest.fixture(scope="module")
def echo() -> Iterator[tuple[asyncio.Runner, int]]:
    """One server for all examples, and the loop that it runs on."""
    with asyncio.Runner() as runner:
        server = listening(echo_app(), ServerSettings())
        yield runner, runner.run(server.__aenter__())
        runner.run(server.__aexit__(None, None, None))


@settings(max_examples=100)
@given(st.lists(REQUEST, min_size=1, max_size=8), st.lists(st.integers(1, 60), max_size=12))
def test_pipelined_requests_split_anywhere_are_answered_in_order(
    echo: tuple[asyncio.Runner, int], asked: list[tuple[str, str, bytes, str]], cuts: list[int]
) -> None:
    runner, port = echo
    data = b"".join(written(number, *request) for number, request in enumerate(asked))

    async def run() -> None:
        async with connected(port) as raw:
            at = 0
            for cut in cuts:
                await raw.send(data[at : at + cut])
                at += cut
                await asyncio.sleep(0)
            await raw.send(data[at:])
            answers = await raw.answers(*(method.encode() for method, *_ in asked))
        for number, ((method, way, sent, _), answer) in enumerate(zip(asked, answers, strict=True)):
            assert answer.status == 200
            if method == "HEAD":
                assert answer.body == b""
                continue
            received = sent.decode("latin-1") if method == "POST" and way != "unread" else ""
            assert answer.json() == [method, way, received, str(number)]

    runner.run(run())


async def test_the_number_of_pipelined_requests_is_bounded() -> None:
    async with serving(ScriptedClient()) as http, connected(port_of(http)) as raw:
        await raw.send(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n" * 2000)
        answers = await raw.answers(*[b"GET"] * 17)
        assert [answer.status for answer in answers] == [200] * 17
        assert [answer.headers.get("connection") for answer in answers] == [None] * 16 + ["close"]
        # As it lingers, what the client still sends resets nothing.
        await raw.send(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n" * 2000)
        assert await raw.is_closed()


@pytest.mark.parametrize(
    ("header", "size", "fitting"), [(30_000, 0, 4), (30_000, 30_000, 2), (0, 60_000, 2), (0, 100_000, 1)]
)
async def test_the_bytes_of_pipelined_requests_are_bounded(header: int, size: int, fitting: int) -> None:
    client = ScriptedClient()
    async with serving(client) as http, connected(port_of(http)) as raw:
        await raw.send(post(body("wait")))
        await settled(client, 1)
        waiting = post(b" " * size + json.dumps(body("x")).encode(), "a: " + "x" * header)
        with suppress(ConnectionError):
            await raw.send(waiting * 8)
        await asyncio.sleep(0.1)
        client.release.set()
        answers = await raw.answers(*[b"POST"] * (fitting + 1))
        assert [answer.headers.get("connection") for answer in answers] == [None] * fitting + ["close"]
        assert await raw.is_closed()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_pipelined_requests_of_a_disconnected_client_are_aborted(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        async with connected(port_of(http)) as raw:
            await raw.send(post(body("drip", stream=stream)) * 2)
            await settled(client, 1)
        began = asyncio.get_running_loop().time()
        await settled(client, 0)
        assert asyncio.get_running_loop().time() - began < 0.5
        await asyncio.sleep(0.05)
        # The second was never begun.
        assert len(client.requests) == 1
        metrics = (await http.get("/metrics")).text
        assert 'fastblt_sequences_total{decoder="blt",finish_reason="abort"} 1.0' in metrics
    assert not [record for record in caplog.records if record.exc_info]


async def test_a_client_that_half_closes_its_connection_gets_its_responses() -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        for request, methods in (
            (post(body("wait")), 1),
            (post(body("wait"), "connection: close"), 1),
            (post(body("wait", stream=True)), 1),
            (post(body("wait")) + post(body("x")), 2),
        ):
            client.release.clear()
            async with connected(port_of(http)) as raw:
                await raw.send(request)
                raw.writer.write_eof()
                await asyncio.sleep(0.1)
                assert client.open == 1
                client.release.set()
                answers = await raw.answers(*[b"POST"] * methods)
                assert [answer.status for answer in answers] == [200] * methods
                assert await raw.is_closed()


async def test_an_incomplete_request_of_a_disconnected_client_is_dropped() -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        for cut in (10, -5):
            async with connected(port_of(http)) as raw:
                await raw.send(post(body("x"))[:cut])
                raw.writer.write_eof()
                assert await raw.is_closed()
        assert not client.requests


async def test_an_http_1_0_client_gets_a_response_without_chunks() -> None:
    async with serving(ScriptedClient()) as http:
        for stream in (False, True):
            async with connected(port_of(http)) as raw:
                await raw.send(post(body("x", stream=stream), version="1.0"))
                head, _, text = (await raw.rest()).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 200 ") and b"transfer-encoding" not in head.lower()
                assert b"connection: close" in head
                assert text.endswith(b"data: [DONE]\n\n") if stream else json.loads(text)["choices"]


async def test_an_event_is_one_line_to_clients_that_know_line_breaks_of_unicode() -> None:
    text = "a\u0085b\u2028c\u2029d\x0b\x0c\x1e\r\n\\"
    asked = body(text, echo=True, stream=True)
    async with (
        serving(ScriptedClient()) as http,
        http.stream("POST", "/v1/completions", json=asked) as response,
    ):
        lines = [line async for line in response.aiter_lines() if line]
    *events, last = [line.removeprefix("data: ") for line in lines]
    told = [choice["text"] for event in events for choice in json.loads(event)["choices"]]
    assert ("".join(told), last) == (text + "ab", "[DONE]")


async def test_a_request_that_offers_a_protocol_upgrade_keeps_its_body() -> None:
    client = ScriptedClient()
    async with serving(client) as http, connected(port_of(http)) as raw:
        for upgrade in (UPGRADE, ("connection: keep-alive, Upgrade", "upgrade: websocket")):
            await raw.send(post(body("x"), *upgrade))
            answer = await raw.answer(b"POST")
            assert answer.json()["choices"][0]["text"] == "ab"


async def test_expect_100_continue_is_answered_before_the_body_is_sent() -> None:
    async with serving(ScriptedClient()) as http, connected(port_of(http)) as raw:
        head, _, data = post(body("x"), "expect: 100-continue").partition(b"\r\n\r\n")
        await raw.send(head + b"\r\n\r\n")
        async with asyncio.timeout(5):
            assert await raw.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await raw.send(data)
        assert (await raw.answer(b"POST")).status == 200
        await raw.send(post(b"xy", "expect: 100-continue", path="/nowhere")[:-1])
        refused = await raw.answer(b"POST")
        # It is sending the body all the same.
        assert refused.status == 404 and "connection" not in refused.headers
        await raw.send(b"y" + post(b"x" * 20, "expect: 100-continue", path="/nowhere")[:-20])
        refused = await raw.answer(b"POST")
        # Its next request would be read as the body, which it does not send.
        assert refused.status == 404 and refused.headers["connection"] == "close"
        assert await raw.is_closed()


async def test_health_routes_accept_head_requests_and_trailing_slashes() -> None:
    client = ScriptedClient()
    async with serving(client, keys=(b"a-key",)) as http:
        for path in ("/health", "/health/live", "/health/ready", "/ping"):
            for url in (path, f"{path}/"):
                assert (await http.get(url)).status_code == 200
                probe = await http.head(url)
                assert (probe.status_code, probe.content) == (200, b"")
        assert (await http.get("/metrics/")).status_code == 200
        assert (await http.get("/version/")).status_code == 401
        http.headers["authorization"] = "Bearer a-key"
        for path in ("/version/", "/v1/models/", "/v1/models/scripted/"):
            assert (await http.get(path)).status_code == 200
        assert (await http.post("/v1/completions/", json=body("x"))).status_code == 200
        client.state = "restarting"
        assert (await http.head("/health")).status_code == (await http.get("/ping")).status_code == 503


async def test_the_client_is_the_peer_unless_a_trusted_proxy_names_another(caplog: pytest.LogCaptureFixture) -> None:
    forged = {"x-forwarded-for": "9.9.9.9 GET /v1/completions 200 FORGED"}
    chain = {"x-forwarded-for": "1.1.1.1, 2.2.2.2, 10.0.0.7"}

    async def clients(**settings: Any) -> list[str]:
        caplog.clear()
        async with serving(ScriptedClient(), **settings) as http:
            for headers in (forged, chain, {"x-forwarded-for": f"{'x' * 5000}, 2001:db8::1"}):
                await http.get("/version", headers=headers)
        lines = [record for record in caplog.records if record.name == "fastblt.access"]
        assert not any("FORGED" in line.getMessage() for line in lines)
        return [line.client for line in lines]  # type: ignore[attr-defined]

    with caplog.at_level("INFO", logger="fastblt.access"):
        assert await clients() == ["127.0.0.1"] * 3
        assert await clients(trusted_proxies="192.0.2.0/24") == ["127.0.0.1"] * 3
        assert await clients(trusted_proxies="127.0.0.1") == ["127.0.0.1", "10.0.0.7", "2001:db8::1"]
        assert await clients(trusted_proxies="127.0.0.0/8,10.0.0.0/8") == ["127.0.0.1", "2.2.2.2", "2001:db8::1"]


async def test_only_uncompressed_utf8_json_bodies_are_accepted() -> None:
    client = ScriptedClient()
    async with serving(client) as http:
        data = json.dumps(body("x")).encode()
        refused: list[dict[str, str]] = [
            {},
            {"content-type": "text/plain"},
            {"content-type": "application/x-www-form-urlencoded"},
            {"content-type": "text/plain;application/json"},
            {"content-type": "application/json; charset=latin-1"},
            {"content-type": "application/json", "content-encoding": "gzip"},
        ]
        for headers in refused:
            answer = await http.post("/v1/completions", content=data, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type"), headers
        assert not client.requests
        for kind in ("application/json", "Application/JSON; charset=UTF-8", 'application/json;charset="utf-8"'):
            answer = await http.post("/v1/completions", content=data, headers={"content-type": kind})
            assert answer.status_code == 200


@pytest.mark.parametrize(
    ("headers", "data", "size"),
    [
        ("content-length: 5000", b"", "5000"),
        ("content-length: 2000", b" " * 2000, "2000"),
        ("transfer-encoding: chunked", b"1388\r\n" + b" " * 5000, r"\d+ or more"),
    ],
)
async def test_a_body_that_is_too_large_is_told_its_size(headers: str, data: bytes, size: str) -> None:
    async with serving(ScriptedClient(), max_body_bytes=1024) as http, connected(port_of(http)) as raw:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\r\n\r\n"
        await raw.send(head.encode() + data)
        answer = await raw.answer(b"POST")
    assert (answer.status, answer.code) == (413, "body_too_large")
    told = answer.json()["error"]["message"]
    assert re.fullmatch(f"the body must have at most 1024 bytes, not {size}", told), told


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a server's and a client's certificate that it signed."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    openssl(*new, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=authority")
    for name in ("server", "client"):
        signed = ["-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "subjectAltName=IP:127.0.0.1"]
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN={name}", *signed)
    return folder


def with_tls(folder: Path, **further: Path) -> ServerSettings:
    return ServerSettings(ssl_certfile=folder / "server.pem", ssl_keyfile=folder / "server.key", **further)  # type: ignore[arg-type]


async def test_https_works_with_and_without_client_certificates(certificates: Path) -> None:
    trusting = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
    chosen = with_tls(certificates)
    client = ScriptedClient()
    async with listening(create_app(chosen, client), chosen, make_context(chosen)) as port:
        url = f"https://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, verify=trusting) as http:
            assert (await http.post("/v1/completions", json=body("x"))).json()["choices"][0]["text"] == "ab"
            streamed = await http.post("/v1/completions", json=body("x", stream=True))
            assert streamed.text.endswith("data: [DONE]\n\n")
        async with connected(port) as plain:
            await plain.send(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
            assert not (await plain.rest()).startswith(b"HTTP")
    asks = with_tls(certificates, ssl_ca_certs=certificates / "ca.pem")
    async with listening(create_app(asks, client), asks, make_context(asks)) as port:
        url = f"https://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, verify=trusting) as http:
            with pytest.raises(httpx.TransportError):
                await http.get("/version")
        trusting.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        async with httpx.AsyncClient(base_url=url, verify=trusting) as http:
            assert (await http.get("/version")).status_code == 200


async def test_tls_handshakes_count_as_connections_and_have_a_timeout(certificates: Path) -> None:
    chosen = with_tls(certificates).model_copy(update={"head_timeout": 0.3, "max_connections": 2})
    app = create_app(chosen, ScriptedClient())
    connections: Connections = app.state.connections
    async with listening(app, chosen, make_context(chosen)) as port:
        with socket.create_connection(("127.0.0.1", port)) as first, socket.create_connection(("127.0.0.1", port)):
            await until(lambda: connections.count == 2)
            async with connected(port):
                await until(lambda: connections.ended["displaced"] == 1)
                assert connections.count == 2
                await until(lambda: connections.count == 0)
            assert first.recv(100) == b""


def test_errors_about_unusable_certificates_name_the_file(certificates: Path, tmp_path: Path) -> None:
    def refused(certificate: Path, key: Path, **further: Path) -> str:
        with pytest.raises(ValueError) as caught:
            make_context(ServerSettings(ssl_certfile=certificate, ssl_keyfile=key, **further))  # type: ignore[arg-type]
        return str(caught.value)

    good = certificates / "server.pem", certificates / "server.key"
    (tmp_path / "text").write_text("no certificate")
    locked = tmp_path / "locked.key"
    command = ["openssl", "ec", "-in", good[1], "-out", locked, "-aes128", "-passout", "pass:x"]
    subprocess.run(command, check=True, capture_output=True)
    assert "No such file" in refused(tmp_path / "none", good[1])
    assert "do not fit together" in refused(good[0], certificates / "client.key")
    assert "not PEM" in refused(tmp_path / "text", good[1])
    assert "the key is encrypted" in refused(good[0], locked)
    assert "--ssl-ca-certs" in refused(*good, ssl_ca_certs=tmp_path / "text")
    assert make_context(ServerSettings()) is None


async def test_a_url_without_a_path_means_the_root() -> None:
    async with serving(ScriptedClient(), page=False) as http, connected(port_of(http)) as raw:
        for url, path in (("http://x", "/"), ("http://x?a=b", "/"), ("http://x/version", "/version")):
            await raw.send(f"GET {url} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            assert (await raw.answer()).status == (404 if path == "/" else 200)


async def test_a_server_that_shuts_down_reads_no_further_request() -> None:
    client, chosen, stack = ScriptedClient(), ServerSettings(), AsyncExitStack()
    port = await stack.enter_async_context(listening(create_app(chosen, client), chosen))
    async with connected(port) as raw:
        await raw.send(post(body("wait")))
        await settled(client, 1)
        ending = asyncio.create_task(stack.aclose())
        # uvicorn looks every tenth of a second whether it is to end.
        await asyncio.sleep(0.25)
        await raw.send(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.05)
        client.release.set()
        assert (await raw.answer(b"POST")).headers["connection"] == "close"
        assert await raw.is_closed()
        await ending


async def test_an_exception_before_the_response_is_sent_gives_a_complete_error_response() -> None:
    app = echo_app()

    @app.get("/broken/start")
    async def broken() -> Response:
        class Start(Response):
            async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                raise KeyError("start")

        return Start()

    async with listening(app, ServerSettings()) as port, connected(port) as raw:
        await raw.send(b"GET /broken/start HTTP/1.1\r\nhost: x\r\n\r\n")
        answer = await raw.answer()
        assert (answer.status, answer.code) == (500, "internal_error")


async def test_an_exception_in_the_middle_of_a_response_closes_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    app = echo_app()

    @app.get("/broken/half")
    async def broken() -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"a"
            raise KeyError("half")

        return StreamingResponse(pieces())

    async with listening(app, ServerSettings()) as port, connected(port) as raw:
        await raw.send(b"GET /broken/half HTTP/1.1\r\nhost: x\r\n\r\n")
        with pytest.raises((h11.RemoteProtocolError, ConnectionResetError)):
            await raw.answer()


async def test_a_drain_ends_connections_with_their_answers_so_that_clients_find_another_server() -> None:
    client, chosen = ScriptedClient(), ServerSettings()
    app = create_app(chosen, client)
    async with listening(app, chosen) as port, AsyncExitStack() as stack:
        whole, stream, pipelined, later = [await stack.enter_async_context(connected(port)) for _ in range(4)]
        await whole.send(post(body("wait")))
        await stream.send(post(body("pause", stream=True)))
        await pipelined.send(post(body("wait")) * 2)
        await settled(client, 3)
        head = await stream.reader.readuntil(b"data: ")
        app.state.gate.drain()
        client.release.set()

        assert (await whole.answer(b"POST")).headers["connection"] == "close"
        assert await whole.is_closed()
        assert b"connection: close" not in head and (await stream.rest()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        first, second = await pipelined.answers(b"POST", b"POST")
        assert (first.status, first.headers.get("connection"), second.status) == (200, None, 503)
        assert second.headers["connection"] == "close" and await pipelined.is_closed()

        app.state.gate.resume()
        for _ in range(2):
            await later.send(post(body("x")))
            answer = await later.answer(b"POST")
            assert answer.status == 200 and "connection" not in answer.headers
