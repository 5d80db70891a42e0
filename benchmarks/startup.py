"""Time from the command to the first byte: `fastblt serve` is started, and gets a request as soon as it listens.

In turns with a Python that only imports torch, as the engine must too, or with the server of another checkout
(`--against`). The model's files are in the system's page cache: a freshly written model is started once before the
turns.
"""

import asyncio
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine.config import DtypeName

from . import report
from .models import released_model
from .paired import in_turn, shown, spread
from .program import Content, Subject, Verdict, finish, parser, subject
from .report import ROOT
from .servers import commit_of, server, stream

MOST = 5.0
MOST_OF_RELEASED = 8.0
"""Seconds, on two cores."""


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("startup", __doc__)
    program.add_argument(
        "--tables",
        choices=("BF16", "F32"),
        help="with --shape: files laid out as the released model's, with random weights, and hash tables in that dtype",
    )
    program.add_argument("--against", type=Path, help="folder of another checkout")
    options = program.parse_args(arguments)
    if options.tables and not options.shape:
        program.error("--tables needs --shape")
    with TemporaryDirectory(prefix="benchmarks-") as temporary, _subject(options, Path(temporary)) as model:
        figures = measure(model, options.turns, options.num_threads, options.against)
    finish("startup", model, figures, options, arguments)


@contextmanager
def _subject(options: Namespace, temporary: Path) -> Iterator[Subject]:
    if not options.tables:
        with subject(options) as model:
            yield model
        return
    shape, tables = options.shape, options.tables
    path = released_model(options.work or temporary, shape, tables)
    said = f"{shape} as released, hash tables in {tables}"
    label = f"{shape}-as-released-{tables.lower()}"
    dtype: DtypeName = options.dtype or "bfloat16"
    notes = ["random weights", "hash tables of zeros"]
    yield Subject(label, said, path, dtype, options.device, drawn=True, replays=False, notes=notes)


def measure(model: Subject, turns: int, threads: int | None, against: Path | None) -> dict[str, Any]:
    flags = [f"--dtype={model.dtype}", f"--device={model.device}"]
    flags += [f"--num-threads={threads}"] if threads else []
    this = partial(_first_byte, model, flags)
    if model.drawn:
        # The model was just written.
        this()
    figures: dict[str, Any] = {}
    if against:
        other = in_turn(partial(_first_byte, model, flags, against.resolve()), this, turns)
        figures = {
            "against": commit_of(against),
            "other": spread(first for (_, first), _ in other),
            "over_other": spread(new / old for (_, old), (_, new) in other),
        }
        starts = [start for _, start in other]
        bare = [_torch() for _ in starts]
    else:
        bare, starts = map(list, zip(*in_turn(_torch, this, turns), strict=True))
    return figures | {
        "seconds": spread(first for _, first in starts),
        "listens": spread(listens for listens, _ in starts),
        "torch": spread(bare),
        "over_torch": spread(first / torch for torch, (_, first) in zip(bare, starts, strict=True)),
    }


def _torch() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def _first_byte(model: Subject, flags: Sequence[str], root: Path = ROOT) -> tuple[float, float]:
    """Seconds until the server of that checkout listens, and until the first byte."""
    began = time.perf_counter()
    with server(model.path, *flags, root=root) as address:
        listens = time.perf_counter() - began
        body = {"prompt": "def ", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        return listens, listens + asyncio.run(stream(address, body)).first


def render(content: Content) -> str:
    header = ["to the first byte, s", "of these until it listens", "Python that imports torch", "times as long as that"]
    keys = ["seconds", "listens", "torch", "over_torch"]
    if "against" in content:
        header += [f"{content['against']}, s", "times as long as that"]
        keys += ["other", "over_other"]
    return report.table(header, [[shown(content[key]) for key in keys]])


def judge(content: Content) -> list[Verdict]:
    found = content["seconds"]
    most = MOST_OF_RELEASED if "as released" in content["subject"]["model"] else MOST
    return [Verdict("start-up", f"at most {most:.0f} s", f"{shown(found)} s", found["median"] <= most)]


if __name__ == "__main__":
    main()
