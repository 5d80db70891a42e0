"""MBPP (Austin et al. 2021, arXiv 2108.07732), with three examples: tasks 2, 3 and 4, as there; 11 to 510 are tests."""

from pathlib import Path
from typing import Any

from .tasks import Problem, Task, TaskError, read_lines

NUM_BYTES = 256
STOPS = ("[DONE]",)
EXAMPLES = (2, 3, 4)
TESTED = range(11, 511)
FIELDS = ("task_id", "text", "code", "test_list")


def load(path: Path | None) -> Task:
    """path: mbpp.jsonl. Raises TaskError, OSError."""
    if path is None:
        raise TaskError("mbpp: name the file mbpp.jsonl with --mbpp")
    rows = {int(row["task_id"]): row for row in read_lines(path, FIELDS)}
    if missing := [number for number in EXAMPLES if number not in rows]:
        raise TaskError(f"{path}: task {missing[0]}, an example of the prompt, is not among its tasks")
    examples = "".join(f"{_asked(rows[n])}{rows[n]['code'].strip()}\n[DONE]\n\n" for n in EXAMPLES)
    tested = [_problem(rows[number], examples) for number in TESTED if number in rows]
    if not tested:
        raise TaskError(f"{path}: it has none of the tasks {TESTED[0]} to {TESTED[-1]}, which are the test")
    return Task("mbpp", "pass@1", NUM_BYTES, STOPS, tested)


def _asked(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text'].strip()} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _problem(row: dict[str, Any], examples: str) -> Problem:
    tests = "\n".join([row.get("test_setup_code") or "", *row["test_list"]])
    return Problem(f"MBPP/{row['task_id']}", examples + _asked(row), after=tests)
