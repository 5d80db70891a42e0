"""Running ahead: the stages repeat, and the next step begins, before the host reads what the device has drawn.

Every pass finds in the text what the one before has written there (`engine.memory.text`): the next byte of blt, the
next byte of a draft, the cells of a block. So how often stages repeat is only a number:

    Next      patcher, encoder, global, decoder    as many bytes as take `engine.costs.latency.LAUNCH_SECONDS`
    Draft     decoder                              the whole draft, then patcher and encoder of its verification
    Unmask    decoder                              as many passes as blocks have needed lately

All sequences of a batch must ask for the same kind. Else every pass is a separate step, which they share; so is every
pass of a draft where the decoder reads the encoder's states.
"""

import time
from collections import Counter, deque
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from kernels.dispatch import Kernels

from ..config import EOS_ID, Policy
from ..costs.latency import MOST_LAUNCHED, READBACK
from ..costs.ledger import Launch, Ledger, Share
from ..decoders import Draft, Next, Result, Unmask
from ..memory.memory import Memory, Reach
from ..memory.text import Slots
from ..rows import Rows
from ..transfer import read, read_async, to_device
from .blocks import BlockPasses, block_tensors
from .decoder import DecoderRows
from .launch import padded_tensor
from .results import cell_params, uniform
from .sampling import are_distributions, counted, draw_ids, padded_params, penalised, ranked, scores_of
from .stages import Stages

REMEMBERED = 32
"""How many recent blocks predict the passes that the next ones need."""


class Ahead:
    """Runs the steps in which the host need not read every pass. policy: may be replaced at any time; where the host
    computes itself, nothing is gained."""

    def __init__(self, stages: Stages, memory: Memory, ledger: Ledger, kernels: Kernels, policy: Policy) -> None:
        self.policy = policy
        self._stages, self._memory, self._ledger, self._kernels = stages, memory, ledger, kernels
        self._device, self._text_slots = stages.launcher.device, memory.slots
        self._needed: deque[int] = deque(maxlen=REMEMBERED)

    def run(self, batch: Seq[Rows]) -> list[Result] | None:
        """The results of all asks of the batch, or None if the host must read every pass: then nothing has been
        done."""
        kinds = {type(rows.ask) for rows in batch}
        pays = self.policy == "always" or (self.policy == "measured" and self._device.type != "cpu")
        if not pays or len(kinds) > 1 or not all(map(_may_run_ahead, batch)):
            return None
        (kind,) = kinds
        if kind is Next:
            return self._bytes(batch)
        if kind is Draft and not self._stages.encoder.takes_cells:
            return self._drafts(batch)
        return self._blocks(batch) if kind is Unmask else None

    # Bytes of blt.

    def _bytes(self, batch: Seq[Rows]) -> list[Result]:
        count = self._num_bytes(batch)
        ends = [rows.end for rows in batch]
        draws = self._draws(batch, ends, count, len(batch))
        logits = self._stages.run(batch)
        drawn = _Draws(self._kernels, self._text_slots, _num_top(batch) is not None, draws)
        drawn.take(logits)
        passes = [[_rows(rows, rows.end + n) for rows in batch] for n in range(count - 1)]
        launches = []
        for each in passes:
            launched, logits = self._stages.run_unread(each)
            launches.append(launched)
            drawn.take(logits)
        after = draws["places"][:-1]
        text = self._text_slots.text
        opens = text.patch[after + 1] - text.patch[after]
        readback = read_async(text.entropies[after], opens, *self._drawn(batch, draws, drawn.out()))
        going_on = [rows for rows in batch if rows.most_passes(count + 1) > count]
        self._begin([_rows(rows, rows.end + count - 1) for rows in going_on], len(batch))
        entropies, opened, *found = readback()
        results = [self._result(rows, number, rows.end, *found) for number, rows in enumerate(batch)]
        for number, (each, launched) in enumerate(zip(passes, launches, strict=True)):
            served = [len(result.ids) > number + 1 for result in results]
            _decide(each, served, entropies[number], opened[number])
            self._charge(each, launched, served, opened[number])
        return results

    def _num_bytes(self, batch: Seq[Rows]) -> int:
        """How many bytes all sequences have room and pages for, and one at least."""
        most = min(rows.most_passes(MOST_LAUNCHED) for rows in batch)
        if self.policy == "measured":
            most = min(most, self._ledger.latency.launch_bytes(len(batch)))
        if most <= 1 or not all(map(self._stages.global_.in_one_document, batch)):
            return 1
        reaches = [Reach(rows.sequence, rows.end + most - 1, rows.end + most - 1) for rows in batch]
        return most if self._memory.reserve_all(reaches) else 1

    def _charge(self, batch: Seq[Rows], launches: list[Launch], served: list[bool], opens: list[int]) -> None:
        """Charges a pass of all stages to the sequences that it served. opens: of each row, whether the byte after it
        starts a patch."""
        closed: list[Share] = []
        for rows, serves, starts in zip(batch, served, opens, strict=True):
            ends = [rows.end] if serves and starts else []
            if share := self._stages.global_.share(rows, rows.sequence.patch_of(rows.start), ends):
                closed.append(share)
        for launch in launches:
            shares = closed
            if launch.stage != "global":
                shares = [share for share, serves in zip(launch.shares, served, strict=True) if serves]
            elif closed:
                launch.num_rows = len(closed)
            else:
                launch.recorded = True  # The device skipped it: its time says nothing.
            self._ledger.took(launch, *([shares] if shares else []))

    # Drafts.

    def _drafts(self, batch: Seq[Rows]) -> list[Result] | None:
        """None if only one pass is the same for all."""
        asks = [rows.ask for rows in batch if isinstance(rows.ask, Draft)]
        count = min(ask.at_most for ask in asks)
        if count == 1:
            return None
        decoder = self._stages.decoder
        plans = [
            decoder.plan([replace(rows, cells_start=rows.cells_start + n) for rows in batch]) for n in range(count)
        ]
        firsts = [rows.cells_start + 1 for rows in batch]
        draws = self._draws(batch, firsts, count, plans[0].padded)
        scored = _num_top(batch) is not None
        begin = partial(_Draws, self._kernels, self._text_slots, scored)
        launch, out = decoder.launch_passes("draft scored" if scored else "draft", plans, 1, draws, begin)
        self._ledger.took(launch, *(plan.shares for plan in plans))
        readback = read_async(*self._drawn(batch, draws, out))
        if all(not ask.known and ask.at_most == count for ask in asks):
            self._begin([_rows(rows, rows.end, 1 + count) for rows in batch], len(batch))
        found = readback()
        return [self._result(rows, number, firsts[number], *found) for number, rows in enumerate(batch)]

    # Blocks.

    def _blocks(self, batch: Seq[Rows]) -> list[Result] | None:
        """The results once one of the blocks is done; None if a block has a lead, which only runs in the first pass, or
        needs scores, which are kept of single passes."""
        asks = [rows.ask for rows in batch if isinstance(rows.ask, Unmask)]
        if any(ask.lead for ask in asks) or _num_top(batch) is not None:
            return None
        mask, logits = batch[0].sequence.mask_id, None
        results = [Result(list(ask.block), settled=[-1] * len(ask.block), passes=0) for ask in asks]
        if any(rows.num_text for rows in batch):
            # The first pass brings rows of the text along; later ones do not.
            logits = self._stages.run(batch)
            batch = [_without_text(rows) for rows in batch]
        planned = self._stages.decoder.plan(batch)
        tensors, width = self._cells(batch, planned.padded), max(rows.num_block for rows in batch)
        begin = partial(_Cells, self._kernels, self._text_slots, mask, width)
        # How many passes, and what the host has to read of them.
        outs: list[tuple[int, Tensor]] = []
        if logits is not None:
            cells = begin(tensors)
            cells.take(padded_tensor(logits, planned.padded))
            outs = [(1, cells.out())]
        while all(mask in result.ids and not result.failed for result in results):
            began, done = time.perf_counter(), results[0].passes + len(outs)
            launch = None
            if passes := self._num_passes(results[0].passes, planned, asks) - len(outs):
                launch, out = self._stages.decoder.launch_passes(f"unmask {width}", [planned], passes, tensors, begin)
                outs.append((passes, out))
            for (number, _), found in zip(outs, read(*(out for _, out in outs)), strict=True):
                results = _after(results, found, number, mask)
            if launch:
                self._charge_blocks(launch, planned, results, done, began if len(outs) == 1 else None)
            outs = []
        for rows, result, ask in zip(batch, results, asks, strict=True):
            self._text_slots.note_read(rows.sequence, rows.cells_start, result.ids)
            if mask not in result.ids and set(ask.block) == {mask} and not result.failed:
                self._needed.append(result.passes)
        return results

    def _charge_blocks(
        self, launch: Launch, planned: DecoderRows, results: Seq[Result], done: int, began: float | None
    ) -> None:
        """Charges a launch before which `done` passes had run. began: when its planning did, if nothing else was read
        with it."""
        if began is not None and not launch.recorded:
            # All it took but the passes: what it takes to launch and read.
            seconds = max(time.perf_counter() - began - self._ledger.seconds(launch), 0.0)
            self._ledger.latency.observe(READBACK, planned.num_rows, seconds)
        # Passes over blocks that were done are padding, and charged to no request.
        last = max(result.passes for result in results)
        served = (
            [share for share, result in zip(planned.shares, results, strict=True) if result.passes > number]
            for number in range(done, last)
        )
        self._ledger.took(launch, *served)

    def _num_passes(self, known: int, planned: DecoderRows, asks: Seq[Unmask]) -> int:
        """How many passes to launch before reading back. Only the device knows whether a block is done: while the host
        reads that, the device is idle, but a superfluous pass takes time too. known: passes that were not enough."""

        def chance(number: int) -> float:
            """The probability that one of the blocks needs its pass `number`, counted from 1, as recent blocks did."""
            share = sum(passes >= number for passes in self._needed) / len(self._needed)
            return 1 - (1 - share) ** len(asks)

        # A block needs at most one pass per cell, and only one by the rule that settles all at once.
        most = max(1 if ask.rule.rule == "one_step" else len(ask.block) for ask in asks)
        passes = 1
        if self._needed and (undone := chance(known + 1)):
            readback = self._ledger.latency.readback(planned.num_rows)
            needed = 0.0 if self.policy == "always" else undone / (1 + readback)
            while known + passes < most and chance(known + 1 + passes) >= needed:
                passes += 1
        return passes

    # What passes need.

    def _begin(self, following: Seq[Rows], size: int) -> None:
        """Launches the first half of the next step, if all of the batch go on and have pages."""
        reaches = [Reach(rows.sequence, rows.end, rows.end) for rows in following]
        if len(following) == size and self._memory.reserve_all(reaches):
            self._stages.begin(following)

    def _draws(self, batch: Seq[Rows], firsts: list[int], count: int, padded: int) -> dict[str, Tensor]:
        """How `count` bytes of each sequence are drawn, and where they go: from a position on. See `_Draws`."""
        padding = padded - len(batch)
        sampling = [rows.sequence.request.sampling for rows in batch]
        at = [self._text_slots.place(rows.sequence, first) for rows, first in zip(batch, firsts, strict=True)]
        places = np.zeros((count, padded), dtype=np.int64)
        places[:, : len(at)] = np.array(at) + np.arange(count)[:, None]
        uniforms = [
            [uniform(rows.sequence, first + n) for rows, first in zip(batch, firsts, strict=True)] + [0.0] * padding
            for n in range(count)
        ]
        vocab_size, device = self._stages.decoder.vocab_size, self._device
        tensors = padded_params(sampling, [{}] * len(batch), uniforms, padded, vocab_size, device)
        if any(params.is_penalised for params in sampling):
            tensors |= counted(sampling, [_counts(rows) for rows in batch], padded, vocab_size, device)
        tensors["places"] = to_device(places, device)
        return tensors

    def _drawn(self, batch: Seq[Rows], draws: Mapping[str, Tensor], out: Tensor) -> list[Tensor]:
        """What the host reads of bytes that were drawn. out: of `_Draws`."""
        ids, num_top = self._text_slots.text.ids[draws["places"]], _num_top(batch)
        return [ids, out[..., 0], *(() if num_top is None else ranked(out[..., 1:], ids, num_top))]

    def _result(self, rows: Rows, number: int, first: int, *drawn: Seq[Seq[Any]]) -> Result:
        """The bytes of a sequence, from position `first` on. drawn: `_drawn`, read."""
        ids, highest, *scored = ([of[number] for of in each] for each in drawn)
        self._text_slots.note_read(rows.sequence, first, ids)
        if not are_distributions(highest):
            return Result(failed=True)
        num_top = rows.sequence.request.logprobs
        if isinstance(rows.ask, Next) and EOS_ID in ids:
            # A document ends with an EOS.
            ids = ids[: ids.index(EOS_ID) + 1]
        return Result(ids, scores=[] if num_top is None else scores_of(ids, num_top, *scored))

    def _cells(self, batch: Seq[Rows], padded: int) -> dict[str, Tensor]:
        """Where the cells of blocks are, and how they are drawn, all laid end to end."""
        cells = [(rows.sequence, rows.cells_start + cell) for rows in batch for cell in range(rows.num_block)]
        params = [cell_params(sequence.request) for sequence, _ in cells]
        # Cells are not counted: no order is given among them.
        counts = [sequence.id_counts for sequence, _ in cells]
        uniforms = [uniform(*cell) for cell in cells] + [0.0] * (padded - len(cells))
        tensors = padded_params(params, counts, uniforms, padded, self._stages.decoder.vocab_size, self._device)
        num_blocks = self._stages.launcher.executor.rows(len(batch))
        tensors["blocks"] = block_tensors(batch, num_blocks, self._text_slots, self._device)
        return tensors


class _Draws:
    """Passes that each draw a byte of every row and write it into the text. In tensors only: "places" (passes, R)
    int64, "uniforms" (passes, R) if any row needs them, and those of `engine.step.sampling`. scored: whether logits are
    wanted."""

    def __init__(self, kernels: Kernels, slots: Slots, scored: bool, tensors: Mapping[str, Tensor]) -> None:
        self._kernels, self._ids, self._tensors = kernels, slots.text.ids, tensors
        self._scored, self._outs = scored, list[Tensor]()
        self._counts = tensors.get("counts")

    def take(self, logits: Tensor) -> None:
        number, uniforms, tensors = len(self._outs), self._tensors.get("uniforms"), self._tensors
        own = None if uniforms is None else uniforms[number]
        if self._counts is not None:
            tensors = penalised(tensors, self._counts)
        ids, highest = draw_ids(logits, tensors, own, self._kernels)
        if self._counts is not None:
            once_more = self._counts.gather(1, ids[:, None]).clamp(min=0) + 1
            self._counts = self._counts.scatter(1, ids[:, None], once_more)
        self._ids.index_copy_(0, self._tensors["places"][number], ids)
        self._outs.append(torch.cat([highest[:, None], logits], 1) if self._scored else highest[:, None])

    def out(self) -> Tensor:
        """The largest logit of each row, then all that are wanted: (passes, R, 1 or 1 + V)."""
        return torch.stack(self._outs)


class _Cells(BlockPasses):
    """Passes that each draw all cells and settle some. tensors: "blocks" of `block_tensors`, "uniforms" (C,) if a cell
    needs them, and those of `engine.step.sampling.row_params`."""

    def __init__(self, kernels: Kernels, slots: Slots, mask_id: int, width: int, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(kernels, slots.text.ids, tensors["blocks"], width, mask_id=mask_id)
        self._tensors = tensors

    def take(self, logits: Tensor) -> None:
        allowed = self.allowed(logits)
        drawn, _ = draw_ids(allowed, self._tensors, self._tensors.get("uniforms"), self._kernels)
        self.settle(allowed, drawn)

    def out(self) -> Tensor:
        return self.cells


def _decide(batch: Seq[Rows], served: list[bool], entropies: list[float], opens: list[int]) -> None:
    """Tells the sequences that a pass served what the patcher decided after their rows."""
    for rows, serves, entropy, starts in zip(batch, served, entropies, opens, strict=True):
        if serves:
            rows.sequence.decide([entropy], [bool(starts)])


def _may_run_ahead(rows: Rows) -> bool:
    """Before `min_tokens` the host bars ids at each place."""
    return rows.may_run_ahead and rows.sequence.num_output >= rows.sequence.request.min_tokens


def _counts(rows: Rows) -> Mapping[int, int]:
    """How often each id was generated before the byte that is drawn next, known drafts included."""
    counts = Counter(rows.sequence.id_counts)
    counts.update(rows.given)
    return counts


def _num_top(batch: Seq[Rows]) -> int | None:
    """How many of the likeliest ids a batch needs; None without scores."""
    return max((n for rows in batch if (n := rows.sequence.request.logprobs) is not None), default=None)


def _rows(rows: Rows, start: int, count: int = 1) -> Rows:
    """Rows of the text for bytes that only the device knows."""
    return Rows(
        sequence=rows.sequence,
        start=start,
        end=start + count,
        ask=rows.ask,
        drawn_from=start,
        logits_from=start,
        decode_from=start,
        counted_from=rows.counted_from,
    )


def _without_text(rows: Rows) -> Rows:
    """The same block, once the text before it has run."""
    end = rows.end
    return replace(rows, start=end, logits_from=end, decode_from=end, counted_from=0)


def _after(blocks: Seq[Result], out: Seq[list[list[int]]], passes: int, mask: int) -> list[Result]:
    """Blocks after `passes` more passes. out: of `_Cells`."""
    after = []
    for block, ids, when, bad in zip(blocks, *out, strict=False):
        size = len(block.ids)
        settled = [now + block.passes if now >= 0 else then for now, then in zip(when, block.settled, strict=False)]
        number = block.passes + passes if mask in ids[:size] else 1 + max(settled)
        failed = block.failed or any(bad[:size])
        after.append(Result(ids[:size], settled=settled[:size], passes=number, failed=failed))
    return after
