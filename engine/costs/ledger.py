"""Charges every launch of a stage to the requests that it served, and to none if it served none."""

import time
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from kernels.native.step import STAGES, Answer, Totals

from ..counts import PATCH_SIZES, Counts
from ..decoders import Committed, Next
from ..rows import Rows
from ..sequence import Sequence
from ..types import MAX_DRAFT, DecoderName
from .accounting import StageBytes
from .clock import Clock, Moment
from .latency import HOST, LatencyModel


class Share(NamedTuple):
    """A sequence's rows in one pass of a stage: how many, how many of them belong to generation, how many cache rows
    they read."""

    rows: Rows
    num_rows: int
    counted: int
    looked_at: int


@dataclass(slots=True)
class Launch:
    """One launch of a stage. shares: each sequence's rows in a pass, none where passes differ in that (then `took` gets
    those of each); num_rows: rows of a pass; passes: how many passes it makes; recorded: whether it made a recording,
    which takes longer."""

    stage: str
    shares: list[Share]
    num_rows: int
    passes: int = 1
    recorded: bool = False
    began: Moment = None
    ended: Moment = None


class Ledger:
    """Counts and seconds of an engine, its decoders and its requests; teaches the latency model.

    total: all passes, prompts included. latency: may be replaced.
    """

    def __init__(self, stage_bytes: StageBytes, latency: LatencyModel, clock: Clock) -> None:
        self.stage_bytes, self._clock = stage_bytes, clock
        self.latency = latency
        self.reset()

    def reset(self) -> None:
        """Resets all counts."""
        self.total = Counts()
        self.decoders: dict[str, Counts] = defaultdict(Counts)
        """Counts of requests that have ended; seconds are those of all requests."""
        self.accepted_runs: dict[DecoderName, list[int]] = defaultdict(lambda: [0] * (MAX_DRAFT + 1))
        """Of all requests: rounds that drafted, by how many drafts were accepted; the last entry has longer runs."""
        self.patch_sizes = [0] * (len(PATCH_SIZES) + 1)
        """Patches that closed where generated ids begin the next, by `PATCH_SIZES`."""
        self.patch_bytes = 0
        """Bytes in these patches."""
        self._pending: deque[tuple[Launch, dict[str, float]]] = deque()
        """Launches whose time is not known yet, and each decoder's part of it."""

    def took(self, launch: Launch, *served: Seq[Share]) -> None:
        """Charges each pass to the sequences that it served; `served` has an entry for each pass that served any. The
        weights that a pass reads are divided by rows. The time is added once the device has finished."""
        parts: dict[str, float] = defaultdict(float)
        for shares in served:
            self._charge(launch.stage, shares, parts, len(served))
        self._pending.append((launch, parts))
        self.poll()

    def took_step(self, totals: Totals, answers: Seq[tuple[Rows, Answer]]) -> None:
        """Charges a step that was one call, whose time is known."""
        for stage, calls, all_rows, seconds, number in zip(STAGES, *totals[:3], range(len(STAGES)), strict=True):
            if not calls:
                continue
            of = self.stage_bytes
            weights, row, kv_row = of.weights[stage], of.row[stage], of.kv_row[stage]
            looked = 0
            for rows, answer in answers:
                served = answer.served[number]
                looked += served.looked
                if served.counted:
                    counts = rows.sequence.counts
                    counts.calls[stage] += served.calls
                    counts.rows[stage] += served.counted
                    read = weights * served.counted_share + row * served.counted + kv_row * served.looked_counted
                    counts.bytes_read[stage] += read
                    part = seconds * served.counted_share / calls
                    self.decoders[rows.sequence.request.decoder].seconds[stage] += part
            self.total.calls[stage] += calls
            self.total.rows[stage] += all_rows
            self.total.bytes_read[stage] += weights * calls + row * all_rows + kv_row * looked
            self.total.seconds[stage] += seconds
            self.latency.observe(stage, round(all_rows / calls), seconds / calls)

    def _charge(self, stage: str, shares: Seq[Share], parts: dict[str, float], passes: int) -> None:
        total, all_rows = self.total, sum(share.num_rows for share in shares)
        total.calls[stage] += 1
        total.rows[stage] += all_rows
        each = self.stage_bytes.weights[stage] / all_rows + self.stage_bytes.row[stage]
        kv_row, whole = self.stage_bytes.kv_row[stage], 0.0
        for rows, count, counted, looked_at in shares:
            read = each * count + looked_at * kv_row
            whole += read
            if counted:
                counts = rows.sequence.counts
                counts.calls[stage] += 1
                counts.rows[stage] += counted
                counts.bytes_read[stage] += read * counted / count
                parts[rows.sequence.request.decoder] += counted / all_rows / passes
        total.bytes_read[stage] += whole

    def poll(self) -> None:
        """Adds the time of launches that have finished since the last call."""
        while self._pending and self._clock.passed(self._pending[0][0].ended):
            launch, parts = self._pending.popleft()
            seconds = self.seconds(launch)
            self.total.seconds[launch.stage] += seconds
            for decoder, part in parts.items():
                self.decoders[decoder].seconds[launch.stage] += seconds * part
            if not launch.recorded:
                # A pass takes the same time whether or not it serves a request.
                self.latency.observe(launch.stage, launch.num_rows, seconds / launch.passes)

    def seconds(self, launch: Launch) -> float:
        """The time of a launch that is known to have ended."""
        return self._clock.seconds(launch.began, launch.ended)

    @contextmanager
    def step(self, batch: Seq[Rows], num_recorded: Callable[[], int]) -> Iterator[None]:
        """Around a step: observes its time outside the stages. On a GPU the times of stages arrive late, so that an
        earlier step's may be subtracted."""
        began, recorded = time.perf_counter(), num_recorded()
        stages, calls = self._stage_seconds(), self.total.calls["decoder"]
        yield
        whole = time.perf_counter() - began
        self.latency.unmeasured += 1
        seconds = whole - (self._stage_seconds() - stages)
        if num_recorded() == recorded and all(rows.ask for rows in batch):
            passes = max(self.total.calls["decoder"] - calls, 1)
            self.latency.observe(HOST, passes * len(batch), max(seconds, 0.0))
            if all(map(_is_of_bytes, batch)):
                self.latency.observe_bytes(len(batch), whole / passes)

    def _stage_seconds(self) -> float:
        self.poll()
        return sum(self.total.seconds.values())

    def committed(self, sequence: Sequence, outcome: Committed, num_ids: int, patches: Seq[int]) -> None:
        """Counts a round of a request. num_ids: how many of its ids became text. patches: for each patch that these
        begin, the length of the one before it."""
        counts = sequence.counts
        # Several may be one outcome, and have gone beyond the text's end.
        for part, _ in outcome.up_to(num_ids):
            counts.rounds += min(part.rounds, max(num_ids, 1))
            counts.drafted += part.drafted
            counts.accepted += part.accepted
            if part.drafts:
                self.accepted_runs[sequence.request.decoder][min(part.accepted, MAX_DRAFT)] += 1
        counts.committed += num_ids
        counts.patches += len(patches)
        for size in patches:
            self.patch_sizes[bisect_left(PATCH_SIZES, size)] += 1
            self.patch_bytes += size

    def ended(self, decoder: str, counts: Counts) -> None:
        """A request has ended: its counts are added to its decoder's."""
        self.decoders[decoder].add(counts)


def _is_of_bytes(rows: Rows) -> bool:
    """Whether a step of such rows makes as many bytes of blt as it may, and no scores, which take time on the host."""
    plain = rows.is_plain and not rows.is_scored
    return isinstance(rows.ask, Next) and rows.ask.at_most > 1 and rows.num_rows == 1 and plain
