"""Admission: bounds on waiting sequences, limits of each tenant and turns between them, no request while draining.

Where several API keys share the engine, it gets only as many requests at once as keep it busy. The others wait here, in
a line for each key. The next turn is of the key that has been served least, by the bytes that it sent and got: the
virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024). A key that comes anew
begins where the others are, so it waits for one turn of each, however much they have sent before.
"""

import asyncio
import math
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from operator import attrgetter

from .body_room import BodyRoom
from .errors import ApiError, Code
from .settings import ServerSettings
from .tenants import Name, Tenant

LOOKAHEAD = 16
"""Sequences without a first event that the engine gets before others must wait for their turn. They fill its steps, and
another key waits for no more than these."""
PACE_SHARE = 0.1
"""Of the pace of the queue that its last movement decides."""
LONGEST_RETRY = 60
"""Seconds: the most that Retry-After asks for."""


@dataclass(eq=False)
class Ticket:
    """The place of one request, held from admission until its response is complete."""

    gate: "Gate"
    tenant: Tenant | None
    waiting: int
    """Sequences without a first event."""
    prompt_bytes: int
    order: tuple[int, int]
    """Among the requests of its tenant: the lowest first."""
    is_admitted: bool
    """By another server, which is gone: its client may have bytes already, so it never gives way."""
    has_turn: bool = field(default=False, init=False)
    """Whether it may run, or has to end."""
    _refusal: ApiError | None = field(default=None, init=False)
    _news: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _open: bool = field(default=True, init=False)

    async def turn(self) -> None:
        """Waits until the request may go to the engine. Raises ApiError 429 if it had to give way."""
        await self._news.wait()
        if self._refusal:
            raise self._refusal

    def give_turn(self, refusal: ApiError | None = None) -> None:
        """Lets it run or, with a refusal, end."""
        self.has_turn, self._refusal = True, refusal
        self._news.set()

    def begun(self) -> None:
        """One of its sequences has its first event and no longer waits."""
        if self.waiting:
            self.gate._stop_waiting(self, 1)

    def generated(self, num_bytes: int) -> None:
        """So many bytes were generated for it."""
        if self.tenant:
            self.tenant.generated(num_bytes)

    def close(self) -> None:
        """May be called again."""
        if self._open:
            self._open = False
            self.gate._leave(self)


class Gate:
    """Counts in the server's process, so that a burst is refused at once and not at the engine's next report."""

    def __init__(self, settings: ServerSettings, is_shared: Callable[[], bool] = lambda: False) -> None:
        """is_shared: whether there are several tenants."""
        self.capacity = settings.max_queue
        self.bodies = BodyRoom(settings.max_body_bytes, settings.retry_after)
        self._settings = settings
        self.is_shared = is_shared
        self._headers = {"retry-after": str(settings.retry_after)}
        self._closing = False
        """Whether the drain is for good."""
        self.num_requests = 0
        """Without a complete response."""
        self._tenants: dict[Name, Tenant] = {}
        self._lines: dict[Tenant, list[Ticket]] = {}
        """Of tenants that wait for a turn: their requests in order."""
        self._ahead = 0
        """Sequences without a first event that had their turn."""
        self._served = 0
        """What the tenant of the last turn had been served before it."""
        self._arrivals = count(1)
        self._idle = asyncio.Event()
        self._idle.set()
        self.waiting = 0
        """Sequences without a first event."""
        self._taken_over = 0
        """Of these, in requests that another server had admitted."""
        self._pace = 0.0
        """Mean seconds between two sequences that stop waiting."""
        self._moved = 0.0
        """When the last one did, or began to wait alone."""
        self.draining = False

    def enter(
        self,
        num_sequences: int,
        name: Name | None = None,
        prompt_bytes: int = 0,
        priority: int = 0,
        *,
        is_admitted: bool = False,
    ) -> Ticket:
        """name: of the request's tenant; without one it has no limits, and its turn at once. is_admitted: by another
        server, so that it is neither refused here nor gives way, nor takes room from what comes here.

        Raises ApiError 429 if the queue is full or the tenant is above a limit, 503 while draining. In a full queue the
        last request of the tenant that waits for most gives way to one that waits for less.
        """
        if not is_admitted:
            self.check(name, prompt_bytes)
        tenant = None if name is None else self._tenant(name)
        if not is_admitted:
            self._make_room(num_sequences, tenant)
        # What came to another server was here before all that wait.
        order = priority, 0 if is_admitted else next(self._arrivals)
        ticket = Ticket(self, tenant, num_sequences, prompt_bytes, order, is_admitted)
        if not self.waiting:
            self._moved = time.monotonic()
        self.waiting += num_sequences
        self._taken_over += num_sequences if is_admitted else 0
        self.num_requests += 1
        self._idle.clear()
        if tenant is None:
            self._ahead += num_sequences
            ticket.give_turn()
            return ticket
        tenant.requests += 1
        tenant.waiting += num_sequences
        tenant.queued_bytes += prompt_bytes
        if tenant not in self._lines:
            self._lines[tenant] = []
            tenant.served = max(tenant.served, self._served)
        insort(self._lines[tenant], ticket, key=attrgetter("order"))
        self._give_turns()
        return ticket

    @property
    def queued(self) -> int:
        """Sequences of `waiting` that count against the capacity."""
        return self.waiting - self._taken_over

    @property
    def in_line(self) -> int:
        """Sequences that wait for the turn of their key."""
        return self.waiting - self._ahead

    def check(self, name: Name | None = None, prompt_bytes: int = 0) -> None:
        """What `enter` checks but for the queue."""
        self.check_open()
        if name is not None and (tenant := self._tenants.get(name)):
            tenant.check(prompt_bytes)

    def check_open(self) -> None:
        if self.draining:
            why = "the server is shutting down" if self._closing else "the server takes no new requests for now"
            # On another connection a proxy may find another server.
            raise ApiError(503, why, code="draining", headers=self._headers | {"connection": "close"})

    def unavailable(self, message: str, code: Code) -> ApiError:
        return ApiError(503, message, code=code, headers=self._headers)

    def drain(self, *, for_good: bool = False) -> None:
        """Refuses every request from now on. for_good: the server shuts down."""
        self.draining = True
        self._closing |= for_good

    def retry_seconds(self, num_sequences: int) -> int:
        """Until the queue should have room for so many, if it moves as it has of late."""
        beyond = max(self.queued + num_sequences - self.capacity, 0)
        return max(min(math.ceil(beyond * self._pace), LONGEST_RETRY), self._settings.retry_after)

    def resume(self) -> None:
        """Ends a drain. Raises ApiError 503 if that is for good."""
        if self._closing:
            self.check_open()
        self.draining = False

    async def wait_idle(self) -> None:
        """Waits until every admitted request has its response."""
        await self._idle.wait()

    def _tenant(self, name: Name) -> Tenant:
        if name not in self._tenants:
            # Keys may be replaced for ever. What a tenant was served counts while others are at work.
            served = self._served if self.num_requests else math.inf
            kept = {n: t for n, t in self._tenants.items() if not t.is_idle or t.served > served}
            self._tenants = kept | {name: Tenant(name, self._settings)}
        return self._tenants[name]

    def _make_room(self, num_sequences: int, tenant: Tenant | None) -> None:
        """Raises ApiError 429 if the queue has no room for so many sequences of the tenant."""
        share = num_sequences + (tenant.waiting if tenant else 0)
        full = f"the queue is full: {self.queued} sequences wait of at most {self.capacity}"
        missing = self.queued + num_sequences - self.capacity
        lines = {of: [t for t in line if not t.is_admitted] for of, line in self._lines.items()} if missing > 0 else {}
        left, going = {of: of.waiting for of, line in lines.items() if line}, list[Ticket]()
        while missing > 0:
            longest = max(left, key=left.__getitem__, default=None)
            if longest is None or left[longest] <= share:
                # And nothing gives way for what is refused all the same.
                raise self._queue_full(f"{full}; try again later", num_sequences)
            going.append(last := lines[longest].pop())
            missing -= last.waiting
            left[longest] -= last.waiting
            if not lines[longest]:
                del left[longest]
        why = f"{full}, and this request gave way to one of another key; try again later"
        for ticket in going:
            refusal = self._queue_full(why, ticket.waiting)
            self._stop_waiting(ticket, ticket.waiting)
            ticket.give_turn(refusal)

    def _queue_full(self, message: str, num_sequences: int) -> ApiError:
        headers = {"retry-after": str(self.retry_seconds(num_sequences))}
        return ApiError(429, message, code="queue_full", headers=headers)

    def _give_turns(self) -> None:
        while self._lines and (self._ahead < LOOKAHEAD or not self.is_shared()):
            tenant = min(self._lines, key=lambda waiting: waiting.served)
            ticket = self._lines[tenant][0]
            self._step_out(ticket)
            self._served = max(self._served, tenant.served)
            tenant.served += ticket.prompt_bytes
            self._ahead += ticket.waiting
            ticket.give_turn()

    def _step_out(self, ticket: Ticket) -> None:
        """Takes a request out of its line."""
        assert ticket.tenant
        line = self._lines[ticket.tenant]
        line.remove(ticket)
        if not line:
            del self._lines[ticket.tenant]

    def _stop_waiting(self, ticket: Ticket, num_sequences: int) -> None:
        """So many sequences of the request wait no longer, whether they have begun or never will."""
        now = time.monotonic()
        self._pace += PACE_SHARE * ((now - self._moved) / num_sequences - self._pace)
        self._moved = now
        ticket.waiting -= num_sequences
        self.waiting -= num_sequences
        self._taken_over -= num_sequences if ticket.is_admitted else 0
        if ticket.tenant:
            ticket.tenant.waiting -= num_sequences
            if not ticket.waiting:
                ticket.tenant.queued_bytes -= ticket.prompt_bytes
        if ticket.has_turn:
            self._ahead -= num_sequences
            self._give_turns()
        elif not ticket.waiting:
            self._step_out(ticket)

    def _leave(self, ticket: Ticket) -> None:
        if ticket.waiting:
            self._stop_waiting(ticket, ticket.waiting)
        if ticket.tenant:
            ticket.tenant.requests -= 1
        self.num_requests -= 1
        if not self.num_requests:
            self._idle.set()
