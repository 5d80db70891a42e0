"""Runs one part in its own process: `python -m benchmarks.gpu_check.part MODULE ...` writes its piece to a file.

A part is a module with a function `measure(setting, piece)`.
"""

import argparse
from importlib import import_module
from pathlib import Path

from .piece import Piece
from .setting import Setting


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.part", description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--piece", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()

    piece = Piece(options.piece)
    setting = Setting(options.device, options.quick, options.work, options.trace)
    import_module(options.module).measure(setting, piece)
    piece.finish()


if __name__ == "__main__":
    main()
