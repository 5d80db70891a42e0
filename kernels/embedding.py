"""Rows of an embedding table for bytes of the text."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from .lang import await_inputs, blocks, jit, let_next_begin, overlap, power_of_two, tl
from .traffic import Traffic


class Ids(NamedTuple):
    """Some bytes of a text. ids (N,) int64, of `kernels.text.Text`; at (R,) int64: the places of the bytes."""

    ids: Tensor
    at: Tensor


def embed(ids: Tensor, at: Tensor, table: Tensor) -> Tensor:
    """table[ids[at]]: ids and at of `Ids`, table (V, dim) to (R, dim)."""
    return F.embedding(ids.index_select(0, at), table)


def traffic(rows: int, dim: int, itemsize: int) -> Traffic:
    return Traffic(rows * (16 + dim * itemsize), rows * dim * itemsize)


@jit(do_not_specialize_on_alignment=["ids_ptr", "at_ptr"])
def embed_kernel(ids_ptr, at_ptr, table_ptr, out_ptr, DIM: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One byte, one block of dimensions."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(ids_ptr + tl.load(at_ptr + row))
    tl.store(out_ptr + row * DIM + i, tl.load(table_ptr + own * DIM + i, mask=i < DIM, other=0.0), mask=i < DIM)


def embed_triton(ids: Tensor, at: Tensor, table: Tensor) -> Tensor:
    """As `embed`."""
    rows, dim = len(at), table.shape[1]
    out = table.new_empty(rows, dim)
    block = min(power_of_two(dim), 1024)
    embed_kernel[(rows, blocks(dim, block))](ids, at, table, out, DIM=dim, BLOCK=block, num_warps=4, **overlap(at))
    return out
