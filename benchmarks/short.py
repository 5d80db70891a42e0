"""The short set: all figures within ten minutes on two cores, then the page that shows them. `make bench` runs it.

Every program runs in its own process. If one breaks, the others continue; the page then lacks its figures, or keeps the
old ones.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from . import report, summary
from .program import lacking

RUNS = (
    "startup",
    "realisation --shape 1b --turns 2 --bytes 24 --ways 'blt-s k=8' 'blt-d B=8' 'blt-dv B=8'",
    "batching --shape 1b --turns 1 --concurrency 4",
    "against_tokens --turns 2 --bytes 44 --ways blt 'blt-s k=8' 'blt-dv B=8' --formats f16 q8_0",
    "against_hf --turns 2 --lengths 64 256 512",
    "growth --turns 2 --hf-most 2048",
    "realisation --model models/nano --turns 2 --bytes 128",
    "rates --turns 2 --bytes 64",
    "batching --turns 2 --seconds 1",
    "serving --turns 2 --bytes 128",
    "prefix --turns 1 --requests 64",
    "prefill_budget --turns 2 --budgets 64 256 1024",
)
LIMIT_SECONDS = 600
INTERRUPTS, INTERRUPT_SECONDS = 3, 5.0
"""How often a program is asked to stop, and how long it has each time."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.short", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=summary.PROGRAMS, help="run only these programs")
    parser.add_argument("--list", action="store_true", help="show the commands and run none")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON files and the page")
    options = parser.parse_args(arguments)
    runs = []
    for run in RUNS:
        name = run.split()[0]
        if options.only and name not in options.only:
            continue
        if lacks := lacking(name):
            print(f"left out: {lacks}", file=sys.stderr, flush=True)
        else:
            runs.append(run)
    if options.list:
        print("\n".join(f"python -m benchmarks.{run}" for run in runs))
        return 0
    return run_all(runs, options.out)


def run_all(runs: Sequence[str], out: Path) -> int:
    """Runs the programs one after another and writes the page. Returns how many of them broke."""
    broken, began = [], time.monotonic()
    # So that waiting threads do not take the cores from working ones, as in the server.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with TemporaryDirectory(prefix="benchmarks-") as work:
        for number, run in enumerate(runs, 1):
            print(f"[{number}/{len(runs)}, {time.monotonic() - began:.0f} s] {run}", flush=True)
            name, *given = shlex.split(run)
            command = [sys.executable, "-m", f"benchmarks.{name}", *given, "--work", work, "--out", str(out)]
            if why := _run(command, environment):
                broken.append(run)
                print(f"broke: {why}", file=sys.stderr, flush=True)
    print(f"{summary.write(out)}, after {time.monotonic() - began:.0f} s")
    if broken:
        print("broke:", *broken, sep="\n  ", file=sys.stderr)
    return len(broken)


def _run(command: Sequence[str], environment: dict[str, str]) -> str | None:
    """Why it failed; None if it did not."""
    with subprocess.Popen(command, cwd=report.ROOT, env=environment) as process:
        try:
            code = process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            return f"stopped after {LIMIT_SECONDS} s"
        finally:
            _interrupt(process)
    return f"ended with {code}" if code else None


def _interrupt(process: "subprocess.Popen[bytes]") -> None:
    """Not killed at once, as it may have a server to stop; asked again, as it may not have listened yet."""
    for _ in range(INTERRUPTS):
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(INTERRUPT_SECONDS)
            return
    process.kill()


if __name__ == "__main__":
    sys.exit(main())
