"""How many multiply-adds the engine's decoding takes, and how many the processor can do."""

import time

import torch

from engine.costs import bandwidth
from engine.costs.accounting import StageBytes
from engine.counts import STAGES
from engine.engine import Engine
from kernels import native
from kernels.dispatch import choose_kernels
from kernels.linear import Matrix

from .generate import Reading

PRODUCT_ROWS, PRODUCT_SIZE = 24, 1024
"""Enough rows to bind a product by arithmetic alone, and a matrix that fits a cache."""
REPEATS = 3


def probe(engine: Engine) -> float:
    """Multiply-adds per second of products that wait for no memory, by all threads of the engine.

    Our own CPU kernels run theirs in the nearest cache, where bfloat16 is widened and multiplied in float32. Others
    multiply a matrix that fits a cache.
    """
    device, kernels = engine.stepper.device, choose_kernels(None, engine.stepper.device)
    if kernels.name == "native":
        return max(_rate() for _ in range(REPEATS))
    dtype, size = getattr(torch, engine.config.dtype), PRODUCT_SIZE
    matrix = kernels.matrix(Matrix(torch.ones(size, size, dtype=dtype, device=device)))
    x = torch.ones(PRODUCT_ROWS, size, dtype=dtype, device=device)
    work = bandwidth.recorded(lambda: kernels.linear(x, matrix), device)
    return PRODUCT_ROWS * size * size / bandwidth.seconds(work, device, times=8)


def _rate() -> float:
    start = time.perf_counter()
    return native.multiply() / (time.perf_counter() - start)


def multiply_adds(engine: Engine, reading: Reading) -> float:
    """Of the products with weights; attention is not counted."""
    numbers = StageBytes.of(engine.model_config, 1, 1).weights
    return sum(reading.rows[stage] * numbers[stage] for stage in STAGES)
