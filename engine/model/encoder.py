"""Stage 2, bytes to states, and closed patches to the global stage's input (BLT 3.2)."""

from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.dispatch import Kernels
from kernels.hash_embed import HashTables
from kernels.pooling import PageTable
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
        self.embedding = weights.tensor(f"{prefix}.embed_tokens.weight")
        tables = [weights.stored(f"model.encoder_hash_tok_embedding.{t}.weight") for t in range(hashes.num_tables)]
        self.hashes = HashTables(tables, hashes.group_sizes, hashes.num_functions, hashes.rows, weights.device)
        self.hash_itemsize = tables[0].itemsize
        self.slots = weights.matrix(f"{prefix}.patch_embedding_projection.weight")
        num_cross = encoder_cross_layers(config)
        stored = sum(
            f"{prefix}.cross_attn_layers.{i}.q_proj.weight" in weights for i in range(config.encoder.num_layers)
        )
        self.cross = [
            CrossAttention(config.encoder, weights, f"{prefix}.cross_attn_layers.{i}", kernels)
            for i in range(stored - num_cross, stored)
        ]
        layers = layers_of(config.encoder, weights, prefix)
        self.stack = kernels.stack(StackWeights(layers, cross_kv=[cross.cross_kv for cross in self.cross]))

    def __call__(
        self,
        ids: Tensor,
        at: Tensor,
        cache: KvCache,
        plan: AttentionPlan,
        open_states: Tensor,
        open_kv: KvCache,
        open_plan: AttentionPlan,
    ) -> Tensor:
        """The bytes at places `at` (R,) int64 of a text's `ids`, at the plan's positions, to byte states (R, dim).

        Also stores in the open-patch cache what a patch needs when it closes: each byte's state to pool, and its keys
        and values for the patch's queries.
        """
        x = self._kernels.hash_embed(ids, at, plan.positions, self.embedding, self.hashes)
        return self.stack(x, cache, plan, CrossCache(open_kv, open_plan.page, open_plan.offset, open_states))

    def close(
        self,
        open_states: Tensor,
        open_kv: KvCache,
        table: PageTable,
        sequence: Tensor,
        begin: Tensor,
        after: Tensor,
        plan: AttentionPlan,
    ) -> Tensor:
        """Pools closed patches: (patches, slots * dim), the global stage's input before its projection.

        table, sequence, begin, after: where their bytes lie, as `kernels.pooling.patch_max` takes it. In `plan` the
        rows are the patches' slots.
        """
        pooled = self._kernels.patch_max(open_states, table, sequence, begin, after)
        slots = self._kernels.linear(pooled, self.slots).view(-1, pooled.shape[1])
        for cross, kv in zip(self.cross, open_kv, strict=True):
            slots = cross.output(self._kernels.attention(cross.query(slots), *kv, plan), slots)
        return slots.view(len(pooled), -1)
