"""The command `fastblt tasks`: reads the tasks, runs them, and writes the report beside the answers."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from engine.types import DecoderName

from . import flores, humaneval, mbpp, plot
from .bleu import Bleu
from .paper import PaperModel
from .report import Report, markdown, report, to_json
from .results import Results
from .running import ask, execute, opened
from .sandbox import Sandbox
from .settings import paper_settings
from .sources import Source
from .tasks import Task, TaskError


@dataclass(frozen=True, slots=True)
class Files:
    """Of the tasks, as the user names them. sentencepiece: the model of BLEU."""

    humaneval: Path | None = None
    mbpp: Path | None = None
    flores: Path | None = None
    sentencepiece: Path | None = None

    def task(self, name: str) -> Task:
        """One of `TASKS`. Raises TaskError, OSError."""
        match name:
            case "humaneval":
                return humaneval.load(self.humaneval)
            case "mbpp":
                return mbpp.load(self.mbpp)
            case _:
                return flores.load(name, self.flores)


def tasks_of(names: Sequence[str], files: Files) -> tuple[list[Task], Bleu | None]:
    """The tasks, and what scores translations if any are among them. Raises TaskError, OSError."""
    tasks = [files.task(name) for name in dict.fromkeys(names)]
    return tasks, Bleu(files.sentencepiece) if any(task.metric == "BLEU" for task in tasks) else None


def measure(
    source: Source,
    tasks: Sequence[Task],
    bleu: Bleu | None,
    out: Path,
    *,
    decoders: Collection[DecoderName] | None = None,
    most_problems: int | None = None,
    sandbox: Sandbox | None = None,
    paper: PaperModel | None = None,
    restart: bool = False,
) -> Report:
    """Answers all problems with the paper's settings, where earlier runs have not, judges the answers and writes
    TASK.md, TASK.json and, where there are scores, a picture TASK.png of each into `out`. decoders: asks only these;
    None takes all that the model has. The report also has those that earlier runs have finished. sandbox: what executes
    programs; None leaves them unscored.

    Raises TaskError, ResultsError, SourceError, SandboxError, and OSError.
    """
    every = paper_settings(source.decoders, source.block_size)
    settings = [setting for setting in every if decoders is None or setting.decoder in decoders]
    if lacking := [name for name in decoders or () if name not in source.decoders]:
        raise TaskError(f"the model has no decoder {lacking[0]}, but {', '.join(source.decoders)}")
    if not settings:
        raise TaskError(f"the paper has no settings of {', '.join(decoders or source.decoders)}")
    runs_of = partial(opened, source, tasks, out=out, most_problems=most_problems, sandbox=sandbox)
    runs = runs_of(settings, read=partial(Results.open, restart=restart))
    ask(source, runs)
    if sandbox:
        execute(sandbox, runs)
    others = [setting for setting in every if setting not in settings]
    runs += [run for run in runs_of(others, read=Results.earlier) if not run.unanswered]
    runs.sort(key=lambda run: every.index(run.setting))
    found = report(source.model, runs, paper, bleu)
    for table in found.tables:
        # A file for each task: the next command may name others, with the same folder.
        alone = replace(found, tables=[table])
        (out / f"{table.task.name}.md").write_text(markdown(alone))
        (out / f"{table.task.name}.json").write_text(json.dumps(to_json(alone), indent=2) + "\n")
    if plot.can_draw():
        plot.draw(found, out)
    return found
