"""The open connections: their limits, and which one gives way to a new one, or to another's answer."""

import logging
import resource
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from ..addresses import is_in, parse_address
from ..settings import ServerSettings

log = logging.getLogger("fastblt.server")

Reason = Literal["head_timeout", "request_timeout", "idle_timeout", "write_timeout", "unread", "displaced", "refused"]
"""Why the server ended or refused a connection."""
REASONS: tuple[Reason, ...] = get_args(Reason)
OTHER_FILES = 128
"""Descriptors reserved for everything else: the event loop, the engine's sockets, files of the page, and
connections that have given way and are not closed yet."""
LEAST_UNSENT_BYTES = 256 << 20
BYTES_PER_SCORE = 512
"""Room for answers: of the largest, some sixteen fit."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits on one client. Times are in seconds."""

    header_bytes: int
    headers: int
    head_timeout: float
    request_timeout: float
    idle_timeout: float
    write_timeout: float

    @classmethod
    def of(cls, settings: ServerSettings) -> "HttpLimits":
        return cls(
            settings.max_header_bytes,
            settings.max_headers,
            settings.head_timeout,
            settings.request_timeout,
            settings.idle_timeout,
            settings.write_timeout,
        )


class Slot:
    """The place of one connection, from its acceptance to its end.

    While the server waits for its client (for a TLS handshake, a next request, the rest of one), it may be closed in
    favour of a new connection, the longest wait first. While an answer waits for its client to read, it may be closed
    in favour of another's answer.
    """

    __slots__ = ("_connections", "address", "close", "released", "unsent")

    def __init__(self, connections: "Connections", address: str, close: Callable[[], object]) -> None:
        self._connections = connections
        self.address = address
        self.close = close
        """Ends the connection at once."""
        self.released = False
        self.unsent = 0
        """Bytes held for the client to read."""

    def hold(self, unsent: int) -> None:
        """So many bytes, and no others, are held for the client to read."""
        if not self.released:
            self._connections._hold(self, unsent)

    def wait(self) -> None:
        """The server waits for the client from now on."""
        if not self.released:
            self._connections._wait(self)

    def work(self) -> None:
        """The client waits for the server from now on."""
        self._connections._work(self)

    def release(self) -> None:
        """The connection is closed. May be called again."""
        self._connections._release(self)


class _Address:
    """The connections of one address: how many, and those that wait for their client, or for it to read, longest
    first."""

    __slots__ = ("count", "sending", "unsent", "waiting")

    def __init__(self) -> None:
        self.count = 0
        self.waiting: dict[Slot, None] = {}
        self.sending: dict[Slot, None] = {}
        self.unsent = 0


class Connections:
    """Counts connections, in all and by address, and makes room for new ones."""

    def __init__(self, settings: ServerSettings, is_draining: Callable[[], bool] = lambda: False) -> None:
        """is_draining: whether the server takes no new requests, so that its clients should connect to another."""
        self.is_draining = is_draining
        self.capacity = settings.max_connections
        self._per_address = settings.max_connections_per_address
        self.unsent_capacity = max(LEAST_UNSENT_BYTES, BYTES_PER_SCORE * settings.max_scores)
        self._exempt = settings.trusted_proxies
        self._addresses: dict[str, _Address] = {}
        self._waiting: dict[Slot, None] = {}
        self.count = 0
        self.unsent = 0
        """Bytes held for clients to read."""
        self.ended = Counter[Reason]()
        """Connections that the server ended or refused, by reason."""

    def fit_to_open_files(self) -> None:
        """Raises the process's limit of open files as far as allowed, and lowers the capacity if that is not enough."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = self.capacity + OTHER_FILES
        if soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < wanted:
            self.capacity = max(soft - OTHER_FILES, 1)
            log.warning(
                "at most %d connections, below --max-connections: this process may open %d files (ulimit -n)",
                *(self.capacity, soft),
            )

    def enter(self, address: str, close: Callable[[], object]) -> Slot | None:
        """A slot for a new connection, which waits for its client; None if all others have requests running."""
        known = self._addresses.get(address)
        if known and known.count >= self._per_address and not is_in(parse_address(address), self._exempt):
            room = self._displace(known.waiting)
        else:
            room = self.count < self.capacity or self._displace(self._waiting)
        if not room:
            self.ended["refused"] += 1
            return None
        slot = Slot(self, address, close)
        self.count += 1
        self._addresses.setdefault(address, _Address()).count += 1
        self._wait(slot)
        return slot

    def displace_one(self) -> bool:
        """Ends the connection that has waited longest for its client, if any waits."""
        return self._displace(self._waiting)

    def _displace(self, waiting: dict[Slot, None]) -> bool:
        slot = next(iter(waiting), None)
        if slot is None:
            return False
        self._end(slot, "displaced")
        return True

    def _end(self, slot: Slot, reason: Reason) -> None:
        self._release(slot)
        self.ended[reason] += 1
        slot.close()

    def _hold(self, slot: Slot, unsent: int) -> None:
        """If there is no room, answers of the address that holds most give way, the longest unread first."""
        self._change(slot, unsent)
        while self.unsent > self.unsent_capacity:
            most = max(self._addresses.values(), key=lambda address: address.unsent)
            self._end(next(iter(most.sending)), "unread")

    def _change(self, slot: Slot, unsent: int) -> None:
        address = self._addresses[slot.address]
        more = unsent - slot.unsent
        slot.unsent = unsent
        address.unsent += more
        self.unsent += more
        if unsent:
            address.sending[slot] = None
        else:
            address.sending.pop(slot, None)

    def _wait(self, slot: Slot) -> None:
        self._work(slot)
        self._waiting[slot] = self._addresses[slot.address].waiting[slot] = None

    def _work(self, slot: Slot) -> None:
        if slot in self._waiting:
            del self._waiting[slot], self._addresses[slot.address].waiting[slot]

    def _release(self, slot: Slot) -> None:
        if slot.released:
            return
        self._work(slot)
        self._change(slot, 0)
        slot.released = True
        self.count -= 1
        address = self._addresses[slot.address]
        address.count -= 1
        if not address.count:
            del self._addresses[slot.address]
