"""Which bytes start a patch, decided from entropies where they were computed (BLT 2.3; Fast BLT 3.4)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .lang import jit, tl
from .traffic import Traffic


class Rule(NamedTuple):
    """When the next byte starts a patch; entropies in nats, compared in float32.

    every_byte: always. monotonic: where the entropy rises by more than `threshold`. rise: where it rises by more than
    `rise` and is above `threshold`. Otherwise where it is above `threshold`. In any case once the open patch has
    `longest` bytes (0: no limit).
    """

    threshold: float
    rise: float | None = None
    monotonic: bool = False
    every_byte: bool = False
    longest: int = 0


def boundaries(entropies: Tensor, previous: Tensor, spans: Tensor, rule: Rule) -> Tensor:
    """Whether the byte behind each row starts a patch: (R,) bool. Rows in no span are False.

    entropies (R,) float32. spans (S, 4) int64: a sequence's first row, how many rows, the byte that the first one is,
    and the byte that its open patch starts with. previous (S,) float32: the entropy behind the byte before.
    """
    opens = torch.zeros(len(entropies), dtype=torch.bool, device=entropies.device)
    for (row, count, byte, start), before in zip(spans.tolist(), previous, strict=True):
        for r in range(row, row + count):
            now = entropies[r]
            byte += 1
            opens[r] = _exceeds(now, before, byte, rule) or (0 < rule.longest <= byte - start)
            start = byte if opens[r] else start
            before = now
    return opens


def _exceeds(now: Tensor, before: Tensor, byte: int, rule: Rule) -> bool:
    """`byte`: the one that would start the patch. The first byte, BOS, is a patch by itself; the first differences of
    entropies mean nothing."""
    if rule.every_byte or byte == 1:
        return True
    if rule.monotonic:
        return byte == 2 or bool(now - before > rule.threshold)
    if rule.rise is not None:
        return byte == 2 or (byte > 3 and bool(now - before > rule.rise) and bool(now > rule.threshold))
    return bool(now > rule.threshold)


def traffic(rows: int, spans: int) -> Traffic:
    return Traffic(4 * rows + 36 * spans, rows)


@jit
def boundaries_kernel(
    entropies_ptr, previous_ptr, spans_ptr, opens_ptr, threshold, rise, longest,
    EVERY_BYTE: tl.constexpr, MONOTONIC: tl.constexpr, RISE: tl.constexpr,
):  # fmt: skip
    """One sequence, row after row: the length of the open patch depends on every decision before."""
    span = tl.program_id(0)
    row = tl.load(spans_ptr + span * 4)
    count = tl.load(spans_ptr + span * 4 + 1)
    byte = tl.load(spans_ptr + span * 4 + 2)
    start = tl.load(spans_ptr + span * 4 + 3)
    before = tl.load(previous_ptr + span)
    for r in range(row, row + count):
        now = tl.load(entropies_ptr + r)
        byte += 1
        if EVERY_BYTE:
            opens = byte > 0
        elif MONOTONIC:
            opens = (byte <= 2) | (now - before > threshold)
        elif RISE:
            opens = (byte <= 2) | ((byte > 3) & (now - before > rise) & (now > threshold))
        else:
            opens = (byte == 1) | (now > threshold)
        opens = opens | ((longest > 0) & (byte - start >= longest))
        tl.store(opens_ptr + r, opens)
        start = tl.where(opens, byte, start)
        before = now


def boundaries_triton(entropies: Tensor, previous: Tensor, spans: Tensor, rule: Rule) -> Tensor:
    """The same."""
    opens = torch.zeros(len(entropies), dtype=torch.bool, device=entropies.device)
    boundaries_kernel[(len(spans),)](
        entropies, previous, spans, opens, rule.threshold, rule.rise or 0.0, rule.longest,
        EVERY_BYTE=rule.every_byte, MONOTONIC=rule.monotonic, RISE=rule.rise is not None, num_warps=1,
    )  # fmt: skip
    return opens
