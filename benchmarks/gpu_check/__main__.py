"""The command line of the check."""

import argparse
import shlex
import signal
import sys
from pathlib import Path

import torch

from benchmarks import report
from engine.config import flag_help

from .check import PARTS, Check
from .device import nvidia_smi


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="Checks correctness and speed on this device, and where time goes. An interrupted run continues.",
        epilog="Exit codes: 0 all passed, 1 something is wrong, 3 a part did not finish.",
    )
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="folder of the JSON file and the report")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="run only these parts")
    parser.add_argument("--again", nargs="+", choices=PARTS, default=[], help="run these parts again")
    parser.add_argument("--keep", action="store_true", help="keep figures that were made by other sources")
    parser.add_argument("--budget-s", type=float, default=480, help="seconds for everything (480)")
    device = flag_help("device", phrase=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=f"{device} (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to see whether everything runs")
    parser.add_argument("--trace", action="store_true", help="also write chrome traces of the profiled steps")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        why = "this build of torch has no CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        print(f"{why}; --device cpu --quick tries the check itself", file=sys.stderr)
        return 1
    # So that a part does not outlive a check that is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    arguments = shlex.join(sys.argv[1:])
    check = Check(
        options.out,
        options.device,
        torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        f'make gpu-check ARGS="{arguments}"' if arguments else "make gpu-check",
        nvidia_smi().get("driver_version") if options.device == "cuda" else None,
        quick=options.quick,
        keep=options.keep,
        trace=options.trace,
    )
    names = [name for name in PARTS if name in options.parts or name in options.again]
    return check.run(names, options.again, options.budget_s)


if __name__ == "__main__":
    sys.exit(main())
