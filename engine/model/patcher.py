"""Stage 1, bytes to entropies: a small byte language model that predicts how uncertain the next byte is."""

from dataclasses import replace

from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.dispatch import Kernels
from kernels.embedding import Ids
from kernels.stack import HeadWeights, KvCache, StackWeights

from ..config import ModelConfig
from .layers import Weights, layers_of


class Patcher:
    """Its weights are never rounded further than the model's dtype: a boundary affects all that follows."""

    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels) -> None:
        self._kernels = kernels
        stack = replace(config.patcher, max_positions=config.patcher_positions)
        self.stack = kernels.stack(
            StackWeights(
                layers_of(stack, weights, "model.patcher", exact=True),
                embedding=weights.tensor("model.patcher.embed_tokens.weight"),
                head=HeadWeights(
                    weights.tensor("model.patcher.norm.weight"),
                    weights.matrix("model.patcher.lm_head.weight", exact=True),
                    config.patcher.norm_eps,
                ),
            )
        )

    def __call__(self, ids: Ids, cache: KvCache, plan: AttentionPlan) -> Tensor:
        """R bytes to the entropy in nats after each of them, (R,) float32."""
        return self._kernels.entropy(self.stack(ids, cache, plan))
