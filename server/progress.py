"""Progress of a long command on standard error: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

INTERVAL = 10.0
"""Seconds between lines."""


class Progress:
    """Counts bytes. `total` is None if unknown."""

    def __init__(self, doing: str, total: int | None) -> None:
        self._doing, self._total = doing, total
        self._count = 0
        self._told = time.monotonic()
        self._bar: Bar | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._bar = Bar(*columns, console=Console(file=sys.stderr), transient=True)
            self._task = self._bar.add_task(doing, total=total)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, count: int) -> None:
        self._count += count
        if self._bar:
            self._bar.advance(self._task, count)
        elif (now := time.monotonic()) - self._told >= INTERVAL:
            self._told = now
            of = "" if self._total is None else f" of {self._total:,}"
            typer.echo(f"{self._doing}: {self._count:,}{of} bytes", err=True)
