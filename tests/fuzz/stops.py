"""The stop matcher: byte by byte it finds what a search of the whole text finds.

An input is a byte of options, the first byte that may stop, the lengths of four stop strings, these, and the text.
"""

from unittest import mock

from engine.stopping import StopMatcher
from tests.fuzz.target import Target

INCLUDE, FEW_LETTERS = 1, 2
"""Options: keep the stop string; map all bytes to three, so that stop strings overlap."""
LONGEST = 12
"""Every stop string is shorter."""


def one(data: bytes) -> None:
    options, first, lengths, rest = *(data + bytes(6))[:2], (data + bytes(6))[2:6], data[6:]
    if options & FEW_LETTERS:
        rest = bytes(97 + byte % 3 for byte in rest)
    stops = []
    for length in lengths:
        stops.append(rest[: length % LONGEST])
        rest = rest[length % LONGEST :]
    _check(rest, stops, first % 16, bool(options & INCLUDE))


def _check(text: bytes, stops: list[bytes], first: int, include: bool) -> None:
    said, stop = search(text, stops, first, include)
    matcher, told, stopped = StopMatcher(stops, include=include), b"", b""
    for at, byte in enumerate(text):
        certain, stopped = matcher.feed(byte, may_stop=at >= first)
        told += certain
        assert said.startswith(told)
        if stopped:
            break
        held = text[len(told) : at + 1]
        # What may become a stop string is held back, and nothing else.
        ends = (text[max(at + 1 - n, 0) : at + 1] for n in range(LONGEST))
        assert len(held) == max((len(end) for end in ends if begins_one(end, stops)), default=0)
    assert stopped == stop
    assert told + matcher.flush() == said
    assert matcher.flush() == b""


def begins_one(tail: bytes, stops: list[bytes]) -> bool:
    return any(tail != stop and stop.startswith(tail) for stop in stops)


def search(text: bytes, stops: list[bytes], first: int, include: bool) -> tuple[bytes, bytes]:
    """What may be said of the text, and the stop string that ends it, of several the longest; empty for none."""
    for end in range(first + 1, len(text) + 1):
        stop = max((stop for stop in stops if text.endswith(stop, 0, end)), key=len, default=b"")
        if stop:
            return text[: end if include else end - len(stop)], stop
    return text, b""


def _forget_the_longest(self: StopMatcher, tail: bytes) -> bool:
    """The beginning that lacks only one byte is not held back."""
    return any(len(tail) < len(stop) - 1 and stop.startswith(tail) for stop in self._stops)


def _shortest_first(self: StopMatcher, stops: list[bytes], *, include: bool = False) -> None:
    self._stops, self._include, self._held = sorted({stop for stop in stops if stop}, key=len), include, b""


TARGET = Target(
    one,
    seeds=[
        b"\x00\x00\x03\x00\x00\x00endthe text",
        b"\x02\x00\x01\x02\x00\x00babcccccc",
        b"\x01\x00\x01\x01\x00\x00\r\na\xc3\xbc\n",
    ],
    faults={
        "forgets the longest beginning": lambda: mock.patch.object(StopMatcher, "_may_begin", _forget_the_longest),
        "cuts the shortest of two": lambda: mock.patch.object(StopMatcher, "__init__", _shortest_first),
    },
    words=[b"ab", b"aba", b"\r\n"],
)
