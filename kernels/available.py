"""Kernel backends available on this machine, found without loading torch: a server logs them in its first line."""

import hashlib
import os
import platform
from collections.abc import Set
from functools import cache
from pathlib import Path
from typing import Literal

KernelName = Literal["torch", "triton", "native"]

FOLDER = Path(__file__).parent / "native"
CPUINFO = Path("/proc/cpuinfo")
X86_64_V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"}
X86_64_V4 = X86_64_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
"""CPU features that the levels of x86-64 require beyond the first two, under Linux's names (abm is LZCNT)."""
OF_TORCH = {"default": "x86-64-v2", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
"""Levels by their names in ATEN_CPU_CAPABILITY, torch's own variable."""


@cache
def library() -> Path | None:
    """The best library of kernels/native that was compiled and that this processor can run."""
    machine = platform.machine().lower()
    names = levels(cpu_flags()) if machine in ("x86_64", "amd64") else [machine]
    return next((path for name in names if (path := FOLDER / f"{name}.so").exists()), None)


def sources() -> str | None:
    """A digest of the C that is here; None in an installation without it."""
    files = sorted(FOLDER.glob("*.[ch]"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16] if files else None


def levels(flags: Set[str]) -> list[str]:
    """The levels of x86-64 that a processor with these flags can run, the best first. ATEN_CPU_CAPABILITY bounds them
    as it does torch's kernels: a level adds in an order of its own, so only one level has the same bits everywhere."""
    wanted = {"x86-64-v4": X86_64_V4, "x86-64-v3": X86_64_V3, "x86-64-v2": set[str]()}
    names = [name for name, needed in wanted.items() if needed <= flags]
    highest = OF_TORCH.get(os.environ.get("ATEN_CPU_CAPABILITY", ""))
    return names[names.index(highest) :] if highest in names else names


def cpu_flags() -> set[str]:
    """The processor's features under Linux's names; empty if there is no such file."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def preferred(device: str, native: bool, triton: bool) -> KernelName:
    """The default backend on a device ("cpu", "cuda"). native: our C is compiled; triton: Triton is installed."""
    if device == "cuda":
        return "triton" if triton else "torch"
    return "native" if native and device == "cpu" else "torch"
