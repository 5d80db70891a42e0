"""Shared parts of the benchmark programs: arguments, model and output.

A program is a module with `main(arguments)`, which measures and calls `finish`, and three functions over its figures:
`render` makes tables, `judge` compares them with aims, `draw` makes the picture.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from engine.config import DeviceName, DtypeName, EngineConfig, flag_help
from engine.engine import Engine

from . import report
from .generate import Wrap
from .models import Form, described, random_model
from .replay import replayed

Content = Mapping[str, Any]
"""The content of a program's JSON file."""
SHAPES = ("tiny", "nano", "1b", "3b", "7b")
PRIVATE = ("--work", "--out")
"""Arguments that do not affect the figures."""
EXTRAS = {
    "against_tokens": ("tokens", ("gguf", "llama_cpp"), " (it compiles, for ten minutes)"),
    "routing": ("ray", ("ray",), ""),
}
"""Programs that need more than `make bench` installs: an extra, the modules that it brings, and a warning."""


class Verdict(NamedTuple):
    """An aim, and whether the figure meets it. met: None if that cannot be decided."""

    figure: str
    aim: str
    found: str
    met: bool | None


@dataclass(frozen=True, slots=True)
class Subject:
    """The model that a program runs, and how. drawn: whether its weights are random. replays: whether drafts are
    accepted at the paper's rates instead of by the model."""

    label: str
    said: str
    path: Path
    dtype: DtypeName
    device: DeviceName
    drawn: bool
    replays: bool
    notes: list[str]

    def engine(self, **choices: Any) -> Engine:
        asked = {"model": str(self.path), "dtype": self.dtype, "device": self.device} | choices
        return Engine(EngineConfig(**asked))

    def wrap(self, engine: Engine) -> Wrap | None:
        """The wrapper that replaces the requests' decoders."""
        return replayed(engine) if self.replays else None

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "model": self.said,
            "dtype": self.dtype,
            "device": self.device,
            "notes": [*self.notes, *(["replayed acceptance"] if self.replays else [])],
            "replays": self.replays,
        }


def lacking(name: str) -> str | None:
    """A line on what must be installed for that program; None if nothing is missing."""
    extra, modules, warning = EXTRAS.get(name, ("", (), ""))
    missing = [module for module in modules if find_spec(module) is None]
    if not missing:
        return None
    return f"{name} needs {' and '.join(missing)}: .venv/bin/pip install -e '.[{extra}]'{warning}"


def parser(
    name: str, description: str | None, *, shape: str | None = None, replays: bool = False, in_turns: bool = True
) -> argparse.ArgumentParser:
    """A parser with the arguments of all programs. shape: the default model; None takes models/nano. replays: whether
    acceptance can be replayed. in_turns: whether it measures anything in turns."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.set_defaults(default_shape=shape, replays=replays)
    which = parser.add_mutually_exclusive_group()
    default = f"the default is --shape {shape}" if shape else "the default is models/nano"
    which.add_argument("--model", type=Path, help=f"folder of a checkpoint; {default}")
    which.add_argument("--shape", choices=SHAPES, help="random weights of that shape, with small hash tables")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help=f"{flag_help('dtype', phrase=True)}; default: bfloat16 for a --shape, float32 for a --model",
    )
    device = flag_help("device", phrase=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help=f"{device} (%(default)s)")
    parser.add_argument("--num-threads", type=int, help=flag_help("num_threads", phrase=True))
    if in_turns:
        parser.add_argument("--turns", type=int, default=3, help="turns of A and B (%(default)s)")
    if replays:
        parser.add_argument(
            "--replay-acceptance",
            action=argparse.BooleanOptionalAction,
            help="accept drafts at the rates of the Fast BLT paper; default: for random weights only",
        )
    parser.add_argument("--work", type=Path, help="folder that keeps random models for further runs")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON file and the picture")
    return parser


@contextmanager
def subject(options: argparse.Namespace, *, form: Form = "fast") -> Iterator[Subject]:
    """The chosen model. form: of random weights."""
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    shape = options.shape or (None if options.model else options.default_shape)
    dtype: DtypeName = options.dtype or ("bfloat16" if shape else "float32")
    replays = options.replays and (bool(shape) if options.replay_acceptance is None else options.replay_acceptance)
    with TemporaryDirectory(prefix="benchmarks-") as temporary:
        if shape:
            work = options.work or Path(temporary)
            path = random_model(work, shape, form, dtype=getattr(torch, dtype), device=options.device)
            label, said, notes = f"{shape}-shape", f"{shape} shape", described(shape, form)
        else:
            path, notes = options.model or report.NANO, []
            label = path.resolve().name
            said = "models/nano" if path.resolve() == report.NANO else label
        yield Subject(label, said, path, dtype, options.device, bool(shape), replays, notes)


def finish(
    name: str, subject: Subject, figures: dict[str, Any], options: argparse.Namespace, arguments: Sequence[str] | None
) -> None:
    """Writes the JSON file and the picture, and prints its section."""
    from . import summary  # it knows all programs

    given = sys.argv[1:] if arguments is None else arguments
    content = {"program": name, "subject": subject.facts, **figures}
    path = report.write(f"{name}-{subject.label}", command(name, given), content, options.out)
    summary.draw(path)
    print(f"{summary.section(path)}\n\n{path}")


def command(name: str, arguments: Sequence[str]) -> str:
    """The command that makes the figures again, without folders."""
    kept, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in PRIVATE:
            rest.pop(0)
        else:
            kept.append(argument)
    return shlex.join(["python", "-m", f"benchmarks.{name}", *kept])
