"""The patcher's entropy."""

import torch
from torch import Tensor

from .lang import await_inputs, jit, let_next_begin, overlap, power_of_two, tl
from .traffic import Traffic


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits) over the last dimension: (R, V) in, (R,) float32 out."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def traffic(rows: int, vocab_size: int, itemsize: int) -> Traffic:
    return Traffic(rows * vocab_size * itemsize, rows * 4)


@jit
def entropy_kernel(logits_ptr, out_ptr, vocab_size, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """One row."""
    let_next_begin(OVERLAP)
    await_inputs(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    m = i < vocab_size
    x = tl.load(logits_ptr + row * vocab_size + i, mask=m, other=float("-inf")).to(tl.float32)
    x = x - tl.max(x, 0)
    log_p = tl.where(m, x - tl.log(tl.sum(tl.exp(x), 0)), 0.0)
    tl.store(out_ptr + row, -tl.sum(tl.where(m, tl.exp(log_p) * log_p, 0.0), 0))


def entropy_triton(logits: Tensor) -> Tensor:
    """As `entropy`."""
    rows, vocab_size = logits.shape
    out = logits.new_empty(rows, dtype=torch.float32)
    entropy_kernel[(rows,)](logits, out, vocab_size, BLOCK=power_of_two(vocab_size), num_warps=4, **overlap(logits))
    return out
