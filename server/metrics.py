"""Prometheus metrics. No label value can be chosen freely by a client."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import TYPE_CHECKING, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from engine import logs
from engine.counts import PATCH_SIZES
from engine.decoders.table import DECODERS
from engine.process.client import EngineClient
from engine.types import MAX_DRAFT, DecoderCounts, Snapshot, Usage

from .admission import Gate
from .errors import Code
from .http.connections import REASONS as CONNECTION_REASONS
from .http.connections import Connections
from .metric_aliases import vllm
from .model_names import default_model
from .settings import ServerSettings

if TYPE_CHECKING:
    from .access_log import Access

# Otherwise every counter has a second, unused series with its creation time.
disable_created_metrics()  # type: ignore[no-untyped-call]

REASONS = ("stop", "length", "timeout", "dead_end", "abort", "refused", "error")
"""Why a sequence ends. Four are the engine's; "abort": its client left, or the operator ended it; "refused": it could
not be run; "error": the engine failed. The last three count for all the sequences of a request that are still open."""
OUTCOMES = ("ok", "rejected", "passed_on", "failed", "client_left")
"""How a request ends; see `server.access_log.Access.outcome`."""
OTHER = "other"
"""The reason of a rejection whose error has no code."""
SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0),
    *(600.0, 1800.0, 3600.0),
)
"""Long texts take minutes on a CPU: a model of a billion parameters writes some 15 bytes a second on two cores."""
QUEUE_SECONDS = (0.001, 0.0025, *SECONDS)
SIZES = (16, 64, 256, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10)
SECONDS_PER_BYTE = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""A GPU takes less than half a millisecond."""
CHUNK_SECONDS = (*SECONDS_PER_BYTE, 2.5, 5.0, 10.0)
PAUSE = 19
"""How many times as long as a text took to write none is written. They hold up all streams, and need no key."""


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(
        self, client: EngineClient, gate: Gate, connections: Connections, version: str, settings: ServerSettings
    ) -> None:
        self._registry = registry = CollectorRegistry()
        self._client, self._settings = client, settings
        self._text: asyncio.Task[bytes] | None = None
        """The next one, which is not written yet."""
        self._rested = 0.0
        """When it may be, by `time.monotonic`."""
        self._responses = Counter(
            "fastblt_http_responses", "HTTP responses by route and status.", ["route", "status"], registry=registry
        )
        self._requests = Counter(
            "fastblt_requests", "HTTP requests by route and how they ended.", ["route", "outcome"], registry=registry
        )
        self._rejections = Counter(
            "fastblt_rejections", "HTTP requests that were refused, by error code.", ["reason"], registry=registry
        )
        self.continued = Counter(
            "fastblt_requests_continued", "Completions that a lost server began.", registry=registry
        )
        self.in_progress = Gauge("fastblt_http_requests_in_progress", "HTTP requests under way.", registry=registry)
        self._sequences = Counter(
            "fastblt_sequences", "Ended sequences by reason.", ["decoder", "finish_reason"], registry=registry
        )

        def histogram(name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"fastblt_{name}", help_text, ["decoder"], buckets=buckets, registry=registry)
            # `rate` misses the first event of a series that starts with it, so all series start at 0.
            for decoder in client.limits.decoders:
                made.labels(decoder)
            return made

        self._queue = histogram("queue_seconds", "From the admission of a sequence to its first step.", QUEUE_SECONDS)
        self._prefill = histogram(
            "prefill_seconds", "From the first step of a sequence to its first byte.", QUEUE_SECONDS
        )
        self._decode = histogram("decode_seconds", "From the first byte of a sequence to its end.", QUEUE_SECONDS)
        first_byte = "From the arrival of a request, body included, to the first byte of a sequence."
        self._first_byte = histogram("time_to_first_byte_seconds", first_byte, SECONDS)
        per_byte = "Mean time between the bytes of a sequence after its first."
        self._per_byte = histogram("time_per_byte_seconds", per_byte, SECONDS_PER_BYTE)
        self._inter_chunk = histogram("inter_chunk_seconds", "Time between two chunks of a sequence.", CHUNK_SECONDS)
        end_to_end = "From the arrival of a request, body included, to the end of a sequence."
        self._end_to_end = histogram("end_to_end_seconds", end_to_end, SECONDS)
        self._prompt_size = histogram("prompt_size_bytes", "Ids of a sequence's prompt.", SIZES)
        self._output_size = histogram("output_size_bytes", "Ids generated for a sequence.", SIZES)
        for decoder in client.limits.decoders:
            for reason in REASONS:
                self._sequences.labels(decoder, reason)
        for outcome in OUTCOMES:
            self._requests.labels("/v1/completions", outcome)
        for code in (*get_args(Code), OTHER):
            self._rejections.labels(code)
        self._engine = EngineCollector(client, gate, version)
        registry.register(self._engine)
        registry.register(ConnectionCollector(connections))
        ProcessCollector(registry=registry)
        # The engine process, while there is one. Its figures start at 0 with each process.
        ProcessCollector("fastblt_engine", pid=lambda: client.pid or "none", registry=registry)

    def collect(self) -> Iterable[Metric]:
        """All of them, and their aliases, which are made from the same reading."""
        families = list(self._registry.collect())
        yield from families
        if self._settings.metric_aliases == "vllm":
            yield from vllm(families, default_model(self._settings, self._client.limits))

    async def text(self) -> bytes:
        """Prometheus' text format, as of now or a moment later: those who ask during a pause share one."""
        self._text = self._text or asyncio.create_task(self._write())
        return await asyncio.shield(self._text)

    async def _write(self) -> bytes:
        await asyncio.sleep(self._rested - time.monotonic())
        self._text, began = None, time.thread_time()
        text = generate_latest(self)
        self._rested = time.monotonic() + PAUSE * (time.thread_time() - began)
        return text

    def responded(self, access: "Access") -> None:
        """Records one HTTP request that has ended."""
        route, outcome = access.route or "unmatched", access.outcome
        self._responses.labels(route, access.status).inc()
        self._requests.labels(route, outcome).inc()
        if outcome == "rejected" and access.error and not access.is_probe:
            self._rejections.labels(access.error.code or OTHER).inc()

    def clock(self, decoder: str, prompt_size: int, start: float) -> "Clock":
        return Clock(self, decoder, prompt_size, self._inter_chunk.labels(decoder), start)

    def ended(self, clock: "Clock", reason: str, usage: Usage | None) -> None:
        """Records one sequence. usage: of a sequence that the engine finished."""
        decoder = clock.decoder
        self._sequences.labels(decoder, reason).inc()
        self._prompt_size.labels(decoder).observe(clock.prompt_size)
        self._output_size.labels(decoder).observe(clock.num_bytes)
        self._end_to_end.labels(decoder).observe(time.perf_counter() - clock.start)
        if usage:
            self._queue.labels(decoder).observe(usage.queue_seconds)
            if usage.prefill_seconds:
                self._prefill.labels(decoder).observe(usage.prefill_seconds)
            if clock.first is not None:
                self._decode.labels(decoder).observe(usage.decode_seconds)
        if clock.first is not None:
            self._first_byte.labels(decoder).observe(clock.first - clock.start)
            if clock.num_bytes > 1:
                self._per_byte.labels(decoder).observe((clock.last - clock.first) / (clock.num_bytes - 1))
        self._engine.look()


class Clock:
    """Times one sequence, by `time.perf_counter`. start: when its whole request had come. How long a client takes to
    send it is no time of the server's."""

    def __init__(self, metrics: Metrics, decoder: str, prompt_size: int, inter_chunk: Histogram, start: float) -> None:
        self._metrics = metrics
        self._inter_chunk = inter_chunk
        self.decoder = decoder
        self.prompt_size = prompt_size
        self.start = self.last = start
        self.first: float | None = None
        self.num_bytes = 0
        self._ended = False

    def advance(self, num_ids: int) -> None:
        if num_ids:
            before, self.last = self.last, time.perf_counter()
            if self.first is None:
                self.first = self.last
            else:
                self._inter_chunk.observe(self.last - before)
            self.num_bytes += num_ids

    def forget(self) -> None:
        """Counts nothing: another server has counted it."""
        self._ended = True

    def end(self, reason: str, usage: Usage | None = None) -> None:
        """The first call counts."""
        if not self._ended:
            self._ended = True
            self._metrics.ended(self, reason, usage)


class EngineCollector(Collector):
    """The engine's newest snapshot, read when scraped.

    A restarted engine counts from 0 again. The counters here continue, without what the old one did after the last
    look.
    """

    def __init__(self, client: EngineClient, gate: Gate, version: str) -> None:
        self._client = client
        self._gate = gate
        self._version = version
        self._totals: dict[tuple[str, Labels], float] = {}
        self._last: dict[tuple[str, Labels], float] = {}
        self._seen: Snapshot | None = None

    def look(self) -> None:
        """Adds the engine's work since the last look."""
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
        client, snapshot, info = self._client, self._client.snapshot, self._client.info
        yield _gauge("fastblt_running_sequences", "Sequences in the running batch.", snapshot.running)
        yield _gauge("fastblt_running_capacity_sequences", "Most in a batch: --max-sequences.", info.max_sequences)
        waiting = snapshot.waiting + self._gate.in_line
        yield _gauge("fastblt_waiting_sequences", "Sequences that wait for the engine or in it.", waiting)
        yield _gauge("fastblt_queued_sequences", "Admitted sequences without a first byte.", self._gate.waiting)
        yield _gauge("fastblt_queue_capacity_sequences", "Most without a first byte: --max-queue.", self._gate.capacity)
        yield _gauge("fastblt_step_prompt_rows", "Most rows of prompts in a step.", info.prompt_rows)
        yield _gauge("fastblt_step_capacity_rows", "Most rows in a step: --max-step-rows.", info.step_rows)
        yield _gauge("fastblt_engine_up", "1 if the engine is ready.", client.responds)
        yield _gauge("fastblt_draining", "1 while the server takes no new requests.", self._gate.draining)
        pools = snapshot.pools
        used, total = ({pool: getattr(pages, kind) for pool, pages in pools.items()} for kind in ("used", "total"))
        yield _gauges("fastblt_pages_used", "Cache pages in use.", "pool", used)
        cached = {pool: pages.cached for pool, pages in pools.items()}
        yield _gauges("fastblt_pages_cached", "Cache pages held only by the prefix cache.", "pool", cached)
        yield _gauges("fastblt_pages_capacity", "Cache pages in all.", "pool", total)
        usage = max((pages.used / pages.total for pages in pools.values() if pages.total), default=0.0)
        yield _gauge("fastblt_kv_cache_usage_ratio", "Share of the pages in use, of the fullest pool.", usage)
        yield _gauges("fastblt_page_size_bytes", "Size of a cache page.", "pool", info.page_bytes)
        help_text = "Weights that every pass of a stage reads."
        yield _gauges("fastblt_stage_weight_bytes", help_text, "stage", info.weight_bytes)
        help_text = "Memory bandwidth measured at start."
        yield _gauges("fastblt_peak_bandwidth_bytes_per_second", help_text, "operation", info.peak_bandwidth)
        memory = dict(zip(("used", "total"), snapshot.device_memory or (), strict=False))
        yield _gauges("fastblt_device_memory_bytes", "Memory of the GPU.", "kind", memory)
        restarts = CounterMetricFamily("fastblt_engine_restarts", "Restarts of the engine process.")
        restarts.add_metric([], client.restarts)
        yield restarts
        # This process also writes to the log.
        self._totals["log_lines_dropped", ("server",)] = logs.dropped()
        for name, (help_text, labels, _) in COUNTERS.items():
            family = CounterMetricFamily(f"fastblt_{name}", help_text, labels=labels)
            for (counter, values), count in self._totals.items():
                if counter == name:
                    family.add_metric(values, count)
            yield family
        yield self._patch_sizes()
        geometry = GaugeMetricFamily(
            "fastblt_cache_info", "Always 1.", labels=["pool", "page_rows", "page_bytes", "pages"]
        )
        for pool, rows in info.page_rows.items():
            geometry.add_metric([pool, str(rows), str(info.page_bytes[pool]), str(client.limits.pages[pool])], 1)
        yield geometry
        about = {"version": self._version, "model": client.limits.name, "device": info.device}
        about |= {"dtype": info.dtype, "weights": info.weights, "kernels": info.kernels}
        build = GaugeMetricFamily("fastblt_build_info", "Always 1.", labels=list(about))
        build.add_metric(list(about.values()), 1)
        yield build

    def _patch_sizes(self) -> HistogramMetricFamily:
        counts = accumulate(self._totals.get(("patch_sizes", (bound,)), 0) for bound in PATCH_BOUNDS)
        return HistogramMetricFamily(
            "fastblt_patch_size_bytes",
            "Bytes of the patches that end in generated text.",
            buckets=list(zip(PATCH_BOUNDS, counts, strict=True)),
            sum_value=self._totals.get(("patch_bytes", ()), 0),
        )


class ConnectionCollector(Collector):
    """The connections of this server, read when scraped."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections

    def collect(self) -> Iterable[Metric]:
        connections = self._connections
        yield _gauge("fastblt_http_connections", "Open connections.", connections.count)
        yield _gauge("fastblt_http_connections_capacity", "Most connections that may be open.", connections.capacity)
        ended = CounterMetricFamily(
            "fastblt_http_connections_ended", "Connections that the server ended or refused.", labels=["reason"]
        )
        for reason in CONNECTION_REASONS:
            ended.add_metric([reason], connections.ended[reason])
        yield ended


Labels = tuple[str, ...]
Read = Callable[[Snapshot], Mapping[Labels, float]]


def _one(field: str) -> Read:
    return lambda snapshot: {(): getattr(snapshot, field)}


def _per_stage(field: str) -> Read:
    return lambda snapshot: {(stage,): count for stage, count in getattr(snapshot, field).items()}


def _per_decoder(field: str) -> Read:
    return lambda snapshot: {(decoder,): getattr(counts, field) for decoder, counts in snapshot.decoders.items()}


def _per_decoder_and_stage(read: Callable[[DecoderCounts], Mapping[str, float]]) -> Read:
    return lambda snapshot: {
        (decoder, stage): count
        for decoder, counts in snapshot.decoders.items()
        for stage, count in read(counts).items()
    }


def _positions(snapshot: Snapshot) -> Mapping[Labels, float]:
    """How many runs of accepted drafts reach beyond each position."""
    return {
        (decoder, str(position)): sum(counts.accepted_runs[position + 1 :])
        for decoder, counts in snapshot.decoders.items()
        if decoder in DRAFTING
        for position in range(MAX_DRAFT)
    }


DRAFTING = {name for name, spec in DECODERS.items() if spec.exact and spec.options}
"""Decoders whose drafts are verified: of those whose text is blt's, all but blt have options."""
PATCH_BOUNDS = (*(f"{size:.1f}" for size in PATCH_SIZES), "+Inf")
BOTH = ("decoder", "stage")
COUNTERS: dict[str, tuple[str, Labels, Read]] = {
    "steps": ("Steps of the engine.", (), _one("steps")),
    "step_seconds": ("Time in steps, the host's part included.", (), _one("step_seconds")),
    "preemptions": ("Sequences preempted for lack of pages.", (), _one("preemptions")),
    "log_lines_dropped": (
        "Log lines dropped because nothing read the log.",
        ("process",),
        lambda snapshot: {("engine",): snapshot.dropped_log_lines},
    ),
    "prompt_bytes": ("Prompt ids computed.", (), _one("prompt_rows")),
    "prompt_cached_bytes": ("Prompt ids found in the prefix cache.", (), _one("cached_rows")),
    "stage_calls": ("Calls of a stage, each over a whole batch.", ("stage",), _per_stage("calls")),
    "stage_rows": ("Rows that went through a stage.", ("stage",), _per_stage("rows")),
    "stage_seconds": ("Time spent in a stage.", ("stage",), _per_stage("stage_seconds")),
    "stage_read_bytes": ("Weights, keys, values and look-ups a stage read.", ("stage",), _per_stage("bytes_read")),
    "committed_bytes": ("Generated ids.", ("decoder",), _per_decoder("committed")),
    "rounds": ("Rounds of a decoder.", ("decoder",), _per_decoder("rounds")),
    "drafted_bytes": ("Bytes drafted, or decoded in blocks.", ("decoder",), _per_decoder("drafted")),
    "accepted_bytes": ("Drafted bytes that were accepted.", ("decoder",), _per_decoder("accepted")),
    "draft_rounds": (
        "Rounds that drafted, or decoded a block.",
        ("decoder",),
        lambda snapshot: {(decoder,): sum(counts.accepted_runs) for decoder, counts in snapshot.decoders.items()},
    ),
    "position_accepted_bytes": (
        "Drafted bytes that were accepted, by their position in the draft.",
        ("decoder", "position"),
        _positions,
    ),
    "decoder_stage_calls": ("Passes of requests: the paper's NFE.", BOTH, _per_decoder_and_stage(lambda c: c.calls)),
    "decoder_stage_rows": ("Rows of requests.", BOTH, _per_decoder_and_stage(lambda c: c.rows)),
    "decoder_stage_seconds": ("Requests' shares of passes.", BOTH, _per_decoder_and_stage(lambda c: c.seconds)),
    "decoder_stage_read_bytes": (
        "Bytes read, with weights divided among the batch.",
        BOTH,
        _per_decoder_and_stage(lambda c: c.bytes_read),
    ),
    "decoder_stage_estimated_bytes": (
        "Weight bytes by the paper's formula.",
        BOTH,
        _per_decoder_and_stage(lambda c: c.estimated_bytes),
    ),
    "blt_estimated_bytes": (
        "The same formula for plain BLT generating the same bytes.",
        ("decoder",),
        _per_decoder("blt_estimated_bytes"),
    ),
}
"""Name -> help, labels, and how to read it from a snapshot as label values -> count."""


def _counts(snapshot: Snapshot) -> Iterable[tuple[tuple[str, Labels], float]]:
    for name, (_, _, read) in COUNTERS.items():
        for values, count in read(snapshot).items():
            yield (name, values), count
    for bound, count in zip(PATCH_BOUNDS, snapshot.patch_sizes, strict=False):
        yield ("patch_sizes", (bound,)), count
    yield ("patch_bytes", ()), snapshot.patch_bytes


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_text, value=float(value))


def _gauges(name: str, help_text: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, help_text, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family
