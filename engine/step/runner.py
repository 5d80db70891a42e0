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
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from kernels.attention import LARGE_TILE
from kernels.planning import Spans, Tiling

from ..config import BYTE_OFFSET
from ..costs.accounting import StageBytes
from ..costs.latency import StageCosts
from ..counts import STAGES
from ..decoders import Call
from ..memory.caches import Caches
from ..memory.pages import BlockTable
from ..memory.prefix import PrefixCache
from ..model import Model, RowFloors
from ..model.encoder import ngram_windows
from ..patching import boundary_rule
from ..sequence import Sequence, pieces, start_of
from .ahead.policy import RunAhead
from .graphs import Eager, Stage
from .plan import Arrays, Plan, padded_array, plan_attention
from .transfer import Readback, marked, sent

NO_DOCUMENTS = [0]
"""Where documents begin if they are not told apart."""
STAND_IN = BYTE_OFFSET
"""What the host holds for an id that only the device knows."""
NOTHING: Mapping[str, Tensor] = MappingProxyType({})


class Work(msgspec.Struct):
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

    num_clean: int = 0
    num_cells: int = 0
    num_block: int = 0

    def __post_init__(self) -> None:
        self.decode_from = self.start
        self.num_clean = self.end - self.start
        if self.call:
            self.num_block = len(self.call.block)
            self.num_cells = len(self.call.causal) + self.num_block

    @property
    def num_wanted(self) -> int:
        return self.end - self.logits_from + self.num_cells

    @property
    def cells(self) -> list[int]:
        return [*self.call.causal, *self.call.block] if self.call else []

    @property
    def cells_start(self) -> int:
        return self.call.start if self.call else self.end

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


class DecoderRows(msgspec.Struct, frozen=True):
    """Rows of the decoder stage, planned: whose they are, how many each has, and of how many logits are wanted."""

    padded: int
    arrays: Arrays
    plan: Plan
    num_rows: int
    num_wanted: int
    works: "list[_Rows]"


class Runner:
    """The model, its caches and the plan of a step."""

    def __init__(
        self,
        model: Model,
        caches: Caches,
        prefixes: PrefixCache | None,
        floors: RowFloors,
        executor: Eager,
        *,
        isolate: bool,
        device: torch.device,
        stage_bytes: StageBytes,
        costs: StageCosts,
        ahead: RunAhead,
    ) -> None:
        self._model = model
        self._config = model.config
        self._caches, self._prefixes = caches, prefixes
        self.executor = executor
        large = model.kernels.tile or LARGE_TILE
        # Every slot sees the whole open patch, and there may be more slots than a patch has bytes.
        self._tilings = {
            name: Tiling(
                floors.tile, large, spec.page_size, 0 if name == "open" else spec.window or 0, split=spec.window is None
            )
            for name, spec in caches.specs.items()
        }
        self._of_patches = {name for name, spec in caches.specs.items() if spec.rows_from == "patch"}
        self._rule = boundary_rule(model.config.patching)
        self._isolate = isolate
        self._isolate_patches = isolate and model.config.isolate_global
        self.device = device
        self._ngram_width = max(model.config.hashes.group_sizes)
        self._bytes = stage_bytes
        self.counts = StageCounts()
        self._started: Started | None = None
        self._running: deque[StageCall] = deque()
        """Stages on a CUDA device whose time is not known yet."""
        self.costs = costs
        self.ahead = ahead

    def can_reserve(self, sequence: Sequence, end: int, reach: int) -> bool:
        """Whether `reserve` will find its pages. Prefixes are forgotten for it, unless that would not be enough."""
        pools = self._caches.pools
        missing = {pools[name]: table.missing(rows) for name, table, rows in self._short(sequence, end, reach)}
        if any(pages > pool.num_free + pool.num_idle for pool, pages in missing.items()):
            return False
        while not all(pool.can_take(pages) for pool, pages in missing.items()):
            if not (self._prefixes and self._prefixes.forget()):
                return False
        return True

    def reserve(self, sequence: Sequence, end: int, reach: int) -> None:
        """Takes the pages for clean rows up to `end` and cells up to `reach`. An undecided byte counts as closing a
        patch, and one more patch may be closed for a block.

        Raises OutOfPages, with nothing taken from the pool that lacked them.
        """
        for name, table, rows in self._short(sequence, end, reach):
            if borrowed := table.own():
                self._caches.copy_page(name, *borrowed)
            table.extend(rows)

    def try_reserve(self, sequence: Sequence, end: int, reach: int) -> bool:
        """`reserve`, if it finds its pages and the rows have a place."""
        if reach > self._caches.max_length or not self.can_reserve(sequence, end, reach):
            return False
        self.reserve(sequence, end, reach)
        return True

    def _short(self, sequence: Sequence, end: int, reach: int) -> list[tuple[str, BlockTable, int]]:
        """The caches that lack pages, and up to which row."""
        patches = sequence.most_patches(end) + (reach > end)
        short = []
        for name, table in sequence.tables.items():
            rows = patches if name in self._of_patches else reach
            if rows > table.capacity:
                short.append((name, table, rows))
        return short

    def run(self, batch: Seq[Work]) -> Tensor:
        """One step. Returns the wanted logits, (rows, V) float32 on the device: for each work item its wanted clean
        rows, then its cells.

        Afterwards newly decided patch starts are in `sequence.patching`; `settle` must follow once it is known which
        rows stay.
        """
        clean = [w for w in batch if w.num_clean]
        # The encoder does not ask where patches start: the device runs it while the host plans and hears of that.
        begun = self._resume(batch, clean)
        decide, states = begun or (self._decide(clean) if clean else None, self._run_encoder(batch))
        skipping = [w for w in batch if w.call and w.call.decoded > w.start]
        rows = None if skipping else self._decoder_rows(batch)
        if decide:
            decide()
        call = self._begin("global")
        self._close_patches(clean, call)
        if call.rows:
            self.finish(call)
        for w in skipping:
            w.decode_from = self._first_to_decode(w, w.call.decoded if w.call else 0)
            w.logits_from = max(w.logits_from, w.decode_from)
        rows = rows or self._decoder_rows(batch)
        self._add_latents(rows)
        return self.decode(rows, states=states)

    def settle(self, sequence: Sequence) -> None:
        """Gives back pages behind every window, and those of rows and patches that did not come to be."""
        n = sequence.num_computed
        patch = sequence.patch_of(n)
        start = sequence.patching.starts[patch]
        # Rows of a step that has been begun are being written.
        end = max(n, self._started.ends.get(id(sequence), 0)) if self._started else n
        for name, table in sequence.tables.items():
            table.settle(self._caches.first_live(name, n, patch, start), patch if name in self._of_patches else end)

    def forget(self, sequence: Sequence) -> None:
        """It gives up its pages: what has been begun of it lies where others may write."""
        if self._started and id(sequence) in self._started.ends:
            self._drop_started()

    def start(self, batch: Seq[Work], windows: Tensor) -> "Started":
        """Launches patcher and encoder of the next step, over clean rows whose ids only the device knows yet: `run`
        takes them up if it is to run these rows, no other clean ones, and no cells that are encoded.

        windows (R, W) int64: the last ids up to each row. The host holds any ids for them, and must say in
        `Started.ids` what they were.
        """
        unpaid: Unpaid = []
        windows = padded_tensor(windows, self.executor.rows(len(windows)))
        decide = self._decide(batch, {"ids": windows[:, -1].contiguous()}, unpaid)
        states = self._run_encoder(batch, {"windows": windows}, unpaid)
        self._drop_started()
        self._started = Started(batch, {id(w.sequence): w.end for w in batch}, decide, states, unpaid)
        return self._started

    def _resume(self, batch: Seq[Work], clean: Seq[Work]) -> "tuple[Callable[[], None], Tensor | None] | None":
        """What `start` has launched, if it was these rows, and no others go through the encoder."""
        started = self._started
        others = self.cells_are_encoded and any(w.num_cells for w in batch)
        if not started or others or not started.is_of(clean):
            self._drop_started()
            return None
        self._started = None
        for call, works in started.unpaid:
            self.charge(call, works)
            self.finish(call)
        return started.decide, started.states

    def _drop_started(self) -> None:
        """What was launched in vain is nobody's."""
        for call, _ in self._started.unpaid if self._started else ():
            self.finish(call)
        self._started = None

    def windows(self, rows: Iterable[tuple[Sequence, int]]) -> Tensor:
        """The last ids up to a byte of each sequence, (S, W) int64."""
        width = self._ngram_width
        ids = [i for sequence, row in rows for i in ngram_windows(sequence.ids, row, row + 1, width)]
        return sent(np.array(ids, dtype=np.int64), self.device).view(-1, width)

    def feed(self, batch: Seq[Work], windows: Tensor, entropies: Tensor, unpaid: "Unpaid") -> Tensor:
        """Feeds a byte to each sequence that only the device knows: the entropies behind them, and whether the bytes
        behind them start patches, (2, S) float32.

        batch: a clean row each, for which the host holds any id. windows (S, W): the last ids up to these bytes.
        entropies (S,): behind the bytes before. unpaid: takes the call.
        """
        padded = self.executor.rows(len(batch))
        previous = padded_tensor(entropies.double(), self.executor.parts(len(batch), padded)).view(torch.int64)
        given = {"ids": padded_tensor(windows[:, -1], padded), "previous": previous}
        return self._run_patcher(batch, given, unpaid)[:, : len(batch)]

    def decode_fed(self, batch: Seq[Work], windows: Tensor, unpaid: "Unpaid") -> Tensor:
        """The logits behind bytes that `feed` was given, (S, V) float32, where no patch starts behind them."""
        padded = padded_tensor(windows, self.executor.rows(len(batch)))
        states = self._run_encoder(batch, {"windows": padded}, unpaid)
        return self.decode(self.plan_decoder(batch), windows[:, -1], states, unpaid)

    def _decide(
        self, clean: Seq[Work], given: Mapping[str, Tensor] = NOTHING, unpaid: "Unpaid | None" = None
    ) -> Callable[[], None]:
        """Runs the patcher. Returns what waits for the decisions and gives them to the sequences."""
        decisions = Readback(self._run_patcher(clean, given, unpaid))

        def decide() -> None:
            entropies, opens = decisions.wait().tolist()
            row = 0
            for w in clean:
                count = w.num_clean
                known = min(max(w.sequence.patching.decided - w.start, 0), count)
                w.sequence.patching.take(entropies[row + known : row + count], opens[row + known : row + count])
                row += count

        return decide

    def _run_patcher(
        self, clean: Seq[Work], given: Mapping[str, Tensor] = NOTHING, unpaid: "Unpaid | None" = None
    ) -> Tensor:
        """The rows' entropies and decisions, as `kernels.boundary` gives them. given: "ids" (rows,) and "previous", if
        these are on the device."""
        call = self._begin("patcher")
        num_rows = call.rows = sum(w.num_clean for w in clean)
        spans = Spans()
        works = [self._add_rows(spans, "patcher", w, w.start, w.end) for w in clean]
        padded = self.executor.rows(num_rows)
        plan = self._plan("patcher", spans, spans, padded)
        undecided, previous = self._undecided(clean, padded)

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            entropies = self._model.patcher(t["ids"], self._caches.patcher, plan.on_device(t, "plan"))
            previous = t["previous"].view(torch.float64)
            return self._model.kernels.boundaries(entropies, previous, t["undecided"], self._rule)

        arrays = {"undecided": undecided, "plan": plan.data}
        if "ids" not in given:
            ids = [token for w in clean for token in w.sequence.ids[w.start : w.end]]
            arrays["ids"] = padded_array(ids, padded)
        if "previous" not in given:
            arrays["previous"] = previous
        decisions = self._run(call, stage, padded, arrays, plan, tensors=given)
        self._settle_up(call, works, unpaid)
        return decisions

    def _run_encoder(
        self, batch: Seq[Work], given: Mapping[str, Tensor] = NOTHING, unpaid: "Unpaid | None" = None
    ) -> Tensor | None:
        """States of the clean rows of all, and of their cells where the decoder reads them. given: "windows" (rows, W),
        if these are on the device."""
        rows = [w for w in batch if w.num_clean or (self.cells_are_encoded and w.num_cells)]
        if not rows:
            return None
        call = self._begin("encoder")
        windows: list[int] = []
        spans, writes = Spans(), Spans()
        works = []
        for w in rows:
            text, start, end = w.sequence.ids, w.start, w.end
            if not w.num_clean:
                start, end = w.cells_start, w.cells_start + w.num_cells
                text = self._text_of_cells(w)
                windows += ngram_windows(text, len(text) - w.num_cells, len(text), self._ngram_width)
            else:
                windows += ngram_windows(text, start, end, self._ngram_width)
            works.append(self._add_rows(spans, "encoder", w, start, end))
            opened = w.sequence.tables["open"]
            writes.add(opened.pages, opened.first, start, end - start, 0)
        num_rows = call.rows = spans.num_rows
        padded = self.executor.rows(num_rows)
        plan, written = self._plan("encoder", spans, spans, padded), self._plan("open", writes, Spans(), 0)

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            return self._model.encoder(
                t["windows"],
                self._caches.encoder,
                plan.on_device(t, "plan"),
                self._caches.open_states,
                self._caches.open_kv,
                written.on_device(t, "open"),
            )

        arrays = {"plan": plan.data, "open": written.data}
        if not given:
            arrays["windows"] = padded_array(windows, padded * self._ngram_width).reshape(padded, -1)
        states = self._run(call, stage, padded, arrays, plan, tensors=given)
        self._settle_up(call, works, unpaid)
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
        rows = self._decoder_rows(batch)
        self._add_latents(rows)
        return rows

    def _decoder_rows(self, batch: Seq[Work]) -> "DecoderRows":
        """All but the latents that they read: those may not be known yet."""
        ids: list[int] = []
        state_rows: list[int] = []
        spans = Spans()
        wanted: list[int] = []
        works: list[_Rows] = []
        encoded = 0
        for w in batch:
            begin = w.decode_from
            cells = w.cells if w.num_cells else []
            count = w.end - begin + w.num_cells
            encoded += w.num_clean or w.num_cells
            state_rows += range(encoded - count, encoded)
            if not count:
                continue
            wanted += range(len(ids) + w.logits_from - begin, len(ids) + count)
            ids += [*w.sequence.ids[begin : w.end], *cells]
            start = begin if begin < w.end else w.cells_start
            # Clean rows and causal cells see what is before them; a block's cells see the whole block too.
            works.append(self._add_rows(spans, "decoder", w, start, start + count, w.num_block))
        padded = self.executor.rows(len(ids)) if ids else 0
        padded_wanted = self.executor.parts(self.executor.rows(len(wanted)), padded) if wanted else 0
        plan = self._plan("decoder", spans, spans, padded)
        arrays = {
            "rows": padded_array(state_rows if self.cells_are_encoded else ids, padded),
            "wanted": padded_array(wanted, padded_wanted),
            "plan": plan.data,
        }
        return DecoderRows(padded, arrays, plan, len(ids), len(wanted), works)

    @property
    def cells_are_encoded(self) -> bool:
        """Whether the decoder reads the encoder's states, so that cells go through the encoder too."""
        return self._config.decoder_input == "encoder"

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    def decode(
        self,
        rows: "DecoderRows",
        ids: Tensor | None = None,
        states: Tensor | None = None,
        unpaid: "Unpaid | None" = None,
    ) -> Tensor:
        """One pass of the decoder: the wanted logits, (rows, V) float32.

        ids (rows,): instead of those that the plan was made with. states: the encoder's, where the decoder reads them.
        """
        if not rows.num_rows:
            return torch.empty((0, self._config.vocab_size), device=self.device)
        call = self._begin("decoder")
        call.rows = rows.num_rows
        plan, wanted = rows.plan, rows.num_wanted
        decoder, reads_states = self._model.decoder, self.cells_are_encoded

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            x = t["states"].index_select(0, t["rows"]) if reads_states else t["ids"] if "ids" in t else t["rows"]
            latents, cache = self._caches.latent, self._caches.decoder
            return decoder(x, latents, t["page"], t["offset"], cache, plan.on_device(t, "plan"), t["wanted"])

        tensors = {}
        if reads_states:
            assert states is not None
            tensors["states"] = states
        elif ids is not None:
            tensors["ids"] = padded_tensor(ids, rows.padded)
        out = self._run(call, stage, rows.padded, rows.arrays, plan, tensors=tensors)
        self._settle_up(call, rows.works, unpaid)
        return out[:wanted] if wanted else out.new_empty((0, self._config.vocab_size), dtype=torch.float32)

    def decode_passes(
        self,
        name: str,
        plans: "Seq[DecoderRows]",
        times: int,
        tensors: Mapping[str, Tensor],
        begin: "Callable[[Mapping[str, Tensor]], PassState]",
    ) -> "tuple[StageCall, Tensor]":
        """Passes of the decoder over cells, so many times with each plan, in one launch; what the last state gives out.

        The caller must `charge` the passes to their works, and `finish` the call. Plans differ in positions alone.
        begin: makes the state from the stage's inputs, which hold `tensors`; name: that of its kind.
        """
        call = self._begin("decoder")
        call.rows, call.passes = plans[0].num_rows, len(plans) * times
        decoder, latents, cache = self._model.decoder, self._caches.latent, self._caches.decoder

        def stage(t: Mapping[str, Tensor]) -> Tensor:
            state = begin(t)
            for number, rows in enumerate(plans):
                plan = rows.plan.on_device(t, f"plan{number}")
                for _ in range(times):
                    state.take(decoder(state.cells, latents, t["page"], t["offset"], cache, plan, t["wanted"]))
            return state.out()

        arrays = {name: plans[0].arrays[name] for name in ("page", "offset", "wanted")}
        arrays |= {f"plan{number}": rows.plan.data for number, rows in enumerate(plans)}
        each = [rows.plan for rows in plans]
        out = self._run(call, stage, plans[0].padded, arrays, *each, tensors=tensors, name=name, times=times)
        return call, out

    def _undecided(self, clean: Seq[Work], padded: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows behind which a patch may start, as `kernels.boundary` takes them, and the entropies before them, in
        float64 bits. A recomputed byte was decided before: frozen."""
        length = self.executor.parts(len(clean), padded)
        spans: list[int] = []
        previous: list[float] = []
        row = 0
        for w in clean:
            patching, count = w.sequence.patching, w.end - w.start
            known = min(max(patching.decided - w.start, 0), count)
            spans += (row + known, count - known, patching.decided, patching.starts[-1])
            previous.append(patching.last_entropy)
            row += count
        padding = length - len(clean)
        return padded_array(spans, 4 * length).reshape(length, 4), np.array(previous + [0.0] * padding).view(np.int64)

    def _first_to_decode(self, w: Work, decoded: int) -> int:
        """Rows before `decoded` are exact up to the first that closes a patch: it read a latent that was not there."""
        starts = w.sequence.patching.starts
        closing = bisect_right(starts, w.start)
        first = starts[closing] - 1 if closing < len(starts) else w.end
        return min(first, decoded)

    def _add_rows(self, spans: Spans, cache: str, w: Work, start: int, end: int, mutual: int = 0) -> "_Rows":
        """Adds rows start..end-1 of a cache of bytes, the last `mutual` of which see each other."""
        sequence, window = w.sequence, self._tilings[cache].window
        table = sequence.tables[cache]
        documents = sequence.documents if self._isolate else NO_DOCUMENTS
        for begin, behind, floor in pieces(documents, start, end):
            spans.add(table.pages, table.first, begin, behind - begin, floor, mutual if behind == end else 0, end - 1)
        lowest, count = start_of(documents, start), end - start
        seen_from = max(start - window + 1, lowest) if window else lowest
        return _Rows(w, count, min(max(end - w.counted_from, 0), count), end - seen_from)

    def _plan(self, cache: str, writes: Spans, queries: Spans, padded_queries: int) -> Plan:
        return plan_attention(writes, queries, self._tilings[cache], self.executor, padded_queries)

    def _run(
        self,
        call: "StageCall",
        stage: Stage,
        rows: int,
        arrays: Arrays,
        *plans: Plan,
        tensors: Mapping[str, Tensor] = NOTHING,
        name: str = "",
        times: int = 1,
    ) -> Tensor:
        """Launches a call. name, times: what else tells it from others of its stage; see `Eager.run`."""
        recorded = self.executor.num_recorded
        key = times, *(plan.shape for plan in plans)

        def launching() -> None:
            call.began = call.began or self._mark()

        out = self.executor.run(name or call.stage, stage, rows, arrays, tensors, key, launching)
        call.recorded = self.executor.num_recorded > recorded
        call.ended = self._mark()
        return out

    def _close_patches(self, clean: Seq[Work], call: "StageCall") -> None:
        """Encoder cross-attention and global stage for every patch whose last byte is among the rows, and for open
        ones that a block is to read as if they ended here."""
        slots = self._config.slots
        open_size, latent_size = (self._caches.specs[name].page_size for name in ("open", "latent"))
        queries, patch_rows = Spans(), Spans()
        byte_page: list[int] = []
        byte_offset: list[int] = []
        latent_page: list[int] = []
        latent_offset: list[int] = []
        bounds = [0]
        works: list[_Rows] = []
        for w in clean:
            sequence = w.sequence
            begin, end = sequence.patch_of(w.start), sequence.patch_of(w.end)
            starts = sequence.patching.starts[begin : end + 1]
            sequence.note_patch_documents(begin, end)
            if w.closes and starts[-1] < w.end:
                starts.append(w.end)
            if len(starts) == 1:
                continue
            opened, latent = sequence.tables["open"], sequence.tables["latent"]
            for patch, (first, behind) in enumerate(pairwise(starts), begin):
                queries.add(opened.pages, opened.first, first, slots, first, slots, behind - 1)
                bounds.append(bounds[-1] + behind - first)
                for byte in range(first, behind):
                    byte_page.append(opened.pages[byte // open_size - opened.first])
                    byte_offset.append(byte % open_size)
                latent_page += [latent.pages[patch // latent_size - latent.first]] * slots
                latent_offset += range(patch % latent_size * slots, (patch % latent_size + 1) * slots)
            end = begin + len(starts) - 1
            table = sequence.tables["global"]
            documents = sequence.patch_documents if self._isolate_patches else NO_DOCUMENTS
            for start, behind, floor in pieces(documents, begin, end):
                patch_rows.add(table.pages, table.first, start, behind - start, floor)
            # A patch belongs to generation if its last byte does.
            counted = sum(behind > w.counted_from for behind in starts[1:])
            works.append(_Rows(w, end - begin, counted, end - start_of(documents, begin)))
        num_patches = call.rows = len(bounds) - 1
        if not num_patches:
            return
        # Padding patches have no bytes and leave their latent in the scratch page.
        padded = self.executor.rows(num_patches)
        pooling = self._plan("open", Spans(), queries, padded * slots)
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
            "open": pooling.data,
            "plan": plan.data,
        }
        self._run(call, stage, padded * slots, arrays, pooling, plan)
        self.charge(call, works)

    def _add_latents(self, rows: "DecoderRows") -> None:
        """Which latent each row reads.

        Byte j, which predicts byte j + 1, reads the latent of the patch before the one that holds byte j + 1. Cells
        read the newest latent there is, or that of the open patch if it was closed for them.
        """
        size, slots = self._caches.specs["latent"].page_size, self._config.slots
        page: list[int] = []
        offset: list[int] = []
        for w, count, _, _ in rows.works:
            sequence, table = w.sequence, w.sequence.tables["latent"]
            patches = [sequence.patch_of(byte + 1) - 1 for byte in range(w.end - count + w.num_cells, w.end)]
            if w.num_cells:
                newest = sequence.patch_of(w.end) - 1
                if w.closes and sequence.patching.starts[-1] < w.end:
                    newest += 1
                patches += [newest] * w.num_cells
            page += [table.pages[patch // size - table.first] for patch in patches]
            offset += [patch % size * slots for patch in patches]
        rows.arrays["page"], rows.arrays["offset"] = padded_array(page, rows.padded), padded_array(offset, rows.padded)

    def _settle_up(self, call: "StageCall", works: "list[_Rows]", unpaid: "Unpaid | None") -> None:
        """Charges and finishes a call that was launched, or leaves that for when it is known whom it served."""
        if unpaid is not None:
            unpaid.append((call, works))
            return
        self.charge(call, works)
        self.finish(call)

    def charge(self, call: "StageCall", works: "Seq[_Rows]") -> None:
        """Counts a pass of a call and charges it to its sequences: a share of the weights by rows, and what each looks
        up itself. works: those that it served."""
        stage, total = call.stage, sum(rows.num_rows for rows in works)
        call.charged += 1
        self.counts.calls[stage] += 1
        self.counts.rows[stage] += total
        weights, kv_row, per_row = (part[stage] for part in (self._bytes.weights, self._bytes.kv_row, self._bytes.row))
        each = weights / total + per_row
        whole = 0.0
        for w, count, counted, looked_at in works:
            read = each * count + looked_at * kv_row
            whole += read
            if counted:
                cost = w.sequence.cost
                cost.calls[stage] += 1
                cost.rows[stage] += counted
                cost.bytes_read[stage] += read * counted / count
                call.shares[w.sequence.request.decoder] += counted / total
        self.counts.bytes_read[stage] += whole

    def _begin(self, stage: str) -> "StageCall":
        # Beside a device the host plans while that has nothing to do, or something else.
        return StageCall(stage, self._mark() if self.device.type == "cpu" else None)

    def finish(self, call: "StageCall") -> None:
        """Takes note of the time of a call whose passes have been charged, as far as they served anybody."""
        if self.device.type == "cpu":
            self._took(call)
            return
        # The host is ahead of the device: two marks in its queue tell the time, once they have been passed.
        self._running.append(call)
        self.hear()

    def stage_seconds(self) -> float:
        """Of all stages, as far as is known by now."""
        self.hear()
        return sum(self.counts.seconds.values())

    def hear(self) -> None:
        """Takes note of the stages on a CUDA device that are done since."""
        while self._running and self._running[0].ended.query():
            self._took(self._running.popleft())

    def _mark(self) -> Any:
        """Now, on the device's clock."""
        if self.device.type == "cpu":
            return time.perf_counter()
        return marked(self.device, timing=True)

    def _took(self, call: "StageCall") -> None:
        seconds = call.seconds
        self.counts.seconds[call.stage] += seconds
        for decoder, share in call.shares.items():
            self.counts.decoder_seconds[decoder][call.stage] += seconds * share / call.charged
        if not call.recorded:
            # What a pass takes does not depend on whom it serves.
            self.costs.saw(call.stage, call.rows, seconds / call.passes)


def padded_tensor(values: Tensor, length: int) -> Tensor:
    """The values (N, ...), and zeros behind them up to `length`; contiguous."""
    return pad(values, (0, 0) * (values.dim() - 1) + (0, length - len(values))).contiguous()


class PassState(Protocol):
    """What goes from one pass of the decoder to the next, in tensors alone, so that it can be recorded."""

    @property
    def cells(self) -> Tensor:
        """The ids that the next pass is fed, (R,)."""
        ...

    def take(self, logits: Tensor) -> None:
        """The end of a pass: logits (R, V)."""
        ...

    def out(self) -> Tensor:
        """What the host wants to know of all passes."""
        ...


class _Rows(NamedTuple):
    """Rows of a work in a call: how many, how many of them belong to generation, how many cache rows they look at."""

    work: Work
    num_rows: int
    counted: int
    looked_at: int


Unpaid = list[tuple["StageCall", list[_Rows]]]
"""Launches that have been charged to nobody yet, and whose rows they have."""


@dataclass(slots=True)
class Started:
    """A step whose patcher and encoder have been launched before its ids were known. ids: those of each work, once they
    are; ends: by sequence, behind its last row; decide: as `Runner.run` needs it; states: the encoder's."""

    works: Seq[Work]
    ends: Mapping[int, int]
    decide: Callable[[], None]
    states: Tensor | None
    unpaid: Unpaid
    ids: Seq[list[int]] = ()

    def is_of(self, clean: Seq[Work]) -> bool:
        """Whether these are the rows, and hold the ids that were fed."""
        if len(clean) != len(self.works) or len(clean) != len(self.ids):
            return False
        return all(
            w.sequence is begun.sequence and w.start == begun.start and w.sequence.ids[w.start : w.end] == ids
            for w, begun, ids in zip(clean, self.works, self.ids, strict=True)
        )


@dataclass(slots=True)
class StageCall:
    """A launch of a stage: its rows, how many passes it makes over them, whether it was recorded for that, how many of
    the passes were charged, and, added up over those, which share of the rows generates for which decoder."""

    stage: str
    began: Any = None
    ended: Any = None
    rows: int = 0
    passes: int = 1
    recorded: bool = False
    charged: int = 0
    shares: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @property
    def seconds(self) -> float:
        """What it took, once it is known to have ended."""
        if isinstance(self.began, float):
            return float(self.ended - self.began)
        return float(self.began.elapsed_time(self.ended)) / 1000
