"""Auto: for every round the decoder that promises the most bytes per second, among those whose text is blt's."""

from dataclasses import dataclass, field
from typing import Protocol

from ..types import Unmask
from .blt import Autoregressive
from .blt_d import DEFAULT_RULE, Diffusion
from .blt_dv import Verified
from .blt_s import Draft
from .calls import Committed, Decoder, Round, SequenceView

DRAFT_LENGTHS = (2, 4, 8, 16, 32)
MEMORY = 0.9
"""What an observation counts for one round later."""
PRIOR_ROUNDS = 4.0
PROBE_INTERVAL = 64
"""Rounds after which a way of drafting that did not seem worth it is tried again."""


class Costs(Protocol):
    """Seconds that the stages take, as measured so far; see `engine.costs.latency`."""

    def feed(self, patch: float) -> float:
        """One byte by blt, a global pass every `patch` bytes."""
        ...

    def draft(self, passes: int, rows: int) -> float:
        """So many decoder passes over `rows` rows each, a step each."""
        ...

    def verify(self, rows: int, decoded: int, patch: float) -> float:
        """A step of `rows` clean rows, `decoded` of them through the decoder."""
        ...


@dataclass(slots=True)
class Agreement:
    """How often a drafted byte is the model's, as a chance per byte that forgets."""

    expected: float
    right: float = 0.0
    checked: float = 0.0
    idle: int = 0

    @property
    def rate(self) -> float:
        return (self.right + PRIOR_ROUNDS * self.expected) / (self.checked + PRIOR_ROUNDS)

    def saw(self, drafted: int, accepted: int) -> None:
        self.right = MEMORY * self.right + accepted
        self.checked = MEMORY * self.checked + accepted + (accepted < drafted)

    def committed(self, drafts: int) -> float:
        """Bytes that a round with so many drafts is expected to commit, the model's own included."""
        return sum(self.rate**i for i in range(drafts + 1))


@dataclass(slots=True)
class Experience:
    """What all sequences of an engine have seen: where a new one begins."""

    drafting: Agreement = field(default_factory=lambda: Agreement(0.9))
    diffusion: Agreement = field(default_factory=lambda: Agreement(0.7))


class Auto:
    """Switching costs nothing, because every byte is the same whichever decoder finds it."""

    def __init__(self, block_size: int, costs: Costs, experience: Experience, exact: bool) -> None:
        self._costs = costs
        self._everyone = experience
        self._drafting = Agreement(experience.drafting.rate)
        self._diffusion = Agreement(experience.diffusion.rate)
        self._blt: Decoder = Autoregressive()
        self._drafts = {k: Draft(k) for k in DRAFT_LENGTHS}
        one_step = Unmask(rule="one_step")
        inexact = block_size and not exact
        self._free = Diffusion(block_size, DEFAULT_RULE, finish_patch=False) if inexact else None
        self._free_size, self._passes = block_size, block_size / 2
        self._blocks = {size: Verified(size, one_step) for size in (block_size // 2, block_size) if size}

    def round(self, sequence: SequenceView, room: int) -> Round:
        way, decoder = self._choose(sequence)
        passes = sequence.cost.decoder_calls
        outcome: Committed = yield from decoder.round(sequence, room)
        if decoder is self._free:
            self._passes = MEMORY * self._passes + (1 - MEMORY) * (sequence.cost.decoder_calls - passes)
        for agreement in (self._drafting, self._diffusion):
            agreement.idle += 1
        if way and outcome.drafted:
            way.idle = 0
            way.saw(outcome.drafted, outcome.accepted)
            common = self._everyone.drafting if way is self._drafting else self._everyone.diffusion
            common.saw(outcome.drafted, outcome.accepted)
        return outcome

    def _choose(self, sequence: SequenceView) -> tuple[Agreement | None, Decoder]:
        patch = sequence.mean_patch
        options: list[tuple[float, Agreement | None, Decoder]] = [(1 / self._costs.feed(patch), None, self._blt)]
        for k, decoder in self._drafts.items():
            # About half of the rows lie behind the first patch that closes.
            seconds = self._costs.draft(k, 1) + self._costs.verify(k + 1, max(1, k + 1 - int(patch / 2)), patch)
            options.append((self._drafting.committed(k) / seconds, self._drafting, decoder))
        for size, block in self._blocks.items():
            seconds = self._costs.draft(1, size + 1) + self._costs.verify(size + 1, size + 1, patch)
            options.append((self._diffusion.committed(size) / seconds, self._diffusion, block))
        if self._free:
            size = self._free_size
            seconds = self._costs.draft(max(1, round(self._passes)) - 1, size)
            seconds += self._costs.verify(size, 2 * size, patch)
            options.append((size / seconds, None, self._free))
        best = max(options, key=lambda option: option[0])
        for way in (self._drafting, self._diffusion):
            if way.idle >= PROBE_INTERVAL and best[1] is not way:
                tried = [option for option in options if option[1] is way]
                if tried:
                    best = max(tried, key=lambda option: option[0])
                    way.idle = 0
        return best[1], best[2]
