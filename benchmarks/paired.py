"""Measures two variants in turns. Machines are shared and noisy: only measurements made in turns are compared."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .generate import Reading

A = TypeVar("A")
B = TypeVar("B")


def in_turn(one: Callable[[], A], other: Callable[[], B], turns: int) -> list[tuple[A, B]]:
    """A B A B ..."""
    return [(one(), other()) for _ in range(turns)]


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and range."""
    found = list(values)
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def shown(of: dict[str, float], form: str = ".2f") -> str:
    """A spread as text, for tables; that of a single turn has no range."""
    if of["least"] == of["most"]:
        return f"{of['median']:{form}}"
    return f"{of['median']:{form}} ({of['least']:{form}} to {of['most']:{form}})"


def figures(pairs: "Sequence[tuple[Reading, Reading]]", peaks: Sequence[float]) -> dict[str, Any]:
    """Figures of turns of blt and another way. peaks: the memory's bytes per second in each turn.

    realisation: the speed-up by the clock over the one that the bytes read predict. bandwidth_use: bytes read per
    second over the peak. host_cost: the share of steps outside the stages.
    """
    ratios = [found.bytes_per_second / blt.bytes_per_second for blt, found in pairs]
    predicted = [blt.read_per_byte / found.read_per_byte for blt, found in pairs]
    realised = [r / p for r, p in zip(ratios, predicted, strict=True)]
    read = [found.bytes_read / found.seconds for _, found in pairs]
    last = pairs[-1][1]
    return {
        "bytes_per_second": statistics.median(found.bytes_per_second for _, found in pairs),
        "over_blt": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "predicted": statistics.median(predicted),
        "realisation": statistics.median(realised),
        "realisation_range": [min(realised), max(realised)],
        "read_gb_s": statistics.median(read) / 1e9,
        "bandwidth_use": statistics.median(r / peak for r, peak in zip(read, peaks, strict=True)),
        "host_cost": statistics.median(found.host_cost for _, found in pairs),
        "read_mb_per_byte": last.read_per_byte / 1e6,
        "bytes_per_round": last.committed / last.rounds,
        "decoder_calls_per_byte": last.decoder_calls / last.committed,
        "global_calls_per_byte": last.global_calls / last.committed,
        "ms_per_step": 1000 * last.seconds / last.steps,
    }
