"""The commit of this code. hatch_build.py runs this file too, so it imports only the standard library."""

import os
import subprocess
from pathlib import Path

BAKED = Path(__file__).with_name("COMMIT")
"""Written into a wheel. A checkout does not have it: git is asked instead."""
SECONDS = 5.0
"""Longest wait for git."""


def commit() -> str | None:
    """Its first 12 digits, with "-dirty" after them if files were changed since; None if it is not known."""
    try:
        return BAKED.read_text().strip() or None
    except OSError:
        return commit_of(Path(__file__).parents[1])


def commit_of(root: Path) -> str | None:
    """The commit of a checkout at `root` itself: a repository in a folder above it is another project's."""
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
