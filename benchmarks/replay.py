"""Replayed acceptance: drafts of random weights are hardly ever right, so the number of accepted bytes is drawn
instead.

A round runs exactly as its decoder defines it, draft and verification; only then the number of committed drafts is
replaced. That leaves a valid sequence, since the verifying rows were computed from the drafts. The rates are those
of `engine.decoders.paper`. A figure that rests on this is always labelled "replayed acceptance".
"""

import random

from engine.decoders import Committed, Decoder, Round, SequenceView, make_decoder
from engine.decoders.auto import SharedPrior
from engine.decoders.paper import PAPER_ACCEPTANCE
from engine.decoders.phrases import single
from engine.engine import Engine
from engine.types import Request

from .generate import Wrap

CELL_ENTROPY = 5.06
"""Entropy in nats of a cell under logits of standard deviation 1 over 260 ids, as random weights give them."""


def gamma_for(size: int, passes: int) -> float:
    """A bound for the rule `entropy` under which a block of random weights takes `passes` passes."""
    cells = -(-size // passes)
    return (cells + 0.5) * CELL_ENTROPY


def chance_per_byte(rate: float, length: int) -> float:
    """The chance of accepting each byte, given that all before it are accepted, for the share `rate` of `length`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**i for i in range(1, length + 1)) < rate * length:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class Replayed(Decoder):
    """`inner`, with the number of accepted drafts drawn so that the share `rate` of `length` is accepted."""

    def __init__(self, inner: Decoder, rate: float, length: int, seed: int) -> None:
        self._inner = inner
        self._chance = chance_per_byte(rate, length)
        self._draw = random.Random(seed)

    def choose(self, sequence: SequenceView) -> None:
        self._inner.choose(sequence)

    def round(self, sequence: SequenceView, room: int) -> Round:
        outcome: Committed = yield from single(self._inner.round(sequence, room))
        if not outcome.drafts:
            return outcome
        stand = 0
        while stand < len(outcome.drafts) and self._draw.random() < self._chance:
            stand += 1
        own = outcome.ids[min(stand, len(outcome.ids) - 1)]
        return Committed([*outcome.drafts[:stand], own], [], outcome.drafts, stand, outcome.passes)


def replayed(engine: Engine) -> Wrap:
    """Wraps a request's decoder with replayed acceptance, at the paper's rate for its decoder and length."""

    def wrap(request: Request) -> Decoder:
        size = engine.model_config.block_size
        decoder = make_decoder(request, size, engine.ledger.latency, SharedPrior())
        length = request.draft_length if request.decoder == "blt-s" else size or 0
        rate = PAPER_ACCEPTANCE.get((request.decoder, length))
        return decoder if rate is None else Replayed(decoder, rate, length, seed=0)

    return wrap
