"""Which known name a misspelt one may mean."""

import difflib
from collections.abc import Collection


def nearest(name: str, known: Collection[str]) -> str | None:
    """None if no name is near."""
    # Only of a name that could be meant: the comparison's time grows with the length.
    found = difflib.get_close_matches(name.lower()[:80], known, n=1)
    return found[0] if found else None
