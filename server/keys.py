"""API keys: their form, the file that holds them, and which are in force."""

import hashlib
import hmac
import logging
import re
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

log = logging.getLogger("fastblt.server")

LEAST_CHARACTERS = 16
KEY = re.compile(rf"[!-~]{{{LEAST_CHARACTERS},}}")
RULE = f"a key has at least {LEAST_CHARACTERS} characters, all of them printable ASCII and none a space or a comma"


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
        raise ValueError(f"{path} holds no key")
    return keys


LOOK_SECONDS = 1.0
"""How often the file is looked at, at most."""
SETTLE_SECONDS = 1.0
"""A file that was written more recently may be half written."""


class KeyRing:
    """The keys in force. Their file is read again once it has changed; a file that is wrong changes nothing.

    It is looked at when a request comes, so that a removed key is refused however quiet the server was.
    """

    def __init__(
        self, what: str, keys: Iterable[bytes], file: Path | None, load: Callable[[], Iterable[bytes]]
    ) -> None:
        """what: the keys' name in the log. keys: those in force at the start. load: reads all keys, the file's and
        others; it raises what `read_key_file` does."""
        self._what = what
        self._file = file
        self._load = load
        self._keys = _digests(keys)
        self._seen: object = None
        """What told this version of the file from others."""
        self._looked = -LOOK_SECONDS

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, key: bytes) -> bytes | None:
        """The digest of the key if it is in force."""
        self._look()
        digest = hashlib.sha256(key).digest()
        # All are compared, so that the time does not reveal which one is close. Digests have one length, so that
        # comparing them reveals nothing about the keys.
        return digest if sum(hmac.compare_digest(digest, known) for known in self._keys) else None

    def _look(self) -> None:
        if self._file is None or time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        try:
            found = self._file.stat()
            # A pipe can be read only once.
            if not stat.S_ISREG(found.st_mode) or 0 <= time.time() - found.st_mtime < SETTLE_SECONDS:
                return
            version: object = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        except OSError as error:
            version = error.errno
        if version == self._seen:
            return
        self._seen = version
        try:
            keys = _digests(self._load())
        except (OSError, ValueError) as error:
            log.error("%s: %s; the %d in force stay", self._what, error, len(self))
            return
        added, removed = len(keys - self._keys), len(self._keys - keys)
        if added or removed:
            log.info("%s: %d in force, %d new, %d removed", self._what, len(keys), added, removed)
        self._keys = keys


def _digests(keys: Iterable[bytes]) -> frozenset[bytes]:
    return frozenset(hashlib.sha256(key).digest() for key in keys)
