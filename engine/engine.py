"""The engine: requests in, steps, events out. Synchronous, one thread, no I/O."""

import logging
import time
from bisect import bisect_left
from collections.abc import Sequence as Seq
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from kernels.dispatch import choose_kernels

from . import checkpoint
from .config import BYTE_OFFSET, EOS_ID, EngineConfig, ModelConfig, ModelLimits, is_byte
from .costs import bandwidth, calibration
from .costs.accounting import PaperFormula, StageBytes
from .costs.latency import StageCosts
from .counts import Counts
from .decoders import Committed, Decoder, Experience, Result, make_decoder
from .memory.caches import Caches, plan_caches
from .memory.prefix import PrefixCache
from .memory.room import check_room
from .model import Model, find_row_floors
from .model.layers import matrix_dtype
from .scheduler import Part, Scheduler
from .sequence import Sequence
from .step.ahead import Passes
from .step.ahead.policy import RunAhead
from .step.graphs import Eager, Graphs
from .step.results import results_of
from .step.runner import Runner, StageCounts, Work
from .step.sampling import logprobs_of
from .types import (
    MAX_DRAFT,
    DecoderCounts,
    Delta,
    Event,
    Facts,
    Failed,
    Finished,
    FinishReason,
    PoolStats,
    Request,
    Snapshot,
    TokenLogprob,
    Trace,
)

log = logging.getLogger("fastblt.engine")


class Engine:
    """One model, its caches and all requests in flight.

    Raises CheckpointError for a checkpoint that cannot be served, ValueError for a device that is not there and for
    sizes that cannot work.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        device, dtype, fp8 = torch.device(config.device), getattr(torch, config.dtype), config.weights == "float8"
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device 'cuda': torch {torch.__version__} finds no CUDA device; 'cpu' needs none")
        loaded = checkpoint.load(config.model, patcher=config.patcher, patching_threshold=config.patching_threshold)
        for note in loaded.notes:
            log.warning("%s", note)
        self._kernels = kernels = choose_kernels(config.kernels, device)
        if device.type == "cpu" and config.kernels is None and kernels.name == "torch":
            log.warning("fastblt's own CPU kernels are not compiled: torch computes, several times as slowly")
        matrices, plan = matrix_dtype(loaded.tensors, dtype, kernels), plan_caches(loaded.config, config)
        check_room(
            loaded.config,
            loaded.tensors,
            plan,
            dtype,
            matrices,
            device,
            # Our own products hold them as bfloat16, and in panels.
            fp8=fp8 and not kernels.widens,
            mapped=kernels.name == "torch",
        )
        model = Model(loaded.config, loaded.tensors, dtype, device, kernels, fp8=fp8)
        self.caches = Caches(loaded.config, config)
        model.check_lengths(self.caches.max_length, self.caches.max_patches)
        self._prefixes = PrefixCache(self.caches) if config.prefix_cache else None
        floors = find_row_floors(model, self.caches.specs, dtype, device)
        if not floors.proven:
            log.warning("this machine's matrix products depend on the batch: equal requests may differ in near-ties")
        self.isolates_documents = isolate = (
            loaded.config.isolate_documents if config.isolate_documents is None else config.isolate_documents
        )
        itemsize = dtype.itemsize
        records = device.type == "cuda" if config.graphs is None else config.graphs
        executor = Graphs if records else Eager
        self._stage_bytes = StageBytes.of(
            loaded.config,
            itemsize,
            model.hash_itemsize,
            matrix_itemsize=model.matrix_itemsize,
            # Our own products hold them as bfloat16.
            fp8=fp8 and not kernels.widens,
        )
        self.runner = Runner(
            model,
            self.caches,
            self._prefixes,
            floors,
            executor(device, floors.rows),
            isolate=isolate,
            device=device,
            stage_bytes=self._stage_bytes,
            costs=StageCosts(loaded.config.decoder_input == "encoder", has_device=device.type != "cpu"),
            ahead=RunAhead.everywhere(config.run_ahead),
        )
        self._passes = Passes(self.runner, kernels)
        self._formula = PaperFormula.of(loaded.config, itemsize)
        self._experience = Experience()
        self._decoders = _decoders(loaded.config)
        self.model_config = loaded.config
        self._begin()
        self.limits = ModelLimits(
            name=loaded.config.name,
            max_length=self.caches.max_length,
            vocab_size=loaded.config.vocab_size,
            block_size=loaded.config.block_size,
            decoders=self._decoders,
            parameters=model.parameters,
            pages={name: pool.num_total for name, pool in self.caches.pools.items()},
            patching=loaded.config.patching,
        )

    def _begin(self) -> None:
        """Nothing has been asked for, done or counted yet."""
        config = self.config
        self._scheduler = Scheduler(self, max_sequences=config.max_sequences, max_step_rows=config.max_step_rows)
        self.runner.counts = StageCounts()
        self._sequences: dict[str, Sequence] = {}
        self._arrivals = count()
        self._events: list[Event] = []
        self._steps = self._prompt_rows = self._cached_rows = 0
        self._step_seconds = 0.0
        self._costs = {decoder: Counts() for decoder in self._decoders}
        """Of requests that have ended."""

    def calibrate(self) -> None:
        """Learns how long steps take, from the file if there is one, else from some that it tries; so it knows how many
        rows of prompts a step can have. Takes up to two seconds, and where these steps must be compiled and recorded up
        to a minute more. Must come before the first request, and need not come.

        Raises ValueError for a file that holds something else, OSError for one that cannot be read or written.
        """
        config, facts = self.config, self._identity()
        path = Path(config.stage_costs) if config.stage_costs else None
        steps = calibration.read(path, facts) if path else None
        if steps is None:
            steps = self._try_steps()
            if path:
                calibration.write(path, facts, steps)
        for tried in steps:
            for stage, (rows, seconds) in tried.stages.items():
                self.runner.costs.starts_at(stage, rows, seconds)
        rows = calibration.prompt_rows(steps, config.max_stall_ms / 1000, config.max_step_rows)
        self._scheduler.max_prompt_rows = rows
        log.info("steps take %.3g ms or more, and up to %d rows of prompts", 1000 * steps[0].seconds, rows)

    def _identity(self) -> dict[str, str | int]:
        """What the cost of a step depends on."""
        config, device = self.config, self.runner.device
        return {
            "model": config.model,
            "parameters": self.limits.parameters,
            "patching": str(self.model_config.patching),
            "dtype": config.dtype,
            "weights": config.weights or config.dtype,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "kernels": self._kernels.name,
            "threads": torch.get_num_threads(),
        }

    def _try_steps(self) -> list[calibration.TriedStep]:
        """Leaves no trace but in the time that has passed."""
        heard = calibration.Heard()
        costs, self.runner.costs = self.runner.costs, heard
        prefixes, self._prefixes = self._prefixes, None

        def step(rows: int) -> calibration.TriedStep:
            self.add(Request(id="trial", prompt_ids=calibration.PROMPT[:rows], max_tokens=1, ignore_eos=True))
            began = time.perf_counter()
            while self.has_work:
                self.step()
            seconds = time.perf_counter() - began
            self.runner.hear()
            return heard.step(rows, seconds)

        try:
            most_rows = min(self.config.max_step_rows, self.caches.max_length - 1)
            return calibration.try_steps(step, most_rows, lambda: self.runner.executor.num_recorded)
        finally:
            self.runner.costs, self._prefixes = costs, prefixes
            self._begin()

    @property
    def has_work(self) -> bool:
        """Whether `step` would do or say anything."""
        return bool(self._sequences or self._events)

    def add(self, request: Request, decoder: Decoder | None = None) -> None:
        """Takes a request, to be decoded by `decoder` instead of its own if there is one.

        A refusal is not raised: it comes as a `Failed` from the next step.
        """
        refusal = self._refuse(request)
        if refusal is not None:
            log.debug("refused: %s", refusal.code, extra=request.log_fields)
            self._events.append(refusal)
            return
        config = self.model_config
        decoder = decoder or make_decoder(request, config.block_size, self.runner.costs, self._experience)
        tables = self.caches.new_tables()
        sequence = Sequence(request, next(self._arrivals), tables, decoder, config.mask_id)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)
        reason = None
        for token in request.output_ids:
            _, reason = self._take(sequence, token)
        if reason:
            self._finish(sequence, reason, sequence.stopping.flush())

    def abort(self, request_id: str) -> None:
        """Ends a request now; an unknown id is ignored."""
        if request_id in self._sequences:
            sequence = self._sequences[request_id]
            log.debug("aborted after %d ids", sequence.num_output, extra=sequence.request.log_fields)
            self._finish(sequence, "abort", b"")

    def step(self) -> list[Event]:
        """Runs one batch through the stages and returns what became of it."""
        began = time.perf_counter()
        self._expire()
        scheduled = self._scheduler.schedule()
        if scheduled:
            self._run(scheduled)
            self._steps += 1
            self._step_seconds += time.perf_counter() - began
        elif self._sequences:
            self.caches.check_integrity()
            raise RuntimeError(f"{len(self._sequences)} sequences wait, and none can run")
        else:
            self.caches.check_integrity()
        events, self._events = self._events, []
        return events

    def facts(self) -> Facts:
        """What does not change. Tries the memory's bandwidth, which takes a few tenths of a second."""
        config, device = self.config, self.runner.device
        dtype = getattr(torch, config.dtype)
        return Facts(
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            dtype=config.dtype,
            weights=config.weights or config.dtype,
            kernels=self._kernels.name,
            weight_bytes=self.stage_weights,
            page_bytes=dict(self.caches.page_bytes),
            peak_bandwidth=bandwidth.probe(self._kernels, dtype, device),
            prompt_rows=self._scheduler.max_prompt_rows,
        )

    @property
    def stage_weights(self) -> dict[str, int]:
        """Bytes of weights that a call of each stage reads."""
        return dict(self._stage_bytes.weights)

    def snapshot(self) -> Snapshot:
        self.runner.hear()
        counts = self.runner.counts
        costs = {decoder: Counts() for decoder in self._decoders}
        for decoder, cost in self._costs.items():
            costs[decoder].add(cost)
        for sequence in self._sequences.values():
            costs[sequence.request.decoder].add(sequence.cost)
        return Snapshot(
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            preemptions=self._scheduler.preemptions,
            steps=self._steps,
            step_seconds=self._step_seconds,
            prompt_rows=self._prompt_rows,
            cached_rows=self._cached_rows,
            calls=dict(counts.calls),
            rows=dict(counts.rows),
            read_bytes={stage: round(read) for stage, read in counts.bytes_read.items()},
            stage_seconds=dict(counts.seconds),
            decoders={decoder: self._summary(decoder, cost) for decoder, cost in costs.items()},
            pools={
                name: PoolStats(pool.num_total, pool.num_used, pool.num_idle)
                for name, pool in self.caches.pools.items()
            },
            device_memory=self._device_memory(),
        )

    def _device_memory(self) -> tuple[int, int] | None:
        if self.runner.device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self.runner.device)
        return total - free, total

    def _summary(self, decoder: str, cost: Counts) -> DecoderCounts:
        estimated = self._formula.by_stage(cost.decoder_calls, cost.global_calls)
        return DecoderCounts(
            committed=cost.committed,
            rounds=cost.rounds,
            drafted=cost.drafted,
            accepted=cost.accepted,
            calls=dict(cost.calls),
            rows=dict(cost.rows),
            read_bytes={stage: round(read) for stage, read in cost.bytes_read.items()},
            seconds=dict(self.runner.counts.decoder_seconds[decoder]),
            estimated_bytes={stage: round(read) for stage, read in estimated.items()},
            blt_estimated_bytes=round(self._formula.bytes(cost.committed, cost.patches)),
        )

    @property
    def running(self) -> list[Sequence]:
        """The running batch."""
        return self._scheduler.running

    # The scheduler's view of memory.

    def can_reserve(self, part: Part) -> bool:
        return self.runner.can_reserve(part.sequence, part.end, part.reach)

    def reserve(self, part: Part) -> None:
        self.runner.reserve(part.sequence, part.end, part.reach)

    def room(self, sequence: Sequence) -> int:
        if sequence.num_computed < sequence.patching.decided:
            return sequence.patching.decided - sequence.num_computed
        return self.caches.max_patches - sequence.patch_of(sequence.num_computed)

    def attach(self, sequence: Sequence) -> None:
        if not self._prefixes:
            return
        unscored = sequence.request.prompt_logprobs and len(sequence.prompt_logprobs) < sequence.num_prompt
        if unscored:
            # Its scores come from rows that must run.
            sequence.prefix = self._prefixes.root
        else:
            self._prefixes.attach(sequence)

    def release(self, sequence: Sequence) -> None:
        self.runner.forget(sequence)
        for table in sequence.tables.values():
            table.release()

    # One step.

    @torch.inference_mode()
    def _run(self, parts: list[Part]) -> None:
        self.runner.costs.company = len(self._scheduler.running)
        now = time.monotonic()
        for part in parts:
            sequence = part.sequence
            if sequence.begun is None:
                sequence.begun, sequence.num_cached = now, min(sequence.num_computed, sequence.num_prompt)
                self._cached_rows += sequence.num_cached
        executor = self.runner.executor
        began, recorded = time.perf_counter(), executor.num_recorded
        stages_before = self.runner.stage_seconds()
        batch = [self._work(part) for part in parts]
        calls_before = self.runner.counts.calls["decoder"]
        results = self._passes.run(batch) or self._run_once(batch)
        for part, w, result in zip(parts, batch, results, strict=True):
            self._advance(part, w, result)
        stages = self.runner.stage_seconds() - stages_before
        rows = sum(w.num_clean + w.num_cells for w in batch)
        passes = max(self.runner.counts.calls["decoder"] - calls_before, 1)
        if executor.num_recorded == recorded:
            # On a GPU the clocks of stages run late, so that an earlier step's may be among these.
            self.runner.costs.saw("step", rows, max(time.perf_counter() - began - stages, 0.0) / passes)

    def _run_once(self, batch: list[Work]) -> Seq[Result | None]:
        logits = self.runner.run(batch)
        at = 0
        for w in batch:
            if w.sequence.request.prompt_logprobs:
                self._score_prompt(w, logits[at : at + w.end - w.logits_from])
            at += w.num_wanted
        return results_of(batch, logits, self._kernels)

    def _work(self, part: Part) -> Work:
        sequence, call = part.sequence, part.call
        start = sequence.num_computed
        if call and call.runs_clean:
            sequence.extend(call.drafts)
        if sequence.request.prompt_logprobs and len(sequence.prompt_logprobs) < sequence.num_prompt:
            logits_from = start
        elif call is None or not call.wants:
            logits_from = part.end
        else:
            logits_from = start if call.drafts else part.end - 1
        counted_from = max(sequence.num_prompt - 1, sequence.patching.decided)
        return Work(sequence, start, part.end, part.call, logits_from, counted_from)

    def _advance(self, part: Part, w: Work, result: Result | None) -> None:
        """What a sequence's step came to: rows computed, perhaps ids committed, perhaps its end."""
        sequence, request = w.sequence, w.sequence.request
        self._prompt_rows += max(min(w.end, sequence.num_prompt) - w.start, 0)
        drafts = part.call.drafts if part.call and part.call.runs_clean else ()
        if drafts:
            sequence.retract(len(sequence.ids) - len(drafts))
        else:
            sequence.num_computed = w.end
        if result is None:
            self._settle(sequence)
            if sequence.remaining and not self.room(sequence):
                self._outgrown(sequence)
            return
        if request.max_tokens == 0:
            if request.patches_from is not None:
                entropies, starts = self._decisions(sequence)
                self._events.append(Delta(id=request.id, entropies=entropies, patch_starts=starts))
            self._finish(sequence, "length", sequence.stopping.flush())
            return
        outcome = sequence.resume(result)
        if drafts or (outcome and outcome.rounds > 1):
            # The last id is the model's own: its row has not run.
            sequence.cut(len(sequence.ids) + len(outcome.ids) - 1 if outcome else sequence.num_computed)
        if outcome is None:
            return
        cost = sequence.cost
        cost.rounds += outcome.rounds
        cost.drafted += outcome.drafted
        cost.accepted += outcome.accepted
        self._commit(sequence, outcome)

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

    def _commit(self, sequence: Sequence, outcome: Committed) -> None:
        """Appends generated ids up to where the request must end, and says so."""
        request = sequence.request
        ids: list[int] = []
        text = b""
        reason: FinishReason | None = None
        for token in outcome.ids:
            sequence.append(token)
            ids.append(token)
            released, reason = self._take(sequence, token)
            text += released
            if reason:
                break
        scores = outcome.scores[: len(ids)]
        for entry in scores:
            sequence.cumulative_logprob += entry.logprob or 0.0
        sequence.cost.committed += len(ids)
        sequence.cost.patches += self._count_patches(sequence, len(ids))
        traces = self._traces(sequence, outcome, len(ids)) if request.trace else []
        entropies, starts = self._decisions(sequence) if request.patches_from is not None else ([], [])
        self._events.append(
            Delta(
                id=request.id,
                ids=ids,
                text=text,
                logprobs=scores,
                traces=traces,
                entropies=entropies,
                patch_starts=starts,
            )
        )
        if reason:
            self._finish(sequence, reason, sequence.stopping.flush())
            return
        self._settle(sequence)
        if not self.room(sequence):
            self._finish(sequence, "length", sequence.stopping.flush())

    def _settle(self, sequence: Sequence) -> None:
        if self._prefixes:
            self._prefixes.remember(sequence)
        self.runner.settle(sequence)

    def _count_patches(self, sequence: Sequence, num_ids: int) -> int:
        """Patches that generated ids begin, as far as decided now and not counted before."""
        starts = sequence.patching.starts
        before = sequence.num_counted or bisect_left(starts, len(sequence.ids) - num_ids)
        sequence.num_counted = len(starts)
        return len(starts) - before

    def _traces(self, sequence: Sequence, outcome: Committed, num_ids: int) -> list[Trace]:
        starts = sequence.patching.starts
        told = bisect_left(starts, sequence.num_prompt) if not sequence.num_traced else sequence.num_traced
        sequence.num_traced = len(starts)
        patch_starts = [start - sequence.num_prompt for start in starts[told:]]
        if outcome.rounds > 1:
            # Rounds of blt, which drafts nothing and commits a byte at a time.
            return [Trace(num_ids=1, patch_starts=patch_starts), *[Trace(num_ids=1)] * (num_ids - 1)]
        return [
            Trace(
                num_ids=num_ids,
                drafts=list(outcome.drafts),
                accepted=outcome.accepted,
                passes=list(outcome.passes),
                patch_starts=patch_starts,
            )
        ]

    def _decisions(self, sequence: Sequence) -> tuple[list[float], list[int]]:
        """Entropies and patch starts that have not been told before."""
        told, patching = sequence.num_told, sequence.patching
        # More may be known of a round that ends its request: what is told does not depend on how it was decoded.
        sequence.num_told = end = min(patching.decided, max(len(sequence.ids) - 1, sequence.num_prompt))
        return patching.decisions(told, end)

    def _take(self, sequence: Sequence, token: int) -> tuple[bytes, FinishReason | None]:
        """The bytes that became certain with a committed id, and whether it ends the request. Only bytes are text."""
        text, stopped = sequence.stopping.feed(token - BYTE_OFFSET) if is_byte(token) else (b"", False)
        if stopped or (token == EOS_ID and not sequence.request.ignore_eos):
            return text, "stop"
        return text, "length" if sequence.num_output == sequence.request.max_tokens else None

    def _outgrown(self, sequence: Sequence) -> None:
        if sequence.num_output:
            self._finish(sequence, "length", sequence.stopping.flush())
            return
        self._scheduler.remove(sequence)
        del self._sequences[sequence.request.id]
        self._costs[sequence.request.decoder].add(sequence.cost)
        limit = self.caches.max_patches
        message = f"the prompt makes more than {limit} patches, which is what this model and its caches hold"
        self._events.append(Failed(id=sequence.request.id, code="too_long", message=message, param="prompt"))

    def _finish(self, sequence: Sequence, reason: FinishReason, text: bytes) -> None:
        request = sequence.request
        if self._prefixes:
            self._prefixes.remember(sequence)
        self._scheduler.remove(sequence)
        del self._sequences[request.id]
        self._costs[request.decoder].add(sequence.cost)
        self._events.append(
            Finished(
                id=request.id,
                reason=reason,
                text=text,
                usage=sequence.usage(self._formula),
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
        if request.decoder not in self._decoders:
            return refuse("decoder_unavailable", self._why_unavailable(request.decoder), "decoder")
        if not 1 <= request.draft_length <= MAX_DRAFT:
            return refuse(
                "invalid", f"draft_length goes from 1 to {MAX_DRAFT}, not {request.draft_length}", "draft_length"
            )
        trained = self.model_config.block_size
        if request.block_size is not None and not 1 <= request.block_size <= (trained or MAX_DRAFT):
            why = f"this model was trained with blocks of up to {trained} bytes"
            return refuse(
                "invalid", f"block_size goes from 1 to {trained}, not {request.block_size}: {why}", "block_size"
            )
        vocabulary = self.model_config.vocab_size
        bad = next((i for i in (*request.prompt_ids, *request.output_ids) if not 0 <= i < vocabulary), None)
        if bad is not None or not request.prompt_ids:
            what = "is empty" if bad is None else f"holds the id {bad}"
            return refuse("invalid", f"prompt {what}; it needs ids from 0 to {vocabulary - 1}", "prompt")
        if len(request.output_ids) > request.max_tokens:
            why = f"holds {len(request.output_ids)} ids, and max_tokens is {request.max_tokens}"
            return refuse("invalid", f"output_ids {why}", "output_ids")
        length, limit = len(request.prompt_ids) + request.max_tokens, self.caches.max_length
        blocks = request.decoder == "blt-d" or (request.decoder == "auto" and not request.exact)
        spare = (request.block_size or self.model_config.block_size or 1) - 1 if blocks and request.max_tokens else 0
        if length + spare > limit:
            behind = f", and the last block may reach {spare} behind them" if spare else ""
            return refuse(
                "too_long",
                f"prompt ({len(request.prompt_ids)} ids) and max_tokens ({request.max_tokens}) make {length}{behind}; "
                f"this model and its caches hold {limit}",
                "max_tokens",
            )
        return None

    def _why_unavailable(self, decoder: str) -> str:
        why = "" if decoder == "auto" else ": this checkpoint was not trained with block diffusion and has no [MASK]"
        return f"decoder {decoder!r} is not available{why}; this engine offers {', '.join(self._decoders)}"


def _decoders(config: ModelConfig) -> tuple[str, ...]:
    """The decoders that a model can be run with."""
    return ("blt", "blt-s", "blt-d", "blt-dv", "auto") if config.mask_id is not None else ("blt", "blt-s", "auto")
