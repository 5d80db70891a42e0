"""Patches that close while the host does not look: planned on the device, a candidate for every row of the text.

The patch of a row's byte closes with it if the next byte starts a patch. The global stage then has a row for every
candidate; those that do not close are padding: they see nothing and write to the scratch page.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention import AttentionPlan, PlanShape
from .lang import await_inputs, jit, let_next_begin, overlap, power_of_two, tl
from .pooling import PageTable
from .text import Text
from .traffic import Traffic


class Tables(NamedTuple):
    """The pages of S sequences in the caches that closing a patch reads and writes. floor (S,) int64: the first patch
    that a sequence's next patch sees."""

    open: PageTable
    globals: PageTable
    latent: PageTable
    floor: Tensor


class Sizes(NamedTuple):
    """open: bytes in a page; globals, latent: patches in a page. slots: of a patch. small: see `AttentionPlan`."""

    open: int
    globals: int
    latent: int
    slots: int
    small: int


class Closing(NamedTuple):
    """R candidates. begin, after (R,): the bytes of each, none if it does not close. pooling: its slots see its bytes.
    plan: its row of the global stage. page, offset (R * slots,): its slots in the latent cache. any (1,): whether any
    closes. All int64."""

    begin: Tensor
    after: Tensor
    pooling: AttentionPlan
    plan: AttentionPlan
    page: Tensor
    offset: Tensor
    any: Tensor


def closing(text: Text, at: Tensor, positions: Tensor, sequence: Tensor, tables: Tables, sizes: Sizes) -> Closing:
    """at, positions, sequence (R,) int64: the places and positions of the rows, and their sequences' rows in `tables`;
    a sequence of -1 for padding. The tables must hold the pages of every patch."""
    slots, rows = sizes.slots, len(at)
    own, patch, begin = sequence.clamp(min=0), text.patch[at].long(), text.patch_start[at].long()
    closes = (sequence >= 0) & (text.patch[at + 1] != text.patch[at])

    def if_closes(values: Tensor) -> Tensor:
        return torch.where(closes, values, 0)

    def page_of(table: PageTable, number: Tensor) -> Tensor:
        return if_closes(table.pages[own, (number - table.first[own]).clamp(0, table.pages.shape[1] - 1)])

    def tiles(table: PageTable, size: int, low: Tensor, high: Tensor, queries: int) -> Tensor:
        first, row = low // size, torch.arange(rows, device=at.device) * queries
        at_page = own * table.pages.shape[1] + first - table.first[own]
        columns = row, torch.full_like(row, queries), at_page, first, high // size - first + 1
        return torch.stack((columns[0], columns[1], *map(if_closes, columns[2:])), 1).flatten()

    low, high = begin.repeat_interleave(slots), positions.repeat_interleave(slots)
    of_bytes = low, high, tiles(tables.open, sizes.open, begin, positions, slots), tables.open.pages.flatten()
    shape, of_global = _shapes(rows, tables, sizes)
    floor = tables.floor[own]
    of_patches = (
        if_closes(patch), page_of(tables.globals, patch // sizes.globals), patch % sizes.globals, floor, patch,
        tiles(tables.globals, sizes.globals, floor, patch, 1), tables.globals.pages.flatten(),
    )  # fmt: skip
    offset = (patch % sizes.latent * slots)[:, None] + torch.arange(slots, device=at.device)
    return Closing(
        begin,
        torch.where(closes, positions + 1, begin),
        AttentionPlan(torch.cat(of_bytes), shape, sizes.small, sizes.open),
        AttentionPlan(torch.cat(of_patches), of_global, sizes.small, sizes.globals),
        page_of(tables.latent, patch // sizes.latent).repeat_interleave(slots),
        offset.flatten(),
        closes.any().long().view(1),
    )


def _shapes(rows: int, tables: Tables, sizes: Sizes) -> tuple[PlanShape, PlanShape]:
    opened, of_global = tables.open.pages, tables.globals.pages
    return (
        PlanShape(0, rows * sizes.slots, rows, opened.numel(), opened.shape[1]),
        PlanShape(rows, rows, rows, of_global.numel(), of_global.shape[1]),
    )


def traffic(rows: int, slots: int, pages: int) -> Traffic:
    """Bytes of `closing`, whose tables have so many pages."""
    return Traffic(rows * 48 + 8 * pages, rows * 8 * (17 + 4 * slots) + 8 * pages)


@jit
def _if(closes, value):
    return tl.where(closes, value, 0)


@jit
def _tile(p_tiles, row, queries, closes, table_at, first_page, low, high, size):
    begin = low // size
    tl.store(p_tiles, row * queries)
    tl.store(p_tiles + 1, queries)
    tl.store(p_tiles + 2, _if(closes, table_at + begin - first_page))
    tl.store(p_tiles + 3, _if(closes, begin))
    tl.store(p_tiles + 4, _if(closes, high // size - begin + 1))


@jit(
    do_not_specialize=["rows", "sequences", "open_pages", "global_pages", "latent_pages"],
    do_not_specialize_on_alignment=[
        *("at_ptr", "positions_ptr", "sequence_ptr", "open_ptr", "open_first_ptr", "global_ptr", "global_first_ptr"),
        *("latent_ptr", "latent_first_ptr", "floor_ptr"),
    ],
)
def closing_kernel(
    patch_ptr, start_ptr, at_ptr, positions_ptr, sequence_ptr, open_ptr, open_first_ptr, global_ptr, global_first_ptr,
    latent_ptr, latent_first_ptr, floor_ptr, begin_ptr, after_ptr, pooling_ptr, plan_ptr, page_ptr, offset_ptr, any_ptr,
    rows, sequences, open_pages, global_pages, latent_pages, open_size, global_size, latent_size, slots,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One candidate; the first ones also copy a sequence's pages into the plans."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    at, position, sequence = tl.load(at_ptr + row), tl.load(positions_ptr + row), tl.load(sequence_ptr + row)
    patch, begin = tl.load(patch_ptr + at).to(tl.int64), tl.load(start_ptr + at).to(tl.int64)
    closes = (sequence >= 0) & (tl.load(patch_ptr + at + 1).to(tl.int64) != patch)
    own = tl.maximum(sequence, 0)
    floor = tl.load(floor_ptr + own)
    tl.store(begin_ptr + row, begin)
    tl.store(after_ptr + row, tl.where(closes, position + 1, begin))
    if row == 0:
        # All programs could say so, but not that none closes.
        i = tl.arange(0, BLOCK)
        any_closes = tl.zeros((BLOCK,), tl.int64)
        for start in range(0, rows, BLOCK):
            m = start + i < rows
            p_patch = patch_ptr + tl.load(at_ptr + start + i, mask=m, other=0)
            is_row = tl.load(sequence_ptr + start + i, mask=m, other=-1) >= 0
            any_closes += (m & is_row & (tl.load(p_patch, mask=m) != tl.load(p_patch + 1, mask=m))).to(tl.int64)
        tl.store(any_ptr, (tl.max(any_closes, 0) > 0).to(tl.int64))

    slot = tl.arange(0, SLOTS)
    m_slot = slot < slots
    queries = rows * slots
    tl.store(pooling_ptr + row * slots + slot, tl.zeros((SLOTS,), tl.int64) + begin, mask=m_slot)
    tl.store(pooling_ptr + queries + row * slots + slot, tl.zeros((SLOTS,), tl.int64) + position, mask=m_slot)
    first = tl.load(open_first_ptr + own)
    _tile(pooling_ptr + 2 * queries + row * 5, row, slots, closes, own * open_pages, first, begin, position, open_size)

    first = tl.load(global_first_ptr + own)
    p_page = global_ptr + own * global_pages + patch // global_size - first
    tl.store(plan_ptr + row, _if(closes, patch))
    tl.store(plan_ptr + rows + row, tl.load(p_page, mask=closes, other=0))
    tl.store(plan_ptr + 2 * rows + row, patch % global_size)
    tl.store(plan_ptr + 3 * rows + row, floor)
    tl.store(plan_ptr + 4 * rows + row, patch)
    _tile(plan_ptr + 5 * rows + row * 5, row, 1, closes, own * global_pages, first, floor, patch, global_size)

    p_page = latent_ptr + own * latent_pages + patch // latent_size - tl.load(latent_first_ptr + own)
    page = tl.load(p_page, mask=closes, other=0)
    tl.store(page_ptr + row * slots + slot, tl.zeros((SLOTS,), tl.int64) + page, mask=m_slot)
    tl.store(offset_ptr + row * slots + slot, patch % latent_size * slots + slot, mask=m_slot)

    if row < sequences:
        i = tl.arange(0, BLOCK)
        for start in range(0, open_pages, BLOCK):
            m = start + i < open_pages
            pages = tl.load(open_ptr + row * open_pages + start + i, mask=m, other=0)
            tl.store(pooling_ptr + 2 * queries + 5 * rows + row * open_pages + start + i, pages, mask=m)
        for start in range(0, global_pages, BLOCK):
            m = start + i < global_pages
            pages = tl.load(global_ptr + row * global_pages + start + i, mask=m, other=0)
            tl.store(plan_ptr + 10 * rows + row * global_pages + start + i, pages, mask=m)


def closing_triton(
    text: Text, at: Tensor, positions: Tensor, sequence: Tensor, tables: Tables, sizes: Sizes
) -> Closing:
    """As `closing`, for as many rows as sequences or more."""
    rows, (sequences, open_pages) = len(at), tables.open.pages.shape
    global_pages, latent_pages = tables.globals.pages.shape[1], tables.latent.pages.shape[1]
    shape, of_global = _shapes(rows, tables, sizes)
    begin, after, any_closes = torch.empty_like(at), torch.empty_like(at), at.new_empty(1)
    pooling, plan = at.new_empty(sum(shape.sizes)), at.new_empty(sum(of_global.sizes))
    page, offset = at.new_empty(rows * sizes.slots), at.new_empty(rows * sizes.slots)
    closing_kernel[(rows,)](
        text.patch, text.patch_start, at, positions, sequence, *tables.open, *tables.globals, *tables.latent,
        tables.floor, begin, after, pooling, plan, page, offset, any_closes, rows, sequences, open_pages, global_pages,
        latent_pages, sizes.open, sizes.globals, sizes.latent, sizes.slots, BLOCK=128, SLOTS=power_of_two(sizes.slots),
        num_warps=1, **overlap(at),
    )  # fmt: skip
    return Closing(
        begin,
        after,
        AttentionPlan(pooling, shape, sizes.small, sizes.open),
        AttentionPlan(plan, of_global, sizes.small, sizes.globals),
        page,
        offset,
        any_closes,
    )
