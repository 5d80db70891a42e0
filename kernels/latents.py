"""Which latent a row of the decoder reads: the device finds it, since the host may not know where patches start."""

import torch
from torch import Tensor

from .lang import await_inputs, blocks, jit, let_next_begin, overlap, power_of_two, tl
from .pooling import PageTable
from .text import Text
from .traffic import Traffic


def latent_places(
    text: Text, look: Tensor, closed: Tensor, sequence: Tensor, table: PageTable, page_size: int, slots: int
) -> Tensor:
    """Page and offset of each row's latent, whose slots begin there: (2, R) int64.

    look (R,) int64: a place in the text; the latent is that of the last patch before its byte's. closed (R,) int64: 1
    if an open patch was run as if it ended before `look`, and is to be read. sequence (R,) int64: the row in `table`.
    page_size: patches in a page. For a row without a latent, which is padding, any place of the table.
    """
    own = text.patch[look]
    patch = (own - 1 + closed * (own == text.patch[(look - 1).clamp(min=0)])).clamp(min=0)
    index = (patch // page_size - table.first[sequence]).clamp(0, table.pages.shape[1] - 1)
    return torch.stack((table.pages[sequence, index], patch % page_size * slots))


def traffic(rows: int) -> Traffic:
    return Traffic(rows * 48, rows * 16)


@jit(
    do_not_specialize=["rows", "most_pages"],
    do_not_specialize_on_alignment=["look_ptr", "closed_ptr", "sequence_ptr", "pages_ptr", "first_ptr"],
)
def latent_places_kernel(
    patch_ptr, look_ptr, closed_ptr, sequence_ptr, pages_ptr, first_ptr, out_ptr, rows, most_pages, page_size, slots,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < rows
    look, closed = tl.load(look_ptr + i, mask=m, other=0), tl.load(closed_ptr + i, mask=m, other=0)
    sequence = tl.load(sequence_ptr + i, mask=m, other=0)
    own = tl.load(patch_ptr + look, mask=m, other=0).to(tl.int64)
    before = tl.load(patch_ptr + tl.maximum(look - 1, 0), mask=m, other=0).to(tl.int64)
    patch = tl.maximum(tl.where(own == before, own - 1 + closed, own - 1), 0)
    index = patch // page_size - tl.load(first_ptr + sequence, mask=m, other=0)
    index = tl.minimum(tl.maximum(index, 0), most_pages - 1)
    tl.store(out_ptr + i, tl.load(pages_ptr + sequence * most_pages + index, mask=m, other=0), mask=m)
    tl.store(out_ptr + rows + i, patch % page_size * slots, mask=m)


def latent_places_triton(
    text: Text, look: Tensor, closed: Tensor, sequence: Tensor, table: PageTable, page_size: int, slots: int
) -> Tensor:
    """As `latent_places`."""
    rows = len(look)
    out = look.new_empty(2, rows)
    block = min(power_of_two(rows), 128)
    latent_places_kernel[(blocks(rows, block),)](
        text.patch, look, closed, sequence, *table, out, rows, table.pages.shape[1], page_size, slots, BLOCK=block,
        num_warps=1, **overlap(look),
    )  # fmt: skip
    return out
