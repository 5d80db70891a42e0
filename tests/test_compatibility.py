"""docs/compatibility.md tells what tests/compat ran: these versions, and these recipes."""

from tests.compat import record
from tests.compat.environments import PROGRAMS
from tests.compat.running import RECIPES


def test_the_page_has_the_versions_and_recipes_that_the_tests_run() -> None:
    page = record.PAGE.read_text()
    results = record.recorded(page)
    assert record.render(page, results) == page
    assert results.keys() == {program.title for program in PROGRAMS.values()} and RECIPES.keys() == PROGRAMS.keys()


def test_every_program_passed_when_it_was_last_run() -> None:
    told = [result.told for result in record.recorded(record.PAGE.read_text()).values()]
    assert told and all("passed" in each and "failed" not in each and "error" not in each for each in told)
