"""T5: a stack of layers as one kernel, whose programs pass data to each other, or as a kernel per phase.

A layer has five phases: norm, queries, keys and values; attention over pages of older keys; output; norm, gate and up;
down. Every program loads its weights before it waits for the phase before. New keys and values are not stored and
nothing is rotated: only the time of a phase is measured. The ring is the same hand-over in CUDA C++ (see `ring`).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.lang import IN_INTERPRETER, blocks, dot, jit, power_of_two, tl
from kernels.norm import rms_norm
from kernels.product import held

from . import reads, ring
from .question import UNDECIDED, Case
from .scale import Scale, Stack
from .tile import MOST_POLLS, WARPS, arrive, inverse_rms, load_weights, segmented, times, together, wait

TITLE = "a stack as one kernel"
PHASES = 5
OUTPUTS = 8
"""Per program, at a time."""
PAGE = 64
REPEATS = 1000
"""Runs of the one kernel that must give the bits of a kernel per phase: a hand-over that comes too early may be
rare."""
NEEDED_US = 0.77
"""Microseconds of a phase beyond the time of its bytes: with more, 0.7 of the bandwidth is out of reach for blt."""


@jit
def _product(
    x_ptr, norm_ptr, w_ptr, out_ptr, counter_ptr, target, rows, out_dim,
    IN: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, TILES: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
    MOST: tl.constexpr,
):  # fmt: skip
    """TILES times OUT outputs per program; the first tile's weights are loaded before the wait."""
    i_out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    w0 = load_weights(w_ptr, i_out, 0, IN, 8, WIDTH)
    if ROUNDS > 1:
        w1 = load_weights(w_ptr, i_out, 8, IN, 8, WIDTH)
    if TILES > 1:
        t1 = load_weights(w_ptr, i_out + PROGRAMS * OUT, 0, IN, 8, WIDTH)
    if TILES > 2:
        t2 = load_weights(w_ptr, i_out + 2 * PROGRAMS * OUT, 0, IN, 8, WIDTH)
    w0 = held(w0)
    if ROUNDS > 1:
        w1 = held(w1)
    if TILES > 1:
        t1 = held(t1)
    if TILES > 2:
        t2 = held(t2)
    wait(counter_ptr, target, MOST)
    i_row = tl.arange(0, ROWS)
    inverse = tl.zeros((ROWS,), tl.float32)
    if NORM:
        inverse = inverse_rms(x_ptr, rows, 1e-5, IN, BLOCK, ROWS)
    zero = tl.zeros((8, ROWS, OUT), tl.float32)
    total = times(x_ptr, norm_ptr, inverse, w0, zero, 0, rows, IN, 8, WIDTH, ROWS, NORM)
    if ROUNDS > 1:
        total = times(x_ptr, norm_ptr, inverse, w1, total, 8, rows, IN, 8, WIDTH, ROWS, NORM)
    p_out = out_ptr + i_row[:, None] * out_dim + i_out[None, :]
    m = (i_row < rows)[:, None]
    y = tl.sum(total, 0).to(tl.bfloat16).to(tl.float32)
    if RESIDUAL:
        y += tl.load(p_out, mask=m, other=0.0, cache_modifier=".cg").to(tl.float32)
    tl.store(p_out, y.to(tl.bfloat16), mask=m)
    if TILES > 1:
        total = times(x_ptr, norm_ptr, inverse, t1, zero, 0, rows, IN, 8, WIDTH, ROWS, NORM)
        tl.store(p_out + PROGRAMS * OUT, tl.sum(total, 0).to(tl.bfloat16), mask=m)
    if TILES > 2:
        total = times(x_ptr, norm_ptr, inverse, t2, zero, 0, rows, IN, 8, WIDTH, ROWS, NORM)
        tl.store(p_out + 2 * PROGRAMS * OUT, tl.sum(total, 0).to(tl.bfloat16), mask=m)


@jit
def _gated(
    x_ptr, norm_ptr, w_ptr, out_ptr, counter_ptr, target, rows,
    IN: tl.constexpr, FFN: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up. The first tile's weights are loaded before the wait, the others right after it."""
    i_out = tl.program_id(0) * OUT + tl.arange(0, OUT)
    i_row = tl.arange(0, ROWS)
    zero = tl.zeros((8, ROWS, OUT), tl.float32)
    gate = load_weights(w_ptr, i_out, 0, IN, 8, WIDTH)
    up = load_weights(w_ptr + FFN * IN, i_out, 0, IN, 8, WIDTH)
    gate = held(gate)
    up = held(up)
    wait(counter_ptr, target, MOST)
    inverse = inverse_rms(x_ptr, rows, 1e-5, IN, BLOCK, ROWS)
    for tile in tl.static_range(TILES):
        i_tile = i_out + tile * PROGRAMS * OUT
        if tl.program_id(0) * OUT + tile * PROGRAMS * OUT < FFN:
            if tile > 0:
                gate = load_weights(w_ptr, i_tile, 0, IN, 8, WIDTH)
                up = load_weights(w_ptr + FFN * IN, i_tile, 0, IN, 8, WIDTH)
                gate = held(gate)
                up = held(up)
            y = tl.sum(times(x_ptr, norm_ptr, inverse, gate, zero, 0, rows, IN, 8, WIDTH, ROWS, True), 0)
            u = tl.sum(times(x_ptr, norm_ptr, inverse, up, zero, 0, rows, IN, 8, WIDTH, ROWS, True), 0)
            y = y.to(tl.bfloat16).to(tl.float32)
            y = (y / (1.0 + tl.exp(-y))).to(tl.bfloat16).to(tl.float32) * u.to(tl.bfloat16).to(tl.float32)
            tl.store(out_ptr + i_row[:, None] * FFN + i_tile[None, :], y.to(tl.bfloat16), mask=(i_row < rows)[:, None])


@jit
def _attention(
    qkv_ptr, k_ptr, v_ptr, part_ptr, out_ptr, counter_ptr, arrived_ptr, target, rows, length,
    DIM: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr,
    ROWS: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """A head and a page per program; the last of a head's programs merges its pages, in their order."""
    head, page = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    i_row, i_key, i_dim = tl.arange(0, ROWS), tl.arange(0, PAGE), tl.arange(0, HEAD)
    m = (i_row < rows)[:, None]
    p_key = (page * HEADS + head) * PAGE * HEAD + i_key[:, None] * HEAD + i_dim[None, :]
    k = tl.load(k_ptr + p_key)
    v = tl.load(v_ptr + p_key)
    wait(counter_ptr, target, MOST)
    p_q = qkv_ptr + i_row[:, None] * 3 * DIM + head * HEAD + i_dim[None, :]
    q = tl.load(p_q, mask=m, other=0.0, cache_modifier=".cg")
    scores = dot(q, tl.trans(k), tl.zeros((ROWS, PAGE), tl.float32)) * (HEAD**-0.5)
    scores = tl.where((page * PAGE + i_key)[None, :] < length, scores, -1e30)
    top = tl.max(scores, 1)
    weight = tl.where(scores > -1e29, tl.exp(scores - top[:, None]), 0.0)
    read = dot(weight.to(tl.bfloat16), v, tl.zeros((ROWS, HEAD), tl.float32))
    p_part = part_ptr + ((page * HEADS + head) * ROWS + i_row) * (HEAD + 2)
    tl.store(p_part[:, None] + i_dim[None, :], read, mask=m)
    tl.store(p_part + HEAD, top, mask=i_row < rows)
    tl.store(p_part + HEAD + 1, tl.sum(weight, 1), mask=i_row < rows)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + head, 1, sem="acq_rel", scope="gpu") % PAGES == PAGES - 1:
        read = tl.zeros((ROWS, HEAD), tl.float32)
        total, top = tl.zeros((ROWS,), tl.float32), tl.full((ROWS,), -1e30, tl.float32)
        for i in range(PAGES):
            p_part = part_ptr + ((i * HEADS + head) * ROWS + i_row) * (HEAD + 2)
            theirs = tl.load(p_part + HEAD, mask=i_row < rows, other=-1e30, cache_modifier=".cg")
            now = tl.maximum(top, theirs)
            mine, other = tl.exp(top - now), tl.exp(theirs - now)
            part = tl.load(p_part[:, None] + i_dim[None, :], mask=m, other=0.0, cache_modifier=".cg")
            read = read * mine[:, None] + part * other[:, None]
            sums = tl.load(p_part + HEAD + 1, mask=i_row < rows, other=0.0, cache_modifier=".cg")
            total = total * mine + sums * other
            top = now
        read = read / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + i_row[:, None] * DIM + head * HEAD + i_dim[None, :], read.to(tl.bfloat16), mask=m)


@jit(do_not_specialize=["rows", "length", "first", "last"])
def stack_kernel(
    x_ptr, qkv_ptr, read_ptr, gated_ptr, part_ptr, k_ptr, v_ptr, norms_ptr, qkv_w_ptr, o_w_ptr, gate_up_w_ptr,
    down_w_ptr, counter_ptr, arrived_ptr, rows, length, first, last,
    DIM: tl.constexpr, FFN: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    PAGES: tl.constexpr, PROGRAMS: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, FFN_WIDTH: tl.constexpr,
    FFN_ROUNDS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Phases `first` up to `last` of a stack, five a layer. PROGRAMS: DIM / OUT = HEADS * PAGES of them."""
    for phase in range(first, last):
        layer, kind = phase // 5, phase % 5
        target = (phase - first) * PROGRAMS
        norms = norms_ptr + layer * 2 * DIM
        if kind == 0:
            _product(
                x_ptr, norms, qkv_w_ptr + layer * 3 * DIM * DIM, qkv_ptr, counter_ptr, target, rows, 3 * DIM,
                DIM, OUT, WIDTH, 1, 3, PROGRAMS, ROWS, BLOCK, True, False, MOST,
            )  # fmt: skip
        elif kind == 1:
            cache = layer * PAGES * HEADS * PAGE * HEAD
            _attention(
                qkv_ptr, k_ptr + cache, v_ptr + cache, part_ptr, read_ptr, counter_ptr, arrived_ptr, target, rows,
                length, DIM, HEADS, HEAD, PAGE, PAGES, ROWS, MOST,
            )  # fmt: skip
        elif kind == 2:
            _product(
                read_ptr, norms, o_w_ptr + layer * DIM * DIM, x_ptr, counter_ptr, target, rows, DIM,
                DIM, OUT, WIDTH, 1, 1, PROGRAMS, ROWS, BLOCK, False, True, MOST,
            )  # fmt: skip
        elif kind == 3:
            _gated(
                x_ptr, norms + DIM, gate_up_w_ptr + layer * 2 * FFN * DIM, gated_ptr, counter_ptr, target, rows,
                DIM, FFN, OUT, WIDTH, TILES, PROGRAMS, ROWS, BLOCK, MOST,
            )  # fmt: skip
        else:
            _product(
                gated_ptr, norms, down_w_ptr + layer * FFN * DIM, x_ptr, counter_ptr, target, rows, DIM,
                FFN, OUT, FFN_WIDTH, FFN_ROUNDS, 1, PROGRAMS, ROWS, BLOCK, False, True, MOST,
            )  # fmt: skip
        arrive(counter_ptr)


class Weights(NamedTuple):
    """Of L layers, bfloat16: norms (L, 2, dim), matrices (L, out, in), keys and values (L, pages, heads, PAGE, hd)."""

    norms: Tensor
    qkv: Tensor
    o: Tensor
    gate_up: Tensor
    down: Tensor
    keys: Tensor
    values: Tensor


def draw(scale: Scale, stack: Stack) -> Weights:
    qkv, o, gate_up, down = (scale.matrices(out, width, stack.layers) for out, width in stack.matrices.values())
    pages, head = stack.dim // OUTPUTS // stack.heads, stack.dim // stack.heads
    count = stack.layers * pages * stack.heads * PAGE
    keys, values = (scale.rows_of(2 * count, head)[i::2].contiguous() for i in range(2))
    shape = (stack.layers, pages, stack.heads, PAGE, head)
    norms = torch.ones(stack.layers, 2, stack.dim, device=scale.device, dtype=torch.bfloat16)
    return Weights(norms, qkv, o, gate_up, down, keys.view(shape), values.view(shape))


class Run:
    """A stack over rows x (R, dim), which attend to `length` older keys; R at most 16."""

    def __init__(self, scale: Scale, stack: Stack, weights: Weights, x: Tensor, length: int) -> None:
        self._scale, self._stack, self._weights, self._length = scale, stack, weights, length
        self._given, self._x = x, x.clone()
        self._programs, self._head = stack.dim // OUTPUTS, stack.dim // stack.heads
        self._qkv, self._read, self._gated = (
            torch.empty(len(x), width, device=scale.device, dtype=torch.bfloat16)
            for width in (3 * stack.dim, stack.dim, stack.ffn)
        )
        self._part = torch.empty(self._programs * 16 * (self._head + 2), device=scale.device)
        self._counter = torch.zeros(1 + stack.heads, dtype=torch.int32, device=scale.device)

    def __call__(self, *, apart: bool) -> Tensor:
        """The stack's output for the rows: (R, dim), the same tensor in every call. apart: a kernel per phase."""
        self._x.copy_(self._given)
        self._counter.zero_()
        phases = PHASES * self._stack.layers
        if not apart:
            self._launch(0, phases, together(self._scale.device))
        else:
            for phase in range(phases):
                self._launch(phase, phase + 1, {})
        return self._x

    def _launch(self, first: int, last: int, how: dict[str, Any]) -> None:
        stack, weights = self._stack, self._weights
        cut, ffn_cut = segmented(stack.dim), segmented(stack.ffn)
        stack_kernel[(self._programs,)](
            self._x, self._qkv, self._read, self._gated, self._part, weights.keys, weights.values, weights.norms,
            weights.qkv, weights.o, weights.gate_up, weights.down, self._counter, self._counter[1:], len(self._x),
            self._length, first, last,
            DIM=stack.dim, FFN=stack.ffn, HEADS=stack.heads, HEAD=self._head, PAGE=PAGE,
            PAGES=self._programs // stack.heads, PROGRAMS=self._programs, OUT=OUTPUTS, WIDTH=cut["WIDTH"],
            FFN_WIDTH=ffn_cut["WIDTH"], FFN_ROUNDS=ffn_cut["ROUNDS"], TILES=blocks(stack.ffn, stack.dim), ROWS=16,
            BLOCK=power_of_two(stack.dim), MOST=MOST_POLLS, num_warps=WARPS, **how,
        )  # fmt: skip


def expected(stack: Stack, weights: Weights, x: Tensor, length: int) -> Tensor:
    """The same in torch, rounded where the kernel rounds."""
    head = stack.dim // stack.heads
    for layer in range(stack.layers):
        n = rms_norm(x, weights.norms[layer, 0], 1e-5)
        q = F.linear(n, weights.qkv[layer])[:, : stack.dim].unflatten(1, (stack.heads, head)).float()
        k, v = (t[layer].transpose(0, 1).flatten(1, 2)[:, :length].float() for t in (weights.keys, weights.values))
        attend = torch.einsum("rhd,hkd->rhk", q, k).mul(head**-0.5).softmax(-1)
        x = x + F.linear(torch.einsum("rhk,hkd->rhd", attend, v).flatten(1).to(x.dtype), weights.o[layer])
        gate, up = F.linear(rms_norm(x, weights.norms[layer, 1], 1e-5), weights.gate_up[layer]).chunk(2, 1)
        x = x + F.linear(F.silu(gate) * up, weights.down[layer])
    return x


def cases(scale: Scale) -> list[Case]:
    ways = ("one kernel", "a kernel a phase", "ring")
    return [{"stack": stack, "as": way} for way in ways for stack in ("patcher", "decoder")]


def measure(scale: Scale, case: Case) -> Case:
    stack = scale.stacks[case["stack"]]
    peak = reads.measure(scale, {"from": "memory"})["GB/s"]
    if case["as"] == "ring":
        return ring.measure(scale, stack.dim, peak)
    weights, x = draw(scale, stack), scale.rows_of(1, stack.dim)
    length = stack.dim // OUTPUTS // stack.heads * PAGE - 3
    run = Run(scale, stack, weights, x, length)
    found, wanted = run(apart=True).clone(), expected(stack, weights, x, length)
    off = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not off < 0.05:
        raise RuntimeError(f"the stack is off by {off:.1%}")
    if case["as"] == "one kernel" and not IN_INTERPRETER:
        differ = torch.zeros((), dtype=torch.int64, device=scale.device)
        for _ in range(REPEATS):
            differ += (run(apart=False) != found).any()
        if int(differ):
            raise RuntimeError(f"one kernel and a kernel per phase differ in {int(differ)} of {REPEATS} runs")
        try:
            us = scale.chain_us([partial(run, apart=False)])
        except RuntimeError:  # if this driver records no kernel whose programs wait for each other
            us = scale.work_us(partial(run, apart=False), times=20)
    else:
        us = scale.chain_us([partial(run, apart=True)])
    phases, size = PHASES * stack.layers, sum(t.nbytes for t in weights)
    return {"us": us / phases, "exposed us": (us - size / peak / 1e3) / phases, "GB/s": size / us / 1e3, "off": off}


def decide(rows: list[Case]) -> str:
    phases = {row["stack"]: row["exposed us"] for row in rows if row["as"] == "one kernel"}
    rings = {row["stack"]: row["exposed us"] for row in rows if row["as"] == "ring"}
    if not phases:
        return UNDECIDED
    said = "a phase takes " + ", ".join(f"{us:.2f} us ({stack})" for stack, us in phases.items())
    said += f" beyond the time of its bytes, {NEEDED_US} are needed"
    if max(phases.values()) <= NEEDED_US:
        return f"{said}: persistent Triton kernels do for the local stages."
    if not rings:
        return f"{said}; the ring was not measured."
    said += "; of the ring " + ", ".join(f"{us:.2f} us ({stack})" for stack, us in rings.items())
    better = all(rings[stack] < 0.8 * us for stack, us in phases.items() if stack in rings)
    return f"{said}: {'build the ring for the local stages' if better else 'the ring is not worth its trouble'}."
