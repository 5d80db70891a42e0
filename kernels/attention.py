"""Ragged attention over paged K/V.

Rows of many sequences lie end to end. Each sees the cache rows `first..last` of its own sequence: that one interval
expresses causality, sliding windows, isolated documents, and blocks whose rows see each other. Rows are grouped into
tiles of consecutive rows of one sequence; a tile reads the pages that any of its rows sees.

Row-invariance: scores and products are formed per page (matrices of fixed shape) and pages are added in order, so that
pages that a row does not see add exact zeros. The Triton kernel forms a partial of each page (maximum, sum, weighted
values) and merges them in order. Few tiles are split over the device, one program per page, whose last one to arrive
merges; of many tiles each is one program. The bits are the same. (Products and sums are not fused, or the bits would
depend on what a compiler fuses.)
"""

import ctypes
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .gate import gate_options
from .lang import IN_INTERPRETER, await_inputs, dot, jit, let_next_begin, power_of_two, tl
from .traffic import Traffic

TILE = 16
"""Rows per tile that suit the Triton kernel."""
LARGE_TILE = 32
"""Rows per tile of the torch twin for a sequence with more than a few rows."""
WHOLE = 0 if IN_INTERPRETER else 512
"""More programs than this keep a device busy without splitting tiles. In the interpreter each takes long to begin."""
SCRATCH = 32 << 20
"""Most bytes of the partials of split tiles."""

_counters: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
"""Of programs that have arrived, by device."""

BEGIN, COUNT, PAGES_AT, FIRST_PAGE, NUM_PAGES = range(5)
"""Columns of `AttentionPlan.tiles`."""


class PlanShape(NamedTuple):
    """Lengths of the arrays of an `AttentionPlan`. most_pages: no tile has more; 1 also where tiles must not be
    split."""

    rows: int
    queries: int
    tiles: int
    pages: int
    most_pages: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each array."""
        return self.rows, self.rows, self.rows, self.queries, self.queries, 5 * self.tiles, self.pages


@dataclass(frozen=True)
class AttentionPlan:
    """Where the rows of one ragged batch lie in one cache, and which rows each sees.

    data (N,) int64: the arrays below, end to end. small_tile: rows to which the torch twin pads small tiles.
    """

    data: Tensor
    shape: PlanShape
    small_tile: int = 4
    page_size: int = 64

    @classmethod
    def of(
        cls, positions: Tensor, page: Tensor, offset: Tensor, first: Tensor, last: Tensor, tiles: Tensor, pages: Tensor,
        most_pages: int = 1, page_size: int = 64,
    ) -> "AttentionPlan":  # fmt: skip
        """Joins the arrays."""
        parts = positions, page, offset, first, last, tiles.flatten(), pages
        shape = PlanShape(len(positions), len(first), len(tiles), len(pages), most_pages)
        return cls(torch.cat(parts), shape, page_size=page_size)

    @property
    def positions(self) -> Tensor:
        """(R,): positions of the rows that are written, at `page` and `offset`."""
        return self._arrays[0]

    @cached_property
    def page(self) -> Tensor:
        return self.data[self.shape.rows : 2 * self.shape.rows]

    @cached_property
    def offset(self) -> Tensor:
        return self.data[2 * self.shape.rows : 3 * self.shape.rows]

    @property
    def first(self) -> Tensor:
        """(Q,): each query sees the cache rows from here to `last`."""
        return self._arrays[3]

    @property
    def last(self) -> Tensor:
        return self._arrays[4]

    @property
    def tiles(self) -> Tensor:
        """(S, 5): a tile's first query, its number of queries, where its pages begin in `pages`, the sequence's page
        number there, and its number of pages (0 for padding). Every query is in exactly one tile."""
        return self._arrays[5].view(-1, 5)

    @property
    def pages(self) -> Tensor:
        """(N,): cache pages."""
        return self._arrays[6]

    @cached_property
    def _arrays(self) -> tuple[Tensor, ...]:
        return self.data.split(self.shape.sizes)

    @cached_property
    def addresses(self) -> "ctypes.Array[ctypes.c_int64]":
        """`Plan` of kernels/native/attention.h."""
        rows, queries, tiles, _, _ = self.shape
        at = self.data.data_ptr()
        starts = (at + 8 * before for before in accumulate(self.shape.sizes[:-1], initial=0))
        return (ctypes.c_int64 * 11)(rows, queries, tiles, self.page_size, *starts)

    @cached_property
    def groups(self) -> "tuple[tuple[_TileGroup, ...], Tensor]":
        """The tiles for the torch twin, and every query's index in their concatenated outputs."""
        return _group(self)


def attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """softmax(q k / sqrt(head_dim)) v over the rows that each row sees: q (Q, heads, head_dim) in, the same shape out.

    Caches (pages, kv_heads, page_size, head_dim); heads is a multiple of kv_heads. Softmax and sums in float32. Outputs
    of padding rows are finite.
    """
    groups, take = plan.groups
    q = q * q.shape[-1] ** -0.5
    outputs = [_attend(q, k_cache, v_cache, group) for group in groups]
    flat = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return flat.index_select(0, take)


def traffic(queries: int, seen_rows: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> Traffic:
    """Bytes of `attention`: queries in and out, and the K/V rows of every sequence's interval once (`seen_rows`)."""
    q = queries * heads * head_dim * itemsize
    return Traffic(q + seen_rows * 2 * kv_heads * head_dim * itemsize, q)


# The torch twin.


@dataclass(frozen=True, slots=True)
class _TileGroup:
    """Tiles of equal size: S tiles of T rows over n pages each.

    rows (S, T) int64: rows of the batch (padding repeats a row). pages (S, n) int64: cache pages, 0 for none. hidden
    (S, n, 1, 1, T, page_size) bool: whether a row must not see a cache row. unseen (S, n, 1, page_size, 1): whether no
    row sees it: it may hold anything, and 0 times NaN is NaN.
    """

    rows: Tensor
    pages: Tensor
    hidden: Tensor
    unseen: Tensor


def _group(plan: AttentionPlan) -> tuple[tuple[_TileGroup, ...], Tensor]:
    device = plan.tiles.device
    tiles, pages, first, last = (t.cpu().numpy() for t in (plan.tiles, plan.pages, plan.first, plan.last))
    tiles = tiles[tiles[:, NUM_PAGES] > 0]
    small = tiles[:, COUNT] <= plan.small_tile
    take = np.zeros(len(first), dtype=np.int64)
    groups: list[_TileGroup] = []
    start = 0
    for size, some in ((plan.small_tile, tiles[small]), (LARGE_TILE, tiles[~small])):
        if not len(some):
            continue
        if len(some) * some[:, NUM_PAGES].max() == 1:
            # A library may have another way for a batch of one.
            some = np.concatenate([some, some])
        begin, count, at, first_page, num_pages = (column[:, None] for column in some.T)
        place = np.arange(size)
        rows = begin + np.minimum(place, count - 1)
        index = np.arange(num_pages.max())
        pages_of = np.where(index < num_pages, pages[at + np.minimum(index, num_pages - 1)], 0)
        keys = ((first_page + index)[:, :, None] * plan.page_size + np.arange(plan.page_size))[:, :, None, :]
        hidden = (keys < first[rows][:, None, :, None]) | (keys > last[rows][:, None, :, None])
        used = place < count
        take[rows[used]] = start + np.flatnonzero(used)
        start += used.size
        groups.append(
            _TileGroup(
                torch.from_numpy(rows).to(device),
                torch.from_numpy(pages_of).to(device),
                torch.from_numpy(hidden[:, :, None, None]).to(device),
                torch.from_numpy(hidden.all(2)[:, :, None, :, None]).to(device),
            )
        )
    return tuple(groups), torch.from_numpy(take).to(device)


def _attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, group: _TileGroup) -> Tensor:
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
    v = v_cache.index_select(0, pages).unflatten(0, group.pages.shape).masked_fill_(group.unseen, 0)
    scores = products(tiled, k.transpose(-1, -2))
    scores = scores.float().unflatten(3, (shared, tile)).masked_fill(group.hidden, float("-inf")).flatten(3, 4)
    weights = (scores - scores.amax(dim=(1, 4), keepdim=True)).exp()
    total = _add_pages(weights.sum(-1))
    out = _add_pages(products(weights.to(v.dtype), v).float())
    out = out / total.unsqueeze(-1)
    return (
        out.unflatten(2, (shared, tile))
        .permute(0, 3, 1, 2, 4)
        .reshape(num_tiles * tile, q.shape[1], head_dim)
        .to(q.dtype)
    )


def products(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, whose bits must not depend on how many there are: a CPU's library chooses by that how to multiply
    bfloat16."""
    wide = product_dtype(a.dtype, a.device)
    return (a.to(wide) @ b.to(wide)).to(a.dtype)


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """In which the torch twin multiplies."""
    return torch.float32 if device.type == "cpu" else dtype


def _add_pages(parts: Tensor) -> Tensor:
    """Sum over dimension 1, strictly in order of pages (torch.sum would choose an order by shape)."""
    first, *rest = parts.unbind(1)
    total = first.clone() if rest else first
    for part in rest:
        total += part
    return total


# Triton.


@jit
def _attend_page(
    b_q, b_k, b_v, page, first, last, PAGE_SIZE: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A page's partial for every row: the highest score, the sum of the weights, the weighted values. For a row that
    sees nothing of it -inf, 0 and zeros."""
    i_key = tl.arange(0, BLOCK_KEYS)
    key = page * PAGE_SIZE + i_key
    seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None]) & (i_key < PAGE_SIZE)[None, :]
    scores = tl.where(seen, dot(b_q, tl.trans(b_k), tl.zeros((BLOCK, BLOCK_KEYS), tl.float32)), float("-inf"))
    highest = tl.max(scores, 1)
    weights = tl.exp(scores - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
    # What no row sees may hold anything, and 0 times NaN is NaN.
    some = (key >= tl.min(first, 0)) & (key <= tl.max(last, 0))
    b_v = tl.where(some[:, None], b_v, tl.zeros_like(b_v))
    out = dot(weights.to(b_v.dtype), b_v, tl.zeros((BLOCK, BLOCK_DIM), tl.float32))
    return highest, tl.sum(weights, 1), out


@jit
def _merge(highest, total, out, highest_next, total_next, out_next):
    """Adds a page's partial to those before it."""
    new = tl.maximum(highest, highest_next)
    # A row that has seen no key yet has no maximum to subtract.
    safe = tl.where(new == float("-inf"), 0.0, new)
    shrink, shrink_next = tl.exp(highest - safe), tl.exp(highest_next - safe)
    total = total * shrink + total_next * shrink_next
    out = out * shrink[:, None] + out_next * shrink_next[:, None]
    return new, total, out


@jit(do_not_specialize_on_alignment=["first_ptr", "last_ptr", "tiles_ptr", "pages_ptr"])
def attention_kernel(
    q_ptr, k_ptr, v_ptr, first_ptr, last_ptr, tiles_ptr, pages_ptr, out_ptr, values_ptr, figures_ptr, arrived_ptr,
    heads, kv_heads, scale, gate_ptr,
    SHARED: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, TILE_ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr, GATE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One tile and K/V head, with all query heads that share it; if SPLIT, one page of them, and the last program to
    arrive merges. values, figures: the partials of every row and head, a page after the other."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    tile, kv_head, spread = tl.program_id(0), tl.program_id(1), tl.num_programs(2)
    begin = tl.load(tiles_ptr + tile * 5)
    count = tl.load(tiles_ptr + tile * 5 + 1)
    pages_at = tl.load(tiles_ptr + tile * 5 + 2)
    first_page = tl.load(tiles_ptr + tile * 5 + 3)
    num_pages = tl.load(tiles_ptr + tile * 5 + 4)
    if GATE:
        if tl.load(gate_ptr) == 0:
            return

    i = tl.arange(0, BLOCK)
    i_dim = tl.arange(0, BLOCK_DIM)
    i_key = tl.arange(0, BLOCK_KEYS)
    place = i // SHARED
    row, head = begin + place, kv_head * SHARED + i % SHARED
    m_row = (place < count) & (place < TILE_ROWS)
    m_dim = (i_dim < HEAD_DIM)[None, :]
    m_q, m_kv = m_row[:, None] & m_dim, (i_key < PAGE_SIZE)[:, None] & m_dim
    at = (row * heads + head)[:, None] * HEAD_DIM + i_dim[None, :]
    at_kv = kv_head * (PAGE_SIZE * HEAD_DIM) + i_key[:, None] * HEAD_DIM + i_dim[None, :]
    page_stride = kv_heads * (PAGE_SIZE * HEAD_DIM)

    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    out = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
    if SPLIT:
        page = tl.program_id(2)
        if page >= num_pages:
            if page == 0:
                # Padding has no page.
                tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=m_q)
            return
        cache_page = tl.load(pages_ptr + pages_at + page)
        b_q = tl.load(q_ptr + at, mask=m_q, other=0.0)
        first = tl.load(first_ptr + row, mask=m_row, other=1 << 30)
        last = tl.load(last_ptr + row, mask=m_row, other=-1)
        b_k = tl.load(k_ptr + cache_page * page_stride + at_kv, mask=m_kv, other=0.0)
        b_v = tl.load(v_ptr + cache_page * page_stride + at_kv, mask=m_kv, other=0.0)
        b_q = (b_q.to(tl.float32) * scale).to(b_q.dtype)
        highest, total, out = _attend_page(
            b_q, b_k, b_v, first_page + page, first, last, PAGE_SIZE, BLOCK_KEYS, BLOCK_DIM, BLOCK
        )
        if num_pages > 1:
            partial = (row * heads + head) * spread
            p_value = values_ptr + partial[:, None] * HEAD_DIM + i_dim[None, :]
            p_figure = figures_ptr + partial * 2
            tl.store(p_value + page * HEAD_DIM, out, mask=m_q)
            tl.store(p_figure + page * 2, highest, mask=m_row)
            tl.store(p_figure + page * 2 + 1, total, mask=m_row)
            tl.debug_barrier()
            p_arrived = arrived_ptr + tile * kv_heads + kv_head
            if tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu") != num_pages - 1:
                return
            tl.store(p_arrived, 0)
            highest = tl.full((BLOCK,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            out = tl.zeros((BLOCK, BLOCK_DIM), tl.float32)
            # Not from the first-level cache: it may hold what an earlier launch left there.
            for other in tl.range(0, num_pages, loop_unroll_factor=4):
                highest_next = tl.load(p_figure + other * 2, mask=m_row, other=float("-inf"), cache_modifier=".cg")
                total_next = tl.load(p_figure + other * 2 + 1, mask=m_row, other=0.0, cache_modifier=".cg")
                out_next = tl.load(p_value + other * HEAD_DIM, mask=m_q, other=0.0, cache_modifier=".cg")
                highest, total, out = _merge(highest, total, out, highest_next, total_next, out_next)
    else:
        b_q = tl.load(q_ptr + at, mask=m_q, other=0.0)
        first = tl.load(first_ptr + row, mask=m_row, other=1 << 30)
        last = tl.load(last_ptr + row, mask=m_row, other=-1)
        b_q = (b_q.to(tl.float32) * scale).to(b_q.dtype)
        for page in range(0, num_pages):
            cache_page = tl.load(pages_ptr + pages_at + page)
            b_k = tl.load(k_ptr + cache_page * page_stride + at_kv, mask=m_kv, other=0.0)
            b_v = tl.load(v_ptr + cache_page * page_stride + at_kv, mask=m_kv, other=0.0)
            highest_next, total_next, out_next = _attend_page(
                b_q, b_k, b_v, first_page + page, first, last, PAGE_SIZE, BLOCK_KEYS, BLOCK_DIM, BLOCK
            )
            highest, total, out = _merge(highest, total, out, highest_next, total_next, out_next)
    out = out / tl.where(total > 0.0, total, 1.0)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=m_q)


def attention_triton(q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan) -> Tensor:
    """As `attention`, for tiles of at most TILE rows. Outputs of padding rows are zeros. On one stream at a time."""
    queries, heads, head_dim = q.shape
    kv_heads, page_size = k_cache.shape[1:3]
    tiles, spread = plan.shape.tiles, plan.shape.most_pages
    partials = queries * heads * spread
    split = spread > 1 and tiles * kv_heads <= WHOLE and partials * (head_dim + 2) * 4 <= SCRATCH
    out = torch.empty_like(q)
    blocks = attention_blocks(heads // kv_heads, head_dim)
    values = figures = arrived = out
    if split:
        values, figures = (q.new_empty(partials * n, dtype=torch.float32) for n in (head_dim, 2))
        arrived = counters(tiles * kv_heads, q.device)
    attention_kernel[tiles, kv_heads, spread if split else 1](
        q, k_cache, v_cache, plan.first, plan.last, plan.tiles, plan.pages, out, values, figures, arrived,
        heads, kv_heads, head_dim**-0.5, PAGE_SIZE=page_size, BLOCK_KEYS=key_block(page_size), SPLIT=split,
        **blocks, num_warps=warps(blocks["BLOCK"] * blocks["BLOCK_DIM"], q.itemsize),
        num_stages=stages(page_size, head_dim, q.itemsize), enable_fp_fusion=False, **gate_options(q),
    )  # fmt: skip
    return out


def counters(count: int, device: torch.device) -> Tensor:
    """At least `count` int32 on the device, all 0 between launches: the last program to arrive resets its own. Those of
    earlier, smaller calls stay alive, because CUDA graphs hold their addresses; a graph's stage has run before it is
    recorded, so none is made meanwhile."""
    made = _counters[device]
    if not made or len(made[-1]) < count:
        made.append(torch.zeros(power_of_two(count, 1024), dtype=torch.int32, device=device))
    return made[-1]


def stages(page_size: int, head_dim: int, itemsize: int) -> int:
    """Loads in flight. With fewer than 5 the compiler holds one page of keys and values only; two would not fit if
    pages are large, and gain nothing if they are small."""
    return 5 if page_size >= 32 and page_size * head_dim * itemsize <= 16 << 10 else 2


def warps(size: int, itemsize: int) -> int:
    """Of a program, whole or split alike, by the elements of its queries. float32 has no tensor cores here, and large
    tiles want more registers than 4 warps have: they spilled up to 17 KB a thread."""
    return min(max(size // 512, 4), 16) if itemsize == 4 else 4


def key_block(page_size: int) -> int:
    return power_of_two(page_size, 16)


MOST_KEY_BYTES = 64 << 10
"""Of a page's keys of one head. Twice as many still compile, and spill; from four times on no GPU has the memory."""


def most_page_size(head_dim: int, itemsize: int) -> int:
    """The largest page for which the kernel is meant to be compiled."""
    return MOST_KEY_BYTES // (head_dim * itemsize)


def attention_blocks(shared: int, head_dim: int) -> dict[str, int]:
    return {
        "SHARED": shared,
        "HEAD_DIM": head_dim,
        "BLOCK_DIM": power_of_two(head_dim, 16),
        "TILE_ROWS": TILE,
        "BLOCK": power_of_two(TILE * shared, 16),
    }
