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
        self.n, self.rows, self.seconds, self.rows_rows, self.rows_seconds = (
            FORGET * old + new
            for old, new in zip(
                (self.n, self.rows, self.seconds, self.rows_rows, self.rows_seconds), values, strict=True
            )
        )

    def at(self, rows: float) -> float:
        """Expected seconds of a call; 0 before any was seen."""
        if not self.n:
            return 0.0
        mean_rows, mean = self.rows / self.n, self.seconds / self.n
        spread = self.rows_rows / self.n - mean_rows**2
        slope = (self.rows_seconds / self.n - mean_rows * mean) / spread if spread > 1e-6 else 0.0
        slope = min(max(slope, 0.0), mean / mean_rows)
        return mean + slope * (rows - mean_rows)


class StageCosts:
    """Implements `engine.decoders.auto.Costs`, for a sequence that is alone in its batch.

    A crowd shares a call's fixed part, which makes short drafts and single bytes cheaper than they look here.
    """

    MOST_ROWS = 64
    """Calls over more rows say nothing of rounds."""

    def __init__(self, drafts_encode: bool) -> None:
        """drafts_encode: whether a drafted row goes through the encoder too."""
        self._drafts_encode = drafts_encode
        self._stages: dict[str, Line] = {}
        self._step = Line()

    def saw(self, stage: str, rows: int, seconds: float) -> None:
        if rows <= self.MOST_ROWS:
            self._stages.setdefault(stage, Line()).saw(rows, seconds)

    def saw_step(self, rows: int, seconds: float) -> None:
        """Seconds of a step outside its stages."""
        if rows <= self.MOST_ROWS:
            self._step.saw(rows, seconds)

    def feed(self, patch: float) -> float:
        return self.verify(1, 1, patch)

    def draft(self, passes: int, rows: int) -> float:
        encoding = self._at("encoder", rows) if self._drafts_encode else 0.0
        return passes * (self._at("decoder", rows) + encoding + self._step.at(rows))

    def verify(self, rows: int, decoded: int, patch: float) -> float:
        closing = rows / patch
        return (
            self._step.at(rows)
            + self._at("patcher", rows)
            + self._at("encoder", rows)
            + self._at("decoder", decoded)
            + min(closing, 1.0) * self._at("global", max(closing, 1.0))
            + 1e-9
        )

    def _at(self, stage: str, rows: float) -> float:
        line = self._stages.get(stage)
        return line.at(rows) if line else 0.0
