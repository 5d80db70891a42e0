"""How long the stages take, measured at the start (`engine.costs.calibration`) and learnt from the steps since."""

from dataclasses import dataclass
from math import inf

FORGET = 0.98
"""What an observation counts one call later: the machine's load changes."""


Sums = tuple[float, float, float, float, float]
"""Of 1, rows, seconds, rows², rows × seconds."""


@dataclass(slots=True)
class Line:
    """Seconds of a call as a + b * rows, by least squares: over what was measured at the start, and over what was seen
    since, the recent counting more. The former keeps the slope known while all calls are alike."""

    measured: Sums = (0.0,) * 5
    seen: Sums = (0.0,) * 5

    def starts_at(self, rows: int, seconds: float) -> None:
        self.measured = _add(self.measured, rows, seconds, 1.0)

    def saw(self, rows: int, seconds: float) -> None:
        self.seen = _add(self.seen, rows, seconds, FORGET)

    def share(self, rows: float, company: int) -> float:
        """Expected seconds for `rows` rows in a call that `company` sequences share; 0 before any was seen."""
        n, sum_rows, sum_seconds, rows_rows, rows_seconds = map(sum, zip(self.measured, self.seen, strict=True))
        if not n:
            return 0.0
        mean_rows, mean = sum_rows / n, sum_seconds / n
        spread = rows_rows / n - mean_rows**2
        slope = (rows_seconds / n - mean_rows * mean) / spread if spread > 1e-6 else 0.0
        slope = min(max(slope, 0.0), mean / mean_rows)
        return (mean - slope * mean_rows) / company + slope * rows


def _add(sums: Sums, rows: int, seconds: float, weight: float) -> Sums:
    n, sum_rows, sum_seconds, rows_rows, rows_seconds = (weight * old for old in sums)
    return n + 1, sum_rows + rows, sum_seconds + seconds, rows_rows + rows * rows, rows_seconds + rows * seconds


class StageCosts:
    """Implements `engine.decoders.auto.Costs`. What a call costs whatever its rows is shared by all that are running.

    So drafts pay while a sequence is alone and reads all weights for itself, and less so in a crowd.
    """

    MOST_ROWS = 512
    """Calls over more rows, those of long prompts, say nothing of rounds."""
    ROUND_ROWS = 64
    """What was measured beyond this, where rows cost more and more, would bend the lines where rounds are."""

    def __init__(self, drafts_encode: bool, *, has_device: bool = False) -> None:
        """drafts_encode: whether a drafted row goes through the encoder too. has_device: whether stages run while the
        host does something else."""
        self.company = 1
        """Sequences that run now."""
        self._drafts_encode, self._has_device = drafts_encode, has_device
        self._stages: dict[str, Line] = {}

    def starts_at(self, stage: str, rows: int, seconds: float) -> None:
        """Takes what was measured at the start."""
        if 0 < rows <= self.ROUND_ROWS:
            self._stages.setdefault(stage, Line()).starts_at(rows, seconds)

    def saw(self, stage: str, rows: int, seconds: float) -> None:
        """`stage` may also be "step": the seconds of a step outside its stages; "behind": until the host has launched a
        pass behind a step of blt, which on a CPU includes the stages; "starting": until it has launched patcher and
        encoder of the next step; "asking": seconds outside the stages from a
        decision on how many passes to run to the next. What was recorded or compiled in the meantime is nobody's cost:
        such calls must be left out."""
        if 0 < rows <= self.MOST_ROWS:
            self._stages.setdefault(stage, Line()).saw(rows, seconds)

    def feed(self, patch: float) -> float:
        return self.verify(1, 1, patch)

    def draft(self, passes: int, rows: int) -> float:
        encoding = self._share("encoder", rows) if self._drafts_encode else 0.0
        return passes * (self._share("decoder", rows) + encoding + self._share("step", rows))

    def verify(self, rows: int, decoded: int, patch: float) -> float:
        closing = rows / patch
        stages = self._share("patcher", rows) + self._share("encoder", rows) + self._share("decoder", decoded)
        closes = min(closing, 1.0) * self._share("global", max(closing, 1.0))
        return stages + closes + self._share("step", rows) + 1e-9

    def feeding(self, sequences: int, patch: float) -> float:
        """What another pass of the local stages takes, behind a step of blt for so many, as a part of what it can save
        (1 before any was seen): a step's local stages and host, and weights of the global stage that are read for fewer
        patches than close by the end of the passes."""
        local = sum(self._call(stage, sequences) for stage in ("patcher", "encoder", "decoder"))
        some_close = 1 - (1 - 1 / patch) ** sequences
        saved = local + self._call("step", sequences) + (some_close - 1 / patch) * self._call("global", 0)
        return max(local, self._call("behind", sequences)) / saved if local else 1.0

    def starting(self, sequences: int) -> float:
        """What it takes the host to begin a step of blt for so many before it has heard of the last, as a part of what
        the device does meanwhile; 0 before any was seen."""
        if not self._has_device:
            return inf
        stages = self._call("patcher", sequences) + self._call("encoder", sequences)
        return self._call("starting", sequences) / stages if stages else 0.0

    def asking(self, rows: int) -> float:
        """What it takes to ask the device for a result between passes of the decoder over so many rows, in passes; 0
        before any was seen."""
        decoder = self._call("decoder", rows)
        return self._call("asking", rows) / decoder if decoder else 0.0

    def _share(self, stage: str, rows: float) -> float:
        return self._call(stage, rows, self.company)

    def _call(self, stage: str, rows: float, company: int = 1) -> float:
        line = self._stages.get(stage)
        return line.share(rows, company) if line else 0.0
