"""The parts of the stages: weights, transformer layers, cross-attention."""

from collections.abc import Mapping

import torch
from torch import Tensor

from kernels.dispatch import Kernels
from kernels.linear import Matrix, quantize
from kernels.rope import rope_table
from kernels.stack import CrossKvWeights, LayerWeights, SlotsWeights

from ..checkpoint.base import require_finite
from ..checkpoint.names import DECODER, ENCODER, GLOBAL, HASHES, PATCHER
from ..config import StackConfig
from .progress import Progress

STAGES = {PATCHER: "patcher", ENCODER: "encoder", GLOBAL: "global", DECODER: "decoder"}
"""By the names of their tensors."""


def matrix_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype, kernels: Kernels) -> torch.dtype:
    """The dtype of large matrices in memory. Kernels that widen bfloat16 to float32 as they read lose nothing if all
    stored tensors are bfloat16."""
    stored = {tensor.dtype for name, tensor in tensors.items() if not name.startswith(HASHES)}
    return torch.bfloat16 if kernels.widens and stored == {torch.bfloat16} else dtype


class Weights:
    """A checkpoint's tensors as the stages use them: on the device, and matrices with the same input joined. Whatever
    is read must be finite: hash tables that stay in their file are not."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        *,
        fp8: bool = False,
    ) -> None:
        self._tensors = tensors
        self._dtype, self.device = dtype, device
        self._kernels, self._fp8 = kernels, fp8
        self.matrix_dtype = matrix_dtype(tensors, dtype, kernels)
        self.linear_shapes: set[tuple[int, int]] = set()
        """(out, in) of every matrix returned so far."""
        self._hash_dtypes = {tensor.dtype for name, tensor in tensors.items() if name.startswith(HASHES)}
        read = sum(t.nbytes for name, t in tensors.items() if device.type != "cpu" or not name.startswith(HASHES))
        self._progress = Progress(read)
        self.positions: dict[str, int] = {}
        """Of every stage whose layers were made: rows of its rotary table."""

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def _read(self, name: str) -> Tensor:
        """Raises NotFinite. What is copied next is then still in the processor's cache, or at least in memory."""
        tensor = self._tensors[name]
        self._progress.advance(tensor.nbytes)
        require_finite(name, tensor)
        return tensor

    def tensor(self, name: str) -> Tensor:
        """A norm or an embedding table. Not copied if its device and dtype are right."""
        return self._read(name).to(self.device, self._dtype)

    def stored(self, name: str) -> Tensor:
        """A hash table, of which a byte reads one row. On a CPU it stays in its file, in the stored dtype. A GPU has it
        in its own memory, no wider than the model's dtype, to which its rows would be rounded anyway, and all tables in
        one dtype."""
        if self.device.type == "cpu":
            return self._tensors[name]
        tensor = self._read(name)
        as_it_is = len(self._hash_dtypes) == 1 and tensor.itemsize <= self._dtype.itemsize
        return tensor.to(self.device, tensor.dtype if as_it_is else self._dtype)

    def matrix(self, *names: str, exact: bool = False) -> Matrix:
        """The matrices (out, in) of these names, concatenated along `out`. exact: never as float8."""
        parts = [self._read(name).to(self.device, self.matrix_dtype) for name in names]
        self.linear_shapes.add((sum(len(part) for part in parts), parts[0].shape[1]))
        if self._fp8 and not exact:
            return self._kernels.matrix(quantize(torch.cat(parts)))
        return self._kernels.join(parts)


def layers_of(config: StackConfig, weights: Weights, prefix: str, *, exact: bool = False) -> list[LayerWeights]:
    """A stack's layers."""
    rope = rope_table(config.head_dim, config.rope_theta, config.max_positions, weights.device)
    weights.positions[STAGES[prefix]] = len(rope)

    def layer(prefix: str) -> LayerWeights:
        return LayerWeights(
            attention_norm=weights.tensor(f"{prefix}.input_layernorm.weight"),
            qkv=weights.matrix(*(f"{prefix}.self_attn.{x}_proj.weight" for x in "qkv"), exact=exact),
            o=weights.matrix(f"{prefix}.self_attn.o_proj.weight", exact=exact),
            ffn_norm=weights.tensor(f"{prefix}.post_attention_layernorm.weight"),
            gate_up=weights.matrix(*(f"{prefix}.mlp.{x}_proj.weight" for x in ("gate", "up")), exact=exact),
            down=weights.matrix(f"{prefix}.mlp.down_proj.weight", exact=exact),
            rope=rope,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            eps=config.norm_eps,
        )

    return [layer(f"{prefix}.layers.{i}") for i in range(config.num_layers)]


class CrossAttention:
    """Weights of one cross-attention: queries and keys/values are normed separately, without positions or mask.

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
        self._config = config

    @property
    def cross_kv(self) -> CrossKvWeights:
        """The weights that make keys and values."""
        return CrossKvWeights(self._kv_norm, self._kv, self._config.head_dim, self._eps)

    def slots(self, count: int) -> SlotsWeights:
        """The weights for `query`, attention over one latent's slots, and `output`, in one call."""
        of = self._config
        return SlotsWeights(
            self._q_norm, self._q, self._o, of.num_heads, of.num_kv_heads, of.head_dim, self._eps, count
        )

    def query(self, x: Tensor) -> Tensor:
        """(R, dim) to (R, heads, head_dim)."""
        return self._kernels.linear(x, self._q, norm=self._q_norm, eps=self._eps).unflatten(1, self._heads)

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        """The heads' results (R, heads, head_dim), and the input x (R, dim), to the output (R, dim)."""
        return self._kernels.linear(attended.flatten(1), self._o, residual=x, twice=True)
