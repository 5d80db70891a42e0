"""From the command to the first byte: `fastblt serve` is started, and asked as soon as it says where it listens.

In turns with a Python that does no more than import torch, which the server's engine must do too.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from . import report
from .program import Content, Subject, Verdict, finish, parser, subject
from .servers import server, stream
from .turns import in_turn, shown, spread

MOST = 5.0


def main(arguments: Sequence[str] | None = None) -> None:
    program = parser("startup", __doc__)
    options = program.parse_args(arguments)
    with subject(options) as model:
        figures = measure(model, options.turns, options.num_threads)
    finish("startup", model, figures, options, arguments)


def measure(model: Subject, turns: int, threads: int | None) -> dict[str, Any]:
    flags = [f"--dtype={model.dtype}", f"--device={model.device}"]
    flags += [f"--num-threads={threads}"] if threads else []
    pairs = in_turn(_torch, lambda: _first_byte(model, flags), turns)
    return {
        "seconds": spread(first for _, (_, first) in pairs),
        "listens": spread(listens for _, (listens, _) in pairs),
        "torch": spread(torch for torch, _ in pairs),
        "over_torch": spread(first / torch for torch, (_, first) in pairs),
    }


def _torch() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - began


def _first_byte(model: Subject, flags: Sequence[str]) -> tuple[float, float]:
    """Seconds until the server listens, and until the first byte."""
    began = time.perf_counter()
    with server(model.path, *flags) as address:
        listens = time.perf_counter() - began
        body = {"prompt": "def ", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        return listens, listens + asyncio.run(stream(address, body)).first


def render(content: Content) -> str:
    return report.table(
        ["to the first byte, s", "of these until it listens", "Python that imports torch", "times as long as that"],
        [[shown(content[key]) for key in ("seconds", "listens", "torch", "over_torch")]],
    )


def judge(content: Content) -> list[Verdict]:
    found = content["seconds"]
    return [Verdict("start-up", f"at most {MOST:.0f} s", f"{shown(found)} s", found["median"] <= MOST)]


if __name__ == "__main__":
    main()
