"""The programs' environments: made at their first use, and made anew where programs.toml names other versions."""

import json
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-compat"
STAMP = "installed.json"
"""In an environment: what it holds. Written last, so that one which was not finished is made anew."""
INSTALL_SECONDS = 1800


class Program(NamedTuple):
    """One of programs.toml. packages: with their versions; the first is the program itself. tests: pytest's -k."""

    name: str
    title: str
    installer: str
    packages: tuple[str, ...]
    tests: str

    @property
    def version(self) -> str:
        return self.packages[0].rpartition("@" if self.installer == "npm" else "==")[2]

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    def command(self, script: Path) -> list[str]:
        """Runs a script with the program's own interpreter; one of Node's must have the environment above it."""
        return ["node", str(script)] if self.installer == "npm" else [str(self.tool("python")), str(script)]

    def tool(self, name: str) -> Path:
        """A command that the environment has."""
        return self.folder / ("node_modules/.bin" if self.installer == "npm" else "bin") / name


def read_programs() -> dict[str, Program]:
    told = tomllib.loads(Path(__file__).with_name("programs.toml").read_text())
    programs = {}
    for name, entry in told.items():
        (installer,) = entry.keys() & {"pip", "npm"}
        programs[name] = Program(name, entry["title"], installer, tuple(entry[installer]), entry["tests"])
    return programs


PROGRAMS = read_programs()


def installed(name: str) -> Program:
    """The program, ready to run. Where it does not install, the test is skipped with the installer's last line."""
    program = PROGRAMS[name]
    if failure := _install(program):
        pytest.skip(f"{' '.join(program.packages)} does not install: {failure}")
    return program


@cache
def _install(program: Program) -> str:
    """Why it failed, or nothing."""
    held = {"packages": program.packages, "python": sys.version}
    stamp = program.folder / STAMP
    if stamp.exists() and stamp.read_text() == json.dumps(held):
        return ""
    shutil.rmtree(program.folder, ignore_errors=True)
    if program.installer == "npm":
        if not shutil.which("npm"):
            return "there is no npm"
        program.folder.mkdir(parents=True)
        (program.folder / "package.json").write_text('{"private": true}')
        steps = [["npm", "install", "--loglevel", "error", "--no-audit", "--no-fund", *program.packages]]
    else:
        steps = [
            [sys.executable, "-m", "venv", "."],
            ["bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check", *program.packages],
        ]
        program.folder.mkdir(parents=True)
    for step in steps:
        done = subprocess.run(step, cwd=program.folder, capture_output=True, text=True, timeout=INSTALL_SECONDS)
        if done.returncode:
            # npm's last line says where its log is.
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip() and "log of" not in line]
            return said[-1] if said else f"exit code {done.returncode}"
    stamp.write_text(json.dumps(held))
    return ""
