"""Memory for the bodies being read, over all connections.

Each may be large and come slowly. When the room is full, the body that has been arriving for longest gives way to a new
one, so that bodies which never end block no other.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import ApiError

BODIES_AT_ONCE = 64
"""Bodies of the largest size that fit."""


class HeldBody:
    """One body: its share of the room, and whether it is still arriving."""

    def __init__(self, room: "BodyRoom") -> None:
        self._room = room
        self.size = 0
        self.arrival = asyncio.timeout(None)
        """Surrounds the reading of the body, and ends it if the body has to give way."""

    def take(self, size: int) -> None:
        """Makes room for a piece that came. Raises ApiError 429 if there is none, even after all other arriving bodies
        gave way."""
        self._room.make_room(self, size)
        self.size += size
        self._room.size += size

    def arrived(self) -> None:
        """The body is complete, and no longer gives way."""
        self._room.arriving.pop(self, None)

    def no_room(self) -> ApiError:
        """The error for a body that had to give way."""
        return self._room.full()

    def give_way(self) -> None:
        self.arrived()
        self._room.size -= self.size
        self.size = 0
        self.arrival.reschedule(asyncio.get_running_loop().time())


class BodyRoom:
    def __init__(self, max_body_bytes: int, retry_after: int) -> None:
        self._capacity = BODIES_AT_ONCE * max_body_bytes
        self._retry_after = retry_after
        self.size = 0
        self.arriving: dict[HeldBody, None] = {}
        """Longest first."""

    @contextmanager
    def enter(self) -> Iterator[HeldBody]:
        """Holds the body's room within the block."""
        body = HeldBody(self)
        self.arriving[body] = None
        try:
            yield body
        finally:
            body.arrived()
            self.size -= body.size

    def make_room(self, body: HeldBody, size: int) -> None:
        while self.size + size > self._capacity:
            oldest = next((other for other in self.arriving if other is not body and other.size), None)
            if oldest is None:
                raise self.full()
            oldest.give_way()

    def full(self) -> ApiError:
        message = f"bodies being read already take all {self._capacity} bytes; try again later"
        return ApiError(429, message, code="queue_full", headers={"retry-after": str(self._retry_after)})
