"""Gives a model's decoder a byte table of its own, and a [MASK], so that all decoders can be trained into it.

Released BLTs feed the decoder the encoder's byte states, which a [MASK] does not have (Fast BLT 3.1 looks bytes up
instead). The table starts as the least-squares fit of a row per byte to those states: the mean state of each byte.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from engine.config import PAD_ID, ModelConfig

from . import model

TABLE = "model.local_decoder.embed_tokens.weight"


def with_blocks(config: ModelConfig, name: str, block_size: int) -> ModelConfig:
    """The configuration with a decoder table and a [MASK]; patching stays. Raises ValueError if it has a [MASK]."""
    if config.mask_id is not None:
        raise ValueError(
            f"{config.name} has a [MASK] already (id {config.mask_id}, blocks of {config.block_size}): it runs all "
            "decoders as it is"
        )
    if block_size < 2:
        raise ValueError(f"blocks of {block_size}: a block must have at least 2 bytes")
    return replace(config, name=name, decoder_input="embedding", mask_id=config.vocab_size, block_size=block_size)


@torch.no_grad()
def first_table(
    config: ModelConfig, weights: Mapping[str, Tensor], rows: Iterable[Tensor], dtype: torch.dtype
) -> Tensor:
    """The decoder's first table, (vocab + 1, dim) float32, [MASK] last: the mean of all rows of the table.

    config: without [MASK]. rows: batches of ids (B, T). A model whose decoder has a table keeps it. Bytes that do not
    occur get their row of the encoder's table, moved as the bytes that do have moved on average.
    """
    if config.decoder_input == "embedding":
        table = weights[TABLE].float()
    else:
        own = weights["model.local_encoder.embed_tokens.weight"].float()
        sums, counts = torch.zeros_like(own), own.new_zeros(len(own))
        for ids in rows:
            patches = model.patch(config.patching, model.entropies(config, weights, ids))
            states, _ = model.encode(config, weights, ids, patches, dtype)
            held = ids != PAD_ID
            sums.index_add_(0, ids[held], states[held])
            counts.index_add_(0, ids[held], torch.ones_like(ids[held], dtype=own.dtype))
        seen = counts > 0
        means = sums / counts.clamp(min=1)[:, None]
        moved = (means - own)[seen].mean(0) if seen.any() else torch.zeros_like(own[0])
        table = torch.where(seen[:, None], means, own + moved)
    return torch.cat([table, table.mean(0, keepdim=True)])
