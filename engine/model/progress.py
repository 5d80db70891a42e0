"""Logs how many weights have been read, every few seconds, since a large model takes long to load."""

import logging
import time

from ..checkpoint.describe import format_size

log = logging.getLogger("fastblt.engine")

INTERVAL = 3.0
"""Seconds between lines."""


class Progress:
    """Progress through `total` bytes."""

    def __init__(self, total: int) -> None:
        self._total, self._read = total, 0
        self._logged = time.monotonic()

    def advance(self, count: int) -> None:
        self._read += count
        if (now := time.monotonic()) - self._logged >= INTERVAL:
            self._logged = now
            log.info("read %d %% of %s of weights", 100 * self._read // self._total, format_size(self._total))
