"""The decoder's cross-attention: every byte row reads the k slots of exactly one latent."""

from torch import Tensor


def slot_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(head_dim)) v over the slots of each row's own latent: (R, heads, head_dim).

    q (R, heads, head_dim); k, v (R, slots, heads, head_dim). Scores and softmax in float32. No mask, no position.
    """
    scores = (q.unsqueeze(1).float() * k.float()).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    return (scores.softmax(1) * v.float()).sum(1).to(q.dtype)
