"""The engine: requests in, steps, events out. Synchronous, one thread, no I/O."""

import logging
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from itertools import count

from msgspec.structs import replace

from . import admission
from .build import Parts, build
from .calibrate import calibrate
from .config import EngineConfig
from .decoders import Committed, Constrained, Decoder, Result, SharedPrior, Verify, make_decoder
from .grammars import Compiled, Constraint, Grammars
from .memory.caches import longest_draft
from .memory.room import naming_flags
from .ordered import Ordered
from .output import usage_of
from .report import Report, info_of
from .rows import Rows
from .scheduler import Scheduler
from .sequence import Sequence
from .shortage import is_out_of_memory
from .types import EngineInfo, Event, Failed, Finished, FinishReason, Request, Snapshot, Usage
from .warm_up import warm_up

log = logging.getLogger("fastblt.engine")

WAIT_SECONDS = 0.01
"""How long a step without rows waits for a grammar."""
START_SECONDS = 0.01
"""After so long requests whose grammar is ready wait for the next step: a new engine has many texts to feed to theirs,
and a step that takes too long ends it."""


class Engine:
    """One model, its caches and all requests in flight.

    Raises CheckpointError for a checkpoint that cannot be served, ValueError for a missing device and for sizes that
    cannot work.
    """

    def __init__(self, config: EngineConfig, parts: Parts | None = None) -> None:
        """parts: instead of those that `config` asks for."""
        self.config = config
        self.parts = parts = parts or build(config)
        self.model_config, self.limits = parts.config, parts.limits
        self.memory, self.ledger, self.stepper = parts.memory, parts.ledger, parts.stepper
        self._prior = SharedPrior()
        self._grammars = Grammars()
        self.prompt_rows = config.max_step_rows
        """Most rows of prompts in a step."""
        self._shortest_step = 0.0
        self._sequences: dict[str, Sequence] = {}
        self.reset()

    def reset(self) -> None:
        """Drops all requests and resets the counters."""
        for sequence in self._sequences.values():
            self.memory.release(sequence)
        self.stepper.stages.discard()
        config = self.config
        self._scheduler = Scheduler(
            self.memory,
            max_sequences=config.max_sequences,
            max_step_rows=config.max_step_rows,
            max_prompt_rows=self.prompt_rows,
            longest_draft=longest_draft(self.model_config),
        )
        self.ledger.reset()
        self._report = Report(self.parts)
        self._sequences = {}
        self._deadlines: Ordered[tuple[float, int], Sequence] = Ordered()
        self._compiling: dict[str, tuple[Request, Decoder | None, Iterator[Constraint | None], Future[Compiled]]] = {}
        """Requests that wait for their grammar, and what feeds their text to it."""
        self._arrivals = count()
        self._batch: list[Rows] = []
        self._recorded_before = 0.0
        self._events: list[Event] = []

    def calibrate(self) -> None:
        """See `engine.calibrate` and `engine.warm_up`. Optional; must come before the first request."""
        with naming_flags(self.config):
            self.prompt_rows, self._shortest_step = calibrate(self)
            self.reset()
            warm_up(self, self.config.warm_up_seconds)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Around steps that no request asked for: they leave no prefix, no request and no count."""
        prefixes, self.memory.prefixes = self.memory.prefixes, None
        try:
            yield
        finally:
            self.memory.prefixes = prefixes
            self.reset()

    @property
    def has_work(self) -> bool:
        """Whether `step` would run rows or return events."""
        return bool(self._sequences or self._events or self._compiling)

    @property
    def running(self) -> list[Sequence]:
        """The running batch."""
        return self._scheduler.running

    def info(self) -> EngineInfo:
        """Facts that do not change."""
        return info_of(self.config, self.parts, self.prompt_rows, self._shortest_step)

    def snapshot(self) -> Snapshot:
        """The counters so far, and the current state."""
        return self._report.snapshot(self._scheduler)

    # Requests.

    def add(self, request: Request, decoder: Decoder | None = None) -> None:
        """Takes a request. decoder: replaces the one that it names.

        A refusal is not raised: the next step returns it as a `Failed`.
        """
        if request.submitted is None:
            request = replace(request, submitted=time.monotonic())
        refusal = admission.check(request, self.limits)
        if request.id in self._sequences or request.id in self._compiling:
            refusal = Failed(id=request.id, code="invalid", message=f"id {request.id!r} is in use", param="id")
        if refusal is not None:
            log.debug("refused: %s", refusal.code, extra=request.log_fields)
            self._events.append(refusal)
        elif request.grammar:
            future = self._grammars.compile(request.grammar)
            self._compiling[request.id] = request, decoder, self._fed(request, future), future
        else:
            self._start(request, decoder)

    def _start(self, request: Request, decoder: Decoder | None, constraint: Constraint | None = None) -> None:
        config = self.model_config
        decoder = decoder or make_decoder(request, config.block_size, self.ledger.latency, self._prior)
        if constraint:
            decoder = Constrained(decoder, constraint)
        tables = self.memory.caches.new_tables()
        sequence = Sequence(request, next(self._arrivals), tables, decoder, config.mask_id, constraint)
        self._sequences[request.id] = sequence
        self._deadlines.add((sequence.deadline, sequence.arrival), sequence)
        self._scheduler.add(sequence)
        sequence.choose()
        _, _, reason = sequence.output.take(request.output_ids)
        if reason or (constraint and constraint.is_finished):
            self._finish(sequence, reason or "stop")

    def _start_compiled(self) -> None:
        """Starts requests whose grammar is ready, for a moment; waits a moment if there is nothing else to do."""
        if self._compiling and not self._sequences and not self._events:
            wait([future for *_, future in self._compiling.values()], WAIT_SECONDS, FIRST_COMPLETED)
        now = time.monotonic()
        until = now + START_SECONDS
        for request, decoder, fed, future in list(self._compiling.values()):
            if request.deadline <= now:
                self._leave_grammar(request.id)
                # It ends before its first step.
                self._start(request, decoder)
            elif not future.done() or time.monotonic() >= until:
                continue
            elif error := future.exception():
                if is_out_of_memory(error):
                    raise error
                del self._compiling[request.id]
                self._events.append(Failed(id=request.id, code="invalid", message=f"grammar: {error}", param="grammar"))
            elif constraint := next((made for made in fed if made or time.monotonic() >= until), None):
                del self._compiling[request.id]
                self._start(request, decoder, constraint)

    def _fed(self, request: Request, future: Future[Compiled]) -> Iterator[Constraint | None]:
        """Feeds what is known of a text to its grammar, but for the last id, which `Output.take` does. Yields None
        after each id, and the constraint in the end."""
        constraint = Constraint(future.result(), self.model_config.vocab_size, allows_eos=not request.ignore_eos)
        for token in request.output_ids[:-1]:
            constraint.advance(token)
            yield None
        yield constraint

    def abort(self, request_id: str) -> None:
        """Ends a request now; an unknown id is ignored."""
        if request_id in self._sequences:
            sequence = self._sequences[request_id]
            log.debug("aborted after %d ids", sequence.num_output, extra=sequence.request.log_fields)
            self._finish(sequence, "abort")
        elif request_id in self._compiling:
            self._leave_grammar(request_id)
            self._events.append(Finished(id=request_id, reason="abort", usage=Usage()))

    def _leave_grammar(self, request_id: str) -> None:
        """It waits for its grammar no longer."""
        *_, future = self._compiling.pop(request_id)
        if all(future is not other for *_, other in self._compiling.values()):
            # Or a client that comes and leaves would make all others wait for its grammars.
            future.cancel()

    def close(self) -> None:
        """Leaves no work that the interpreter would finish before it ends."""
        self._grammars.close()

    # A step.

    def step(self) -> list[Event]:
        """Runs one batch through the stages and returns the events. An error in it ends the engine: a new one must
        continue the requests."""
        began = time.perf_counter()
        self._start_compiled()
        self._expire()
        batch = self._scheduler.schedule()
        if batch:
            self._run(batch)
            self._report.steps += 1
            self._report.step_seconds += time.perf_counter() - began
        else:
            self.memory.caches.check_integrity()
            if self._sequences:
                raise RuntimeError(f"{len(self._sequences)} sequences wait, but none fits into the caches")
        # A step begun ahead cannot be used once one of its requests has ended.
        self.stepper.stages.discard_if_lost()
        events, self._events = self._events, []
        return events

    def step_bound(self) -> float:
        """Upper bound, in seconds, of the step that runs now: the latency model's, plus what the step has spent on
        recording so far; infinite during a recording. May be called from another thread."""
        batch = self._batch
        # One more for a verification, or for the next step's beginning. After a draft there may be further rounds.
        most = self.ledger.latency.most_bytes
        passes = 1 + max((rows.most_passes(most) for rows in batch), default=0)
        passes += most if any(rows.num_cells for rows in batch) else 0
        recorded = self.stepper.executor.recording_seconds - self._recorded_before
        return recorded + self.ledger.latency.whole_step(sum(rows.num_rows for rows in batch), passes)

    def _run(self, batch: list[Rows]) -> None:
        self._batch, self._recorded_before = batch, self.stepper.executor.recording_seconds
        executor, now = self.stepper.executor, time.monotonic()
        self.ledger.latency.num_running = len(self._scheduler.running)
        for rows in batch:
            self._report.cached_rows += rows.sequence.note_step(now)
            self._report.prompt_rows += max(min(rows.end, rows.sequence.num_prompt) - rows.start, 0)
        with self.ledger.step(batch, lambda: executor.num_recorded):
            for rows, result in zip(batch, self.stepper.run(batch), strict=True):
                if result and result.failed:
                    self._fail(rows.sequence, "the model gave no distribution of the next byte")
                    continue
                try:
                    self._advance(rows, result)
                except Exception as error:
                    if is_out_of_memory(error):
                        # Not this request's fault: with a new engine it goes on.
                        raise
                    self._fail(rows.sequence, "the engine failed on this request", error)

    def _advance(self, rows: Rows, result: Result | None) -> None:
        """Applies a step to a sequence: rows are computed, ids may be committed, and the request may end."""
        sequence = rows.sequence
        verifies = isinstance(rows.ask, Verify) or (result is not None and result.verified is not None)
        if not verifies:
            sequence.advance(rows.end)
        if scored := sequence.output.score_prompt(rows.prompt_scores):
            self._events.append(scored)
        if result is None:
            self.memory.trim(sequence)
            if sequence.remaining and self.memory.room(sequence) <= 0:
                self._outgrown(sequence)
            return
        if not sequence.request.max_tokens:
            if decided := sequence.output.prompt_delta(sequence):
                self._events.append(decided)
            self._finish(sequence, "length")
            return
        outcome = sequence.resume(result)
        if verifies or (outcome and outcome.rounds > 1):
            # The last id is the model's own: its row has not run.
            sequence.keep(len(sequence.ids) + len(outcome.ids) - 1 if outcome else sequence.num_computed)
        elif outcome and outcome.parts:
            # So have not the bytes of the last block.
            sequence.advance(len(sequence.ids) + len(outcome.ids) - len(outcome.parts[-1].ids))
        if outcome:
            self._commit(sequence, outcome)

    def _commit(self, sequence: Sequence, outcome: Committed) -> None:
        """Appends generated ids up to where the request must end, and adds their events."""
        output = sequence.output
        ids, text, reason = output.take(outcome.ids)
        sequence.append(ids)
        self.ledger.committed(sequence, outcome, len(ids), output.closed_patches(sequence, len(ids)))
        self._events.append(output.delta(sequence, outcome, ids, text))
        if reason:
            self._finish(sequence, reason)
            return
        self.memory.trim(sequence)
        if self.memory.room(sequence) <= 0:
            self._finish(sequence, "length")
            return
        sequence.choose()

    # Ends.

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        if reason == "dead_end" and sequence.constraint and (error := sequence.constraint.error):
            fields = sequence.request.log_fields
            log.info("dead end after %d ids, at a limit of grammars: %s", sequence.num_output, error, extra=fields)
        self.memory.remember(sequence)
        self._remove(sequence)
        self._events.append(sequence.output.finished(reason, usage_of(sequence, self.parts.formula, reason)))

    def _fail(self, sequence: Sequence, why: str, error: Exception | None = None) -> None:
        """Ends a request that cannot go on, and no other."""
        fields = sequence.request.log_fields
        log.error("%s, after %d ids", why, sequence.num_output, exc_info=error, extra=fields)
        self._remove(sequence)
        self._events.append(Failed(id=sequence.request.id, code="internal", message=why))

    def _outgrown(self, sequence: Sequence) -> None:
        """Ends a request whose text makes more patches than there is room for."""
        if sequence.num_output:
            self._finish(sequence, "length")
            return
        self._remove(sequence)
        limit = self.memory.caches.max_patches
        message = f"prompt: makes more than {limit} patches, which is what this model and its caches hold"
        self._events.append(Failed(id=sequence.request.id, code="too_long", message=message, param="prompt"))

    def _remove(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.id]
        self._deadlines.remove((sequence.deadline, sequence.arrival))
        self.ledger.ended(sequence.request.decoder, sequence.counts)

    def _expire(self) -> None:
        now = time.monotonic()
        while (sequence := self._deadlines.after(None)) and sequence.deadline <= now:
            self._finish(sequence, "timeout")
