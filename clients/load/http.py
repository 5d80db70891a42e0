"""HTTP/1.1 that notes when bytes come.

Why not httpx: it parses chunks in Python and hands them on through several tasks, and that time would count as the
server's. Here the clock is read when the event loop hands over what it has read from the socket.
"""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httptools

from ..fastblt_client import trusting

CONNECT_SECONDS = 10.0
RACE_SECONDS = 0.5
"""How soon after a request an idle connection is found to be closed."""
MOST_ERROR_BYTES = 1 << 16
"""Bytes that are kept of a body that is no stream."""
clock = time.perf_counter

OnData = Callable[[bytes, float], None]
"""Gets what has come of a stream, and when it came."""


class Lost(Exception):
    """The connection ended before the answer did, or what came was no HTTP."""


class Answer:
    """status: 0 before it has come. body: only if the status is not 200."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""


class _Connection(asyncio.Protocol):
    """Carries one exchange after another. Its methods `on_...` are the parser's."""

    def __init__(self, on_lost: Callable[["_Connection"], None]) -> None:
        self._on_lost = on_lost
        self._transport: Any = None
        self._future: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def ask(self, request: bytes, on_data: OnData) -> "asyncio.Future[Answer]":
        self._parser = httptools.HttpResponseParser(self)
        self._answer, self._on_data = Answer(), on_data
        self._read: list[bytes] = []
        self._whole = False
        self._future = asyncio.get_running_loop().create_future()
        self.heard, self.silent, self.reusable = clock(), True, False
        if self._transport.is_closing():
            self._future.set_exception(Lost("connection lost"))
        else:
            self._transport.write(request)
        return self._future

    def close(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self.heard, self.silent = clock(), False
        if self._future is None or self._future.done():
            return self.close()
        try:
            self._parser.feed_data(data)
            if self._read:
                self._on_data(b"".join(self._read), self.heard)
                self._read.clear()
        except httptools.HttpParserError as error:
            self._fail(self._future, Lost(f"no HTTP: {error}"))
        except Exception as error:
            self._fail(self._future, error)
        else:
            if self._whole:
                self._future.set_result(self._answer)

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost(self)
        if self._future and not self._future.done():
            framed = {"content-length", "transfer-encoding"} & self._answer.headers.keys()
            if self._answer.status and not framed and not error:
                # The end of the connection is the end of such a body.
                self._future.set_result(self._answer)
            else:
                self._future.set_exception(Lost("connection lost"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._answer.status == 200:
            self._read.append(body)
        elif len(self._answer.body) < MOST_ERROR_BYTES:
            self._answer.body += body[:MOST_ERROR_BYTES]

    def on_message_complete(self) -> None:
        # The parser knows this only until it begins the next message.
        self._whole, self.reusable = True, self._parser.should_keep_alive()

    def _fail(self, future: "asyncio.Future[Answer]", error: Exception) -> None:
        future.set_exception(error)
        self.close()


class Pool:
    """Connections to one server, kept open between requests."""

    def __init__(
        self, base_url: str, path: str, api_key: str | None, timeout: float, ca_file: Path | None = None
    ) -> None:
        """timeout: seconds without any byte. ca_file: certificates to trust instead of the system's. Raises
        ValueError."""
        where = urlsplit(base_url)
        self._host = where.hostname or ""
        self._tls = trusting(ca_file) if where.scheme == "https" else None
        self._port = where.port or (443 if self._tls else 80)
        self._timeout = timeout
        self._idle: dict[_Connection, None] = {}
        head = [f"POST {where.path}{path} HTTP/1.1", f"Host: {where.netloc.rpartition('@')[2]}"]
        head += ["Content-Type: application/json", "Accept: text/event-stream"]
        head += [f"Authorization: Bearer {api_key}"] if api_key else []
        self._head = "\r\n".join([*head, "Content-Length: "]).encode()

    async def post(self, content: bytes, on_data: OnData) -> Answer:
        """Raises Lost, OSError if no connection can be made, TimeoutError, and what on_data raises."""
        request = b"%s%d\r\n\r\n%s" % (self._head, len(content), content)
        if self._idle:
            connection, _ = self._idle.popitem()
            try:
                return await self._exchange(connection, request, on_data)
            except Lost:
                # The server may have closed it just when the request was sent. Later it has lost the request.
                if not connection.silent or clock() - connection.heard > RACE_SECONDS:
                    raise
        return await self._exchange(await self._connect(), request, on_data)

    def close(self) -> None:
        for connection in list(self._idle):
            connection.close()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(CONNECT_SECONDS):
            _, connection = await loop.create_connection(
                lambda: _Connection(lambda lost: self._idle.pop(lost, None)), self._host, self._port, ssl=self._tls
            )
        return connection

    async def _exchange(self, connection: _Connection, request: bytes, on_data: OnData) -> Answer:
        future = connection.ask(request, on_data)
        try:
            while not future.done():
                left = connection.heard + self._timeout - clock()
                if left <= 0:
                    raise TimeoutError(f"no byte came for {self._timeout:g} s")
                await asyncio.wait([future], timeout=left)
            answer = future.result()
        except BaseException:
            future.cancel()
            connection.close()
            raise
        if connection.reusable:
            self._idle[connection] = None
        else:
            connection.close()
        return answer
