"""A pytest plug-in that writes every test's outcome to a file at once, so that an interrupted run keeps it.

`-p benchmarks.gpu_check.pytest_cases --cases FILE`; a line of JSON per test.
"""

import json
from pathlib import Path

import pytest

SHOWN = 40
"""Lines of a failed test that are kept."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=Path, required=True)


class _Cases:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A passed test ends before its fixtures are torn down, which may still fail.
        if report.passed and report.when != "call":
            return
        case = {
            "test": report.nodeid.partition("::")[2],
            "seconds": report.duration,
            "outcome": report.outcome,
            "why": _why(report).partition("\n")[0][:300],
            "lines": report.longreprtext.splitlines()[-SHOWN:] if report.failed else [],
        }
        with self._path.open("a") as file:
            file.write(json.dumps(case) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Cases(config.getoption("--cases")))


def _why(report: pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else report.longreprtext
