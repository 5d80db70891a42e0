"""What a check found, and its verdict in words."""

from dataclasses import dataclass, field

from .machine import Machine
from .speed import Speed
from .texts import Comparison

FITS_IN_CACHES = 64 << 20
"""A model with fewer bytes of weights is not read from memory at every step."""
MOST_WRONG = 20
"""Most findings that are kept."""
SLOW_PRODUCT, SLOW_DECODER = 0.5, 0.2
"""Shares of a copy's speed below which a product with one row, or blt alone, is called slow."""


@dataclass(slots=True)
class Report:
    """trials, trials_done: of kernels against their twins. copy, product: bytes per second that a plain copy moves,
    and that a product of a large matrix with one row reads; None if not measured. wrong: what makes the machine unfit.
    notes: what does not. complete: whether the time
    sufficed."""

    machine: Machine
    model: str
    trials: int = 0
    trials_done: int = 0
    texts: list[Comparison] = field(default_factory=list)
    copy: float | None = None
    product: float | None = None
    speed_dtype: str | None = None
    weight_bytes: int | None = None
    speeds: list[Speed] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = True
    seconds: float = 0.0

    def add_wrong(self, what: str) -> None:
        if len(self.wrong) < MOST_WRONG:
            self.wrong.append(what)

    @property
    def fit(self) -> bool:
        return not self.wrong

    @property
    def verdict(self) -> str:
        """A paragraph."""
        if self.wrong:
            count = len(self.wrong)
            many = f"{count} things" if count < MOST_WRONG else f"{count} things or more"
            found = "one thing is wrong" if count == 1 else f"{many} are wrong, the first"
            return f"Not fit: {found}: {self.wrong[0]}."
        said = [f"{'Fit' if self.complete else 'Fit, as far as was checked'}: {self._right()}."]
        alone = next((speed for speed in self.speeds if speed.sequences == 1), None)
        if alone:
            fastest = max((s for s in self.speeds if s.sequences == 1), key=lambda speed: speed.bytes_per_second)
            said.append(f"One sequence gets {alone.bytes_per_second:,.0f} bytes a second from {alone.decoder}")
            said[-1] += f", {fastest.bytes_per_second:,.0f} from {fastest.decoder}." if fastest != alone else "."
        notes = [f"{'And' if number else 'But'} {note}." for number, note in enumerate(self.notes)]
        return " ".join(said + notes)

    def _right(self) -> str:
        parts = []
        if self.trials_done:
            parts.append(f"{self.trials_done} trials of kernels agree with torch")
        compared = sum(comparison.compared for comparison in self.texts)
        if compared:
            parts.append(f"{compared:,} bytes of text are equal")
        return " and ".join(parts) or "only versions and the device"

    def judge_speed(self) -> None:
        """Notes what is slow."""
        if self.copy and self.product and (share := self.product / self.copy) < SLOW_PRODUCT:
            self.notes.append(f"slow: a product with one row reads its matrix at {share:.0%} of a copy's speed")
        if self.weight_bytes is None or not self.speeds:
            return
        if self.weight_bytes < FITS_IN_CACHES:
            megabytes = self.weight_bytes / 1e6
            self.notes.append(
                f"a model of {megabytes:.0f} MB stays in the processor's caches, so that its shares of the copy's "
                "speed say little: name your own model for those"
            )
        elif (share := self.speeds[0].of_copy) < SLOW_DECODER:
            self.notes.append(f"slow: {self.speeds[0].decoder} alone reads at {share:.0%} of a copy's speed")
