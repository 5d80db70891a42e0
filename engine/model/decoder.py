"""Stage 4, bytes and latents to logits."""

from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.dispatch import Kernels
from kernels.embedding import Ids
from kernels.stack import CrossCache, HeadWeights, KvCache, StackWeights

from ..config import ModelConfig
from ..memory.caches import decoder_cross_layers
from .layers import CrossAttention, Weights, layers_of


class Decoder:
    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels) -> None:
        prefix = "model.local_decoder"
        self._config = config
        self._kernels = kernels
        own_table = config.decoder_input == "embedding"
        self.slots = weights.matrix(f"{prefix}.patch_embedding_projection.weight")
        cross = [
            CrossAttention(config.decoder, weights, f"{prefix}.cross_attn_layers.{i}", kernels)
            for i in range(decoder_cross_layers(config))
        ]
        self.cross_kv = kernels.cross_kv([c.cross_kv for c in cross])
        self.stack = kernels.stack(
            StackWeights(
                layers_of(config.decoder, weights, prefix),
                embedding=weights.tensor(f"{prefix}.embed_tokens.weight") if own_table else None,
                slots=[c.slots(config.slots) for c in cross],
                head=HeadWeights(
                    weights.tensor(f"{prefix}.norm.weight"),
                    weights.matrix("lm_head.weight", exact=True),
                    config.decoder.norm_eps,
                ),
            )
        )

    def write_latents(self, latents: Tensor, cache: KvCache, page: Tensor, offset: Tensor) -> None:
        """Splits latents (P, global dim) into slots and stores the K/V of every layer. page, offset (P * slots,)."""
        slots = self._kernels.linear(latents, self.slots).view(-1, self._config.decoder.dim)
        self.cross_kv(slots, cache, page, offset)

    def __call__(
        self, x: Tensor | Ids, latents: KvCache, page: Tensor, offset: Tensor, cache: KvCache, plan: AttentionPlan,
        logit_rows: Tensor,
    ) -> Tensor:  # fmt: skip
        """x to the logits (W, V) float32 of the rows `logit_rows` (W,); if there are none the output has no meaning.

        x: R bytes, [MASK] among them, if the decoder has a table of its own, else states (R, dim). Row r reads the
        latent whose slots begin at page[r], offset[r].
        """
        return self.stack(x, cache, plan, CrossCache(latents, page, offset), logit_rows).float()
