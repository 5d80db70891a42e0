"""The caches: which there are, how large their pools can be, and the tensors behind the pages.

| cache   | a row is             | holds                                              | live                      |
|---------|----------------------|----------------------------------------------------|---------------------------|
| patcher | a byte               | self-attention K/V of every layer                  | the window                |
| encoder | a byte               | self-attention K/V of every layer                  | the window                |
| open    | a byte               | its state to pool, K/V for the patch's queries     | the open patch            |
| global  | a patch              | self-attention K/V of every layer                  | everything                |
| latent  | a patch              | cross-attention K/V of its slots, every layer      | the current and last one  |
| decoder | a byte               | self-attention K/V of every layer                  | the window                |
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from .config import EngineConfig, ModelConfig, StackConfig
from .pages import BlockTable, PagePool
from .types import MAX_DRAFT

LONGEST_DRAFT = MAX_DRAFT + 2
"""Most rows of a draft and its verification. A block comes with the clean rows of the one before it."""
LATENTS_KEPT = 2
"""The current latent and the one before it."""


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache. `rows_from`: "byte" or "patch". `window`: rows that stay live, None for all. `row_elements`: numbers
    that a row takes, over all layers."""

    name: str
    rows_from: str
    page_size: int
    window: int | None
    row_elements: int

    def pages_for(self, rows: int, chunk: int) -> int:
        """Pages that a sequence of `rows` rows may hold at once when it grows by up to `chunk` rows a step."""
        live = rows if self.window is None else min(rows, self.window + chunk)
        return ceil(live / self.page_size) + 1


def encoder_cross_layers(config: ModelConfig) -> int:
    """Cross-attention layers of the encoder that are evaluated."""
    return config.encoder.num_layers if config.encoder_refine else 1


def decoder_cross_layers(config: ModelConfig) -> int:
    return config.decoder.num_layers if config.decoder_cross_all_layers else 1


def cache_specs(config: ModelConfig, page_size: int) -> dict[str, CacheSpec]:
    """All caches of a model, by name."""

    def kv(stack: StackConfig, num_layers: int) -> int:
        return 2 * num_layers * stack.num_kv_heads * stack.head_dim

    open_elements = config.encoder.dim + kv(config.encoder, encoder_cross_layers(config))
    latent_elements = config.slots * kv(config.decoder, decoder_cross_layers(config))
    small = max(page_size // 8, 4)
    specs = (
        CacheSpec("patcher", "byte", page_size, config.patcher.window, kv(config.patcher, config.patcher.num_layers)),
        CacheSpec("encoder", "byte", page_size, config.encoder.window, kv(config.encoder, config.encoder.num_layers)),
        CacheSpec("open", "byte", small, config.patching.max_patch_length, open_elements),
        CacheSpec("global", "patch", page_size, None, kv(config.global_, config.global_.num_layers)),
        CacheSpec("latent", "patch", small, LATENTS_KEPT, latent_elements),
        CacheSpec("decoder", "byte", page_size, config.decoder.window, kv(config.decoder, config.decoder.num_layers)),
    )
    return {spec.name: spec for spec in specs}


class Caches:
    """Pools and tensors.

    The pools are sized so that as many typical sequences as possible fit into `cache_bytes`, up to `max_sequences`;
    what is left goes to the global cache, the only one that grows with the text without bound. `max_patches` and
    `max_length` say how long one sequence may get when it has every page for itself.

    Raises ValueError if `cache_bytes` cannot hold a single sequence.
    """

    TYPICAL_BYTES = 2048

    def __init__(self, config: ModelConfig, engine: EngineConfig) -> None:
        self.specs = cache_specs(config, engine.page_size)
        dtype = getattr(torch, engine.dtype)
        self.page_bytes = {
            spec.name: spec.page_size * spec.row_elements * dtype.itemsize for spec in self.specs.values()
        }
        wanted = engine.max_length or config.max_length
        counts = self._count_pages(config, engine, min(wanted, config.max_length))
        self.pools = {name: PagePool(name, count) for name, count in counts.items()}

        def rows(name: str) -> int:
            spec, pool = self.specs[name], self.pools[name]
            return (pool.num_total - 1) * spec.page_size

        unbounded = [s.name for s in self.specs.values() if s.rows_from == "byte" and s.window is None]
        self.max_length = min([wanted, config.max_length, *(rows(name) for name in unbounded)])
        self.max_patches = min(config.global_.max_positions, rows("global"))

        device = torch.device(engine.device)

        def paged(name: str, *row: int) -> Tensor:
            return _zeros((self.pools[name].num_total + 1, *row), dtype, device)

        def kv(name: str, stack: StackConfig) -> list[tuple[Tensor, Tensor]]:
            row = (stack.num_kv_heads, self.specs[name].page_size, stack.head_dim)
            return [(paged(name, *row), paged(name, *row)) for _ in range(stack.num_layers)]

        open_row = (config.encoder.num_kv_heads, self.specs["open"].page_size, config.encoder.head_dim)
        slot_rows = self.specs["latent"].page_size * config.slots
        latent_row = (config.decoder.num_kv_heads, slot_rows, config.decoder.head_dim)
        self.patcher = kv("patcher", config.patcher)
        self.encoder = kv("encoder", config.encoder)
        self.open_states = paged("open", self.specs["open"].page_size, config.encoder.dim)
        self.open_kv = [
            (paged("open", *open_row), paged("open", *open_row)) for _ in range(encoder_cross_layers(config))
        ]
        self.global_ = kv("global", config.global_)
        self.latent = [
            (paged("latent", *latent_row), paged("latent", *latent_row)) for _ in range(decoder_cross_layers(config))
        ]
        self.decoder = kv("decoder", config.decoder)

    def new_tables(self) -> dict[str, BlockTable]:
        """Empty block tables for one sequence, one per cache."""
        return {name: BlockTable(self.pools[name], spec.page_size) for name, spec in self.specs.items()}

    def check_integrity(self) -> None:
        for pool in self.pools.values():
            pool.check_integrity()

    def _count_pages(self, config: ModelConfig, engine: EngineConfig, max_length: int) -> dict[str, int]:
        """Pages per pool, the scratch page included."""
        chunk = max(engine.max_step_rows, LONGEST_DRAFT, 2 * (config.block_size or 0))
        fits = 0
        for sequences in range(1, engine.max_sequences + 1):
            counts = self._pages_for(sequences, min(self.TYPICAL_BYTES, max_length), chunk)
            if self._bytes(counts) > engine.cache_bytes:
                break
            fits = sequences
        if not fits:
            need = self._bytes(self._pages_for(1, min(self.TYPICAL_BYTES, max_length), chunk))
            raise ValueError(
                f"cache_bytes {engine.cache_bytes} is too small: one sequence of "
                f"{min(self.TYPICAL_BYTES, max_length)} bytes needs {need}"
            )
        counts = self._pages_for(fits, min(self.TYPICAL_BYTES, max_length), chunk)
        spare = (engine.cache_bytes - self._bytes(counts)) // self.page_bytes["global"]
        longest = self.specs["global"].pages_for(min(max_length, config.global_.max_positions), chunk)
        counts["global"] = min(counts["global"] + spare, fits * longest + 1)
        return counts

    def _pages_for(self, sequences: int, length: int, chunk: int) -> dict[str, int]:
        # A patch holds four bytes or so, but none of the bytes of the chunk under way has been patched yet.
        rows = {"byte": length, "patch": length // 4 + chunk}
        return {spec.name: 1 + sequences * spec.pages_for(rows[spec.rows_from], chunk) for spec in self.specs.values()}

    def _bytes(self, counts: dict[str, int]) -> int:
        return sum(count * self.page_bytes[name] for name, count in counts.items())


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU as pages of memory that become real when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, f"i{dtype.itemsize}")).view(dtype)
