"""The one law of a matrix product on a GPU, from which every kernel that multiplies is made.

A program holds a few rows of the weights, and multiplies them with ROWS rows of the input at a time. The inner
dimension is cut into segments: SEGMENTS of them at a time, one per warp, so that a chain of dependent tensor-core
instructions is an eighth as long as it would be over the whole. Each warp sums its segments in ascending order, then
the sums of the warps are added. So the order of summation is a function of the inner dimension and the dtype alone: a
row has the same bits in any company, and in every kernel.

The weights are in registers before the program waits for its inputs: they do not depend on the kernel before.
"""

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .float8 import widen
from .lang import IN_INTERPRETER, INTERPRETED, blocks, jit, power_of_two, tl
from .norm import rms_norm_triton

ROWS = 8 if IN_INTERPRETER else 16
"""Rows that a program multiplies at a time: those of one tensor-core instruction; fewer where each costs time."""
SEGMENTS = 8
WARPS = 8
TRIGGER_FIRST = tl.constexpr(True)
"""Whether the next kernel may start with the first instruction of a product, or only after its loop, so that the loads
of the two do not compete. Slower in an older form, whose programs read their weights after their rows; not measured in
this one."""
NORM_INSIDE = True
"""Whether the programs of a product normalise its rows, each again, and not a kernel before it. By far slower in an
older form, whose programs read their weights after their rows (20.7 us against 10.5 on an H200); not measured in this
one."""
MOST_PROGRAMS = 8
"""Programs that share the rows of one block of outputs. Each has its own copy of the weights."""


class Cut(NamedTuple):
    """The inner dimension: ROUNDS times SEGMENTS segments of WIDTH columns, the last ones partly beyond its end."""

    segments: int
    width: int
    rounds: int


def cut(width: int, dtype: torch.dtype) -> Cut:
    """How an inner dimension is cut for rows of this dtype."""
    if dtype == torch.float32:
        # Without tensor cores: a longer segment would not fit into registers.
        at_a_time = 32 * SEGMENTS
    else:
        at_a_time = min(power_of_two(width, 16 * SEGMENTS), 1024 if width < 2048 else 2048)
    return Cut(SEGMENTS, at_a_time // SEGMENTS, blocks(width, at_a_time))


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x (R, in) times weight (out, in) transposed, (R, out) float32, summed in the order of the law, up to the order
    within a segment. Slow: it defines what the kernels compute."""
    segments, width, rounds = cut(x.shape[1], x.dtype)
    padding = (0, rounds * segments * width - x.shape[1])
    x, weight = (F.pad(t.float(), padding).unflatten(1, (rounds, segments, width)) for t in (x, weight))
    total = torch.zeros(segments, len(x), len(weight), device=x.device)
    for i in range(rounds):
        total = total + torch.einsum("rsw,osw->sro", x[:, i], weight[:, i])
    return reduce(torch.add, total)


def product_options(width: int, dtype: torch.dtype, out: int, itemsize: int) -> dict[str, int]:
    """Constants and launch options of a kernel with a product. out: rows of the weights; itemsize: of theirs.

    Independent of the number of rows.
    """
    segments, columns, rounds = cut(width, dtype)
    # Two programs fit into a multiprocessor's shared memory: this kernel's, and one of the next, which comes early.
    block = 16 if out >= 16 * 128 and width <= 1024 else 8
    if IN_INTERPRETER:
        # Each program takes long to begin.
        block = max(min(power_of_two(out), (1 << 18) // (segments * columns * ROWS)), block)
    return {
        "IN": width,
        "SEGMENTS": segments,
        "WIDTH": columns,
        "ROUNDS": rounds,
        "ROWS": ROWS,
        "BLOCK_OUT": block,
        "num_warps": WARPS,
        "num_stages": 1,
    }


def product_grid(rows: int, out: int, options: dict[str, int]) -> tuple[int, int]:
    """Programs by blocks of rows, and by blocks of outputs. Those of the same outputs are next to each other: they read
    the same weights."""
    return min(blocks(rows, ROWS), MOST_PROGRAMS), blocks(out, options["BLOCK_OUT"])


def before_product(x: Tensor, norm: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """The rows that a product takes, and the norm that is left to it. Weights of several rounds leave no registers for
    it: with 4,096 columns such kernels spilled up to 328 bytes a thread."""
    has_room = x.dtype == torch.float32 or cut(x.shape[1], x.dtype).rounds == 1
    if norm is None or (NORM_INSIDE and has_room):
        return x, norm
    return rms_norm_triton(x, norm, eps), None


# Triton.


@jit
def load_weights(w_ptr, i_out, m_out, at, IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `i_out` (O,) of a matrix, round `at` of its columns: (SEGMENTS, O, WIDTH)."""
    i_in = (at * SEGMENTS + tl.arange(0, SEGMENTS))[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    p_w = w_ptr + i_out.to(tl.int64)[None, :, None] * IN + i_in
    return tl.load(p_w, mask=m_out[None, :, None] & (i_in < IN), other=0.0, eviction_policy="evict_first")


@jit
def held(w):
    """The same weights, as a barrier to reordering: all are loaded before any is used, and none goes through shared
    memory before the last."""
    if INTERPRETED:
        return w
    else:
        PACK: tl.constexpr = 32 // w.dtype.primitive_bitwidth
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [w], dtype=w.dtype, is_pure=False, pack=PACK)


@jit
def hold(
    w_ptr, i_out, m_out,
    IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """The first rounds of the weights in registers, as many as `multiply` expects there."""
    w0 = load_weights(w_ptr, i_out, m_out, 0, IN, SEGMENTS, WIDTH)
    w1, w2 = w0, w0
    if ROUNDS > 1:
        w1 = load_weights(w_ptr, i_out, m_out, 1, IN, SEGMENTS, WIDTH)
    if ROUNDS > 2:
        w2 = load_weights(w_ptr, i_out, m_out, 2, IN, SEGMENTS, WIDTH)
    w0 = held(w0)
    if ROUNDS > 1:
        w1 = held(w1)
    if ROUNDS > 2:
        w2 = held(w2)
    return w0, w1, w2


@jit
def load_rows(x_ptr, i_row, m_row, at, IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `i_row` (R,) int64 of the input, round `at` of their columns: (SEGMENTS, R, WIDTH)."""
    i_in = (at * SEGMENTS + tl.arange(0, SEGMENTS))[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    p_x = x_ptr + i_row[None, :, None] * IN + i_in
    return tl.load(p_x, mask=m_row[None, :, None] & (i_in < IN), other=0.0)


@jit
def inverse_rms(
    x_ptr, i_row, m_row, eps,
    IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean(x^2) + eps) of rows `i_row`: (ROWS,)."""
    squares = tl.zeros((SEGMENTS, ROWS), tl.float32)
    for at in tl.static_range(ROUNDS):
        x = load_rows(x_ptr, i_row, m_row, at, IN, SEGMENTS, WIDTH).to(tl.float32)
        squares += tl.sum(x * x, 2)
    return 1.0 / tl.sqrt(tl.sum(squares, 0) / IN + eps)


@jit
def add_product(total, x, w):
    """total (SEGMENTS, R, O) float32 + x (SEGMENTS, R, WIDTH) times w (SEGMENTS, O, WIDTH) transposed, each segment in
    ascending order of columns, products not rounded. uint8: codes of float8."""
    w = widen(w).to(x.dtype) if w.dtype == tl.uint8 else w.to(x.dtype)
    if INTERPRETED:
        # numpy has no bfloat16, and its products depend on a row's index.
        return total + tl.sum(x.to(tl.float32)[:, :, None, :] * w.to(tl.float32)[:, None, :, :], 3)
    else:
        # Held, or the compiler would chain the rounds' tensor-core instructions, 48 where there are three rounds.
        return total + held(tl.dot(x, tl.permute(w, (0, 2, 1)), input_precision="ieee"))


@jit
def add_round(
    total, x_ptr, norm_ptr, inverse, w, i_row, m_row, at,
    IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """total (SEGMENTS, R, O) + round `at` of the rows times weights w (SEGMENTS, O, WIDTH)."""
    x = load_rows(x_ptr, i_row, m_row, at, IN, SEGMENTS, WIDTH)
    dtype = x.dtype
    if NORM:
        i_in = (at * SEGMENTS + tl.arange(0, SEGMENTS))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        weight = tl.load(norm_ptr + i_in, mask=i_in < IN, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * inverse[None, :, None] * weight[:, None, :]).to(dtype)
    return add_product(total, x, w)


@jit
def multiply(
    x_ptr, norm_ptr, w_ptr, w0, w1, w2, i_row, m_row, i_out, m_out, eps,
    IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Rows `i_row` (ROWS,) int64 of x (R, IN) times rows `i_out` (BLOCK_OUT,) of the weights, whose first rounds `hold`
    has read: (ROWS, BLOCK_OUT) float32. NORM: the rows go through RMS normalisation first."""
    inverse = tl.zeros((ROWS,), tl.float32)
    if NORM:
        inverse = inverse_rms(x_ptr, i_row, m_row, eps, IN, SEGMENTS, WIDTH, ROUNDS, ROWS)
    total = tl.zeros((SEGMENTS, ROWS, BLOCK_OUT), tl.float32)
    total = add_round(total, x_ptr, norm_ptr, inverse, w0, i_row, m_row, 0, IN, SEGMENTS, WIDTH, NORM)
    if ROUNDS > 1:
        total = add_round(total, x_ptr, norm_ptr, inverse, w1, i_row, m_row, 1, IN, SEGMENTS, WIDTH, NORM)
    if ROUNDS > 2:
        total = add_round(total, x_ptr, norm_ptr, inverse, w2, i_row, m_row, 2, IN, SEGMENTS, WIDTH, NORM)
    if ROUNDS > 3:
        for at in range(3, ROUNDS):
            w = load_weights(w_ptr, i_out, m_out, at, IN, SEGMENTS, WIDTH)
            total = add_round(total, x_ptr, norm_ptr, inverse, w, i_row, m_row, at, IN, SEGMENTS, WIDTH, NORM)
    return tl.sum(total, 0)
