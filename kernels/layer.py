"""The two larger pieces that stages are made of, as operations: a transformer layer, and the decoder's cross-attention.

Composed of the other operations. The CPU's own kernels do each in one call (`kernels.native`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .attention import AttentionPlan
from .linear import Matrix

if TYPE_CHECKING:
    from .dispatch import Kernels

KvPages = tuple[Tensor, Tensor]
"""Keys and values of one layer in pages: (pages, kv_heads, page_size, head_dim) each."""
LayerFunction = Callable[[Tensor, KvPages, AttentionPlan], Tensor]
"""x (R, dim) in and out; the rows' K/V go to the cache first, so that rows of one call see each other."""
SlotsFunction = Callable[[Tensor, KvPages, Tensor, Tensor], Tensor]
"""x (R, dim) in and out; row r reads the latent whose slots begin at page[r], offset[r] (R,) int64."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A pre-norm layer: self-attention with rotary positions, then SwiGLU, each with a residual.

    qkv: queries, keys and values on top of each other; gate_up: gate, then up. rope as `rope_table` gives it.
    """

    attention_norm: Tensor
    qkv: Matrix
    o: Matrix
    ffn_norm: Tensor
    gate_up: Matrix
    down: Matrix
    rope: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True, slots=True)
class SlotsWeights:
    """Cross-attention of byte rows over the slots of one latent, with a double residual, x + (x + Wo attn)."""

    norm: Tensor
    q: Matrix
    o: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    slots: int


def composed_layer(k: "Kernels", w: LayerWeights) -> LayerFunction:
    def layer(x: Tensor, cache: KvPages, plan: AttentionPlan) -> Tensor:
        qkv = k.linear(x, w.qkv, norm=w.attention_norm, eps=w.eps).unflatten(1, (-1, w.head_dim))
        q = k.store_qkv(qkv, w.rope, plan.positions, plan.page, plan.offset, *cache)
        x = k.linear(k.attention(q, *cache, plan).flatten(1), w.o, residual=x)
        gated = k.linear(x, w.gate_up, norm=w.ffn_norm, eps=w.eps, gated=True)
        return k.linear(gated, w.down, residual=x)

    return layer


def composed_slots(k: "Kernels", w: SlotsWeights) -> SlotsFunction:
    def slots(x: Tensor, cache: KvPages, page: Tensor, offset: Tensor) -> Tensor:
        q = k.linear(x, w.q, norm=w.norm, eps=w.eps).unflatten(1, (-1, w.head_dim))
        seen = k.slot_attention(q, *cache, page, offset, w.slots)
        return k.linear(seen.flatten(1), w.o, residual=x, twice=True)

    return slots
