"""The one place where it is decided who computes: torch or Triton. All else calls `Kernels` and does not know."""

from typing import Literal

import torch

from . import (
    attention,
    boundary,
    cross_attention,
    entropy,
    hash_embed,
    lang,
    linear,
    pooling,
    sampling,
    store,
    unmasking,
)

KernelName = Literal["torch", "triton"]


class Kernels:
    """The torch twins. They run on every device and say what each operation means."""

    name: KernelName = "torch"
    tile: int | None = None
    """Most rows in a tile of attention; None leaves it to the machine's row floor."""

    linear = staticmethod(linear.linear)
    attention = staticmethod(attention.attention)
    store_qkv = staticmethod(store.store_qkv)
    store_kv = staticmethod(store.store_kv)
    store_states = staticmethod(store.store_states)
    slot_attention = staticmethod(cross_attention.slot_attention)
    hash_embed = staticmethod(hash_embed.hash_embed)
    patch_max = staticmethod(pooling.patch_max)
    entropy = staticmethod(entropy.entropy)
    boundaries = staticmethod(boundary.boundaries)
    certainty = staticmethod(unmasking.certainty)
    unmask = staticmethod(unmasking.unmask)
    sample = staticmethod(sampling.sample)
    accepted = staticmethod(sampling.accepted)


class TritonKernels(Kernels):
    """The Triton kernels, on a CUDA device or in Triton's interpreter."""

    name: KernelName = "triton"
    tile: int | None = attention.TILE

    linear = staticmethod(linear.linear_triton)
    attention = staticmethod(attention.attention_triton)
    store_qkv = staticmethod(store.store_qkv_triton)
    store_kv = staticmethod(store.store_kv_triton)
    store_states = staticmethod(store.store_states_triton)
    slot_attention = staticmethod(cross_attention.slot_attention_triton)
    hash_embed = staticmethod(hash_embed.hash_embed_triton)
    patch_max = staticmethod(pooling.patch_max_triton)
    entropy = staticmethod(entropy.entropy_triton)
    boundaries = staticmethod(boundary.boundaries_triton)
    certainty = staticmethod(unmasking.certainty_triton)
    unmask = staticmethod(unmasking.unmask_triton)
    sample = staticmethod(sampling.sample_triton)
    accepted = staticmethod(sampling.accepted_triton)


def choose_kernels(name: KernelName | None, device: torch.device) -> Kernels:
    """The kernels of that name; None takes Triton's on a CUDA device and torch's elsewhere.

    Raises ValueError where Triton's cannot run.
    """
    if name is None:
        name = "triton" if device.type == "cuda" and lang.AVAILABLE else "torch"
    if name == "torch":
        return Kernels()
    if not lang.AVAILABLE:
        raise ValueError("kernels 'triton' need the package triton, which is not installed")
    if device.type != "cuda" and not lang.IN_INTERPRETER:
        raise ValueError(
            f"kernels 'triton' need a CUDA device, not {device.type!r}; TRITON_INTERPRET=1 runs them slowly on the CPU"
        )
    return TritonKernels()
