"""Which requests a new engine gets after a crash, and when; and which one is to blame.

After the first crash no request is a suspect: all come back together. A request that was in flight during two crashes
in a row, and of which no engine told anything between them, is a suspect. Suspects come back last, in groups, each once
all before it have shown an event. A group that crashes the engine again is halved, until a suspect is alone; then it is
tried before all others, in an engine that has nothing else. Only one that was alone in three crashes is given up, so
that no request fails for what another does, nor for a machine that kills engines now and then.
"""

from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

from .streams import Stream

SUSPECT_CRASHES = 2
LONE_CRASHES = 3


class Group(NamedTuple):
    """Suspects that are tried together."""

    members: list[Stream]
    crashed: bool
    """Whether it is what was left of a group that crashed an engine."""


class Trials:
    """The suspects, and the order in which streams are sent."""

    def __init__(self) -> None:
        self._groups: deque[Group] = deque()
        self._on_trial: list[Stream] = []
        self._back: list[Stream] = []
        """Those that came back unsuspected, and of which the new engine has told nothing yet."""

    @property
    def is_over(self) -> bool:
        """Whether there is no suspect: streams are then sent as they come."""
        return not (self._groups or self._on_trial)

    def crashed(self, streams: Iterable[Stream]) -> list[Stream]:
        """Takes note of a crash while these were in flight. Returns those that are given up."""
        silent = []
        for stream in streams:
            if stream.sent:
                stream.fruitless_crashes += 1
                if stream.silent:
                    silent.append(stream)
            stream.sent = False
        tried = [stream for stream in self._on_trial if stream.silent]
        suspects = [s for s in silent if s not in tried and s.fruitless_crashes >= SUSPECT_CRASHES]
        self._on_trial, self._back = [], []
        self._groups.extend(_halves(suspects, crashed=False))
        if len(tried) == 1 and tried == silent:
            tried[0].lone_crashes += 1
            if tried[0].lone_crashes == LONE_CRASHES:
                return tried
        self._groups.extendleft(reversed(_halves(tried, crashed=True)))
        return []

    def due(self, streams: Collection[Stream]) -> list[Stream]:
        """Which of these, all that are in flight, to send now: to be asked when an engine is ready, and while there are
        suspects when a stream comes, shows its first event or ends. The shortest come first."""
        alive = set(streams)
        groups = (Group([s for s in group.members if s in alive], group.crashed) for group in self._groups)
        self._groups = deque(group for group in groups if group.members)
        self._on_trial = [stream for stream in self._on_trial if stream in alive and stream.silent]
        self._back = [stream for stream in self._back if stream in alive and stream.silent]
        if len(self._on_trial) == 1:
            return []
        first = self._groups[0] if self._groups else None
        if first and first.crashed and len(first.members) == 1 and not any(stream.sent for stream in streams):
            return self._try()
        suspects = {stream for group in self._groups for stream in group.members}
        others = [stream for stream in streams if not stream.sent and stream not in suspects]
        if others:
            self._back += [stream for stream in others if stream.fruitless_crashes]
            return sorted(others, key=_length)
        if first and not self._back and not self._on_trial:
            return self._try()
        return []

    def _try(self) -> list[Stream]:
        self._on_trial = self._groups.popleft().members
        return sorted(self._on_trial, key=_length)


def _length(stream: Stream) -> int:
    return stream.length


def _halves(streams: list[Stream], *, crashed: bool) -> list[Group]:
    """Two groups; one for a single stream, none for none."""
    middle = (len(streams) + 1) // 2
    return [Group(half, crashed) for half in (streams[:middle], streams[middle:]) if half]
