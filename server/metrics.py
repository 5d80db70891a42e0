"""Prometheus metrics. Labels are never anything that a client can choose freely."""

import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from engine.client import EngineClient
from engine.types import Snapshot

from .admission import Gate

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SECONDS_PER_BYTE = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, client: EngineClient, gate: Gate, version: str) -> None:
        self.registry = registry = CollectorRegistry()
        self.http_responses = Counter(
            "fastblt_http_responses", "HTTP responses by route and status.", ["route", "status"], registry=registry
        )
        self._requests = Counter(
            "fastblt_requests", "Ended sequences by reason.", ["decoder", "finish_reason"], registry=registry
        )
        labels = ["decoder"]
        self._first_byte = Histogram(
            "fastblt_time_to_first_byte_seconds",
            "From the arrival of a request to the first byte of a sequence.",
            labels,
            buckets=SECONDS,
            registry=registry,
        )
        self._per_byte = Histogram(
            "fastblt_time_per_byte_seconds",
            "Mean time between the bytes of a sequence behind its first.",
            labels,
            buckets=SECONDS_PER_BYTE,
            registry=registry,
        )
        self._end_to_end = Histogram(
            "fastblt_end_to_end_seconds",
            "From the arrival of a request to the end of a sequence.",
            labels,
            buckets=SECONDS,
            registry=registry,
        )
        self._engine = EngineCollector(client, gate, version)
        registry.register(self._engine)
        ProcessCollector(registry=registry)

    def clock(self, decoder: str) -> "Clock":
        return Clock(self, decoder)

    def ended(self, decoder: str, reason: str, start: float, first: float | None, last: float, num_bytes: int) -> None:
        """Records one sequence; times are of `time.perf_counter`."""
        self._requests.labels(decoder, reason).inc()
        self._end_to_end.labels(decoder).observe(time.perf_counter() - start)
        if first is not None:
            self._first_byte.labels(decoder).observe(first - start)
            if num_bytes > 1:
                self._per_byte.labels(decoder).observe((last - first) / (num_bytes - 1))
        self._engine.look()


class Clock:
    """Times one sequence."""

    def __init__(self, metrics: Metrics, decoder: str) -> None:
        self._metrics = metrics
        self._decoder = decoder
        self._start = self._last = time.perf_counter()
        self._first: float | None = None
        self._num_bytes = 0
        self._ended = False

    def advance(self, num_ids: int) -> None:
        if num_ids:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self._num_bytes += num_ids

    def end(self, reason: str) -> None:
        """The first call counts."""
        if not self._ended:
            self._ended = True
            self._metrics.ended(self._decoder, reason, self._start, self._first, self._last, self._num_bytes)


class EngineCollector(Collector):
    """The engine's newest snapshot, read when scraped.

    A restarted engine counts from 0 again; the counters here go on, short of what the last one did after it was last
    looked at.
    """

    def __init__(self, client: EngineClient, gate: Gate, version: str) -> None:
        self._client = client
        self._gate = gate
        self._version = version
        self._totals: dict[tuple[str, str], float] = {}
        self._last: dict[tuple[str, str], float] = {}
        self._seen: Snapshot | None = None

    def look(self) -> None:
        """Adds what the engine did since the last look."""
        snapshot = self._client.snapshot
        if snapshot is self._seen:
            return
        now = dict(_counts(snapshot))
        restarted = any(value < self._last.get(key, 0) for key, value in now.items())
        for key, value in now.items():
            since = 0 if restarted else self._last.get(key, 0)
            self._totals[key] = self._totals.get(key, 0) + value - since
        self._last, self._seen = now, snapshot

    def collect(self) -> Iterable[Metric]:
        self.look()
        client, snapshot = self._client, self._client.snapshot
        yield _gauge("fastblt_running_sequences", "Sequences in the running batch.", snapshot.running)
        yield _gauge("fastblt_waiting_sequences", "Sequences that wait in the engine.", snapshot.waiting)
        yield _gauge("fastblt_queued_sequences", "Admitted sequences without a first byte.", self._gate.waiting)
        yield _gauge("fastblt_engine_up", "1 if the engine is ready.", client.state == "ready")
        yield _gauge("fastblt_draining", "1 once the server shuts down.", self._gate.draining)
        used, size = (
            GaugeMetricFamily("fastblt_pages_used", "Cache pages in use.", labels=["pool"]),
            GaugeMetricFamily("fastblt_pages_capacity", "Cache pages in all.", labels=["pool"]),
        )
        for pool, stats in snapshot.pools.items():
            used.add_metric([pool], stats.used)
            size.add_metric([pool], stats.total)
        yield from (used, size)
        restarts = CounterMetricFamily("fastblt_engine_restarts", "Restarts of the engine process.")
        restarts.add_metric([], client.restarts)
        yield restarts
        for name, (help_text, label, _) in COUNTERS.items():
            family = CounterMetricFamily(f"fastblt_{name}", help_text, labels=[label] if label else [])
            for (counter, value), total in self._totals.items():
                if counter == name:
                    family.add_metric([value] if label else [], total)
            yield family
        info = GaugeMetricFamily("fastblt_build_info", "Always 1.", labels=["version", "model"])
        info.add_metric([self._version, client.limits.name], 1)
        yield info


def _per_decoder(field: str) -> Callable[[Snapshot], Mapping[str, float]]:
    return lambda snapshot: {decoder: getattr(counts, field) for decoder, counts in snapshot.decoders.items()}


COUNTERS: dict[str, tuple[str, str, Callable[[Snapshot], Mapping[str, float]]]] = {
    "steps": ("Steps of the engine.", "", lambda s: {"": s.steps}),
    "preemptions": ("Sequences put back for lack of pages.", "", lambda s: {"": s.preemptions}),
    "prompt_bytes": ("Prompt ids computed.", "", lambda s: {"": s.prompt_rows}),
    "stage_calls": ("Calls of a stage, each over a whole batch.", "stage", lambda s: s.calls),
    "stage_rows": ("Rows that went through a stage.", "stage", lambda s: s.rows),
    "stage_seconds": ("Time spent in a stage.", "stage", lambda s: s.stage_seconds),
    "stage_read_bytes": ("Weights, keys and values and look-ups that a stage read.", "stage", lambda s: s.read_bytes),
    "committed_bytes": ("Generated ids.", "decoder", _per_decoder("committed")),
    "rounds": ("Rounds of a decoder.", "decoder", _per_decoder("rounds")),
    "drafted_bytes": ("Bytes drafted, or decoded in blocks.", "decoder", _per_decoder("drafted")),
    "accepted_bytes": ("Drafted bytes that became text.", "decoder", _per_decoder("accepted")),
    "decoder_calls": ("Decoder passes of a request: the paper's NFE.", "decoder", _per_decoder("decoder_calls")),
    "global_calls": ("Encoder and global passes of a request.", "decoder", _per_decoder("global_calls")),
    "estimated_read_bytes": ("Weight bytes by the paper's formula.", "decoder", _per_decoder("estimated_bytes")),
    "read_bytes": ("Bytes really read, batches shared out.", "decoder", _per_decoder("read_bytes")),
}
"""Name -> help, label, and how to read it from a snapshot as label value -> count."""


def _counts(snapshot: Snapshot) -> Iterable[tuple[tuple[str, str], float]]:
    for name, (_, _, read) in COUNTERS.items():
        for value, count in read(snapshot).items():
            yield (name, value), count


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_text, value=float(value))
