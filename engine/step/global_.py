"""The global stage: patches that are closed -> latents. Includes the encoder's cross-attention that pools them."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from torch import Tensor

from kernels import gate
from kernels.attention import AttentionPlan
from kernels.closing import Sizes, Tables
from kernels.planning import Spans
from kernels.pooling import PageTable

from ..costs.ledger import Launch, Share
from ..documents import pieces, start_of
from ..memory.caches import Caches
from ..memory.pages import BlockTable
from ..memory.text import Slots
from ..model import Model
from ..rows import Rows
from .launch import NO_DOCUMENTS, Launcher
from .plan import Arrays, padded_array, page_table, table_of


@dataclass(slots=True)
class _Patches:
    """The patches of a step, laid end to end: each one's sequence, its bytes begin..after-1, and the places of its
    slots in the latent cache."""

    queries: Spans = field(default_factory=Spans)
    rows: Spans = field(default_factory=Spans)
    sequence: list[int] = field(default_factory=list)
    begin: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    page: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)


class GlobalStage:
    def __init__(self, model: Model, caches: Caches, slots: Slots, launcher: Launcher, *, isolate: bool) -> None:
        """isolate: whether patches do not attend across documents."""
        self._model, self._caches, self._text_slots, self._launcher = model, caches, slots, launcher
        self._slots_per_patch, self._isolate = model.config.slots, isolate
        self._sizes = {name: caches.specs[name].page_size for name in ("open", "global", "latent")}

    def launch(self, batch: Seq[Rows]) -> Launch | None:
        """Runs every patch whose last byte is among the rows of the text, and open ones that a block is to read as if
        they ended here. None if there are none."""
        launch, patches = self._launcher.begin("global"), _Patches()
        opened: list[BlockTable] = []
        for rows in batch:
            if share := self._add(patches, rows, len(opened)):
                launch.shares.append(share)
                opened.append(rows.sequence.tables["open"])
        num_patches = launch.num_rows = len(patches.begin)
        if not num_patches:
            return None
        # Padding patches have no bytes and leave their latent in the scratch page.
        slots, executor = self._slots_per_patch, self._launcher.executor
        padded = executor.rows(num_patches)
        pooling = self._launcher.plan("open", Spans(), patches.queries, padded * slots)
        plan = self._launcher.plan("global", patches.rows, patches.rows, padded)

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            return self._run(
                table_of(t, "open"), t["sequence"], t["begin"], t["after"], pooling.on_device(t, "pooling"),
                plan.on_device(t, "plan"), t["page"], t["offset"],
            )  # fmt: skip

        arrays = {
            "sequence": padded_array(patches.sequence, padded),
            "begin": padded_array(patches.begin, padded),
            "after": padded_array(patches.after, padded),
            "page": padded_array(np.repeat(patches.page, slots).tolist(), padded * slots),
            "offset": padded_array(
                (np.array(patches.offset)[:, None] + np.arange(slots)).ravel().tolist(), padded * slots
            ),
            "pooling": pooling.data,
            "plan": plan.data,
            **page_table("open", opened, executor.parts(len(opened), padded), executor),
        }
        self._launcher.run(launch, stage, padded * slots, arrays, pooling, plan)
        return launch

    def launch_unread(self, batch: Seq[Rows]) -> Launch:
        """Runs the patches that close with a batch's rows of the text, which only the device knows. Their pages must be
        reserved, and each sequence be in one document. The caller charges it once the host knows them."""
        launch = self._launcher.begin("global")
        launch.num_rows = sum(rows.num_text for rows in batch)
        executor, kernels, text = self._launcher.executor, self._model.kernels, self._text_slots.text
        padded = executor.rows(launch.num_rows)
        padding = padded - launch.num_rows
        padded_tables = executor.parts(len(batch), padded)
        tables = {name: [rows.sequence.tables[name] for rows in batch] for name in self._sizes}
        small = self._launcher.small_tile
        each = self._sizes
        sizes = Sizes(each["open"], each["global"], each["latent"], self._slots_per_patch, small)
        numbers = [number for number, rows in enumerate(batch) for _ in range(rows.num_text)]
        arrays: Arrays = {
            "at": padded_array(self._text_slots.places(batch), padded),
            "positions": padded_array([row for rows in batch for row in range(rows.start, rows.end)], padded),
            "sequence": np.array(numbers + [-1] * padding, dtype=np.int64),
            "floor": padded_array([rows.sequence.patch_documents[-1] * self._isolate for rows in batch], padded_tables),
        }
        for name, of in tables.items():
            arrays |= page_table(name, of, padded_tables, executor)

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            found = Tables(table_of(t, "open"), table_of(t, "global"), table_of(t, "latent"), t["floor"])
            closing = kernels.closing(text, t["at"], t["positions"], t["sequence"], found, sizes)
            own = t["sequence"].clamp(min=0)
            if not kernels.gates and not closing.any.item():
                return closing.any
            with gate.under(closing.any):
                return self._run(found.open, own, *closing[:-1])

        self._launcher.run(launch, stage, padded * self._slots_per_patch, arrays, name="global unread")
        return launch

    def _run(
        self, table: PageTable, sequence: Tensor, begin: Tensor, after: Tensor, pooling: AttentionPlan,
        plan: AttentionPlan, page: Tensor, offset: Tensor,
    ) -> Tensor:  # fmt: skip
        """Patches to latents, as `kernels.closing.Closing` describes them."""
        model, caches = self._model, self._caches
        pooled = model.encoder.close(caches.open_states, caches.open_kv, table, sequence, begin, after, pooling)
        latents = model.global_transformer(pooled, caches.global_, plan)
        model.decoder.write_latents(latents, caches.latent, page, offset)
        return latents

    def in_one_document(self, rows: Rows) -> bool:
        """Whether all patches that a sequence closes next are in the document of the last."""
        sequence = rows.sequence
        return not self._isolate or sequence.documents[-1] <= sequence.patching.starts[-1]

    def share(self, rows: Rows, begin: int, ends: Seq[int]) -> Share | None:
        """What a sequence's rows closed: patches from index `begin` on, whose last bytes are before `ends`."""
        if not ends:
            return None
        # A patch belongs to generation if its last byte does.
        counted = sum(after > rows.counted_from for after in ends)
        documents = rows.sequence.patch_documents if self._isolate else NO_DOCUMENTS
        return Share(rows, len(ends), counted, begin + len(ends) - start_of(documents, begin))

    def _add(self, patches: _Patches, rows: Rows, number: int) -> Share | None:
        """Adds a sequence's patches, if it closes any."""
        sequence = rows.sequence
        begin, end = sequence.patch_of(rows.start), sequence.patch_of(rows.end)
        starts = sequence.patching.starts[begin : end + 1]
        sequence.note_patch_documents(end)
        if rows.closes_patch and starts[-1] < rows.end:
            starts.append(rows.end)
        if len(starts) == 1:
            return None
        opened, latent, size = sequence.tables["open"], sequence.tables["latent"], self._sizes["latent"]
        slots = self._slots_per_patch
        for patch, (first, after) in enumerate(pairwise(starts), begin):
            patches.queries.add(opened.pages, opened.first, first, slots, first, slots, after - 1)
            page, place = divmod(patch, size)
            patches.page.append(latent.pages[page - latent.first])
            patches.offset.append(place * slots)
        patches.begin += starts[:-1]
        patches.after += starts[1:]
        patches.sequence += [number] * (len(starts) - 1)
        table, end = sequence.tables["global"], begin + len(starts) - 1
        documents = sequence.patch_documents if self._isolate else NO_DOCUMENTS
        for start, after, floor in pieces(documents, begin, end):
            patches.rows.add(table.pages, table.first, start, after - start, floor)
        return self.share(rows, begin, starts[1:])
