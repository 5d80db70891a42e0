"""The four stages of a byte-latent model. Each runs on its own over a ragged batch and owns no state but weights."""

from dataclasses import dataclass

import torch

from kernels.linear import batched_row_floor, row_floor

from ..caches import CacheSpec
from ..config import ModelConfig, StackConfig
from .decoder import Decoder
from .encoder import Encoder
from .global_transformer import GlobalTransformer
from .layers import Weights
from .patcher import Patcher

__all__ = ["Decoder", "Encoder", "GlobalTransformer", "Model", "Patcher", "RowFloors", "find_row_floors"]

HASH_TABLES = "model.encoder_hash_tok_embedding."


class Model:
    """All stages of one checkpoint on one device."""

    def __init__(self, config: ModelConfig, weights: Weights, dtype: torch.dtype, device: torch.device) -> None:
        """Takes canonical tensors; converts only those of another dtype or device, and leaves hash tables as and
        where they are (a byte reads one row of each)."""
        placed = {
            name: tensor if name.startswith(HASH_TABLES) else tensor.to(device, dtype)
            for name, tensor in weights.items()
        }
        self.config = config
        self.hash_itemsize = next(t.dtype.itemsize for n, t in weights.items() if n.startswith(HASH_TABLES))
        self.parameters = sum(tensor.numel() for tensor in weights.values())
        self.patcher = Patcher(config, placed)
        self.encoder = Encoder(config, placed)
        self.global_transformer = GlobalTransformer(config, placed)
        self.decoder = Decoder(config, placed)
        self.linear_shapes = {
            (t.shape[0], t.shape[1]) for n, t in placed.items() if t.ndim == 2 and not n.startswith(HASH_TABLES)
        }


@dataclass(frozen=True, slots=True)
class RowFloors:
    """Fewest rows of a matrix product and of an attention tile that make rows independent of their batch.

    `proven` is False where the machine's library has no such count among those tried."""

    rows: int
    tile: int
    proven: bool


def find_row_floors(model: Model, specs: dict[str, CacheSpec], dtype: torch.dtype, device: torch.device) -> RowFloors:
    """Tries the machine's products on the model's shapes (under a second for small models)."""
    config = model.config

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
    tile = batched_row_floor(tiles, dtype, device)
    return RowFloors(rows=rows or 16, tile=tile or 4, proven=rows is not None and tile is not None)
