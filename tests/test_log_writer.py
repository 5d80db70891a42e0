"""Log lines on their way to a reader that reads slowly, later, or not at all."""

import io
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.process.log_writer import LogWriter

PIPE_BYTES = 1 << 16
SECONDS = 10.0
"""Within which a thread does what it can do at once."""


def gap(lines: int) -> str:
    return f"gap of {lines}"


def line(number: int, length: int = 99) -> str:
    return f"{number} ".ljust(length, "x")


class Pipe:
    """A pipe into which a writer writes, and that is read when a test says so."""

    def __init__(self, limit_bytes: int = 10_000, blocking: bool = True) -> None:
        self.end, end = os.pipe()
        os.set_blocking(end, blocking)
        self.stream = os.fdopen(end, "w")
        self.writer = LogWriter(self.stream, gap, limit_bytes)
        self._read = bytearray()

    def fill(self) -> int:
        """Puts lines until the pipe takes no more; returns how many."""
        number = 0
        while self.writer.flush(0.02):
            self.writer.put(line(number))
            number += 1
        return number

    def read(self, size: int) -> None:
        os.set_blocking(self.end, False)
        with suppress(BlockingIOError):
            self._read += os.read(self.end, size)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Reads all that comes, until it is written."""
        reader = threading.Thread(target=self._read_all)
        os.set_blocking(self.end, True)
        reader.start()
        yield
        assert self.writer.flush(SECONDS)
        self.writer.close(SECONDS)
        self.stream.close()
        reader.join(SECONDS)

    def _read_all(self) -> None:
        while some := os.read(self.end, 5000):
            self._read += some

    @property
    def lines(self) -> list[str]:
        return self._read.decode().splitlines()

    def close(self) -> None:
        self.writer.close(0)
        os.close(self.end)
        self.stream.close()


@pytest.fixture
def pipe() -> Iterator[Callable[..., Pipe]]:
    with ExitStack() as stack:

        def make(**options: int) -> Pipe:
            made = Pipe(**options)
            stack.callback(made.close)
            return made

        yield make


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "log writer"]


@pytest.mark.parametrize("blocking", [True, False])
def test_a_stalled_log_reader_blocks_no_writer_and_finds_one_gap(pipe: Callable[..., Pipe], blocking: bool) -> None:
    stuck = pipe(blocking=blocking)
    longest = 0.0
    for number in range(stuck.fill(), 3000):
        began = time.perf_counter()
        stuck.writer.put(line(number))
        longest = max(longest, time.perf_counter() - began)
    assert longest < 1
    dropped = stuck.writer.dropped
    assert PIPE_BYTES / 100 < 3000 - dropped <= (PIPE_BYTES + 10_000) / 100
    with stuck.reading():
        assert stuck.writer.flush(SECONDS)
        for number in range(3000, 3050):
            stuck.writer.put(line(number))
    assert stuck.lines == [
        *(line(number) for number in range(3000 - dropped)),
        gap(dropped),
        *(line(number) for number in range(3000, 3050)),
    ]
    assert stuck.writer.dropped == dropped


STEPS = st.lists(
    st.tuples(st.just("put"), st.integers(1, 300) | st.integers(1, 6000))
    | st.tuples(st.just("read"), st.integers(1, PIPE_BYTES))
    | st.tuples(st.just("pause"), st.just(0)),
    max_size=60,
)


@given(STEPS, st.sampled_from([400, 5000]), st.booleans())
@settings(max_examples=60)
def test_log_lines_read_plus_reported_gaps_equal_the_lines_written(
    steps: list[tuple[str, int]], limit_bytes: int, blocking: bool
) -> None:
    pipe = Pipe(limit_bytes, blocking)
    put: list[str] = []
    for step, size in steps:
        if step == "read":
            pipe.read(size)
        elif step == "pause":
            time.sleep(0.001)
        else:
            put.append(line(len(put), size))
            pipe.writer.put(put[-1])
    with pipe.reading():
        pass
    os.close(pipe.end)
    read: list[str] = []
    dropped = 0
    for text in pipe.lines:
        if text.startswith("gap of "):
            missing = int(text.removeprefix("gap of "))
            read += put[len(read) : len(read) + missing]
            dropped += missing
        else:
            read.append(text)
    assert read == put
    assert dropped == pipe.writer.dropped


def test_lines_of_two_log_writers_on_one_pipe_are_not_mixed(pipe: Callable[..., Pipe]) -> None:
    one = pipe(limit_bytes=1 << 20)
    other = LogWriter(one.stream, gap)
    for number in range(2000):
        one.writer.put(line(number, 80))
        other.put(line(number, 170))
    with one.reading():
        assert other.flush(SECONDS)
        other.close(SECONDS)
    assert [text for text in one.lines if len(text) == 80] == [line(number, 80) for number in range(2000)]
    assert [text for text in one.lines if len(text) == 170] == [line(number, 170) for number in range(2000)]


def test_without_a_log_reader_lines_are_dropped_and_the_next_reader_sees_the_gap(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    first = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with path.open("w") as stream:
        writer = LogWriter(stream, gap, 10_000)
        writer.put("heard")
        assert writer.flush(SECONDS)
        assert os.read(first, PIPE_BYTES) == b"heard\n"
        os.close(first)
        for number in range(1000):
            writer.put(line(number))
            if number % 50 == 0:
                assert writer.flush(SECONDS)
        assert writer.flush(SECONDS)
        assert writer.dropped == 1000
        second = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        writer.put("back")
        assert writer.flush(SECONDS)
        assert os.read(second, PIPE_BYTES).decode().splitlines() == [gap(1000), "back"]
        os.close(second)
        writer.put("unheard")
        writer.close(SECONDS)
        assert writer.dropped == 1001


def test_a_log_line_cut_by_a_full_disk_ends_before_the_next(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "log").open("w") as stream:
        writer = LogWriter(stream, gap)
        resource.setrlimit(resource.RLIMIT_FSIZE, (150, limits[1]))
        try:
            for number in range(4):
                writer.put(line(number))
                assert writer.flush(SECONDS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.put("room")
        writer.close(SECONDS)
    assert (tmp_path / "log").read_text().splitlines() == [line(0), line(1)[:50], gap(3), "room"]


def test_an_in_memory_log_stream_is_written_until_it_is_closed() -> None:
    stream = io.StringIO()
    writer = LogWriter(stream, gap, 100)
    for text in ("one", "x" * 100, "two"):
        writer.put(text)
        assert writer.flush(SECONDS)
    assert stream.getvalue() == f"one\n{gap(1)}\ntwo\n"
    stream.close()
    writer.put("lost")
    writer.close(SECONDS)
    assert writer.dropped == 2


def test_characters_that_the_log_encoding_lacks_are_escaped(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="ascii") as stream:
        writer = LogWriter(stream, gap)
        writer.put("a\u2028\udcff")
        writer.close(SECONDS)
    assert (tmp_path / "log").read_text() == "a\\u2028\\udcff\n"


def test_closing_a_log_writer_writes_queued_lines_within_a_time_limit(pipe: Callable[..., Pipe]) -> None:
    before = len(writers())
    ready, stuck = pipe(), pipe()
    put = stuck.fill()
    for number in range(50):
        stuck.writer.put(line(put + number))
    for number in range(90):
        ready.writer.put(line(number))
    ready.writer.close(SECONDS)
    ready.read(PIPE_BYTES)
    assert ready.lines == [line(number) for number in range(90)]
    began = time.monotonic()
    stuck.writer.close(0.05)
    assert time.monotonic() - began < 2
    stuck.writer.put("late")
    deadline = time.monotonic() + SECONDS
    while len(writers()) > before and time.monotonic() < deadline:
        stuck.read(PIPE_BYTES)
        time.sleep(0.01)
    assert len(writers()) == before
    stuck.read(PIPE_BYTES)
    assert stuck.writer.dropped >= 51
    assert stuck.lines == [line(number) for number in range(put + 51 - stuck.writer.dropped)]


def test_lines_logged_by_many_threads_are_all_written(pipe: Callable[..., Pipe]) -> None:
    shared = pipe(limit_bytes=1 << 20)

    def put(thread: int) -> None:
        for number in range(200):
            shared.writer.put(f"{thread} {number}")

    threads = [threading.Thread(target=put, args=[thread]) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with shared.reading():
        pass
    for thread in range(8):
        assert [text for text in shared.lines if text.startswith(f"{thread} ")] == [f"{thread} {n}" for n in range(200)]
