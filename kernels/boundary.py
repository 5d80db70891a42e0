"""Which bytes start a patch, decided on the device from the entropies there (BLT 2.3; Fast BLT 3.4)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .lang import await_inputs, jit, let_next_begin, overlap, tl
from .traffic import Traffic

_NO_LIMIT = 1 << 30
"""More bytes than any text has."""


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
    """The entropies again, and whether the byte after each row starts a patch: (2, R) float32, for one copy to the
    host. Rows in no span are zeros.

    entropies (R,) float32. spans (S, 4) int64: a sequence's first row, its number of rows, the index of its first byte,
    and the index of its open patch's first byte. previous (S,) float64: the entropy after the byte before.
    """
    values, before = entropies.cpu().numpy(), previous.cpu().numpy().astype(np.float32)
    found = np.zeros((2, len(values)), dtype=np.float32)
    for (row, count, byte, start), last in zip(spans.tolist(), before, strict=True):
        for r in range(row, row + count):
            byte += 1
            opens = starts_patch(values[r], last, byte, byte - start, rule)
            found[:, r] = values[r], opens
            start = byte if opens else start
            last = values[r]
    return torch.from_numpy(found).to(entropies.device)


def starts_patch(now: np.float32, before: np.float32, byte: int, length: int, rule: Rule) -> bool:
    """Whether `byte` starts a patch, from the entropies after the byte before it (`now`) and after the one before that
    (`before`), and the open patch's length. The first byte, BOS, is a patch by itself; the first differences of
    entropies are undefined."""
    if rule.every_byte or byte == 1 or 0 < rule.longest <= length:
        return True
    if rule.monotonic:
        return byte == 2 or bool(now - before > np.float32(rule.threshold))
    if rule.rise is not None:
        rises = bool(now - before > np.float32(rule.rise))
        return byte == 2 or (byte > 3 and rises and bool(now > np.float32(rule.threshold)))
    return bool(now > np.float32(rule.threshold))


def traffic(rows: int, spans: int) -> Traffic:
    return Traffic(4 * rows + 8 * spans, 8 * rows)


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["entropies_ptr", "previous_ptr", "spans_ptr"])
def boundaries_kernel(
    entropies_ptr, previous_ptr, spans_ptr, found_ptr, rows, threshold, rise, longest,
    EVERY_BYTE: tl.constexpr, MONOTONIC: tl.constexpr, RISE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One sequence, row after row: the length of the open patch depends on every decision before."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    span = tl.program_id(0)
    row = tl.load(spans_ptr + span * 4)
    count = tl.load(spans_ptr + span * 4 + 1)
    byte = tl.load(spans_ptr + span * 4 + 2)
    start = tl.load(spans_ptr + span * 4 + 3)
    before = tl.load(previous_ptr + span).to(tl.float32)
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
        opens = opens | (byte - start >= longest)
        tl.store(found_ptr + r, now)
        tl.store(found_ptr + rows + r, opens.to(tl.float32))
        start = tl.where(opens, byte, start)
        before = now


def boundaries_triton(entropies: Tensor, previous: Tensor, spans: Tensor, rule: Rule) -> Tensor:
    """As `boundaries`."""
    rows = len(entropies)
    found = torch.zeros(2, rows, device=entropies.device)
    boundaries_kernel[(len(spans),)](
        entropies, previous, spans, found, rows, rule.threshold, rule.rise or 0.0, rule.longest or _NO_LIMIT,
        EVERY_BYTE=rule.every_byte, MONOTONIC=rule.monotonic, RISE=rule.rise is not None, num_warps=1,
        **overlap(entropies),
    )  # fmt: skip
    return found
