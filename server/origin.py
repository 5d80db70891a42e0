"""What a completion keeps when another server continues it, because the one that began it is gone.

No HTTP request reaches this: it is part of the ASGI scope of a program that runs the application itself.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from starlette.types import Scope

from engine.types import Event

EventsBySequence = Mapping[int, Sequence[Event]]
"""By the index of a sequence."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a completion began, and how far its answer has come."""

    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    seed: int = field(default_factory=lambda: secrets.randbits(64))
    """Fixes the seeds of prompts that were given none."""
    attempt: int = 0
    """How many servers were sent it before."""
    is_continued: bool = False
    """Whether another server has admitted it. It is not refused for want of room."""
    passes_on: bool = False
    """Whether another server is asked if this one refuses it for now."""
    age: float = 0.0
    """Seconds since it arrived there."""
    first_byte_seconds: float | None = None
    """When its first byte came there, after its arrival."""
    shown: EventsBySequence = field(default_factory=dict)
    """Events whose pieces the client has."""
    held: EventsBySequence = field(default_factory=dict)
    """Events after these, whose pieces the client has not."""
    model: str = ""
    """Fingerprint of the model that told these events; empty if there are none."""
    note: Callable[[int, Event], None] | None = None
    """Sees every event, with its sequence's index, before its piece is sent."""

    @property
    def attempt_id(self) -> str:
        """Unlike that of another attempt, which the same engine may still be ending."""
        return f"{self.id}.{self.attempt}" if self.attempt else self.id

    def all_events(self, index: int) -> list[Event]:
        """All events of a sequence so far."""
        return [*self.shown.get(index, ()), *self.held.get(index, ())]


def origin_of(scope: Scope) -> Origin:
    """A new one, unless the program that runs the application gave one."""
    origin: Origin | None = scope["state"].get("origin")
    return origin or Origin()
