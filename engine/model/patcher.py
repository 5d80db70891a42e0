"""Stage 1, bytes to entropies: a small byte language model that says how uncertain the next byte is."""

import torch.nn.functional as F
from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.entropy import entropy
from kernels.linear import linear
from kernels.norm import rms_norm

from ..config import ModelConfig
from .layers import KvCache, Stack, Weights


class Patcher:
    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._eps = config.patcher.norm_eps
        self._embedding = weights["model.patcher.embed_tokens.weight"]
        self._stack = Stack(config.patcher, weights, "model.patcher")
        self._norm = weights["model.patcher.norm.weight"]
        self._head = weights["model.patcher.lm_head.weight"]

    def __call__(self, ids: Tensor, cache: KvCache, plan: AttentionPlan) -> Tensor:
        """ids (R,) to the entropy in nats of what follows each of them, (R,) float32."""
        x = self._stack(F.embedding(ids, self._embedding), cache, plan)
        return entropy(linear(rms_norm(x, self._norm, self._eps), self._head))
