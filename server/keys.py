"""API keys: what may be one, and where they come from."""

import re
from pathlib import Path

LEAST_CHARACTERS = 16
KEY = re.compile(rf"[!-~]{{{LEAST_CHARACTERS},}}")
RULE = f"an API key has at least {LEAST_CHARACTERS} characters, all of them printable ASCII and none a space or a comma"


def is_key(text: str) -> bool:
    """Whether it may be a key: long enough not to be guessed, and such that a header can carry it as it is."""
    return KEY.fullmatch(text) is not None and "," not in text


def read_key_file(path: Path) -> list[str]:
    """One key a line; blank lines and lines that begin with `#` hold none.

    Raises OSError if the file cannot be read, and ValueError, with the line, for a line that is anything else or for a
    file without a key. No message shows a key.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    keys = []
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        if not is_key(line):
            raise ValueError(f"{path}, line {number}: {RULE}; a comment has a line of its own that begins with '#'")
        keys.append(line)
    if not keys:
        raise ValueError(f"{path} holds no API key")
    return keys
