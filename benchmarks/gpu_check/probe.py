"""The device and its memory bandwidth: a plain copy, and the model's own matrix products.

A step of a model that is bound by reading weights can at best stream them as fast as this. The shapes are those of the
1B preset; every matrix has so many copies that no cache holds them, and all products run as one graph.
"""

from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import PRESETS
from engine.costs import bandwidth
from kernels.dispatch import Kernels, choose_kernels
from kernels.linear import Matrix, quantize

from .device import describe
from .piece import Piece
from .setting import Setting

ROWS = (1, 8, 16)


def measure(setting: Setting, piece: Piece) -> None:
    device = torch.device(setting.device)
    piece.put(device=describe(setting))
    copied = bandwidth.copy_rate(device, copy_size(setting))
    piece.put(copy_gb_s=copied / 1e9)
    kernels = choose_kernels(None, device)
    best = 0.0
    for name, (out, width) in _shapes(setting).items():
        for rows in ROWS[:1] if setting.quick else ROWS:
            row: dict[str, Any] = {"matrix": name, "out": out, "in": width, "rows": rows}
            x = torch.randn(rows, width, device=device).to(torch.bfloat16)
            matrices = _matrices(out, width, setting)
            row[f"{kernels.name} bf16"] = _rate(kernels, x, matrices, device)
            if kernels.name != "torch":
                row["torch bf16"] = _rate(Kernels(), x, matrices, device)
            if setting.has_float8():
                # Twice as many, for the same number of bytes.
                small = [quantize(m.data) for m in matrices] * 2
                row[f"{kernels.name} float8"] = _rate(kernels, x, small, device)
            piece.row("products", row)
            if rows == 1:
                best = max(best, row[f"{kernels.name} bf16"])
    piece.put(gemv_gb_s=best, peak_gb_s=max(best, copied / 1e9))


def copy_size(setting: Setting) -> int:
    """Bytes to copy, far more than any cache holds."""
    return (16 << 20) if setting.quick else (1 << 30) if setting.on_gpu else (256 << 20)


def _shapes(setting: Setting) -> dict[str, tuple[int, int]]:
    """(out, in) of the matrices that a byte or a patch reads."""
    if setting.quick:
        return {"toy": (256, 128)}
    config = PRESETS["1b"]
    shapes = {}
    for name, stack in (("global", config.global_), ("decoder", config.decoder)):
        shapes[f"{name} qkv"] = (3 * stack.dim, stack.dim)
        shapes[f"{name} o"] = (stack.dim, stack.dim)
        shapes[f"{name} gate, up"] = (2 * stack.ffn_dim, stack.dim)
        shapes[f"{name} down"] = (stack.dim, stack.ffn_dim)
    return shapes


def _matrices(out: int, width: int, setting: Setting) -> list[Matrix]:
    total = (1 << 20) if setting.quick else (512 << 20) if setting.on_gpu else (128 << 20)
    count = max(total // (2 * out * width), 2)
    generator = torch.Generator(setting.device).manual_seed(0)
    drawn = torch.randn(count, out, width, generator=generator, device=setting.device, dtype=torch.bfloat16)
    return [Matrix(data) for data in drawn * width**-0.5]


def _rate(kernels: Kernels, x: Tensor, matrices: list[Matrix], device: torch.device) -> float:
    """GB of matrices per second."""
    laid_out = [kernels.matrix(matrix) for matrix in matrices]
    return bandwidth.stream_rate(lambda matrix: kernels.linear(x, matrix), laid_out, device) / 1e9
