"""The product for fat kernels, and how programs of one kernel wait for each other.

A program owns a few outputs. It sums them over segments of the inner dimension, eight at a time, one per warp: a warp's
chain of dependent instructions is an eighth as long, and the program's weights are in registers before its inputs
arrive. The order of the sums depends on the inner dimension alone.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.float8 import widen, widen_by_integers
from kernels.lang import INTERPRETED, await_inputs, jit, let_next_begin, power_of_two, tl
from kernels.product import held

PLAIN, CAST, BITS, ASM = range(4)
"""How weights become bfloat16: already bfloat16; converted from float8 (e4m3); bits moved by integer instructions; by
assembler (`kernels.float8`)."""
WARPS = 8
MOST_POLLS = 1 << 20
"""After this many polls, about a second, a program continues without its input: a wrong result, not a hung device."""


@jit
def batched_dot(a, b, total):
    """total (S, R, O) + a (S, R, I) times b (S, O, I) transposed."""
    if INTERPRETED:
        return total + tl.sum(a.to(tl.float32)[:, :, None, :] * b.to(tl.float32)[:, None, :, :], 3)
    # Held, or the compiler would chain the rounds' tensor-core instructions.
    return total + held(tl.dot(a, tl.permute(b, (0, 2, 1)), input_precision="ieee"))


@jit
def load_weights(w_ptr, i_out, first, IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows `i_out` (O,) of a matrix, in segments from `first` on: (SEGMENTS, O, WIDTH)."""
    i_in = (first + tl.arange(0, SEGMENTS))[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    p_w = w_ptr + i_out.to(tl.int64)[None, :, None] * IN + i_in
    return tl.load(p_w, mask=i_in < IN, other=0.0, eviction_policy="evict_first")


@jit
def as_bfloat16(w, HOW: tl.constexpr):
    """Weights in bfloat16, exactly."""
    if HOW == 0:
        return w
    elif HOW == 1:
        return w.to(tl.bfloat16)
    elif HOW == 2:
        return widen_by_integers(w)
    else:
        return widen(w)


@jit
def inverse_rms(x_ptr, rows, eps, IN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of each row: (ROWS,)."""
    i_row, i_in = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m = (i_row < rows)[:, None] & (i_in < IN)[None, :]
    x = tl.load(x_ptr + i_row[:, None] * IN + i_in[None, :], mask=m, other=0.0, cache_modifier=".cg").to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(x * x, 1) / IN + eps)


@jit
def times(
    x_ptr, norm_ptr, inverse, w, total, first, rows,
    IN: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """total (SEGMENTS, ROWS, O) + rows x (rows, IN), in segments from `first` on, times weights w (SEGMENTS, O, WIDTH).
    NORM: the rows are normalised first."""
    i_row = tl.arange(0, ROWS)
    i_in = (first + tl.arange(0, SEGMENTS))[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    m = (i_row < rows)[None, :, None] & (i_in < IN)[:, None, :]
    x = tl.load(x_ptr + i_row[None, :, None] * IN + i_in[:, None, :], mask=m, other=0.0, cache_modifier=".cg")
    if NORM:
        weight = tl.load(norm_ptr + i_in, mask=i_in < IN, other=0.0).to(tl.float32)
        x = (x.to(tl.float32) * inverse[None, :, None] * weight[:, None, :]).to(tl.bfloat16)
    return batched_dot(x, w, total)


@jit(do_not_specialize=["rows"])
def product_kernel(
    x_ptr, norm_ptr, w_ptr, out_ptr, rows, out_dim, eps,
    IN: tl.constexpr, OUT: tl.constexpr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, WIDEN: tl.constexpr, WEIGHTS_FIRST: tl.constexpr,
    TRIGGER_FIRST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """A program's OUT outputs of all rows. WEIGHTS_FIRST: weights are loaded before the wait for the kernel before.
    TRIGGER_FIRST: the next kernel may begin at once."""
    if TRIGGER_FIRST:
        let_next_begin(OVERLAP)
    i_out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    if not WEIGHTS_FIRST:
        await_inputs(OVERLAP)
    w0 = load_weights(w_ptr, i_out, 0, IN, SEGMENTS, WIDTH)
    if ROUNDS > 1:
        w1 = load_weights(w_ptr, i_out, SEGMENTS, IN, SEGMENTS, WIDTH)
    if ROUNDS > 2:
        w2 = load_weights(w_ptr, i_out, 2 * SEGMENTS, IN, SEGMENTS, WIDTH)
    w0 = held(w0)
    if ROUNDS > 1:
        w1 = held(w1)
    if ROUNDS > 2:
        w2 = held(w2)
    if WEIGHTS_FIRST:
        await_inputs(OVERLAP)
    inverse = tl.zeros((ROWS,), tl.float32)
    if NORM:
        inverse = inverse_rms(x_ptr, rows, eps, IN, BLOCK, ROWS)
    total = tl.zeros((SEGMENTS, ROWS, OUT), tl.float32)
    total = times(x_ptr, norm_ptr, inverse, as_bfloat16(w0, WIDEN), total, 0, rows, IN, SEGMENTS, WIDTH, ROWS, NORM)
    if ROUNDS > 1:
        total = times(
            x_ptr, norm_ptr, inverse, as_bfloat16(w1, WIDEN), total, SEGMENTS, rows, IN, SEGMENTS, WIDTH, ROWS, NORM
        )
    if ROUNDS > 2:
        total = times(
            x_ptr, norm_ptr, inverse, as_bfloat16(w2, WIDEN), total, 2 * SEGMENTS, rows, IN, SEGMENTS, WIDTH, ROWS, NORM
        )
    if not TRIGGER_FIRST:
        let_next_begin(OVERLAP)
    i_row = tl.arange(0, ROWS)
    p_out = out_ptr + i_row[:, None] * out_dim + i_out[None, :]
    tl.store(p_out, tl.sum(total, 0).to(tl.bfloat16), mask=(i_row < rows)[:, None])


def segmented(width: int, segments: int = 8) -> dict[str, int]:
    """How the inner dimension `width` is cut: `segments` at a time, 1,024 columns together, 2,048 from there on; fewer
    for a narrower matrix."""
    at_a_time = min(power_of_two(width, segments), 1024 if width < 2048 else 2048)
    return {"SEGMENTS": segments, "WIDTH": at_a_time // segments, "ROUNDS": -(-width // at_a_time)}


def product(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    segments: int = 8,
    norm: Tensor | None = None,
    widening: int = PLAIN,
    weights_first: bool = True,
    trigger_first: bool = True,
    overlaps: bool,
) -> None:
    """out (R, O) = x (R, I) times weight (O, I) transposed; bfloat16, or weight float8, for BITS and ASM its bytes.

    R at most 16; O a multiple of 8; I at most 6144. norm (I,): RMS normalisation of the rows before.
    """
    height, width = weight.shape
    # So that two programs fit a multiprocessor's shared memory: this kernel's, and one of the next, which comes early.
    outputs = 16 if height // 16 >= 128 and width <= 1024 else 8
    if len(x) > 16 or height % outputs or width > 6144:
        raise ValueError(f"no product of {len(x)} rows with a matrix ({height}, {width})")
    product_kernel[(height // outputs,)](
        x, norm, weight, out, len(x), height, 1e-5,
        IN=width, OUT=outputs, **segmented(width, segments), ROWS=16, BLOCK=power_of_two(width),
        NORM=norm is not None, WIDEN=widening, WEIGHTS_FIRST=weights_first, TRIGGER_FIRST=trigger_first,
        num_warps=WARPS, **overlapping(overlaps),
    )  # fmt: skip


def overlapping(overlaps: bool) -> dict[str, bool]:
    """Launch options of a kernel that may start before the previous one has ended."""
    return {"OVERLAP": True, "launch_pdl": True} if overlaps else {"OVERLAP": False}


def together(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel whose programs wait for each other: all on the device at once, or refused."""
    return {"launch_cooperative_grid": True} if device.type == "cuda" else {}


# Programs of one kernel, waiting for each other.


@jit
def arrive(counter_ptr):
    """Makes this program's stores visible to those that read the counter."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@jit
def wait(counter_ptr, target, MOST: tl.constexpr):
    """Waits until programs have arrived `target` times."""
    polls = 0
    seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    while (seen < target) & (polls < MOST):
        seen = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    tl.debug_barrier()


@jit
def await_words(word_ptr, tag, MOST: tl.constexpr):
    """The upper halves of words (N,) int32, once the lower half of each is `tag`."""
    polls = 0
    word = tl.load(word_ptr, volatile=True)
    while (tl.max((word & 0xFFFF) ^ tag, 0) != 0) & (polls < MOST):
        word = tl.load(word_ptr, volatile=True)
        polls += 1
    return word >> 16
