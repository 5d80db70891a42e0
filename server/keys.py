"""API keys: their form, and the file that holds them."""

import re
from pathlib import Path

LEAST_CHARACTERS = 16
KEY = re.compile(rf"[!-~]{{{LEAST_CHARACTERS},}}")
RULE = f"an API key has at least {LEAST_CHARACTERS} characters, all of them printable ASCII and none a space or a comma"


def is_key(text: str) -> bool:
    """Whether `text` may be a key: too long to guess, and safe in a header."""
    return KEY.fullmatch(text) is not None and "," not in text


def read_key_file(path: Path) -> list[str]:
    """Reads one key per line; blank lines and lines that begin with `#` are skipped.

    Raises OSError if the file cannot be read, ValueError with the line number for an invalid line, and ValueError for a
    file without keys. No message shows a key.
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
            raise ValueError(f"{path}, line {number}: {RULE}; a comment needs its own line that begins with '#'")
        keys.append(line)
    if not keys:
        raise ValueError(f"{path} holds no API key")
    return keys
