"""A connection: whole or in pieces, its requests are those that h11 reads, and a refusal is the last answer.

An input is the number of lengths of pieces, these, which repeat, and what a client sends.
"""

import asyncio
import logging
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import cycle
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import urlsplit

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from server.errors import ApiError
from server.http import Connections, HttpLimits, exchange
from server.http.connection import MAX_PIPELINED, HttpConnection
from server.settings import ServerSettings
from tests.fuzz.target import Target

LENGTHS, HURRIED = 7, 8
"""The first byte modulo LENGTHS is the number of lengths; its bit HURRIED says that pieces do not wait for answers."""
SETTINGS = ServerSettings()
LIMITS = replace(HttpLimits.of(SETTINGS), header_bytes=128, headers=12)
BODY_BYTES = 256
"""Most bytes of a body that wait for the application, instead of 64 KiB."""
UNREAD = b"/unread"
"""A path whose requests are answered before their body is read."""
LEFT_OUT = {b"connection", b"upgrade", b"http2-settings", b"transfer-encoding"}
"""Headers that are not compared: an offer of another protocol is declined by reading the request without it, and h11
writes the name of a coding in small letters."""


class Read(NamedTuple):
    """A request as far as it was read."""

    method: bytes
    path: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes = b""
    complete: bool = False


class Seen(NamedTuple):
    """What came of all that a client sent. statuses: of the answers, which the connection ended with if it ended."""

    requests: list[Read]
    statuses: list[int]
    ended: bool


def one(data: bytes) -> None:
    first = data[0] if data else 0
    lengths, sent = data[1 : 1 + first % LENGTHS], data[1 + first % LENGTHS :]
    if re.search(rb"0[0-9A-Fa-f]{20}", sent):
        # h11 reads no more digits of a chunk's size.
        return
    whole = _loop().run_until_complete(_serve([sent], hurried=True))
    pieces = _loop().run_until_complete(_serve([*_cut(sent, lengths)], hurried=bool(first & HURRIED)))
    expected = read_strictly(sent)
    # Of requests that arrive together so many are answered, and a large body that waits is dropped.
    fits = len(expected.requests) <= MAX_PIPELINED and all(len(read.body) <= BODY_BYTES for read in expected.requests)
    kept = [read._replace(body=b"", complete=False) if _is_unread(read) else read for read in expected.requests]
    for seen in (whole, pieces):
        _compare(seen, expected._replace(requests=kept), fits, is_large=len(sent) > LIMITS.header_bytes)
    # Of two faults of a head, either may be known first, and its size more or less early.
    if fits and (len(sent) <= LIMITS.header_bytes or not {431} & {*whole.statuses, *pieces.statuses}):
        assert len(whole.requests) == len(pieces.requests), (whole, pieces)
        assert [min(status, 400) for status in whole.statuses] == [min(status, 400) for status in pieces.statuses]


def _cut(sent: bytes, lengths: bytes) -> Iterator[bytes]:
    for length in cycle(lengths or [len(sent)]):
        if not sent:
            return
        yield sent[: length or 1]
        sent = sent[length or 1 :]


def _compare(seen: Seen, expected: Seen, fits: bool, *, is_large: bool) -> None:
    assert len(seen.requests) <= len(expected.requests), (seen, expected)
    for ours, theirs in zip(seen.requests, expected.requests, strict=False):
        assert ours[:4] == theirs[:4], (ours, theirs)
        assert ours.body == theirs.body if ours.complete else theirs.body.startswith(ours.body), (ours, theirs)
        assert theirs.complete or not ours.complete
        assert sum(len(name) + len(value) for name, value in ours.headers) <= LIMITS.header_bytes
    refused = any(status >= 400 for status in seen.statuses)
    if not seen.ended:
        assert not refused and seen.requests == expected.requests, (seen, expected)
    elif not refused and fits:
        # The client's wish, or what follows cannot be parsed and the answer was given before.
        last = seen.requests[-1]
        unread = _is_unread(last) and not last.complete
        assert expected.ended or unread, (seen, expected)
        # The trailers of one that was answered before may be over the limit of a head.
        assert len(seen.requests) == len(expected.requests) or (unread and is_large), (seen, expected)


def read_strictly(sent: bytes) -> Seen:
    """As h11 reads it, and RFC 9112 where that is stricter. As this allows and h11 does not, empty lines before a
    request are skipped, and several spaces may separate the words of its first line. Two other protocols pass as HTTP,
    and a trailer may end the connection."""
    requests = list[Read]()
    while sent := sent.lstrip(b"\r\n"):
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        sent = re.sub(rb"\A(\S+) +(\S+) +(?:HTTP|ICE|RTSP)/", rb"\1 \2 HTTP/", sent)
        parser.receive_data(sent)
        try:
            rest = sent
            while (event := parser.next_event()) is not h11.NEED_DATA:
                before, rest = rest, parser.trailing_data[0]
                if isinstance(event, h11.Request):
                    closes = event.http_version < b"1.1" or _closes(event.headers)
                    requests.append(_head(event, sent[: len(sent) - len(parser.trailing_data[0])]))
                elif isinstance(event, h11.Data):
                    requests[-1] = requests[-1]._replace(body=requests[-1].body + bytes(event.data))
                else:
                    # Trailers are read with the end.
                    _check_lines(before[: len(before) - len(rest)])
                    closes |= _closes(event.headers)
                    requests[-1] = requests[-1]._replace(complete=True)
                    break
            else:
                return Seen(requests, [], False)
        except (h11.RemoteProtocolError, ValueError):
            return Seen(requests, [], True)
        sent = parser.trailing_data[0]
        if closes:
            return Seen(requests, [], True)
    return Seen(requests, [], False)


def _head(event: h11.Request, raw: bytes) -> Read:
    """Raises ValueError for what h11 lets pass."""
    _check_lines(raw)
    if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
        raise ValueError("a length beside chunks")
    if event.method == b"CONNECT":
        raise ValueError("this is not a proxy")
    # A path may begin with two slashes.
    url = urlsplit(b"http://x" * event.target.startswith(b"/") + event.target)
    return Read(event.method, url.path or b"/", url.query, _compared(event.headers))


def _check_lines(raw: bytes) -> None:
    """Of a head or of trailers."""
    if re.search(rb"(?<!\r)\n", raw):
        raise ValueError("a bare line feed")


def _closes(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    return any(
        name in (b"connection", b"proxy-connection")
        and b"close" in [token.strip() for token in value.lower().split(b",")]
        for name, value in headers
    )


def _is_unread(read: Read) -> bool:
    """Whether it is answered without its body. One that expects to be asked for it would end the connection then."""
    return read.path == UNREAD and not any(name == b"expect" for name, _ in read.headers)


def _compared(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name not in LEFT_OUT]


class _Transport(asyncio.Transport):
    """Keeps what is written, and asks as a socket's transport does."""

    def __init__(self, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self.written = bytearray()
        self.paused = self.closing = self.eof = False
        self._protocol = protocol

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name.endswith("name") else default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.eof
        self.written += data

    def write_eof(self) -> None:
        self.eof = True

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close


class _Echo:
    """The application: keeps the requests and answers with their number."""

    def __init__(self) -> None:
        self.requests = list[Read]()
        self.methods = list[bytes]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = len(self.methods)
        self.methods.append(scope["method"].encode())
        try:
            if error := scope["state"].get("refusal"):
                raise error
            headers = _compared(scope["headers"])
            self.requests.append(Read(self.methods[-1], scope["raw_path"], scope["query_string"], headers))
            while not _is_unread(self.requests[-1]) and not self.requests[-1].complete:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body = self.requests[-1].body + message["body"]
                self.requests[-1] = self.requests[-1]._replace(body=body, complete=not message["more_body"])
        except ApiError as error:
            return await error.response()(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"%d" % number})


@cache
def _loop() -> asyncio.AbstractEventLoop:
    logging.getLogger("fastblt").setLevel(logging.CRITICAL)
    return asyncio.new_event_loop()


@cache
def _socket() -> socket.socket:
    return socket.socket()


async def _serve(pieces: list[bytes], *, hurried: bool) -> Seen:
    faults = list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
    app, connections, state = _Echo(), Connections(SETTINGS), ServerState()
    slot = connections.enter("127.0.0.1", lambda: None)
    assert slot
    connection = HttpConnection(app, LIMITS, connections, slot, _socket(), state)
    transport = _Transport(connection)
    connection.connection_made(transport)
    with mock.patch.object(exchange, "PAUSE_BODY_BYTES", BODY_BYTES):
        largest = 0
        for piece in pieces:
            if transport.paused or not hurried:
                await _settled(state.tasks, transport, app)
            if transport.closing:
                break
            # An application that reads cannot hold up its client.
            assert not transport.paused
            connection.data_received(piece)
            largest = max(largest, len(piece))
            _check_bounds(connection, largest)
        await _settled(state.tasks, transport, app)
        assert not transport.paused or transport.closing
        ended = transport.closing or transport.eof
        statuses = _statuses(bytes(transport.written), app.methods)
        if not transport.closing:
            connection.eof_received()
        await _settled(state.tasks, transport, app)
        transport.close()
        await asyncio.sleep(0)
    assert not state.tasks and not connections.count and not faults, faults
    return Seen(app.requests, statuses, ended)


async def _settled(tasks: set[asyncio.Task[None]], transport: _Transport, app: _Echo) -> None:
    """Waits until nothing happens in the connection and the application."""
    before, now = None, (0, 0, b"")
    while tasks and before != now:
        for _ in range(4):
            await asyncio.sleep(0)
        before, now = now, (len(transport.written), len(app.requests), app.requests[-1].body if app.requests else b"")


def _check_bounds(connection: HttpConnection, piece: int) -> None:
    """piece: bytes of the largest so far, which is over the limit before it is refused."""
    assert len(connection._queue) <= MAX_PIPELINED + 1
    assert sum(len(name) + len(value) for name, value in connection._headers) <= LIMITS.header_bytes + piece
    assert len(connection._url) <= LIMITS.header_bytes + piece
    for waiting in (connection._current, connection._incoming, *connection._queue):
        assert not waiting or len(waiting._body) <= BODY_BYTES + piece


def _statuses(written: bytes, methods: list[bytes]) -> list[int]:
    """Of the answers, which are whole, in order, and only the last of them a refusal."""
    statuses = list[int]()
    for number, method in enumerate(methods):
        if written in (b"", exchange.CONTINUE):
            # Its rest has not come.
            assert number == len(methods) - 1
            return statuses
        client = h11.Connection(h11.CLIENT)
        with suppress(h11.LocalProtocolError):
            client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
            client.send(h11.EndOfMessage())
        client.receive_data(written)
        body = b""
        while not isinstance(event := client.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                assert all(status == 200 for status in statuses)
                statuses.append(event.status_code)
                closes = _closes(event.headers)
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                assert isinstance(event, h11.InformationalResponse), event
        assert (body == b"%d" % number or method == b"HEAD") if statuses[-1] == 200 else closes
        written = client.trailing_data[0]
    assert not written
    return statuses


def _go_on_reading(self: HttpConnection) -> None:
    self._resume_reading()


def _count_no_bytes(self: HttpConnection, _: int) -> None:
    self._pending_bytes = 0


GET, POST = b"GET /a?b=c HTTP/1.1\r\nhost: x\r\n", b"POST /d HTTP/1.1\r\nHost: x\r\n"
CHUNKED, LENGTH = b"transfer-encoding: chunked\r\n", b"content-length: 5\r\n"

TARGET = Target(
    one,
    seeds=[
        b"\x01\x0bGET /a?b=c HTTP/1.0\r\n\r\n",
        b"\x01\x08" + POST + b"\r\n",
        b"\x01\x08" + POST + b"a: " + b"x" * 116 + b"\r\n\r\n",
        b"\x02\x08\xff" + POST + LENGTH + b"\r\n0\r\n\r\n",
        b"\x02\x08\x05" + POST + CHUNKED + b"\r\n3;a=b\r\nabc\r\n0a\r\n0123456789\r\n0\r\nt: u\r\n\r\n",
        b"\x02\x08\xff" + POST + CHUNKED + b"\r\n0\r\nconnection: close\r\n\r\n" + GET + b"\r\n",
        b"\x02\x0b\x50" + GET + b"\r\n" + POST + LENGTH + b"expect: 100-continue\r\n\r\nabcde" + GET + b"\r\n",
        b"\x08\x30HEAD http://x/?y HTTP/1.1\r\nhost:\r\n\r\nGET / HTTP/1.0\r\n\r\n",
        b"\x01\x48POST /unread HTTP/1.1\r\nhost: x\r\n" + LENGTH + b"\r\nabcde" + GET + b"connection: close\r\n\r\n",
        b"\x02\x08\xff" + POST + LENGTH + b"Connection: a, Upgrade\r\nupgrade: h2c\r\n\r\nabcde" + GET + b"\r\n",
        b"\x01\x48POST /unread HTTP/1.1\r\nhost: x\r\n"
        + CHUNKED
        + b"\r\n0\r\na: "
        + b"x" * 90
        + b"\r\n\r\n"
        + GET
        + b"\r\n",
        b"\x01\x48POST /unread HTTP/1.1\r\nhost: x\r\n" + CHUNKED + b"\r\n0\r\na: x\n\n" + GET + b"\r\n",
        b"\x02\x08\xffPOST HTTP" + b"x" * 300 + b" HTTP/1.1\r\n\r\n",
        b"\x02\x30\xff" + POST + b"content-length: 600\r\n\r\n" + b"x" * 600 + (GET + b"\r\n") * 2,
    ],
    faults={
        "reads on after a refusal": lambda: mock.patch.object(HttpConnection, "_discard_rest", _go_on_reading),
        "counts no bytes of a head": lambda: mock.patch.object(HttpConnection, "_count_header", _count_no_bytes),
    },
    words=[
        *(CHUNKED, LENGTH, GET, POST, b"\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"connection: close\r\n"),
        *(b"upgrade: h2c\r\n", b"connection: upgrade\r\n", b"expect: 100-continue\r\n", b"/unread", b"HTTP/1.0"),
        *(b"CONNECT", b"HEAD", b"chunked, ", b"gzip", b"ffffffffffffffff", b"\n", b" ", b"\t", b"*"),
        *(b"a: " + b"x" * 60, b"b:\r\n" * 12, b";e=" + b"y" * 60),
    ],
)
