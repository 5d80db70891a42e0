"""Asks a source for what is not answered yet, has programs executed, and keeps both in files."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..processors import usable_processors
from ..progress import Progress
from .results import Results
from .sandbox import Sandbox, Verdict
from .settings import Setting
from .sources import Asked, Source
from .tasks import Problem, Task


@dataclass(frozen=True, slots=True)
class Run:
    """A task with a setting. problems: those that count here; the file may have more."""

    task: Task
    setting: Setting
    problems: Sequence[Problem]
    results: Results

    @property
    def unanswered(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.id not in self.results.answers]

    def program(self, problem: Problem) -> str:
        return problem.program(self.task.answer(self.results.answers[problem.id].text))


def opened(
    source: Source,
    tasks: Sequence[Task],
    settings: Sequence[Setting],
    out: Path,
    read: Callable[[Path, Mapping[str, Any], Mapping[str, Any]], Results | None],
    *,
    most_problems: int | None,
    sandbox: Sandbox | None,
) -> list[Run]:
    """Each setting of each task for which `read` has results; it takes what `Results.open` does. Raises what `read`
    raises."""
    runs = []
    judge = sandbox.about if sandbox else {}
    for task in tasks:
        question = {"task": task.name, "problems": task.digest(), **source.about}
        for setting in settings:
            name = setting.name.lower().replace(" ", "-").replace("=", "")
            results = read(out / task.name / f"{name}.jsonl", question | {"setting": setting.body}, judge)
            if results:
                runs.append(Run(task, setting, task.problems[:most_problems], results))
    return runs


def ask(source: Source, runs: Sequence[Run]) -> None:
    """All that have no answer, in one stream, so that the source never runs empty between settings. Raises SourceError,
    OSError."""
    left = sum(len(run.unanswered) for run in runs)
    if not left:
        return
    with Progress("answering", left, "texts") as progress:
        for asked, answer in source.answers(_asked(runs)):
            asked.key.results.add_answer(asked.problem.id, answer)
            progress.advance(1)


def _asked(runs: Sequence[Run]) -> Iterator[Asked]:
    for run in runs:
        for problem in run.unanswered:
            yield Asked(run, problem, run.setting, run.task.num_bytes)


def execute(sandbox: Sandbox, runs: Sequence[Run]) -> None:
    """The programs that have no verdict, one on every processor that this process may use. Equal programs, as all exact
    decoders give, run once. Raises SandboxError, OSError."""
    waiting: dict[str, list[tuple[Results, str]]] = {}
    for run in runs:
        for problem in run.problems if run.task.runs_programs else ():
            if problem.id not in run.results.verdicts:
                waiting.setdefault(run.program(problem), []).append((run.results, problem.id))
    if not waiting:
        return
    pool = ThreadPoolExecutor(usable_processors())
    try:
        futures = {pool.submit(sandbox.run, program): whose for program, whose in waiting.items()}
        with Progress("executing", len(futures), "programs") as progress:
            for future in as_completed(futures):
                verdict: Verdict = future.result()
                for results, name in futures[future]:
                    results.add_verdict(name, verdict)
                progress.advance(1)
    finally:
        pool.shutdown(cancel_futures=True)
