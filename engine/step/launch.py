"""Launches a stage: which sequences' rows it has, what these may read, and when it ran."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention import LARGE_TILE
from kernels.planning import Spans, Tiling

from ..costs.clock import Clock
from ..costs.ledger import Launch, Share
from ..documents import pieces, start_of
from ..memory.caches import Caches
from ..model import RowFloors
from ..rows import Rows
from .graphs import Eager, Stage
from .plan import Arrays, Plan, plan_attention

NO_DOCUMENTS = [0]
"""Where documents begin if they are not isolated."""
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Launcher:
    """Plans and launches all stages of an engine."""

    def __init__(
        self,
        caches: Caches,
        floors: RowFloors,
        executor: Eager,
        clock: Clock,
        device: torch.device,
        *,
        large_tile: int | None,
        isolate: bool,
    ) -> None:
        self.executor, self.device = executor, device
        self.clock, self._isolate = clock, isolate
        self.small_tile, large = floors.tile, large_tile or LARGE_TILE
        # Every slot sees the whole open patch, and there may be more slots than a patch has bytes.
        self.tilings = {
            name: Tiling(floors.tile, large, spec.page_size, 0 if name == "open" else spec.window or 0)
            for name, spec in caches.specs.items()
        }

    def share(self, spans: Spans, cache: str, rows: Rows, start: int, end: int, mutual: int = 0) -> Share:
        """Adds rows start..end-1 of a cache of bytes to `spans`. The last `mutual` of them see each other."""
        sequence, window = rows.sequence, self.tilings[cache].window
        table = sequence.tables[cache]
        documents = sequence.documents if self._isolate else NO_DOCUMENTS
        for begin, after, floor in pieces(documents, start, end):
            spans.add(table.pages, table.first, begin, after - begin, floor, mutual if after == end else 0, end - 1)
        lowest, count = start_of(documents, start), end - start
        seen_from = max(start - window + 1, lowest) if window else lowest
        return Share(rows, count, min(max(end - rows.counted_from, 0), count), end - seen_from)

    def plan(self, cache: str, writes: Spans, queries: Spans, padded_queries: int) -> Plan:
        return plan_attention(writes, queries, self.tilings[cache], self.executor, padded_queries)

    def begin(self, stage: str) -> Launch:
        """A launch whose planning starts now. If the host runs the stages, planning is part of their time; on another
        device it is not."""
        return Launch(stage, [], 0, began=self.clock.now() if self.clock.waits else None)

    def run(
        self,
        launch: Launch,
        stage: Stage,
        rows: int,
        arrays: Arrays,
        *plans: Plan,
        tensors: Mapping[str, Tensor] = NOTHING,
        name: str = "",
        times: int = 1,
    ) -> Tensor:
        """The stage's output over `rows` padded rows. name, times: tell it from other launches of its stage; see
        `Eager.run`."""
        recorded = self.executor.num_recorded

        def launching() -> None:
            launch.began = launch.began or self.clock.now()

        key = times, *(plan.shape for plan in plans)
        out = self.executor.run(name or launch.stage, stage, rows, arrays, tensors, key, launching)
        launch.recorded = self.executor.num_recorded > recorded
        launch.ended = self.clock.now()
        return out


def padded_tensor(values: Tensor, length: int) -> Tensor:
    """The values (N, ...), and zeros after them up to `length`; contiguous."""
    return pad(values, (0, 0) * (values.dim() - 1) + (0, length - len(values))).contiguous()
