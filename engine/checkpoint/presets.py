"""Random models: shapes to try and test the engine with, and weights that behave like trained ones."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from hashlib import blake2b
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import BOS_ID, BYTE_OFFSET, HashConfig, ModelConfig, PatchingRule, StackConfig
from ..thresholds import Thresholds
from .names import HASHES, PATCHER, Shape, expected_shapes

PATCHER_HEAD_GAIN = 2.0
"""Spreads the entropies of random patchers over roughly 2 to 5.4 nats."""
MEAN_PATCH = 4.0
CALIBRATION_BYTES = 512

RELEASED_HASHES = HashConfig((3, 4, 5, 6, 7, 8), 1, 500002)
RELEASED_PATCHER = StackConfig(768, 14, 12, 12, 2048, 10000.0, 8192, 512)


def _local(dim: int, layers: int, heads: int, ffn_dim: int) -> StackConfig:
    return StackConfig(dim, layers, heads, heads, ffn_dim, 500000.0, 24576, 512)


PRESETS: dict[str, ModelConfig] = {
    preset.name: preset
    for preset in (
        ModelConfig(
            name="tiny",
            vocab_size=260,
            slots=2,
            encoder=StackConfig(32, 1, 4, 4, 96, 500000.0, 4096, 64),
            global_=StackConfig(64, 2, 4, 4, 192, 500000.0, 2048),
            decoder=StackConfig(32, 2, 4, 4, 96, 500000.0, 4096, 64),
            patcher=StackConfig(32, 2, 4, 4, 96, 10000.0, 4096, 64),
            hashes=HashConfig((3, 5), 1, 251),
            patching=PatchingRule(max_patch_length=8),
            decoder_input="embedding",
            mask_id=260,
            block_size=8,
        ),
        ModelConfig(
            name="nano",
            vocab_size=260,
            slots=2,
            encoder=StackConfig(128, 1, 2, 2, 384, 500000.0, 24576, 512),
            global_=StackConfig(256, 5, 4, 4, 768, 500000.0, 8192),
            decoder=StackConfig(128, 4, 2, 2, 384, 500000.0, 24576, 512),
            patcher=StackConfig(128, 2, 2, 2, 384, 10000.0, 24576, 128),
            hashes=HashConfig((3, 4, 5, 6), 1, 8192),
            patching=PatchingRule(max_patch_length=8),
            decoder_input="embedding",
            isolate_documents=True,
            mask_id=260,
            block_size=8,
        ),
        ModelConfig(
            name="1b",
            vocab_size=260,
            slots=2,
            encoder=_local(1024, 1, 16, 2816),
            global_=StackConfig(2048, 25, 16, 16, 5632, 500000.0, 4096),
            decoder=_local(1024, 9, 16, 2816),
            patcher=RELEASED_PATCHER,
            hashes=RELEASED_HASHES,
            patching=PatchingRule(),
        ),
        ModelConfig(
            name="3b",
            vocab_size=260,
            slots=2,
            encoder=_local(1024, 1, 16, 2816),
            global_=StackConfig(3072, 28, 24, 8, 8192, 500000.0, 4096),
            decoder=_local(1024, 9, 16, 2816),
            patcher=RELEASED_PATCHER,
            hashes=RELEASED_HASHES,
            patching=PatchingRule(max_patch_length=8),
            decoder_input="embedding",
            mask_id=260,
            block_size=8,
        ),
        ModelConfig(
            name="7b",
            vocab_size=260,
            slots=4,
            encoder=_local(1280, 1, 20, 3584),
            global_=StackConfig(4096, 32, 32, 32, 11008, 500000.0, 4096),
            decoder=_local(1280, 6, 20, 3584),
            patcher=RELEASED_PATCHER,
            hashes=RELEASED_HASHES,
            patching=PatchingRule(),
        ),
    )
}
"""Shapes by name: "1b" and "7b" as released (the latter by the paper's table 10), "3b" as Fast-BLT's."""


class RandomTensors(Mapping[str, Tensor]):
    """Random weights, drawn when they are looked up: a large model is never in memory as a whole.

    A tensor depends on the seed and its name alone. Scales keep activations of order 1, so that logits have a standard
    deviation of about 1 and greedy text varies.
    """

    def __init__(self, config: ModelConfig, seed: int, dtype: torch.dtype) -> None:
        self._shapes = expected_shapes(config)
        self._num_tables = config.hashes.num_tables
        self._seed, self._dtype = seed, dtype

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=self._dtype)
        digest = blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.empty(shape, dtype=self._dtype).normal_(0, self._scale(name, shape), generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _scale(self, name: str, shape: Shape) -> float:
        if name.startswith(HASHES):
            return float((2 * self._num_tables) ** -0.5)
        if name.endswith("embed_tokens.weight"):
            return 1.0
        return float(shape[1] ** -0.5) * (PATCHER_HEAD_GAIN if name == f"{PATCHER}.lm_head.weight" else 1.0)


def random_tensors(config: ModelConfig, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of a model under canonical names, the same for the same seed."""
    return dict(RandomTensors(config, seed, dtype))


def calibrate(config: ModelConfig, tensors: Mapping[str, Tensor]) -> float:
    """A threshold (nats) at which patches of pseudo-text are MEAN_PATCH bytes long on average.

    Only the patcher's tensors are looked up.
    """
    draw = Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(200)]
    text = " ".join(draw.choices(words, k=CALIBRATION_BYTES)).encode()[: CALIBRATION_BYTES - 1]
    ids = torch.tensor([BOS_ID, *(byte + BYTE_OFFSET for byte in text)])
    entropies = _entropies(config.patcher, tensors, ids)
    return Thresholds(config.patching, [entropies.numpy()]).nearest(MEAN_PATCH).threshold


def calibrated(config: ModelConfig, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """The configuration with a threshold that suits `tensors`; unchanged if each byte is a patch."""
    if config.patching.mode == "bytes":
        return config
    return replace(config, patching=replace(config.patching, threshold=calibrate(config, tensors)))


def _entropies(stack: StackConfig, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Entropy in nats after each of ids (N,), by a plain forward pass without caches."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, tensors[f"{PATCHER}.{name}.weight"].float())

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (stack.dim,), tensors[f"{PATCHER}.{name}.weight"].float(), stack.norm_eps)

    def heads(x: Tensor, count: int) -> Tensor:
        return x.view(len(ids), count, stack.head_dim).transpose(0, 1)

    positions = torch.arange(len(ids))
    distance = positions[:, None] - positions
    visible = (distance >= 0) & (distance < (stack.window or len(ids)))
    angles = positions[:, None] / stack.rope_theta ** (torch.arange(0, stack.head_dim, 2) / stack.head_dim)
    turns = torch.polar(torch.ones_like(angles), angles)

    def rotate(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    x = F.embedding(ids, tensors[f"{PATCHER}.embed_tokens.weight"].float())
    for i in range(stack.num_layers):
        n = norm(x, f"layers.{i}.input_layernorm")
        q = rotate(heads(linear(n, f"layers.{i}.self_attn.q_proj"), stack.num_heads))
        k = rotate(heads(linear(n, f"layers.{i}.self_attn.k_proj"), stack.num_kv_heads))
        v = heads(linear(n, f"layers.{i}.self_attn.v_proj"), stack.num_kv_heads)
        attended = F.scaled_dot_product_attention(q[None], k[None], v[None], visible, enable_gqa=True)[0]
        x = x + linear(attended.transpose(0, 1).flatten(1), f"layers.{i}.self_attn.o_proj")
        m = norm(x, f"layers.{i}.post_attention_layernorm")
        gated = F.silu(linear(m, f"layers.{i}.mlp.gate_proj")) * linear(m, f"layers.{i}.mlp.up_proj")
        x = x + linear(gated, f"layers.{i}.mlp.down_proj")
    log_p = linear(norm(x, "norm"), "lm_head").log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
