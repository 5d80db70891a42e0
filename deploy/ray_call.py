"""What goes to a replica, and what comes back."""

from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Message

from server.origin import Origin

from .ray_load import Load
from .ray_work import Work


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

    def again(self, origin: Origin | None, lost: str | None) -> "Call":
        """The same after that replica was lost, or refused it."""
        return replace(self, origin=origin, avoided=self.avoided | ({lost} if lost else set()))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "work"}


@dataclass(frozen=True)
class Reply:
    """Part of an answer."""

    replica: str | None = None
    """Its id, in the first part, which comes as soon as it has the call."""
    messages: list[Message] | None = None
    """The application's."""
    load: Load | None = None
    """News of the replica."""
