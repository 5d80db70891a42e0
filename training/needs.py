"""The memory that fine-tuning needs, for `fastblt size --training`: counted, not guessed.

What a pass keeps for its gradients is found by running the pass itself on tensors that have shapes but no numbers.
"""

import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from engine.checkpoint import expected_shapes
from engine.config import ModelConfig

from . import objective
from .convert import with_blocks
from .model import Blocks, Patches
from .objective import Corruption
from .state import PATCHER, is_matrix
from .tuning import Trained, is_trained

Stage = Literal["encoder", "global_", "decoder"]
STAGES: tuple[Stage, ...] = ("encoder", "global_", "decoder")
ROWS = 8
"""Of a micro-batch, unless told otherwise."""
BLOCKS_PER_KIB = 32
BLOCK_SIZE = 8


@dataclass(frozen=True, slots=True)
class Needs:
    """Bytes. optimizer: Muon's momentum of matrices, AdamW's two averages of the rest. activations: what a pass over a
    micro-batch keeps for its gradients, the weights' roundings to bfloat16 among them; with recompute, between layers
    and inside the largest."""

    train: Trained
    recompute: bool
    trained: int
    """Parameters."""
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}


def all_needs(
    config: ModelConfig, rows: int, row_bytes: int, patch: float, patcher_itemsize: int = 2
) -> list[dict[str, Any]]:
    """Of both choices of what is trained, with and without recomputing: `Needs` as JSON. Raises ValueError for rows
    that the model has no positions for."""
    if not 1 <= row_bytes < config.max_length:
        raise ValueError(f"--context: must be from 1 to {config.max_length - 1} bytes for training, not {row_bytes}")
    choices: tuple[Trained, ...] = ("decoder", "all")
    asked = rows, row_bytes, patch, patcher_itemsize
    return [need.to_json() for train in choices for need in needs(config, train, *asked)]


def needs(
    config: ModelConfig, train: Trained, rows: int, row_bytes: int, patch: float, patcher_itemsize: int = 2
) -> tuple[Needs, Needs]:
    """On a GPU, for micro-batches of `rows` rows of `row_bytes` bytes, in patches of `patch` bytes, with bfloat16
    products: without and with recomputing. patcher_itemsize: bytes of a number in the patcher's matrices, as stored."""
    if config.mask_id is None:
        config = with_blocks(config, config.name, BLOCK_SIZE)
    shapes = expected_shapes(config)
    taught = {name: shape for name, shape in shapes.items() if is_trained(name, train)}
    trained = sum(prod(shape) for shape in taught.values())
    momentum = sum(prod(shape) for name, shape in taught.items() if is_matrix(name, len(shape)))

    def itemsize(name: str, shape: tuple[int, ...]) -> int:
        as_stored = name.startswith(PATCHER) and len(shape) > 1
        return patcher_itemsize if as_stored else _dtype(name, shape, train).itemsize

    weights = sum(prod(shape) * itemsize(name, shape) for name, shape in shapes.items())
    optimizer = 4 * momentum + 8 * (trained - momentum)
    plain, recomputed = kept(config, train, rows, row_bytes, patch)
    return (
        Needs(train, False, trained, weights, 4 * trained, optimizer, plain),
        Needs(train, True, trained, weights, 4 * trained, optimizer, recomputed),
    )


def kept(config: ModelConfig, train: Trained, rows: int, row_bytes: int, patch: float) -> tuple[int, int]:
    """Bytes that a pass keeps for its gradients, besides weights: without and with recomputing. Layers of a stage keep
    the same, so that passes of one layer, and of two in one of the stages, tell those of any number."""

    def run(deeper: Stage | None, *, recompute: bool) -> int:
        stacks = {stage: replace(getattr(config, stage), num_layers=1 + (stage == deeper)) for stage in STAGES}
        shallow = replace(config, **stacks)
        with FakeTensorMode(allow_non_fake_inputs=True):
            weights = {
                name: torch.empty(shape, dtype=_dtype(name, shape, train)).requires_grad_(is_trained(name, train))
                for name, shape in expected_shapes(shallow).items()
            }
            row = torch.zeros(rows, row_bytes + 1, dtype=torch.int64)
            patches = even_patches(row[:, :-1], patch)
            per_text = max(1, BLOCKS_PER_KIB * row_bytes // 1024)
            corruption = _corruption(config, row, min(per_text, patches.starts.shape[1]))
            return saved_bytes(shallow, weights, row, patches, corruption, torch.bfloat16, recompute=recompute)

    def total(least: int, of_layers: dict[Stage, int]) -> int:
        return least + sum(size * (getattr(config, stage).num_layers - 1) for stage, size in of_layers.items())

    learning: tuple[Stage, ...] = STAGES if train == "all" else ("decoder",)  # frozen stages keep nothing
    plain, recomputed = run(None, recompute=False), run(None, recompute=True)
    of_plain = {stage: run(stage, recompute=False) - plain for stage in learning}
    of_recomputed = {stage: run(stage, recompute=True) - recomputed for stage in learning}
    # While the gradients of a layer are computed, what it keeps otherwise is there.
    return total(plain, of_plain), total(recomputed, of_recomputed) + max(of_plain.values())


def saved_bytes(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    row: Tensor,
    patches: Patches,
    corruption: Corruption,
    dtype: torch.dtype,
    *,
    recompute: bool,
) -> int:
    """Bytes of the tensors that autograd keeps of one pass, each counted once; weights are not counted."""
    packed: list[weakref.ref[Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        held = tensor.view_as(tensor)
        packed.append(weakref.ref(held))
        return held

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        clean, found = objective.next_bytes(config, weights, row, patches, dtype, recompute=recompute)
        of_blocks = objective.block_bytes(config, weights, row, clean, corruption, dtype, recompute=recompute)
        total = found.nats + of_blocks.nats
    kept = [tensor.untyped_storage() for ref in packed if (tensor := ref()) is not None]
    of_weights = {weight.untyped_storage()._cdata for weight in weights.values()}
    assert total.grad_fn is not None  # it holds what is kept
    return sum({storage._cdata: storage.nbytes() for storage in kept if storage._cdata not in of_weights}.values())


def even_patches(ids: Tensor, patch: float) -> Patches:
    """Patches of the same length in every text of ids (B, T)."""
    length = max(1, round(patch))
    index = torch.arange(ids.shape[1] + 1, device=ids.device)
    patch_of = (index // length).expand(len(ids), -1)
    count = ceil(ids.shape[1] / length)
    starts = (torch.arange(count, device=ids.device) * length).expand(len(ids), -1)
    return Patches(patch_of[:, :-1], (patch_of[:, 1:] - 1).clamp(min=0), starts, torch.full((len(ids),), count))


def _corruption(config: ModelConfig, row: Tensor, per_text: int) -> Corruption:
    assert config.block_size is not None
    shape = len(row), per_text, config.block_size
    ids = torch.zeros(shape, dtype=torch.int64)
    starts = torch.zeros(shape[:2], dtype=torch.int64)
    ones = torch.ones(shape[:2])
    return Corruption(
        Blocks(ids, starts, starts.clone()), ids.clone(), torch.ones(shape, dtype=torch.bool), ones, ones.clone()
    )


def _dtype(name: str, shape: tuple[int, ...], train: Trained) -> torch.dtype:
    """As a GPU has it in a run with bfloat16 products."""
    return torch.float32 if len(shape) == 1 or is_trained(name, train) else torch.bfloat16
