"""Traces as a collector receives them: OTLP over HTTP, from a served load."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from server.access_log import Access
from server.telemetry import FLUSH_SECONDS, Traces
from tests.serving import ROOT, RunningServer, running_server

MARK, KEY = "Zq7content", "Zq7key-of-these-tests"
"""Whatever has these in it must not be sent."""
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
WAIT_SECONDS = 20
SCOPE = {"type": "http", "method": "GET", "scheme": "http", "path": "/v1/models", "http_version": "1.1", "headers": []}


class Collector:
    """Takes what an exporter posts to /v1/traces."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        self.headers: list[dict[str, str]] = []
        self.answers = threading.Event()
        """While it is not set, nobody gets an answer."""
        self.answers.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.paths.add(self.path)
                collector.headers.append(dict(self.headers))
                collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
                collector.answers.wait(WAIT_SECONDS)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def resources(self) -> list[dict[str, Any]]:
        return [values(spans.resource.attributes) for request in self._requests() for spans in request.resource_spans]

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self._requests()
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def _requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]


def values(attributes: Any) -> dict[str, Any]:
    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        plain = getattr(any_value, kind)
        return [value(item) for item in plain.values] if kind == "array_value" else plain

    return {attribute.key: value(attribute.value) for attribute in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    collector = Collector()
    try:
        yield collector
    finally:
        collector.close()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def post(http: httpx.Client, request_id: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    asked = {"model": "tiny", "prompt": MARK, "max_tokens": 8, "ignore_eos": True, "user": MARK, "stop": f"{MARK}?"}
    return http.post("/v1/completions", json=asked | fields, headers={"x-request-id": request_id} | (headers or {}))


class Served:
    """What a collector and a log have of one load."""

    def __init__(self, collector: Collector, log: str) -> None:
        self.collector = collector
        self.entries = [json.loads(line) for line in log.splitlines()]
        self.spans = collector.spans

    def root(self, request_id: str) -> Span:
        (span,) = [span for span in self.spans if values(span.attributes).get("fastblt.request_id") == request_id]
        return span

    def below(self, parent: Span) -> dict[str, Span]:
        return {span.name: span for span in self.spans if span.parent_span_id == parent.span_id}


def talk(server: RunningServer) -> None:
    with server.client(headers={"authorization": f"Bearer {KEY}", "user-agent": "tester/1"}) as http:
        inherited = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        assert post(http, "t-plain", inherited, model="tiny:blt-s", temperature=0, top_k=5, seed=3).status_code == 200
        assert post(http, "t-stream", stream=True, n=2, prompt=[MARK, "b"]).status_code == 200
        assert post(http, "t-wrong", temperature=7).status_code == 400
        assert http.get(f"/v1/models/{'tiny:blt'}", params={"q": MARK}).status_code == 200
        assert [http.get(path).status_code for path in ("/health/live", "/health/ready", "/metrics")] == [200] * 3
        body = {"model": "tiny", "prompt": MARK, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "t-left"}) as response:
            next(response.iter_lines())
        until(lambda: '"client_left":true' in server.log.read_text())
    server.terminate()
    assert server.process.wait(WAIT_SECONDS) == 0


@pytest.fixture(scope="module")
def served(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = tmp_path_factory.mktemp("traces") / "log"
    with pytest.MonkeyPatch.context() as patch, collecting() as collector:
        patch.setenv("OTEL_SERVICE_NAME", "fastblt-night")
        patch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
        patch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=us")
        # Longer than the test: what arrives was flushed at the end.
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
        flags = ["--log-format", "json", "--log-level", "debug", "--api-keys", KEY, "--otlp-endpoint", collector.url]
        with running_server(tiny, log, *flags) as server:
            talk(server)
    yield Served(collector, log.read_text())


def test_exported_traces_name_the_service(served: Served) -> None:
    assert served.collector.paths == {"/v1/traces"}
    assert served.collector.headers[0]["x-tenant"] == "us"
    (resource,) = served.collector.resources
    assert resource["service.name"] == "fastblt-night"
    assert resource["deployment.environment.name"] == "test"
    assert resource["service.version"] and resource["telemetry.sdk.language"] == "python"


def test_a_request_is_a_server_span_in_the_trace_of_its_caller(served: Served) -> None:
    span = served.root("t-plain")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert (span.name, span.kind) == ("POST /v1/completions", Span.SPAN_KIND_SERVER)
    assert span.status.code == Status.STATUS_CODE_UNSET
    attributes = values(span.attributes)
    wanted = {
        "http.request.method": "POST",
        "http.route": "/v1/completions",
        "http.response.status_code": 200,
        "url.path": "/v1/completions",
        "url.scheme": "http",
        "network.protocol.version": "1.1",
        "client.address": "127.0.0.1",
        "server.address": "127.0.0.1",
        "user_agent.original": "tester/1",
    }
    assert attributes | wanted == attributes
    assert "error.type" not in attributes


def test_the_models_work_is_a_child_span_with_its_cost(served: Served) -> None:
    (span,) = served.below(served.root("t-plain")).values()
    assert (span.name, span.kind) == ("text_completion tiny:blt-s", Span.SPAN_KIND_INTERNAL)
    attributes = values(span.attributes)
    wanted = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "fastblt",
        "gen_ai.request.model": "tiny:blt-s",
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.top_k": 5,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.stream": False,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": len(MARK) + 1,
        "gen_ai.usage.output_tokens": 8,
        "fastblt.decoder": "blt-s",
        "fastblt.sequences": 1,
    }
    assert attributes | wanted == attributes
    (line,) = [e for e in served.entries if e.get("completion_id") == attributes["gen_ai.response.id"]]
    names = ("decoder_calls", "global_calls", "bytes_read", "estimated_bytes", "drafted", "accepted", "queue_seconds")
    assert {name: attributes[f"fastblt.{name}"] for name in names} == {name: line[name] for name in names}


@pytest.mark.parametrize("request_id", ["t-plain", "t-stream"])
def test_queue_prefill_and_decode_spans_follow_each_other(served: Served, request_id: str) -> None:
    root = served.root(request_id)
    (span,) = served.below(root).values()
    phases = served.below(span)
    assert set(phases) == {"queue", "prefill", "decode"}
    queue, prefill, decode = phases["queue"], phases["prefill"], phases["decode"]
    (first,) = span.events
    assert first.name == "first byte"
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano == first.time_unix_nano
    moments = [
        *(root.start_time_unix_nano, span.start_time_unix_nano, queue.start_time_unix_nano),
        *(queue.end_time_unix_nano, prefill.start_time_unix_nano, prefill.end_time_unix_nano),
        *(decode.end_time_unix_nano, span.end_time_unix_nano, root.end_time_unix_nano),
    ]
    # The wall clock and the performance counter are read one after the other.
    assert all(a <= b + 1_000_000 for a, b in zip(moments, moments[1:], strict=False))
    assert abs(root.end_time_unix_nano / 1e9 - time.time()) < 600
    assert decode.end_time_unix_nano > decode.start_time_unix_nano


def test_the_span_of_a_stream_counts_all_its_sequences(served: Served) -> None:
    (span,) = served.below(served.root("t-stream")).values()
    attributes = values(span.attributes)
    assert attributes["gen_ai.request.stream"] is True
    assert attributes["gen_ai.response.time_to_first_chunk"] > 0
    assert attributes["gen_ai.response.finish_reasons"] == ["length"] * 4
    assert attributes["gen_ai.usage.output_tokens"] == 32
    assert (attributes["fastblt.prompts"], attributes["fastblt.sequences"]) == (2, 4)


def test_a_client_error_does_not_mark_the_span_as_failed(served: Served) -> None:
    span = served.root("t-wrong")
    attributes = values(span.attributes)
    assert (attributes["http.response.status_code"], attributes["fastblt.error"]) == (400, "invalid_value")
    assert "error.type" not in attributes and span.status.code == Status.STATUS_CODE_UNSET
    assert not served.below(span)


def test_the_span_marks_a_client_that_disconnected(served: Served) -> None:
    span = served.root("t-left")
    assert values(span.attributes)["fastblt.client_left"] is True
    (work,) = served.below(span).values()
    attributes = values(work.attributes)
    assert attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert 0 < attributes["gen_ai.usage.output_tokens"] < 4000
    assert "fastblt.decoder_calls" not in attributes
    assert set(served.below(work)) == {"decode"}


def test_all_requests_but_probes_are_traced(served: Served) -> None:
    roots = [span for span in served.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert sorted(span.name for span in roots) == ["GET /v1/models/{name:path}", *["POST /v1/completions"] * 4]


def test_traces_contain_neither_content_nor_api_keys(served: Served) -> None:
    sent = b"".join(served.collector.bodies)
    assert b"tester/1" in sent
    assert MARK.encode() not in sent and KEY.encode() not in sent


def test_log_lines_of_both_processes_name_the_trace(served: Served) -> None:
    span = served.root("t-left")
    lines = [entry for entry in served.entries if entry.get("request_id") == "t-left"]
    assert {entry["process"] for entry in lines} == {"server", "engine"}
    assert {entry["trace_id"] for entry in lines} == {span.trace_id.hex()}
    assert {entry["span_id"] for entry in lines} == {span.span_id.hex()}
    probe = next(entry for entry in served.entries if entry.get("path") == "/metrics")
    assert "trace_id" not in probe


def test_the_environment_alone_switches_traces_on(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running_server(tiny, tmp_path / "log") as server, server.client() as http:
            post(http, "t-unsampled")
            post(http, "t-sampled", {"traceparent": f"00-{TRACE}-{PARENT}-01"})
            # While the server runs, not only when it ends.
            until(lambda: any(span.name == "POST /v1/completions" for span in collector.spans))
        roots = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
        assert [values(span.attributes)["fastblt.request_id"] for span in roots] == ["t-sampled"]
        assert {resource["service.name"] for resource in collector.resources} == {"fastblt"}


def test_a_missing_collector_costs_one_log_line_and_no_request(tiny: Path, tmp_path: Path) -> None:
    with collecting() as gone:
        pass
    flags = ["--otlp-endpoint", gone.url, "--log-format", "json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        with running_server(tiny, tmp_path / "log", *flags) as server:
            with server.client() as http:
                assert [post(http, f"t-{number}").status_code for number in range(5)] == [200] * 5
            until(lambda: "opentelemetry" in server.log.read_text())
            began = time.monotonic()
            server.terminate()
            assert server.process.wait(WAIT_SECONDS) == 0
            assert time.monotonic() - began < 10
    entries = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (complaint,) = [entry for entry in entries if entry["logger"].startswith("opentelemetry")]
    assert complaint["level"] == "warning" and "Connection refused" in complaint["message"]
    assert entries[-1]["message"] == "stopped"


async def test_a_hanging_collector_neither_fills_memory_nor_delays_shutdown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    with collecting() as collector:
        collector.answers.clear()
        traces = Traces(collector.url, "1")
        for _ in range(1000):
            access = Access("r-1", "GET", "/v1/models", "127.0.0.1")
            traces.end(traces.start(SCOPE), access)
        began = time.monotonic()
        await traces.close()
        assert time.monotonic() - began < FLUSH_SECONDS + 1
        assert "the last spans are lost" in caplog.text
        collector.answers.set()
    # Those under way, and a full queue after them.
    assert len(collector.spans) <= 20


@pytest.mark.parametrize(
    ("variable", "value", "why"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "must be http/protobuf, not 'grpc'"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "-1", "max_queue_size must be a positive integer"),
        ("OTEL_PROPAGATORS", "pigeon", "pigeon"),
    ],
)
def test_unsupported_otel_variables_are_refused_at_the_start(variable: str, value: str, why: str) -> None:
    command = [sys.executable, "-m", "server", "serve", "--model", "none", "--otlp-endpoint", "http://127.0.0.1:1"]
    environment = os.environ | {variable: value}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert why in ended.stderr.splitlines()[-1], ended.stderr
