"""How far the reading of weights is: a line in the log now and then, so that a large model is seen to come."""

import logging
import time

from ..checkpoint.describe import format_size

log = logging.getLogger("fastblt.engine")

INTERVAL = 3.0
"""Seconds between lines."""


class Progress:
    """Of `total` bytes."""

    def __init__(self, total: int) -> None:
        self._total, self._read = total, 0
        self._told = time.monotonic()

    def advance(self, count: int) -> None:
        self._read += count
        if (now := time.monotonic()) - self._told >= INTERVAL:
            self._told = now
            log.info("read %d %% of %s of weights", 100 * self._read // self._total, format_size(self._total))
