"""A model's patcher by itself: the entropies from which an engine decides boundaries, without the other stages."""

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.attention import LARGE_TILE
from kernels.dispatch import choose_kernels
from kernels.embedding import Ids
from kernels.planning import Spans, Tiling
from kernels.stack import KvCache

from . import checkpoint
from .build import device_of
from .config import EngineConfig
from .memory.caches import cache_specs
from .memory.pages import BlockTable, PagePool
from .model.layers import Weights
from .model.patcher import Patcher
from .step.graphs import Eager
from .step.plan import plan_attention

CHUNK = 512
"""Most rows at once."""


class Entropies:
    """Runs the patcher over texts, one after another, as an engine of this configuration does. Reads only the patcher's
    tensors of the checkpoint.

    Raises CheckpointError, and ValueError for a missing device or kernel backend.
    """

    def __init__(self, config: EngineConfig) -> None:
        config.check()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        self._device, dtype = device_of(config), getattr(torch, config.dtype)
        loaded = checkpoint.load(config.model, patcher=config.patcher)
        kernels = choose_kernels(config.kernels, self._device)
        self.model_config = loaded.config
        with loaded.reading():
            self._patcher = Patcher(loaded.config, Weights(loaded.tensors, dtype, self._device, kernels), kernels)
        stack, self._spec = loaded.config.patcher, cache_specs(loaded.config, config.page_size)["patcher"]
        size = self._spec.page_size
        self._pool = PagePool("patcher", 1 + self._spec.pages_for(loaded.config.max_length, CHUNK))
        shape = (self._pool.num_total + 1, stack.num_kv_heads, size, stack.head_dim)

        def zeros() -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self._device)

        self._cache = KvCache((zeros(), zeros()) for _ in range(stack.num_layers))
        tile, window = kernels.tile or LARGE_TILE, stack.window
        self._tiling = Tiling(tile, tile, size, window or 0)
        self._eager = Eager(self._device, 1)

    @torch.inference_mode()
    def of(self, ids: list[int]) -> NDArray[np.float32]:
        """The entropy in nats after each id of a text, (N,). ids: at most the model's `max_length`, and no EOS, which
        would end a document."""
        table = BlockTable(self._pool, self._spec.page_size)
        parts = []
        for start in range(0, len(ids), CHUNK):
            end = min(start + CHUNK, len(ids))
            table.extend(end)
            spans = Spans()
            spans.add(table.pages, table.first, start, end - start, 0, 0, end - 1)
            plan = plan_attention(spans, spans, self._tiling, self._eager, end - start)
            sent = {
                "ids": torch.tensor(ids[start:end]).to(self._device),
                "at": torch.arange(end - start, device=self._device),
                "plan": torch.from_numpy(plan.data).to(self._device),
            }
            parts.append(self._patcher(Ids(sent["ids"], sent["at"]), self._cache, plan.on_device(sent, "plan")).cpu())
            window = self._spec.window
            table.trim(0 if window is None else max(end - window + 1, 0), end)
        table.release()
        return torch.cat(parts).numpy()
