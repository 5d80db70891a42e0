"""What a fuzzer needs to know of a part that reads what others send."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple


class Target(NamedTuple):
    """A part and what must hold of it.

    one: runs the part on an input and raises if an invariant does not hold. seeds: inputs to begin with. words: pieces
    of inputs, which mutation would find only by chance. faults: by name, a context in which the part has a fault that
    the invariants must find.
    """

    one: Callable[[bytes], None]
    seeds: list[bytes]
    faults: dict[str, Callable[[], AbstractContextManager[object]]]
    words: list[bytes] = []
