"""Steps as one call, where the CPU's own kernels compute: nothing of a step is planned or chosen in Python."""

from array import array
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from itertools import chain
from math import inf
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.native.step import (
    CACHES,
    Answer,
    AskKind,
    Limits,
    Step,
    StepCaches,
    StepShare,
    log_size,
    logged,
    processor_cache,
)

from ..config import BYTE_OFFSET, EOS_ID, Policy
from ..costs.latency import CALL_SECONDS, MOST_CALLED
from ..costs.ledger import Ledger
from ..decoders import Committed, Draft, Next, Result, Unmask, Verify
from ..documents import start_of
from ..memory.memory import Memory, Reach
from ..model import Model
from ..patching import boundary_rule
from ..rows import Rows
from ..sequence import Sequence
from ..transfer import read
from ..types import Request, SamplingParams, TokenLogprob
from .blocks import BLOCK_SPECIALS, rule_and_bound
from .launch import Launcher
from .results import cell_params, ends_of, results_of, score_prompts
from .sampling import biases, ranked, scores_of, static_changes, unbiased

CACHE_SHARE = 1 / 3
"""How much of the processor's largest cache the decoder's weights, and the rows of its K/V cache that sequences read
which draft together, may take. With more than half, other programs and cores take what the next pass needs."""

ASK_KINDS = {
    type(None): AskKind.PREFILL,
    Next: AskKind.NEXT,
    Draft: AskKind.DRAFT,
    Unmask: AskKind.UNMASK,
    Verify: AskKind.VERIFY,
}


class OneCall:
    """Runs steps, each with as many passes as its sequences need: further bytes of blt, a whole draft or a block until
    it is done, their verification, and further rounds of these. The host draws only for rows that may not run ahead:
    with grammars, and while a prompt is scored.

    max_rows: most rows of a step that verifies what it has drafted.
    """

    def __init__(self, model: Model, step: Step, memory: Memory, ledger: Ledger, isolates: bool, max_rows: int) -> None:
        self._model, self._step, self._memory, self._ledger = model, step, memory, ledger
        self._max_rows = max_rows
        self._text, self._isolates = memory.slots.text, isolates
        self._isolates_global = isolates and model.config.isolate_global
        self._ids, self._entropies = self._text.ids.numpy(), self._text.entropies.numpy()
        self._patch = self._text.patch.numpy()
        self._vocab_size = model.config.vocab_size
        self._likely_rounds = defaultdict[type, int](lambda: 2)
        """For how many rounds, of which the first also runs prompts, the last step of that kind would have had time."""
        self._owns = WeakKeyDictionary[Sequence, _Own]()

    @classmethod
    def of(
        cls, model: Model, memory: Memory, ledger: Ledger, launcher: Launcher, *, isolates: bool, max_rows: int
    ) -> "OneCall | None":
        """None where the kernels have no such call."""
        weights, caches = model.step_weights, memory.caches
        if weights is None:
            return None
        kv = dict(
            zip(CACHES, (caches.patcher, caches.encoder, caches.open_kv, caches.global_, caches.latent, caches.decoder),
                strict=True)
        )  # fmt: skip
        where = StepCaches(kv, caches.open_states, launcher.tilings)
        first, second, third = BLOCK_SPECIALS
        read = ledger.stage_bytes
        most_read = int(processor_cache() * CACHE_SHARE - read.weights["decoder"]) // read.kv_row["decoder"]
        # 0, no limit, where the weights alone exceed the share.
        limits = Limits(
            isolates, isolates and model.config.isolate_global, EOS_ID, (first, second, third), max(0, most_read)
        )
        step = Step(weights, where, boundary_rule(model.config.patching), limits)
        return cls(model, step, memory, ledger, isolates, max_rows)

    def run(self, batch: Seq[Rows], policy: Policy) -> list[Result | None]:
        """The result of each sequence's ask, None for rows without one."""
        drafts = [_drafts(rows) for rows in batch]
        most = self._most_rounds(batch, policy)
        passes, rounds = self._num_passes(batch, policy, most), self._rounds(batch, drafts, most)
        # Keeps what lies at the shares' addresses.
        kept: list[array[float]] = []
        rooms = [self._room(*of) for of in zip(batch, passes, drafts, rounds, strict=True)]
        shares = [self._share(rows, room, kept) for rows, room in zip(batch, rooms, strict=True)]
        answers, totals = self._step(shares, CALL_SECONDS if policy == "measured" else inf)
        self._ledger.took_step(totals, list(zip(batch, answers, strict=True)))
        if any(answer.num_rounds > 1 for answer in answers) or (most and all(r.sequence.num_output for r in batch)):
            self._likely_rounds[type(batch[0].ask)] = max(1, int(CALL_SECONDS / totals.round))
        scores = _Scores()
        results = [self._result(*of, scores) for of in zip(batch, answers, rooms, strict=True)]
        scores.fill()
        by_host = [number for number, rows in enumerate(batch) if not rows.may_run_ahead]
        if by_host:
            drawn = self._draw([batch[n] for n in by_host], [(answers[n], rooms[n].logits) for n in by_host])
            for number, result in zip(by_host, drawn, strict=True):
                results[number] = result
        return results

    def _room(self, rows: Rows, passes: int, drafts: int, rounds: tuple[int, int]) -> "_Room":
        settled, log = array("q", [-1] * rows.num_block), array("q", bytes(8 * log_size(rounds[0], drafts)))
        return _Room(passes, drafts, *rounds, settled, log, self._logits(rows, passes))

    def _logits(self, rows: Rows, passes: int) -> Tensor | None:
        """Room for the logits that the host draws from, or that scores are made of."""
        if not rows.may_run_ahead:
            return torch.empty(rows.num_logits, self._vocab_size)
        if not rows.is_scored:
            return None
        return torch.empty(rows.num_drawn + len(rows.given) + passes, self._vocab_size)

    def _draw(self, batch: Seq[Rows], answers: Seq[tuple[Answer, Tensor | None]]) -> Seq[Result | None]:
        """Results of requests for which the host draws."""
        for rows, (answer, _) in zip(batch, answers, strict=True):
            if rows.num_exact:
                first = rows.end - answer.num_logits
                rows.decode_from = rows.logits_from = rows.drawn_from = first
        own = torch.cat([logits[: answer.num_logits] for answer, logits in answers if logits is not None])
        score_prompts(batch, own)
        return results_of(batch, own, self._memory.slots, self._model.kernels)

    def _most_rounds(self, batch: Seq[Rows], policy: Policy) -> int:
        """How many rounds, which of blt are bytes, a step has time for; 0 if drafts are verified in another step. While
        a prompt is read there is no round after the first pass: the prompt's next rows and those of the verification,
        or of the next byte or block, then share a pass. The first byte of a text that runs alone is not held back for
        others."""
        if policy != "measured":
            return MOST_CALLED if policy == "always" else 0
        first, *others = batch
        would_wait = any(rows.ask is None for rows in batch) or not (others or first.sequence.num_output)
        return 0 if would_wait else self._likely_rounds[type(first.ask)]

    def _num_passes(self, batch: Seq[Rows], policy: Policy, most: int) -> list[int]:
        """Most passes of each sequence in a round; of blt in all."""
        if policy == "never":
            return [1] * len(batch)
        count = min(max(most, 1), MOST_CALLED)
        passes = [rows.most_passes(count) if rows.may_run_ahead else 1 for rows in batch]
        ends = [rows.end + most - 1 for rows, most in zip(batch, passes, strict=True)]
        reaches = [
            Reach(rows.sequence, end, end)
            for rows, end in zip(batch, ends, strict=True)
            if isinstance(rows.ask, Next) and end > rows.end
        ]
        if reaches and not self._memory.reserve_all(reaches):
            return [1 if isinstance(rows.ask, Next) else most for rows, most in zip(batch, passes, strict=True)]
        return passes

    def _rounds(self, batch: Seq[Rows], drafts: Seq[int], most: int) -> list[tuple[int, int]]:
        """How many rounds of drafts a sequence has at most, and before which position the last of them begins."""
        none = [(0, 0)] * len(batch)
        num_rows = sum(max(rows.num_rows, 1 + count) for rows, count in zip(batch, drafts, strict=True))
        if not most or not any(drafts) or num_rows > self._max_rows:
            return none
        for rounds in (min(most, _rounds_of_bytes(batch, drafts)), 1):
            found, reaches = list(none), list[Reach]()
            for number, (rows, count) in enumerate(zip(batch, drafts, strict=True)):
                if count and (rounds > 1 or _is_verified(rows)):
                    until = _until(rows, min((rounds - 1) * (count + _is_verified(rows)), MOST_CALLED - 1))
                    found[number] = rounds, until
                    last = max(until - 1, len(rows.sequence.ids))
                    reaches.append(Reach(rows.sequence, last + count * _is_verified(rows), last + count))
            if self._memory.reserve_all(reaches):
                return found
        return none

    def _share(self, rows: Rows, room: "_Room", kept: list["array[float]"]) -> StepShare:
        sequence, ask, plain = rows.sequence, rows.ask, rows.may_run_ahead
        request, start, own = sequence.request, rows.start, self._own_of(sequence)

        def address(values: "array[float]") -> int:
            kept.append(values)
            return _address(values)

        tables: list[int] = []
        for name in CACHES:
            table = sequence.tables[name]
            tables += (table.pages.buffer_info()[0], table.first)
        patch = sequence.patch_of(start)
        sequence.note_patch_documents(patch)
        counts = ends = 0
        if ask and plain and request.sampling.is_penalised:
            counts = address(_row(sequence.id_counts, self._vocab_size, -1.0))
        if ask and plain and sequence.num_output < request.min_tokens:
            ends = address(_row(dict.fromkeys(ends_of(request), -inf), self._vocab_size))
        rule = rule_and_bound(ask.rule) if isinstance(ask, Unmask) else (0, 0.0)
        drafts = ask.drafts if isinstance(ask, Verify) else ()
        return StepShare(
            *self._text.addresses(self._memory.slots.place(sequence, 0)),
            tables=tuple(tables),
            ask=ASK_KINDS[type(ask)],
            start=start,
            end=rows.end,
            decided=sequence.patching.decided,
            floor=start_of(sequence.documents, start) if self._isolates else 0,
            patch_floor=start_of(sequence.patch_documents, patch) if self._isolates_global else 0,
            decode_from=rows.decode_from,
            logits_from=rows.logits_from,
            drawn_from=rows.drawn_from,
            counted_from=rows.counted_from,
            cells_start=rows.cells_start,
            cells_floor=start_of(sequence.documents, rows.cells_start) if self._isolates else 0,
            num_cells=rows.num_cells,
            num_block=rows.num_block,
            closes=rows.closes_patch,
            exact=rows.num_exact,
            drafts=len(drafts),
            passes=room.passes,
            draws=ask is not None and plain,
            rounds=room.rounds,
            until=room.until,
            kind=ASK_KINDS[type(ask)],
            width=room.width,
            params=own.params,
            cell_params=own.cell_params,
            changes=own.changes,
            bias=own.bias,
            counts=counts,
            ends=ends,
            stops=own.stops,
            committed=len(sequence.ids),
            first_end=sequence.num_prompt + request.min_tokens,
            seed=request.sampling.seed & (1 << 64) - 1,
            sample_index=request.sample_index,
            num_prompt=sequence.num_prompt,
            rule=rule[0],
            bound=rule[1],
            settled=room.settled.buffer_info()[0],
            log=room.log.buffer_info()[0],
            logits=0 if room.logits is None else room.logits.data_ptr(),
        )

    def _own_of(self, sequence: Sequence) -> "_Own":
        own = self._owns.get(sequence)
        if own is None:
            own = self._owns[sequence] = _Own.of(sequence.request, self._vocab_size)
        return own

    def _result(self, rows: Rows, answer: Answer, room: "_Room", scores: "_Scores") -> Result | None:
        """What a sequence gets, from its text and the room that it had."""
        sequence, ask, at = rows.sequence, rows.ask, self._memory.slots.place(rows.sequence, 0)
        if answer.bad:
            return Result(failed=True)
        end, decided = answer.ended, sequence.patching.decided
        if decided < end:
            patch = self._patch[at + decided : at + end + 1]
            sequence.decide(self._entropies[at + decided : at + end].tolist(), (patch[1:] != patch[:-1]).tolist())
        if not answer.num_passes:
            return None

        def scored(ids: Seq[int], begin: int = 0) -> list[TokenLogprob]:
            num_top, logits = sequence.request.logprobs, room.logits
            return [] if logits is None or num_top is None else scores.of(logits[begin:][: len(ids)], ids, num_top)

        if answer.num_rounds and not isinstance(ask, Next):
            rounds = [logged(room.log, n, room.width, ASK_KINDS[type(ask)]) for n in range(answer.num_rounds)]
            ids, drafts, accepted, when = rounds[0]
            later = [Committed(r.ids, [], r.drafts, r.accepted, r.settled) for r in rounds[1:]]
            if isinstance(ask, Unmask) and not ask.then_verify:
                return Result(drafts, settled=when, passes=1 + max(when), later=later)
            verified = Result(ids[accepted:], accepted, scores=scored(ids), later=later)
            if isinstance(ask, Draft):
                return Result(drafts[len(ask.known) :], verified=verified)
            return Result(drafts, settled=when, passes=1 + max(when), verified=verified)
        match ask:
            case Next():
                ids = self._ids[at + rows.end : at + rows.end + answer.num_passes].tolist()
                return Result(ids, scores=scored(ids))
            case Draft():
                first = at + rows.cells_start + 1
                ids = self._ids[first : first + answer.num_passes].tolist()
                return Result(ids, scores=scored(ids, len(ask.known)))
            case Unmask():
                after = at + rows.cells_start + rows.num_cells
                ids = self._ids[after - rows.num_block : after].tolist()
                # Nothing reads the score of a [MASK].
                own = scored([min(i, self._vocab_size - 1) for i in ids])
                return Result(ids, settled=room.settled.tolist(), passes=answer.num_passes, scores=own)
            case Verify():
                skipped = len(ask.drafts) + 1 - answer.num_logits
                own = scored([*ask.drafts[skipped : answer.accepted], answer.given], skipped)
                return Result([answer.given], answer.accepted, scores=own)
        return None


class _Room(NamedTuple):
    """What a sequence may do in a step, and where that is noted. passes: of its first round; width: see `_drafts`;
    rounds, until: see `OneCall._rounds`; settled: in which pass each cell of a block was; log: of rounds that have
    ended; logits: those that the host draws from, or that scores are made of."""

    passes: int
    width: int
    rounds: int
    until: int
    settled: "array[int]"
    log: "array[int]"
    logits: Tensor | None


class _Own(NamedTuple):
    """What a sequence's shares have of its request: the addresses that `StepShare` describes, and what lies there."""

    params: int
    cell_params: int
    changes: int
    bias: int
    stops: int
    kept: "tuple[array[float] | array[int] | None, ...]"

    @classmethod
    def of(cls, request: Request, vocab_size: int) -> "_Own":
        def numbers(params: SamplingParams) -> "array[float]":
            drawn = params.temperature, params.top_k or vocab_size, params.top_p, params.min_p
            return array("d", (*drawn, params.presence_penalty, params.frequency_penalty, params.repetition_penalty))

        params = request.sampling
        bias = biases(params, vocab_size) if params.repetition_penalty != 1 else {}
        changes = static_changes(unbiased(params), vocab_size)
        stops = [
            *([byte + BYTE_OFFSET for byte in stop] for stop in request.stop if stop),
            *([i] for i in request.stop_ids),
        ]
        kept = (
            numbers(params),
            numbers(cell_params(request)),
            _row(changes, vocab_size) if changes else None,
            _row(bias, vocab_size) if bias else None,
            array("q", [len(stops), *chain.from_iterable((len(ids), *ids) for ids in stops)]) if stops else None,
        )
        params_at, cells_at, changes_at, bias_at, stops_at = map(_address, kept)
        return cls(params_at, cells_at, changes_at, bias_at, stops_at, kept)


class _Scores:
    """The log-probabilities that a step gives, worked out for all sequences together."""

    def __init__(self) -> None:
        self._wanted: list[tuple[Tensor, Seq[int], int, list[TokenLogprob]]] = []

    def of(self, logits: Tensor, ids: Seq[int], num_top: int) -> list[TokenLogprob]:
        """Those of ids that were chosen by rows of logits: a list that `fill` will fill."""
        scores = list[TokenLogprob]()
        self._wanted.append((logits, ids, num_top, scores))
        return scores

    def fill(self) -> None:
        if not self._wanted:
            return
        logits, ids, num_top, lists = zip(*self._wanted, strict=True)
        found, end = read(*ranked(torch.cat(logits), torch.tensor([*chain(*ids)]), max(num_top))), 0
        for own, most, scores in zip(ids, num_top, lists, strict=True):
            begin, end = end, end + len(own)
            scores += scores_of(own, most, *(part[begin:end] for part in found))


def _drafts(rows: Rows) -> int:
    """Most drafts of a round, if their verification comes next, or another block may; else 0."""
    repeats = isinstance(rows.ask, Unmask) and rows.ask.until and not rows.is_scored
    if rows.may_run_ahead and (_is_verified(rows) or repeats):
        return len(rows.given) + (rows.ask.at_most if isinstance(rows.ask, Draft) else 0)
    return 0


def _is_verified(rows: Rows) -> bool:
    return isinstance(rows.ask, Draft | Unmask) and rows.ask.then_verify


def _rounds_of_bytes(batch: Seq[Rows], drafts: Seq[int]) -> int:
    """All rounds that a step may have bytes for. Sequences take part in equally many, as if all drafts stood, and only
    in one if they do not draft alike: else their passes fall apart, and each reads the weights for fewer rows. One that
    runs alone takes part in as many as have a pass for each byte."""
    if len(batch) == 1:
        return -(-MOST_CALLED // (1 + batch[0].most_passes(1)))
    kinds = {(type(rows.ask), _is_verified(rows), count) for rows, count in zip(batch, drafts, strict=True)}
    if len(kinds) > 1:
        return 1
    ((_, is_verified, count),) = kinds
    return -(-MOST_CALLED // (count + is_verified))


def _until(rows: Rows, num_bytes: int) -> int:
    """Before which position the last round of a step begins, after up to so many bytes. Scores are those of one
    round."""
    assert isinstance(rows.ask, Draft | Unmask)
    return 0 if rows.is_scored else min(rows.ask.until, len(rows.sequence.ids) + num_bytes + 1)


def _address(values: "array[float] | array[int] | None") -> int:
    return values.buffer_info()[0] if values else 0


def _row(values: Mapping[int, float], vocab_size: int, other: float = 0.0) -> "array[float]":
    """A number for each id."""
    row = array("d", [other]) * vocab_size
    for i, value in values.items():
        row[i] = value
    return row
