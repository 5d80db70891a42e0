"""An event loop on a clock of its own: time passes only while everything waits, and then at once."""

import asyncio
import selectors
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

T = TypeVar("T")

START = 1000.0


class Deadlock(AssertionError):
    """Everything waits for something that will not come."""


class _Selector(selectors.SelectSelector):
    """Has no sockets: waiting moves the clock."""

    now = START

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Deadlock("nothing is left to happen")
        self.now += max(timeout, 0.0)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        # Of tasks that are left when an invariant breaks: the first violation is raised, and says enough.
        self.set_exception_handler(lambda *_: None)

    def time(self) -> float:
        return self._virtual.now


@contextmanager
def virtual_time() -> Iterator[VirtualLoop]:
    """A loop whose clock is also `time.monotonic`."""
    loop = VirtualLoop()
    try:
        with mock.patch.object(time, "monotonic", loop.time):
            yield loop
    finally:
        loop.close()


def run(loop: VirtualLoop, work: Coroutine[Any, Any, T]) -> T:
    """Runs it, and ends every task that it leaves."""
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work)
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        asyncio.set_event_loop(None)
