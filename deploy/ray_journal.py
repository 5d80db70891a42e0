"""What a replica has told of a completion, as another one needs it to continue."""

import msgspec

from engine.process.streams import Merged
from engine.types import Delta, Event
from server.origin import EventsBySequence

decode = msgspec.msgpack.Decoder(Event).decode


class Journal:
    """Events of a completion: those whose pieces the client has, and those after them. Deltas are kept as one for each
    sequence, so it grows with the text and not with the number of events."""

    def __init__(self) -> None:
        self._shown: dict[int, _Sequence] = {}
        self._held: dict[int, _Sequence] = {}
        self.has_shown_bytes = False

    def hold(self, told: list[tuple[int, bytes]]) -> None:
        """Takes what a replica has told, encoded."""
        for index, encoded in told:
            self._held.setdefault(index, _Sequence()).add(decode(encoded))

    def show(self) -> None:
        """The client got what was made of all events so far."""
        for index, sequence in self._held.items():
            self.has_shown_bytes |= sequence.has_ids
            if index in self._shown:
                for event in sequence.events():
                    self._shown[index].add(event)
            else:
                self._shown[index] = sequence
        self._held = {}

    def shown(self) -> EventsBySequence:
        return {index: sequence.events() for index, sequence in self._shown.items()}

    def held(self) -> EventsBySequence:
        return {index: sequence.events() for index, sequence in self._held.items()}


class _Sequence:
    """Events of one sequence."""

    def __init__(self) -> None:
        self._id = ""
        self._deltas = Merged()
        self._last: Event | None = None
        self.has_ids = False

    def add(self, event: Event) -> None:
        self._id = event.id
        if isinstance(event, Delta):
            self._deltas.add(event)
            self.has_ids |= bool(event.ids)
        else:
            self._last = event

    def events(self) -> list[Event]:
        """At most two. They do not change with what comes later."""
        events: list[Event] = []
        if not self._deltas.empty:
            delta = self._deltas.delta(self._id)
            self._deltas = Merged()
            self._deltas.add(delta)
            events.append(delta)
        return [*events, self._last] if self._last else events
