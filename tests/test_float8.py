"""All 256 codes of float8 in bfloat16: the kernel's two ways, in the interpreter or on a device, and the assembler's
own text, instruction by instruction."""

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.float8 import ASSEMBLER, widen, widen_by_integers
from kernels.lang import jit, tl
from kernels.linear import quantize
from tests.operands import SEEDS, TRITONS, Draw, few

CODES = torch.arange(256, dtype=torch.uint8)
NANS = [0x7F, 0xFF]


@jit
def widen_kernel(codes_ptr, out_ptr, BLOCK: tl.constexpr, BY_INTEGERS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    codes = tl.load(codes_ptr + i)
    numbers = widen_by_integers(codes) if BY_INTEGERS else widen(codes)
    tl.store(out_ptr + i, numbers.to(out_ptr.dtype.element_ty))


def exact(found: Tensor) -> None:
    """Asserts what all codes become, to the sign of zero."""
    expected = CODES.view(torch.float8_e4m3fn).float()
    assert expected.isnan().nonzero().flatten().tolist() == NANS
    expected[NANS] = torch.tensor([480.0, -480.0])
    assert torch.equal(found.float().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by_integers", [False, True])
@pytest.mark.parametrize("block", [256, 16])
def test_all_codes_widen_exactly(dtype: torch.dtype, by_integers: bool, block: int) -> None:
    out = torch.empty(256, dtype=dtype, device=TRITONS)
    kernel: Any = widen_kernel
    kernel[(256 // block,)](CODES.to(TRITONS), out, BLOCK=block, BY_INTEGERS=by_integers)
    exact(out.cpu())


def test_the_assembler_widens_all_codes_exactly() -> None:
    # As `pack=4` hands them over: the first of four codes is the lowest byte, the first of two numbers the lower half.
    registers = [int.from_bytes(bytes(four), "little") for four in CODES.view(-1, 4).tolist()]
    words = [word for register in registers for word in run(ASSEMBLER, register)]
    exact(torch.tensor(words).to(torch.int32).view(torch.bfloat16))


def run(assembler: str, given: int) -> tuple[int, int]:
    """($0, $1) for $2; the meaning of each instruction is that of the manual of PTX."""
    registers = {"$2": given}

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    for operation, operands in re.findall(r"^ *([a-z0-9.]+) (.*);$", assembler, re.MULTILINE):
        if operation == ".reg":
            continue
        target, *names = operands.split(", ")
        a, *more = map(value, names)
        match operation:
            case "mov.b32":
                result = a
            case "and.b32":
                result = a & more[0]
            case "shr.b32":
                result = a >> more[0]
            case "prmt.b32":
                both = (a | more[0] << 32).to_bytes(8, "little")
                assert not more[1] & 0x8888, "no sign is copied"
                result = int.from_bytes(bytes(both[more[1] >> 4 * i & 7] for i in range(4)), "little")
            case "lop3.b32":
                result = sum(
                    (more[2] >> ((a >> i & 1) << 2 | (more[0] >> i & 1) << 1 | (more[1] >> i & 1)) & 1) << i
                    for i in range(32)
                )
            case "fma.rn.bf16x2":
                x, y, z = (
                    torch.tensor([v & 0xFFFF, v >> 16]).to(torch.int16).view(torch.bfloat16).double()
                    for v in (a, *more)
                )
                low, high = (x * y + z).bfloat16().view(torch.int16).tolist()
                result = low & 0xFFFF | (high & 0xFFFF) << 16
            case _:
                raise AssertionError(f"unknown instruction {operation}")
        registers[target] = result
    # As signed words.
    low, high = (word - (word >> 31 << 32) for word in (registers["$0"], registers["$1"]))
    return low, high


@few
@given(SEEDS, st.integers(-120, 100), st.integers(0, 8))
def test_quantize_makes_no_code_of_nan(seed: int, exponent: int, zeros: int) -> None:
    weight = Draw(seed).randn(8, 300) * 2.0**exponent
    weight[:zeros] = 0
    codes = quantize(weight).data.view(torch.uint8)
    assert not ((codes & 0x7F) == 0x7F).any()
    if exponent > -30:
        assert bool(((codes[zeros:] & 0x7F) == 0x7E).any(1).all()), "the largest weight of a row is the largest number"
