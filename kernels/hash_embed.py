"""Hash n-gram embeddings: the byte's own row plus one row of every n-gram table, a plain sum (BLT 3.2.1)."""

import ctypes
from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .lang import await_inputs, blocks, jit, let_next_begin, overlap, power_of_two, tl
from .text import windows
from .traffic import Traffic

PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)
"""The base of hash function f is PRIMES[f]."""


def _powers(base: int, count: int) -> list[int]:
    """base^0 .. base^(count-1) as two's-complement int64."""
    powers = [pow(base, i, 1 << 64) for i in range(count)]
    return [p - (1 << 64) if p >> 63 else p for p in powers]


class HashTables:
    """The n-gram tables, function-major: one of `rows` rows for every (hash function, group size).

    The tables may lie on the host and have another dtype than the model: only the rows read are moved and converted.
    The Triton kernel needs them on its device, all of one dtype.
    """

    def __init__(
        self, tables: Sequence[Tensor], group_sizes: Sequence[int], num_functions: int, rows: int, device: torch.device
    ) -> None:
        self.tables = list(tables)
        dtypes = {table.dtype for table in self.tables}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        """The dtype of all tables; None if they differ."""
        self.group_sizes = list(group_sizes)
        self.num_functions = num_functions
        self.rows = rows
        self.addresses = torch.tensor([t.data_ptr() for t in self.tables], dtype=torch.int64, device=device)
        self.sizes = torch.tensor(self.group_sizes, dtype=torch.int64, device=device)
        most = max(self.group_sizes)
        self.powers = torch.tensor([_powers(PRIMES[f], most) for f in range(num_functions)], device=device)
        """(functions, longest group)"""

    @cached_property
    def description(self) -> "ctypes.Array[ctypes.c_int64]":
        """`Hashes` of kernels/native/bytes.h."""
        tensors, is_bf16 = (self.addresses, self.sizes, self.powers), self.dtype == torch.bfloat16
        counts = len(self.group_sizes), len(self.tables), self.powers.shape[1], self.rows, self.tables[0].shape[1]
        return (ctypes.c_int64 * 9)(*(t.data_ptr() for t in tensors), *counts, is_bf16)


def ngram_hashes(windows: Tensor, group_sizes: Sequence[int], num_functions: int, rows: int) -> Tensor:
    """Table rows of every n-gram: (R, num_functions * len(group_sizes)) int64 in 0..rows-1, function-major.

    windows (R, W) int64: the last W ids ending at each byte, oldest first, 0 before the text; W >= max(group_sizes).
    The oldest id of a group has weight base^0, arithmetic wraps at 64 bits, the modulus is floored.
    """
    hashes = []
    for base in PRIMES[:num_functions]:
        for size in group_sizes:
            # Horner's rule: no tensor of powers to send to the device first.
            hashed = windows[:, -1]
            for i in range(2, size + 1):
                hashed = hashed * base + windows[:, -i]
            hashes.append(hashed.remainder(rows))
    return torch.stack(hashes, dim=1)


def hash_embed(ids: Tensor, at: Tensor, positions: Tensor, embedding: Tensor, hashing: HashTables) -> Tensor:
    """embedding[id] + the sum over tables t of tables[t][its hash]: (R, d) in embedding's dtype and device.

    ids: of `kernels.text.Text`; at, positions (R,) int64: the rows' places there, and their positions in their texts.
    """
    last = windows(ids, at, positions, max(hashing.group_sizes))
    hashes = ngram_hashes(last, hashing.group_sizes, hashing.num_functions, hashing.rows)
    x = F.embedding(last[:, -1], embedding)
    for t, table in enumerate(hashing.tables):
        x = x + F.embedding(hashes[:, t].to(table.device), table).to(x)
    return x


def traffic(rows: int, dim: int, num_tables: int, width: int, itemsize: int, table_itemsize: int) -> Traffic:
    """Bytes of `hash_embed`: windows of `width` ids, a row of the embedding and one of every table, per byte."""
    return Traffic(rows * (8 * width + dim * (itemsize + num_tables * table_itemsize)), rows * dim * itemsize)


@jit
def hash_of(ids, BASE: tl.constexpr, SIZE: tl.constexpr, TABLE_ROWS: tl.constexpr):
    """The table row of a group of SIZE ids, of which the last comes first."""
    hashed = ids[0]
    for back in tl.static_range(1, SIZE):
        hashed = hashed * BASE + ids[back]
    hashed = hashed % TABLE_ROWS
    # The remainder takes the sign of the hash; the row counts from 0.
    return tl.where(hashed < 0, hashed + TABLE_ROWS, hashed)


@jit(do_not_specialize_on_alignment=["ids_ptr", "at_ptr", "positions_ptr"])
def hash_embed_kernel(
    ids_ptr, at_ptr, positions_ptr, embedding_ptr, addresses_ptr, table_ptr, out_ptr,
    BASES: tl.constexpr, SIZES: tl.constexpr, LONGEST: tl.constexpr, TABLE_ROWS: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One byte, one block of dimensions. table_ptr: any table, for its type.

    Memory is waited for three times: for the byte's place, for its last ids, and for the rows of all tables at once.
    """
    let_next_begin(OVERLAP)
    # They do not depend on the kernel before.
    addresses = ()
    for table in tl.static_range(len(BASES) * len(SIZES)):
        addresses += (tl.load(addresses_ptr + table),)  # type: ignore[assignment]
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = i < DIM
    dtype = out_ptr.dtype.element_ty
    at, position = tl.load(at_ptr + row), tl.load(positions_ptr + row)
    ids = ()
    for back in tl.static_range(LONGEST):
        ids += (tl.load(ids_ptr + at - back, mask=back <= position, other=0),)  # type: ignore[assignment]
    rows = ()
    for table in tl.static_range(len(BASES) * len(SIZES)):
        hashed = hash_of(ids, BASES[table // len(SIZES)], SIZES[table % len(SIZES)], TABLE_ROWS)
        p_row = addresses[table].to(table_ptr.dtype) + hashed * DIM
        rows += (tl.load(p_row + i, mask=m, other=0.0),)
    x = tl.load(embedding_ptr + ids[0] * DIM + i, mask=m, other=0.0).to(tl.float32)  # type: ignore[misc]
    # One after the other, each sum rounded, as the twin adds.
    for table in tl.static_range(len(BASES) * len(SIZES)):
        x = (x + rows[table].to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * DIM + i, x.to(dtype), mask=m)


def hash_embed_triton(ids: Tensor, at: Tensor, positions: Tensor, embedding: Tensor, hashing: HashTables) -> Tensor:
    """As `hash_embed`."""
    rows, dim = at.shape[0], embedding.shape[1]
    out = embedding.new_empty(rows, dim)
    block = min(power_of_two(dim), 512)
    hash_embed_kernel[(rows, blocks(dim, block))](
        ids, at, positions, embedding, hashing.addresses, hashing.tables[0], out,
        BASES=PRIMES[: hashing.num_functions], SIZES=tuple(hashing.group_sizes), LONGEST=max(hashing.group_sizes),
        TABLE_ROWS=hashing.rows,
        DIM=dim, BLOCK=block, num_warps=4, **overlap(ids),
    )  # fmt: skip
    return out
