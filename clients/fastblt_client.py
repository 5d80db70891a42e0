"""A client for fastblt's completions, in one file that needs only httpx; copy it anywhere.

    with Client("http://127.0.0.1:8000") as client:
        print(client.complete("def add(a, b):", max_tokens=40).text)
        for chunk in client.stream("import os\n", max_tokens=200):
            print(chunk.text, end="", flush=True)

`AsyncClient` has the same methods, awaited. Every field of `POST /v1/completions` may be given by name.
"""

import asyncio
import base64
import json
import os
import random
import ssl
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import httpx

RETRIED = (429, 503)
LONGEST_WAIT = 30.0
"""Most seconds between two tries, even if the server asks for more."""

Prompt = str | bytes | list[str] | list[bytes] | list[int] | list[list[int]]
"""Bytes need not be UTF-8."""


class FastBltError(Exception):
    """Any failure between a request and its answer."""


class ConnectionFailed(FastBltError):
    """No answer, or it broke off."""


class ApiError(FastBltError):
    """The server refused or failed. `status` is None if that happened after the first event of a stream."""

    def __init__(self, status: int | None, error: dict[str, Any]) -> None:
        super().__init__(str(error.get("message") or f"HTTP status {status}"))
        self.status = status
        self.type: str | None = error.get("type")
        self.param: str | None = error.get("param")
        self.code: str | None = error.get("code")


@dataclass(frozen=True, slots=True)
class Choice:
    """A continuation, or a piece of one. `logprobs` and `encoded`, which is `bytes` there, are as in the response."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None
    encoded: str | None = None

    @property
    def data(self) -> bytes:
        """The exact bytes; `text` shows those that are not UTF-8 as U+FFFD. Needs `return_bytes=True`, or `logprobs`,
        in the request."""
        if self.encoded is not None:
            return base64.b64decode(self.encoded)
        if self.logprobs is None:
            raise ValueError("the response has no bytes: send return_bytes=True in the request")
        return bytes(byte for byte in self.logprobs["bytes"] if byte is not None)


@dataclass(frozen=True, slots=True)
class Completion:
    """A response, or an event of a stream."""

    id: str
    model: str
    choices: list[Choice]
    usage: dict[str, Any] | None

    @property
    def text(self) -> str:
        """Text of the first choice; empty for an event without one."""
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None


def retry_delay(attempt: int, retry_after: str) -> float:
    """Seconds until the next try. attempt: how many retries there were. retry_after: the response's header, or ""."""
    seconds = float(retry_after) if retry_after.isdecimal() else 0.5 * 2 ** min(attempt, 10)
    # Random, so that clients that were refused together do not retry together.
    return min(seconds, LONGEST_WAIT) * random.uniform(1.0, 1.25)


def trusting(ca_file: str | os.PathLike[str] | None) -> ssl.SSLContext:
    """For HTTPS: trusts the certificates in this file (PEM) and no others; None trusts the system's. Raises
    ValueError."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except ssl.SSLError:
        raise ValueError(f"ca_file: {ca_file} must hold certificates in PEM") from None
    except OSError as error:
        raise ValueError(f"ca_file: {ca_file}: {error.strerror or error}") from None


def is_untrusted(error: httpx.TransportError) -> bool:
    """Whether the server's certificate was refused; another try would not help."""
    return "CERTIFICATE_VERIFY_FAILED" in str(error)


class _Base:
    def __init__(
        self, url: str, api_key: str | None, timeout: float | None, retries: int, ca_file: str | os.PathLike[str] | None
    ) -> None:
        self._retries = retries
        self._options: dict[str, Any] = {
            "base_url": url.rstrip("/").removesuffix("/v1"),
            "headers": {"authorization": f"Bearer {api_key}"} if api_key else {},
            # Bytes may take long to arrive; connecting may not.
            "timeout": httpx.Timeout(timeout, connect=10.0, pool=None),
            # The server has the queue.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=100),
            "verify": trusting(ca_file) if ca_file else True,
        }

    def _wait(self, attempt: int, response: httpx.Response | None) -> float | None:
        """Seconds until the next try; None to give up."""
        if attempt >= self._retries or (response is not None and response.status_code not in RETRIED):
            return None
        return retry_delay(attempt, response.headers.get("retry-after", "") if response is not None else "")


class Client(_Base):
    """Blocking. `timeout`: seconds without any byte from the server, None waits for ever. `retries`: further tries
    after 429, 503 or a failed connection; nothing is retried once an answer has begun. `ca_file`: certificates (PEM) to
    trust instead of the system's, for HTTPS; ValueError if it cannot be used."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, api_key: str | None = None, timeout: float | None = 120.0,
        retries: int = 3, ca_file: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(url, api_key, timeout, retries, ca_file)
        self._http = httpx.Client(**self._options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names that the server offers. Raises FastBltError."""
        with _translated():
            response = self._send("GET", "/v1/models", None)
            try:
                response.read()
            finally:
                response.close()
        return [model["id"] for model in _parse_json(response.content)["data"]]

    def complete(self, prompt: Prompt, *, model: str | None = None, **fields: Any) -> Completion:
        """The whole completion. Raises FastBltError."""
        body = _body(prompt, model or self._first_model(), fields)
        with _translated():
            response = self._send("POST", "/v1/completions", body)
            try:
                response.read()
            finally:
                response.close()
        return _completion(_parse_json(response.content))

    def stream(self, prompt: Prompt, *, model: str | None = None, **fields: Any) -> Generator[Completion, None, None]:
        """Events as they come, the last one with the usage. Closing the iterator ends the request. Raises
        FastBltError."""
        body = _stream_body(prompt, model or self._first_model(), fields)
        with _translated():
            response = self._send("POST", "/v1/completions", body)
            try:
                events = Events()
                for data in response.iter_bytes():
                    yield from events.feed(data)
                events.check_done()
            finally:
                response.close()

    def _first_model(self) -> str:
        return _only(self.models())

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        attempt = 0
        while True:
            response = None
            try:
                response = self._http.send(self._http.build_request(method, path, json=body), stream=True)
                if response.is_success:
                    return response
                try:
                    response.read()
                finally:
                    response.close()
                failure: Exception = api_error(response)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if is_untrusted(error):
                    raise
                failure = error
            wait = self._wait(attempt, response)
            if wait is None:
                raise failure
            time.sleep(wait)
            attempt += 1


class AsyncClient(_Base):
    """`Client` for asyncio."""

    def __init__(
        self, url: str = "http://127.0.0.1:8000", *, api_key: str | None = None, timeout: float | None = 120.0,
        retries: int = 3, ca_file: str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(url, api_key, timeout, retries, ca_file)
        self._http = httpx.AsyncClient(**self._options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def models(self) -> list[str]:
        """Names that the server offers. Raises FastBltError."""
        with _translated():
            response = await self._send("GET", "/v1/models", None)
            try:
                await response.aread()
            finally:
                await response.aclose()
        return [model["id"] for model in _parse_json(response.content)["data"]]

    async def complete(self, prompt: Prompt, *, model: str | None = None, **fields: Any) -> Completion:
        """The whole completion. Raises FastBltError."""
        body = _body(prompt, model or await self._first_model(), fields)
        with _translated():
            response = await self._send("POST", "/v1/completions", body)
            try:
                await response.aread()
            finally:
                await response.aclose()
        return _completion(_parse_json(response.content))

    async def stream(
        self, prompt: Prompt, *, model: str | None = None, **fields: Any
    ) -> AsyncGenerator[Completion, None]:
        """Events as they come, the last one with the usage. Closing the iterator ends the request. Raises
        FastBltError."""
        body = _stream_body(prompt, model or await self._first_model(), fields)
        with _translated():
            response = await self._send("POST", "/v1/completions", body)
            try:
                events = Events()
                async for data in response.aiter_bytes():
                    for event in events.feed(data):
                        yield event
                events.check_done()
            finally:
                await response.aclose()

    async def _first_model(self) -> str:
        return _only(await self.models())

    async def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        attempt = 0
        while True:
            response = None
            try:
                response = await self._http.send(self._http.build_request(method, path, json=body), stream=True)
                if response.is_success:
                    return response
                try:
                    await response.aread()
                finally:
                    await response.aclose()
                failure: Exception = api_error(response)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                if is_untrusted(error):
                    raise
                failure = error
            wait = self._wait(attempt, response)
            if wait is None:
                raise failure
            await asyncio.sleep(wait)
            attempt += 1


class Events:
    """Parses server-sent events from pieces of bytes, cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._done = False

    def feed(self, data: bytes) -> Iterable[Completion]:
        """The completions that are now complete. Raises ApiError for an error event, ConnectionFailed for an invalid
        event."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                event, self._data = b"\n".join(self._data), []
                if event == b"[DONE]":
                    self._done = True
                elif not self._done:
                    yield _completion(_parse_json(event))

    def check_done(self) -> None:
        """Raises ConnectionFailed unless the stream is complete."""
        if not self._done:
            raise ConnectionFailed("the stream broke off")


@contextmanager
def _translated() -> Iterator[None]:
    """Raises httpx's errors as ours."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ConnectionFailed(str(error) or type(error).__name__) from error


def _body(prompt: Prompt, model: str, fields: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in fields.items() if value is not None}
    return {"model": model, "prompt": _in_json(prompt), **given}


def _in_json(prompt: Any) -> Any:
    """Bytes become their base64."""
    if isinstance(prompt, bytes):
        return {"base64": base64.b64encode(prompt).decode()}
    return [_in_json(part) for part in prompt] if isinstance(prompt, list) else prompt


def _stream_body(prompt: Prompt, model: str, fields: dict[str, Any]) -> dict[str, Any]:
    return _body(prompt, model, {"stream_options": {"include_usage": True}, **fields, "stream": True})


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(data)
    except ValueError as error:
        raise ConnectionFailed(f"the answer is not JSON: {data[:80]!r}") from error
    if not isinstance(parsed, dict):
        raise ConnectionFailed(f"the answer is not an object: {data[:80]!r}")
    return parsed


def _completion(data: dict[str, Any]) -> Completion:
    if "error" in data:
        raise ApiError(None, data["error"])
    choices = [
        Choice(c["index"], c["text"], c.get("finish_reason"), c.get("logprobs"), c.get("bytes"))
        for c in data["choices"]
    ]
    return Completion(data["id"], data["model"], choices, data.get("usage"))


def api_error(response: httpx.Response) -> ApiError:
    """What a refusal says, also one that a proxy gives."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    if not isinstance(error, dict):
        error = {"message": f"HTTP status {response.status_code}: {response.text[:200]}"}
    return ApiError(response.status_code, error)


def _only(models: list[str]) -> str:
    if not models:
        raise FastBltError("the server offers no model")
    return models[0]
