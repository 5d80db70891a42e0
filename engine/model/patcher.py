"""Stage 1, bytes to entropies: a small byte language model that says how uncertain the next byte is."""

import torch.nn.functional as F
from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.dispatch import Kernels

from ..config import ModelConfig
from .layers import KvCache, Stack, Weights


class Patcher:
    """Its weights are never rounded further than the model's dtype: a boundary decides about all that follows."""

    def __init__(self, config: ModelConfig, weights: Weights, kernels: Kernels) -> None:
        self._kernels = kernels
        self._eps = config.patcher.norm_eps
        self._embedding = weights.tensor("model.patcher.embed_tokens.weight")
        self._stack = Stack(config.patcher, weights, "model.patcher", kernels, exact=True)
        self._norm = weights.tensor("model.patcher.norm.weight")
        self._head = weights.matrix("model.patcher.lm_head.weight", exact=True)

    def __call__(self, ids: Tensor, cache: KvCache, plan: AttentionPlan) -> Tensor:
        """ids (R,) to the entropy in nats of what follows each of them, (R,) float32."""
        x = self._stack(F.embedding(ids, self._embedding), cache, plan)
        return self._kernels.entropy(self._kernels.linear(x, self._head, norm=self._norm, eps=self._eps))
