"""Runs one step: the four stages over the rows of many sequences.

    patcher   bytes -> entropy -> does the next byte start a patch?
    encoder   bytes -> states
    global    closed patches -> latents    (only for sequences that closed a patch)
    decoder   bytes -> logits

Rows that feed a byte and rows that prefill a prompt are the same thing; a step does not know the difference.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.attention import AttentionPlan

from .caches import LATENTS_KEPT, Caches
from .config import EOS_ID
from .model import Model, RowFloors
from .model.encoder import ngram_windows, window_tensor
from .pages import BlockTable
from .plan import Span, plan_attention
from .sequence import Sequence

STAGES = ("patcher", "encoder", "global", "decoder")


@dataclass(frozen=True, slots=True)
class Work:
    """Rows start..end-1 of a sequence, to run now. `logits_from`: first row whose logits are wanted (`end` for
    none). Pages for them (see `Runner.reserve`) are taken already."""

    sequence: Sequence
    start: int
    end: int
    logits_from: int


@dataclass(slots=True)
class StageCounts:
    """Passes and rows per stage since the start; padding does not count."""

    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))

    def add(self, stage: str, rows: int) -> None:
        self.calls[stage] += 1
        self.rows[stage] += rows


class Runner:
    """The model, its caches and the plan of a step."""

    def __init__(self, model: Model, caches: Caches, floors: RowFloors, *, isolate: bool, device: torch.device) -> None:
        self._model = model
        self._config = model.config
        self._caches = caches
        self._floors = floors
        self._isolate = isolate
        self._device = device
        self._ngram_width = max(model.config.hashes.group_sizes)
        self.counts = StageCounts()

    def missing_pages(self, sequence: Sequence, end: int) -> dict[str, int]:
        """Pages per cache that `reserve(sequence, end)` would take."""
        return {name: table.missing(rows) for name, table, rows in self._reach(sequence, end)}

    def reserve(self, sequence: Sequence, end: int) -> None:
        """Takes the pages for running the sequence up to row `end`, an undecided byte counted as closing a patch.

        Raises OutOfPages, with nothing taken from the pool that lacked them.
        """
        for _, table, rows in self._reach(sequence, end):
            table.extend(rows)

    def _reach(self, sequence: Sequence, end: int) -> list[tuple[str, BlockTable, int]]:
        patches = sequence.most_patches(end)
        specs = self._caches.specs
        return [
            (name, table, end if specs[name].rows_from == "byte" else patches)
            for name, table in sequence.tables.items()
        ]

    @torch.inference_mode()
    def run(self, batch: Seq[Work]) -> list[Tensor]:
        """One step. Returns the wanted logits of each work item, (rows, V) float32 on the device.

        Afterwards `sequence.num_computed` is `end`, newly decided patch starts are in `sequence.patching`, and pages
        that no later row needs are back in their pools.
        """
        ids = [token for w in batch for token in w.sequence.ids[w.start : w.end]]
        num_rows = len(ids)
        padded = max(num_rows, self._floors.rows)
        padded_ids = torch.tensor(ids + [0] * (padded - num_rows), device=self._device)

        patcher_plan = self._plan_bytes("patcher", batch, padded)
        entropies = self._model.patcher(padded_ids, self._caches.patcher, patcher_plan)
        self.counts.add("patcher", num_rows)
        self._decide_patches(batch, entropies[:num_rows].tolist())

        encoder_plan = self._plan_bytes("encoder", batch, padded)
        open_plan = self._plan_open_writes(batch, padded)
        windows = [window for w in batch for window in ngram_windows(w.sequence.ids, w.start, w.end, self._ngram_width)]
        windows += [[0] * self._ngram_width] * (padded - num_rows)
        states = self._model.encoder(
            window_tensor(windows, self._device),
            self._caches.encoder,
            encoder_plan,
            self._caches.open_states,
            self._caches.open_kv,
            open_plan,
        )
        self.counts.add("encoder", num_rows)

        self._close_patches(batch)

        latent_page, latent_offset = self._latents_of_rows(batch, padded)
        hidden = self._model.decoder(
            self._model.decoder.inputs(padded_ids, states),
            self._caches.latent,
            latent_page,
            latent_offset,
            self._caches.decoder,
            self._plan_bytes("decoder", batch, padded),
        )
        self.counts.add("decoder", num_rows)
        for w in batch:
            w.sequence.num_computed = w.end
            self._give_back(w.sequence)
        return self._logits(batch, hidden)

    def _decide_patches(self, batch: Seq[Work], entropies: list[float]) -> None:
        row = 0
        for w in batch:
            patching = w.sequence.patching
            for byte in range(w.start, w.end):
                # A recomputed byte was decided before: frozen.
                if byte == patching.decided:
                    patching.feed(entropies[row])
                row += 1

    def _plan_bytes(self, cache: str, batch: Seq[Work], padded: int) -> AttentionPlan:
        spec = self._caches.specs[cache]
        spans = []
        for w in batch:
            first = [self._first_seen(w.sequence, byte, spec.window) for byte in range(w.start, w.end)]
            spans.append(Span(w.sequence.tables[cache], w.start, first, range(w.start, w.end)))
        return plan_attention(
            spans,
            spans,
            page_size=spec.page_size,
            small_tile=self._floors.tile,
            padded_rows=padded,
            padded_queries=padded,
            device=self._device,
        )

    def _first_seen(self, sequence: Sequence, byte: int, window: int | None) -> int:
        first = 0 if window is None else max(byte - window + 1, 0)
        return max(first, sequence.document_start(byte)) if self._isolate else first

    def _plan_open_writes(self, batch: Seq[Work], padded: int) -> AttentionPlan:
        spans = [Span(w.sequence.tables["open"], w.start, range(w.start, w.end), ()) for w in batch]
        return self._plan_patches("open", spans, [], padded, 0)

    def _plan_patches(
        self, cache: str, writes: list[Span], queries: list[Span], padded_rows: int, padded_queries: int
    ) -> AttentionPlan:
        spec = self._caches.specs[cache]
        return plan_attention(
            writes,
            queries,
            page_size=spec.page_size,
            small_tile=self._floors.tile,
            padded_rows=padded_rows,
            padded_queries=padded_queries,
            device=self._device,
        )

    def _close_patches(self, batch: Seq[Work]) -> None:
        """Encoder cross-attention and global stage for every patch whose last byte is among the rows."""
        slots = self._config.slots
        open_size, latent_size = (self._caches.specs[name].page_size for name in ("open", "latent"))
        queries: list[Span] = []
        patch_rows: list[Span] = []
        byte_page: list[int] = []
        byte_offset: list[int] = []
        latent_page: list[int] = []
        latent_offset: list[int] = []
        lengths: list[int] = []
        for w in batch:
            sequence = w.sequence
            starts = sequence.patching.starts
            begin, end = sequence.patch_of(w.start), sequence.patch_of(w.end)
            if begin == end:
                continue
            self._note_documents(sequence, begin, end)
            opened, latent = sequence.tables["open"], sequence.tables["latent"]
            for patch in range(begin, end):
                first, last = starts[patch], starts[patch + 1] - 1
                queries.append(Span(opened, 0, [first] * slots, [last] * slots))
                lengths.append(last - first + 1)
                for byte in range(first, last + 1):
                    byte_page.append(opened.pages[byte // open_size - opened.first])
                    byte_offset.append(byte % open_size)
                latent_page.append(latent.pages[patch // latent_size - latent.first])
                latent_offset.append(patch % latent_size)
            seen = [sequence.patch_document_start(p) if self._isolate else 0 for p in range(begin, end)]
            patch_rows.append(Span(sequence.tables["global"], begin, seen, range(begin, end)))
        if not lengths:
            return
        # Padding patches pool byte 0 of the scratch page and leave their latent there.
        missing = max(self._floors.rows - len(lengths), 0)
        padded = len(lengths) + missing
        pooled = self._model.encoder.close(
            self._caches.open_states,
            self._caches.open_kv,
            self._tensor(byte_page + [0] * missing),
            self._tensor(byte_offset + [0] * missing),
            self._tensor(lengths + [1] * missing),
            self._plan_patches("open", [], queries, 0, padded * slots),
        )
        global_plan = self._plan_patches("global", patch_rows, patch_rows, padded, padded)
        latents = self._model.global_transformer(pooled, self._caches.global_, global_plan)
        self.counts.add("global", len(lengths))
        self._model.decoder.write_latents(
            latents,
            self._caches.latent,
            self._tensor(latent_page + [0] * missing),
            self._tensor(latent_offset + [0] * missing),
        )

    def _note_documents(self, sequence: Sequence, begin: int, end: int) -> None:
        """A patch that holds an EOS ends a document for the global stage."""
        starts = sequence.patching.starts
        for patch in range(begin, end):
            behind = patch + 1
            if sequence.patch_documents[-1] < behind and EOS_ID in sequence.ids[starts[patch] : starts[behind]]:
                sequence.patch_documents.append(behind)

    def _latents_of_rows(self, batch: Seq[Work], padded: int) -> tuple[Tensor, Tensor]:
        """Byte j, which predicts byte j + 1, reads the latent of the patch before the one that holds byte j + 1."""
        size = self._caches.specs["latent"].page_size
        pages: list[int] = []
        offsets: list[int] = []
        for w in batch:
            table = w.sequence.tables["latent"]
            for byte in range(w.start, w.end):
                patch = w.sequence.patch_of(byte + 1) - 1
                pages.append(table.pages[patch // size - table.first])
                offsets.append(patch % size)
        padding = [0] * (padded - len(pages))
        return self._tensor(pages + padding), self._tensor(offsets + padding)

    def _logits(self, batch: Seq[Work], hidden: Tensor) -> list[Tensor]:
        rows: list[int] = []
        counts: list[int] = []
        row = 0
        for w in batch:
            wanted = range(row + w.logits_from - w.start, row + w.end - w.start)
            rows.extend(wanted)
            counts.append(len(wanted))
            row += w.end - w.start
        if not rows:
            return [hidden.new_empty((0, self._config.vocab_size), dtype=torch.float32)] * len(batch)
        padding = [0] * max(self._floors.rows - len(rows), 0)
        logits = self._model.decoder.logits(hidden[self._tensor(rows + padding)])
        return list(logits[: len(rows)].split(counts))

    def _give_back(self, sequence: Sequence) -> None:
        """Returns pages behind every window and reserved pages of patches that did not come to be."""
        n = sequence.num_computed
        patch = sequence.patch_of(n)
        for name, table in sequence.tables.items():
            spec = self._caches.specs[name]
            if name == "open":
                table.trim_before(sequence.patching.starts[patch])
            elif name == "latent":
                table.trim_before(max(patch - LATENTS_KEPT, 0))
            elif spec.window is not None:
                table.trim_before(max(n - spec.window + 1, 0))
            if spec.rows_from == "patch":
                table.cut(patch)

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
