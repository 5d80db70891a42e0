"""The engine: requests in, steps, events out. Synchronous, one thread, no I/O."""

import logging
import time
from itertools import count

import torch
from torch import Tensor

from . import checkpoint
from .caches import Caches
from .config import BYTE_OFFSET, EOS_ID, EngineConfig, ModelLimits
from .model import Model, find_row_floors
from .runner import Runner, Work
from .sampling import choose, draw, logprobs_of
from .scheduler import Scheduler
from .sequence import Sequence
from .types import (
    Delta,
    Event,
    Failed,
    Finished,
    FinishReason,
    PoolStats,
    Request,
    Snapshot,
    TokenLogprob,
)

log = logging.getLogger("fastblt.engine")

DECODERS = ("blt",)


class Engine:
    """One model, its caches and all requests in flight.

    Raises CheckpointError for a checkpoint that cannot be served, ValueError for sizes that cannot work.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        device, dtype = torch.device(config.device), getattr(torch, config.dtype)
        loaded = checkpoint.load(config.model)
        model = Model(loaded.config, loaded.tensors, dtype, device)
        self.caches = Caches(loaded.config, config)
        floors = find_row_floors(model, self.caches.specs, dtype, device)
        if not floors.proven:
            log.warning("this machine's matrix products depend on the batch: equal requests may differ in near-ties")
        self.isolates_documents = isolate = (
            loaded.config.isolate_documents if config.isolate_documents is None else config.isolate_documents
        )
        self.runner = Runner(model, self.caches, floors, isolate=isolate, device=device)
        self._scheduler = Scheduler(self, max_sequences=config.max_sequences, max_step_rows=config.max_step_rows)
        self.model_config = loaded.config
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = count()
        self._events: list[Event] = []
        self._steps = self._committed = self._prompt_rows = 0
        self.limits = ModelLimits(
            name=loaded.config.name,
            max_length=self.caches.max_length,
            vocab_size=loaded.config.vocab_size,
            block_size=loaded.config.block_size,
            decoders=DECODERS,
            parameters=model.parameters,
            pages={name: pool.num_total for name, pool in self.caches.pools.items()},
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` would do or say anything."""
        return bool(self._sequences or self._events)

    def add(self, request: Request) -> None:
        """Takes a request. A refusal is not raised: it comes as a `Failed` from the next step."""
        refusal = self._refuse(request)
        if refusal is not None:
            self._events.append(refusal)
            return
        sequence = Sequence(request, next(self._arrivals), self.model_config.patching, self.caches.new_tables())
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)
        stopped = False
        for token in request.output_ids:
            _, stopped = self._release_text(sequence, token)
        if request.output_ids:
            self._end_if_due(sequence, request.output_ids[-1], stopped)

    def abort(self, request_id: str) -> None:
        """Ends a request now; an unknown id is ignored."""
        if request_id in self._sequences:
            self._finish(self._sequences[request_id], "abort", b"")

    def step(self) -> list[Event]:
        """Runs one batch through the stages and returns what became of it."""
        self._expire()
        scheduled = self._scheduler.schedule()
        if scheduled:
            self._run(scheduled)
        elif self._sequences:
            self.caches.check_integrity()
            raise RuntimeError(f"{len(self._sequences)} sequences wait, and none can run")
        else:
            self.caches.check_integrity()
        events, self._events = self._events, []
        return events

    def snapshot(self) -> Snapshot:
        counts = self.runner.counts
        return Snapshot(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            committed=self._committed,
            prompt_rows=self._prompt_rows,
            calls=dict(counts.calls),
            rows=dict(counts.rows),
            pools={name: PoolStats(pool.num_total, pool.num_used) for name, pool in self.caches.pools.items()},
        )

    # The scheduler's view of memory.

    def can_reserve(self, sequence: Sequence, end: int) -> bool:
        missing = self.runner.missing_pages(sequence, end)
        return all(self.caches.pools[name].can_take(pages) for name, pages in missing.items())

    def reserve(self, sequence: Sequence, end: int) -> None:
        self.runner.reserve(sequence, end)

    def room(self, sequence: Sequence) -> int:
        if sequence.num_computed < sequence.patching.decided:
            return sequence.patching.decided - sequence.num_computed
        return self.caches.max_patches - sequence.patch_of(sequence.num_computed)

    def release(self, sequence: Sequence) -> None:
        for table in sequence.tables.values():
            table.release()

    # One step.

    def _run(self, scheduled: list[tuple[Sequence, int]]) -> None:
        batch = [self._work(sequence, end) for sequence, end in scheduled]
        generating = [w for w in batch if w.sequence.num_output]
        closed_before = [len(w.sequence.patching.starts) for w in generating]
        logits = self.runner.run(batch)
        self._steps += 1
        for w, before in zip(generating, closed_before, strict=True):
            w.sequence.global_calls += len(w.sequence.patching.starts) > before
        ready: list[tuple[Sequence, Tensor]] = []
        for w, rows in zip(batch, logits, strict=True):
            self._prompt_rows += max(min(w.end, w.sequence.num_prompt) - w.start, 0)
            if w.sequence.request.prompt_logprobs:
                self._score_prompt(w, rows)
            if w.sequence.remaining == 0:
                ready.append((w.sequence, rows[-1]))
            elif not self.room(w.sequence):
                self._fail_oversized(w.sequence)
        self._choose(ready)

    def _work(self, sequence: Sequence, end: int) -> Work:
        start = sequence.num_computed
        if sequence.request.prompt_logprobs and len(sequence.prompt_logprobs) < sequence.num_prompt:
            return Work(sequence, start, end, logits_from=start)
        complete = end == len(sequence.ids)
        return Work(sequence, start, end, logits_from=end - complete)

    def _score_prompt(self, w: Work, logits: Tensor) -> None:
        """Log-probabilities of the prompt's ids, each under the row before it."""
        sequence, scored = w.sequence, w.sequence.prompt_logprobs
        if len(scored) == sequence.num_prompt:
            return
        if not scored:
            scored.append(TokenLogprob(id=sequence.ids[0], logprob=None, top={}))
        first, last = max(w.start, len(scored) - 1), min(w.end, sequence.num_prompt - 1)
        if first < last:
            chosen = sequence.ids[first + 1 : last + 1]
            scored += logprobs_of(logits[first - w.start : last - w.start], chosen, sequence.request.logprobs or 0)
        if len(scored) == sequence.num_prompt:
            self._events.append(Delta(id=sequence.request.id, prompt_logprobs=list(scored)))

    def _choose(self, ready: list[tuple[Sequence, Tensor]]) -> None:
        for sequence, _ in ready:
            if sequence.request.max_tokens == 0:
                self._finish(sequence, "length", sequence.stopping.flush())
        ready = [(s, row) for s, row in ready if s.request.max_tokens]
        if not ready:
            return
        logits = torch.stack([row for _, row in ready])
        params = [s.request.sampling for s, _ in ready]
        uniforms = [draw(p.seed, s.request.sample_index, s.num_output) for (s, _), p in zip(ready, params, strict=True)]
        chosen = choose(logits, params, [s.counts for s, _ in ready], uniforms).tolist()
        for i, (sequence, _) in enumerate(ready):
            wanted = sequence.request.logprobs
            scored = [] if wanted is None else logprobs_of(logits[i : i + 1], [chosen[i]], wanted)
            self._commit(sequence, chosen[i], scored)

    def _commit(self, sequence: Sequence, token: int, scored: list[TokenLogprob]) -> None:
        """Appends a generated id, says so, and ends the request where it must end."""
        request = sequence.request
        sequence.append(token)
        sequence.decoder_calls += 1
        self._committed += 1
        for entry in scored:
            sequence.cumulative_logprob += entry.logprob or 0.0
        text, stopped = self._release_text(sequence, token)
        self._events.append(Delta(id=request.id, ids=[token], text=text, logprobs=scored))
        self._end_if_due(sequence, token, stopped)

    def _end_if_due(self, sequence: Sequence, token: int, stopped: bool) -> None:
        """Ends the request if its last id, `token`, is where it must end."""
        request = sequence.request
        if stopped:
            self._finish(sequence, "stop", b"")
        elif token == EOS_ID and not request.ignore_eos:
            self._finish(sequence, "stop", sequence.stopping.flush())
        elif sequence.num_output == request.max_tokens or not self.room(sequence):
            self._finish(sequence, "length", sequence.stopping.flush())

    def _release_text(self, sequence: Sequence, token: int) -> tuple[bytes, bool]:
        """Bytes that became certain with this id, and whether it completed a stop string. Specials are no text."""
        return sequence.stopping.feed(token - BYTE_OFFSET) if token >= BYTE_OFFSET else (b"", False)

    def _fail_oversized(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.id]
        limit = self.caches.max_patches
        message = f"the prompt makes more than {limit} patches, which is what this model and its caches hold"
        self._events.append(Failed(id=sequence.request.id, code="too_long", message=message, param="prompt"))

    def _finish(self, sequence: Sequence, reason: FinishReason, text: bytes) -> None:
        request = sequence.request
        self._scheduler.remove(sequence)
        del self._sequences[request.id]
        self._events.append(
            Finished(
                id=request.id,
                reason=reason,
                text=text,
                usage=sequence.usage(),
                cumulative_logprob=sequence.cumulative_logprob,
            )
        )

    def _expire(self) -> None:
        now = time.monotonic()
        for sequence in [s for s in self._sequences.values() if s.deadline is not None and s.deadline <= now]:
            self._finish(sequence, "timeout", sequence.stopping.flush())

    def _refuse(self, request: Request) -> Failed | None:
        def refuse(code: str, message: str, param: str | None) -> Failed:
            return Failed(id=request.id, code=code, message=message, param=param)  # type: ignore[arg-type]

        if request.id in self._sequences:
            return refuse("invalid", f"id {request.id!r} is in use", "id")
        if request.decoder not in DECODERS:
            return refuse(
                "decoder_unavailable",
                f"decoder {request.decoder!r} is not available; this engine offers {', '.join(DECODERS)}",
                "decoder",
            )
        vocabulary = self.model_config.vocab_size
        bad = next((i for i in (*request.prompt_ids, *request.output_ids) if not 0 <= i < vocabulary), None)
        if bad is not None or not request.prompt_ids:
            what = "is empty" if bad is None else f"holds the id {bad}"
            return refuse("invalid", f"prompt {what}; it needs ids from 0 to {vocabulary - 1}", "prompt")
        length, limit = len(request.prompt_ids) + request.max_tokens, self.caches.max_length
        if length > limit:
            return refuse(
                "too_long",
                f"prompt ({len(request.prompt_ids)} ids) and max_tokens ({request.max_tokens}) make {length}; "
                f"this model and its caches hold {limit}",
                "max_tokens",
            )
        return None
