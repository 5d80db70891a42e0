"""The decoders as benchmarks run them: each name's fields of a request."""

from typing import Any

from engine.decoders.paper import PAPER_PASSES
from engine.engine import Engine
from engine.types import UnmaskRule

from .models import Form
from .replay import gamma_for

Ways = dict[str, dict[str, Any]]

RANDOM: dict[Form, Ways] = {
    "fast": {
        "blt": {"decoder": "blt"},
        "blt-s k=8": {"decoder": "blt-s", "draft_length": 8},
        "blt-s k=16": {"decoder": "blt-s", "draft_length": 16},
        "blt-d B=8": {"decoder": "blt-d", "unmask": UnmaskRule(rule="entropy", gamma=gamma_for(8, PAPER_PASSES[8]))},
        "blt-dv B=8": {"decoder": "blt-dv"},
    },
    "released": {
        "blt": {"decoder": "blt"},
        "blt-s k=8": {"decoder": "blt-s", "draft_length": 8},
    },
}
"""For random weights: their blt-d blocks take as many passes as the paper's."""
TRAINED: Ways = {**RANDOM["fast"], "blt-d B=8": {"decoder": "blt-d"}}


def ways_of(engine: Engine, *, drawn: bool) -> Ways:
    """The ways that a model supports. drawn: whether its weights are random."""
    ways = RANDOM["fast"] if drawn else TRAINED
    return {way: how for way, how in ways.items() if how["decoder"] in engine.limits.decoders}


def acceptance(way: str, *, replays: bool) -> str:
    """How drafts are accepted."""
    if way == "blt":
        return "none needed"
    return "replayed acceptance" if replays else "the model's"
