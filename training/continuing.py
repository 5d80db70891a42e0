"""A model's own greedy continuations of many places in a text at once: what its blocks should draft.

`blt-dv` keeps of a block what the next-byte rows would have written themselves, so the bytes to predict are theirs, and
not those of the text: where a text may go on in several ways, the likeliest byte of each later cell is a mixture of all
of them, but the rows follow one. This is the departure from Fast BLT 3.2 in `objective`.

Only the decoder runs for each byte: no patch ends inside a continuation, as in a draft of `blt-s` (Fast BLT 3.3).
"""

from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import EOS_ID, PAD_ID, ModelConfig

from . import model
from .model import Patches, Weights


def continuing(
    config: ModelConfig, weights: Weights, row: Tensor, patches: Patches, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """What `objective.corrupt` asks for own blocks of texts `row` (B, T + 1): from places (B', S) in the first B' of
    them to `greedy`, for a block each."""
    size = config.block_size
    assert size is not None

    def continued(starts: Tensor) -> Tensor:
        count = len(starts)
        few = Patches(*(getattr(patches, f.name)[:count] for f in fields(Patches)))
        return greedy(config, weights, row[:count, :-1], few, starts, size, dtype)

    return continued


@torch.no_grad()
def greedy(
    config: ModelConfig,
    weights: Weights,
    ids: Tensor,
    patches: Patches,
    starts: Tensor,
    count: int,
    dtype: torch.dtype,
) -> Tensor:
    """The likeliest `count` bytes from each of `starts` (B, S), at least 1, in texts `ids` (B, T): (B, S, count) ids.

    PAD follows an EOS. For a decoder with a byte table of its own.
    """
    dec, length, device = config.decoder, ids.shape[1], ids.device
    states, slots = model.encode(config, weights, ids, patches, dtype)
    slots = model.latents(config, weights, slots, dtype)

    y = _embedded(weights, ids)
    turns = model.rotary(torch.arange(length, device=device), dec)
    past: list[tuple[Tensor, Tensor]] = []
    for i in range(dec.num_layers):
        y = _with_latent(config, weights, i, y, slots, patches.reads, dtype)
        prefix = f"model.local_decoder.layers.{i}"
        q, k, v = model.queries_keys_values(y, weights, prefix, dec, turns, dtype)
        past.append((k, v))
        y = model.after_attention(y, model.causal(q, k, v, dec.window), weights, prefix, dec, dtype)

    before = starts - 1
    reads = patches.reads.gather(1, before)
    y = model.gather(y, before)
    own: list[list[tuple[Tensor, Tensor]]] = [[] for _ in past]
    found: list[Tensor] = []
    while True:
        logits = model.logits(weights, model.norm(y, weights, "model.local_decoder.norm", dec, dtype))
        found.append(logits.argmax(-1))
        if len(found) == count:
            break
        positions = starts + len(found) - 1
        y, turns = _embedded(weights, found[-1]), model.rotary(positions, dec)
        bias = _unseen(starts, positions, length, dec.window).to(dtype)
        for i, (keys, values) in enumerate(past):
            y = _with_latent(config, weights, i, y, slots, reads, dtype)
            prefix = f"model.local_decoder.layers.{i}"
            q, k, v = model.queries_keys_values(y, weights, prefix, dec, turns, dtype)
            own[i].append((k, v))
            y = model.after_attention(y, _attended(q, keys, values, bias, own[i]), weights, prefix, dec, dtype)
    ids = torch.stack(found, -1)
    ended = (ids == EOS_ID).cumsum(-1) - (ids == EOS_ID).long() > 0
    return ids.masked_fill(ended, PAD_ID)


def _embedded(weights: Weights, ids: Tensor) -> Tensor:
    return F.embedding(ids, weights["model.local_decoder.embed_tokens.weight"]).float()


def _with_latent(
    config: ModelConfig, weights: Weights, layer: int, y: Tensor, slots: Tensor, reads: Tensor, dtype: torch.dtype
) -> Tensor:
    if layer and not config.decoder_cross_all_layers:
        return y
    name = f"model.local_decoder.cross_attn_layers.{layer}"
    return 2 * y + model.read_latent(y, slots, reads, weights, name, config.decoder, dtype)


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
