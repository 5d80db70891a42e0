"""One request and its answer, as the application sees them (ASGI 3)."""

import asyncio
import http
import logging
from collections.abc import Iterable
from typing import Protocol

from starlette.types import ASGIApp, Message, Scope

from ..body import ClientLeft
from ..errors import ApiError, internal_error

log = logging.getLogger("fastblt.server")

PAUSE_BODY_BYTES = 64 << 10
"""Most body bytes not yet fetched by the application; above this the connection is not read."""
WRITE_BYTES = 64 << 10
"""Most bytes of an answer that are given to the transport at once; larger ones count towards the room for answers."""
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
NO_BODY = frozenset({204, 304})


def _status_line(status: int) -> bytes:
    try:
        phrase = http.HTTPStatus(status).phrase
    except ValueError:
        phrase = ""
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


STATUS_LINES = {status: _status_line(status) for status in range(200, 600)}


class Line(Protocol):
    """What an exchange needs from its connection."""

    def write(self, data: bytes | memoryview) -> None: ...

    async def drain(self) -> None: ...

    async def flush(self) -> None: ...

    def hold(self, unsent: int) -> None: ...

    def body_taken(self) -> None: ...

    def answered(self, exchange: "Exchange") -> None: ...

    def abort(self) -> None: ...

    @property
    def default_headers(self) -> Iterable[tuple[bytes, bytes]]: ...

    @property
    def is_last(self) -> bool: ...


class Exchange:
    """`receive` and `send` of one request. The connection feeds it and reports when the client is gone."""

    def __init__(
        self,
        line: Line,
        scope: Scope,
        *,
        began: float,
        keep_alive: bool,
        head_bytes: int = 0,
        expects_continue: bool = False,
    ) -> None:
        self._line = line
        self.scope = scope
        self.began = began
        """When the first byte of the request came, by the loop's clock."""
        self.keep_alive = keep_alive
        self._head_bytes = head_bytes
        self.request_complete = False
        self.response_started = False
        self.response_complete = False
        self._is_head = scope["method"] == "HEAD"
        self._is_1_0 = scope["http_version"] != "1.1"
        self._expects_continue = expects_continue
        self._body = bytearray()
        self._body_delivered = False
        self._gone = False
        self._failure: ApiError | None = None
        self._news = asyncio.Event()
        self._start: Message | None = None
        """The answer's head, which is sent with the first bytes of its body."""
        self._chunked = False
        self._left: int | None = None
        """Bytes of the answer's body that its content-length still announces."""

    # Called by the connection.

    def feed(self, data: bytes) -> None:
        """More of the request's body."""
        if not (self.response_complete or self._failure):
            self._body += data
            self._news.set()

    def finish_request(self) -> None:
        """The request is complete."""
        self.request_complete = True
        self._news.set()

    def fail(self, error: ApiError) -> None:
        """The request will never be complete; the application gets this error from its next `receive`."""
        self._failure = error
        self._body.clear()
        self._expects_continue = self.keep_alive = False
        self._news.set()

    def disconnect(self) -> None:
        """The client is gone."""
        self._gone = True
        self._news.set()

    @property
    def size(self) -> int:
        """Bytes of the request that are held."""
        return self._head_bytes + len(self._body)

    @property
    def backs_up(self) -> bool:
        """Whether the application is slow to read the body."""
        return len(self._body) > PAUSE_BODY_BYTES

    # Called by the application.

    async def run(self, app: ASGIApp) -> None:
        """Runs the application, and ensures that the client gets an answer or the connection ends."""
        if self._gone:
            return
        try:
            await app(self.scope, self.receive, self.send)
        except Exception:
            log.exception("the application failed")
        if self.response_complete or self._gone:
            return
        if self.response_started:
            # The only way left to signal that the answer is incomplete.
            self._line.abort()
        else:
            self.keep_alive = False
            await internal_error("-").response()(self.scope, self.receive, self.send)

    async def receive(self) -> Message:
        """The next piece of the body, then `http.disconnect` once the client or the answer is gone. Raises ApiError if
        the rest of the body never comes."""
        if self._expects_continue and not self._gone:
            self._expects_continue = False
            self._line.write(CONTINUE)
        while True:
            if self._gone or self.response_complete:
                return {"type": "http.disconnect"}
            if self._failure and not self.request_complete:
                raise self._failure
            if not self._body_delivered and (self._body or self.request_complete):
                body = bytes(self._body)
                self._body.clear()
                self._body_delivered = self.request_complete
                self._line.body_taken()
                return {"type": "http.request", "body": body, "more_body": not self._body_delivered}
            self._news.clear()
            await self._news.wait()

    async def send(self, message: Message) -> None:
        """Returns once more can be sent and, at the end of the answer, once all is: it lasts until then. Raises
        RuntimeError for an invalid message, and ClientLeft if the client leaves before it has the last one. Other
        output for a client that is gone is dropped."""
        kind = message["type"]
        if kind == "http.response.start":
            if self.response_started:
                raise RuntimeError("the answer has begun already")
            self._start = message
            return
        if kind != "http.response.body" or self.response_complete or not (self._start or self.response_started):
            raise RuntimeError(f"{kind} is out of order")
        if self._gone:
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        head = b"" if self.response_started else self._begin(body, more)
        self.response_started = True
        await self._write(head, self._framed(body, more))
        if more:
            return await self._line.drain()
        await self._line.flush()
        if self._gone:
            raise ClientLeft
        if self._left:
            # The client waits for bytes that will not come.
            self._line.abort()
        self.response_complete = True
        self._body.clear()
        self._news.set()
        # A drain may have begun since the head was sent.
        self.keep_alive = self.keep_alive and not self._line.is_last
        self._line.answered(self)

    async def _write(self, head: bytes, body: bytes) -> None:
        """Writes all, a long body as it is sent, unless the client is gone."""
        if len(body) <= WRITE_BYTES:
            return self._line.write(head + body)
        self._line.hold(len(body))
        try:
            self._line.write(head)
            view = memoryview(body)
            for start in range(0, len(view), WRITE_BYTES):
                self._line.write(view[start : start + WRITE_BYTES])
                await self._line.flush()
                if self._gone:
                    return
        finally:
            self._line.hold(0)

    def _begin(self, body: bytes, more: bool) -> bytes:
        """The head of the answer."""
        assert self._start
        status, headers = self._start["status"], list(self._start.get("headers", []))
        names = {name.lower(): value for name, value in headers}
        if status in NO_BODY or self._is_head:
            pass
        elif b"content-length" in names:
            self._left = int(names[b"content-length"])
        elif not more:
            self._left = len(body)
            headers.append((b"content-length", b"%d" % len(body)))
        elif self._is_1_0:
            # HTTP/1.0 has no chunks: the end of the connection is the end of the answer.
            self.keep_alive = False
        else:
            self._chunked = True
            headers.append((b"transfer-encoding", b"chunked"))
        if self._expects_continue and not (self._body or self.request_complete):
            # The client need not send the body now, and its next request would be read as that.
            self.keep_alive = False
        says_close = b"close" in names.get(b"connection", b"").lower()
        if says_close or self._line.is_last:
            self.keep_alive = False
        if not (self.keep_alive or says_close):
            headers.append((b"connection", b"close"))
        lines = [STATUS_LINES[status]]
        lines += [b"%b: %b\r\n" % pair for pair in (*self._line.default_headers, *headers)]
        return b"".join([*lines, b"\r\n"])

    def _framed(self, body: bytes, more: bool) -> bytes:
        if self._is_head:
            return b""
        if self._left is not None:
            if len(body) > self._left:
                raise RuntimeError("the answer is longer than its content-length")
            self._left -= len(body)
        if not self._chunked:
            return body
        chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
        return chunk if more else chunk + b"0\r\n\r\n"
