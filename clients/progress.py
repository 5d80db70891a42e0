"""How far a long command is, on standard error: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

INTERVAL = 10.0
"""Seconds between lines."""


class Progress:
    """`total` is None if unknown."""

    def __init__(self, doing: str, total: float | None) -> None:
        self._doing = doing
        self._told = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            note = TextColumn("{task.fields[note]}")
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), note, TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(file=sys.stderr), transient=True)
            self._task = self._bar.add_task(doing, total=total, note="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: float, note: str) -> None:
        """done: of `total`. note: the same in words."""
        if self._bar:
            self._bar.update(self._task, completed=done, note=note)
        elif (now := time.monotonic()) - self._told >= INTERVAL:
            self._told = now
            sys.stderr.write(f"{self._doing}: {note}\n")
