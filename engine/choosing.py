"""From a step's logits to the results of calls: every wanted row is drawn as blt would draw at its place of the text.

A place has a random number of its own and the text before it; nothing else enters. So a draft and the row that
verifies it agree whenever their laws put that number on the same byte, and the outcome does not depend on who drafted.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from .config import BOE_ID, BOS_ID, PAD_ID
from .decoders import Call, Result
from .runner import Work
from .sampling import choose, draw, logprobs_of
from .types import SamplingParams

BLOCK_SPECIALS = [BOE_ID, BOS_ID, PAD_ID]
"""Ids that a block's cell never becomes."""


@dataclass(frozen=True, slots=True)
class _Draws:
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

    def params(self) -> list[SamplingParams]:
        request = self.work.sequence.request
        own = [request.sampling] * (self.end - self.begin - self.num_block)
        top_p = request.unmask.top_p if request.unmask else None
        cells = request.sampling if top_p is None else msgspec.structs.replace(request.sampling, top_p=top_p)
        return own + [cells] * self.num_block

    def uniforms(self, places: Sequence[int]) -> list[float]:
        sequence, request = self.work.sequence, self.work.sequence.request
        if not request.sampling.temperature:
            return [0.0] * len(places)
        return [draw(request.sampling.seed, request.sample_index, place - sequence.num_prompt) for place in places]

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


def results_of(batch: Sequence[Work], logits: Tensor) -> list[Result | None]:
    """The result of every work's call, None for those that only compute rows. logits: as `Runner.run` gives them."""
    all_draws: list[_Draws | None] = []
    at = 0
    for w in batch:
        all_draws.append(_Draws.of(w, at))
        at += w.num_wanted
    draws = [d for d in all_draws if d is not None]
    rows = [row for d in draws for row in range(d.begin, d.end)]
    if not rows:
        return [None if d is None else Result() for d in all_draws]
    wanted = logits if len(rows) == len(logits) else logits[torch.tensor(rows, device=logits.device)]

    places = [d.places() for d in draws]
    block_rows: list[int] = []
    end = 0
    for d in draws:
        end += d.end - d.begin
        block_rows += range(end - d.num_block, end)
    wanted, confidence, entropy = _look_at_blocks(wanted, block_rows)
    chosen = choose(
        wanted,
        [p for d in draws for p in d.params()],
        [c for d, at in zip(draws, places, strict=True) for c in d.counts(at)],
        [u for d, at in zip(draws, places, strict=True) for u in d.uniforms(at)],
    ).tolist()

    results: list[Result | None] = []
    at = cell = 0
    for some in all_draws:
        if some is None:
            results.append(None)
            continue
        end = at + some.end - some.begin
        behind = end - some.num_block
        num_top = some.work.sequence.request.logprobs
        scores = [] if num_top is None else logprobs_of(wanted[at:end], chosen[at:end], num_top)
        cells = slice(cell, cell + some.num_block)
        results.append(
            Result(
                some.first,
                chosen[at:behind],
                chosen[behind:end],
                confidence[cells],
                entropy[cells],
                scores[: behind - at],
                scores[behind - at :],
            )
        )
        at, cell = end, cell + some.num_block
    return results


def _look_at_blocks(logits: Tensor, rows: list[int]) -> tuple[Tensor, list[float], list[float]]:
    """Bars the ids that cells never become, in `rows`; highest probability and entropy (nats) of each of them."""
    if not rows:
        return logits, [], []
    index = torch.tensor(rows, device=logits.device)
    cells = logits[index]
    cells[:, BLOCK_SPECIALS] = -torch.inf
    p = cells.softmax(-1)
    return logits.index_copy(0, index, cells), p.amax(-1).tolist(), torch.special.entr(p).sum(-1).tolist()
