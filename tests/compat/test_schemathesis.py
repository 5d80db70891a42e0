"""Schemathesis makes requests from `/openapi.json`, and follows its links from one answer to the next request."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.links import LINKS
from tests.serving import RunningServer, running_server

from .environments import installed
from .running import KEY, PROGRAMS, RECIPES, run_recipe

EXAMPLES = 50
"""Of each route, as the recipe says, beside those that follow from each field's bounds."""


@pytest.fixture(scope="module")
def server(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One on which no request takes long."""
    flags = ["--default-timeout", "2", "--api-keys", KEY]
    with running_server(tiny, tmp_path_factory.mktemp("log") / "log", *flags) as running:
        yield running


def test_schemathesis_finds_that_the_server_does_what_openapi_json_says(server: RunningServer, tmp_path: Path) -> None:
    shutil.copy(PROGRAMS / "schemathesis_hooks.py", tmp_path)
    (tmp_path / "schemathesis.toml").write_text('hooks = "schemathesis_hooks"\n')
    said = run_recipe(installed("schemathesis"), RECIPES["schemathesis"], server, tmp_path)
    told = json.loads((tmp_path / "report.json").read_text())
    statuses = {name: phase["status"] for name, phase in told["phases"].items()}
    assert statuses == dict.fromkeys(("coverage", "fuzzing", "stateful"), "success") | {"examples": "skip"}
    # Such as references that lead nowhere, and requests that are refused nearly always.
    assert {name: found for name, found in told["warnings"].items() if found} == {}
    assert told["operations"]["tested"] == told["operations"]["total"] >= 12
    for phase, requests in told["valid_rates"]["POST /v1/completions"].items():
        assert requests["accepted"] > EXAMPLES / 2, phase
    links = sum(len(targets) for targets in LINKS.values())
    assert f"API Links:    {links} covered / {links} selected / {links} total" in said
    assert " streamed, " in server.log.read_text()
