"""From a step's logits to the results of asks: every drawn byte is what blt would draw at its place of the text.

A place has a random number of its own and the text before it; nothing else enters. So a draft and the row that
verifies it agree whenever their distributions put that number on the same byte, and the outcome does not depend on
which decoder drafted.
"""

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Seq

import numpy as np
from msgspec.structs import replace
from torch import Tensor

from kernels.dispatch import Kernels

from ..config import EOS_ID
from ..decoders import Draft, Result, Verify
from ..grammars import Mask
from ..memory.text import Slots
from ..rows import Rows
from ..sequence import Sequence
from ..transfer import read, to_device
from ..types import Request, SamplingParams, TokenLogprob
from .blocks import BlockPasses, block_tensors
from .sampling import are_distributions, choose, draw, logprobs_of


def results_of(batch: Seq[Rows], logits: Tensor, slots: Slots, kernels: Kernels) -> list[Result | None]:
    """The result of each sequence's ask, None for those that only compute rows; the ids are also in the text. logits:
    as `Stages.run` gives them."""
    drawing = [rows for rows in batch if rows.num_drawn]
    if not drawing:
        return [None] * len(batch)
    logits = _drawn_rows(batch, logits)
    blocks = _Blocks.of(drawing, logits, slots, kernels)
    if blocks:
        logits = logits.index_copy(0, blocks.index, blocks.logits)
    drawn, highest = choose(logits, *_sampling(drawing, logits.shape[1]), kernels)
    verified = _accepted(drawing, drawn, kernels)
    settled = blocks.settle(drawn) if blocks else ()
    _write(drawing, drawn, slots)
    chosen, bests, *more = read(drawn, highest, *verified, *settled)
    accepted = iter(more.pop(0) if verified else [0] * len(drawing))
    cells = zip(*more, strict=True)
    results: list[Result | None] = []
    end = 0
    for rows in batch:
        if not rows.num_drawn:
            results.append(None)
            continue
        begin, end = end, end + rows.num_drawn
        stood = next(accepted)
        # What follows a draft that does not stand was never text.
        known = begin + stood + 1 if isinstance(rows.ask, Verify) else end
        is_fine = are_distributions(bests[begin:known])
        num_top = rows.sequence.request.logprobs if is_fine else None
        scores = [] if num_top is None else logprobs_of(logits[begin:end], chosen[begin:end], num_top)
        result = _result(rows, chosen[begin:end], scores, stood)
        # Also of a row that failed: the slot's next text is compared with what the host knows of it.
        if rows.num_block:
            result = _with_block(rows, result, *next(cells))
            slots.note_read(rows.sequence, rows.reach - rows.num_block, result.ids)
        else:
            slots.note_read(rows.sequence, rows.drawn_places[0], chosen[begin:end])
        results.append(result if is_fine else Result(failed=True))
    return results


def _write(drawing: Seq[Rows], drawn: Tensor, slots: Slots) -> None:
    """Writes what was drawn into the text, but for cells: their block's pass has. A lead's byte is the first cell."""
    index: list[int] = []
    places: list[int] = []
    end = 0
    for rows in drawing:
        end += rows.num_drawn
        at = slots.place(rows.sequence, 0)
        places += [at + place for place in rows.drawn_places[: rows.num_drawn - rows.num_block]]
        index += range(end - rows.num_drawn, end - rows.num_block)
    if len(index) < len(drawn):
        drawn = drawn[to_device(np.array(index, dtype=np.int64), drawn.device)]
    slots.text.ids.index_copy_(0, to_device(np.array(places, dtype=np.int64), drawn.device), drawn)


def score_prompts(batch: Seq[Rows], logits: Tensor) -> None:
    """Gives requests that ask for it the log-probabilities of their prompt's ids, each under the row before it."""
    begin = 0
    for rows in batch:
        if rows.sequence.scores_prompt:
            rows.prompt_scores = _prompt_scores(rows, logits[begin : begin + rows.end - rows.logits_from])
        begin += rows.num_logits


def _prompt_scores(rows: Rows, logits: Tensor) -> list[TokenLogprob]:
    sequence, known = rows.sequence, rows.sequence.output.num_scored
    scores = [] if known else [TokenLogprob(id=sequence.ids[0], logprob=None, top={})]
    first, last = max(rows.start, known + len(scores) - 1), min(rows.end, sequence.num_prompt - 1)
    if first < last:
        chosen, request = sequence.ids[first + 1 : last + 1], sequence.request
        num_top = (request.logprobs or 0) if request.prompt_top is None else request.prompt_top
        scores += logprobs_of(logits[first - rows.start : last - rows.start], chosen, num_top)
    return scores


def _drawn_rows(batch: Seq[Rows], logits: Tensor) -> Tensor:
    """The logits that ids are drawn from; the others are for the scores of prompts."""
    index: list[int] = []
    end = 0
    for rows in batch:
        end += rows.num_logits
        index += range(end - rows.num_drawn, end)
    return logits if len(index) == end else logits[to_device(np.array(index), logits.device)]


def _sampling(
    drawing: Seq[Rows], vocab_size: int
) -> tuple[list[SamplingParams], list[Mapping[int, int]], list[float], list[Mask | None]]:
    """Of each drawn id: its parameters, the generated ids before its place, its random number, which ids it may be."""
    params: list[SamplingParams] = []
    counts: list[Mapping[int, int]] = []
    uniforms: list[float] = []
    allowed: list[Mask | None] = []
    for rows in drawing:
        sequence, num_drawn, sampling = rows.sequence, rows.num_drawn, rows.sequence.request.sampling
        params += [sampling] * (num_drawn - rows.num_block) + [cell_params(sequence.request)] * rows.num_block
        if sampling.temperature or sampling.is_penalised:
            places = rows.drawn_places
            counts += _id_counts(rows, places)
            uniforms += [uniform(sequence, place) for place in places]
        else:
            counts += [sequence.id_counts] * num_drawn
            uniforms += [0.0] * num_drawn
        allowed += _allowed(rows, vocab_size)
    return params, counts, uniforms, allowed


def _allowed(rows: Rows, vocab_size: int) -> Seq[Mask | None]:
    """The ids that may stand at each place; None for all, or where it depends on bytes that are not known yet."""
    sequence, request = rows.sequence, rows.sequence.request
    masks = _grammatical(rows) if sequence.constraint else [None] * rows.num_drawn
    if sequence.num_output >= request.min_tokens:
        return masks
    first, ends = sequence.num_prompt + request.min_tokens, ends_of(request)
    return [
        _without(ends, mask, vocab_size) if place < first else mask
        for mask, place in zip(masks, rows.drawn_places, strict=True)
    ]


def ends_of(request: Request) -> list[int]:
    """The ids that end its text, but not before `min_tokens`."""
    return [*request.stop_ids, *([] if request.ignore_eos else [EOS_ID])]


def _without(ends: Seq[int], mask: Mask | None, vocab_size: int) -> Mask:
    """What is left of a mask without some ids; all of it if that is nothing."""
    left = np.ones(vocab_size, dtype=np.bool_) if mask is None else mask.copy()
    left[ends] = False
    return left if mask is None or left.any() else mask


def _grammatical(rows: Rows) -> Seq[Mask | None]:
    """The ids that a grammar allows at each place: None where it depends on bytes that are not known yet."""
    sequence, known = rows.sequence, list(rows.given)
    assert sequence.constraint
    if sequence.mask_id in known:
        known = known[: known.index(sequence.mask_id)]
    masks = sequence.constraint.allowed(known)
    after = (place - len(sequence.ids) for place in rows.drawn_places)
    return [masks[number] if number < len(masks) else None for number in after]


def _id_counts(rows: Rows, places: Seq[int]) -> list[Mapping[int, int]]:
    """Generated ids before each place: the committed ones and the drafts before it."""
    sequence, sampling = rows.sequence, rows.sequence.request.sampling
    drafts: Seq[int] = ()
    match rows.ask:
        case Verify(drafts) | Draft(drafts) if sampling.is_penalised:
            pass
        case _:
            return [sequence.id_counts] * len(places)
    committed = len(sequence.ids)
    counts: list[Mapping[int, int]] = []
    for place in places:
        count = Counter(sequence.id_counts)
        count.update(drafts[: max(place - committed, 0)])
        counts.append(count)
    return counts


def uniform(sequence: Sequence, place: int) -> float:
    """The random number of a place of the text; 0 if the request draws none."""
    request = sequence.request
    if not request.sampling.temperature:
        return 0.0
    return draw(request.sampling.seed, request.sample_index, place - sequence.num_prompt)


def cell_params(request: Request) -> SamplingParams:
    """How a block's cells are drawn: like all bytes, but with their own top-p if there is one."""
    top_p = request.unmask.top_p if request.unmask else None
    return request.sampling if top_p is None else replace(request.sampling, top_p=top_p)


def _accepted(drawing: Seq[Rows], drawn: Tensor, kernels: Kernels) -> list[Tensor]:
    """For each, how many of the drafts that its rows verify are what was drawn after them (Fast BLT, Verify): (D,)
    int64; nothing if none verifies any."""
    at, rows_of, drafts_of = 0, [], []
    for rows in drawing:
        drafts: Seq[int] = ()
        if isinstance(rows.ask, Verify):
            drafts = rows.ask.drafts[rows.num_skipped :]
        rows_of.append(range(at, at + len(drafts)))
        drafts_of.append(drafts)
        at += rows.num_drawn
    width = max(map(len, drafts_of))
    if not width:
        return []

    def grid(lines: Seq[Seq[int]]) -> Tensor:
        return to_device(np.array([[*line, *[0] * (width - len(line))] for line in lines]), drawn.device)

    lengths = to_device(np.array([len(line) for line in drafts_of]), drawn.device)
    return [kernels.accepted(grid(drafts_of), drawn[grid(rows_of)], lengths)]


def _result(rows: Rows, chosen: list[int], scores: list[TokenLogprob], accepted: int) -> Result:
    if not isinstance(rows.ask, Verify):
        return Result(chosen, scores=scores)
    # Rows that the decoder skipped were exact when they drafted, so the bytes after them stand.
    return Result([chosen[accepted]], rows.num_skipped + accepted, scores=scores[: accepted + 1])


class _Blocks:
    """The blocks of a step, in one pass of `BlockPasses`. index: rows of their cells; logits: what these are
    drawn from."""

    def __init__(self, passes: BlockPasses, index: Tensor, logits: Tensor) -> None:
        self._passes, self.index, self.logits = passes, index, logits

    @classmethod
    def of(cls, drawing: Seq[Rows], logits: Tensor, slots: Slots, kernels: Kernels) -> "_Blocks | None":
        cell_rows: list[int] = []
        end = 0
        for rows in drawing:
            end += rows.num_drawn
            cell_rows += range(end - rows.num_block, end)
        if not cell_rows:
            return None
        index = to_device(np.array(cell_rows), logits.device)
        blocks = [rows for rows in drawing if rows.num_block]
        tensor, width = block_tensors(blocks, len(blocks), slots, logits.device), max(rows.num_block for rows in blocks)
        passes = BlockPasses(kernels, slots.text.ids, tensor, width, mask_id=drawing[0].sequence.mask_id)
        return cls(passes, index, passes.allowed(logits[index]))

    def settle(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks after the pass, and in which pass each cell was settled: (S, B) int64 both."""
        self._passes.settle(self.logits, drawn[self.index])
        ids, when, _ = self._passes.cells
        return ids, when


def _with_block(rows: Rows, result: Result, cells: list[int], settled: list[int]) -> Result:
    """An Unmask's result from that of its rows: a lead's byte is the block's first."""
    size = rows.num_block
    ids, when, scores = cells[:size], settled[:size], result.scores[-size:]
    if len(result.ids) > size:
        ids[0], when[0], scores[:1] = result.ids[0], 0, result.scores[:1]
    return Result(ids, settled=when, scores=scores)
