"""The caches: which there are, how large their pools can be, and their tensors.

| cache   | a row is             | holds                                              | live                      |
|---------|----------------------|----------------------------------------------------|---------------------------|
| patcher | a byte               | self-attention K/V of every layer                  | the window                |
| encoder | a byte               | self-attention K/V of every layer                  | the window                |
| open    | a byte               | its state to pool, K/V for the patch's queries     | the open patch            |
| global  | a patch              | self-attention K/V of every layer                  | everything                |
| latent  | a patch              | cross-attention K/V of its slots, every layer      | the newest                |
| decoder | a byte               | self-attention K/V of every layer                  | the window                |
"""

from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from torch import Tensor

from kernels.stack import KvCache

from ..config import EngineConfig, ModelConfig, StackConfig
from ..types import MAX_DRAFT
from .pages import BlockTable, PagePool

LONGEST_DRAFT = MAX_DRAFT + 2
"""Most rows of a draft and its verification. A block comes with the clean rows of the one before it."""
LATENTS_KEPT = 1
"""The newest: a row reads the latent of the patch before the one that holds its next byte, or a newer one."""
TYPICAL_BYTES = 2048
"""The length that pools are made for."""


@dataclass(frozen=True, slots=True)
class CacheSpec:
    """One cache. `rows_from`: "byte" or "patch". `window`: rows that stay live, None for all. `row_elements`: numbers
    in a row, over all layers."""

    name: str
    rows_from: str
    page_size: int
    window: int | None
    row_elements: int

    def pages_for(self, rows: int, chunk: int) -> int:
        """Pages that a sequence of `rows` rows may hold at once when it grows by up to `chunk` rows a step."""
        live = rows if self.window is None else min(rows, self.window + chunk)
        return ceil(live / self.page_size) + 1

    def pages_between(self, chunk: int, draft: int) -> int:
        """Most pages that all sequences together may hold beyond `pages_for(rows, draft)` in a step of `chunk` rows.
        Few of them have more than `draft` rows in it, and each of these begins at most one page more. One page is for
        the copy of a cached one that a sequence goes on in: it holds both for a moment."""
        return ceil(chunk / self.page_size) + chunk // draft if chunk > draft else 1


def longest_draft(config: ModelConfig) -> int:
    """Most rows that a sequence adds in a round: its drafts and their verification, or a block and the one before."""
    return max(LONGEST_DRAFT, 2 * (config.block_size or 0))


def longest_text(config: ModelConfig, max_length: int) -> int:
    """Positions on the device for the text of a running sequence of up to `max_length` ids."""
    # A draft may stand after the longest text, and a byte after it.
    return max_length + longest_draft(config) + 2


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


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How large an engine's pools will be, before any tensor is made.

    page_bytes: of one page. pages: per pool, the scratch page included. max_length, max_patches: most ids and patches
    of a sequence that has all pages to itself.
    """

    specs: dict[str, CacheSpec]
    page_bytes: dict[str, int]
    pages: dict[str, int]
    max_length: int
    max_patches: int

    @property
    def num_bytes(self) -> int:
        """The size of all pools."""
        return sum(count * self.page_bytes[name] for name, count in self.pages.items())


def typical_pages(
    config: ModelConfig, engine: EngineConfig, specs: dict[str, CacheSpec], sequences: int
) -> dict[str, int]:
    """Pages per pool, the scratch page included, for this many sequences of up to `TYPICAL_BYTES` at once."""
    draft = longest_draft(config)
    chunk = max(engine.max_step_rows, draft)
    length = min(TYPICAL_BYTES, _longest(config, engine))
    # A patch holds about four bytes. Each sequence may have a draft, whose bytes are not in patches yet. The rows of
    # prompts in a step are counted once, not per sequence.
    rows = {"byte": length, "patch": length // 4 + draft}
    return {
        spec.name: 1 + sequences * spec.pages_for(rows[spec.rows_from], draft) + spec.pages_between(chunk, draft)
        for spec in specs.values()
    }


def plan_caches(config: ModelConfig, engine: EngineConfig) -> CachePlan:
    """Sizes the pools so that as many typical sequences as possible fit into `cache_bytes`, up to `max_sequences`. The
    rest goes to the global cache, the only one that grows with the text without bound.

    Raises ValueError if `cache_bytes` cannot hold a single sequence.
    """
    specs = cache_specs(config, engine.page_size)
    itemsize = getattr(torch, engine.dtype).itemsize
    page_bytes = {spec.name: spec.page_size * spec.row_elements * itemsize for spec in specs.values()}

    def size(pages: dict[str, int]) -> int:
        return sum(count * page_bytes[name] for name, count in pages.items())

    pages = typical_pages(config, engine, specs, 1)
    if size(pages) > engine.cache_bytes:
        length = min(TYPICAL_BYTES, _longest(config, engine))
        raise ValueError(
            f"cache_bytes {engine.cache_bytes} is too small: one sequence of {length} bytes needs {size(pages)} with "
            f"--max-step-rows {engine.max_step_rows} and --page-size {engine.page_size}; "
            "raise --cache-bytes to that, or lower one of these"
        )
    # Each sequence after the first takes as much as the second.
    each = size(typical_pages(config, engine, specs, 2)) - size(pages)
    fits = min(engine.max_sequences, 1 + (engine.cache_bytes - size(pages)) // each)
    pages = typical_pages(config, engine, specs, fits)
    longest = _longest(config, engine)
    spare = (engine.cache_bytes - size(pages)) // page_bytes["global"]
    most = specs["global"].pages_for(min(longest, config.global_.max_positions), 0)
    pages["global"] = min(pages["global"] + spare, fits * most + 1)

    def rows(name: str) -> int:
        return (pages[name] - 2) * specs[name].page_size

    # Those without a window, or with one that a typical sequence does not fill.
    byte_rows = [spec for spec in specs.values() if spec.rows_from == "byte"]
    growing = [spec.name for spec in byte_rows if spec.window is None or spec.window > TYPICAL_BYTES]
    max_length = min([longest, *(rows(name) for name in growing)])
    return CachePlan(specs, page_bytes, pages, max_length, min(config.global_.max_positions, rows("global")))


def _longest(config: ModelConfig, engine: EngineConfig) -> int:
    """Most ids of a sequence, as configured."""
    return min(engine.max_length or config.max_length, config.max_length)


class Caches:
    """Pools and tensors, sized by `plan_caches`."""

    def __init__(self, config: ModelConfig, engine: EngineConfig) -> None:
        plan = plan_caches(config, engine)
        self.specs, self.page_bytes = plan.specs, plan.page_bytes
        self.pools = {name: PagePool(name, count) for name, count in plan.pages.items()}
        self.max_length, self.max_patches = plan.max_length, plan.max_patches
        dtype, device = getattr(torch, engine.dtype), torch.device(engine.device)

        def paged(name: str, *row: int) -> Tensor:
            return _zeros((self.pools[name].num_total + 1, *row), dtype, device)

        def kv(name: str, stack: StackConfig, layers: int, slots: int = 1) -> KvCache:
            row = (stack.num_kv_heads, self.specs[name].page_size * slots, stack.head_dim)
            return KvCache((paged(name, *row), paged(name, *row)) for _ in range(layers))

        self.patcher = kv("patcher", config.patcher, config.patcher.num_layers)
        self.encoder = kv("encoder", config.encoder, config.encoder.num_layers)
        self.open_states = paged("open", self.specs["open"].page_size, config.encoder.dim)
        self.open_kv = kv("open", config.encoder, encoder_cross_layers(config))
        self.global_ = kv("global", config.global_, config.global_.num_layers)
        self.latent = kv("latent", config.decoder, decoder_cross_layers(config), config.slots)
        self.decoder = kv("decoder", config.decoder, config.decoder.num_layers)
        pairs = {"patcher": self.patcher, "encoder": self.encoder, "open": self.open_kv}
        pairs |= {"global": self.global_, "latent": self.latent, "decoder": self.decoder}
        self._tensors = {name: [tensor for pair in layers for tensor in pair] for name, layers in pairs.items()}
        self._tensors["open"].append(self.open_states)

    def first_live(self, name: str, end: int, patch: int, patch_start: int) -> int:
        """The first row of a cache that rows from `end` on, in that patch, may read."""
        spec = self.specs[name]
        if name == "open":
            return patch_start
        if name == "latent":
            return max(patch - LATENTS_KEPT, 0)
        return 0 if spec.window is None else max(end - spec.window + 1, 0)

    def copy_page(self, name: str, source: int, target: int) -> None:
        for tensor in self._tensors[name]:
            tensor[target] = tensor[source]

    def new_tables(self) -> dict[str, BlockTable]:
        """Empty block tables for one sequence, one per cache."""
        return {name: BlockTable(self.pools[name], spec.page_size) for name, spec in self.specs.items()}

    def check_integrity(self) -> None:
        for pool in self.pools.values():
            pool.check_integrity()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros. On a CPU the system provides their memory only when they are first written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, f"i{dtype.itemsize}")).view(dtype)
