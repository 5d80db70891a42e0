"""The port: accepts connections and gives each its own protocol."""

import asyncio
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress

from ..errors import ApiError
from ..responses import to_json
from .connections import Connections, Slot

log = logging.getLogger("fastblt.server")

BACKLOG = 2048
ACCEPTED_AT_ONCE = 32
"""Most connections accepted per turn of the event loop."""
PAUSE_SECONDS = 0.1
"""Delay before the next try, when there is no descriptor or no memory for a connection."""
SEND_BUFFER = 256 << 10
"""Bytes of an answer that the kernel buffers, instead of megabytes, so that a client that does not read is noticed."""
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}
"""Detects within two minutes that a client's machine is gone, where the platform has these options."""

EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

MakeProtocol = Callable[[Slot, socket.socket], asyncio.Protocol]


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet. Raises OSError, whose `strerror` is for the operator."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit these.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                bound.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        bound.bind(address)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            error.strerror = "the port is already in use"
        raise
    return bound


class Listener:
    """Accepts connections, over TLS if there is a context for it, until it is closed."""

    def __init__(
        self,
        bound: socket.socket,
        tls: ssl.SSLContext | None,
        handshake_timeout: float,
        retry_after: int,
        connections: Connections,
        make_protocol: MakeProtocol,
    ) -> None:
        self.socket = bound
        self._tls = tls
        self._handshake_timeout = handshake_timeout
        self._connections = connections
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pause: asyncio.TimerHandle | None = None
        self._closed = False
        error = ApiError(503, "all connections are in use; try again later", code="too_many_connections")
        body = to_json(error.body)
        head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
        self._refusal = f"{head}\r\nretry-after: {retry_after}\r\nconnection: close\r\n\r\n".encode() + body

    def start(self) -> None:
        """Raises OSError if another process listens on the port already."""
        self.socket.setblocking(False)
        try:
            self.socket.listen(BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                error.strerror = "the port is already in use"
            raise
        self._loop.add_reader(self.socket, self._accept)

    def close(self) -> None:
        """Accepts no more connections. May be called again."""
        if not self._closed:
            self._closed = True
            if self._pause:
                self._pause.cancel()
            self._loop.remove_reader(self.socket)
            self.socket.close()
            for task in self._tasks:
                task.cancel()

    async def wait_closed(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                accepted, address = self.socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # If descriptors or memory are missing, close a connection that waits for its client.
                if error.errno not in EXHAUSTED or not self._connections.displace_one():
                    log.warning("no connection can be accepted: %s", error.strerror)
                self._loop.remove_reader(self.socket)
                self._pause = self._loop.call_later(PAUSE_SECONDS, self._loop.add_reader, self.socket, self._accept)
                return
            self._begin(accepted, str(address[0]))

    def _begin(self, accepted: socket.socket, address: str) -> None:
        accepted.setblocking(False)
        slot = self._connections.enter(address, accepted.close)
        if slot is None:
            with accepted, suppress(OSError):
                if not self._tls:
                    accepted.send(self._refusal)
            return
        task = self._loop.create_task(self._connect(slot, accepted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, slot: Slot, accepted: socket.socket) -> None:
        task = asyncio.current_task()
        if slot.released or not task:
            # The slot was taken before this started.
            return
        slot.close = task.cancel
        timeout = self._handshake_timeout if self._tls else None
        try:
            await self._loop.connect_accepted_socket(
                lambda: self._make_protocol(slot, accepted), accepted, ssl=self._tls, ssl_handshake_timeout=timeout
            )
        except (OSError, asyncio.CancelledError) as error:
            log.debug("a connection failed: %s", error)
            if isinstance(error, ConnectionAbortedError):
                # Both event loops report a slow handshake this way.
                self._connections.ended["head_timeout"] += 1
            slot.release()
            accepted.close()
