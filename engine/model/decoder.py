"""Stage 4, bytes and latents to logits."""

import torch.nn.functional as F
from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.cross_attention import slot_attention
from kernels.linear import linear
from kernels.norm import rms_norm

from ..caches import decoder_cross_layers
from ..config import ModelConfig
from .layers import CrossAttention, KvCache, Stack, Weights


class Decoder:
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        prefix = "model.local_decoder"
        self._config = config
        own_table = config.decoder_input == "embedding"
        self._embedding = weights[f"{prefix}.embed_tokens.weight"] if own_table else None
        self._slots = weights[f"{prefix}.patch_embedding_projection.weight"]
        self._cross = [
            CrossAttention(config.decoder, weights, f"{prefix}.cross_attn_layers.{i}")
            for i in range(decoder_cross_layers(config))
        ]
        self._stack = Stack(config.decoder, weights, prefix)
        self._norm = weights[f"{prefix}.norm.weight"]
        self._head = weights["lm_head.weight"]

    def write_latents(self, latents: Tensor, cache: KvCache, page: Tensor, offset: Tensor) -> None:
        """Splits latents (P, global dim) into slots and stores their K/V of every layer at (page, offset)."""
        dim = self._config.decoder.dim
        slots = linear(latents, self._slots).reshape(-1, dim)
        for cross, (k_cache, v_cache) in zip(self._cross, cache, strict=True):
            k, v = cross.key_value(slots)
            k_cache[page, offset] = k.unflatten(0, (-1, self._config.slots))
            v_cache[page, offset] = v.unflatten(0, (-1, self._config.slots))

    def embed(self, ids: Tensor) -> Tensor:
        """What the first layer reads for ids (R,), [MASK] among them: (R, dim). Only with a table of its own."""
        assert self._embedding is not None
        return F.embedding(ids, self._embedding)

    def __call__(
        self,
        x: Tensor,
        latent_cache: KvCache,
        latent_page: Tensor,
        latent_offset: Tensor,
        cache: KvCache,
        plan: AttentionPlan,
    ) -> Tensor:
        """x (R, dim) to the last hidden states (R, dim). Row r reads the latent at latent_page[r], latent_offset[r]."""
        angles = self._stack.rope.index_select(0, plan.positions)
        for i, (layer, kv) in enumerate(zip(self._stack.layers, cache, strict=True)):
            if i < len(self._cross):
                k_slots, v_slots = (c[latent_page, latent_offset] for c in latent_cache[i])
                cross = self._cross[i]
                x = x + (x + cross.output(slot_attention(cross.query(x), k_slots, v_slots)))
            x = layer(x, angles, kv, plan)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Last hidden states (R, dim) to logits (R, V) float32."""
        return linear(rms_norm(x, self._norm, self._config.decoder.norm_eps), self._head).float()
