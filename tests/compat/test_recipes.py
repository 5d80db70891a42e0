"""docs/compatibility.md shows these files of `recipes`; each prints what a plain request is answered."""

from pathlib import Path

import pytest

from tests.serving import RunningServer

from .environments import installed
from .running import RECIPE, RECIPES, run_recipe, texts

PLAIN = [recipe for recipe in RECIPES if recipe.stem not in ("ai-sdk", "autocannon")]
"""All but those of test_node.py, which send another prompt or print a report."""


@pytest.mark.parametrize("recipe", PLAIN, ids=lambda recipe: recipe.name)
def test_a_recipe_prints_the_servers_text(recipe: Path, nano: RunningServer, tmp_path: Path) -> None:
    assert [run_recipe(installed(recipe.stem), recipe, nano, tmp_path)] == texts(nano, **RECIPE)
