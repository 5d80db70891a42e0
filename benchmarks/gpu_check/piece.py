"""A part's results so far, on disk after every change, so that an interrupted part keeps its figures."""

import json
from pathlib import Path
from typing import Any


class Piece:
    """Figures and failures."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._figures: dict[str, Any] = {}
        self._failures: list[str] = []
        self._done = False

    def put(self, **figures: Any) -> None:
        self._figures |= figures
        self._write()

    def row(self, table: str, row: dict[str, Any]) -> None:
        """Adds a row to a list of figures, and prints it."""
        self._figures.setdefault(table, []).append(row)
        print(table, json.dumps(row), flush=True)
        self._write()

    def fail(self, what: str) -> None:
        """Records a failure; the part continues."""
        self._failures.append(what)
        print("WRONG:", what, flush=True)
        self._write()

    def finish(self) -> None:
        self._done = True
        self._write()

    def _write(self) -> None:
        content = {"figures": self._figures, "failures": self._failures, "done": self._done}
        beside = self._path.with_suffix(".new")
        beside.write_text(json.dumps(content))
        beside.replace(self._path)
