"""Tenants: what each may use of the server at once. A tenant is an API key, or all clients of an open server."""

import math
import time

from .errors import ApiError, Code
from .settings import ServerSettings

BURST_SECONDS = 10
"""A tenant that was idle may generate the bytes of so many seconds at once."""

Name = bytes
"""The digest of an API key; empty on an open server."""


class Tenant:
    """Counts what one tenant uses, and refuses what is above a limit."""

    def __init__(self, name: Name, settings: ServerSettings) -> None:
        self._who = "this API key has" if name else "the clients of this server have"
        self._settings = settings
        self.requests = 0
        """Admitted, and without a complete answer."""
        self.queued_bytes = 0
        """Of prompts that have no first event yet."""
        self._generated = 0.0
        """Bytes generated that the rate has not made up for: a leaky bucket, empty at 0."""
        self._looked = time.monotonic()

    def check(self, prompt_bytes: int = 0) -> None:
        """Raises ApiError 429 if one more request, with prompts of so many bytes, is above a limit. A prompt that is
        above the limit by itself passes while no other waits; it would never pass otherwise."""
        limits, wait = self._settings, self._settings.retry_after
        if (most := limits.max_requests_per_key) and self.requests >= most:
            raise self._refused("too_many_requests", f"{self.requests} requests at once, of at most {most}", wait)
        most, queued = limits.max_queued_bytes_per_key, self.queued_bytes
        if most and queued and queued + prompt_bytes > most:
            what = f"{queued} bytes of prompts waiting; {prompt_bytes} more would exceed {most}"
            raise self._refused("too_many_queued_bytes", what, wait)
        if (rate := limits.max_bytes_per_second_per_key) and (excess := self._excess(rate)) >= 0:
            what = f"generated all bytes that {rate} a second allow"
            raise self._refused("rate_limit_exceeded", what, max(math.ceil(excess / rate), wait))

    def generated(self, num_bytes: int) -> None:
        """Counts bytes as they come. A request that was admitted is not slowed down, whatever it generates: those after
        it wait for longer."""
        if rate := self._settings.max_bytes_per_second_per_key:
            self._excess(rate)
            self._generated += num_bytes

    @property
    def is_idle(self) -> bool:
        """Whether a new tenant would be like it."""
        rate = self._settings.max_bytes_per_second_per_key
        return not self.requests and (not rate or self._excess(rate) <= -rate * BURST_SECONDS)

    def _excess(self, rate: int) -> float:
        """Bytes above what the rate allows by now; negative where more may come."""
        now = time.monotonic()
        self._generated = max(self._generated - rate * (now - self._looked), 0.0)
        self._looked = now
        return self._generated - rate * BURST_SECONDS

    def _refused(self, code: Code, what: str, wait: int) -> ApiError:
        message = f"{self._who} {what} ({LIMITS[code]}); try again in {wait} s"
        return ApiError(429, message, code=code, headers={"retry-after": str(wait)})


LIMITS: dict[Code, str] = {
    "too_many_requests": "max_requests_per_key",
    "too_many_queued_bytes": "max_queued_bytes_per_key",
    "rate_limit_exceeded": "max_bytes_per_second_per_key",
}
"""Codes of refusals, and the settings that they come from."""
