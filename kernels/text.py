"""The running texts on the device: what one stage finds out about a byte, the next reads by slot and position.

The host plans positions only. It need not know a byte, nor where patches start, to launch the work that reads them.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """The texts of all slots, end to end: (N,) each. A place is slot * (positions of a slot) + position.

    A text's last committed byte may be followed by anything. Every place is written before it is read, so that drafts
    which are rejected need no clean-up.
    """

    ids: Tensor
    """int64"""
    entropies: Tensor
    """float32: the patcher's entropy in nats after each byte."""
    patch: Tensor
    """int32: the index of the patch that holds each byte."""
    patch_start: Tensor
    """int32: the position of that patch's first byte."""

    def addresses(self, place: int) -> tuple[int, int, int, int]:
        """Of each field at a place."""
        ids, entropies, patch, patch_start = [field.data_ptr() + field.itemsize * place for field in self]
        return ids, entropies, patch, patch_start


def windows(ids: Tensor, at: Tensor, positions: Tensor, width: int) -> Tensor:
    """The last `width` ids up to each row's byte, oldest first, 0 before the text: (R, width) int64.

    ids: of `Text`; at, positions (R,) int64: the rows' places, and their positions in their texts.
    """
    back = torch.arange(1 - width, 1, device=ids.device)
    inside = positions[:, None] + back >= 0
    return torch.where(inside, ids[(at[:, None] + back).clamp(min=0)], 0)
