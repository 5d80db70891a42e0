"""The kernels' tests on the device, a few processes side by side: most of their time is Triton's compiler.

`tests/test_triton.py` holds every kernel against its torch twin; `tests/gpu/` has what needs a real device. On a CPU
the former runs in Triton's interpreter.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.report import ROOT

from .piece import Piece
from .setting import Setting

TWINS = "tests/test_triton.py"
FEW = ("signature", "segments_are_many")
"""What tests run at toy scale have in their names."""
SHOWN = 40
"""Lines of a failed test that are kept."""


def measure(setting: Setting, piece: Piece) -> None:
    workers = max(1, min(8, (os.cpu_count() or 1) // 2)) if setting.on_gpu else 1
    groups = [group for group in (names(setting)[i::workers] for i in range(workers)) if group]
    reports = [setting.work / f"tests-{i}.xml" for i in range(len(groups))]
    running = [_start(group, report, setting) for group, report in zip(groups, reports, strict=True)]
    outputs = _watch(running, [report.with_suffix(".log") for report in reports])
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    piece.put(processes=len(groups), tests=counts)
    for process, lines, report in zip(running, outputs, reports, strict=True):
        cases = _cases(report)
        for case in cases:
            counts[case["outcome"]] += 1
            if case["outcome"] != "passed":
                piece.row("not_passed", case)
            if case["outcome"] == "failed":
                piece.fail(f"{case['test']}: {case['why']}")
        if process.returncode not in (0, 1) or not cases:
            piece.fail(f"pytest ended with {process.returncode}: {' / '.join(lines[-8:])}")
    piece.put(tests=counts)
    if setting.on_gpu and counts["skipped"]:
        piece.fail(f"{counts['skipped']} tests were skipped, though there is a CUDA device")


def names(setting: Setting) -> list[str]:
    """What pytest is asked to run, one per test function."""
    files = [TWINS, *(sorted(str(p.relative_to(ROOT)) for p in (ROOT / "tests/gpu").glob("test_*.py")))]
    found = [
        f"{file}::{test}"
        for file in (files if setting.on_gpu else files[:1])
        for test in re.findall(r"^def (test_\w+)", (ROOT / file).read_text(), re.M)
    ]
    return [name for name in found if any(part in name for part in FEW)] if setting.quick else found


def _start(tests: list[str], report: Path, setting: Setting) -> "subprocess.Popen[bytes]":
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if not setting.on_gpu:
        environment["TRITON_INTERPRET"] = "1"
    # The project's own settings ask for plug-ins, and conftest.py for the interpreter, where it sees no /dev/nvidia0.
    plain = ["-c", os.devnull, "--rootdir", ".", "--noconftest", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *plain, "-v", "--tb=short", f"--junitxml={report.resolve()}", *tests]
    with report.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)


def _watch(running: "list[subprocess.Popen[bytes]]", logs: list[Path]) -> list[list[str]]:
    """What the processes said, line by line; the ends of tests are passed on as they come."""
    shown = [0] * len(logs)
    while True:
        over = all([process.poll() is not None for process in running])
        said = [log.read_text(errors="replace").splitlines() for log in logs]
        for i, lines in enumerate(said):
            for line in lines[shown[i] : len(lines) if over else -1]:
                if re.search(r"::\S.* (PASSED|FAILED|ERROR|SKIPPED)", line):
                    print(line, flush=True)
            shown[i] = max(shown[i], len(lines) - 1)
        if over:
            return said
        time.sleep(0.5)


def _cases(report: Path) -> list[dict[str, Any]]:
    if not report.exists():
        return []
    cases = []
    for case in ElementTree.parse(report).iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        left_out = [child for child in case if child.tag == "skipped"]
        problem = next(iter([*wrong, *left_out]), None)
        lines = (problem.text or "").splitlines() if problem is not None else []
        cases.append(
            {
                "test": case.get("name", ""),
                "seconds": float(case.get("time", "0")),
                "outcome": "failed" if wrong else "skipped" if left_out else "passed",
                "why": (problem.get("message") or "").partition("\n")[0][:300] if problem is not None else "",
                "lines": lines[-SHOWN:],
            }
        )
    return cases
