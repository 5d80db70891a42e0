"""The engine process says each second that it is alive, from a thread of its own, and whether a step takes too long.

The parent counts its own ticks without a beat and not the time: a machine that slept, or a parent that was stopped,
makes no engine look frozen.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")

BEAT_SECONDS = 1.0
ALIVE, STUCK = b".", b"!"
TIMES = 20
"""A step may take this many times what it should, and the longest of the last ones."""
REMEMBERED = 64


class Heart:
    """Beats into a pipe as long as its process runs."""

    def __init__(self, pipe: int, step_seconds: float) -> None:
        """step_seconds: what every step may take, however short the others are."""
        self._pipe, self._least = pipe, step_seconds
        self._began: float | None = None
        self._last = deque([0.0], maxlen=REMEMBERED)
        self._expected: Callable[[], float] = float
        os.set_inheritable(pipe, False)
        os.set_blocking(pipe, False)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def step(self, run: Callable[[], T], expected: Callable[[], float]) -> T:
        """Runs a step. expected: the seconds that it should take; asked by the heart's thread, once the step is
        late."""
        self._expected = expected
        self._began = began = time.monotonic()
        result = run()
        self._began = None
        self._last.append(time.monotonic() - began)
        return result

    def _beat(self) -> None:
        while True:
            began = self._began
            took = 0.0 if began is None else time.monotonic() - began
            stuck = took > max(self._least, TIMES * max(self._last)) and took > TIMES * self._expected()
            # A full pipe has beats enough; a parent that has ended is noticed elsewhere.
            with suppress(OSError):
                os.write(self._pipe, STUCK if stuck else ALIVE)
            time.sleep(BEAT_SECONDS)
