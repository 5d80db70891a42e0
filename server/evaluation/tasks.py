"""What a task is: problems, each a prompt, and how a continuation of it is judged."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

TASKS = ("humaneval", "mbpp", "fr-en", "de-en")


class TaskError(ValueError):
    """Files of a task are missing or are no such files."""


@dataclass(frozen=True, slots=True)
class Problem:
    """before and after: what makes a program of an answer, for tasks that run it. reference: the right translation, for
    tasks that compare."""

    id: str
    prompt: str
    before: str = ""
    after: str = ""
    reference: str | None = None

    def program(self, answer: str) -> str:
        return f"{self.before}{answer}\n{self.after}"


@dataclass(frozen=True, slots=True)
class Task:
    """num_bytes: how many are generated for every problem, as in the paper. stops: an answer ends before the first of
    them; they are looked for afterwards, so that they change no count."""

    name: str
    metric: Literal["pass@1", "BLEU"]
    num_bytes: int
    stops: tuple[str, ...]
    problems: Sequence[Problem]

    @property
    def runs_programs(self) -> bool:
        return self.metric == "pass@1"

    def answer(self, text: str) -> str:
        """The part of a continuation that is judged."""
        return text[: min((place for stop in self.stops if (place := text.find(stop)) >= 0), default=len(text))]

    def digest(self) -> str:
        """The same for the same prompts and tests."""
        content = json.dumps([self.num_bytes, self.stops, [asdict(problem) for problem in self.problems]])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_lines(path: Path, fields: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Objects with these fields from a file of JSON lines, which may be packed by gzip. Raises TaskError, OSError."""
    number, found = 0, None
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                found = json.loads(line)
                if not isinstance(found, dict) or (missing := [name for name in fields if name not in found]):
                    raise TaskError(f"{path}: line {number} must be an object with {', '.join(fields)}" +
                                    (f"; it has no {missing[0]}" if isinstance(found, dict) else ""))  # fmt: skip
                yield found
        except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise TaskError(f"{path}: line {number + 1} is not JSON: {error}") from None
    if found is None:
        raise TaskError(f"{path}: the file is empty")
