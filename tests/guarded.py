"""Tensors that end where memory ends: reading on past their last number kills the process."""

import ctypes
import mmap

import torch
from torch import Tensor

PROT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(tensor: Tensor) -> Tensor:
    """A copy that lies against a page that nothing may touch. Its memory is never given back: tests are few."""
    size = tensor.nbytes
    pages = -(-size // mmap.PAGESIZE)
    region = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    if _libc.mprotect(ctypes.c_void_p(address + pages * mmap.PAGESIZE), mmap.PAGESIZE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    start = pages * mmap.PAGESIZE - size
    copy = torch.frombuffer(region, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    return copy.copy_(tensor)
