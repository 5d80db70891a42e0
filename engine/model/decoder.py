"""Stage 4, bytes and latents to logits."""

import torch.nn.functional as F
from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.dispatch import Kernels

from ..caches import decoder_cross_layers
from ..config import ModelConfig
from .layers import CrossAttention, KvCache, Stack, Weights


class Decoder:
    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels) -> None:
        prefix = "model.local_decoder"
        self._config = config
        self._kernels = kernels
        own_table = config.decoder_input == "embedding"
        self._embedding = weights.tensor(f"{prefix}.embed_tokens.weight") if own_table else None
        self._slots = weights.matrix(f"{prefix}.patch_embedding_projection.weight")
        self._cross = [
            CrossAttention(config.decoder, weights, f"{prefix}.cross_attn_layers.{i}", kernels)
            for i in range(decoder_cross_layers(config))
        ]
        self._reading = [cross.reading(config.slots) for cross in self._cross]
        self._stack = Stack(config.decoder, weights, prefix, kernels)
        self._norm = weights.tensor(f"{prefix}.norm.weight")
        self._head = weights.matrix("lm_head.weight", exact=True)

    def write_latents(self, latents: Tensor, cache: KvCache, page: Tensor, offset: Tensor) -> None:
        """Splits latents (P, global dim) into slots and stores the K/V of every layer. page, offset (P * slots,)."""
        slots = self._kernels.linear(latents, self._slots).view(-1, self._config.decoder.dim)
        for cross, kv in zip(self._cross, cache, strict=True):
            cross.store(slots, page, offset, kv)

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
        """x (R, dim) to the last hidden states (R, dim). Row r reads the latent whose slots begin at latent_page[r],
        latent_offset[r]."""
        for i, (layer, kv) in enumerate(zip(self._stack.layers, cache, strict=True)):
            if i < len(self._reading):
                x = self._reading[i](x, latent_cache[i], latent_page, latent_offset)
            x = layer(x, kv, plan)
        return x

    def logits(self, x: Tensor) -> Tensor:
        """Last hidden states (R, dim) to logits (R, V) float32."""
        return self._kernels.linear(x, self._head, norm=self._norm, eps=self._config.decoder.norm_eps).float()
