"""Max-pooling of byte states into patches."""

import torch
from torch import Tensor


def patch_max(states: Tensor, lengths: Tensor) -> Tensor:
    """Elementwise maximum over the bytes of each patch: (patches, d).

    states (bytes, d): the patches' bytes laid end to end; lengths (patches,) int64, each >= 1.
    """
    return torch.segment_reduce(states.float(), "max", lengths=lengths, axis=0).to(states.dtype)
