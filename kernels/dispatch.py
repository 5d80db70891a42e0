"""The only place that chooses the backend: torch, Triton or our own C. All other code calls `Kernels`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import (
    attention,
    available,
    boundary,
    closing,
    cross_attention,
    embedding,
    entropy,
    hash_embed,
    keys_values,
    lang,
    latents,
    linear,
    native,
    planning,
    pooling,
    qkv,
    sampling,
    unmasking,
)
from .available import KernelName
from .linear import Matrix
from .stack import CrossKvFunction, CrossKvWeights, StackFunction, StackWeights, composed_cross_kv, composed_stack
from .unmasking import Blocks, composed_settle

plan = native.plan if native.LIBRARY else planning.plan
"""See `kernels.planning`: always on the host."""


class Kernels:
    """The torch twins. They run on every device and define each operation."""

    name: KernelName = "torch"
    tile: int | None = None
    """Most rows in a tile of attention. None: in a small one the machine's row floor, in a large one
    `attention.LARGE_TILE`."""
    widens = False
    """Whether `linear` takes bfloat16 matrices for float32 rows."""
    gates = False
    """Whether kernels ask their gate; otherwise the host must (`kernels.gate`)."""
    records = False
    """Whether a CUDA graph may record them: the host never waits for the device in between."""

    linear = staticmethod(linear.linear)
    attention = staticmethod(attention.attention)
    qkv = staticmethod(qkv.qkv)
    keys_values = staticmethod(keys_values.keys_values)
    read_slots = staticmethod(cross_attention.read_slots)
    embed = staticmethod(embedding.embed)
    hash_embed = staticmethod(hash_embed.hash_embed)
    patch_max = staticmethod(pooling.patch_max)
    entropy = staticmethod(entropy.entropy)
    boundaries = staticmethod(boundary.boundaries)
    closing = staticmethod(closing.closing)
    latent_places = staticmethod(latents.latent_places)
    confidence_and_entropy = staticmethod(unmasking.confidence_and_entropy)
    unmask = staticmethod(unmasking.unmask)
    argmax = staticmethod(sampling.argmax)
    sample = staticmethod(sampling.sample)
    accepted = staticmethod(sampling.accepted)

    def matrix(self, matrix: Matrix) -> Matrix:
        """Converts a matrix to the form that `linear`, `stack` and `cross_kv` take."""
        return matrix

    def join(self, parts: Sequence[Tensor]) -> Matrix:
        """Stacks matrices of one dtype and input along their outputs, in the form of `matrix`."""
        return Matrix(parts[0] if len(parts) == 1 else torch.cat(list(parts)))

    def settle(
        self, cells: Tensor, text_ids: Tensor, logits: Tensor, drawn: Tensor, blocks: Blocks, number: int, mask: int
    ) -> None:
        """See `kernels.unmasking.composed_settle`."""
        composed_settle(self, cells, text_ids, logits, drawn, blocks, number, mask)

    def stack(self, weights: StackWeights) -> StackFunction:
        """Builds a stack of transformer layers."""
        return composed_stack(self, weights)

    def cross_kv(self, weights: Sequence[CrossKvWeights]) -> CrossKvFunction:
        """Builds the function that stores rows as keys and values of several cross-attentions."""
        return composed_cross_kv(self, weights)


class TritonKernels(Kernels):
    """The Triton kernels, on a CUDA device or in Triton's interpreter."""

    name: KernelName = "triton"
    tile: int | None = attention.TILE
    gates = True
    records = True

    linear = staticmethod(linear.linear_triton)
    attention = staticmethod(attention.attention_triton)
    qkv = staticmethod(qkv.qkv_triton)
    keys_values = staticmethod(keys_values.keys_values_triton)
    read_slots = staticmethod(cross_attention.read_slots_triton)
    embed = staticmethod(embedding.embed_triton)
    hash_embed = staticmethod(hash_embed.hash_embed_triton)
    patch_max = staticmethod(pooling.patch_max_triton)
    entropy = staticmethod(entropy.entropy_triton)
    boundaries = staticmethod(boundary.boundaries_triton)
    closing = staticmethod(closing.closing_triton)
    latent_places = staticmethod(latents.latent_places_triton)
    argmax = staticmethod(sampling.argmax_triton)
    sample = staticmethod(sampling.sample_triton)
    accepted = staticmethod(sampling.accepted_triton)

    def settle(
        self, cells: Tensor, text_ids: Tensor, logits: Tensor, drawn: Tensor, blocks: Blocks, number: int, mask: int
    ) -> None:
        unmasking.settle_triton(cells, text_ids, logits, drawn, blocks, number, mask)

    def cross_kv(self, weights: Sequence[CrossKvWeights]) -> CrossKvFunction:
        return keys_values.CrossKvTriton(weights)


class NativeKernels(Kernels):
    """Our own C on a CPU."""

    name: KernelName = "native"
    tile: int | None = attention.TILE
    widens = True

    linear = staticmethod(native.linear)
    attention = staticmethod(native.attention)
    hash_embed = staticmethod(native.hash_embed)
    entropy = staticmethod(native.entropy)
    patch_max = staticmethod(native.patch_max)
    boundaries = staticmethod(native.boundaries)
    confidence_and_entropy = staticmethod(native.confidence_and_entropy)
    unmask = staticmethod(native.unmask)
    argmax = staticmethod(native.argmax)
    sample = staticmethod(native.sample)
    accepted = staticmethod(native.accepted)

    def matrix(self, matrix: Matrix) -> Matrix:
        return native.pack(matrix)

    def join(self, parts: Sequence[Tensor]) -> Matrix:
        return native.join(parts)

    def stack(self, weights: StackWeights) -> StackFunction:
        return native.Stack(weights)

    def cross_kv(self, weights: Sequence[CrossKvWeights]) -> CrossKvFunction:
        return native.CrossKv(weights)


def choose_kernels(name: KernelName | None, device: torch.device) -> Kernels:
    """The kernels of that name; None takes Triton's on a CUDA device and our own on a CPU, or torch's if these are
    missing. Raises ValueError if the named ones cannot run.
    """
    if name is None:
        name = available.preferred(device.type, native.LIBRARY is not None, lang.AVAILABLE)
    if name == "torch":
        return Kernels()
    if name == "native":
        if device.type != "cpu":
            raise ValueError(f"kernels 'native' run on the CPU, not on {device.type!r}")
        if not native.LIBRARY:
            raise ValueError("kernels 'native' were not compiled when fastblt was installed; 'torch' needs no compiler")
        return NativeKernels()
    if not lang.AVAILABLE:
        raise ValueError("kernels 'triton' need the package triton, which is not installed")
    if device.type != "cuda" and not lang.IN_INTERPRETER:
        raise ValueError(
            f"kernels 'triton' need a CUDA device, not {device.type!r}; TRITON_INTERPRET=1 runs them slowly on the CPU"
        )
    return TritonKernels()
