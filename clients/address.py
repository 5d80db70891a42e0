"""Where a server is."""

from urllib.parse import urlsplit


def base_url(url: str) -> str:
    """The part before `/v1/completions`. Raises ValueError unless it is an address over HTTP."""
    base = url.rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(base)
        right = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")  # as connecting does: a label may be empty or too long
    except ValueError:
        right = False
    if not right or parts.query or parts.fragment:
        raise ValueError(f"url: must be like http://127.0.0.1:8000, not {url!r}")
    return base
