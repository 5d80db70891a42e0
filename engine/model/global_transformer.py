"""Stage 3, patches to latents: the large transformer, run once per closed patch."""

from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.dispatch import Kernels
from kernels.stack import KvCache, StackWeights

from ..config import ModelConfig
from .layers import Weights, layers_of


class GlobalTransformer:
    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels) -> None:
        prefix = "model.global_transformer"
        name = f"{prefix}.token_embedding_projection.weight"
        self._kernels = kernels
        self.projection = weights.matrix(name) if config.projects_latent else None
        self.stack = kernels.stack(StackWeights(layers_of(config.global_, weights, prefix)))

    def __call__(self, patches: Tensor, cache: KvCache, plan: AttentionPlan) -> Tensor:
        """patches (P, slots * local dim) to latents (P, global dim); no final norm."""
        x = patches if self.projection is None else self._kernels.linear(patches, self.projection)
        return self.stack(x, cache, plan)
