"""Runs every program's tests and writes their results into docs/compatibility.md: `python -m tests.compat.record`."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from .environments import PROGRAMS, ROOT, Program
from .running import RECIPES

PAGE = ROOT / "docs" / "compatibility.md"
FOLDER = Path(__file__).parent.relative_to(ROOT)
FENCES = {".py": "py", ".mjs": "js", ".sh": "bash"}
"""Not `sh` and `python`: tests/test_docs.py runs those, and does not have these programs."""
HEADS = ("| program | version | date | tests |", "|---|---|---|---|")


class Result(NamedTuple):
    """date: of the day, in UTC. told: pytest's count, such as "7 passed"."""

    date: str
    told: str


def recorded(page: str) -> dict[str, Result]:
    """The results that a page holds, by the program's title."""
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and line not in HEADS]
    return {row[0].removeprefix("| "): Result(row[2], row[3].removesuffix(" |")) for row in rows if len(row) == 4}


def render(page: str, results: dict[str, Result]) -> str:
    """The page with the table of these results, and with the recipes as they are. Its other text stays."""
    rows = [f"| {p.title} | {p.version} | {' | '.join(results[p.title])} |" for p in PROGRAMS.values()]
    table = "\n".join([*HEADS, *rows])
    recipes = "\n\n".join(f"### {p.title}\n\n{_recipe(p)}" for p in PROGRAMS.values())
    for heading, content in (("## Results", table), ("## Recipes", recipes)):
        before, _, rest = page.partition(f"{heading}\n")
        (told, *_), (*_, after) = rest.split("<!-- begin -->"), rest.partition("<!-- end -->")
        page = f"{before}{heading}\n{told}<!-- begin -->\n\n{content}\n\n<!-- end -->{after}"
    return page


def _recipe(program: Program) -> str:
    path = RECIPES[program.name]
    return f"```{FENCES[path.suffix]}\n{path.read_text()}```"


def measure(program: Program) -> Result:
    command = [sys.executable, "-m", "pytest", "-q", FOLDER, "-k", program.tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    (*_, last) = done.stdout.strip().splitlines()
    told = ", ".join(part for part in last.partition(" in ")[0].split(", ") if "deselected" not in part)
    return Result(f"{datetime.now(UTC):%Y-%m-%d}", told)


def main() -> None:
    results = recorded(PAGE.read_text())
    # Those that are named, or all.
    for name in sys.argv[1:] or PROGRAMS:
        results[PROGRAMS[name].title] = measure(PROGRAMS[name])
        sys.stderr.write(f"{name}: {results[PROGRAMS[name].title].told}\n")
    PAGE.write_text(render(PAGE.read_text(), results))


if __name__ == "__main__":
    main()
