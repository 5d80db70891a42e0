"""One connection: reads requests, one after another or pipelined, and answers them in order.

Limits hold for every way in. A head is bounded as it arrives, whole or not, also where it is pipelined or offers h2c;
a request has its time whatever the application does with it; an answer that the client leaves unread ends the
connection. A refused request still goes through the application, for its log line, metrics and headers.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, cast
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp, Scope
from uvicorn.server import ServerState

from ..errors import ApiError, request_timeout
from .connections import Connections, HttpLimits, Reason, Slot
from .exchange import CONTINUE, Exchange

MAX_PIPELINED = 16
MAX_PIPELINED_BYTES = 128 << 10
"""Most requests, and bytes of their heads and bodies, that may wait for earlier answers. A connection with more ends
when these are answered."""
LINGER_SECONDS = 2.0
"""Time for a client to read the last answer while it still sends; after an immediate close the kernel would discard
it."""
PROBES_SECONDS = (0.002, 0.01, 0.05, 0.2)
"""When to check whether a client that has shut its side down is still connected; later checks come every second."""
LEAST_READ_BYTES = 64 << 10
"""Bytes that a client must read within the write limit while an answer waits, or all of a shorter rest."""
COUNT_SECONDS = 1.0
"""How often it is counted what an application holds for a client that does not read."""
UPGRADE_HEADERS = frozenset({b"upgrade", b"http2-settings"})


class HttpConnection(asyncio.Protocol):
    """From accept to close. `state` is uvicorn's: open connections, their tasks, and the headers of every answer."""

    def __init__(
        self,
        app: ASGIApp,
        limits: HttpLimits,
        connections: Connections,
        slot: Slot,
        accepted: socket.socket,
        state: ServerState,
    ) -> None:
        self._app = app
        self._limits = limits
        self._connections = connections
        self._slot = slot
        self._socket = accepted
        self._state = state
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport = None  # type: ignore[assignment]
        self._is_tls = False
        # The request that is being read.
        self._parser = httptools.HttpRequestParser(self)
        self._allow_data_after_close()
        self._reading = "nothing"
        """Between requests "nothing", within one "head" or "body"."""
        self._ready_since = self._began = self._loop.time()
        self._is_first = True
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = self._pending_bytes = 0
        self._expects_continue = self._upgrades = False
        self._refusal: ApiError | None = None
        self._incoming: Exchange | None = None
        # Requests to answer.
        self._current: Exchange | None = None
        self._queue: deque[Exchange] = deque()
        # The connection.
        self._is_deaf = False
        """Input is discarded: the client has had its last answer, or a refusal that ends the connection."""
        self._lingers = False
        """Whether the client may still be sending when it gets its last answer."""
        self._half_closed = False
        self._ending = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_for: tuple[Reason, float] | None = None
        self._end: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._held = 0
        """Bytes of an answer that are held until they are sent."""
        self._writable = asyncio.Event()
        self._writable.set()

    # The transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._is_tls = transport.get_extra_info("sslcontext") is not None
        if self._slot.released:
            return self._transport.abort()
        self._slot.close = self._transport.abort
        # uvicorn's annotation allows only its own classes.
        self._state.connections.add(self)  # type: ignore[arg-type]
        self._ready_since = self._loop.time()
        self._set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state.connections.discard(self)
        self._slot.release()
        for timer in (self._timer, self._end, self._probe, self._stall):
            if timer:
                timer.cancel()
        self._disconnect()
        self._writable.set()

    def _disconnect(self) -> None:
        """The client is gone: starts no more requests and notifies the one that runs."""
        self._is_deaf = True
        self._queue.clear()
        for exchange in (self._current, self._incoming):
            if exchange:
                exchange.disconnect()

    def data_received(self, data: bytes) -> None:
        if self._is_deaf:
            return
        self._pending_bytes += len(data)
        self._parse(data)
        if self._refusal is None and self._pending_bytes > self._limits.header_bytes:
            # The parser buffers a header until it is complete.
            self._refuse_head()
        if self._refusal is not None:
            self._answer_refusal(self._refusal)
        self._set_timer()

    def eof_received(self) -> bool:
        """The client sends nothing more. If its requests are complete, it may still read the answers."""
        waits = self._current is not None and self._current.request_complete
        if self._is_tls or not waits or (self._reading != "nothing" and not self._is_deaf):
            self._disconnect()
            self._close()
            return False
        assert self._current
        self._half_closed = True
        # A client that has closed the connection looks the same until something is sent to it: its kernel then answers
        # with a reset. A client that is still connected ignores an interim response.
        if not (self._current.response_started or self._current.scope["http_version"] != "1.1"):
            self.write(CONTINUE)
        self._look_for_reset(0)
        return True

    def pause_writing(self) -> None:
        self._writable.clear()
        self._watch_reading()

    def resume_writing(self) -> None:
        self._writable.set()
        if self._transport.is_closing():
            # The rest gets its full time.
            return self._watch_reading()
        if self._stall:
            self._stall.cancel()
            self._stall = None

    # Parser callbacks. An exception here would lose the position in the data, so faults are stored and handled later.

    def on_message_begin(self) -> None:
        self._reading = "head"
        self._began = self._loop.time()
        self._is_first = False
        self._url, self._headers = b"", []
        self._header_bytes = self._pending_bytes = 0
        self._expects_continue = self._upgrades = False

    def on_url(self, url: bytes) -> None:
        self._url += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_header(len(name) + len(value))
        # Trailers of a chunked body count towards the limits and are dropped.
        if self._reading == "head" and self._refusal is None:
            # The parser strips whitespace before a value only.
            name, value = name.lower(), value.rstrip(b" \t")
            self._headers.append((name, value))
            if name == b"expect" and value.lower() == b"100-continue":
                self._expects_continue = True
            if len(self._headers) > self._limits.headers:
                self._refuse_head()

    def on_headers_complete(self) -> None:
        self._reading, self._pending_bytes = "body", 0
        if self._refusal or self._is_deaf:
            return
        if self._parser.get_method() == b"CONNECT":
            message = "this server is not a proxy"
            self._refusal = ApiError(405, message, code="method_not_allowed", headers={"allow": "GET"})
        elif self._parser.should_upgrade():
            self._upgrades = True
        elif self._ending or len(self._queue) >= MAX_PIPELINED:
            self._answer_no_more()
        else:
            self._begin_exchange()

    def on_chunk_header(self) -> None:
        self._pending_bytes = 0

    def on_body(self, data: bytes) -> None:
        self._pending_bytes = 0
        if self._incoming and not self._refusal:
            self._incoming.feed(data)
            if self._incoming is not self._current:
                self._bound_queue()
            elif self._incoming.backs_up:
                self._pause_reading()

    def on_message_complete(self) -> None:
        self._reading, self._pending_bytes = "nothing", 0
        if self._upgrades or self._refusal or self._is_deaf:
            return
        exchange, self._incoming = self._incoming, None
        if exchange:
            exchange.finish_request()
            # After a trailer that says "connection: close" the parser reads no more.
            exchange.keep_alive = exchange.keep_alive and self._parser.should_keep_alive()
            if not exchange.keep_alive:
                self._discard_rest()
            if exchange is self._current:
                self._slot.work()
                if exchange.response_complete:
                    self._next()

    # Reading.

    def _parse(self, data: bytes) -> None:
        while data and not self._is_deaf:
            try:
                self._parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if self._refusal:
                    return
                # The client offers another protocol, which is declined. The parser leaves the body to that protocol, so
                # the head is parsed again without the offer.
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self._parser = httptools.HttpRequestParser(self)
                self._allow_data_after_close()
            except httptools.HttpParserError as error:
                if self._refusal is None and not self._is_deaf:
                    self._refusal = invalid_http(str(error))
                return

    def _allow_data_after_close(self) -> None:
        # Data after a request with "connection: close" is ignored and does not stop its answer.
        self._parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _head_without_upgrade(self) -> bytes:
        line = b"%b %b HTTP/%b\r\n" % (self._parser.get_method(), self._url, self._parser.get_http_version().encode())
        kept = []
        for name, value in self._headers:
            if name == b"connection":
                tokens = [token.strip() for token in value.split(b",")]
                value = b", ".join(token for token in tokens if token.lower() not in UPGRADE_HEADERS)
            if name not in UPGRADE_HEADERS:
                kept.append(b"%b: %b\r\n" % (name, value))
        return b"".join([line, *kept, b"\r\n"])

    def _count_header(self, size: int) -> None:
        self._pending_bytes = 0
        self._header_bytes += size
        if self._header_bytes > self._limits.header_bytes and self._refusal is None:
            self._refuse_head()

    def _refuse_head(self) -> None:
        limits = self._limits
        what = "the chunk extensions and trailers" if self._reading == "body" else "the head"
        message = f"{what} of a request must have at most {limits.header_bytes} bytes and {limits.headers} headers"
        self._refusal = ApiError(431, message, code="headers_too_large")

    def _begin_exchange(self) -> None:
        try:
            url = httptools.parse_url(self._url)
        except httptools.HttpParserInvalidURLError:
            self._refusal = invalid_http("its URL cannot be parsed")
            return
        version = self._parser.get_http_version()
        if version not in ("1.0", "1.1"):
            # A line without a version is one of HTTP/0.9.
            self._refusal = invalid_http("its version must be HTTP/1.0 or HTTP/1.1")
            return
        hosts = [name for name, _ in self._headers].count(b"host")
        if hosts > 1 or (version == "1.1" and not hosts):
            self._refusal = invalid_http("it needs one Host header")
            return
        if [value.lower() for name, value in self._headers if name == b"transfer-encoding"] not in ([], [b"chunked"]):
            self._refusal = invalid_http("its Transfer-Encoding must be chunked and nothing else")
            return
        raw_path = url.path or b"/"
        path = raw_path.decode("ascii", "replace")
        scope = self._scope(
            method=self._parser.get_method().decode(),
            http_version=version,
            path=unquote(path) if "%" in path else path,
            raw_path=raw_path,
            query_string=url.query or b"",
        )
        self._incoming = Exchange(
            self,
            scope,
            began=self._began,
            head_bytes=self._header_bytes,
            keep_alive=version == "1.1" and self._parser.should_keep_alive(),
            expects_continue=self._expects_continue and version == "1.1",
        )
        self._enqueue(self._incoming)
        self._bound_queue()

    def _scope(self, **fields: Any) -> Scope:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "scheme": "https" if self._is_tls else "http",
            "server": _address(self._transport.get_extra_info("sockname")),
            "client": _address(self._transport.get_extra_info("peername")),
            "root_path": "",
            "headers": self._headers,
            "state": {},
            **fields,
        }

    def _answer_refusal(self, error: ApiError) -> None:
        """Answers a request that cannot be parsed, after the answers before it."""
        self._discard_rest()
        incoming, self._incoming = self._incoming, None
        if incoming:
            return self._give_up(incoming, error)
        path = self._url.partition(b"?")[0][:1000].decode("ascii", "replace")
        # The method comes before the URL.
        method = self._parser.get_method().decode() if self._url else "-"
        fields = {"method": method, "http_version": "1.1", "path": path or "-", "raw_path": b"", "query_string": b""}
        exchange = Exchange(self, self._scope(**fields), began=self._began, keep_alive=False)
        exchange.scope["state"]["refusal"] = error
        exchange.finish_request()
        self._lingers = True
        self._enqueue(exchange)

    def _give_up(self, exchange: Exchange, error: ApiError) -> None:
        """Fails the request being read, whose rest will not come."""
        self._lingers = True
        exchange.fail(error)
        if exchange.response_complete:
            self._finish()

    def _bound_queue(self) -> None:
        """Reading continues while requests wait for earlier answers, to notice when the client leaves. So one for which
        there is no room is dropped, and the connection ends when those before it are answered."""
        if sum(exchange.size for exchange in self._queue) > MAX_PIPELINED_BYTES:
            self._queue.pop()
            self._incoming = None
            self._answer_no_more()

    def _answer_no_more(self) -> None:
        """The requests read so far are the last ones, and the client may be sending more."""
        self._end_after_last()
        self._lingers = True
        self._discard_rest()

    def _end_after_last(self) -> None:
        last = self._queue[-1] if self._queue else self._current
        assert last
        last.keep_alive = False

    def _discard_rest(self) -> None:
        """Discards further input, so that a client which is still sending does not block."""
        self._is_deaf = True
        self._resume_reading()

    def _pause_reading(self) -> None:
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if not self._transport.is_closing() and not self._half_closed:
            self._transport.resume_reading()

    # Answering.

    def _enqueue(self, exchange: Exchange) -> None:
        if self._current is None:
            self._begin(exchange)
        else:
            self._queue.append(exchange)

    def _begin(self, exchange: Exchange) -> None:
        self._current = exchange
        if exchange.request_complete:
            self._slot.work()
        else:
            self._slot.wait()
        task = self._loop.create_task(exchange.run(self._app))
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def answered(self, exchange: Exchange) -> None:
        """The exchange's answer is complete."""
        self._state.total_requests += 1
        self.hold(0)
        if exchange.request_complete or self._is_deaf:
            self._next()
        elif not exchange.keep_alive:
            self._lingers = True
            self._discard_rest()
            self._finish()
        else:
            # The unread rest of its body comes before the next request.
            self._resume_reading()
        self._set_timer()

    def _next(self) -> None:
        exchange, self._current = self._current, None
        assert exchange
        if self._queue:
            self._begin(self._queue.popleft())
        elif not exchange.keep_alive or self._is_deaf or self._half_closed or self._ending:
            self._finish()
        else:
            self._ready_since = self._loop.time()
            self._slot.wait()

    def _finish(self) -> None:
        """Ends the connection once the client has read everything, or its time for that is up."""
        if self._end or self._transport.is_closing():
            return
        if self._lingers and not self._is_tls and not self._half_closed:
            with suppress(OSError):
                self._transport.write_eof()
            self._end = self._loop.call_later(LINGER_SECONDS, self._close)
        else:
            self._close()

    def _close(self) -> None:
        self._transport.close()
        self._watch_reading()

    def write(self, data: bytes | memoryview) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)
            if self._half_closed:
                self._look_for_reset(0)

    async def drain(self) -> None:
        """Waits until the client has read enough for more to be written, or the connection is closed. What a stream's
        application holds in the meantime counts as held, too: its bytes may be generated faster than they are read."""
        self._count_unread()
        while not self._writable.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(COUNT_SECONDS):
                    await self._writable.wait()
            self._count_unread()

    def _count_unread(self) -> None:
        if self._current and (self._slot.unsent or self._transport.get_write_buffer_size()):
            unread = self._current.scope["state"].get("unread_bytes")
            self._slot.hold(self._held + (unread() if unread else 0))

    async def flush(self) -> None:
        """Waits until the kernel has all that was written, or the connection is closed."""
        if not self._transport.is_closing():
            # Pauses at once if any is left. Over TLS a limit of 0 would pause for ever.
            self._transport.set_write_buffer_limits(high=1)
        await self.drain()
        if not self._transport.is_closing():
            self._transport.set_write_buffer_limits()

    def hold(self, unsent: int) -> None:
        """So many bytes of an answer are held until they are sent."""
        self._held = unsent
        self._slot.hold(unsent)

    def body_taken(self) -> None:
        self._resume_reading()

    def abort(self) -> None:
        self._transport.abort()

    @property
    def default_headers(self) -> Iterable[tuple[bytes, bytes]]:
        return self._state.default_headers

    @property
    def is_last(self) -> bool:
        """Whether the connection ends with the current answer: in a drain, once all requests that were read have
        theirs."""
        return self._connections.is_draining() and not self._queue

    def shutdown(self) -> None:
        """Stops reading requests; those already read are answered."""
        self._ending = True
        if self._current is None:
            self._finish()
        else:
            self._end_after_last()
            if self._reading == "nothing":
                self._discard_rest()

    # Time.

    def _set_timer(self) -> None:
        """Sets one timer for the client's next deadline."""
        due = self._due()
        if due == self._timer_for:
            return
        if self._timer:
            self._timer.cancel()
        self._timer_for = due
        self._timer = self._loop.call_at(due[1], self._late, due[0]) if due else None

    def _due(self) -> tuple[Reason, float] | None:
        limits = self._limits
        if self._is_deaf or self._transport.is_closing():
            return None
        if self._current is not None:
            if self._current.request_complete:
                return None
            return "request_timeout", self._current.began + limits.request_timeout
        if self._reading == "head":
            return "head_timeout", self._began + min(limits.head_timeout, limits.request_timeout)
        if self._is_first:
            return "head_timeout", self._ready_since + limits.head_timeout
        return "idle_timeout", self._ready_since + limits.idle_timeout

    def _late(self, reason: Reason) -> None:
        self._connections.ended[reason] += 1
        limits = self._limits
        if reason == "request_timeout" and self._incoming:
            self._discard_rest()
            self._give_up(self._incoming, request_timeout(limits.request_timeout))
        elif reason == "head_timeout" and self._reading == "head":
            self._answer_refusal(request_timeout(limits.head_timeout))
        else:
            self._finish()

    def _watch_reading(self) -> None:
        """From now on the client must read at a minimum rate, until it has caught up or the connection is closed."""
        if self._stall:
            self._stall.cancel()
        unread = self._transport.get_write_buffer_size()
        self._stall = self._loop.call_later(self._limits.write_timeout, self._check_reading, unread)

    def _check_reading(self, unread: int) -> None:
        left = self._transport.get_write_buffer_size()
        if left and left <= unread - LEAST_READ_BYTES:
            return self._watch_reading()
        self._connections.ended["write_timeout"] += bool(left)
        self._transport.abort()

    def _look_for_reset(self, attempt: int) -> None:
        if self._transport.is_closing():
            return
        if attempt and self._socket.fileno() >= 0 and self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            return self._transport.abort()
        if self._probe:
            self._probe.cancel()
        seconds = PROBES_SECONDS[attempt] if attempt < len(PROBES_SECONDS) else 1.0
        self._probe = self._loop.call_later(seconds, self._look_for_reset, attempt + 1)


def invalid_http(why: str) -> ApiError:
    return ApiError(400, f"the request is not valid HTTP: {why}", code="invalid_http")


def _address(address: Any) -> tuple[str, int] | None:
    return (str(address[0]), int(address[1])) if isinstance(address, tuple) else None
