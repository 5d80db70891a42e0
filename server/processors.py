"""How many processors this process may use, which may be fewer than the machine has."""

import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""Of the container, in version 2 of control groups: microseconds on processors, or "max", in so many of the clock."""


def usable_processors() -> int:
    """By this process's affinity and its container's quota, rounded up: at least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        most, period = QUOTA.read_text().split()
        quota = allowed if most == "max" else math.ceil(int(most) / int(period))
    except (OSError, ValueError):
        # Another system, or version 1.
        quota = allowed
    return max(min(allowed, quota), 1)
