"""Every Triton kernel compiles for the real shapes, without spilling registers, within the devices' shared memory."""

import os
import subprocess
import sys
from pathlib import Path

from kernels.dispatch import TritonKernels

ROOT = Path(__file__).parent.parent


def test_triton_kernels_compile_for_real_shapes_and_fit_the_device() -> None:
    # Kernels that were defined for the interpreter cannot be compiled: another process defines them anew.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernels_static", "--rows", "1", "64", "--ones"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    names = {name for name, value in vars(TritonKernels).items() if isinstance(value, staticmethod)}
    assert {row[0][2:] for row in rows} == names | {"settle", "slot_attention"}
    assert {row[2] for row in rows} == {"80", "90", "100"}
    assert "all fit" in done.stdout


def test_kernels_that_spill_or_need_too_much_shared_memory_do_not_fit() -> None:
    from benchmarks.kernels_static import SHARED_LIMIT, Compiled

    limit = SHARED_LIMIT[90]
    assert Compiled(None, 90, 255, 0, limit).fits  # type: ignore[arg-type]
    assert not Compiled(None, 90, 255, 8, limit).fits  # type: ignore[arg-type]
    assert not Compiled(None, 80, 255, 0, limit).fits  # type: ignore[arg-type]
    assert not Compiled(None, 90, 255, 0, limit, early=0).fits  # type: ignore[arg-type]
