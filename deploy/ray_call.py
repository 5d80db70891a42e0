"""What goes to a replica, and what comes back."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from server.origin import Origin

from .ray_load import Load
from .ray_work import Work

MOST_ASKED = 8
"""Replicas that may refuse a new request for now before the client is told."""


@dataclass(frozen=True)
class Call:
    """A complete HTTP request on its way to a replica."""

    scope: dict[str, Any]
    """ASGI's, as far as it can be sent."""
    body: bytes
    number: int = 0
    """Of the calls of one ingress."""
    work: Work = Work()
    """It chooses the replica, and stays here."""
    replica: str | None = None
    """The id of the only replica allowed to answer."""
    origin: Origin | None = None
    """Of a completion, which another replica can continue."""
    avoided: frozenset[str] = frozenset()
    """Ids of replicas that were lost with it, or refused it: chosen last."""
    made: float = field(default_factory=lambda: time.monotonic(), init=False, compare=False, repr=False)
    """When, by this process' clock."""

    def is_new_to(self, replica: str | None) -> bool:
        """Whether it had not refused the call yet, and others may still be asked: all of them for what was admitted."""
        is_continued = self.origin is not None and self.origin.is_continued
        return replica not in self.avoided and (is_continued or len(self.avoided) < MOST_ASKED - 1)

    def again(self, origin: Origin | None, lost: str | None) -> "Call":
        """The same after that replica was lost, or refused it."""
        return replace(self, origin=origin, avoided=self.avoided | ({lost} if lost else set()))

    def __getstate__(self) -> dict[str, Any]:
        """Of a call that is sent now: it may have waited for a replica, which is part of the request's time."""
        state = {name: value for name, value in vars(self).items() if name not in ("work", "made")}
        if self.origin:
            state["origin"] = replace(self.origin, age=self.origin.age + time.monotonic() - self.made)
        return state


class Reply(msgspec.Struct, frozen=True, array_like=True):
    """Part of an answer. It travels as bytes: to pickle an object of a class takes Ray longer than all else."""

    replica: str | None = None
    """Its id, in the first part, which comes as soon as it has the call."""
    messages: list[Any] | None = None
    """The application's."""
    load: Load | None = None
    """News of the replica."""


encode_reply = msgspec.msgpack.Encoder().encode
decode_reply = msgspec.msgpack.Decoder(Reply).decode
