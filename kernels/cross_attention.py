"""The decoder's cross-attention: every byte row reads the k slots of exactly one latent."""

from torch import Tensor


def slot_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k / sqrt(head_dim)) v over the slots of each row's own latent: (R, heads, head_dim).

    q (R, heads, head_dim); k, v (R, slots, kv_heads, head_dim); heads is a multiple of kv_heads. Scores and softmax in
    float32. No mask, no position.
    """
    grouped = q.float().unflatten(1, (k.shape[2], -1)).unsqueeze(1)
    scores = (grouped * k.float().unsqueeze(3)).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
    return (scores.softmax(1) * v.float().unsqueeze(3)).sum(1).flatten(1, 2).to(q.dtype)
