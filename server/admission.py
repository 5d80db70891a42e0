"""Who may come in: bounds on waiting sequences and on bodies, and nobody while the server drains."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import ApiError, Code
from .settings import ServerSettings

BODIES_AT_ONCE = 64
"""Of the largest size: what all the bodies together that are being read may take."""


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
    """Counts on this side of the engine, so that a burst is refused at once and not at the engine's next report."""

    def __init__(self, settings: ServerSettings) -> None:
        self.capacity = settings.max_queue
        self._body_bytes = 0
        self._body_capacity = BODIES_AT_ONCE * settings.max_body_bytes
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

    @contextmanager
    def body(self) -> Iterator[Callable[[int], None]]:
        """Room for a body while it is read and understood: what this gives is told of each piece of it, and raises
        ApiError 429 if all bodies together become too many bytes."""
        held = 0

        def take(size: int) -> None:
            nonlocal held
            if self._body_bytes + size > self._body_capacity:
                message = f"{self._body_bytes} bytes of bodies are being read, of at most {self._body_capacity}"
                raise ApiError(429, f"{message}; try again later", code="queue_full", headers=self._headers)
            held += size
            self._body_bytes += size

        try:
            yield take
        finally:
            self._body_bytes -= held

    def check_open(self) -> None:
        if self.draining:
            raise self.unavailable("the server is shutting down", "draining")

    def unavailable(self, message: str, code: Code) -> ApiError:
        return ApiError(503, message, code=code, headers=self._headers)

    def drain(self) -> None:
        """From now on nobody comes in."""
        self.draining = True

    async def wait_idle(self) -> None:
        """Until every admitted request has had its response."""
        await self._idle.wait()

    def _leave(self) -> None:
        self._num_requests -= 1
        if not self._num_requests:
            self._idle.set()
