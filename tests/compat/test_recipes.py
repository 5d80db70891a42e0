"""docs/compatibility.md shows the files of `recipes`; these print what a plain request is answered."""

from pathlib import Path

import pytest

from tests.serving import RunningServer

from .environments import installed
from .running import RECIPE, RECIPES, run_recipe, texts

ELSEWHERE = {"ai-sdk", "autocannon", "guidellm", "lm-eval", "schemathesis"}
"""They send something else or print a report, and are run in the files of these programs."""


@pytest.mark.parametrize("name", sorted(RECIPES.keys() - ELSEWHERE))
def test_a_recipe_prints_the_servers_text(name: str, nano: RunningServer, tmp_path: Path) -> None:
    assert [run_recipe(installed(name), RECIPES[name], nano, tmp_path)] == texts(nano, **RECIPE)
