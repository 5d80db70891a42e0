"""What goes to a replica."""

from dataclasses import dataclass, replace
from typing import Any

from server.origin import Origin


@dataclass(frozen=True)
class Call:
    """A complete HTTP request on its way to a replica."""

    scope: dict[str, Any]
    """ASGI's, as far as it can be sent."""
    body: bytes
    prefix: bytes | None = None
    """The prefix that chooses the replica; None chooses by load alone."""
    replica: str | None = None
    """The id of the only replica allowed to answer."""
    origin: Origin | None = None
    """Of a completion, which another replica can continue."""
    avoided: frozenset[str] = frozenset()
    """Ids of replicas that were lost with it: chosen last, as the router may not know of their end yet."""

    def again(self, origin: Origin | None, lost: str | None) -> "Call":
        """The same after that replica was lost."""
        return replace(self, origin=origin, avoided=self.avoided | ({lost} if lost else set()))
