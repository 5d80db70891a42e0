"""RMS normalisation. On a GPU it is the prologue of the product that reads it (`linear`), never a pass of its own."""

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, rounded once to x's dtype.

    x (..., d), weight (d,).
    """
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)
