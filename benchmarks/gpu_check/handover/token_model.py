"""T10: bytes per second of a 1B token model on the same card, by its matrices alone.

All products of a Llama's layers and of its head, random, bfloat16, one row, one CUDA graph. Attention, norms and the
host are left out, so that no server of such a model is faster than this on the same products.
"""

from torch import Tensor

from kernels.linear import Matrix, linear, linear_triton

from .question import UNDECIDED, Case
from .scale import Scale

TITLE = "a token model of 1B"
BYTES_PER_TOKEN = 4.4
"""Average of Llama 3's tokens (BLT paper, section 4)."""
OURS = {"blt": 692, "blt-s k=8": 1379, "blt-d B=8": 2397, "blt-dv B=8": 2087}
"""Bytes a second that our 1B shape wrote on an H200 when this was written (docs/gpu.md)."""


def cases(scale: Scale) -> list[Case]:
    return [{"products": "torch"}, {"products": "triton"}]


def measure(scale: Scale, case: Case) -> Case:
    of = scale.tokens
    layers = [_layer(scale) for _ in range(of.layers)]
    head = Matrix(scale.matrices(of.vocab, of.dim, 1)[0])
    x = scale.rows_of(1, of.dim)
    multiply = linear if case["products"] == "torch" else linear_triton

    def token() -> Tensor:
        h = x
        for qkv, o, gate_up, down in layers:
            h = multiply(multiply(h, qkv)[:, : of.dim], o)
            h = multiply(multiply(h, gate_up)[:, : of.ffn], down)
        return multiply(h, head)

    us = scale.chain_us([token])
    size = sum(matrix.data.nbytes for layer in layers for matrix in layer) + head.data.nbytes
    tokens = 1e6 / us
    return {"us": us, "GB/s": size / us / 1e3, "tokens/s": tokens, "bytes/s": tokens * BYTES_PER_TOKEN}


def _layer(scale: Scale) -> list[Matrix]:
    of = scale.tokens
    shapes = [(of.dim + 2 * of.kv_dim, of.dim), (of.dim, of.dim), (2 * of.ffn, of.dim), (of.dim, of.ffn)]
    return [Matrix(scale.matrices(out, width, 1)[0]) for out, width in shapes]


def decide(rows: list[Case]) -> str:
    if not rows:
        return UNDECIDED
    best = max(row["bytes/s"] for row in rows)
    ratios = ", ".join(f"{name} {rate / best:.2f}" for name, rate in OURS.items())
    return (
        f"a token model of this size writes at most {best:,.0f} bytes/s here (4.4 bytes a token). What our decoders "
        f"wrote on an H200 before this, as a share: {ratios}; `1b` has those of this card."
    )
