"""OpenTelemetry traces: the content of `server.access_log`'s line, as spans.

Importing this needs the extra `traces`; it is imported only if traces are configured. Names are those of
OpenTelemetry's conventions for HTTP servers and generative models; others begin with `fastblt.`.
Spans are queued and sent by a thread of their own; when the queue is full they are dropped. FastAPI can make spans,
too, but ends them with the last byte, before a stream's outcome is known, and includes the query string.
"""

import asyncio
import logging
import os
import threading
import time
from typing import Any

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer
from starlette.datastructures import Headers
from starlette.types import Scope

from .access_log import CLIENT_LEFT, Access
from .generation import Generation

log = logging.getLogger("fastblt.traces")

PATH = "/v1/traces"
PROTOCOL = "http/protobuf"
FLUSH_SECONDS = 3.0
"""Seconds to send the remaining spans when the server ends."""
COMPLAINT_SECONDS = 60.0
"""Least time between two log lines about spans that could not be sent."""
FASTBLT_FIELDS = (
    *("decoder", "prompts", "sequences", "decoder_calls", "global_calls", "drafted", "accepted"),
    *("bytes_read", "estimated_bytes", "preemptions", "queue_seconds"),
)
"""Fields of the log line that become attributes, prefixed with `fastblt.`."""


class Traces:
    """Makes and sends the spans of one server. The `OTEL_*` variables set sampling, headers, sizes and so on.

    `endpoint`: the collector's address, with or without the path for traces; None takes the environment's.
    Raises ValueError for unsupported variables.
    """

    def __init__(self, endpoint: str | None, version: str) -> None:
        for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if os.environ.get(name, PROTOCOL) != PROTOCOL:
                raise ValueError(f"{name} must be {PROTOCOL}, not {os.environ[name]!r}")
        url = None if endpoint is None else endpoint.rstrip("/").removesuffix(PATH) + PATH
        resource = Resource.create({"service.name": "fastblt", "service.version": version})
        self._provider = TracerProvider(
            # Names from the environment win.
            resource=resource.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        logging.getLogger(OTLPSpanExporter.__module__).addFilter(_Seldom())
        self._tracer: Tracer = self._provider.get_tracer("fastblt", version)

    def start(self, scope: Scope) -> Span:
        """The span of a request, in the trace named by its headers."""
        headers = Headers(scope=scope)
        host, port = scope.get("server") or (None, None)
        attributes = {
            "http.request.method": scope["method"],
            "url.scheme": scope["scheme"],
            "url.path": scope["path"],
            "network.protocol.version": scope["http_version"],
            "client.address": (scope.get("client") or (None,))[0],
            "server.address": host,
            "server.port": port,
            "user_agent.original": headers.get("user-agent"),
        }
        return self._tracer.start_span(
            scope["method"],
            context=propagate.extract(dict(headers)),
            kind=SpanKind.SERVER,
            attributes=_known(attributes),
        )

    def log_fields(self, span: Span) -> dict[str, str]:
        """Fields that link a log line to its trace."""
        context = span.get_span_context()
        return {"trace_id": f"{context.trace_id:032x}", "span_id": f"{context.span_id:016x}"}

    def end(self, span: Span, access: Access) -> None:
        """Records the request's outcome and makes its child spans."""
        fields = access.fields()
        answered = access.status not in (0, CLIENT_LEFT)
        error = fields.get("error")
        attributes = {
            "http.route": access.route,
            "http.response.status_code": access.status if answered else None,
            "error.type": (error or str(access.status)) if access.failed else None,
            "fastblt.request_id": access.request_id,
            "fastblt.error": error,
            "fastblt.client_left": fields.get("client_left"),
        }
        span.set_attributes(_known(attributes))
        if access.route:
            span.update_name(f"{access.method} {access.route}")
        if access.failed:
            span.set_status(StatusCode.ERROR)
        if access.generation and span.is_recording():
            self._completion(span, access, access.generation, fields)
        span.end()

    async def close(self) -> None:
        """Sends what is left, for at most `FLUSH_SECONDS`."""
        flushing = threading.Thread(target=self._provider.shutdown, daemon=True)
        flushing.start()
        await asyncio.to_thread(flushing.join, FLUSH_SECONDS)
        if flushing.is_alive():
            log.warning("the last spans are lost: the collector did not take them within %g s", FLUSH_SECONDS)

    def _completion(self, parent: Span, access: Access, generation: Generation, fields: dict[str, Any]) -> None:
        """Makes one span for the model's work, with a child span per phase of the sequence whose first byte came
        first."""
        request = generation.plan.request
        attributes = {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "fastblt",
            "gen_ai.output.type": "text",
            "gen_ai.request.model": generation.plan.model,
            "gen_ai.request.stream": request.stream,
            "gen_ai.request.max_tokens": request.max_tokens,
            "gen_ai.request.choice.count": request.n,
            "gen_ai.request.temperature": request.temperature,
            "gen_ai.request.top_p": request.top_p,
            "gen_ai.request.top_k": max(request.top_k, 0) or None,
            "gen_ai.request.seed": request.seed,
            "gen_ai.request.frequency_penalty": request.frequency_penalty or None,
            "gen_ai.request.presence_penalty": request.presence_penalty or None,
            "gen_ai.response.id": generation.id,
            "gen_ai.response.model": generation.plan.model,
            "gen_ai.response.finish_reasons": [reason or "abort" for reason in fields["finish_reasons"]],
            "gen_ai.response.time_to_first_chunk": fields.get("first_byte_seconds") if request.stream else None,
            "gen_ai.usage.input_tokens": fields["prompt_bytes"],
            "gen_ai.usage.output_tokens": fields["completion_bytes"],
            **{f"fastblt.{name}": fields.get(name) for name in FASTBLT_FIELDS},
        }
        # The request's clock has no date.
        epoch = time.time() - time.perf_counter()

        def stamp(moment: float) -> int:
            return int((epoch + moment) * 1e9)

        began, first, end = generation.admitted, generation.first_byte, access.started + access.seconds
        span = self._tracer.start_span(
            f"text_completion {generation.plan.model}",
            context=trace.set_span_in_context(parent),
            attributes=_known(attributes),
            start_time=stamp(began),
        )
        inside = trace.set_span_in_context(span)

        def phase(name: str, start: float, end: float) -> None:
            self._tracer.start_span(name, context=inside, start_time=stamp(start)).end(stamp(end))

        if first is not None:
            span.add_event("first byte", timestamp=stamp(first))
            # The engine reports a sequence's wait when the sequence ends.
            if queued := [stream.usage.queue_seconds for stream in generation.streams if stream.finish_reason]:
                begun = min(began + min(queued), first)
                phase("queue", began, begun)
                phase("prefill", begun, first)
            phase("decode", first, end)
        span.end(stamp(end))


def _known(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


class _Seldom(logging.Filter):
    """Limits the exporter's complaints, which come with every failed attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._next = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + COMPLAINT_SECONDS
        return True
