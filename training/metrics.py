"""Metrics of a run's steps: one JSON object per line, in `metrics-STEPS.jsonl` of the run's folder.

Every process writes its own file, named after the number of steps done when it started. So a stage on another machine
needs no earlier file, and no file grows with the run. Files overlap if a process continued from an older state; the
later file counts.
"""

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

READ_SECONDS = 1.0
FINITE = ("bits", "mask", "norm")
"""Figures that are numbers as long as a run learns; a share of nothing may be none."""
Line = dict[str, Any]


class Diverged(RuntimeError):
    """A figure of a step is no finite number: no later step learns anything."""


class Metrics:
    """Writes lines. Tensors are read some steps late, so that no step waits for its own. steps: of the whole run.
    saved: those of the run's last state."""

    def __init__(self, run: Path, steps: int) -> None:
        for path in _files(run):
            if _first(path) >= steps:
                path.unlink()
        self.steps = self.saved = steps
        self._run = run
        self._file = (run / f"metrics-{steps:08d}.jsonl").open("w")
        self._pending: list[tuple[Line, tuple[str, ...], Tensor]] = []
        self._read = time.monotonic()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def add(self, line: Line, figures: Mapping[str, Tensor]) -> Line | None:
        """Adds a step's line and its numbers on the device; returns the last line that was read, if any.
        Raises Diverged."""
        self.steps += 1
        values = torch.stack([figure.detach().float() for figure in figures.values()])
        self._pending.append((line, tuple(figures), values))
        return self.flush() if time.monotonic() - self._read > READ_SECONDS else None

    def flush(self) -> Line | None:
        """Reads and writes all added lines. Raises Diverged for the first that has no finite loss or gradients."""
        line = wrong = None
        for (line, names, _), values in zip(self._pending, self._values(), strict=True):
            line |= dict(zip(names, values, strict=True))
            self._file.write(json.dumps(line) + "\n")
            if not wrong and (odd := [name for name in FINITE if not math.isfinite(line.get(name, 0.0))]):
                wrong = f"phase {line['phase']}, step {line['step']}: {odd[0]} is {line[odd[0]]}"
        self._file.flush()
        self._pending.clear()
        self._read = time.monotonic()
        if wrong:
            kept = f"{self._run} keeps the state after {self.saved} steps in all"
            raise Diverged(f"{wrong}: nothing is saved any more, and {kept}; a lower learning rate may help")
        return line

    def _values(self) -> list[list[float]]:
        if not self._pending:
            return []
        # One copy from the device; steps may have different figures.
        found = torch.cat([values for _, _, values in self._pending]).cpu()
        return [part.tolist() for part in found.split([len(values) for _, _, values in self._pending])]


def read_metrics(run: Path) -> list[Line]:
    """The lines of all steps, first to last, but for those that a power cut left torn. Raises FileNotFoundError if
    there are none."""
    files = _files(run)
    if not files:
        raise FileNotFoundError(f"{run} has no metrics-*.jsonl: copy those of all stages there")
    lines = []
    for path, after in zip(files, [*files[1:], None], strict=True):
        found = path.read_text(errors="replace").splitlines()
        lines += found[: _first(after) - _first(path)] if after else found
    return list(_whole(lines))


def _whole(lines: Iterable[str]) -> Iterator[Line]:
    for line in lines:
        with suppress(ValueError):
            yield json.loads(line)


def copy_metrics(run: Path, branch: Path) -> None:
    """Copies a run's metrics into the folder of a run that begins from its state."""
    branch.mkdir(parents=True, exist_ok=True)
    for path in _files(run):
        shutil.copy(path, branch)


def _files(run: Path) -> list[Path]:
    return sorted(run.glob("metrics-*.jsonl"))


def _first(path: Path) -> int:
    """Steps before the file's first line."""
    return int(path.stem.partition("-")[2])
