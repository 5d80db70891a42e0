"""The parts that the stages are made of: transformer layers, cross-attention weights, stacks."""

from collections.abc import Mapping

from torch import Tensor

from kernels.attention import AttentionPlan, attention, write_kv
from kernels.linear import linear
from kernels.norm import rms_norm
from kernels.rope import apply_rope, rope_table
from kernels.swiglu import swiglu

from ..config import StackConfig

Weights = Mapping[str, Tensor]
KvCache = list[tuple[Tensor, Tensor]]
"""Per layer, K and V in pages: (pages, kv_heads, page_size, head_dim)."""


class Layer:
    """A pre-norm layer: self-attention with rotary positions, then SwiGLU, each with a residual."""

    def __init__(self, config: StackConfig, weights: Weights, prefix: str) -> None:
        self._config = config
        self._attention_norm = weights[f"{prefix}.input_layernorm.weight"]
        self._q = weights[f"{prefix}.self_attn.q_proj.weight"]
        self._k = weights[f"{prefix}.self_attn.k_proj.weight"]
        self._v = weights[f"{prefix}.self_attn.v_proj.weight"]
        self._o = weights[f"{prefix}.self_attn.o_proj.weight"]
        self._ffn_norm = weights[f"{prefix}.post_attention_layernorm.weight"]
        self._gate = weights[f"{prefix}.mlp.gate_proj.weight"]
        self._up = weights[f"{prefix}.mlp.up_proj.weight"]
        self._down = weights[f"{prefix}.mlp.down_proj.weight"]

    def __call__(self, x: Tensor, angles: Tensor, cache: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        """x (R, dim) in and out; the rows' K/V go to `cache` first, so that rows of one call see each other."""
        config = self._config
        heads = (-1, config.head_dim)
        n = rms_norm(x, self._attention_norm, config.norm_eps)
        q = apply_rope(linear(n, self._q).unflatten(1, heads), angles)
        k = apply_rope(linear(n, self._k).unflatten(1, heads), angles)
        v = linear(n, self._v).unflatten(1, heads)
        write_kv(k, v, *cache, plan)
        x = x + linear(attention(q, *cache, plan).flatten(1), self._o)
        m = rms_norm(x, self._ffn_norm, config.norm_eps)
        return x + linear(swiglu(linear(m, self._gate), linear(m, self._up)), self._down)


class Stack:
    """Layers in a row with their rotary table."""

    def __init__(self, config: StackConfig, weights: Weights, prefix: str) -> None:
        self.layers = [Layer(config, weights, f"{prefix}.layers.{i}") for i in range(config.num_layers)]
        device = weights[f"{prefix}.layers.0.input_layernorm.weight"].device
        self.rope = rope_table(config.head_dim, config.rope_theta, config.max_positions, device)

    def __call__(self, x: Tensor, cache: KvCache, plan: AttentionPlan) -> Tensor:
        angles = self.rope.index_select(0, plan.positions)
        for layer, kv in zip(self.layers, cache, strict=True):
            x = layer(x, angles, kv, plan)
        return x


class CrossAttention:
    """Weights of one cross-attention: queries and keys/values are normed apart, without positions or mask.

    The caller adds the input a second time: released models carry a double residual, x + (x + Wo attn).
    """

    def __init__(self, config: StackConfig, weights: Weights, prefix: str) -> None:
        self._heads = (-1, config.head_dim)
        self._eps = config.norm_eps
        self._q_norm = weights[f"{prefix}.q_norm.weight"]
        self._kv_norm = weights[f"{prefix}.k_norm.weight"]
        self._q = weights[f"{prefix}.q_proj.weight"]
        self._k = weights[f"{prefix}.k_proj.weight"]
        self._v = weights[f"{prefix}.v_proj.weight"]
        self._o = weights[f"{prefix}.o_proj.weight"]

    def query(self, x: Tensor) -> Tensor:
        """(R, dim) to (R, heads, head_dim)."""
        return linear(rms_norm(x, self._q_norm, self._eps), self._q).unflatten(1, self._heads)

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(R, dim) to K and V, (R, kv_heads, head_dim) each."""
        n = rms_norm(x, self._kv_norm, self._eps)
        return linear(n, self._k).unflatten(1, self._heads), linear(n, self._v).unflatten(1, self._heads)

    def output(self, attended: Tensor) -> Tensor:
        """(R, heads, head_dim) to (R, dim)."""
        return linear(attended.flatten(1), self._o)
