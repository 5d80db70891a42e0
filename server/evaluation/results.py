"""What a run has found so far: a file of JSON lines for each setting of a task, that a later run goes on with.

The first line says what was asked. The others are answers and verdicts, in the order in which they came.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .sandbox import Verdict


class ResultsError(ValueError):
    """A file of results belongs to another run."""


@dataclass(frozen=True, slots=True)
class Answer:
    """text: the continuation, up to an end of sequence. The rest is of its `usage`."""

    text: str
    decoder_calls: int
    global_calls: int
    rounds: int
    drafted: int
    accepted: int
    estimated_bytes: int
    bytes_read: int


COSTS = tuple(column.name for column in fields(Answer) if column.name != "text")
"""Names in `Usage`, and in `usage.fastblt` of a response."""


@dataclass(slots=True)
class Results:
    """Answers by problem, and verdicts by problem for what is executed."""

    path: Path
    asked: Mapping[str, Any]
    judged_by: Mapping[str, Any]
    answers: dict[str, Answer] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @classmethod
    def open(
        cls, path: Path, asked: Mapping[str, Any], judged_by: Mapping[str, Any], *, restart: bool = False
    ) -> "Results":
        """asked: all that an answer depends on. judged_by: what else a verdict depends on; verdicts of other judges are
        not taken. restart: forget what is there. Raises ResultsError for a file of another question or of none,
        OSError."""
        found = cls(path, asked, judged_by)
        path.parent.mkdir(parents=True, exist_ok=True)
        if restart or not path.exists():
            path.write_text(json.dumps({"asked": asked}) + "\n")
        elif (whole := found._read()) < path.stat().st_size:
            # A run was killed while it wrote this line.
            os.truncate(path, whole)
        return found

    @classmethod
    def earlier(cls, path: Path, asked: Mapping[str, Any], judged_by: Mapping[str, Any]) -> "Results | None":
        """What another command found, which may still be at work; None without a file, and for one that `open` refuses.
        Raises OSError."""
        found = cls(path, asked, judged_by)
        try:
            found._read()
        except (FileNotFoundError, ResultsError):
            return None
        return found

    def add_answer(self, problem: str, answer: Answer) -> None:
        self.answers[problem] = answer
        self._append({"problem": problem, "answer": asdict(answer)})

    def add_verdict(self, problem: str, verdict: Verdict) -> None:
        self.verdicts[problem] = verdict
        self._append({"problem": problem, "verdict": asdict(verdict), "by": self.judged_by})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> int:
        """The bytes of all whole lines, which it reads."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        try:
            head, *lines = (json.loads(line) for line in content[:whole].splitlines())
            earlier = head["asked"]
            for line in lines:
                if "answer" in line:
                    self.answers[line["problem"]] = Answer(**line["answer"])
                elif line["by"] == self.judged_by:
                    self.verdicts[line["problem"]] = Verdict(**line["verdict"])
        except (ValueError, LookupError, TypeError):
            raise ResultsError(f"{self.path}: this is no file of results; name another --out") from None
        for name in {**earlier, **self.asked}:
            if earlier.get(name) != self.asked.get(name):
                raise ResultsError(
                    f"{self.path} was made with {name} {earlier.get(name)!r}, not {self.asked.get(name)!r}: "
                    f"name another --out, or start anew with --restart"
                )
        return whole
