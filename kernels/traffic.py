"""Bytes that a kernel moves to and from memory. Each kernel's file computes them from its shapes."""

from typing import NamedTuple


class Traffic(NamedTuple):
    """Bytes. Data that several programs of one call read from cache counts once; index arrays do not count."""

    read: int = 0
    written: int = 0

    def __add__(self, other: object) -> "Traffic":
        assert isinstance(other, Traffic)
        return Traffic(self.read + other.read, self.written + other.written)
