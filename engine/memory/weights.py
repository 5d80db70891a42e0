"""The size of a model's weights in bytes, from its shapes, before any tensor is read."""

from dataclasses import dataclass
from math import prod

from ..checkpoint import expected_shapes
from ..checkpoint.names import HASHES
from ..config import ModelConfig
from ..costs.accounting import StageBytes


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """Bytes of the weights. stages: per stage its matrices and norms, which each call reads once. The tables are looked
    up row by row: embeddings of bytes, embeddings of n-grams, angles of rotary positions."""

    stages: dict[str, int]
    byte_tables: int
    hash_tables: int
    rotary_tables: int
    total: int

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        itemsize: int,
        hash_itemsize: int,
        *,
        matrix_itemsize: int | None = None,
        fp8: bool = False,
    ) -> "WeightBytes":
        stages = StageBytes.of(config, itemsize, hash_itemsize, matrix_itemsize=matrix_itemsize, fp8=fp8).weights
        shapes = expected_shapes(config).items()
        embeddings = itemsize * sum(prod(shape) for name, shape in shapes if name.endswith("embed_tokens.weight"))
        hashes = hash_itemsize * sum(prod(shape) for name, shape in shapes if name.startswith(HASHES))
        stacks = (config.encoder, config.global_, config.decoder)
        tables = [(config.patcher_positions, config.patcher), *((stack.max_positions, stack) for stack in stacks)]
        # A cosine and a sine per pair of numbers, in float32.
        rotary = sum(4 * positions * stack.head_dim for positions, stack in tables)
        return cls(stages, embeddings, hashes, rotary, sum(stages.values()) + embeddings + hashes + rotary)
