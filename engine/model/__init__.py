"""The four stages of a byte-latent model. Each runs separately over a ragged batch and has no state but its weights."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention import product_dtype
from kernels.dispatch import Kernels
from kernels.linear import batched_row_floor, row_floor
from kernels.native import CrossKv, Stack
from kernels.native.step import StepWeights

from ..config import ModelConfig, StackConfig
from ..memory.caches import CacheSpec
from .decoder import Decoder
from .encoder import Encoder
from .global_transformer import GlobalTransformer
from .layers import Weights
from .patcher import Patcher

__all__ = ["Decoder", "Encoder", "GlobalTransformer", "Model", "Patcher", "RowFloors", "find_row_floors"]


class Model:
    """All stages of one checkpoint on one device."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels,
        *,
        fp8: bool = False,
    ) -> None:
        """Takes canonical tensors. fp8: the large matrices are rounded to float8 (see `kernels.linear.quantize`)."""
        weights = Weights(tensors, dtype, device, kernels, fp8=fp8)
        self.config = config
        self.kernels = kernels
        self.parameters = sum(tensor.numel() for tensor in tensors.values())
        self.patcher = Patcher(config, weights, kernels)
        self.encoder = Encoder(config, weights, kernels)
        self.hash_itemsize = self.encoder.hash_itemsize
        self.global_transformer = GlobalTransformer(config, weights, kernels)
        self.decoder = Decoder(config, weights, kernels)
        self.positions = weights.positions
        """Of every stage, by its name: rows of its rotary table."""
        self.linear_shapes = weights.linear_shapes
        self.matrix_itemsize = weights.matrix_dtype.itemsize

    @property
    def step_weights(self) -> StepWeights | None:
        """All weights, for steps as one call; None where kernels do not have that."""
        encoder, decoder, stack, config = self.encoder, self.decoder, self.global_transformer.stack, self.config
        stacks = self.patcher.stack, encoder.stack, stack, decoder.stack
        own = [stack for stack in stacks if isinstance(stack, Stack)]
        if len(own) < len(stacks) or not isinstance(decoder.cross_kv, CrossKv):
            return None
        if encoder.hashes.dtype not in (torch.float32, torch.bfloat16):
            return None
        return StepWeights(
            own[0],
            own[1],
            own[2],
            own[3],
            encoder.hashes,
            encoder.embedding,
            [cross.slots(config.slots) for cross in encoder.cross],
            decoder.cross_kv,
            encoder.slots,
            self.global_transformer.projection,
            decoder.slots,
            config.slots,
            config.decoder_input == "encoder",
            -1 if config.mask_id is None else config.mask_id,
        )

    def check_lengths(self, max_length: int, max_patches: int) -> None:
        """Raises ValueError if such sequences would exceed a stage's rotary table: kernels do not check this."""
        for stage, positions in self.positions.items():
            needed = max_patches if stage == "global" else max_length
            if positions < needed:
                raise ValueError(f"the {stage} stage has {positions} positions, and sequences may have {needed}")


@dataclass(frozen=True, slots=True)
class RowFloors:
    """Fewest rows of a matrix product and of an attention tile that make rows independent of their batch.

    `proven` is False if no count that was tried does so with the machine's library."""

    rows: int
    tile: int
    proven: bool


def find_row_floors(model: Model, specs: dict[str, CacheSpec], dtype: torch.dtype, device: torch.device) -> RowFloors:
    """Tries the machine's matrix products on the model's shapes (under a second for small models). Only torch's kernels
    need that."""
    config = model.config
    if model.kernels.tile is not None:
        return RowFloors(rows=1, tile=model.kernels.tile, proven=True)

    def shapes(stack: StackConfig, cache: str) -> tuple[int, int]:
        return specs[cache].page_size, stack.head_dim

    tiles = {
        shapes(config.patcher, "patcher"),
        shapes(config.encoder, "encoder"),
        shapes(config.encoder, "open"),
        shapes(config.global_, "global"),
        shapes(config.decoder, "decoder"),
    }
    tiles |= {(head_dim, page) for page, head_dim in tiles}
    rows = row_floor(model.linear_shapes, dtype, device)
    tile = batched_row_floor(tiles, product_dtype(dtype, device), device)
    return RowFloors(rows=rows or 16, tile=tile or 4, proven=rows is not None and tile is not None)
