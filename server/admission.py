"""Admission: bounds on waiting sequences, limits of each tenant, and no request while the server drains."""

import asyncio

from .body_room import BodyRoom
from .errors import ApiError, Code
from .settings import ServerSettings
from .tenants import Name, Tenant


class Ticket:
    """The place of one request, held from admission until its response is complete."""

    def __init__(self, gate: "Gate", tenant: Tenant | None, num_sequences: int, prompt_bytes: int) -> None:
        self._gate = gate
        self._tenant = tenant
        self._waiting = num_sequences
        self._prompt_bytes = prompt_bytes
        self._open = True

    def begun(self) -> None:
        """One of its sequences has its first event and no longer waits."""
        if self._waiting:
            self._waiting -= 1
            self._gate.waiting -= 1
            if not self._waiting:
                self._read()

    def generated(self, num_bytes: int) -> None:
        """So many bytes were generated for it."""
        if self._tenant:
            self._tenant.generated(num_bytes)

    def close(self) -> None:
        """May be called again."""
        if self._open:
            self._open = False
            self._gate.waiting -= self._waiting
            self._waiting = 0
            self._read()
            self._gate._leave(self._tenant)

    def _read(self) -> None:
        """Its prompts no longer wait."""
        if self._tenant:
            self._tenant.queued_bytes -= self._prompt_bytes
        self._prompt_bytes = 0


class Gate:
    """Counts in the server's process, so that a burst is refused at once and not at the engine's next report."""

    def __init__(self, settings: ServerSettings) -> None:
        self.capacity = settings.max_queue
        self.bodies = BodyRoom(settings.max_body_bytes, settings.retry_after)
        self._settings = settings
        self._headers = {"retry-after": str(settings.retry_after)}
        self._num_requests = 0
        self._tenants: dict[Name, Tenant] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self.waiting = 0
        """Sequences without a first event."""
        self.draining = False

    def enter(self, num_sequences: int, name: Name | None = None, prompt_bytes: int = 0) -> Ticket:
        """name: of the request's tenant; without one no limits of a tenant hold.

        Raises ApiError 429 if the queue is full or the tenant is above a limit, 503 while draining.
        """
        self.check(name, prompt_bytes)
        if self.waiting + num_sequences > self.capacity:
            message = f"the queue is full: {self.waiting} sequences wait of at most {self.capacity}; try again later"
            raise ApiError(429, message, code="queue_full", headers=self._headers)
        self.waiting += num_sequences
        self._num_requests += 1
        self._idle.clear()
        tenant = None if name is None else self._tenant(name)
        if tenant:
            tenant.requests += 1
            tenant.queued_bytes += prompt_bytes
        return Ticket(self, tenant, num_sequences, prompt_bytes)

    def check(self, name: Name | None = None, prompt_bytes: int = 0) -> None:
        """What `enter` checks but for the queue."""
        self.check_open()
        if name is not None and (tenant := self._tenants.get(name)):
            tenant.check(prompt_bytes)

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

    def _tenant(self, name: Name) -> Tenant:
        if name not in self._tenants:
            # Keys may be replaced for ever.
            self._tenants = {name: tenant for name, tenant in self._tenants.items() if not tenant.is_idle}
            self._tenants[name] = Tenant(name, self._settings)
        return self._tenants[name]

    def _leave(self, tenant: Tenant | None) -> None:
        if tenant:
            tenant.requests -= 1
        self._num_requests -= 1
        if not self._num_requests:
            self._idle.set()
