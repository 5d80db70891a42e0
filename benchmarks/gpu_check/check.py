"""Runs the parts, each in its own process, and keeps their results.

The result's JSON file is also the state of the check: it is written after every part, and a part that finished with
these sources is not run again.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.report import ROOT
from engine.config import DeviceName

from .render import render

LINES_KEPT = 40
"""Most lines kept of a part's output, if it did not pass."""
LEAST_SECONDS = 10
"""No part starts with fewer seconds left."""
PASSED, FAILED, MISSING = 0, 1, 3
SHARED = ("generate", "gpu_model", "launches", "models", "paired", "replay", "report", "variants")
SOURCES = (
    *("kernels", "engine", "benchmarks/gpu_check", "benchmarks/code.txt"),
    *("tests/gpu", "tests/test_triton.py", "tests/test_float8.py"),
    *(f"benchmarks/{name}.py" for name in SHARED),
)


@dataclass(frozen=True, slots=True)
class Part:
    """module: has `measure(setting, piece)`. limit_s: seconds it may take. gate: whether it judges correctness.
    interpreted: whether its kernels run in Triton's interpreter where there is no GPU."""

    module: str
    limit_s: float
    gate: bool = False
    interpreted: bool = False


# The most valuable first: a lease of the card may end at any time.
PARTS: dict[str, Part] = {
    "handover": Part("benchmarks.gpu_check.handover", 240, interpreted=True),
    "1b": Part("benchmarks.gpu_check.shape_1b", 300),
    "host": Part("benchmarks.gpu_check.host", 120),
    "ahead": Part("benchmarks.gpu_check.ahead", 120, gate=True),
    "nano": Part("benchmarks.gpu_check.nano", 120),
    "kernels": Part("benchmarks.gpu_check.kernel_tests", 240, gate=True),
    "exactness": Part("benchmarks.gpu_check.exactness", 180, gate=True),
    "probe": Part("benchmarks.gpu_check.probe", 90),
    "forms": Part("benchmarks.gpu_check.forms", 200),
    "profile": Part("benchmarks.gpu_check.profiling", 150),
}


@dataclass(slots=True)
class Check:
    """One check on one device. folder: where its JSON file and report are. keep: keeps existing figures even if other
    sources made them."""

    folder: Path
    device: DeviceName
    device_name: str
    command: str
    driver: str | None = None
    quick: bool = False
    keep: bool = False
    trace: bool = False
    parts: Mapping[str, Part] = field(default_factory=lambda: PARTS)

    @property
    def name(self) -> str:
        return f"gpu_check-{slug(self.device_name)}{'-quick' if self.quick else ''}"

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}.json"

    def run(self, names: Sequence[str], again: Sequence[str], budget_s: float) -> int:
        """Runs the missing parts among `names`, and those in `again`. Returns PASSED, FAILED if a part that judges
        correctness did not pass, else MISSING if a part did not finish.
        """
        ends = time.monotonic() + budget_s
        sources = fingerprint()
        pieces = self._read()
        if self.quick:
            say("toy sizes: does everything run? Figures, and what they decide, mean nothing.")
        with tempfile.TemporaryDirectory(prefix="gpu_check-") as work:
            for name in names:
                if name not in again and self._is_there(pieces.get(name), sources):
                    say(f"{name}: {pieces[name]['status']} before; --again {name} runs it again")
                    continue
                left = ends - time.monotonic()
                if left < LEAST_SECONDS:
                    say(f"{name}: not begun, the time is up; the same command goes on here")
                    continue
                say(f"{name}: running, at most {min(left, self.parts[name].limit_s):.0f} s")
                pieces[name] = {**self._run(name, left, Path(work)), "sources": sources}
                say(
                    "\n".join(
                        [
                            f"{name}: {pieces[name]['status']} after {pieces[name]['seconds']:.0f} s",
                            *trouble(pieces[name]),
                            *decided(pieces[name]),
                        ]
                    )
                )
                self._write(pieces, sources)
        self._write(pieces, sources)
        done = {name: pieces.get(name, {}).get("status") for name in names}
        say(f"{self.path}\n{self.path.with_suffix('.md')}")
        if any(status not in ("passed", "cut", None) for name, status in done.items() if self.parts[name].gate):
            return FAILED
        return PASSED if set(done.values()) <= {"passed"} else MISSING

    def _is_there(self, piece: dict[str, Any] | None, sources: str) -> bool:
        return (
            piece is not None and piece["status"] in ("passed", "failed") and (self.keep or piece["sources"] == sources)
        )

    def _run(self, name: str, left: float, work: Path) -> dict[str, Any]:
        """The outcome of a part. status: "passed"; "failed", it found something wrong; "broke", it crashed; "cut", the
        time of the whole check was up."""
        part = self.parts[name]
        limit = min(left, part.limit_s)
        piece, log = work / f"{name}.json", work / f"{name}.log"
        began = time.monotonic()
        code = self._process(part, piece, log, limit, work)
        content = json.loads(piece.read_text()) if piece.exists() else {"figures": {}, "failures": [], "done": False}
        if code is None:
            status = "cut" if limit < part.limit_s else "broke"
        elif code or not content["done"]:
            status = "broke"
        else:
            status = "failed" if content["failures"] else "passed"
        lines = log.read_text(errors="replace").splitlines()[-LINES_KEPT:]
        if code is None:
            lines.append(f"stopped after {limit:.0f} s")
        return {
            "status": status,
            "seconds": round(time.monotonic() - began, 1),
            "failures": content["failures"],
            "figures": content["figures"],
            "last_lines": [] if status == "passed" else lines,
        }

    def _process(self, part: Part, piece: Path, log: Path, limit: float, work: Path) -> int | None:
        """The part's exit code, or None if it was stopped."""
        command = [sys.executable, "-m", "benchmarks.gpu_check.part", part.module, "--piece", str(piece)]
        command += ["--device", self.device, "--work", str(work), *(["--quick"] if self.quick else [])]
        command += ["--trace", str(self.folder / f"{self.name}-traces")] if self.trace else []
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        if part.interpreted and self.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        with (
            log.open("w") as out,
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            ) as process,
        ):
            try:
                return process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                # Its own children too.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    def _read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {}
        pieces: dict[str, Any] = json.loads(self.path.read_text())["parts"]
        return {name: piece for name, piece in pieces.items() if name in self.parts}

    def _write(self, pieces: Mapping[str, Any], sources: str) -> None:
        ordered = {name: pieces[name] for name in self.parts if name in pieces}
        about = {"device": self.device_name, "driver": self.driver, "quick": self.quick, "sources": sources}
        report.write(self.name, self.command, {**about, "parts": ordered}, self.folder)
        missing = [name for name in self.parts if name not in ordered]
        self.path.with_suffix(".md").write_text(render(json.loads(self.path.read_text()), missing))


def slug(name: str) -> str:
    """A device's name for a file name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def fingerprint() -> str:
    """Identifies a state of the sources, in a checkout with or without git."""
    digest = blake2b(digest_size=6)
    for source in SOURCES:
        path = ROOT / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.[pc][yu]")):
            digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def trouble(piece: Mapping[str, Any]) -> list[str]:
    """Lines to show for a part that did not pass."""
    if piece["status"] == "passed":
        return []
    return [f"    {line}" for line in piece["failures"] or piece["last_lines"][-12:]]


def decided(piece: Mapping[str, Any]) -> list[str]:
    """The conclusions of a part, if it has any."""
    return [f"    {question}: {decides}" for question, decides in piece["figures"].get("decided", {}).items()]


def say(what: str) -> None:
    print(what, flush=True)
