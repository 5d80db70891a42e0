"""Ragged attention over paged K/V.

Rows of many sequences lie end to end. Each sees the cache rows `first..last` of its own sequence: that one interval
expresses causality, sliding windows, isolated documents, and blocks whose rows see each other. Rows are grouped into
tiles of consecutive rows of one sequence; a tile gathers the pages that any of its rows sees.

Row-invariance: scores and products are formed per page (matrices of fixed shape), the maximum is exact in any order,
and per-page sums are added one page after the other, so that pages that a row does not see add exact zeros.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileGroup:
    """Tiles of equal size: S tiles of T rows over n pages each.

    rows (S, T) int64: which rows of the batch (padding repeats a row). pages (S, n) int64: cache pages, page 0 where
    there is none. hidden (S, n, 1, 1, T, page_size) bool: which cache rows a row does not see.
    """

    rows: Tensor
    pages: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Where the rows of one ragged batch live in one cache, and what each sees.

    positions (R,) int64. page, offset (R,) int64: where a row's own K/V go. groups: the tiles. take (R,) int64: a row's
    place in the tiles' outputs, laid end to end.
    """

    positions: Tensor
    page: Tensor
    offset: Tensor
    groups: tuple[TileGroup, ...]
    take: Tensor


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> None:
    """Stores k, v (R, kv_heads, head_dim) into the caches (pages, kv_heads, page_size, head_dim), in place."""
    k_cache[plan.page, :, plan.offset] = k
    v_cache[plan.page, :, plan.offset] = v


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q k / sqrt(head_dim)) v over what each row sees: q (R, heads, head_dim) in, the same shape out.

    Caches (pages, kv_heads, page_size, head_dim); heads is a multiple of kv_heads. Softmax and sums in float32.
    """
    q = q * q.shape[-1] ** -0.5
    outputs = [_attend(q, k_cache, v_cache, group) for group in plan.groups]
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat.index_select(0, plan.take)


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: TileGroup) -> Tensor:
    # index_select copies whole pages; indexing with a tensor goes element by element and takes four times as long.
    num_tiles, tile = group.rows.shape
    pages = group.pages.flatten()
    kv_heads, _, head_dim = k_cache.shape[1:]
    shared = q.shape[1] // kv_heads
    tiled = (
        q.index_select(0, group.rows.flatten()).view(num_tiles, tile, kv_heads, shared, head_dim).permute(0, 2, 3, 1, 4)
    )
    tiled = tiled.reshape(num_tiles, 1, kv_heads, shared * tile, head_dim)

    k = k_cache.index_select(0, pages).unflatten(0, group.pages.shape)
    v = v_cache.index_select(0, pages).unflatten(0, group.pages.shape)
    scores = tiled @ k.transpose(-1, -2)
    scores = scores.float().unflatten(3, (shared, tile)).masked_fill(group.hidden, float("-inf")).flatten(3, 4)
    weights = (scores - scores.amax(dim=(1, 4), keepdim=True)).exp()
    total = _add_pages(weights.sum(-1))
    out = _add_pages((weights.to(v.dtype) @ v).float())
    out = out / total.unsqueeze(-1)
    return (
        out.unflatten(2, (shared, tile))
        .permute(0, 3, 1, 2, 4)
        .reshape(num_tiles * tile, q.shape[1], head_dim)
        .to(q.dtype)
    )


def _add_pages(parts: Tensor) -> Tensor:
    """Sum over dimension 1, strictly one page after the other (torch.sum would choose an order by shape)."""
    first, *rest = parts.unbind(1)
    total = first.clone() if rest else first
    for part in rest:
        total += part
    return total
