"""Random operands for kernels, and ragged layouts of sequences: one row, many, lengths at the edges of pages."""

import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.check.compare import TOLERANCES
from engine.check.operands import CPU, LONGEST, Draw, Laid, Layout, planned
from kernels.boundary import Rule

__all__ = ["CPU", "LONGEST", "Draw", "Laid", "Layout", "planned"]

TRITONS = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
"""Where Triton's kernels run: on a CUDA device where there is one, else in the interpreter."""
RULES = [
    Rule(1.0), Rule(1.0, longest=3), Rule(0.3, monotonic=True), Rule(1.0, rise=0.2, longest=8), Rule(0, every_byte=True)
]  # fmt: skip
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
SEEDS = st.integers(0, 2**20)
few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""The interpreter takes about a millisecond per program and operation. The GPU check reads no
conftest.py, so everything is said here."""


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    atol, rtol = TOLERANCES[expected.dtype]
    torch.testing.assert_close(found.float(), expected.float(), atol=atol, rtol=rtol)


@st.composite
def layouts(draw: st.DrawFn, most: int = 4, longest: int = 300) -> Layout:
    """longest: rows before a sequence's own, at times."""
    page_size = draw(st.sampled_from([4, 8, 16]))
    befores = st.one_of(
        st.integers(0, min(70, longest)), st.integers(0, 6).map(lambda n: n * page_size), st.just(longest)
    )
    sequences = []
    for _ in range(draw(st.integers(1, most))):
        before = draw(befores)
        floor = draw(st.sampled_from([0, 0, before // 2, before]))
        sequences.append((before, draw(st.integers(1, 20)), floor, draw(st.sampled_from([0, 0, 1, 5, 20]))))
    return page_size, draw(st.sampled_from([0, 1, 7, 33])), sequences
