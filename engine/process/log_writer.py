"""A thread that writes log lines, so that whoever logs never waits for whoever reads the log.

A pipe holds 64 KiB. When nobody reads it, the next write lasts until somebody does: made where the line is logged, it
would stop the event loop, and with it every route, or the engine between two steps.
"""

import os
import select
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from itertools import accumulate
from typing import IO, NamedTuple

LIMIT_BYTES = 4 << 20
"""Most text that waits to be written."""


class _Batch(NamedTuple):
    """What is written at once."""

    told: int
    """How many dropped lines its head tells of."""
    head: bytes
    lines: list[bytes]


class LogWriter:
    """Writes lines to one stream, in their order.

    A line that does not fit into `limit_bytes` is dropped, and so is every further one until all that waits is written:
    that makes one gap. `note` makes the line that stands in its place, from the number of lines that are missing there.
    """

    def __init__(self, stream: IO[str], note: Callable[[int], str], limit_bytes: int = LIMIT_BYTES) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._descriptor = _descriptor(stream)
        self._note = note
        self._limit = limit_bytes
        self.dropped = 0
        """Lines that nobody will read."""
        self._untold = 0
        """Those of them that no note has told of."""
        # What the garbage collector runs may log while the lock is held.
        lock = threading.RLock()
        self._news = threading.Condition(lock)
        self._written = threading.Condition(lock)
        self._lines: deque[bytes] = deque()
        self._waiting = 0
        """Bytes of these, and of what is being written."""
        self._full = False
        self._failed = False
        """Whether the last write failed: the reader had left, or the disk was full."""
        self._torn = False
        """Whether it ended within a line."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Has a line written soon, or drops it. Never waits."""
        text = self._encode(line)
        with self._news:
            self._full |= self._waiting + len(text) > self._limit
            if self._full or self._closed:
                self._drop(1)
            else:
                self._lines.append(text)
                self._waiting += len(text)
            self._news.notify()

    def flush(self, seconds: float) -> bool:
        """Waits until no line waits to be written, but no longer than `seconds`; says whether that is so."""
        with self._written:
            return self._written.wait_for(lambda: not self._waiting and not self._full, seconds)

    def close(self, seconds: float) -> None:
        """Takes no more lines, and gives those that wait `seconds` to be written. The thread ends then, or when a write
        that is stuck returns."""
        with self._news:
            self._closed = True
            self._news.notify()
        self._thread.join(seconds)
        with self._news:
            self._drop(len(self._lines))
            self._lines.clear()
            self._full = False

    def _drop(self, lines: int) -> None:
        self.dropped += lines
        self._untold += lines

    def _encode(self, line: str) -> bytes:
        return f"{line}\n".encode(self._encoding, "backslashreplace")

    def _run(self) -> None:
        while batch := self._take():
            self._account(batch, self._write(b"".join([batch.head, *batch.lines])))

    def _take(self) -> _Batch | None:
        """What to write next; None if nothing will follow.

        Both processes share the pipe, and it keeps their lines apart in writes of up to PIPE_BUF bytes only.
        """
        with self._news:
            self._news.wait_for(lambda: self._lines or self._full or self._closed)
            if not self._lines and not self._full:
                return None
            head = b"\n" if self._torn else b""
            told = 0
            # The gap is after all that waited, or, if writing failed, before what is tried now.
            if not self._lines or self._failed:
                told, self._untold = self._untold, 0
            if told:
                head += self._encode(self._note(told))
            self._full = self._full and bool(self._lines)
            self._waiting += len(head)
            lines: list[bytes] = []
            size = len(head)
            while self._lines and (not lines or size + len(self._lines[0]) <= select.PIPE_BUF):
                lines.append(self._lines.popleft())
                size += len(lines[-1])
            return _Batch(told, head, lines)

    def _write(self, text: bytes) -> int:
        """Waits for the reader; returns how many bytes were written, less than all if nobody will read the rest."""
        done = 0
        try:
            if self._descriptor is None:
                self._stream.write(text.decode(self._encoding))
                self._stream.flush()
                return len(text)
            # Not through the stream: the interpreter cannot end while a thread is stuck with the stream's lock.
            rest = memoryview(text)
            while done < len(text):
                try:
                    done += os.write(self._descriptor, rest[done:])
                except BlockingIOError:
                    ready = select.poll()
                    ready.register(self._descriptor, select.POLLOUT)
                    ready.poll()
        except (OSError, ValueError):
            pass
        return done

    def _account(self, batch: _Batch, done: int) -> None:
        """Counts what a write of `done` bytes left out."""
        ends = list(accumulate(map(len, batch.lines), initial=len(batch.head)))
        whole = bisect_right(ends, done)
        with self._written:
            self._failed = done < ends[-1]
            if done:
                self._torn = done not in ends
            if not whole:
                self._untold += batch.told
            self._drop(len(ends) - max(whole, 1))
            self._waiting -= ends[-1]
            self._written.notify_all()


def _descriptor(stream: IO[str]) -> int | None:
    """None if there is none, as of a stream in memory."""
    try:
        return stream.fileno()
    except OSError:
        return None
