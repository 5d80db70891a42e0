"""Repairs of the fleet undone: what its simulation must find. Each is as the code was, or would naively be."""

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from unittest import mock

import msgspec

from clients.fastblt_client import Parts
from deploy.ray_balance import Balance
from deploy.ray_call import Call
from deploy.ray_journal import Journal
from deploy.ray_relay import Relay, ReplicaLost
from engine.types import Event, Request
from server import admission, generation
from server.choice import Piece
from server.generation import Generation
from server.origin import Origin

from .world import Plant

_so_far = Relay._so_far
_from_a_replica = Relay._from_a_replica
_feed = Generation._feed
_with_less_time = generation._with_less_time


def _another_seed(self: Relay, origin: Origin, is_continued: bool) -> Origin:
    """Each replica draws for itself."""
    return replace(_so_far(self, origin, is_continued), seed=origin.seed + 1)


def _anew(self: Relay, origin: Origin, is_continued: bool) -> Origin:
    """A replica gets the whole timeout."""
    return replace(_so_far(self, origin, is_continued), age=0.0)


def _forgets_shown(self: Journal | Parts) -> None:
    """What the client has is told again as if it had not."""


def _is_full(self: Balance) -> float | None:
    """Whoever comes."""
    now = self._clock()
    known = list(self._replicas.values())
    return 1.0 if known and all(one.is_full(now) for one in known) else None


def _begins_with_what_was_told(self: Generation, index: int, event: Event) -> Piece:
    """A continued request leaves its line before it had its turn."""
    if index not in self._begun:
        self._begun.add(index)
        self._ticket.begun()
    return _feed(self, index, event)


async def _answers_twice(self: Relay, call: Call, deadline: float) -> None:
    """A replica that is lost after its last word is lost with the request."""
    try:
        await _from_a_replica(self, call, deadline)
    except ReplicaLost:
        self._is_whole = False
        raise


def _never_ends(self: Balance, number: int) -> None:
    """Calls that have their answers go on counting."""


def _all_the_grace(request: Request, seconds: float) -> Request:
    """Each replica gives its engine the whole time after a deadline."""
    less = _with_less_time(request, seconds)
    return less if less.timeout is None else msgspec.structs.replace(less, timeout=max(less.timeout, 0.0))


def _undo(owner: type, **instead: object) -> AbstractContextManager[object]:
    return mock.patch.multiple(owner, **instead)


PLANTS: dict[str, Plant] = {
    "the same seed": partial(_undo, Relay, _so_far=_another_seed),
    "the rest of the timeout": partial(_undo, Relay, _so_far=_anew),
    "the rest of the grace": partial(mock.patch.object, generation, "_with_less_time", _all_the_grace),
    "what the client has": partial(_undo, Journal, show=_forgets_shown),
    "a full queue of several keys": partial(_undo, Balance, full=_is_full),
    "turns between keys": partial(mock.patch.object, admission, "LOOKAHEAD", 1 << 30),
    "the turn of a continued request": partial(_undo, Generation, _feed=_begins_with_what_was_told),
    "one answer": partial(_undo, Relay, _from_a_replica=_answers_twice),
    "what a client has of a broken stream": partial(_undo, Parts, begin_again=_forgets_shown),
    "calls that have ended": partial(_undo, Balance, ended=_never_ends),
}
