"""One page of all measurements: aims and results, then tables, pictures and commands.

`python -m benchmarks.summary` makes `benchmarks/results/README.md` from the JSON files next to it.
"""

import argparse
import json
from importlib import import_module
from pathlib import Path
from typing import Any

from . import report
from .program import Content, Verdict

PROGRAMS = {
    "against_hf": "Against Hugging Face transformers",
    "against_tokens": "Against llama.cpp",
    "realisation": "Realisation, bandwidth use, host cost",
    "rates": "Bytes per second, and what holds them back",
    "decoders": "The decoders on text of three kinds",
    "running_ahead": "Running ahead of the results",
    "batching": "Batching",
    "serving": "Server cost",
    "checkouts": "Against an earlier server",
    "growth": "Growth with the context",
    "startup": "Start-up",
    "prefix": "Prefix cache",
    "prefill_budget": "Prefill budget",
    "constraints": "Structured output",
    "fleet": "Routing among replicas",
    "routing": "Routing among real replicas",
    "capacity": "Simulated capacity",
}
"""The programs' titles, in the order of the page."""
INTRODUCTION = """\
# What was measured

Made by `make bench`, or by the command beside each figure; [how, and how to read it](../../docs/benchmarks.md). Ratios
are medians of paired turns, with their range. Absolute figures hold for the machine named beside them alone.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description=__doc__)
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON files")
    print(write(parser.parse_args().out))


def write(folder: Path) -> Path:
    """Makes the page of a folder's JSON files and returns its path."""
    path = folder / "README.md"
    path.write_text(page(folder))
    return path


def page(folder: Path) -> str:
    paths = results(folder)
    rows = []
    for path in paths:
        content = json.loads(path.read_text())
        rows += [
            [v.figure, content["subject"]["model"], v.aim, v.found, _met(v), f"`{content['command']}`"]
            for v in verdicts(content)
        ]
    header = ["figure", "model", "aim", "found", "", "command"]
    return "\n\n".join([INTRODUCTION.strip(), report.table(header, rows), *map(section, paths)]) + "\n"


def results(folder: Path) -> list[Path]:
    """The programs' JSON files, in the order of the page."""
    found = []
    for path in sorted(folder.glob("*.json")):
        program = json.loads(path.read_text()).get("program")
        if program in PROGRAMS:
            found.append((list(PROGRAMS).index(program), path))
    return [path for _, path in sorted(found)]


def section(path: Path) -> str:
    """The section for one JSON file, in Markdown."""
    content = json.loads(path.read_text())
    subject, picture = content["subject"], path.with_suffix(".png")
    title = f"## {PROGRAMS[content['program']]}: {subject['model']}"
    about = "; ".join([f"{subject['model']}, {subject['dtype']}", *subject["notes"], machine(content)])
    parts = [title, f"{about}. `{content['command']}`", _module(content).render(content)]
    if picture.exists():
        parts.append(f"![{PROGRAMS[content['program']]}]({picture.name})")
    return "\n\n".join(parts)


def machine(content: Content) -> str:
    """Where and when it was measured."""
    taken = content["taken"]
    device = taken["gpu"] if content["subject"]["device"] == "cuda" else f"{taken['processor']} ({taken['cpu']})"
    threads = f"{taken['cores']} cores, {taken['threads']} threads"
    return f"{device}, {threads}, torch {taken['torch']}, commit {taken['commit']}, {taken['date']}"


def speed(folder: Path) -> str:
    """The table of the project's README: the 1B shape in bfloat16, one request at a time, a row for each decoder."""

    def read(name: str) -> Content:
        content: Content = json.loads((folder / f"{name}.json").read_text())
        return content

    cpu = {row["decoder"]: row for row in read("realisation-1b-shape")["rows"]}
    tokens = {row["decoder"]: row["against"] for row in read("against_tokens-1b-shape")["rows"]}
    gpu = {
        row["decoder"]: row
        for row in read("gpu_check-nvidia-h200")["parts"]["1b"]["figures"]["speed"]
        if row["form"] == "fast" and row["weights"] == "bfloat16"
    }
    rows = []
    for way, row in gpu.items():
        here, against = cpu.get(way), tokens[way]
        times = [f"{against[form]['ratio']['median']:.2f}" for form in ("f16", "q8_0")]
        rows.append(
            [way, f"{here['over_blt']:.2f} ({here['predicted']:.2f})" if here else "", *times]
            + [f"{row['bytes_per_second']:,.0f}", f"{row['over_blt']:.2f} ({row['predicted']:.2f})"]
            + [f"{row['bandwidth_use']:.2f}"]
        )
    cpu_columns = [f"2 cores: times {other}" for other in ("blt (predicted)", "llama.cpp f16", "llama.cpp q8_0")]
    gpu_columns = [f"H200: {figure}" for figure in ("bytes/s", "times blt (predicted)", "share of the bandwidth")]
    return report.table(["", *cpu_columns, *gpu_columns], rows)


def verdicts(content: Content) -> list[Verdict]:
    found: list[Verdict] = _module(content).judge(content)
    return found


def draw(path: Path) -> None:
    """Draws the picture next to a JSON file, if its program has one."""
    content = json.loads(path.read_text())
    module = _module(content)
    if hasattr(module, "draw"):
        module.draw(content, path.with_suffix(".png"))


def _met(verdict: Verdict) -> str:
    return {True: "met", False: "missed", None: ""}[verdict.met]


def _module(content: Content) -> Any:
    return import_module(f"benchmarks.{content['program']}")


if __name__ == "__main__":
    main()
