"""The server does what /openapi.json says of it, in Schemathesis' eyes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serving import ROOT, RunningServer, running_server

SECONDS = 90
EXAMPLES = 50
"""Of each route, beside those that follow from each field's bounds."""
LEFT_OUT = [
    # Fields that are right one by one may not go together: an option of a decoder that is not asked for.
    "positive_data_acceptance",
    # null is the default of every field, whatever its type.
    "negative_data_rejection",
]


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One on which no request takes long."""
    with running_server(tiny, tmp_path_factory.mktemp("log") / "log", "--default-timeout", "2") as running:
        yield running


def test_the_server_conforms_to_its_openapi_schema(server: RunningServer, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
    command += ["--checks", "all", "--exclude-checks", ",".join(LEFT_OUT), "--phases", "examples,coverage,fuzzing"]
    command += ["--max-examples", str(EXAMPLES), "--seed", "1", "--generation-database", "none"]
    command += ["--output-sanitize", "false", "--report", "json", "--report-json-path", str(report)]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.ops.openapi_hooks", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | hooks, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(report.read_text())
    # Such as references that lead nowhere, and requests that are refused nearly always.
    assert {name: found for name, found in told["warnings"].items() if found} == {}
    assert told["operations"]["tested"] == told["operations"]["total"] >= 12
    for phase, requests in told["valid_rates"]["POST /v1/completions"].items():
        assert requests["accepted"] > EXAMPLES / 2, phase
    assert " streamed, " in server.log.read_text()
