"""The parts that the stages are made of: their weights, transformer layers, cross-attention, stacks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.attention import AttentionPlan
from kernels.dispatch import Kernels
from kernels.linear import Matrix, quantize
from kernels.rope import rope_table

from ..config import StackConfig

KvCache = list[tuple[Tensor, Tensor]]
"""Per layer, K and V in pages: (pages, kv_heads, page_size, head_dim)."""


class Weights:
    """A checkpoint's tensors as the stages take them: on their device, and matrices of one input joined into one."""

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device, *, fp8: bool = False
    ) -> None:
        self._tensors = tensors
        self._dtype, self.device = dtype, device
        self._fp8 = fp8
        self.linear_shapes: set[tuple[int, int]] = set()
        """(out, in) of every matrix that was handed out."""

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """A norm or an embedding table. Not copied if it is as it should be."""
        return self._tensors[name].to(self.device, self._dtype)

    def stored(self, name: str) -> Tensor:
        """As and where it is stored, unless a GPU must reach it: a byte reads one row of a hash table."""
        tensor = self._tensors[name]
        return tensor if self.device.type == "cpu" else tensor.to(self.device)

    def matrix(self, *names: str, exact: bool = False) -> Matrix:
        """The matrices (out, in) of these names, laid on top of each other. exact: never as float8."""
        parts = [self.tensor(name) for name in names]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        self.linear_shapes.add((joined.shape[0], joined.shape[1]))
        return quantize(joined) if self._fp8 and not exact else Matrix(joined)


class Layer:
    """A pre-norm layer: self-attention with rotary positions, then SwiGLU, each with a residual."""

    def __init__(self, config: StackConfig, weights: Weights, prefix: str, kernels: Kernels, *, exact: bool) -> None:
        self._config = config
        self._kernels = kernels
        self._attention_norm = weights.tensor(f"{prefix}.input_layernorm.weight")
        self._qkv = weights.matrix(*(f"{prefix}.self_attn.{x}_proj.weight" for x in "qkv"), exact=exact)
        self._o = weights.matrix(f"{prefix}.self_attn.o_proj.weight", exact=exact)
        self._ffn_norm = weights.tensor(f"{prefix}.post_attention_layernorm.weight")
        self._gate_up = weights.matrix(*(f"{prefix}.mlp.{x}_proj.weight" for x in ("gate", "up")), exact=exact)
        self._down = weights.matrix(f"{prefix}.mlp.down_proj.weight", exact=exact)

    def __call__(self, x: Tensor, rope: Tensor, cache: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        """x (R, dim) in and out; the rows' K/V go to `cache` first, so that rows of one call see each other."""
        k, eps = self._kernels, self._config.norm_eps
        qkv = k.linear(x, self._qkv, norm=self._attention_norm, eps=eps).unflatten(1, (-1, self._config.head_dim))
        q = k.store_qkv(qkv, rope, plan.positions, plan.page, plan.offset, *cache)
        x = k.linear(k.attention(q, *cache, plan).flatten(1), self._o, residual=x)
        gated = k.linear(x, self._gate_up, norm=self._ffn_norm, eps=eps, gated=True)
        return k.linear(gated, self._down, residual=x)


class Stack:
    """Layers in a row with their rotary table."""

    def __init__(
        self, config: StackConfig, weights: Weights, prefix: str, kernels: Kernels, *, exact: bool = False
    ) -> None:
        self.layers = [
            Layer(config, weights, f"{prefix}.layers.{i}", kernels, exact=exact) for i in range(config.num_layers)
        ]
        self.rope = rope_table(config.head_dim, config.rope_theta, config.max_positions, weights.device)

    def __call__(self, x: Tensor, cache: KvCache, plan: AttentionPlan) -> Tensor:
        for layer, kv in zip(self.layers, cache, strict=True):
            x = layer(x, self.rope, kv, plan)
        return x


class CrossAttention:
    """Weights of one cross-attention: queries and keys/values are normed apart, without positions or mask.

    Released models carry a double residual, x + (x + Wo attn).
    """

    def __init__(self, config: StackConfig, weights: Weights, prefix: str, kernels: Kernels) -> None:
        self._heads = (-1, config.head_dim)
        self._eps = config.norm_eps
        self._kernels = kernels
        self._q_norm = weights.tensor(f"{prefix}.q_norm.weight")
        self._kv_norm = weights.tensor(f"{prefix}.k_norm.weight")
        self._q = weights.matrix(f"{prefix}.q_proj.weight")
        self._kv = weights.matrix(f"{prefix}.k_proj.weight", f"{prefix}.v_proj.weight")
        self._o = weights.matrix(f"{prefix}.o_proj.weight")

    def query(self, x: Tensor) -> Tensor:
        """(R, dim) to (R, heads, head_dim)."""
        return self._kernels.linear(x, self._q, norm=self._q_norm, eps=self._eps).unflatten(1, self._heads)

    def store(self, x: Tensor, page: Tensor, offset: Tensor, cache: tuple[Tensor, Tensor]) -> None:
        """Stores the keys and values of x (R, dim)."""
        kv = self._kernels.linear(x, self._kv, norm=self._kv_norm, eps=self._eps).unflatten(1, self._heads)
        self._kernels.store_kv(kv, page, offset, *cache)

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        """What the heads saw (R, heads, head_dim), and the input x (R, dim), to the output (R, dim)."""
        return self._kernels.linear(attended.flatten(1), self._o, residual=x, twice=True)
