"""From a step's logits to the results of calls: every wanted row is drawn as blt would draw at its place of the text.

A place has a random number of its own and the text before it; nothing else enters. So a draft and the row that
verifies it agree whenever their laws put that number on the same byte, and the outcome does not depend on who drafted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
from msgspec.structs import replace
from torch import Tensor

from kernels.dispatch import Kernels

from ..decoders import Call, Result
from ..sequence import Sequence as SequenceState
from ..types import Request, SamplingParams
from .blocks import BlockPasses, block_tensors
from .runner import Work
from .sampling import check, choose, draw, logprobs_of
from .transfer import read, sent


class _Draws(msgspec.Struct, frozen=True):
    """The rows of one work that are chosen for: `begin`..`end`-1 of the step's logits, the last `num_block` of them a
    block's cells. `first`: position of the first clean row among them."""

    work: Work
    call: Call
    begin: int
    end: int
    first: int

    @classmethod
    def of(cls, w: Work, at: int) -> "_Draws | None":
        """`at`: the first of the work's rows in the step's logits. None if it has no call."""
        if w.call is None:
            return None
        first = w.logits_from
        if not w.call.drafts and first < w.end:
            # Earlier rows are wanted for the scores of a prompt.
            first = w.end - 1 if w.call.wants else w.end
        return cls(w, w.call, at + first - w.logits_from, at + w.num_wanted, first)

    @property
    def num_block(self) -> int:
        return len(self.call.block)

    def places(self) -> list[int]:
        """Where in the text each row's byte stands: a cell's own where the cell is, any other row's one further."""
        call = self.call
        rows = [*range(self.first, self.work.end), *range(call.start, call.start + len(call.causal))]
        block = call.start + len(call.causal)
        return [*(row + 1 for row in rows), *range(block, block + self.num_block)]

    def law(self) -> tuple[list[SamplingParams], list[Mapping[int, int]], list[float]]:
        """Of each row: its parameters, the generated ids before its place, its random number."""
        sequence = self.work.sequence
        sampling, num_rows = sequence.request.sampling, self.end - self.begin
        if not (sampling.temperature or sampling.presence_penalty or sampling.frequency_penalty):
            return self.params(), [sequence.counts] * num_rows, [0.0] * num_rows
        places = self.places()
        return self.params(), self.counts(places), [uniform(sequence, place) for place in places]

    def params(self) -> list[SamplingParams]:
        request = self.work.sequence.request
        own = [request.sampling] * (self.end - self.begin - self.num_block)
        return own + [cell_params(request)] * self.num_block if self.num_block else own

    def counts(self, places: Sequence[int]) -> list[Mapping[int, int]]:
        """Generated ids before each place: the committed ones, and those drafted so far, as far as they are known."""
        sequence, call, sampling = self.work.sequence, self.call, self.work.sequence.request.sampling
        if not (sampling.presence_penalty or sampling.frequency_penalty):
            return [sequence.counts] * len(places)
        committed = len(sequence.ids) - (len(call.drafts) if call.runs_clean else 0)
        drafted = [*call.drafts, *call.causal[max(committed - call.start, 0) :]]
        ahead: list[Mapping[int, int]] = []
        for place in places:
            count = Counter(sequence.counts)
            count.update(drafted[: max(place - committed, 0)])
            ahead.append(count)
        return ahead


def uniform(sequence: SequenceState, place: int) -> float:
    """The random number of a place of the text; 0 if the request draws none."""
    request = sequence.request
    if not request.sampling.temperature:
        return 0.0
    return draw(request.sampling.seed, request.sample_index, place - sequence.num_prompt)


def cell_params(request: Request) -> SamplingParams:
    """How a block's cells are chosen: as all bytes, but for a top-p of their own."""
    top_p = request.unmask.top_p if request.unmask else None
    return request.sampling if top_p is None else replace(request.sampling, top_p=top_p)


def results_of(batch: Sequence[Work], logits: Tensor, kernels: Kernels) -> list[Result | None]:
    """The result of every work's call, None for those that only compute rows. logits: as `Runner.run` gives them."""
    all_draws: list[_Draws | None] = []
    at = 0
    for w in batch:
        all_draws.append(_Draws.of(w, at))
        at += w.num_wanted
    draws = [d for d in all_draws if d is not None]
    num_rows = sum(d.end - d.begin for d in draws)
    if not num_rows:
        return [None if d is None else Result() for d in all_draws]
    wanted = logits
    if num_rows < at:
        rows = [row for d in draws for row in range(d.begin, d.end)]
        wanted = logits[sent(np.array(rows), logits.device)]

    block_rows: list[int] = []
    end = 0
    for d in draws:
        end += d.end - d.begin
        block_rows += range(end - d.num_block, end)
    if block_rows:
        calls = [d.call for d in draws if d.num_block]
        index = sent(np.array(block_rows), logits.device)
        blocks = [(call.block, call.rule) for call in calls if call.rule]
        tensors = block_tensors(blocks, len(blocks), len(block_rows), logits.device)
        unmasking = BlockPasses(kernels, tensors, mask_id=draws[0].work.sequence.mask_id)
        cells = unmasking.law(wanted[index])
        wanted = wanted.index_copy(0, index, cells)
    params: list[SamplingParams] = []
    counts: list[Mapping[int, int]] = []
    uniforms: list[float] = []
    for d in draws:
        own_params, own_counts, own_uniforms = d.law()
        params += own_params
        counts += own_counts
        uniforms += own_uniforms
    drawn, highest = choose(wanted, params, counts, uniforms, kernels)
    right = _right(draws, drawn, kernels)
    wants = [drawn, highest, *right]
    if block_rows:
        unmasking.settle(cells, drawn[index], cells.amax(-1))
        wants += [unmasking.ids, unmasking.when]
    chosen, bests, *others = read(*wants)
    check(bests)
    accepted = iter(others.pop(0) if right else [0] * len(draws))
    settled = zip(*others, strict=True)

    results: list[Result | None] = []
    at = 0
    for some in all_draws:
        if some is None:
            results.append(None)
            continue
        end = at + some.end - some.begin
        behind = end - some.num_block
        num_top = some.work.sequence.request.logprobs
        scores = [] if num_top is None else logprobs_of(wanted[at:end], chosen[at:end], num_top)
        result = Result(some.first, chosen[at:behind], next(accepted), after_scores=scores[: behind - at])
        if some.num_block:
            ids, when = (values[: some.num_block] for values in next(settled))
            if some.call.causal:
                ids[0], when[0] = result.after[-1], 0
            result = replace(result, cells=ids, settled=when, cell_scores=scores[behind - at :])
        results.append(result)
        at = end
    return results


def _right(draws: Sequence[_Draws], drawn: Tensor, kernels: Kernels) -> list[Tensor]:
    """For each, how many of the drafts that its rows verify are what was drawn behind them (Fast BLT, Verify): (D,)
    int64; nothing if none verifies any."""
    if not any(d.call.drafts for d in draws):
        return []
    at, rows, drafts = 0, [], []
    for d in draws:
        known = len(d.work.sequence.ids) - len(d.call.drafts)
        checked = d.call.drafts[d.first - (known - 1) :] if d.call.runs_clean else ()
        rows.append(range(at, at + len(checked)))
        drafts.append(checked)
        at += d.end - d.begin
    width = max(map(len, drafts))
    if not width:
        return []

    def grid(lines: Sequence[Sequence[int]]) -> Tensor:
        return sent(np.array([[*line, *[0] * (width - len(line))] for line in lines]), drawn.device)

    lengths = sent(np.array([len(line) for line in drafts]), drawn.device)
    return [kernels.accepted(grid(drafts), drawn[grid(rows)], lengths)]
