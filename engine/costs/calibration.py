"""How long a step takes, measured on the engine before it serves, or read from a file; and how many rows of prompts a
step may therefore have."""

import os
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from itertools import accumulate, pairwise
from math import inf
from pathlib import Path

import msgspec

from ..config import BOS_ID, BYTE_OFFSET
from .latency import HOST, LatencyModel

MEASURED_ROWS = (1, 4, 16, 64, 256)
"""One row, as of a single sequence; a few, as of drafts or many sequences; many, as of prompts."""
SECONDS = 0.25
"""How long the steps are repeated; the fastest counts, since the first may include work that is done once."""
MOST_SECONDS = 1.5
"""No step begins that is expected to end later than this."""
MOST_RECORDING_SECONDS = 60.0
"""In addition, for compiling and recording kernels. After that no further numbers of rows are measured."""
LEAST_PROMPT_ROWS = 16
"""Even if they stall other sequences for longer: prompts must make progress."""
PATCH = 4.0
"""Bytes per patch, to predict the time of a step."""
TEXT = """\
The port was quiet before six, and nobody on the pier could have said which of the two ships had come in first. Mrs
Okafor counted 37 crates, then 38; the last one, she wrote, "smells of oranges". By noon they were all gone, and so was
the rain. What remained was a rope, a lamp and an argument about the tide."""
PROMPT = [BOS_ID, *(byte + BYTE_OFFSET for byte in TEXT.encode())]
"""Ordinary text, so that its patches are as long as usual."""


class MeasuredStep(msgspec.Struct, frozen=True):
    """A step of `rows` rows of one prompt: rows and seconds of each stage that it launched, and of the host."""

    rows: int
    stages: dict[str, tuple[int, float]]

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.stages.values())


class RecordingModel(LatencyModel):
    """Keeps its observations of steps, instead of learning from them."""

    def __init__(self) -> None:
        super().__init__(drafts_encode=False)
        self._launches: list[tuple[str, int, float]] = []

    def observe(self, stage: str, rows: int, seconds: float) -> None:
        self._launches.append((stage, rows, seconds))

    def step(self, rows: int, seconds: float) -> MeasuredStep:
        """The observations since the last call, as a step that took `seconds`."""
        stages: dict[str, tuple[int, float]] = {}
        for stage, count, took in self._launches:
            if stage != HOST:
                before = stages.get(stage, (0, 0.0))
                stages[stage] = before[0] + count, before[1] + took
        self._launches.clear()
        # A GPU runs stages while the host works: that time counts as theirs.
        host = max(seconds - sum(took for _, took in stages.values()), 0.0)
        return MeasuredStep(rows, stages | {HOST: (1, host)})


class _File(msgspec.Struct, frozen=True):
    of: dict[str, str | int]
    steps: list[MeasuredStep]


def measure_steps(
    step: Callable[[int], MeasuredStep], most_rows: int, num_recorded: Callable[[], int]
) -> list[MeasuredStep]:
    """The fastest step of each number of rows up to `most_rows`, in ascending order; fewer numbers if steps take long.

    step: runs a step of that many rows. num_recorded: how many recordings there are by now. A step that records is not
    counted, nor is its time, and it is run again.
    """
    began, recording = time.perf_counter(), 0.0
    found: dict[int, MeasuredStep] = {}

    def spent() -> float:
        return time.perf_counter() - began - recording

    def measured(rows: int) -> MeasuredStep | None:
        """None once too much time has gone into recording."""
        nonlocal recording
        while recording < MOST_RECORDING_SECONDS or not found or rows in found:
            before, recorded = spent(), num_recorded()
            tried = step(rows)
            if num_recorded() == recorded:
                return tried
            recording += spent() - before
        return None

    while spent() < SECONDS or not found:
        for rows in sorted({min(rows, most_rows) for rows in MEASURED_ROWS}):
            if found and spent() + _predicted(list(found.values()), rows) > MOST_SECONDS:
                break
            tried = measured(rows)
            if tried is None:
                break
            if rows not in found or tried.seconds < found[rows].seconds:
                found[rows] = tried
    return list(found.values())


def _predicted(found: Seq[MeasuredStep], rows: int) -> float:
    latency = LatencyModel(drafts_encode=False)
    for tried in found:
        for stage, (count, seconds) in tried.stages.items():
            latency.observe(stage, count, seconds)
    return latency.verify(rows, rows, PATCH)


def prompt_rows(steps: Seq[MeasuredStep], stall: float, most: int) -> int:
    """Most rows of prompts, from `LEAST_PROMPT_ROWS` to `most`, that lengthen a step by no more than `stall` seconds,
    or the length of the shortest step if that is more."""
    seconds = list(accumulate((tried.seconds for tried in steps), max))
    points = list(zip((tried.rows for tried in steps), seconds, strict=True))
    shortest = seconds[0]
    longest = shortest + max(stall, shortest)
    rows: float = 0
    for (before, least), (after, longer) in pairwise(points):
        # On a straight line between two measured steps, and beyond the last two.
        rows = before + (after - before) * (longest - least) / (longer - least) if longer > least else inf
        if longer > longest:
            break
    return max(int(min(rows - steps[0].rows, most)), min(LEAST_PROMPT_ROWS, most))


def read(path: Path, of: dict[str, str | int]) -> list[MeasuredStep] | None:
    """The steps in a file; None if there is no file, or if its identity is not `of`. Raises ValueError for a file that
    does not hold steps, OSError for one that cannot be read."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} holds no stage costs: {error}") from error
    if not file.steps or [tried.rows for tried in file.steps] != sorted({tried.rows for tried in file.steps}):
        raise ValueError(f"{path} holds no stage costs: `steps` must have entries, with ascending `rows`")
    return file.steps if file.of == of else None


def write(path: Path, of: dict[str, str | int], steps: list[MeasuredStep]) -> None:
    """Raises OSError."""
    content = msgspec.json.format(msgspec.json.encode(_File(of, steps)), indent=2)
    # A process that reads the file meanwhile gets the whole old one.
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_bytes(content + b"\n")
    unfinished.replace(path)
