"""A model's own greedy continuations of many places in a text at once: what its blocks should draft.

`blt-dv` keeps of a block what the next-byte rows would have written themselves, so the bytes to predict are theirs, and
not those of the text: where a text may go on in several ways, the likeliest byte of each later cell is a mixture of all
of them, but the rows follow one. This is the departure from Fast BLT 3.2 in `objective`.

Only the decoder runs for each byte: no patch ends inside a continuation, as in a draft of `blt-s` (Fast BLT 3.3).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import EOS_ID, PAD_ID, ModelConfig

from . import model
from .model import Clean, Weights


def continuing(config: ModelConfig, weights: Weights, clean: Clean, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """What `objective.corrupt` asks for own blocks of the texts of `clean`: from places (B', S) in the first B' of them
    to `greedy`, for a block each."""
    size = config.block_size
    assert size is not None
    return lambda starts: greedy(config, weights, clean.of(len(starts)), starts, size, dtype)


@torch.no_grad()
def greedy(
    config: ModelConfig, weights: Weights, clean: Clean, starts: Tensor, count: int, dtype: torch.dtype
) -> Tensor:
    """The likeliest `count` bytes from each of `starts` (B, S), at least 1, in the texts of `clean`: (B, S, count) ids.

    PAD follows an EOS. For a decoder with a byte table of its own.
    """
    dec, length = config.decoder, clean.reads.shape[1]
    before = starts - 1
    reads = clean.reads.gather(1, before)
    y = model.gather(clean.rows, before)
    own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in clean.past]
    found: list[Tensor] = []
    while True:
        found.append(model.logits(config, weights, y, dtype).argmax(-1))
        if len(found) == count:
            break
        positions = starts + len(found) - 1
        y, turns = model.embedded(weights, found[-1]), model.rotary(positions, dec)
        bias = _unseen(starts, positions, length, dec.window).to(dtype)
        for i, (keys, values) in enumerate(clean.past):
            y = model.with_latent(config, weights, i, y, clean.slots, reads, dtype)
            prefix = f"model.local_decoder.layers.{i}"
            q, k, v = model.queries_keys_values(y, weights, prefix, dec, turns, dtype)
            own[i].append((k, v))
            y = model.after_attention(y, _attended(q, keys, values, bias, own[i]), weights, prefix, dec, dtype)
    ids = torch.stack(found, -1)
    ended = (ids == EOS_ID).cumsum(-1) - (ids == EOS_ID).long() > 0
    return ids.masked_fill(ended, PAD_ID)


def _unseen(starts: Tensor, positions: Tensor, length: int, window: int | None) -> Tensor:
    """0 where the row at each of `positions` (B, S) sees a byte of the text before its start, -inf elsewhere:
    (B, 1, S, length)."""
    index = torch.arange(length, device=starts.device)
    seen = index < starts[..., None]
    if window is not None:
        seen &= index > positions[..., None] - window
    return torch.where(seen, 0.0, float("-inf"))[:, None]


def _attended(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, own: list[tuple[Tensor, Tensor]]) -> Tensor:
    """What one row of each continuation (B, H, S, hd) attends to: the text before it, and the rows of its own."""
    groups = q.shape[1] // keys.shape[1]
    q = q * q.shape[-1] ** -0.5
    of_text = q @ _for_heads(keys, groups).mT + bias
    of_own = torch.stack([(q * _for_heads(k, groups)).sum(-1) for k, _ in own], -1)
    shares = torch.cat([of_text, of_own], -1).float().softmax(-1).to(q.dtype)
    text, rest = shares.split([keys.shape[2], len(own)], -1)
    out = text @ _for_heads(values, groups)
    for share, (_, v) in zip(rest.unbind(-1), own, strict=True):
        out = out + share[..., None] * _for_heads(v, groups)
    return out


def _for_heads(x: Tensor, groups: int) -> Tensor:
    return x if groups == 1 else x.repeat_interleave(groups, 1)
