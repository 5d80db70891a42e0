"""Repairs undone: what the simulation must find. Each is as the code was, or would naively be."""

from collections.abc import Collection, Iterable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from unittest import mock

from engine import scheduler, waiting
from engine.engine import Engine
from engine.process import streams
from engine.process.client import EngineClient
from engine.process.streams import Stream
from engine.process.trials import Trials
from engine.scheduler import Scheduler
from engine.sequence import Sequence

from .world import Plant

MOST_CRASHES = 4
"""In its life, after which a client gives up."""


def _blames_all(self: Trials, those: Iterable[Stream]) -> list[Stream]:
    """Whatever was in flight in two crashes is given up."""
    flying = [stream for stream in those if stream.sent]
    for stream in flying:
        stream.fruitless_crashes += 1
        stream.sent = False
    return [stream for stream in flying if stream.fruitless_crashes >= 2]


_note_crash = EngineClient._note_crash


def _gives_up(self: EngineClient, exit_code: int) -> None:
    """By count, whatever was written between."""
    _note_crash(self, exit_code)
    if self.restarts >= MOST_CRASHES - 1:
        self._die("the engine has crashed too often")


_due = Trials.due


def _one_by_one(self: Trials, those: Collection[Stream]) -> list[Stream]:
    """Each stream waits for the first event of the one before it, and long ones come first."""
    if any(stream.sent and stream.silent for stream in those):
        return []
    return _due(self, those)[-1:]


def _never_expires(self: Engine) -> None:
    """Deadlines are left to the client, which waits for the engine's grace."""


def _keeps_none(self: Scheduler, num_rounds: int) -> int:
    """Those that generate may have all rows of a step."""
    return 0


def _newest(self: Sequence) -> tuple[int, int]:
    """Among those of a priority, the last that came goes first."""
    return self.request.priority, -self.arrival


def _arrives(self: Scheduler, sequence: Sequence) -> None:
    sequence.due = self._steps
    self.waiting.add(sequence)


def _place(sequence: Sequence, *, short_first: bool) -> waiting.Place:
    return (sequence.remaining, *sequence.order) if short_first else sequence.order


def _ignores_priorities() -> AbstractContextManager[object]:
    with ExitStack() as stack:
        stack.enter_context(_undo(Scheduler, add=_arrives))
        for module in (scheduler, waiting):
            stack.enter_context(mock.patch.object(module, "place", _place))
        return stack.pop_all()


def _undo(owner: type, **instead: object) -> AbstractContextManager[object]:
    return mock.patch.multiple(owner, **instead)


PLANTS: dict[str, Plant] = {
    "blame": partial(_undo, Trials, crashed=_blames_all),
    "giving up": partial(_undo, EngineClient, _note_crash=_gives_up),
    "order of resuming": partial(_undo, Trials, due=_one_by_one, is_over=False),
    "deadlines over a frozen engine": partial(mock.patch.object, streams, "GRACE_SECONDS", 1e9),
    "deadlines in the engine": partial(_undo, Engine, _expire=_never_expires),
}

UNFAIR: dict[str, Plant] = {
    "the newest first": partial(_undo, Sequence, order=property(_newest)),
    "no rows for prompts": partial(_undo, Scheduler, _kept_for_prompts=_keeps_none),
    "priorities ignored": _ignores_priorities,
}
"""A scheduler that lets some wait too long, though all ends."""
