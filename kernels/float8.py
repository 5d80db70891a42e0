"""Weights in float8 (e4m3) as bfloat16, by moving bits, for devices that convert such numbers slowly or not at all.

The bits of an e4m3 number, moved, are a bfloat16 whose exponent is 120 too low: sign to sign, exponent and mantissa one
below the other. Times 2^120 that is the number itself, below the normal numbers, too. The two codes of NaN become 480
and -480; `kernels.linear.quantize` makes neither of finite weights.

A kernel gets the codes, `weight.view(torch.uint8)`: on architectures before sm_89 Triton has no pointers to float8.
"""

import torch
from torch import Tensor

from .lang import INTERPRETED, jit, tl

ASSEMBLER = """{
    .reg .b32 a, b, t, s, z;
    mov.b32 s, 0x7B807B80;
    mov.b32 z, 0x80008000;
    prmt.b32 a, $2, 0, 0x1404;
    prmt.b32 b, $2, 0, 0x3424;
    and.b32 t, a, 0x7F007F00;
    shr.b32 t, t, 4;
    lop3.b32 a, a, 0x80008000, t, 0xEA;
    fma.rn.bf16x2 $0, a, s, z;
    and.b32 t, b, 0x7F007F00;
    shr.b32 t, t, 4;
    lop3.b32 b, b, 0x80008000, t, 0xEA;
    fma.rn.bf16x2 $1, b, s, z;
}"""
"""Four codes ($2) to four bfloat16 ($0, $1). fma, because sm_80 has no mul of bfloat16; z is -0.0 twice, which keeps
the sign of zero."""
_ASSEMBLER = tl.constexpr(ASSEMBLER)


def codes_of(weight: Tensor) -> Tensor:
    """A matrix as kernels take it: its codes if it is float8, else itself."""
    return weight.view(torch.uint8) if weight.dtype == torch.float8_e4m3fn else weight


@jit
def widen(codes):
    """A block of uint8 codes of e4m3 numbers in bfloat16, five instructions for two; also exact in float32."""
    if INTERPRETED:
        return widen_by_integers(codes)
    else:
        return tl.inline_asm_elementwise(_ASSEMBLER, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)


@jit
def widen_by_integers(codes):
    """The same without assembler: more than twice the instructions."""
    if INTERPRETED:
        # It does not widen bfloat16 below the normal numbers as a device does.
        bits = codes.to(tl.int32)
        small = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True)
        return (small * 1.329227995784916e36).to(tl.bfloat16)
    else:
        bits = codes.to(tl.int16)
        small = (((bits & 0x80) << 8) | ((bits & 0x7F) << 4)).to(tl.bfloat16, bitcast=True)
        return small * 1.329227995784916e36
