"""Posts many completions to one server, so many at a time, and gives the answers in the order in which they come."""

import asyncio
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from .address import base_url
from .fastblt_client import ConnectionFailed, api_error, connection_failed, is_untrusted, retry_delay, trusting

Key = TypeVar("Key")


@dataclass(frozen=True, slots=True)
class Many:
    """concurrency: requests at a time. retries: further tries of a request after 429, 503 or a lost connection.
    timeout: seconds without any byte. ca_file: certificates to trust instead of the system's."""

    url: str
    api_key: str | None = None
    ca_file: Path | None = None
    concurrency: int = 64
    retries: int = 10
    timeout: float = 600.0

    def version(self) -> dict[str, Any]:
        """What the server says about itself, asked once: a wrong address should show at once. Raises FastBltError,
        ValueError."""
        with asyncio.Runner() as runner:
            return runner.run(self._version())

    def complete(self, bodies: Iterable[tuple[Key, dict[str, Any]]]) -> Iterator[tuple[Key, dict[str, Any]]]:
        """Each response with the key of its body. Bodies are taken as there is room.

        Raises FastBltError, ValueError; but gives the responses to all that was asked before it failed."""
        waiting = iter(bodies)
        live: dict[asyncio.Task[dict[str, Any]], Key] = {}
        failure: BaseException | None = None
        with asyncio.Runner() as runner:
            http = runner.run(self._opened())
            loop = runner.get_loop()
            try:
                while True:
                    while not failure and len(live) < self.concurrency and (found := next(waiting, None)):
                        key, body = found
                        sent = self._send(http, "POST", "/v1/completions", body, self.retries)
                        live[loop.create_task(sent)] = key
                    if not live:
                        break
                    done, _ = runner.run(_first(live))
                    for task in done:
                        key = live.pop(task)
                        if error := task.exception():
                            failure = failure or error
                        else:
                            yield key, task.result()
                if failure:
                    raise failure
            finally:
                for task in live:
                    task.cancel()
                runner.run(http.aclose())

    async def _opened(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=base_url(self.url),
            headers={"authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            timeout=httpx.Timeout(self.timeout, connect=10.0),
            limits=httpx.Limits(max_connections=self.concurrency),
            verify=trusting(self.ca_file) if self.ca_file else True,
        )

    async def _version(self) -> dict[str, Any]:
        async with await self._opened() as http:
            return await self._send(http, "GET", "/version", None, retries=0)

    async def _send(
        self, http: httpx.AsyncClient, method: str, path: str, body: dict[str, Any] | None, retries: int
    ) -> dict[str, Any]:
        for attempt in range(retries + 1):
            retry_after = ""
            try:
                response = await http.request(method, path, json=body)
            except httpx.ReadTimeout:
                # The server may be at work still; another try would pay for the same work again.
                raise ConnectionFailed(f"no byte came for {self.timeout:g} s (--timeout)") from None
            except httpx.HTTPError as error:
                failure: Exception = connection_failed(error)
                if is_untrusted(error) if isinstance(error, httpx.TransportError) else True:
                    raise failure from None
            else:
                if response.is_success:
                    return _parsed(response)
                failure = refusal = api_error(response)
                if not refusal.passes:
                    raise refusal
                retry_after = refusal.retry_after
            if attempt < retries:
                await asyncio.sleep(retry_delay(attempt, retry_after))
        raise failure


async def _first(tasks: Iterable[asyncio.Task[dict[str, Any]]]) -> tuple[set[Any], set[Any]]:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _parsed(response: httpx.Response) -> dict[str, Any]:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConnectionFailed(f"{response.url}: the answer is not a JSON object: {response.text[:80]!r}")
    return found
