"""Which bytes start a patch, decided on the device from the entropies there (BLT 2.3; Fast BLT 3.4)."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .lang import await_inputs, jit, let_next_begin, overlap, tl
from .text import Text
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


def boundaries(entropies: Tensor, text: Text, spans: Tensor, rule: Rule) -> Tensor:
    """Decides after each row whether the next byte starts a patch. Writes the entropies into the text, and the patches
    of the next bytes. Returns the entropies and decisions, (2, R) float32, for one copy to the host; rows in no span
    are undefined.

    entropies (R,) float32. spans (S, 4) int64: a sequence's first row, its number of rows, and the place and position
    of its first byte.
    """
    values, known = entropies.cpu().numpy(), Text(*(tensor.cpu() for tensor in text))
    found = np.zeros((2, len(values)), dtype=np.float32)
    for row, count, at, byte in spans.tolist():
        if not count:
            continue
        start, patch = int(known.patch_start[at]), int(known.patch[at])
        last = np.float32(known.entropies[at - 1].item() if byte else 0)
        starts, patches = [], []
        for r in range(row, row + count):
            byte += 1
            opens = starts_patch(values[r], last, byte, byte - start, rule)
            found[:, r] = values[r], opens
            start, patch = (byte, patch + 1) if opens else (start, patch)
            starts.append(start)
            patches.append(patch)
            last = values[r]
        text.entropies[at : at + count] = entropies[row : row + count]
        text.patch_start[at + 1 : at + count + 1] = torch.tensor(starts, dtype=torch.int32)
        text.patch[at + 1 : at + count + 1] = torch.tensor(patches, dtype=torch.int32)
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
    return Traffic(4 * rows + 44 * spans, 20 * rows)


@jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["entropies_ptr", "spans_ptr"])
def boundaries_kernel(
    entropies_ptr, known_ptr, patch_ptr, start_ptr, spans_ptr, found_ptr, rows, threshold, rise, longest,
    EVERY_BYTE: tl.constexpr, MONOTONIC: tl.constexpr, RISE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One sequence, row after row: the length of the open patch depends on every decision before."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    span = tl.program_id(0)
    row = tl.load(spans_ptr + span * 4)
    count = tl.load(spans_ptr + span * 4 + 1)
    at = tl.load(spans_ptr + span * 4 + 2)
    byte = tl.load(spans_ptr + span * 4 + 3)
    patch = tl.load(patch_ptr + at).to(tl.int64)
    start = tl.load(start_ptr + at).to(tl.int64)
    before = tl.load(known_ptr + at - 1, mask=byte > 0, other=0.0)
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
        patch += opens.to(tl.int64)
        tl.store(known_ptr + at, now)
        at += 1
        tl.store(patch_ptr + at, patch.to(tl.int32))
        tl.store(start_ptr + at, start.to(tl.int32))
        before = now


def boundaries_triton(entropies: Tensor, text: Text, spans: Tensor, rule: Rule) -> Tensor:
    """As `boundaries`."""
    rows = len(entropies)
    found = torch.empty(2, rows, device=entropies.device)
    boundaries_kernel[(len(spans),)](
        entropies, text.entropies, text.patch, text.patch_start, spans, found, rows, rule.threshold, rule.rise or 0.0,
        rule.longest or _NO_LIMIT, EVERY_BYTE=rule.every_byte, MONOTONIC=rule.monotonic, RISE=rule.rise is not None,
        num_warps=1, **overlap(entropies),
    )  # fmt: skip
    return found
