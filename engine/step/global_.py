"""The global stage: patches that are closed -> latents. Includes the encoder's cross-attention that pools them."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch import Tensor

from kernels.planning import Spans

from ..costs.ledger import Launch, Share
from ..memory.caches import Caches
from ..model import Model
from ..rows import Rows
from ..sequence import pieces, start_of
from .launch import NO_DOCUMENTS, Launcher
from .plan import padded_array


@dataclass(slots=True)
class _Patches:
    """The patches of a step, laid end to end: where their bytes lie in the open cache and their slots in the latent
    cache; bounds[p]: the first byte of patch p."""

    queries: Spans = field(default_factory=Spans)
    rows: Spans = field(default_factory=Spans)
    byte_page: list[int] = field(default_factory=list)
    byte_offset: list[int] = field(default_factory=list)
    latent_page: list[int] = field(default_factory=list)
    latent_offset: list[int] = field(default_factory=list)
    bounds: list[int] = field(default_factory=lambda: [0])


class GlobalStage:
    def __init__(self, model: Model, caches: Caches, launcher: Launcher, *, isolate: bool) -> None:
        """isolate: whether patches do not attend across documents."""
        self._model, self._caches, self._launcher = model, caches, launcher
        self._slots, self._isolate = model.config.slots, isolate
        self._open_size, self._latent_size = (caches.specs[name].page_size for name in ("open", "latent"))

    def launch(self, batch: Seq[Rows]) -> Launch | None:
        """Runs every patch whose last byte is among the rows of the text, and open ones that a block is to read as if
        they ended here. None if there are none."""
        launch, patches = self._launcher.begin("global"), _Patches()
        launch.shares = [share for rows in batch if (share := self._add(patches, rows))]
        num_patches = launch.num_rows = len(patches.bounds) - 1
        if not num_patches:
            return None
        slots, executor, bounds = self._slots, self._launcher.executor, patches.bounds
        # Padding patches have no bytes and leave their latent in the scratch page.
        padded = executor.rows(num_patches)
        pooling = self._launcher.plan("open", Spans(), patches.queries, padded * slots)
        plan = self._launcher.plan("global", patches.rows, patches.rows, padded)
        num_bytes = executor.pages(len(patches.byte_page))

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            pooled = self._model.encoder.close(
                self._caches.open_states,
                self._caches.open_kv,
                t["byte_page"],
                t["byte_offset"],
                t["bounds"],
                pooling.on_device(t, "open"),
            )
            latents = self._model.global_transformer(pooled, self._caches.global_, plan.on_device(t, "plan"))
            self._model.decoder.write_latents(latents, self._caches.latent, t["page"], t["offset"])
            return latents

        arrays = {
            "byte_page": padded_array(patches.byte_page, num_bytes),
            "byte_offset": padded_array(patches.byte_offset, num_bytes),
            "bounds": np.array(bounds + bounds[-1:] * (padded - num_patches), dtype=np.int64),
            "page": padded_array(patches.latent_page, padded * slots),
            "offset": padded_array(patches.latent_offset, padded * slots),
            "open": pooling.data,
            "plan": plan.data,
        }
        self._launcher.run(launch, stage, padded * slots, arrays, pooling, plan)
        return launch

    def _add(self, patches: _Patches, rows: Rows) -> Share | None:
        """Adds a sequence's patches, if it closes any."""
        sequence, slots = rows.sequence, self._slots
        begin, end = sequence.patch_of(rows.start), sequence.patch_of(rows.end)
        starts = sequence.patching.starts[begin : end + 1]
        sequence.note_patch_documents(begin, end)
        if rows.closes_patch and starts[-1] < rows.end:
            starts.append(rows.end)
        if len(starts) == 1:
            return None
        opened, latent = sequence.tables["open"], sequence.tables["latent"]
        for patch, (first, after) in enumerate(pairwise(starts), begin):
            patches.queries.add(opened.pages, opened.first, first, slots, first, slots, after - 1)
            patches.bounds.append(patches.bounds[-1] + after - first)
            for byte in range(first, after):
                patches.byte_page.append(opened.pages[byte // self._open_size - opened.first])
                patches.byte_offset.append(byte % self._open_size)
            page, place = divmod(patch, self._latent_size)
            patches.latent_page += [latent.pages[page - latent.first]] * slots
            patches.latent_offset += range(place * slots, (place + 1) * slots)
        end = begin + len(starts) - 1
        table = sequence.tables["global"]
        documents = sequence.patch_documents if self._isolate else NO_DOCUMENTS
        for start, after, floor in pieces(documents, begin, end):
            patches.rows.add(table.pages, table.first, start, after - start, floor)
        # A patch belongs to generation if its last byte does.
        counted = sum(after > rows.counted_from for after in starts[1:])
        return Share(rows, end - begin, counted, end - start_of(documents, begin))
