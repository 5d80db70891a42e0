"""Slots: where on the device the text of each running sequence lies; see `kernels.text`."""

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.text import Text

from ..rows import Rows
from ..sequence import Sequence

SLOT_ITEMSIZE = 20
"""Bytes of a position: an id of eight, and an entropy and two numbers of patches of four each."""


class Slots:
    """The texts of up to `count` running sequences, of up to `length` positions each. Padding rows use slot 0."""

    def __init__(self, count: int, length: int, device: torch.device) -> None:
        self._length, self._device = length, device
        size = (count + 1) * self._length
        on_host = np.zeros(size, dtype=np.int64)
        # A host has one copy of the ids. For another device the host keeps its own, to send only those that differ.
        self._ids: NDArray[np.int64] = on_host
        ids = torch.from_numpy(on_host) if device.type == "cpu" else torch.zeros(size, dtype=torch.int64, device=device)
        self.text = Text(
            ids,
            torch.from_numpy(np.zeros(size, np.float32)).to(device),
            torch.from_numpy(np.zeros(size, np.int32)).to(device),
            torch.from_numpy(np.zeros(size, np.int32)).to(device),
        )
        self._free = list(range(count, 0, -1))

    def take(self, sequence: Sequence) -> None:
        """Gives a sequence a slot, unless it has one, with its ids and the boundaries that are decided."""
        if sequence.slot:
            return
        sequence.slot = self._free.pop()
        self.write(sequence, 0, sequence.ids)
        patching = sequence.patching
        decided, at = patching.decided, self.place(sequence, 0)
        starts = np.array(patching.starts, dtype=np.int32)
        patch = np.searchsorted(starts, np.arange(decided + 1), side="right").astype(np.int32) - 1
        self._send(self.text.patch, at, patch)
        self._send(self.text.patch_start, at, starts[patch])
        self._send(self.text.entropies, at, np.array(patching.entropies, dtype=np.float32))

    def drop(self, sequence: Sequence) -> None:
        """Takes a sequence's slot back, if it has one."""
        if sequence.slot:
            self._free.append(sequence.slot)
            sequence.slot = 0

    def place(self, sequence: Sequence, position: int) -> int:
        """The index in `Text` of a position of a sequence."""
        return sequence.slot * self._length + position

    def places(self, batch: Iterable[Rows]) -> list[int]:
        """Those of all rows of the text."""
        places: list[int] = []
        for rows in batch:
            at = self.place(rows.sequence, rows.start)
            places += range(at, at + rows.num_text)
        return places

    def write(self, sequence: Sequence, position: int, ids: Seq[int]) -> bool:
        """Writes ids that the host knows, unless the device has them all. Returns whether it wrote."""
        at = self.place(sequence, position)
        known = self._ids[at : at + len(ids)]
        if known.tolist() == list(ids):
            return False
        known[:] = ids
        if self._device.type != "cpu":
            self._send(self.text.ids, at, known)
        return True

    def note_read(self, sequence: Sequence, position: int, ids: Seq[int]) -> None:
        """Notes ids that the device wrote and the host has read."""
        if self._device.type != "cpu":
            at = self.place(sequence, position)
            self._ids[at : at + len(ids)] = ids

    def _send(self, to: Tensor, at: int, values: NDArray[np.int32] | NDArray[np.int64] | NDArray[np.float32]) -> None:
        """Copies values after the work launched so far."""
        part = torch.from_numpy(np.ascontiguousarray(values))
        if self._device.type != "cpu":
            part = part.pin_memory()
        to[at : at + len(part)].copy_(part, non_blocking=True)
