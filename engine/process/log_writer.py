"""A thread that writes log lines, so that no other thread waits for the reader of the log.

A pipe holds 64 KiB. Once it is full, the next write blocks until the reader takes something. In the thread that logs
the line, such a write would stop the event loop, and with it every route, or the engine between two steps.
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
"""Most bytes of lines that wait to be written."""


class _Batch(NamedTuple):
    """Lines that are written at once."""

    reported: int
    """How many dropped lines its head reports."""
    head: bytes
    lines: list[bytes]


class LogWriter:
    """Writes lines to one stream, in their order.

    A line that does not fit into `limit_bytes` is dropped, and so are all further ones until the waiting lines are
    written. That makes one gap. `note` makes the line that is written in its place, from the number of dropped lines.
    """

    def __init__(self, stream: IO[str], note: Callable[[int], str], limit_bytes: int = LIMIT_BYTES) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._descriptor = _descriptor(stream)
        self._note = note
        self._limit = limit_bytes
        self.dropped = 0
        """Lines that were not written and never will be."""
        self._unreported = 0
        """Those of them that no note has reported."""
        # The garbage collector may run code that logs while the lock is held.
        lock = threading.RLock()
        self._added = threading.Condition(lock)
        self._written = threading.Condition(lock)
        self._lines: deque[bytes] = deque()
        self._waiting = 0
        """Bytes of these lines and of those being written."""
        self._full = False
        self._failed = False
        """Whether the last write failed: the reader had closed the pipe, or the disk was full."""
        self._torn = False
        """Whether the last write ended within a line."""
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="log writer", daemon=True)
        self._thread.start()

    def put(self, line: str) -> None:
        """Queues a line to be written, or drops it. Never waits."""
        text = self._encode(line)
        with self._added:
            self._full |= self._waiting + len(text) > self._limit
            if self._full or self._closed:
                self._drop(1)
            else:
                self._lines.append(text)
                self._waiting += len(text)
            self._added.notify()

    def flush(self, seconds: float) -> bool:
        """Waits up to `seconds` until all lines are written or dropped; returns whether they are."""
        with self._written:
            return self._written.wait_for(lambda: not self._waiting and not self._full, seconds)

    def close(self, seconds: float) -> None:
        """Takes no more lines, and waits up to `seconds` for the queued ones to be written. The thread ends then, or
        when a blocked write returns."""
        with self._added:
            self._closed = True
            self._added.notify()
        self._thread.join(seconds)
        with self._added:
            self._drop(len(self._lines))
            self._lines.clear()
            self._full = False

    def _drop(self, lines: int) -> None:
        self.dropped += lines
        self._unreported += lines

    def _encode(self, line: str) -> bytes:
        return f"{line}\n".encode(self._encoding, "backslashreplace")

    def _run(self) -> None:
        while batch := self._take():
            self._account(batch, self._write(b"".join([batch.head, *batch.lines])))

    def _take(self) -> _Batch | None:
        """The next lines to write; None once there will be no more.

        Both processes write to the pipe. It does not mix their lines if a write has at most PIPE_BUF bytes.
        """
        with self._added:
            self._added.wait_for(lambda: self._lines or self._full or self._closed)
            if not self._lines and not self._full:
                return None
            head = b"\n" if self._torn else b""
            reported = 0
            # The gap is after all lines that waited or, if the last write failed, before those written now.
            if not self._lines or self._failed:
                reported, self._unreported = self._unreported, 0
            if reported:
                head += self._encode(self._note(reported))
            self._full = self._full and bool(self._lines)
            self._waiting += len(head)
            lines: list[bytes] = []
            size = len(head)
            while self._lines and (not lines or size + len(self._lines[0]) <= select.PIPE_BUF):
                lines.append(self._lines.popleft())
                size += len(lines[-1])
            return _Batch(reported, head, lines)

    def _write(self, text: bytes) -> int:
        """Waits for the reader; returns how many bytes were written: fewer than all if the write failed."""
        done = 0
        try:
            if self._descriptor is None:
                self._stream.write(text.decode(self._encoding))
                self._stream.flush()
                return len(text)
            # Not through the stream: the interpreter cannot end while a blocked thread holds the stream's lock.
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
        """Counts the lines that a write of `done` bytes did not finish."""
        ends = list(accumulate(map(len, batch.lines), initial=len(batch.head)))
        whole = bisect_right(ends, done)
        with self._written:
            self._failed = done < ends[-1]
            if done:
                self._torn = done not in ends
            if not whole:
                self._unreported += batch.reported
            self._drop(len(ends) - max(whole, 1))
            self._waiting -= ends[-1]
            self._written.notify_all()


def _descriptor(stream: IO[str]) -> int | None:
    """The stream's file descriptor; None if it has none, as a stream in memory."""
    try:
        return stream.fileno()
    except OSError:
        return None
