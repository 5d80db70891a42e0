"""Runs a target under atheris, which mutates inputs towards new branches of the code.

    python -m tests.fuzz.run --target splitter --minutes 60
    python -m tests.fuzz.run --target splitter --plant "drops a byte at a cut"

It ends with the first input that breaks an invariant, takes more than ten seconds or 2 GiB, and keeps it in a file.
Without --target all targets run, one after another. Inputs that reach something new are kept for the next run.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

SECONDS, MEGABYTES = 10, 2048
"""Most for one input. Torch alone takes several hundred megabytes."""
LONGEST = 8192
"""Bytes of an input."""
FOUND = 77
"""Exit code of libFuzzer when an input failed."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", help="run only this one")
    parser.add_argument("--minutes", type=float, default=60, help="for each target [default: 60]")
    parser.add_argument("--plant", metavar="FAULT", help="plant this fault, or 'all' of them in turn")
    parser.add_argument("--keep", type=Path, default=Path(".fuzz"), help="folder of inputs [default: .fuzz]")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations [default: 1]")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.alone:
        return fuzz(args)
    from tests.fuzz.targets import NAMES, target

    worst = 0
    for name in [args.target] if args.target else NAMES:
        for fault in target(name).faults if args.plant == "all" else [args.plant]:
            command = [sys.executable, "-m", "tests.fuzz.run", "--alone", "--target", name]
            command += ["--minutes", str(args.minutes), "--keep", str(args.keep), "--seed", str(args.seed)]
            code = subprocess.run([*command, *(["--plant", fault] if fault else [])]).returncode
            # A planted fault that was not found is a failure, too.
            worst = max(worst, int(code != FOUND) if fault else abs(code))
    return worst


def fuzz(args: argparse.Namespace) -> int:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["server", "engine"]):
        from tests.fuzz.targets import target

        part = target(args.target)
    print(f"--- {args.target}{f' with a fault: {args.plant}' if args.plant else ''}", flush=True)
    name = f"{args.target}-planted" if args.plant else args.target
    keep, seeds, words = (args.keep / f"{name}{kind}" for kind in ("", "-seeds", ".dict"))
    keep.mkdir(parents=True, exist_ok=True)
    seeds.mkdir(exist_ok=True)
    for number, seed in enumerate(part.seeds):
        (seeds / str(number)).write_bytes(seed)
    words.write_text("".join('"' + "".join(map("\\x{:02x}".format, word)) + '"\n' for word in part.words))
    runs, began = 0, time.monotonic()

    def counted(data: bytes) -> None:
        nonlocal runs
        runs += 1
        try:
            part.one(data)
        except Exception:
            print(f"found after {runs} executions, {time.monotonic() - began:.1f} s: {data[:300]!r}", flush=True)
            raise

    options = {
        "max_total_time": round(args.minutes * 60),
        "timeout": SECONDS,
        "rss_limit_mb": MEGABYTES,
        "max_len": LONGEST,
        "seed": args.seed,
        "print_final_stats": 1,
        "verbosity": 1,
        "artifact_prefix": f"{keep}/found-",
        "dict": words,
    }
    flags = [f"-{name}={value}" for name, value in options.items() if name != "dict" or part.words]
    # A planted fault is looked for from the seeds alone.
    corpus = [seeds] if args.plant else [keep, seeds]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with part.faults[args.plant]() if args.plant else nullcontext():
        atheris.Setup([sys.argv[0], *flags, *map(str, corpus)], counted)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
