"""Stage 2, bytes to states, and closed patches to the global stage's input (BLT 3.2)."""

import torch
from torch import Tensor

from kernels.attention import AttentionPlan, attention, write_kv
from kernels.hash_embed import hash_embed, ngram_hashes
from kernels.linear import linear
from kernels.pooling import patch_max

from ..caches import encoder_cross_layers
from ..config import ModelConfig
from .layers import CrossAttention, KvCache, Stack, Weights


class Encoder:
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._config = config
        prefix = "model.local_encoder"
        self._embedding = weights[f"{prefix}.embed_tokens.weight"]
        self._tables = [
            weights[f"model.encoder_hash_tok_embedding.{t}.weight"] for t in range(config.hashes.num_tables)
        ]
        self._stack = Stack(config.encoder, weights, prefix)
        self._slots = weights[f"{prefix}.patch_embedding_projection.weight"]
        num_cross = encoder_cross_layers(config)
        stored = sum(
            f"{prefix}.cross_attn_layers.{i}.q_proj.weight" in weights for i in range(config.encoder.num_layers)
        )
        self._cross = [
            CrossAttention(config.encoder, weights, f"{prefix}.cross_attn_layers.{i}")
            for i in range(stored - num_cross, stored)
        ]

    def __call__(
        self,
        windows: Tensor,
        cache: KvCache,
        plan: AttentionPlan,
        open_states: Tensor,
        open_kv: KvCache,
        open_plan: AttentionPlan,
    ) -> Tensor:
        """windows (R, W) int64, the last ids up to each byte, to the byte states (R, dim).

        Each byte also leaves in the open-patch cache what its patch will need when it closes: the state to pool, and
        its keys and values for the patch's queries.
        """
        hashing = self._config.hashes
        hashes = ngram_hashes(windows, hashing.group_sizes, hashing.num_functions, hashing.rows)
        x = hash_embed(windows, self._embedding, self._tables, hashes)
        angles = self._stack.rope.index_select(0, plan.positions)
        first_cross = len(self._stack.layers) - len(self._cross)
        for i, (layer, kv) in enumerate(zip(self._stack.layers, cache, strict=True)):
            x = layer(x, angles, kv, plan)
            if i >= first_cross:
                write_kv(*self._cross[i - first_cross].key_value(x), *open_kv[i - first_cross], open_plan)
            if i == first_cross:
                open_states[open_plan.page, open_plan.offset] = x
        return x

    def close(
        self,
        open_states: Tensor,
        open_kv: KvCache,
        bytes_page: Tensor,
        bytes_offset: Tensor,
        lengths: Tensor,
        plan: AttentionPlan,
    ) -> Tensor:
        """Pools closed patches: (patches, slots * dim), the global stage's input before its projection.

        The bytes of all patches laid end to end lie at bytes_page, bytes_offset; lengths (patches,) counts them; in
        `plan` the rows are the patches' slots.
        """
        pooled = patch_max(open_states[bytes_page, bytes_offset], lengths)
        dim = pooled.shape[1]
        slots = linear(pooled, self._slots).reshape(-1, dim)
        for cross, kv in zip(self._cross, open_kv, strict=True):
            slots = slots + (slots + cross.output(attention(cross.query(slots), *kv, plan)))
        return slots.reshape(len(lengths), -1)


def ngram_windows(ids: list[int], start: int, end: int, width: int) -> list[list[int]]:
    """The last `width` ids up to each of the bytes start..end-1, 0 before the text."""
    padded = [0] * max(width - 1 - start, 0) + ids[max(start - width + 1, 0) : end]
    return [padded[i : i + width] for i in range(end - start)]


def window_tensor(windows: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(windows, dtype=torch.int64, device=device)
