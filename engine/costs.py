"""How long the stages take, learnt from the steps themselves."""

from dataclasses import dataclass

FORGET = 0.98
"""What an observation counts one call later: the machine's load changes."""


@dataclass(slots=True)
class Line:
    """Seconds of a call as a + b * rows, by least squares over what was seen, the recent counting more."""

    n: float = 0.0
    rows: float = 0.0
    seconds: float = 0.0
    rows_rows: float = 0.0
    rows_seconds: float = 0.0

    def saw(self, rows: int, seconds: float) -> None:
        values = (1.0, rows, seconds, rows * rows, rows * seconds)
        sums = (self.n, self.rows, self.seconds, self.rows_rows, self.rows_seconds)
        self.n, self.rows, self.seconds, self.rows_rows, self.rows_seconds = (
            FORGET * old + new for old, new in zip(sums, values, strict=True)
        )

    def share(self, rows: float, company: int) -> float:
        """Expected seconds for `rows` rows in a call that `company` sequences share; 0 before any was seen."""
        if not self.n:
            return 0.0
        mean_rows, mean = self.rows / self.n, self.seconds / self.n
        spread = self.rows_rows / self.n - mean_rows**2
        slope = (self.rows_seconds / self.n - mean_rows * mean) / spread if spread > 1e-6 else 0.0
        slope = min(max(slope, 0.0), mean / mean_rows)
        return (mean - slope * mean_rows) / company + slope * rows


class StageCosts:
    """Implements `engine.decoders.auto.Costs`. What a call costs whatever its rows is shared by all that are running.

    So drafts pay while a sequence is alone and reads all weights for itself, and less so in a crowd.
    """

    MOST_ROWS = 512
    """Calls over more rows, those of long prompts, say nothing of rounds."""

    def __init__(self, drafts_encode: bool) -> None:
        """drafts_encode: whether a drafted row goes through the encoder too."""
        self.company = 1
        """Sequences that run now."""
        self._drafts_encode = drafts_encode
        self._stages: dict[str, Line] = {}

    def saw(self, stage: str, rows: int, seconds: float) -> None:
        """`stage` may also be "step": the seconds of a step outside its stages."""
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

    def _share(self, stage: str, rows: float) -> float:
        line = self._stages.get(stage)
        return line.share(rows, self.company) if line else 0.0
