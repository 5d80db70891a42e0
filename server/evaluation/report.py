"""The paper's columns for every setting of every task, beside the paper's own rows: as text, Markdown and JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..tables import drawn, number_table
from .bleu import Bleu
from .paper import PaperModel, PaperRow, paper_rows
from .running import Run
from .tasks import Task

BASE = "BLT"
"""The setting that all others are compared with."""


@dataclass(frozen=True, slots=True)
class Row:
    """A setting. The columns are those of `PaperRow`; means are over problems. passed: None where nothing was executed,
    and then score is None too. bytes_read: what the engine counted, per problem."""

    setting: str
    decoder: str
    problems: int
    passed: int | None
    score: float | None
    acceptance: float | None
    decoder_calls: float
    global_calls: float
    gigabytes: float
    saved: float | None
    bytes_read: float
    paper: PaperRow | None


@dataclass(frozen=True, slots=True)
class Table:
    """All settings of a task."""

    task: Task
    rows: Sequence[Row]


@dataclass(frozen=True, slots=True)
class Report:
    """model: what was measured. paper: the model whose figures stand beside; None for none."""

    model: str
    paper: PaperModel | None
    tables: Sequence[Table]


def report(model: str, runs: Sequence[Run], paper: PaperModel | None, bleu: Bleu | None) -> Report:
    """Of runs with an answer to every problem. bleu: for translations."""
    tables: dict[str, Table] = {}
    for name in dict.fromkeys(run.task.name for run in runs):
        own = [run for run in runs if run.task.name == name]
        base = next((_gigabytes(run) for run in own if run.setting.name == BASE), None)
        beside = paper_rows(paper, name) if paper else {}
        tables[name] = Table(own[0].task, [_row(run, base, beside.get(run.setting.name), bleu) for run in own])
    return Report(model, paper, [*tables.values()])


def _row(run: Run, base: float | None, paper: PaperRow | None, bleu: Bleu | None) -> Row:
    count = len(run.problems)
    answers = [run.results.answers[problem.id] for problem in run.problems]
    passed = _passed(run)
    drafted = sum(answer.drafted for answer in answers)
    gigabytes = _gigabytes(run)
    return Row(
        run.setting.name,
        run.setting.decoder,
        count,
        passed,
        _translated(run, bleu) if passed is None else 100 * passed / count,
        100 * sum(answer.accepted for answer in answers) / drafted if drafted and run.setting.drafts else None,
        sum(answer.decoder_calls for answer in answers) / count,
        sum(answer.global_calls for answer in answers) / count,
        gigabytes,
        None if base is None or run.setting.name == BASE else 100 * (1 - gigabytes / base),
        sum(answer.bytes_read for answer in answers) / count,
        paper,
    )


def _gigabytes(run: Run) -> float:
    """Weights by the paper's formula (4.2), per problem."""
    return sum(run.results.answers[problem.id].estimated_bytes for problem in run.problems) / len(run.problems) / 1e9


def _passed(run: Run) -> int | None:
    verdicts = [run.results.verdicts.get(problem.id) for problem in run.problems]
    return sum(verdict.passed for verdict in verdicts if verdict) if all(verdicts) else None


def _translated(run: Run, bleu: Bleu | None) -> float | None:
    if run.task.runs_programs or bleu is None:
        return None
    answers = [run.task.answer(run.results.answers[problem.id].text) for problem in run.problems]
    return bleu.score(answers, [problem.reference or "" for problem in run.problems])


def render(r: Report) -> str:
    """For a terminal."""
    parts = [*(_drawn(table, r) for table in r.tables), *notes(r)]
    return "\n".join(parts).lstrip("\n")


def _drawn(table: Table, r: Report) -> str:
    heads = _heads(table, r, "\n")
    grid = number_table(*heads)
    grid.padding = (0, 2, 0, 0)
    for row in table.rows:
        grid.add_row(*_cells(row, r))
    return f"\n{_title(table, r)}\n{drawn(grid)}"


def markdown(r: Report) -> str:
    """The same as a file."""
    parts = [f"# {r.model}"]
    for table in r.tables:
        heads = _heads(table, r, " ")
        lines = [heads, ["---", *["--:"] * (len(heads) - 1)], *(_cells(row, r) for row in table.rows)]
        parts += [f"## {_title(table, r)}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join([*parts, *notes(r)]) + "\n"


def _title(table: Table, r: Report) -> str:
    return f"{table.task.name}: {table.rows[0].problems:,} problems, {table.task.num_bytes} bytes each"


def _heads(table: Table, r: Report, apart: str) -> list[str]:
    own = [table.task.metric, "accepted", f"decoder{apart}calls", f"global{apart}calls", "GB", "saved"]
    theirs = [table.task.metric, "accepted", "decoder", "global", "GB", "saved"]
    return ["", *own, *(f"paper{apart}{head}" for head in theirs if r.paper)]


def _cells(row: Row, r: Report) -> list[str]:
    return [row.setting, *_figures(row, gigabytes="{:#.4g}"), *(_figures(row.paper, calls="{:.0f}") if r.paper else ())]


def _figures(row: Row | PaperRow | None, calls: str = "{:.1f}", gigabytes: str = "{:.2f}") -> Iterable[str]:
    if row is None:
        return [""] * 6
    numbers = (row.score, row.acceptance, row.decoder_calls, row.global_calls, row.gigabytes, row.saved)
    forms = ("{:.2f}", "{:.2f}", calls, calls, gigabytes, "{:.2f}")
    return ["-" if number is None else form.format(number) for form, number in zip(forms, numbers, strict=True)]


def notes(r: Report) -> list[str]:
    """What a reader must know about the figures."""
    found = ["Calls and GB are means per problem, GB by the paper's formula; score, accepted and saved are percent."]
    if r.paper:
        found.append(
            f"The paper's columns are its {r.paper.upper()} models: BLT-D and BLT-DV are different models from BLT; "
            "here all rows are one."
        )
    if any(row.score is None for table in r.tables for row in table.rows if table.task.runs_programs):
        found.append("The programs of rows without a score were not executed: run their decoders with --execute.")
    return found


def to_json(r: Report) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "model": r.model,
        "paper": r.paper,
        "tasks": [
            {"task": table.task.name, "metric": table.task.metric, "bytes": table.task.num_bytes,
             "problems": table.rows[0].problems, "settings": [asdict(row) for row in table.rows]}
            for table in r.tables
        ],
    }  # fmt: skip
