"""How far a long command is: a bar on a terminal, elsewhere a line now and then. On standard error."""

import sys
import time
from typing import Any

import typer

INTERVAL = 10.0
"""Seconds between lines."""


class Progress:
    """Counts bytes. `total` is None where only the end tells."""

    def __init__(self, doing: str, total: int | None) -> None:
        self._doing, self._total = doing, total
        self._count = 0
        self._told = time.monotonic()
        self._bar = _bar(doing, total) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.close()

    def advance(self, count: int) -> None:
        self._count += count
        if self._bar:
            self._bar.update(count)
        elif (now := time.monotonic()) - self._told >= INTERVAL:
            self._told = now
            of = "" if self._total is None else f" of {self._total:,}"
            typer.echo(f"{self._doing}: {self._count:,}{of} bytes", err=True)


def _bar(doing: str, total: int | None) -> Any:
    """None without tqdm, which is in the extra `train`: then there are lines on a terminal, too."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(desc=doing, total=total, unit="B", unit_scale=True, leave=False)
