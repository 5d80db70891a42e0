"""Auto: for every round the decoder that promises the most bytes per second, among those whose text is blt's."""

from dataclasses import dataclass, field
from typing import Protocol

from ..types import UnmaskRule
from .asks import Committed, Decoder, Round, SequenceView
from .blt import Autoregressive
from .blt_d import DEFAULT_RULE, BlockDiffusion
from .blt_dv import VerifiedDiffusion
from .blt_s import SelfSpeculation

DRAFT_LENGTHS = (2, 4, 8, 16, 32)
MEMORY = 0.9
"""Weight of an observation one round later."""
PRIOR_ROUNDS = 4.0
PROBE_INTERVAL = 64
"""Rounds after which a kind of draft that did not promise enough is tried again; and steps after which blt is, whose
time is measured."""
PROBE_STEPS = 2
"""Steps in a row in which every sequence that begins a round takes blt: only a step of nothing but blt measures it."""
KEPT_ROUNDS = 16
"""Rounds for which a sequence reuses the estimated times of all kinds of rounds: they change slowly, and estimating
takes time."""


class Latency(Protocol):
    """Seconds that rounds take, as measured so far; see `engine.costs.latency`."""

    num_running: int
    unmeasured: int
    """Steps since one that measured blt."""

    def next_byte(self, patch: float) -> float:
        """One byte by blt, a global pass every `patch` bytes."""
        ...

    def draft(self, passes: int, rows: int) -> float:
        """`passes` decoder passes over `rows` rows each, and the host's time for the steps that they take."""
        ...

    def verify(self, rows: int, decoded: int, patch: float) -> float:
        """A step of `rows` rows through all stages, `decoded` of them through the decoder."""
        ...


@dataclass(slots=True)
class AcceptanceRate:
    """How often a drafted byte is accepted: a chance per byte, from recent rounds and a prior."""

    prior: float
    accepted: float = 0.0
    checked: float = 0.0
    idle: int = 0
    """Rounds since the last observation."""

    @property
    def rate(self) -> float:
        return (self.accepted + PRIOR_ROUNDS * self.prior) / (self.checked + PRIOR_ROUNDS)

    def observe(self, drafted: int, accepted: int) -> None:
        self.accepted = MEMORY * self.accepted + accepted
        self.checked = MEMORY * self.checked + accepted + (accepted < drafted)

    def committed(self, drafts: int) -> float:
        """Bytes that a round with `drafts` drafts is expected to commit, the model's own byte included."""
        rate = self.rate
        return (1 - rate ** (drafts + 1)) / (1 - rate) if rate < 1 else drafts + 1.0


@dataclass(slots=True)
class SharedPrior:
    """The rates over all sequences of an engine: where a new sequence begins."""

    drafts: AcceptanceRate = field(default_factory=lambda: AcceptanceRate(0.9))
    blocks: AcceptanceRate = field(default_factory=lambda: AcceptanceRate(0.7))


@dataclass(frozen=True, slots=True)
class Option:
    """A decoder for one round, and the seconds that it takes. num_bytes: its drafts, whose rate is given, or what it
    commits without any."""

    decoder: Decoder
    seconds: float
    num_bytes: int
    rate: AcceptanceRate | None = None

    @property
    def bytes_per_second(self) -> float:
        return (self.rate.committed(self.num_bytes) if self.rate else self.num_bytes) / self.seconds


class Auto(Decoder):
    """Switching costs nothing, because every byte is the same whichever decoder finds it."""

    def __init__(self, block_size: int, latency: Latency, prior: SharedPrior, exact: bool) -> None:
        self._latency = latency
        self._prior = prior
        self.drafts = AcceptanceRate(prior.drafts.rate)
        self.blocks = AcceptanceRate(prior.blocks.rate)
        self._blt = Autoregressive()
        self._by_length = {k: SelfSpeculation(k) for k in DRAFT_LENGTHS}
        one_step = UnmaskRule(rule="one_step")
        self._by_size = {size: VerifiedDiffusion(size, one_step) for size in (block_size // 2, block_size) if size}
        inexact = block_size and not exact
        self._unverified = BlockDiffusion(block_size, DEFAULT_RULE, finish_patch=False) if inexact else None
        self._block_size, self._unverified_passes = block_size, block_size / 2
        self.chosen = Option(self._blt, 1.0, 1)
        self._options: list[Option] = []
        self._age = self._num_running = 0

    def choose(self, sequence: SequenceView) -> None:
        self._age += 1
        if not self._options or self._age > KEPT_ROUNDS or self._latency.num_running != self._num_running:
            self._options, self._age = self._timed(sequence.mean_patch), 0
            self._num_running = self._latency.num_running
        options = self._options
        if self._latency.unmeasured % (PROBE_INTERVAL + PROBE_STEPS) >= PROBE_INTERVAL:
            self.chosen = options[0]
            return
        self.chosen = max(options, key=lambda option: option.bytes_per_second)
        for rate in (self.drafts, self.blocks):
            if rate.idle >= PROBE_INTERVAL and self.chosen.rate is not rate:
                probes = [option for option in options if option.rate is rate]
                if probes:
                    self.chosen = max(probes, key=lambda option: option.bytes_per_second)
                    rate.idle = 0

    def round(self, sequence: SequenceView, room: int) -> Round:
        decoder, rate = self.chosen.decoder, self.chosen.rate
        before = sequence.counts.decoder_calls
        outcome: Committed = yield from decoder.round(sequence, room)
        if decoder is self._unverified:
            passes = (sequence.counts.decoder_calls - before) / max(len(outcome.parts), 1)
            self._unverified_passes = MEMORY * self._unverified_passes + (1 - MEMORY) * passes
        for each in (self.drafts, self.blocks):
            each.idle += 1
        for part in outcome.parts or (outcome,):
            if rate and part.drafted:
                rate.idle = 0
                rate.observe(part.drafted, part.accepted)
                shared = self._prior.drafts if rate is self.drafts else self._prior.blocks
                shared.observe(part.drafted, part.accepted)
        return outcome

    def _timed(self, patch: float) -> list[Option]:
        latency = self._latency
        options = [Option(self._blt, latency.next_byte(patch), 1)]
        for k, decoder in self._by_length.items():
            # About half of the rows come after the first patch that closes.
            seconds = latency.draft(k, 1) + latency.verify(k + 1, max(1, k + 1 - int(patch / 2)), patch)
            options.append(Option(decoder, seconds, k, self.drafts))
        for size, block in self._by_size.items():
            seconds = latency.draft(1, size + 1) + latency.verify(size + 1, size + 1, patch)
            options.append(Option(block, seconds, size, self.blocks))
        if self._unverified:
            size = self._block_size
            seconds = latency.draft(max(1, round(self._unverified_passes)) - 1, size)
            options.append(Option(self._unverified, seconds + latency.verify(size, 2 * size, patch), size))
        return options
