"""Decodes bytes that arrive piece by piece."""

import codecs

_Decoder = codecs.getincrementaldecoder("utf-8")


class Utf8Stream:
    """Decodes a stream of bytes; no piece ever ends inside a code point.

    An incomplete code point waits for its next byte. Invalid bytes become U+FFFD at once, so the
    concatenation of all pieces is `b"".join(...).decode(errors="replace")` however the bytes were cut.
    """

    def __init__(self) -> None:
        self._decoder = _Decoder(errors="replace")

    def feed(self, data: bytes) -> str:
        text = self._decoder.decode(data)
        pending = self._decoder.getstate()[0]
        if pending[:1] == b"\xed" and pending[1:2] >= b"\xa0":
            # The start of a surrogate, which the standard library keeps although it is never valid.
            text += self._decoder.decode(b"", final=True)
        return text

    def finish(self) -> str:
        """Ends the stream: an incomplete code point becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)

    @property
    def num_pending(self) -> int:
        """Bytes fed that wait for the rest of their code point, 0 to 3."""
        return len(self.pending)

    @property
    def pending(self) -> bytes:
        return self._decoder.getstate()[0]


class OffsetTracker:
    """The offset of each byte's character in the text, in code points."""

    def __init__(self) -> None:
        self._stream = Utf8Stream()
        self._length = 0

    def feed(self, byte: int) -> int:
        """Offset of the character that this byte belongs to."""
        self._length += len(self._stream.feed(bytes((byte,))))
        return self._length - (not self._stream.num_pending)

    @property
    def end(self) -> int:
        """Offset of the next character to start."""
        return self._length + bool(self._stream.num_pending)
