"""A client for fastblt's completions, in one file that needs only httpx; copy it anywhere.

    with Client("http://127.0.0.1:8000") as client:
        print(client.complete("def add(a, b):", max_tokens=40).text)
        for chunk in client.stream("import os\n", max_tokens=200):
            print(chunk.text, end="", flush=True)

`AsyncClient` has the same methods, awaited. Every field of `POST /v1/completions` may be given by name; those of
`UNSTREAMED` only to `complete`.

An answer outlives its server: if the connection breaks off, the client asks again. A stream keeps its seed, which gives
the same bytes, and continues after the last piece that it has given. What has given nothing yet is asked anew, and the
field `timeout` of a whole completion counts from then.
"""

import asyncio
import base64
import json
import os
import random
import re
import secrets
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import Any, Self

import httpx

RETRIED = (429, 503)
LONGEST_WAIT = 30.0
"""Most seconds between two tries, even if the server asks for more, and a quarter more by chance."""

Prompt = str | bytes | list[str] | list[bytes] | list[int] | list[list[int]]
"""Bytes need not be UTF-8."""


class FastBltError(Exception):
    """Any failure between a request and its answer."""


class ConnectionFailed(FastBltError):
    """No answer, or it broke off."""


class NoConnection(ConnectionFailed):
    """No server answers at this address."""


class BrokenOff(ConnectionFailed):
    """A stream without its end."""


class ApiError(FastBltError):
    """The server refused or failed. `status` is None if that happened after the first event of a stream. `retry_after`
    is that header, or empty."""

    def __init__(self, status: int | None, error: dict[str, Any], retry_after: str = "") -> None:
        super().__init__(str(error.get("message") or f"HTTP status {status}"))
        self.status = status
        self.retry_after = retry_after
        self.type: str | None = error.get("type")
        self.param: str | None = error.get("param")
        self.code: str | None = error.get("code")

    @property
    def passes(self) -> bool:
        """Whether the same request may succeed later."""
        if self.status is None:
            # A request may have waited for its turn in a stream that had begun, and then given way.
            return self.type in ("service_unavailable", "rate_limit_error")
        # A proxy without its server says so in words of its own.
        return self.status in RETRIED or (self.status in (500, 502) and self.type is None)


@dataclass(frozen=True, slots=True)
class Choice:
    """A continuation, or a piece of one, as in the response; `encoded` is `bytes` there."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: dict[str, Any] | None
    encoded: str | None = None
    stop_reason: str | int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, Any] | None] | None = None
    trace: dict[str, Any] | None = None
    patches: dict[str, Any] | None = None

    @property
    def is_late(self) -> bool:
        """Whether a timeout ended it, the request's or the server's."""
        return self.finish_reason == "timeout" or (self.finish_reason, self.stop_reason) == ("length", "timeout")

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


UNSTREAMED = ("return_token_ids", "prompt_logprobs", "trace", "patches")
"""What these ask for is not continued over another connection."""

UNREACHED = (httpx.ConnectError, httpx.ConnectTimeout)
PASSING = (*UNREACHED, httpx.NetworkError, httpx.RemoteProtocolError, ApiError)
"""Failures after which another try may help: the server, or the way to it, may be gone, and another take its place."""
BROKEN = (*PASSING, BrokenOff, httpx.ReadTimeout)
"""The same for a stream, which a server that lives sends something every few seconds."""


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

    def _wait(self, attempt: int, failure: Exception) -> float:
        """Seconds until the next try. attempt: how many retries there were. Raises `failure` to give up."""
        if isinstance(failure, ApiError):
            passes, retry_after = failure.passes, failure.retry_after
        else:
            passes, retry_after = not (isinstance(failure, httpx.TransportError) and is_untrusted(failure)), ""
        if not passes or attempt >= self._retries:
            raise failure
        return retry_delay(attempt, retry_after)


class Client(_Base):
    """Blocking. `timeout`: seconds without any byte from the server, None waits for ever. `retries`: further tries
    in a row after 429, 503, a proxy's 500 or 502, or a connection that failed or broke off. `ca_file`: certificates
    (PEM) to trust instead of the system's, for HTTPS; ValueError if it cannot be used."""

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
            return _names(self._whole("GET", "/v1/models", None))

    def complete(self, prompt: Prompt, *, model: str | None = None, **fields: Any) -> Completion:
        """The whole completion. Raises FastBltError."""
        body = _body(prompt, model or first_model(self.models()), fields)
        with _translated():
            return _completion(self._whole("POST", "/v1/completions", body))

    def stream(self, prompt: Prompt, *, model: str | None = None, **fields: Any) -> Generator[Completion, None, None]:
        """Events as they come, the last one with the usage. Closing the iterator ends the request. Raises
        FastBltError, ValueError for a field of `UNSTREAMED`."""
        answer = Answer(_stream_body(prompt, model or first_model(self.models()), fields))
        attempt = 0
        with _translated():
            while not answer.is_whole:
                try:
                    response = self._open("POST", "/v1/completions", answer.request())
                    try:
                        for data in response.iter_bytes():
                            yield from answer.feed(data)
                        answer.check_done()
                    finally:
                        response.close()
                except BROKEN as error:
                    if answer.is_whole:
                        return
                    attempt = 0 if answer.has_grown else attempt
                    time.sleep(answer.left_of(self._wait(attempt, error), error))
                    attempt += 1

    def _whole(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        attempt = 0
        while True:
            try:
                response = self._open(method, path, body)
                try:
                    return _parse_json(response.read())
                finally:
                    response.close()
            except PASSING as error:
                time.sleep(self._wait(attempt, error))
                attempt += 1

    def _open(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """Tries once. Raises ApiError for a refusal."""
        response = self._http.send(self._http.build_request(method, path, json=body), stream=True)
        if response.is_success:
            return response
        try:
            response.read()
        finally:
            response.close()
        raise api_error(response)


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
            return _names(await self._whole("GET", "/v1/models", None))

    async def complete(self, prompt: Prompt, *, model: str | None = None, **fields: Any) -> Completion:
        """The whole completion. Raises FastBltError."""
        body = _body(prompt, model or first_model(await self.models()), fields)
        with _translated():
            return _completion(await self._whole("POST", "/v1/completions", body))

    async def stream(
        self, prompt: Prompt, *, model: str | None = None, **fields: Any
    ) -> AsyncGenerator[Completion, None]:
        """Events as they come, the last one with the usage. Closing the iterator ends the request. Raises
        FastBltError, ValueError for a field of `UNSTREAMED`."""
        answer = Answer(_stream_body(prompt, model or first_model(await self.models()), fields))
        attempt = 0
        with _translated():
            while not answer.is_whole:
                try:
                    response = await self._open("POST", "/v1/completions", answer.request())
                    try:
                        async for data in response.aiter_bytes():
                            for event in answer.feed(data):
                                yield event
                        answer.check_done()
                    finally:
                        await response.aclose()
                except BROKEN as error:
                    if answer.is_whole:
                        return
                    attempt = 0 if answer.has_grown else attempt
                    await asyncio.sleep(answer.left_of(self._wait(attempt, error), error))
                    attempt += 1

    async def _whole(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        attempt = 0
        while True:
            try:
                response = await self._open(method, path, body)
                try:
                    return _parse_json(await response.aread())
                finally:
                    await response.aclose()
            except PASSING as error:
                await asyncio.sleep(self._wait(attempt, error))
                attempt += 1

    async def _open(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """Tries once. Raises ApiError for a refusal."""
        response = await self._http.send(self._http.build_request(method, path, json=body), stream=True)
        if response.is_success:
            return response
        try:
            await response.aread()
        finally:
            await response.aclose()
        raise api_error(response)


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
            raise BrokenOff("the stream broke off")


class _Once:
    """A text that comes from its beginning on every connection, and is given once."""

    def __init__(self) -> None:
        self.given = bytearray()
        self.passed = 0
        """Bytes of it that this connection has brought."""

    def beyond(self, piece: bytes) -> bytes:
        """What is new of the next piece. Raises ConnectionFailed if it should have been another."""
        known = self.given[self.passed : self.passed + len(piece)]
        if not piece.startswith(known):
            raise ConnectionFailed("the stream broke off, and the server now gives another text")
        self.passed += len(piece)
        self.given += piece[len(known) :]
        return piece[len(known) :]


class Parts:
    """Of a choice."""

    def __init__(self) -> None:
        self.text, self.data, self.scored = _Once(), _Once(), _Once()
        self.is_ended = False

    def begin_again(self) -> None:
        for part in (self.text, self.data, self.scored):
            part.passed = 0

    def beyond(self, choice: Choice) -> Choice | None:
        """What is new of the next piece, if anything. Raises ConnectionFailed if it should have been another."""
        if self.is_ended:
            return None
        piece = choice.text
        if choice.is_late:
            # The other answer ends earlier, perhaps within a character.
            whole = piece.rstrip("\ufffd")
            piece = whole if self.text.passed + len(whole.encode()) < len(self.text.given) else piece
        text = self.text.beyond(piece.encode()).decode()
        data = self.data.beyond(base64.b64decode(choice.encoded or ""))
        scores = choice.logprobs or {"bytes": []}
        num_new = len(self.scored.beyond(bytes(byte or 0 for byte in scores["bytes"])))
        self.is_ended = choice.finish_reason is not None
        if self.is_ended and not choice.is_late and self.text.passed < len(self.text.given):
            raise ConnectionFailed("the stream broke off, and the server now gives a shorter text")
        if not (text or data or num_new or self.is_ended):
            return None
        return replace(
            choice,
            text=text,
            encoded=None if choice.encoded is None else base64.b64encode(data).decode(),
            logprobs=choice.logprobs
            and {name: part[max(0, len(part) - num_new) :] for name, part in choice.logprobs.items()},
        )


class Answer:
    """A stream over as many connections as it takes."""

    def __init__(self, body: dict[str, Any]) -> None:
        # From one seed equal prompts would get equal texts.
        drawn = {"seed": secrets.randbits(63)} if _is_single(body["prompt"]) else {}
        self._body = drawn | body
        self._choices: defaultdict[int, Parts] = defaultdict(Parts)
        self._id = ""
        self._began: float | None = None
        """When it was first asked for, but for refusals."""
        self._was_taken = False
        self.is_whole = False

    def request(self) -> dict[str, Any]:
        """The body for the next connection, with what is left of its timeout."""
        self._events = Events()
        self.has_grown = False
        """Whether this connection has brought anything new."""
        for parts in self._choices.values():
            parts.begin_again()
        if self._began is None:
            self._began = time.monotonic()
            return self._body
        left = self._left()
        return self._body if left is None else self._body | {"timeout": max(left, 0.001)}

    def feed(self, data: bytes) -> Iterator[Completion]:
        """The events that are now complete, without what was given before. Raises ApiError, ConnectionFailed."""
        for event in self._events.feed(data):
            choices = [new for choice in event.choices if (new := self._choices[choice.index].beyond(choice))]
            self._id = self._id or event.id
            self.has_grown |= bool(choices)
            # What may follow the usage is not worth another connection.
            self.is_whole |= not event.choices
            if choices or not event.choices:
                yield replace(event, id=self._id, choices=choices)

    def check_done(self) -> None:
        """Raises ConnectionFailed unless the stream is complete."""
        if not self.is_whole:
            self._events.check_done()
            self.is_whole = True

    def left_of(self, seconds: float, failure: Exception) -> float:
        """Of the seconds until the next try, those that the timeout leaves. failure: why there is another."""
        was_refused = isinstance(failure, UNREACHED) or (isinstance(failure, ApiError) and failure.status is not None)
        self._was_taken |= not was_refused
        if not self._was_taken:
            self._began = None
            return seconds
        left = self._left()
        return seconds if left is None else min(seconds, max(left, 0.0))

    def _left(self) -> float | None:
        limit = self._body.get("timeout")
        return None if limit is None or self._began is None else limit - (time.monotonic() - self._began)


def _is_single(prompt: Any) -> bool:
    """Whether it is one prompt, as JSON has it."""
    return not isinstance(prompt, list) or len(prompt) == 1 or all(isinstance(part, int) for part in prompt)


@contextmanager
def _translated() -> Iterator[None]:
    """Raises httpx's errors as ours."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise connection_failed(error) from error


def connection_failed(error: httpx.HTTPError | httpx.InvalidURL) -> ConnectionFailed:
    """httpx's error as ours."""
    why = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    if not isinstance(error, UNREACHED) or is_untrusted(error):
        return ConnectionFailed(why)
    url = error.request.url
    return NoConnection(f"no connection to {url.scheme}://{url.netloc.decode()}: {why}; is the server running there?")


def _body(prompt: Prompt, model: str, fields: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in fields.items() if value is not None}
    return {"model": model, "prompt": _in_json(prompt), **given}


def _in_json(prompt: Any) -> Any:
    """Bytes become their base64."""
    if isinstance(prompt, bytes):
        return {"base64": base64.b64encode(prompt).decode()}
    return [_in_json(part) for part in prompt] if isinstance(prompt, list) else prompt


def _stream_body(prompt: Prompt, model: str, fields: dict[str, Any]) -> dict[str, Any]:
    for name in UNSTREAMED:
        if (value := fields.get(name)) is not None and value is not False:
            raise ValueError(f"{name}: must be left out of a stream, not {value!r}; `complete` returns it")
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
        error = data["error"]
        raise ApiError(None, error if isinstance(error, dict) else {"message": str(error)})
    try:
        return Completion(data["id"], data["model"], [_choice(told) for told in data["choices"]], data.get("usage"))
    except (LookupError, TypeError, AttributeError):
        raise ConnectionFailed(f"the answer is not OpenAI's completion: {str(data)[:80]}") from None


def _choice(told: dict[str, Any]) -> Choice:
    given: dict[str, Any] = {field.name: told.get(field.name) for field in dataclass_fields(Choice)}
    given |= {"index": told["index"], "text": told["text"], "encoded": told.get("bytes")}
    return Choice(**given)


def _names(models: dict[str, Any]) -> list[str]:
    try:
        return [model["id"] for model in models["data"]]
    except (LookupError, TypeError):
        raise ConnectionFailed(f"the answer is not OpenAI's list of models: {str(models)[:80]}") from None


def api_error(response: httpx.Response) -> ApiError:
    """What a refusal says, also one that a proxy gives."""
    try:
        error = response.json()["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        error = None
    if not isinstance(error, dict):
        error = {"message": f"HTTP status {response.status_code}: {response.text[:200]}"}
    return ApiError(response.status_code, error, response.headers.get("retry-after", ""))


def first_model(models: list[str]) -> str:
    """Raises FastBltError if there is none."""
    if not models:
        raise FastBltError("the server offers no model")
    return models[0]
