"""The two differentiable passes of training, as they are written or compiled, whichever is faster here."""

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .device import synchronize

Mode = Literal["auto", "on", "off"]
Pass = Callable[..., Any]

TRIALS = 5
"""Timed runs of each."""
COMPILE_SECONDS = 150.0
"""Nothing is compiled that may not be ready when a stage ends: in this time, or four times what another pass took. (The
second row length of a pass is compiled for any, which took 3.5 times as long as the first.)"""


@dataclass(slots=True)
class Passes:
    """Chooses for every pass and shape, when it first comes. Only `cuda` compiles by itself (`auto`): there it can pay.

    deadline: when the process must have ended, in seconds of `time.monotonic`. before: called before something is
    compiled, which may take minutes. seconds: what choosing took so far.
    """

    mode: Mode = "off"
    device: torch.device = torch.device("cpu")
    deadline: float | None = None
    before: Callable[[], None] = lambda: None
    seconds: float = 0.0
    _longest: float = 0.0
    _compiled: dict[Pass, Pass] = field(default_factory=dict)
    _chosen: dict[tuple[Pass, torch.Size], Pass] = field(default_factory=dict)

    @property
    def compiles(self) -> bool:
        return self.mode == "on" or (self.mode == "auto" and self.device.type == "cuda")

    def vary(self, *tensors: Tensor) -> None:
        """Their dimension 1 is another for every batch: compiled once for all."""
        if self.compiles:
            import torch._dynamo as dynamo  # takes a second

            for tensor in tensors:
                dynamo.maybe_mark_dynamic(tensor, 1)

    def choose(self, function: Pass, shape: torch.Size, attempt: Callable[[Pass], None]) -> Pass:
        """`function` or what was compiled of it. `attempt` runs one forward and backward, and leaves no trace."""
        if not self.compiles:
            return function
        if (function, shape) not in self._chosen:
            began = time.monotonic()
            self._chosen[function, shape] = self._choice(function, shape, attempt)
            self.seconds += time.monotonic() - began
        return self._chosen[function, shape]

    def _choice(self, function: Pass, shape: torch.Size, attempt: Callable[[Pass], None]) -> Pass:
        name = f"{function.__name__} of {shape[0]} rows of {shape[1] - 1} bytes"
        if self.deadline is not None and time.monotonic() + max(COMPILE_SECONDS, 4 * self._longest) > self.deadline:
            self._tell(f"{name}: not compiled, the stage ends soon")
            return function
        self.before()
        compiled = self._compiled.setdefault(function, torch.compile(function))
        began = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of products in TF32, which are not wanted
                attempt(compiled)
                synchronize(self.device)
        except Exception as error:  # whatever the compiler could not do: training can go on
            first = str(error).strip().partition("\n")[0]
            self._tell(f"{name}: not compiled, the compiler failed: {type(error).__name__}: {first}")
            return function
        took = time.monotonic() - began
        self._longest = max(self._longest, took)
        # From here on a shape that cannot be compiled runs as it is written.
        torch._dynamo.config.suppress_errors = True
        if self.mode == "on":
            self._tell(f"{name}: compiled in {took:.0f} s")
            return compiled
        plain, fast = self._milliseconds(function, attempt), self._milliseconds(compiled, attempt)
        kept = "kept" if fast < plain else "not used"
        self._tell(f"{name}: compiled in {took:.0f} s, {fast:.1f} ms instead of {plain:.1f}: {kept}")
        return compiled if fast < plain else function

    def _milliseconds(self, function: Pass, attempt: Callable[[Pass], None]) -> float:
        attempt(function)
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(TRIALS):
            attempt(function)
        synchronize(self.device)
        return (time.perf_counter() - began) / TRIALS * 1e3

    @staticmethod
    def _tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)
