"""How long the stages take: measured at the start (`engine.costs.calibration`), then learnt from every step."""

from dataclasses import dataclass
from typing import Literal

FORGET = 0.98
"""Weight of an observation one launch later: the machine's load changes."""
HOST = "step"
"""Seconds of a step outside its stages. Its rows are the passes of all sequences."""
READBACK = "readback"
"""Seconds outside the stages between two decisions on how many passes to run."""

MOST_LAUNCHED = 16
"""Most bytes of blt in one step where single stages are launched."""
MOST_CALLED = 64
"""Most bytes of blt, or of rounds of drafts had all been accepted, in a step that is one call of a CPU's kernels."""
LAUNCH_SECONDS = 0.016
"""How long a step of several bytes may take by the latency model, which counts a patch for every byte: a new request
waits for it."""
CALL_SECONDS = 0.02
"""How long it may take by the clock, where it is one call."""

Sums = tuple[float, float, float, float, float]
"""Of 1, rows, seconds, rows², rows × seconds."""


@dataclass(slots=True)
class Line:
    """Seconds of a launch as a + b * rows, by least squares over the measurements at the start and the observations
    since, recent ones counting more. The former keep the slope known while all launches have the same rows."""

    measured: Sums = (0.0,) * 5
    observed: Sums = (0.0,) * 5

    def calibrate(self, rows: int, seconds: float) -> None:
        self.measured = _add(self.measured, rows, seconds, 1.0)

    def observe(self, rows: int, seconds: float) -> None:
        self.observed = _add(self.observed, rows, seconds, FORGET)

    def share(self, rows: float, num_sharing: int) -> float:
        """Expected seconds for `rows` rows in a launch that `num_sharing` sequences share; 0 if none was observed."""
        n, sum_rows, sum_seconds, rows_rows, rows_seconds = map(sum, zip(self.measured, self.observed, strict=True))
        if not n:
            return 0.0
        mean_rows, mean = sum_rows / n, sum_seconds / n
        spread = rows_rows / n - mean_rows**2
        slope = (rows_seconds / n - mean_rows * mean) / spread if spread > 1e-6 else 0.0
        slope = min(max(slope, 0.0), mean / mean_rows)
        return (mean - slope * mean_rows) / num_sharing + slope * rows


def _add(sums: Sums, rows: int, seconds: float, weight: float) -> Sums:
    n, sum_rows, sum_seconds, rows_rows, rows_seconds = (weight * old for old in sums)
    return n + 1, sum_rows + rows, sum_seconds + seconds, rows_rows + rows * rows, rows_seconds + rows * seconds


class LatencyModel:
    """Implements `engine.decoders.auto.Latency`. All running sequences share the part of a launch's time that does not
    depend on its rows. So drafts pay most while a sequence runs alone and the weights are read for it only.

    num_running: sequences that run now, set by the engine. unmeasured: steps since the last of `observe_bytes`.
    runs_ahead: whether a step may have several bytes of blt; most_bytes: how many. drafting: whether the passes of a
    draft are in the step that verifies it, in one step before that, or in a step each.
    """

    MOST_ROWS = 512
    """Launches over more rows are those of long prompts, and not observed: they tell nothing about rounds."""
    ROUND_ROWS = 64
    """Measurements over more rows, which cost more each, are left out: they would distort the lines for rounds."""

    def __init__(self, drafts_encode: bool) -> None:
        """drafts_encode: whether a drafted row goes through the encoder too."""
        self.num_running = 1
        self.unmeasured = 0
        self.runs_ahead, self.most_bytes = False, MOST_LAUNCHED
        self.drafting: Literal["within", "before", "each"] = "each"
        self._drafts_encode = drafts_encode
        self._lines: dict[str, Line] = {}
        self._bytes = Line()

    def calibrate(self, stage: str, rows: int, seconds: float) -> None:
        """Takes a measurement made at the start."""
        if 0 < rows <= self.ROUND_ROWS:
            self._lines.setdefault(stage, Line()).calibrate(rows, seconds)

    def observe(self, stage: str, rows: int, seconds: float) -> None:
        """Takes the time of a stage, or of one of the host's parts named above. Leave out launches that recorded or
        compiled kernels."""
        if 0 < rows <= self.MOST_ROWS:
            self._lines.setdefault(stage, Line()).observe(rows, seconds)

    def observe_bytes(self, sequences: int, seconds: float) -> None:
        """Takes the seconds per pass of a step that ran nothing but blt, for so many sequences. The step is timed as a
        whole, because later passes find in the processor's caches what earlier ones have read."""
        self._bytes.observe(sequences, seconds)
        self.unmeasured = 0

    # Seconds of rounds.

    def next_byte(self, patch: float) -> float:
        if measured := self._bytes.share(1, self.num_running):
            return measured
        count = self.launch_bytes(self.num_running) if self.runs_ahead else 1
        return self._stages(1, 1, patch) + self._share(HOST, count) / count

    def draft(self, passes: int, rows: int) -> float:
        encoding = self._share("encoder", rows) if self._drafts_encode else 0.0
        own = passes * self._share(HOST, 1) if self.drafting == "each" else self._share(HOST, passes)
        if self.drafting == "within":
            own = self._share(HOST, 1 + passes) - self._share(HOST, 1)
        return passes * (self._share("decoder", rows) + encoding) + own

    def verify(self, rows: int, decoded: int, patch: float) -> float:
        return self._stages(rows, decoded, patch) + self._share(HOST, 1)

    def _stages(self, rows: int, decoded: int, patch: float) -> float:
        closing = rows / patch
        local = self._share("patcher", rows) + self._share("encoder", rows) + self._share("decoder", decoded)
        return local + min(closing, 1.0) * self._share("global", max(closing, 1.0)) + 1e-9

    # The cost of running ahead.

    def byte(self, sequences: int) -> float:
        """A pass of all stages over a row of each sequence, as if a patch closed; 0 before any was observed."""
        local = sum(self.seconds(stage, sequences) for stage in ("patcher", "encoder", "decoder"))
        return local + self.seconds("global", 1) if local else 0.0

    def launch_bytes(self, sequences: int) -> int:
        """How many bytes of each sequence a step may have, so that others do not wait for long; 1 before any pass was
        observed."""
        seconds = self.byte(sequences)
        return max(min(self.most_bytes, int(LAUNCH_SECONDS / seconds)), 1) if seconds else 1

    def whole_step(self, rows: int, passes: int) -> float:
        """Upper bound in seconds of a step with `passes` passes, each of `rows` rows through all stages."""
        return passes * sum(self.seconds(stage, rows) for stage in list(self._lines))

    def readback(self, rows: int) -> float:
        """Reading a result between decoder passes over `rows` rows, in passes; 0 before any was observed."""
        decoder = self.seconds("decoder", rows)
        return self.seconds(READBACK, rows) / decoder if decoder else 0.0

    def _share(self, stage: str, rows: float) -> float:
        return self.seconds(stage, rows, self.num_running)

    def seconds(self, stage: str, rows: float, num_sharing: int = 1) -> float:
        """Expected seconds of a launch, or of one of the host's parts; 0 before any was observed."""
        line = self._lines.get(stage)
        return line.share(rows, num_sharing) if line else 0.0
