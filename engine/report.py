"""What an engine reports for monitoring: what it is, and what it has done."""

import torch

from .build import Parts, device_name
from .config import EngineConfig
from .costs import bandwidth
from .counts import Counts
from .scheduler import Scheduler
from .types import DecoderCounts, DecoderName, EngineInfo, PoolStats, Snapshot


def info_of(config: EngineConfig, parts: Parts, prompt_rows: int, shortest_step: float) -> EngineInfo:
    """Facts that do not change. Measures the memory's bandwidth, which takes a few tenths of a second."""
    device = parts.stepper.device
    return EngineInfo(
        device=device_name(device),
        dtype=config.dtype,
        weights=config.weights or config.dtype,
        kernels=parts.kernels.name,
        weight_bytes=dict(parts.stage_bytes.weights),
        page_bytes=dict(parts.memory.caches.page_bytes),
        page_rows={name: spec.page_size for name, spec in parts.memory.caches.specs.items()},
        peak_bandwidth=bandwidth.probe(parts.kernels, getattr(torch, config.dtype), device),
        prompt_rows=prompt_rows,
        step_rows=config.max_step_rows,
        shortest_step=shortest_step,
        max_sequences=config.max_sequences,
    )


class Report:
    """An engine's counters, in addition to those of its ledger."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.steps = self.prompt_rows = self.cached_rows = 0
        self.step_seconds = 0.0
        """Of all steps."""

    def snapshot(self, scheduler: Scheduler) -> Snapshot:
        ledger, pools = self._parts.ledger, self._parts.memory.caches.pools
        ledger.poll()
        total, decoders = ledger.total, {decoder: Counts() for decoder in self._parts.limits.decoders}
        for decoder, counts in ledger.decoders.items():
            decoders[decoder].add(counts)
        # Those that wait have counts if they ran before; there may be thousands of them.
        for sequence in (*scheduler.running, *(waiting for waiting in scheduler.waiting if waiting.preemptions)):
            decoders[sequence.request.decoder].add(sequence.counts)
        return Snapshot(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            preemptions=scheduler.preemptions,
            steps=self.steps,
            step_seconds=self.step_seconds,
            prompt_rows=self.prompt_rows,
            cached_rows=self.cached_rows,
            calls=dict(total.calls),
            rows=dict(total.rows),
            bytes_read=_rounded(total.bytes_read),
            stage_seconds=dict(total.seconds),
            decoders={decoder: self._summary(decoder, counts) for decoder, counts in decoders.items()},
            patch_sizes=list(ledger.patch_sizes),
            patch_bytes=ledger.patch_bytes,
            pools={name: PoolStats(pool.num_total, pool.num_used, pool.num_idle) for name, pool in pools.items()},
            device_memory=_device_memory(self._parts.stepper.device),
        )

    def _summary(self, decoder: DecoderName, counts: Counts) -> DecoderCounts:
        return DecoderCounts(
            committed=counts.committed,
            rounds=counts.rounds,
            drafted=counts.drafted,
            accepted=counts.accepted,
            accepted_runs=list(self._parts.ledger.accepted_runs[decoder]),
            calls=dict(counts.calls),
            rows=dict(counts.rows),
            bytes_read=_rounded(counts.bytes_read),
            seconds=dict(counts.seconds),
            estimated_bytes=_rounded(self._parts.formula.by_stage(counts.decoder_calls, counts.global_calls)),
            blt_estimated_bytes=round(self._parts.formula.bytes(counts.committed, counts.patches)),
        )


def _rounded(by_stage: dict[str, float]) -> dict[str, int]:
    return {stage: round(count) for stage, count in by_stage.items()}


def _device_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes used, and in total; None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total
