"""The UTF-8 splitter: the pieces join to the decoded whole, wherever the bytes are cut.

An input is the number of pieces, a length for each, and the text.
"""

from unittest import mock

from server.text import OffsetTracker, Utf8Stream
from tests.fuzz.target import Target


def one(data: bytes) -> None:
    count = data[0] % 32 if data else 0
    lengths, text = data[1 : count + 1], data[count + 1 :]
    stream, told, at = Utf8Stream(), "", 0
    for length in [*lengths, len(text)]:
        piece, at = text[at : at + length], min(at + length, len(text))
        told += stream.feed(piece)
        assert len(stream.pending) <= 3
        # Nothing but the beginning of a code point waits.
        certain = text[: at - len(stream.pending)]
        assert told == certain.decode(errors="replace"), (told, certain)
        assert certain + stream.pending == text[:at]
    whole = text.decode(errors="replace")
    assert told + stream.finish() == whole
    tracker = OffsetTracker()
    offsets = [tracker.feed(byte) for byte in text]
    assert offsets == sorted(offsets) and set(offsets) == set(range(len(whole)))


def _forget_a_byte(self: Utf8Stream, data: bytes) -> str:
    """A code point that is cut after its first byte loses it."""
    text = self._decoder.decode(data)
    if len(self.pending) == 1 and data != self.pending:
        self._decoder.reset()
    return text


def _end_each_piece(self: Utf8Stream, data: bytes) -> str:
    return self._decoder.decode(data, final=True)


TARGET = Target(
    one,
    seeds=[
        b"\x00plain",
        b"\x03\x01\x02\x03in four pieces",
        b"\x01\x02\xff\xfe\xc0\x80",
    ],
    faults={
        "drops a byte at a cut": lambda: mock.patch.object(Utf8Stream, "feed", _forget_a_byte),
        "decodes each piece by itself": lambda: mock.patch.object(Utf8Stream, "feed", _end_each_piece),
    },
    words=[b"\xe2\x82\xac", b"\xf0\x9f\xa6\x80", b"\xed\xa0\x80", b"\xed", b"\xf4\x90"],
)
