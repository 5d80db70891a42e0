"""Runs one step: the four stages over the rows of many sequences.

    patcher   bytes -> entropy -> does the next byte start a patch?
    encoder   bytes -> states
    global    closed patches -> latents    (only for sequences that closed a patch)
    decoder   bytes -> logits

Rows that feed a byte and rows that prefill a prompt are the same thing; a step does not know the difference.
"""

import time
from bisect import bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention import LARGE_TILE

from .accounting import STAGES, StageBytes
from .caches import Caches
from .costs import StageCosts
from .decoders import Call
from .graphs import Eager, Stage
from .model import Model, RowFloors
from .model.encoder import ngram_windows
from .pages import BlockTable
from .patching import boundary_rule
from .plan import Arrays, Plan, Span, Tiling, padded_array, plan_attention
from .readback import Readback
from .sequence import Sequence


@dataclass(slots=True)
class Work:
    """What a step runs of one sequence: clean rows start..end-1, whose ids `sequence.ids` holds, then the cells of
    `call`. Pages for them (see `Runner.reserve`) are taken already.

    logits_from: first clean row whose logits are wanted (`end` for none); the runner moves it on past rows that it need
    not decode. decode_from: first clean row that it decoded.
    """

    sequence: Sequence
    start: int
    end: int
    call: Call | None
    """None if only the rows are computed."""
    logits_from: int
    counted_from: int = 0
    """Rows from here on belong to generation: they are not a prompt's, nor computed for a second time."""
    decode_from: int = 0

    @property
    def num_clean(self) -> int:
        return self.end - self.start

    @property
    def num_wanted(self) -> int:
        return self.end - self.logits_from + self.num_cells

    @property
    def num_cells(self) -> int:
        return self.call.num_cells if self.call else 0

    @property
    def cells(self) -> list[int]:
        return [*self.call.causal, *self.call.block] if self.call else []

    @property
    def cells_start(self) -> int:
        return self.call.start if self.call else self.end

    @property
    def num_block(self) -> int:
        return len(self.call.block) if self.call else 0

    @property
    def closes(self) -> bool:
        return self.call is not None and self.call.closes


@dataclass(slots=True)
class StageCounts:
    """Passes, rows, seconds and bytes read per stage since the start; padding does not count. `decoder_seconds`: a
    pass's seconds shared out by rows, per decoder that was asked for and stage; a prompt's rows are nobody's."""

    calls: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    bytes_read: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    decoder_seconds: dict[str, dict[str, float]] = field(
        default_factory=lambda: defaultdict(lambda: dict.fromkeys(STAGES, 0.0))
    )


@dataclass(frozen=True, slots=True)
class DecoderRows:
    """Rows of the decoder stage, planned: whose they are, how many each has, and of how many logits are wanted."""

    padded: int
    arrays: Arrays
    plan: Plan
    num_rows: int
    num_wanted: int
    works: list[Work]
    spans: list[Span]
    counts: list[int]


class Runner:
    """The model, its caches and the plan of a step."""

    def __init__(
        self,
        model: Model,
        caches: Caches,
        floors: RowFloors,
        executor: Eager,
        *,
        isolate: bool,
        device: torch.device,
        stage_bytes: StageBytes,
        costs: StageCosts,
    ) -> None:
        self._model = model
        self._config = model.config
        self._caches = caches
        self.executor = executor
        large = model.kernels.tile or LARGE_TILE
        self._tilings = {
            name: Tiling(floors.tile, large, spec.page_size, split=spec.window is None)
            for name, spec in caches.specs.items()
        }
        self._rule = boundary_rule(model.config.patching)
        self._isolate = isolate
        self.device = device
        self._ngram_width = max(model.config.hashes.group_sizes)
        self._bytes = stage_bytes
        self.counts = StageCounts()
        self._running: deque[tuple[_Call, torch.cuda.Event, torch.cuda.Event]] = deque()
        """Stages on a CUDA device whose time is not known yet."""
        self.costs = costs

    def missing_pages(self, sequence: Sequence, end: int, reach: int) -> dict[str, int]:
        """Pages per cache that `reserve` would take."""
        return {name: table.missing(rows) for name, table, rows in self._extents(sequence, end, reach)}

    def reserve(self, sequence: Sequence, end: int, reach: int) -> None:
        """Takes the pages for clean rows up to `end` and cells up to `reach`. An undecided byte counts as closing a
        patch, and one more patch may be closed for a block.

        Raises OutOfPages, with nothing taken from the pool that lacked them.
        """
        for name, table, rows in self._extents(sequence, end, reach):
            if borrowed := table.own():
                self._caches.copy_page(name, *borrowed)
            table.extend(rows)

    def _extents(self, sequence: Sequence, end: int, reach: int) -> list[tuple[str, BlockTable, int]]:
        patches = sequence.most_patches(end) + (reach > end)
        specs = self._caches.specs
        return [
            (name, table, reach if specs[name].rows_from == "byte" else patches)
            for name, table in sequence.tables.items()
        ]

    @torch.inference_mode()
    def run(self, batch: Seq[Work]) -> Tensor:
        """One step. Returns the wanted logits, (rows, V) float32 on the device: for each work item its wanted clean
        rows, then its cells.

        Afterwards newly decided patch starts are in `sequence.patching`; `settle` must follow once it is known which
        rows stay.
        """
        clean = [w for w in batch if w.num_clean]
        # The encoder does not ask where patches start: the device runs it while the host hears of that.
        decide = self._run_patcher(clean) if clean else None
        states = self._run_encoder(batch)
        if decide:
            decide()
        for w in batch:
            w.decode_from = self._first_to_decode(w)
            w.logits_from = max(w.logits_from, w.decode_from)
        with self._timed("global") as call:
            self._close_patches(clean, call)
        return self.decode(self.plan_decoder(batch), states=states)

    def settle(self, sequence: Sequence) -> None:
        """Gives back pages behind every window, and those of rows and patches that did not come to be."""
        n = sequence.num_computed
        patch = sequence.patch_of(n)
        for name, table in sequence.tables.items():
            table.trim_before(self._caches.first_live(name, n, patch, sequence.patching.starts[patch]))
            table.cut(patch if self._caches.specs[name].rows_from == "patch" else n)

    def _run_patcher(self, clean: Seq[Work]) -> Callable[[], None]:
        """Returns what waits for the decisions and gives them to the sequences."""
        with self._timed("patcher") as call:
            ids = [token for w in clean for token in w.sequence.ids[w.start : w.end]]
            call.rows = len(ids)
            spans = [self._causal_span("patcher", w.sequence, w.start, w.end) for w in clean]
            padded = self.executor.rows(len(ids))
            plan = self._plan("patcher", spans, spans, padded)
            undecided, previous = self._undecided(clean, padded)

            def stage(t: Mapping[str, Tensor]) -> Tensor:
                entropies = self._model.patcher(t["ids"], self._caches.patcher, plan.on_device(t, "plan"))
                before = t["previous"].view(torch.float64).float()
                opens = self._model.kernels.boundaries(entropies, before, t["undecided"], self._rule)
                return torch.stack((entropies, opens.to(entropies.dtype)))

            arrays = {
                "ids": padded_array(ids, padded),
                "undecided": undecided,
                "previous": previous,
                **plan.named("plan"),
            }
            decisions = Readback(self._run("patcher", stage, padded, arrays, plan))
            self._account(call, clean, [w.start for w in clean], [w.num_clean for w in clean], spans)

        def decide() -> None:
            entropies, opens = decisions.wait().tolist()
            for w, (row, count, _, _) in zip(clean, undecided.tolist(), strict=False):
                w.sequence.patching.take(entropies[row : row + count], opens[row : row + count])

        return decide

    def _run_encoder(self, batch: Seq[Work]) -> Tensor | None:
        """States of the clean rows of all, and of their cells where the decoder reads them."""
        rows = [w for w in batch if w.num_clean or (self.cells_are_encoded and w.num_cells)]
        if not rows:
            return None
        with self._timed("encoder") as call:
            windows: list[list[int]] = []
            spans: list[Span] = []
            writes: list[Span] = []
            counts: list[int] = []
            for w in rows:
                text, start, end = w.sequence.ids, w.start, w.end
                if not w.num_clean:
                    start, end = w.cells_start, w.cells_start + w.num_cells
                    text = self._text_of_cells(w)
                    windows += ngram_windows(text, len(text) - w.num_cells, len(text), self._ngram_width)
                else:
                    windows += ngram_windows(text, start, end, self._ngram_width)
                counts.append(end - start)
                spans.append(self._causal_span("encoder", w.sequence, start, end))
                writes.append(Span(w.sequence.tables["open"], start, range(start, end), ()))
            num_rows = call.rows = len(windows)
            padded = self.executor.rows(num_rows)
            windows += [[0] * self._ngram_width] * (padded - num_rows)
            plan, opened = self._plan("encoder", spans, spans, padded), self._plan("open", writes, [], 0)

            def stage(t: Mapping[str, Tensor]) -> Tensor:
                return self._model.encoder(
                    t["windows"],
                    self._caches.encoder,
                    plan.on_device(t, "plan"),
                    self._caches.open_states,
                    self._caches.open_kv,
                    opened.on_device(t, "open"),
                )

            arrays = {"windows": np.array(windows, dtype=np.int64), **plan.named("plan"), **opened.named("open")}
            states = self._run("encoder", stage, padded, arrays, plan)
            starts = [span.start for span in spans]
            self._account(call, rows, starts, counts, spans)
            return states

    def _text_of_cells(self, w: Work) -> list[int]:
        """A draft's cells and as much text before them as an n-gram reaches, all of it if that is less."""
        assert w.call
        known = len(w.sequence.ids)
        before = max(w.call.start - self._ngram_width, 0)
        drafts = list(w.call.drafts[max(before - known, 0) : w.call.start - known]) if w.call.start > known else []
        return [*w.sequence.ids[before : w.call.start], *drafts, *w.cells]

    def plan_decoder(self, batch: Seq[Work]) -> "DecoderRows":
        """The batch's rows of the decoder stage."""
        ids: list[int] = []
        state_rows: list[int] = []
        spans: list[Span] = []
        latent_page: list[int] = []
        latent_offset: list[int] = []
        wanted: list[int] = []
        decoding: list[Work] = []
        counts: list[int] = []
        encoded = 0
        for w in batch:
            begin = w.decode_from if w.num_clean else w.end
            cells = w.cells
            count = w.end - begin + len(cells)
            encoded += w.num_clean or len(cells)
            state_rows += range(encoded - count, encoded)
            if not count:
                continue
            wanted += range(len(ids) + w.logits_from - begin, len(ids) + count)
            ids += [*w.sequence.ids[begin : w.end], *cells]
            spans.append(self._decoder_span(w, begin))
            self._add_latents(w, begin, latent_page, latent_offset)
            decoding.append(w)
            counts.append(count)
        padded = self.executor.rows(len(ids)) if ids else 0
        padded_wanted = self.executor.parts(self.executor.rows(len(wanted)), padded) if wanted else 0
        plan = self._plan("decoder", spans, spans, padded)
        arrays = {
            "rows": padded_array(state_rows if self.cells_are_encoded else ids, padded),
            "page": padded_array(latent_page, padded),
            "offset": padded_array(latent_offset, padded),
            "wanted": padded_array(wanted, padded_wanted),
            **plan.named("plan"),
        }
        return DecoderRows(padded, arrays, plan, len(ids), len(wanted), decoding, spans, counts)

    @property
    def cells_are_encoded(self) -> bool:
        """Whether the decoder reads the encoder's states, so that cells go through the encoder too."""
        return self._config.decoder_input == "encoder"

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @torch.inference_mode()
    def decode(self, rows: "DecoderRows", ids: Tensor | None = None, states: Tensor | None = None) -> Tensor:
        """One pass of the decoder: the wanted logits, (rows, V) float32.

        ids (rows,): instead of those that the plan was made with. states: the encoder's, where the decoder reads them.
        """
        if not rows.num_rows:
            return torch.empty((0, self._config.vocab_size), device=self.device)
        with self._timed("decoder") as call:
            call.rows = rows.num_rows
            plan, wanted = rows.plan, rows.num_wanted
            decoder, reads_states = self._model.decoder, self.cells_are_encoded

            def stage(t: Mapping[str, Tensor]) -> Tensor:
                x = t["states"].index_select(0, t["rows"]) if reads_states else t["ids"] if "ids" in t else t["rows"]
                return decoder(
                    x,
                    self._caches.latent,
                    t["page"],
                    t["offset"],
                    self._caches.decoder,
                    plan.on_device(t, "plan"),
                    t["wanted"],
                )

            tensors = {}
            if reads_states:
                assert states is not None
                tensors["states"] = states
            elif ids is not None:
                tensors["ids"] = pad(ids, (0, len(rows.arrays["rows"]) - len(ids)))
            out = self._run("decoder", stage, rows.padded, rows.arrays, plan, tensors=tensors)
            self._account(call, rows.works, [span.start for span in rows.spans], rows.counts, rows.spans)
            if not wanted:
                return out.new_empty((0, self._config.vocab_size), dtype=torch.float32)
            return out[:wanted]

    def _undecided(self, clean: Seq[Work], padded: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows behind which a patch may start, as `kernels.boundary` takes them, and the entropies before them, in
        float64 bits. A recomputed byte was decided before: frozen."""
        length = self.executor.parts(len(clean), padded)
        spans, previous = np.zeros((length, 4), dtype=np.int64), np.zeros(length)
        row = 0
        for i, w in enumerate(clean):
            patching = w.sequence.patching
            known = min(max(patching.decided - w.start, 0), w.num_clean)
            spans[i] = row + known, w.num_clean - known, patching.decided, patching.starts[-1]
            previous[i] = patching.last_entropy
            row += w.num_clean
        return spans, previous.view(np.int64)

    def _first_to_decode(self, w: Work) -> int:
        """Drafted rows are exact up to the first that closes a patch: it reads a latent that was not there."""
        if w.call is None or w.call.decoded <= w.start:
            return w.start
        starts = w.sequence.patching.starts
        closing = bisect_right(starts, w.start)
        first = starts[closing] - 1 if closing < len(starts) else w.end
        return min(first, w.call.decoded)

    def _first_seen(self, sequence: Sequence, byte: int, window: int | None) -> int:
        first = 0 if window is None else max(byte - window + 1, 0)
        return max(first, sequence.document_start(byte)) if self._isolate else first

    def _causal_span(self, cache: str, sequence: Sequence, start: int, end: int) -> Span:
        window = self._caches.specs[cache].window
        first = [self._first_seen(sequence, byte, window) for byte in range(start, end)]
        return Span(sequence.tables[cache], start, first, range(start, end))

    def _decoder_span(self, w: Work, begin: int) -> Span:
        """Clean rows and causal cells see what is before them; a block's cells see the whole block too."""
        start = begin if begin < w.end else w.cells_start
        end = start + w.end - begin + w.num_cells
        span = self._causal_span("decoder", w.sequence, start, end)
        if not w.num_block:
            return span
        return Span(span.table, start, span.first, [*range(start, end - w.num_block), *[end - 1] * w.num_block])

    def _plan(self, cache: str, writes: list[Span], queries: list[Span], padded_queries: int) -> Plan:
        return plan_attention(writes, queries, self._tilings[cache], self.executor, padded_queries)

    def _run(
        self,
        name: str,
        stage: Stage,
        rows: int,
        arrays: Arrays,
        *plans: Plan,
        tensors: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Tensor:
        return self.executor.run(name, stage, rows, arrays, tensors, tuple(plan.most_segments for plan in plans))

    def _close_patches(self, clean: Seq[Work], call: "_Call") -> None:
        """Encoder cross-attention and global stage for every patch whose last byte is among the rows, and for open
        ones that a block is to read as if they ended here."""
        slots = self._config.slots
        open_size, latent_size = (self._caches.specs[name].page_size for name in ("open", "latent"))
        queries: list[Span] = []
        patch_rows: list[Span] = []
        byte_page: list[int] = []
        byte_offset: list[int] = []
        latent_page: list[int] = []
        latent_offset: list[int] = []
        bounds = [0]
        closing: list[Work] = []
        begins: list[int] = []
        for w in clean:
            sequence = w.sequence
            begin, end = sequence.patch_of(w.start), sequence.patch_of(w.end)
            starts = sequence.patching.starts[begin : end + 1]
            sequence.note_patch_documents(begin, end)
            if w.closes and starts[-1] < w.end:
                starts.append(w.end)
            if len(starts) == 1:
                continue
            closing.append(w)
            # A patch belongs to generation if its last byte does; `_account` wants rows that count behind one another.
            begins.append(w.counted_from - sum(behind <= w.counted_from for behind in starts[1:]))
            opened, latent = sequence.tables["open"], sequence.tables["latent"]
            for patch, (first, behind) in enumerate(pairwise(starts), begin):
                queries.append(Span(opened, 0, [first] * slots, [behind - 1] * slots))
                bounds.append(bounds[-1] + behind - first)
                for byte in range(first, behind):
                    byte_page.append(opened.pages[byte // open_size - opened.first])
                    byte_offset.append(byte % open_size)
                latent_page += [latent.pages[patch // latent_size - latent.first]] * slots
                latent_offset += range(patch % latent_size * slots, (patch % latent_size + 1) * slots)
            patches = range(begin, begin + len(starts) - 1)
            seen = [sequence.patch_document_start(p) if self._isolate else 0 for p in patches]
            patch_rows.append(Span(sequence.tables["global"], begin, seen, patches))
        num_patches = call.rows = len(bounds) - 1
        if not num_patches:
            return
        # Padding patches have no bytes and leave their latent in the scratch page.
        padded = self.executor.rows(num_patches)
        pooling = self._plan("open", [], queries, padded * slots)
        plan = self._plan("global", patch_rows, patch_rows, padded)
        num_bytes = self.executor.pages(len(byte_page))

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
            "byte_page": padded_array(byte_page, num_bytes),
            "byte_offset": padded_array(byte_offset, num_bytes),
            "bounds": np.array(bounds + bounds[-1:] * (padded - num_patches), dtype=np.int64),
            "page": padded_array(latent_page, padded * slots),
            "offset": padded_array(latent_offset, padded * slots),
            **pooling.named("open"),
            **plan.named("plan"),
        }
        self._run("global", stage, padded * slots, arrays, pooling, plan)
        counts = [len(span.first) for span in patch_rows]
        self._account(call, closing, begins, counts, patch_rows)

    def _add_latents(self, w: Work, begin: int, page: list[int], offset: list[int]) -> None:
        """Which latent each row reads.

        Byte j, which predicts byte j + 1, reads the latent of the patch before the one that holds byte j + 1. Cells
        read the newest latent there is, or that of the open patch if it was closed for them.
        """
        sequence = w.sequence
        table, size = sequence.tables["latent"], self._caches.specs["latent"].page_size
        patches = [sequence.patch_of(byte + 1) - 1 for byte in range(begin, w.end)]
        if w.num_cells:
            newest = sequence.patch_of(w.end) - 1
            if w.closes and sequence.patching.starts[-1] < w.end:
                newest += 1
            patches += [newest] * w.num_cells
        page += [table.pages[patch // size - table.first] for patch in patches]
        offset += [patch % size * self._config.slots for patch in patches]

    def _account(
        self, call: "_Call", works: Seq[Work], positions: Seq[int], counts: Seq[int], spans: Seq[Span]
    ) -> None:
        """Charges a call to its sequences: a share of the weights by rows, and what each looks up itself.

        Rows from `positions` on; those before `Work.counted_from` are nobody's generation.
        """
        stage, total = call.stage, sum(counts)
        weights, kv_row, per_row = (part[stage] for part in (self._bytes.weights, self._bytes.kv_row, self._bytes.row))
        for w, position, count, span in zip(works, positions, counts, spans, strict=True):
            looked_at = max(span.last) + 1 - min(span.first)
            read = weights * count / total + count * per_row + looked_at * kv_row
            self.counts.bytes_read[stage] += read
            counted = count - max(0, min(count, w.counted_from - position))
            if counted:
                cost = w.sequence.cost
                cost.calls[stage] += 1
                cost.rows[stage] += counted
                cost.bytes_read[stage] += read * counted / count
                call.shares[w.sequence.request.decoder] += counted / total

    @contextmanager
    def _timed(self, stage: str) -> Iterator["_Call"]:
        call = _Call(stage)
        if self.device.type == "cuda":
            # The host is ahead of the device: two marks in its queue tell the time, once they have been passed.
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield call
            end.record()
            self._running.append((call, begin, end))
        else:
            began = time.perf_counter()
            yield call
            self._took(call, time.perf_counter() - began)
        if call.rows:
            self.counts.calls[stage] += 1
            self.counts.rows[stage] += call.rows
        while self._running and self._running[0][2].query():
            earlier, begin, end = self._running.popleft()
            self._took(earlier, begin.elapsed_time(end) / 1000)

    def _took(self, call: "_Call", seconds: float) -> None:
        if call.rows:
            self.counts.seconds[call.stage] += seconds
            for decoder, share in call.shares.items():
                self.counts.decoder_seconds[decoder][call.stage] += seconds * share
            self.costs.saw(call.stage, call.rows, seconds)


@dataclass(slots=True)
class _Call:
    """A pass of a stage: its rows, and which share of them generates for which decoder."""

    stage: str
    rows: int = 0
    shares: dict[str, float] = field(default_factory=lambda: defaultdict(float))
