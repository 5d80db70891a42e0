"""What a run is to do, and what it saw."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from .percentiles import Gaps

Outcome = Literal["done", "refused", "failed", "interrupted"]


class Plan(NamedTuple):
    """Either rate (requests a second, open loop) or concurrency (requests at a time, closed loop) is given. requests
    and duration, in seconds: no request begins after the first bound that is reached; at least one is given.
    most_open: requests at a time in an open loop; later ones wait, and their latency grows. retries: of a refusal."""

    rate: float | None
    concurrency: int | None
    requests: int | None
    duration: float | None
    seed: int
    most_open: int
    retries: int

    @property
    def name(self) -> str:
        return f"{self.rate:g} a second" if self.rate else f"{self.concurrency} at a time"


@dataclass(slots=True)
class Record:
    """One request. planned, sent and ended: seconds from the run's start; first_byte, latency and longest_gap: seconds,
    the first two from the planned time. error: its kind. bytes: of text."""

    decoder: str | None
    planned: float
    sent: float = 0.0
    ended: float = 0.0
    outcome: Outcome = "interrupted"
    first_byte: float | None = None
    latency: float | None = None
    longest_gap: float = 0.0
    chunks: int = 0
    bytes: int = 0
    finish_reason: str | None = None
    error: str | None = None
    retries: int = 0


@dataclass(slots=True)
class Run:
    """gaps: seconds between the chunks of a stream. examples: a message by kind of error. seconds: to the end of the
    last request."""

    plan: Plan
    records: list[Record] = field(default_factory=list)
    gaps: Gaps = field(default_factory=Gaps)
    examples: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    interrupted: bool = False


class Limits(NamedTuple):
    """Seconds that a good request may take: to its first byte, between two chunks, to its end. None: any time."""

    first_byte: float | None = None
    gap: float | None = None
    latency: float | None = None

    def hold(self, record: Record) -> bool:
        """Whether a request was answered in time. One without a byte of text was if it ended in time for one."""
        first = record.latency if record.first_byte is None else record.first_byte
        taken = (first, record.longest_gap, record.latency)
        pairs = zip(taken, self, strict=True)
        return record.outcome == "done" and all(most is None or (s is not None and s <= most) for s, most in pairs)
