"""Rotary position embedding, interleaved: the pairs are (0, 1), (2, 3), ... (RoFormer; BLT keeps Meta's order)."""

import torch
from torch import Tensor


def rope_table(head_dim: int, theta: float, num_positions: int, device: torch.device) -> Tensor:
    """cos and sin of every position's angles: (num_positions, 2, head_dim / 2), float32."""
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * inverse
    return torch.stack((angles.cos(), angles.sin()), dim=1).to(device)


def apply_rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates x (R, heads, head_dim) by angles (R, 2, head_dim / 2), the rows of `rope_table` at x's positions.

    In float32, rounded once to x's dtype.
    """
    cos, sin = angles[:, None, 0], angles[:, None, 1]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
