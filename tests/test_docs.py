"""The documentation names everything that there is, and nothing that is not."""

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import typer.main

from benchmarks import decoders, growth
from engine.config import EngineConfig
from server.cli import app
from server.schemas import CompletionRequest
from server.settings import ServerSettings

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SECTIONS = dict(re.findall(r"^## fastblt (\w+)\n(.*?)(?=^## |\Z)", DOCS["command-line.md"], re.M | re.S))
DEFAULTS = {field.name: field.default for field in fields(EngineConfig) if field.default is not MISSING}
DEFAULTS |= {name: field.default for name, field in ServerSettings.model_fields.items()}


def test_every_command_has_a_section() -> None:
    assert SECTIONS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_section_of_a_command_has_its_flags_and_no_others(command: str) -> None:
    options = [p for p in COMMANDS[command].params if p.param_type_name == "option" and p.name != "help"]
    flags = {flag for option in options for flag in [*option.opts, *option.secondary_opts]}
    rows = [line for line in SECTIONS[command].splitlines() if line.startswith("| `--")]
    assert {flag for row in rows for flag in re.findall(r"`(--[\w-]+)`", row.split("|")[1])} == flags


def test_every_option_has_help() -> None:
    assert not [
        (name, parameter.name)
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.name != "help" and not parameter.help
    ]


@pytest.mark.parametrize("name", ["model", *DEFAULTS])
def test_every_setting_is_there_with_its_variable_and_default(name: str) -> None:
    row = next(line for line in SECTIONS["serve"].splitlines() if line.startswith(f"| `--{name.replace('_', '-')}`"))
    default = DEFAULTS.get(name)
    assert f"`FASTBLT_{name.upper()}`" in row
    shown = str(default).lower() if isinstance(default, bool) else default
    assert default in (None, []) or f"default `{shown}`" in row


@pytest.mark.parametrize("name", CompletionRequest.model_fields)
def test_every_field_of_a_request_is_there(name: str) -> None:
    assert f"`{name}`" in DOCS["api.md"]


def test_every_metric_is_there_and_no_other(tiny_server: str) -> None:
    import httpx

    httpx.get(f"{tiny_server}/version")
    exposed = httpx.get(f"{tiny_server}/metrics").text
    documented = re.findall(r"^\| `(fastblt_\w+)` \| (\w+)", DOCS["metrics.md"], re.M)
    assert set(re.findall(r"^# TYPE (fastblt_\w+) (\w+)", exposed, re.M)) == set(documented)


def test_every_make_target_of_the_documentation_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for text in DOCS.values() for target in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.M)}
    assert named and named <= targets


def test_every_command_of_the_documentation_exists() -> None:
    named = {name for text in DOCS.values() for name in re.findall(r"(?:`|^    )fastblt ([a-z]+)", text, re.M)}
    assert named == COMMANDS.keys()


def test_every_link_leads_somewhere() -> None:
    for name, text in DOCS.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / target).exists() or target == "models/nano/README.md", (name, target)


@pytest.mark.parametrize(("name", "render"), [("growth", growth.render), ("decoders", decoders.render)])
def test_the_tables_of_benchmarks_are_the_measured_ones(name: str, render: Callable[..., str]) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    assert render(rows) in DOCS["README.md"]
