"""The one log line that each request leaves when it ends: the request, its outcome and its cost.

It never holds content. An error message may repeat what a client sent, so only the error's code is logged; a model's
name is logged only if the server offers it.
"""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config import text_of

from .errors import ApiError
from .generation import LOGGED_CHARACTERS, Generation
from .schemas import CompletionRequest
from .usage import fastblt_usage

log = logging.getLogger("fastblt.access")
content_log = logging.getLogger("fastblt.content")

CLIENT_LEFT = 499
"""Status of a request whose client has left, as in nginx; it is never sent."""
PROBES = frozenset({"/health", "/health/live", "/health/ready", "/ping", "/metrics"})
"""Routes that are polled every few seconds."""
PATH_CHARACTERS = 200
LOGGED_TEXTS = 8
"""Most prompts, and most completions, in one line with `--log-content`."""


@dataclass
class Access:
    """Facts about one request, filled in by each part of the server as it learns them."""

    request_id: str
    method: str
    path: str
    client: str
    started: float = field(default_factory=lambda: time.perf_counter())
    """By `time.perf_counter`."""
    received: float = 0.0
    """When the whole body of a completion had come, by the same clock."""
    seconds: float = 0.0
    route: str | None = None
    status: int = 0
    """0 if there was no response."""
    has_begun: bool = False
    """Whether any of the response was sent."""
    error: ApiError | None = None
    """Also one sent as an event, after status 200."""
    client_left: bool = False
    passes_on: bool = False
    """Whether another server is asked if this one refuses it for now."""
    generation: Generation | None = None

    @property
    def is_probe(self) -> bool:
        return self.path.rstrip("/") in PROBES

    @property
    def failed(self) -> bool:
        """By the server's fault, perhaps after status 200."""
        return self.status >= 500 or (self.error is not None and self.error.status >= 500)

    @property
    def outcome(self) -> Literal["ok", "rejected", "passed_on", "failed", "client_left"]:
        """Rejected: by the client's fault, or before it was admitted. Passed on: so that the client does not see it."""
        if self.client_left:
            return "client_left"
        if self.error is None:
            return "ok" if self.status else "failed"
        is_refused = self.error.status < 500 or (self.error.status == 503 and self.generation is None)
        if is_refused and self.passes_on and (self.error.status == 503 or self.error.code == "queue_full"):
            return "passed_on"
        return "rejected" if is_refused else "failed"

    def end(self, route: str | None) -> None:
        """The response is complete, or will never be."""
        self.seconds, self.route = time.perf_counter() - self.started, route

    def write(self) -> None:
        """Logs the line: probes at debug level, the server's own faults as warnings."""
        level = logging.DEBUG if self.is_probe else logging.WARNING if self.failed else logging.INFO
        if log.isEnabledFor(level):
            fields = self.fields()
            log.log(level, "%s", _sentence(fields), extra=fields)
        if self.generation and self.generation.said is not None:
            _write_content(self.generation)

    def fields(self) -> dict[str, Any]:
        """The known fields, under the names of docs/logs.md."""
        fields: dict[str, Any] = {
            "client": self.client,
            "method": self.method,
            "path": self.path[:PATH_CHARACTERS],
            "route": self.route,
            "status": self.status,
            "duration_seconds": round(self.seconds, 6),
        }
        if self.error:
            detail = self.error.body["error"]
            fields["error"] = detail["code"] or detail["type"]
            param = (detail["param"] or "").partition(".")[0]
            if param in CompletionRequest.model_fields:
                fields["param"] = param
        if self.client_left:
            fields["client_left"] = True
        if self.generation:
            fields |= _completion_fields(self.generation)
        return fields


def _completion_fields(generation: Generation) -> dict[str, Any]:
    """Fields of an admitted request. Its cost is known only when all its sequences have ended."""
    plan, streams = generation.plan, generation.streams
    fields: dict[str, Any] = {
        "completion_id": generation.id,
        "model": plan.model,
        "decoder": plan.decoder,
        "stream": plan.request.stream,
        "prompts": len(streams) // plan.samples,
        "sequences": len(streams),
        "prompt_bytes": plan.prompt_bytes,
        "completion_bytes": sum(
            stream.usage.completion_tokens if stream.finish_reason else stream.num_generated for stream in streams
        ),
        "finish_reasons": [stream.finish_reason for stream in streams],
    }
    if (seconds := generation.first_byte_seconds) is not None:
        fields["first_byte_seconds"] = seconds
    if all(stream.finish_reason for stream in streams):
        usages = [stream.usage for stream in streams]
        cost = fastblt_usage(plan.decoder, usages)
        names = ("decoder_calls", "global_calls", "drafted", "accepted", "bytes_read", "estimated_bytes", "preemptions")
        fields |= {name: getattr(cost, name) for name in names}
        fields["cached_bytes"] = sum(usage.cached_tokens for usage in usages[:: plan.samples])
        fields["queue_seconds"] = cost.queue_seconds
    return fields


def _sentence(fields: dict[str, Any]) -> str:
    """The same as a sentence."""
    said = [
        f"{fields['client']} {fields['method']} {fields['path']} {fields['status']} "
        f"in {_seconds(fields['duration_seconds'])}"
    ]
    if "model" in fields:
        model, decoder = fields["model"], fields["decoder"]
        said.append(model if model.endswith(f":{decoder}") else f"{model}:{decoder}")
        if fields["stream"]:
            said[-1] += " streamed"
        said.append(f"{fields['prompt_bytes']} + {fields['completion_bytes']} bytes")
    if "first_byte_seconds" in fields:
        said.append(f"first after {_seconds(fields['first_byte_seconds'])}")
    if "decoder_calls" in fields:
        said.append(f"{fields['decoder_calls']} decoder and {fields['global_calls']} global calls")
        said.append(f"{fields['bytes_read'] / 1e9:.3g} GB read ({fields['estimated_bytes'] / 1e9:.3g} estimated)")
    reasons = Counter(reason for reason in fields.get("finish_reasons", []) if reason)
    said += [f"{count}x {reason}" if count > 1 else reason for reason, count in reasons.items()]
    if "error" in fields:
        said.append(f"{fields['error']} ({fields['param']})" if "param" in fields else fields["error"])
    if "client_left" in fields:
        said.append("the client left")
    return ", ".join(said)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _write_content(generation: Generation) -> None:
    prompts = [
        text_of(request.prompt_ids).decode(errors="replace")
        for request in generation.plan.requests[:: generation.plan.samples][:LOGGED_TEXTS]
    ]
    asked, said = ([_cut(text) for text in texts[:LOGGED_TEXTS]] for texts in (prompts, generation.said or []))
    content_log.info("%s was continued by %s", asked, said, extra={"prompt_texts": asked, "completion_texts": said})


def _cut(text: str) -> str:
    return text if len(text) <= LOGGED_CHARACTERS else f"{text[:LOGGED_CHARACTERS]}..."
