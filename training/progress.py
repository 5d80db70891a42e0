"""Progress of a phase: a bar on a terminal that has tqdm, otherwise a line every few seconds."""

import sys
import time
from types import TracebackType
from typing import Any

LOG_SECONDS = 15.0
_COUNTS = ("phase", "step", "seconds", "bytes")


class Progress:
    def __init__(self, name: str, done: float) -> None:
        self._name, self._logged, self._bar = name, time.monotonic(), _bar(name, done)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, done: float, line: dict[str, Any] | None, *, last: bool) -> None:
        """Shows the part `done` of the phase, 0..1, and a line of the metrics, if there is a new one."""
        if line is None:
            return
        speed = line["bytes"] / line["seconds"] / 1e3
        if self._bar is not None:
            self._bar.set_postfix_str(f", {line['bits']:.3f} bits/byte, {speed:.1f} kB/s")
            self._bar.update(done - self._bar.n)
        elif last or time.monotonic() - self._logged > LOG_SECONDS:
            self._logged = time.monotonic()
            figures = " ".join(f"{key}={value:.3f}" for key, value in line.items() if key not in _COUNTS)
            seen = f"step={line['step']} MB={line['bytes'] / 1e6:.2f} kB/s={speed:.2f}"
            print(f"{self._name} {done:6.1%} {seen} {figures}", flush=True)


def _bar(name: str, done: float) -> Any:
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=1.0, initial=done, desc=name,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")  # fmt: skip
