"""Public packages to learn from: the sources and documentation of the releases in `packages.txt`, freely licensed."""

import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath

REQUIREMENTS = Path(__file__).with_name("packages.txt")
"""Requirements of pip with hashes, and each release's licence in a comment."""
KINDS = frozenset({".py", ".md", ".rst", ".txt"})
LEFT_OUT = frozenset({"test", "tests", "testing", "locale", "fixtures", "data", "node_modules"})
"""Folders without text worth learning: tests repeat themselves, and the others hold data."""
MOST_BYTES = 256 << 10
"""Longer files are tables."""


def download(folder: Path) -> list[Path]:
    """Downloads the source archives with pip, which checks their hashes. Raises CalledProcessError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", ":all:", "--require-hashes", "--dest", str(folder), "--requirement", str(REQUIREMENTS)]
    subprocess.run(command, check=True)
    return sorted(folder.glob("*.tar.gz"))


def documents(archive: Path) -> Iterator[tuple[str, bytes]]:
    """The names, which begin with NAME-VERSION/, and contents of the texts in a source archive."""
    with tarfile.open(archive, "r:gz") as members:
        for member in members:
            path = PurePosixPath(member.name)
            if path.suffix not in KINDS or not member.isfile() or not 0 < member.size <= MOST_BYTES:
                continue
            if LEFT_OUT & set(path.parts) or (path.suffix == ".txt" and not {"doc", "docs"} & set(path.parts)):
                continue
            file = members.extractfile(member)
            assert file is not None
            yield path.as_posix(), file.read()


@cache
def licences() -> dict[str, str]:
    """The licence of each release, by NAME-VERSION."""
    found = re.findall(r"^(\S+)==(\S+) [^#]*# (.+)$", REQUIREMENTS.read_text(), re.MULTILINE)
    return {f"{name}-{version}": licence for name, version, licence in found}
