"""Progress of a long command on standard error: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

INTERVAL = 10.0
"""Seconds between lines."""


class Progress:
    """Counts bytes, or other units. `total` is None if unknown."""

    def __init__(self, doing: str, total: int | None, unit: str = "bytes") -> None:
        self._doing, self._total, self._unit = doing, total, unit
        self._count = 0
        self._told = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), count, TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(file=sys.stderr), transient=True)
            self._task = self._bar.add_task(doing, total=total)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def describe(self, doing: str) -> None:
        """What is done from now on."""
        self._doing = doing
        if self._bar:
            self._bar.update(self._task, description=doing)

    def advance(self, count: int) -> None:
        self.reach(self._count + count, self._total)

    def reach(self, count: int, total: int | None) -> None:
        """So many of them are done."""
        self._count, self._total = count, total
        if self._bar:
            self._bar.update(self._task, completed=count, total=total)
        elif (now := time.monotonic()) - self._told >= INTERVAL:
            self._told = now
            of = "" if self._total is None else f" of {self._total:,}"
            typer.echo(f"{self._doing}: {self._count:,}{of} {self._unit}", err=True)
