"""The kernels' tests on the device, in a few parallel processes: most of their time is Triton's compiler.

`tests/test_triton.py` and `tests/test_float8.py` compare every kernel with its torch twin; `tests/gpu/` needs a real
device. On a CPU the former two run in Triton's interpreter.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.report import ROOT

from .piece import Piece
from .setting import Setting

TWINS = ("tests/test_triton.py", "tests/test_float8.py")
FEW = ("signature", "spans_many_pages")
"""Parts of the names of the tests that run at toy scale."""
PLAIN = ("-c", os.devnull, "--rootdir", ".", "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider")
"""The project's own settings need plug-ins, and conftest.py selects the interpreter if it sees no /dev/nvidia0."""


def measure(setting: Setting, piece: Piece) -> None:
    workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if setting.on_gpu else 1
    every = tests(setting)
    groups = [group for group in (every[i::workers] for i in range(workers)) if group]
    files = [setting.work / f"tests-{i}.jsonl" for i in range(len(groups))]
    running = [_start(group, file, setting) for group, file in zip(groups, files, strict=True)]
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    piece.put(processes=len(groups), tests=counts)
    read = [0] * len(files)
    over = False
    while not over:
        # Polled before the files are read, so that the last read misses nothing.
        over = all([process.poll() is not None for process in running])
        for i, file in enumerate(files):
            cases = _cases(file)
            for case in cases[read[i] :]:
                _take(case, counts, piece)
            read[i] = len(cases)
        time.sleep(0 if over else 0.5)
    for process, file, count in zip(running, files, read, strict=True):
        if process.returncode not in (0, 1) or not count:
            last = file.with_suffix(".log").read_text(errors="replace").splitlines()[-8:]
            piece.fail(f"pytest ended with {process.returncode}: {' / '.join(last)}")
    if setting.on_gpu and counts["skipped"]:
        piece.fail(f"{counts['skipped']} tests were skipped, though there is a CUDA device")


def tests(setting: Setting) -> list[str]:
    """The ids of the tests to run. Raises RuntimeError if they cannot be collected."""
    files = [*TWINS, *(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/gpu").glob("test_*.py")))]
    asked = files if setting.on_gpu else TWINS
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", *PLAIN, "--collect-only", "-q", *asked],
        cwd=ROOT, env=_environment(setting), capture_output=True, text=True,
    )  # fmt: skip
    if collected.returncode:
        raise RuntimeError(f"pytest could not collect the tests:\n{collected.stdout}{collected.stderr}")
    found = [line for line in collected.stdout.splitlines() if "::" in line]
    return [test for test in found if any(part in test for part in FEW)] if setting.quick else found


def _environment(setting: Setting) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return environment if setting.on_gpu else environment | {"TRITON_INTERPRET": "1"}


def _start(tests: list[str], cases: Path, setting: Setting) -> "subprocess.Popen[bytes]":
    tells = ["-p", "benchmarks.gpu_check.pytest_cases", "--cases", str(cases.resolve())]
    command = [sys.executable, "-m", "pytest", *PLAIN, *tells, "-v", "--tb=short", *tests]
    with cases.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=_environment(setting), stdout=log, stderr=subprocess.STDOUT)


def _cases(file: Path) -> list[dict[str, Any]]:
    """The tests that have ended; an incomplete last line is ignored."""
    whole = file.read_text().rpartition("\n")[0] if file.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def _take(case: dict[str, Any], counts: dict[str, int], piece: Piece) -> None:
    print(case["test"], case["outcome"], f"{case['seconds']:.1f} s", flush=True)
    counts[case["outcome"]] += 1
    piece.put(tests=counts)
    if case["outcome"] != "passed":
        piece.row("not_passed", case)
    if case["outcome"] == "failed":
        piece.fail(f"{case['test']}: {case['why']}")
