"""Sequences that wait to run, in two orders."""

from collections.abc import Iterator
from typing import TypeAlias

from .ordered import Ordered
from .sequence import Sequence

Place: TypeAlias = tuple[int, ...]


def place(sequence: Sequence, *, short_first: bool) -> Place:
    """By `Sequence.order`; or by priority and remaining rows, and among equals by `Sequence.order`."""
    return (sequence.request.priority, sequence.remaining, *sequence.order) if short_first else sequence.order


class Waiting:
    """Iterates by `Sequence.order`. A sequence's priority, `remaining` and `order` may not change while it waits."""

    def __init__(self) -> None:
        self._orders = {short_first: Ordered[Place, Sequence]() for short_first in (False, True)}

    def __len__(self) -> int:
        return len(self._orders[False])

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._orders[False])

    def add(self, sequence: Sequence) -> None:
        for short_first, ordered in self._orders.items():
            ordered.add(place(sequence, short_first=short_first), sequence)

    def remove(self, sequence: Sequence) -> None:
        """Raises KeyError."""
        for short_first, ordered in self._orders.items():
            ordered.remove(place(sequence, short_first=short_first))

    @property
    def first(self) -> Sequence | None:
        """By `Sequence.order`."""
        return next(iter(self), None)

    def after(self, last: Place | None, *, short_first: bool) -> Sequence | None:
        """The next of an order; without `last` its first."""
        return self._orders[short_first].after(last)
