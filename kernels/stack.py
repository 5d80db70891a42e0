"""The larger pieces of stages as operations: a stack of transformer layers with the operations before, between and
after them, and the storing of keys and values for a cross-attention.

Composed of the other operations. The CPU's own kernels do each in one call (`kernels.native`).
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

from .attention import AttentionPlan
from .embedding import Ids
from .linear import Matrix

if TYPE_CHECKING:
    from .dispatch import Kernels

KvPages = tuple[Tensor, Tensor]
"""Keys and values of one layer in pages: (pages, kv_heads, page_size, head_dim) each."""


class KvCache(tuple[KvPages, ...]):
    """Pages of every layer. The tensors never move."""

    @cached_property
    def addresses(self) -> "ctypes.Array[ctypes.c_int64]":
        """An array of `Cache` of kernels/native/attention.h."""
        numbers = [(k.data_ptr(), v.data_ptr(), *k.shape[1:]) for k, v in self]
        return (ctypes.c_int64 * (5 * len(self)))(*(number for layer in numbers for number in layer))


class CrossCache(NamedTuple):
    """The other cache that each row of a stack reads or writes: at page[r], offset[r] (R,) int64."""

    cache: KvCache
    page: Tensor
    offset: Tensor
    states: Tensor | None = None
    """(pages, page_size, dim)"""


class StackFunction(Protocol):
    def __call__(
        self,
        x: Tensor | Ids,
        cache: KvCache,
        plan: AttentionPlan,
        cross: CrossCache | None = None,
        logit_rows: Tensor | None = None,
    ) -> Tensor:
        """x (R, dim), or bytes if there is an embedding, to states (R, dim), or to logits if there is a head, which
        may be wider than x. The rows' K/V go to the cache first, so that rows of one call see each other. logit_rows
        (W,) int64: the rows to return, by default all; if empty, the result is undefined.
        """
        ...


CrossKvFunction = Callable[[Tensor, KvCache, Tensor, Tensor], None]
"""Stores x (R, dim) as keys and values at page[r], offset[r] (R,) int64 of every cache."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A pre-norm layer: self-attention with rotary positions, then SwiGLU, each with a residual.

    qkv: queries, keys and values stacked; gate_up: gate, then up. rope as `rope_table` gives it.
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


@dataclass(frozen=True, slots=True)
class CrossKvWeights:
    """Turns rows into keys and values of a cross-attention; kv: keys and values stacked."""

    norm: Tensor
    kv: Matrix
    head_dim: int
    eps: float


@dataclass(frozen=True, slots=True)
class HeadWeights:
    norm: Tensor
    matrix: Matrix
    eps: float


@dataclass(frozen=True, slots=True)
class StackWeights:
    """Layers in a row.

    slots: of the first layers; each reads the latent whose slots begin at `CrossCache`. cross_kv: of the last layers;
    the states after each are stored there as keys and values, those after the first also as states.
    """

    layers: Sequence[LayerWeights]
    embedding: Tensor | None = None
    slots: Sequence[SlotsWeights] = ()
    cross_kv: Sequence[CrossKvWeights] = ()
    head: HeadWeights | None = None


def composed_stack(k: "Kernels", w: StackWeights) -> StackFunction:
    first_kv = len(w.layers) - len(w.cross_kv)

    def stack(
        x: Tensor | Ids,
        cache: KvCache,
        plan: AttentionPlan,
        cross: CrossCache | None = None,
        logit_rows: Tensor | None = None,
    ) -> Tensor:
        if w.embedding is not None:
            assert isinstance(x, Ids)
            x = k.embed(*x, w.embedding)
        assert isinstance(x, Tensor)
        for i, (layer, kv) in enumerate(zip(w.layers, cache, strict=True)):
            if i < len(w.slots):
                assert cross
                x = _slots(k, w.slots[i], x, cross.cache[i], cross.page, cross.offset)
            x = _layer(k, layer, x, kv, plan)
            if i >= first_kv:
                assert cross
                states = cross.states if i == first_kv else None
                k.keys_values(x, w.cross_kv[i - first_kv], cross.cache[i - first_kv], cross.page, cross.offset, states)
        if w.head is None:
            return x if logit_rows is None else x.index_select(0, logit_rows)
        if logit_rows is not None and not len(logit_rows):
            return x[:0]
        return k.linear(x, w.head.matrix, norm=w.head.norm, eps=w.head.eps, rows=logit_rows, wide=True)

    return stack


def composed_cross_kv(k: "Kernels", ws: Sequence[CrossKvWeights]) -> CrossKvFunction:
    def store(x: Tensor, cache: KvCache, page: Tensor, offset: Tensor) -> None:
        for w, kv in zip(ws, cache, strict=True):
            k.keys_values(x, w, kv, page, offset)

    return store


def _layer(k: "Kernels", w: LayerWeights, x: Tensor, cache: KvPages, plan: AttentionPlan) -> Tensor:
    q = k.qkv(x, w.qkv, w.attention_norm, w.eps, w.rope, plan.positions, plan.page, plan.offset, *cache)
    x = k.linear(k.attention(q, *cache, plan).flatten(1), w.o, residual=x)
    gated = k.linear(x, w.gate_up, norm=w.ffn_norm, eps=w.eps, gated=True)
    return k.linear(gated, w.down, residual=x)


def _slots(k: "Kernels", w: SlotsWeights, x: Tensor, cache: KvPages, page: Tensor, offset: Tensor) -> Tensor:
    q = k.linear(x, w.q, norm=w.norm, eps=w.eps).unflatten(1, (-1, w.head_dim))
    return k.read_slots(q, *cache, page, offset, w.slots, w.o, x)
