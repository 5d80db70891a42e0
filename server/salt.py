"""Whose cached prefixes a request may share: those of requests with the same salt.

Requests of two API keys have different salts, so neither can learn from `cached_tokens` or from the time of a first
byte what prompts the other has sent. A request can also name a salt of its own, for one of many users of a key.
"""

import hmac
import secrets

_secret = secrets.token_bytes(32)
"""Of this process, so that nobody who sees a salt can try keys. An engine that restarts has an empty cache, and gets
salts with its requests."""
_common = b""
"""The salt of requests without a key and without a salt of their own."""


def salt_of(api_key: bytes, given: str | None) -> bytes:
    """api_key: the key, or its digest, that the request was let in with; empty on an open server. given: the request's
    own salt. Requests without either share one salt, empty at first."""
    if not api_key and given is None:
        return _common
    of_key = hmac.digest(_secret, api_key, "sha256")
    return hmac.digest(of_key, (given or "").encode(), "sha256")


def forget() -> None:
    """Changes all salts, so that no request shares a prefix with one before. What these have left is never found again,
    and is the first to go when pages are needed."""
    global _secret, _common
    _secret, _common = secrets.token_bytes(32), secrets.token_bytes(32)
