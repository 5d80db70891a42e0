"""The documentation names everything that there is, and nothing that is not."""

import json
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import pytest
import typer.main
import yaml
from pydantic import BaseModel

from benchmarks import summary
from benchmarks.gpu_check import render as gpu_check_render
from engine.config import EngineConfig
from engine.decoders import DECODERS
from server.cli import app
from server.errors import TYPES, Code, ErrorDetail
from server.flags import EMBEDDED
from server.options import OPTIONS
from server.schemas import Completion, CompletionRequest, Version
from server.settings import ServerSettings
from server.token_schemas import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, TokenizerInfo
from tests.examples import ADDRESS, Example, examples
from tests.serving import RunningServer, running_server

ROOT = Path(__file__).parent.parent
FOLDERS = {path.name: path.parent for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md")}
DOCS = {name: (folder / name).read_text() for name, folder in FOLDERS.items()}
NANO = ROOT / "models" / "nano"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SECTIONS = dict(re.findall(r"^## fastblt (\w+)\n(.*?)(?=^## |\Z)", DOCS["command-line.md"], re.M | re.S))
DEFAULTS = {field.name: field.default for field in fields(EngineConfig) if field.default is not MISSING}
DEFAULTS |= {name: field.default for name, field in ServerSettings.model_fields.items()}


def test_every_command_has_a_section_in_the_documentation() -> None:
    assert SECTIONS.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_section_of_a_command_documents_exactly_its_flags(command: str) -> None:
    options = [p for p in COMMANDS[command].params if p.param_type_name == "option" and p.name != "help"]
    flags = {flag for option in options for flag in [*option.opts, *option.secondary_opts]}
    rows = [line for line in SECTIONS[command].splitlines() if line.startswith("| `--")]
    assert {flag for row in rows for flag in re.findall(r"`(--[\w-]+)`", row.split("|")[1])} == flags


def test_the_global_options_are_documented() -> None:
    options = [flag for option in typer.main.get_command(app).params for flag in option.opts if flag != "--help"]
    assert options and all(f"`fastblt {flag}`" in DOCS["command-line.md"] for flag in options)


def test_every_option_has_help() -> None:
    assert not [
        (name, parameter.name)
        for name, command in COMMANDS.items()
        for parameter in command.params
        if parameter.name != "help" and not parameter.help
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_row_of_a_flag_begins_with_its_help(command: str) -> None:
    """Rows write values as code, and put a default at the end."""
    rows = {
        row.split("`")[1]: re.sub("[`']", "", row.split("|")[2])
        for row in re.findall("^\\| `--.*", SECTIONS[command], re.M)
    }
    for option in COMMANDS[command].params:
        if option.param_type_name == "option" and option.name != "help":
            told = re.split(r"; by default| \[default: | \[env var: ", option.help)[0].replace("'", "").rstrip(".")
            assert rows[option.opts[0]].strip().startswith(told), option.name


@pytest.mark.parametrize("command", COMMANDS)
def test_the_row_of_a_flag_names_its_variable(command: str) -> None:
    rows = {row.split("`")[1]: row for row in re.findall("^\\| `--.*", SECTIONS[command], re.M)}
    for option in COMMANDS[command].params:
        if option.param_type_name == "option" and option.envvar:
            assert f"`{option.envvar}`" in rows[option.opts[0]], option.name


@pytest.mark.parametrize("name", ["model", *DEFAULTS])
def test_every_setting_is_documented_with_its_variable_and_default(name: str) -> None:
    row = next(line for line in SECTIONS["serve"].splitlines() if line.startswith(f"| `--{name.replace('_', '-')}`"))
    default = DEFAULTS.get(name)
    assert name != "model" or f"default: {EMBEDDED}" in row
    assert f"`FASTBLT_{name.upper()}`" in row
    shown = str(default).lower() if isinstance(default, bool) else default
    assert default in (None, []) or f"default `{shown}`" in row


def fields_of(model: type[BaseModel]) -> set[str]:
    """Names of a model's fields and of those of the models in them."""
    names = {info.alias or name for name, info in model.model_fields.items()}
    for info in model.model_fields.values():
        kinds = [info.annotation, *get_args(info.annotation)]
        kinds += [inner for kind in kinds for inner in get_args(kind)]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names |= fields_of(kind)
    return names


@pytest.mark.parametrize(
    ("section", "models"),
    [
        ("The request", [CompletionRequest]),
        ("The response", [Completion]),
        ("Errors", [ErrorDetail]),
        ("The version", [Version]),
        ("The tokenizer", [TokenizeRequest, Tokenized, DetokenizeRequest, Detokenized, TokenizerInfo]),
    ],
)
def test_documented_api_fields_are_exactly_those_of_the_schema(section: str, models: list[type[BaseModel]]) -> None:
    text = re.search(rf"^## {section}\n(.*?)^## ", DOCS["api.md"], re.M | re.S)
    assert text
    tables = re.findall(r"^\| field .*\n\|[-|]+\n((?:\|.*\n)+)", text[1], re.M)
    cells = [row.split("|")[1] for table in tables for row in table.splitlines()]
    points = re.findall(r"^\* (`\w+`):(.*)", text[1], re.M)
    documented = names_in(*cells, *(head for head, _ in points))
    fields = {name for model in models for name in fields_of(model)}
    assert documented <= fields
    assert fields <= documented | names_in(*(rest for _, rest in points))


def names_in(*texts: str) -> set[str]:
    return {name for text in texts for name in re.findall(r"`(\w+)`", text)}


def test_documented_decoders_are_exactly_those_of_the_table() -> None:
    text = DOCS["decoders.md"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [f"`{name}`" for name in DECODERS]
    for (_, about, kind, _, needs, options), (name, spec) in zip(rows, DECODERS.items(), strict=True):
        assert about == spec.about
        assert (kind in ("the model's", "equals `blt`'s")) == spec.exact
        assert ("block diffusion" in needs) == spec.needs_mask
        assert re.findall(r"`(\w+)`", options) == list(spec.options)
        assert re.search(rf"^\*\*{name}\*\* ", text, re.M)
    for page in ("api.md", "command-line.md"):
        (listed,) = re.findall(r"^\| `(?:--)?decoder` \| (.*) see \[decoders\.md\]", DOCS[page], re.M)
        assert set(re.findall(r"`([\w-]+)`", listed)) == {*DECODERS}
    for option, decoders in OPTIONS.items():
        listed = ", ".join(f"`{decoder}`" for decoder in decoders)
        assert re.search(rf"^\| `{option}` \| [^|]+ \| {listed}: ", DOCS["api.md"], re.M)


def test_documented_error_codes_are_exactly_those_of_the_server() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `(\w+)` \|", DOCS["api.md"], re.M)
    assert sorted(code for _, code in rows) == sorted(get_args(Code))


def test_documented_error_types_are_exactly_those_of_the_server() -> None:
    (row,) = re.findall(r"^\| `type` \| by the status: (.*) \|$", DOCS["api.md"], re.M)
    assert set(re.findall(r"`(\w+)`", row)) == {"invalid_request_error", *TYPES.values()}


WRONG: list[tuple[str, str, Any]] = [
    ("invalid_json", "/v1/completions", b"{"),
    ("missing_required_parameter", "/v1/completions", {"unmask": {}}),
    ("unknown_parameter", "/v1/completions", {"model": "nano", "nope": 1}),
    ("unsupported_parameter", "/v1/completions", {"model": "nano", "length_penalty": 2}),
    ("invalid_value", "/v1/completions", {"model": "nano", "n": 0}),
    ("invalid_value", "/v1/completions", {"model": "nano", "n": 200}),
    ("invalid_value", "/v1/completions", {"model": "nano", "decoder": "blt-d", "block_size": 99}),
    ("invalid_value", "/v1/completions", {"model": "nano", "prompt": [999]}),
    ("invalid_value", "/v1/completions", []),
    ("missing_required_parameter", "/v1/completions", {"response_format": {"type": "json_schema", "json_schema": {}}}),
    ("context_length_exceeded", "/v1/completions", {"model": "nano", "max_tokens": 1 << 20}),
    ("model_not_found", "/v1/completions", {"model": "none"}),
    ("body_too_large", "/v1/completions", b" " * (5 << 20)),
    ("method_not_allowed", "/version", {}),
    ("unknown_url", "/v2", {}),
]


@pytest.mark.parametrize(("code", "route", "body"), WRONG, ids=[code for code, *_ in WRONG])
def test_every_error_code_comes_with_the_documented_status(
    nano_server: RunningServer, code: str, route: str, body: Any
) -> None:
    with nano_server.client() as http:
        content = body if isinstance(body, bytes) else json.dumps(body)
        answer = http.post(route, content=content, headers={"content-type": "application/json"})
    assert answer.json()["error"]["code"] == code
    assert f"| {answer.status_code} | `{code}` |" in DOCS["api.md"]


def test_documented_routes_are_exactly_those_of_the_server(nano_server: RunningServer) -> None:
    with nano_server.client() as http:
        routes = set(http.get("/openapi.json").json()["paths"])
    documented = set(re.findall(r"`(?:GET|POST) (/[^`]*)`", DOCS["api.md"].partition("## With curl")[0]))
    assert documented - {"/"} == routes | {"/openapi.json"}


def test_every_alert_has_its_section_and_every_section_its_alert() -> None:
    alerts = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text()
    names = re.findall(r"^ +- alert: (\w+)$", alerts, re.M)
    assert names and re.findall(r"^### Alert: (\w+)$", DOCS["operations.md"], re.M) == names
    assert re.findall(r"runbook_url: (\S+)$", alerts, re.M) == [
        f"docs/operations.md#{slug(f'Alert: {n}')}" for n in names
    ]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_anchor_in_the_documentation_is_a_heading() -> None:
    for name, text in DOCS.items():
        folder = FOLDERS[name]
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
            headings = re.findall(r"^#+ (.*)$", (folder / (target or name)).read_text(), re.M)
            assert anchor in map(slug, headings), (name, target, anchor)


def test_metrics_flags_and_log_lines_named_in_operations_exist() -> None:
    text = DOCS["operations.md"]
    metrics = set(re.findall(r"(?<![\w:])(fastblt_\w+?)(?:_bucket)?(?=\W)", text.replace("fastblt_(", "")))
    assert metrics and metrics <= set(re.findall(r"^\| `(fastblt_\w+)` \|", DOCS["metrics.md"], re.M))
    flags = set(re.findall(r"`[^`\n]*?(--[a-z][\w-]*)", text)) - {"--pid"}
    assert flags and flags <= set(re.findall(r"`(--[\w-]+)`", DOCS["command-line.md"]))
    source = "".join(path.read_text() for part in ("server", "engine") for path in (ROOT / part).rglob("*.py"))
    for line in LOG_LINES:
        assert f"`{line}`" in text
        assert all(piece.strip() in source for piece in line.split("…")), line


LOG_LINES = [
    "serving … on http://",
    "requests are cut off",
    "calibrated: shortest step … ms, prompt budget … rows",
    "cache_bytes … is too small",
    "matrix products depend on the batch",
    "out of memory?",
    "… must be reserved",
    "out of memory while loading",
    "out of memory in a step",
    "was killed (SIGKILL; out of memory?)",
    "was killed by the server",
    "the engine process …",
    "the engine did not come back: …",
    "has shown no life for",
    "takes too long for a step",
    "the engine failed each time that it ran this request alone",
    "dropped: nothing read the log",
    "API keys: …; the … in force stay",
    "bodies being read",
    "too many grammars wait",
]


EXAMPLES = [
    example
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for example in examples(document)
    if ADDRESS in example.code or example.code.startswith("fastblt ")
]


@pytest.fixture(scope="session")
def nano_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """What `make serve` serves, at another address."""
    with running_server(NANO, tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server


def test_the_documentation_has_examples_to_run() -> None:
    """In both languages, most with the output that they have."""
    documents = {example.document for example in EXAMPLES}
    assert documents >= {"README.md", "docs/api.md", "docs/operations.md"}
    assert sum(example.shown is not None for example in EXAMPLES) > len(EXAMPLES) / 2


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.document}:{example.line}")
def test_an_example_prints_what_the_documentation_shows(example: Example, nano_server: RunningServer) -> None:
    for tool in ("curl", "grep"):
        if example.language == "sh" and tool in example.code and not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    example.check(example.run(nano_server.url.removeprefix("http://")))


def test_documented_metrics_are_exactly_those_exposed(nano_server: RunningServer) -> None:
    with nano_server.client() as http:
        http.get("/version")
        exposed = http.get("/metrics").text
    documented = re.findall(r"^\| `(fastblt_\w+)` \| (\w+)", DOCS["metrics.md"], re.M)
    assert set(re.findall(r"^# TYPE (fastblt_\w+) (\w+)", exposed, re.M)) == set(documented)


def test_every_documented_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {target for text in DOCS.values() for target in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.M)}
    assert named and named <= targets


def test_every_documented_command_exists() -> None:
    named = {name for text in DOCS.values() for name in re.findall(r"(?:`|^    )fastblt ([a-z]+)", text, re.M)}
    assert named == COMMANDS.keys()


def test_every_link_in_the_documentation_leads_to_a_file() -> None:
    for name, text in DOCS.items():
        folder = FOLDERS[name]
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (folder / target).exists() or target == "models/nano/README.md", (name, target)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "design.md"])
def test_every_file_named_in_contributing_and_design_exists(name: str) -> None:
    named = set(re.findall(r"`((?:[\w.-]+/)+(?:[\w.-]+)?)`", DOCS[name])) - {"/health/live"}
    assert len(named) > 25 and not [file for file in named if not (ROOT / file).exists()]


def test_design_follows_a_step_in_at_most_twelve_sentences() -> None:
    section = re.search(r"^### The trip of one request.*?^1\. (.*?)^## ", DOCS["design.md"], re.M | re.S)
    assert section
    sentences = re.findall(r"\.(?=\s)", re.sub(r"^\d+\.", "", section[1], flags=re.M))
    assert 8 < len(sentences) <= 12


def test_the_glossary_is_short_and_has_each_word_once() -> None:
    section = re.search(r"^## Words\n(.*?)^## ", DOCS["design.md"], re.M | re.S)
    assert section
    words = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", section[1], re.M)[1:]
    assert 20 < len(words) <= 30 and len(set(words)) == len(words)


def test_the_changelog_begins_with_unreleased_and_the_current_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = re.findall(r"^## (\S+)", DOCS["CHANGELOG.md"], re.M)
    assert versions[:2] == ["Unreleased", project["version"]]


def test_the_image_is_pushed_under_the_tag_that_the_chart_takes() -> None:
    chart = yaml.safe_load((ROOT / "deploy" / "helm" / "fastblt" / "Chart.yaml").read_text())
    assert set(re.findall(r"registry\.example\.com/fastblt:(\S+)", DOCS["containers.md"])) == {chart["appVersion"]}


def test_the_workflow_runs_the_commands_of_the_readme() -> None:
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"].values()
    steps = [step["run"].split() for step in job["steps"] if "run" in step]
    (asked,) = [example.code.split() for example in examples(ROOT / "README.md") if "curl" in example.code]
    assert steps[0] == ["make", "test"] and steps[1][:3] == ["make", "serve", "&"]
    assert " ".join(asked) in " ".join(steps[1])
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)


def test_the_benchmark_tables_equal_the_measured_results() -> None:
    results = ROOT / "benchmarks" / "results"
    assert (results / "README.md").read_text() == summary.page(results)
    assert summary.speed(results) in DOCS["README.md"]


def test_the_gpu_tables_equal_the_measured_results() -> None:
    content = json.loads((ROOT / "benchmarks" / "results" / "gpu_check-nvidia-h200.json").read_text())
    for text in gpu_check_render.short(content):
        assert text in DOCS["gpu.md"]
