"""The commit that this code is of. hatch_build.py runs this file, too, so it needs Python alone."""

import os
import subprocess
from pathlib import Path

BAKED = Path(__file__).with_name("COMMIT")
"""Written into a wheel. A checkout has none: there git knows."""
SECONDS = 5.0
"""For git to answer, on however slow a disk."""


def commit() -> str | None:
    """Its first 12 digits, with "-dirty" after them if files were changed since; None where nothing tells."""
    try:
        return BAKED.read_text().strip() or None
    except OSError:
        return commit_of(Path(__file__).parents[1])


def commit_of(root: Path) -> str | None:
    """Of a checkout at `root` itself: a repository further up, around a virtual environment, is someone else's."""
    repository = root / ".git"
    if not repository.exists():
        return None
    git = ["git", f"--git-dir={repository}", f"--work-tree={root}"]
    command = [*git, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        done = subprocess.run(
            command,
            cwd=root,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
