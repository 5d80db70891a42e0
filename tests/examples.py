"""The examples of the documentation: fenced `sh` and `python`, and indented `curl`, with the output shown below them.

In shown output `…` ends what differs from run to run. The number behind `created` differs, too, and so do those behind
names that end with `_seconds`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS = "127.0.0.1:8000"
"""Of the server in all examples; it alone is replaced when they run."""
SECONDS = 120

_FENCED = re.compile(
    r"^```(?P<language>sh|python)\n(?P<code>.*?)^```\n(?:\n```(?P<kind>json|text)\n(?P<shown>.*?)^```\n)?", re.M | re.S
)
_INDENTED = re.compile(r"^    curl (?:.+\n)(?:    .+\n)*", re.M)


class Example(NamedTuple):
    """`shown`: the output as the document has it, None if it has none."""

    document: str
    line: int
    language: str
    code: str
    kind: str | None = None
    shown: str | None = None

    def run(self, address: str = ADDRESS) -> str:
        """What it prints, run as it is printed but for the server's address. It must succeed."""
        code = self.code.replace(ADDRESS, address)
        command = [sys.executable, "-"] if self.language == "python" else ["sh", "-eu"]
        # `fastblt` is this checkout's, and its client is where a copy would be.
        path = f"{ROOT / 'tests' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "clients")}
        done = subprocess.run(
            command, input=code, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=SECONDS
        )
        assert done.returncode == 0, f"{self}\n{done.stdout}{done.stderr}"
        return done.stdout

    def check(self, printed: str) -> None:
        """Holds the output to what is shown."""
        if self.shown is None:
            return
        if self.kind == "json":
            assert matches(json.loads(self.shown), json.loads(printed)), printed
        else:
            shown, found = _lines(self.shown), _lines(printed)
            assert len(shown) == len(found) and all(map(matches, shown, found)), printed


def examples(document: Path) -> list[Example]:
    text = document.read_text()
    name = str(document.relative_to(ROOT))

    def line(match: re.Match[str]) -> int:
        return text.count("\n", 0, match.start()) + 1

    found = [
        Example(name, line(match), match["language"], match["code"], match["kind"], match["shown"])
        for match in _FENCED.finditer(text)
    ]
    return found + [Example(name, line(match), "sh", match[0]) for match in _INDENTED.finditer(text)]


def matches(shown: Any, found: Any) -> bool:
    """Whether a shown value stands for one that was found."""
    match shown:
        case dict():
            return shown.keys() == found.keys() and all(
                _is_time(found[key]) if key == "created" or key.endswith("_seconds") else matches(value, found[key])
                for key, value in shown.items()
            )
        case list():
            return len(shown) == len(found) and all(map(matches, shown, found))
        case float():
            return bool(found == pytest.approx(shown, rel=1e-2))
        case str() if shown.endswith("…"):
            return isinstance(found, str) and found.startswith(shown[:-1])
    return bool(shown == found)


def _is_time(found: Any) -> bool:
    return found is None or isinstance(found, int | float)


def _lines(text: str) -> list[Any]:
    """Lines that say something; of server-sent events what they hold. Bytes that come while the server is busy go
    together: how many events they are shared out to means nothing."""
    lines: list[Any] = []
    for line in filter(str.strip, map(str.rstrip, text.splitlines())):
        event = json.loads(line.removeprefix("data: ")) if line.startswith("data: {") else line
        if lines and _is_delta(event) and _is_delta(lines[-1]):
            lines[-1]["choices"][0]["text"] += event["choices"][0]["text"]
        else:
            lines.append(event)
    return lines


def _is_delta(event: Any) -> bool:
    """Text of a choice that goes on, and nothing else."""
    if not isinstance(event, dict) or len(event.get("choices") or ()) != 1:
        return False
    choice = event["choices"][0]
    return bool(choice["text"]) and choice["finish_reason"] is None and choice["logprobs"] is None
