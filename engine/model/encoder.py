"""Stage 2, bytes to states, and closed patches to the global stage's input (BLT 3.2)."""

from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.dispatch import Kernels
from kernels.hash_embed import HashTables
from kernels.stack import CrossCache, KvCache, StackWeights

from ..config import ModelConfig
from ..memory.caches import encoder_cross_layers
from .layers import CrossAttention, Weights, layers_of


class Encoder:
    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels) -> None:
        self._config = config
        self._kernels = kernels
        prefix = "model.local_encoder"
        hashes = config.hashes
        self._embedding = weights.tensor(f"{prefix}.embed_tokens.weight")
        tables = [weights.stored(f"model.encoder_hash_tok_embedding.{t}.weight") for t in range(hashes.num_tables)]
        self._hashes = HashTables(tables, hashes.group_sizes, hashes.num_functions, hashes.rows, weights.device)
        self.hash_itemsize = tables[0].itemsize
        self._slots = weights.matrix(f"{prefix}.patch_embedding_projection.weight")
        num_cross = encoder_cross_layers(config)
        stored = sum(
            f"{prefix}.cross_attn_layers.{i}.q_proj.weight" in weights for i in range(config.encoder.num_layers)
        )
        self._cross = [
            CrossAttention(config.encoder, weights, f"{prefix}.cross_attn_layers.{i}", kernels)
            for i in range(stored - num_cross, stored)
        ]
        layers = layers_of(config.encoder, weights, prefix)
        self._stack = kernels.stack(StackWeights(layers, cross_kv=[cross.cross_kv for cross in self._cross]))

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

        Also stores in the open-patch cache what a patch needs when it closes: each byte's state to pool, and its keys
        and values for the patch's queries.
        """
        x = self._kernels.hash_embed(windows, self._embedding, self._hashes)
        return self._stack(x, cache, plan, CrossCache(open_kv, open_plan.page, open_plan.offset, open_states))

    def close(
        self,
        open_states: Tensor,
        open_kv: KvCache,
        bytes_page: Tensor,
        bytes_offset: Tensor,
        bounds: Tensor,
        plan: AttentionPlan,
    ) -> Tensor:
        """Pools closed patches: (patches, slots * dim), the global stage's input before its projection.

        bytes_page, bytes_offset: where the bytes of all patches are, in order; those of patch p have the indices
        bounds[p] to bounds[p + 1] - 1. In `plan` the rows are the patches' slots.
        """
        pooled = self._kernels.patch_max(open_states, bytes_page, bytes_offset, bounds)
        slots = self._kernels.linear(pooled, self._slots).view(-1, pooled.shape[1])
        for cross, kv in zip(self._cross, open_kv, strict=True):
            slots = cross.output(self._kernels.attention(cross.query(slots), *kv, plan), slots)
        return slots.view(len(pooled), -1)


def ngram_windows(ids: list[int], start: int, end: int, width: int) -> list[int]:
    """The last `width` ids up to each of the bytes start..end-1, 0 before the text, end to end."""
    if end - start == 1 and end >= width:
        return ids[end - width : end]
    padded = [0] * max(width - 1 - start, 0) + ids[max(start - width + 1, 0) : end]
    return [token for i in range(end - start) for token in padded[i : i + width]]
