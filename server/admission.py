"""Admission: bounds on waiting sequences, and no request while the server drains."""

import asyncio

from .body_room import BodyRoom
from .errors import ApiError, Code
from .settings import ServerSettings


class Ticket:
    """The place of one request, held from admission until its response is complete."""

    def __init__(self, gate: "Gate", num_sequences: int) -> None:
        self._gate = gate
        self._waiting = num_sequences
        self._open = True

    def begun(self) -> None:
        """One of its sequences has its first event and no longer waits."""
        if self._waiting:
            self._waiting -= 1
            self._gate.waiting -= 1

    def close(self) -> None:
        """May be called again."""
        if self._open:
            self._open = False
            self._gate.waiting -= self._waiting
            self._waiting = 0
            self._gate._leave()


class Gate:
    """Counts in the server's process, so that a burst is refused at once and not at the engine's next report."""

    def __init__(self, settings: ServerSettings) -> None:
        self.capacity = settings.max_queue
        self.bodies = BodyRoom(settings.max_body_bytes, settings.retry_after)
        self._headers = {"retry-after": str(settings.retry_after)}
        self._num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.waiting = 0
        """Sequences without a first event."""
        self.draining = False

    def enter(self, num_sequences: int) -> Ticket:
        """Raises ApiError 429 if the queue is full, 503 while draining."""
        self.check_open()
        if self.waiting + num_sequences > self.capacity:
            message = f"the queue is full: {self.waiting} sequences wait of at most {self.capacity}; try again later"
            raise ApiError(429, message, code="queue_full", headers=self._headers)
        self.waiting += num_sequences
        self._num_requests += 1
        self._idle.clear()
        return Ticket(self, num_sequences)

    def check_open(self) -> None:
        if self.draining:
            raise self.unavailable("the server is shutting down", "draining")

    def unavailable(self, message: str, code: Code) -> ApiError:
        return ApiError(503, message, code=code, headers=self._headers)

    def drain(self) -> None:
        """Refuses every request from now on."""
        self.draining = True

    async def wait_idle(self) -> None:
        """Waits until every admitted request has its response."""
        await self._idle.wait()

    def _leave(self) -> None:
        self._num_requests -= 1
        if not self._num_requests:
            self._idle.set()
