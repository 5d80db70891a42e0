"""The differentiable passes of training (patcher, texts, blocks), eager or compiled, whichever is faster here."""

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
"""Timed runs of each form."""
COMPILE_SECONDS = 150.0
"""Compile only if it should finish before the stage ends: within these seconds, or four times what another pass took.
(The second row length of a pass is compiled for any length, which took 3.5 times as long as the first.)"""


@dataclass(slots=True)
class Passes:
    """Chooses for every pass and shape when it first runs. `auto` compiles only on `cuda`, where it can pay.

    deadline: when the process must have ended, in seconds of `time.monotonic`. before: called before a compilation,
    which may take minutes. seconds: time spent on choosing so far.
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
        """Marks dimension 1 as varying with every batch, to compile once for all."""
        if self.compiles:
            import torch._dynamo as dynamo  # takes a second

            for tensor in tensors:
                dynamo.maybe_mark_dynamic(tensor, 1)

    def choose(self, function: Pass, shape: torch.Size, attempt: Callable[[Pass], None]) -> Pass:
        """`function` or its compiled form. `attempt` runs one forward and backward pass without side effects."""
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
                warnings.simplefilter("ignore")  # about TF32 products, which are off on purpose
                attempt(compiled)
                synchronize(self.device)
        except Exception as error:  # training continues without the compiler
            first = str(error).strip().partition("\n")[0]
            self._tell(f"{name}: not compiled, the compiler failed: {type(error).__name__}: {first}")
            return function
        took = time.monotonic() - began
        self._longest = max(self._longest, took)
        # From here on a shape that cannot be compiled runs eagerly.
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
