"""What a kernel moves to and from memory. Each kernel's file has a function of its shapes that says so."""

from typing import NamedTuple


class Traffic(NamedTuple):
    """Bytes. What several programs of one call read again from cache counts once; index arrays do not count."""

    read: int = 0
    written: int = 0

    def __add__(self, other: object) -> "Traffic":
        assert isinstance(other, Traffic)
        return Traffic(self.read + other.read, self.written + other.written)
