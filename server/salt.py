"""Whose cached prefixes a request may share: those of requests with the same salt.

Requests of two API keys have different salts, so neither can learn from `cached_tokens` or from the time of a first
byte what prompts the other has sent. A request can also name a salt of its own, for one of many users of a key.
"""

import hmac
import secrets

_SECRET = secrets.token_bytes(32)
"""Of this process, so that nobody who sees a salt can try keys. An engine that restarts has an empty cache, and gets
salts with its requests."""


def salt_of(api_key: bytes, given: str | None) -> bytes:
    """api_key: the key, or its digest, that the request was let in with; empty on an open server. given: the request's
    own salt. Requests without either share one salt, which is empty."""
    if not api_key and given is None:
        return b""
    of_key = hmac.digest(_SECRET, api_key, "sha256")
    return hmac.digest(of_key, (given or "").encode(), "sha256")
