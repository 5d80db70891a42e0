"""Stage 3, patches to latents: the large transformer, run once per closed patch."""

from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.linear import linear

from ..config import ModelConfig
from .layers import KvCache, Stack, Weights


class GlobalTransformer:
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        prefix = "model.global_transformer"
        self._projection = weights[f"{prefix}.token_embedding_projection.weight"] if config.projects_latent else None
        self._stack = Stack(config.global_, weights, prefix)

    def __call__(self, patches: Tensor, cache: KvCache, plan: AttentionPlan) -> Tensor:
        """patches (P, slots * local dim) to latents (P, global dim); no final norm."""
        x = patches if self._projection is None else linear(patches, self._projection)
        return self._stack(x, cache, plan)
