"""The whole check, within a budget of seconds."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kernels.dispatch import Kernels, choose_kernels

from ..build import device_of
from ..checkpoint import read_config
from ..config import DtypeName, EngineConfig
from ..engine import Engine
from . import machine, speed, texts
from .report import MOST_WRONG, Report
from .twins import faults, trials

KERNELS_UNTIL, TEXTS_UNTIL, SPEED_UNTIL = 0.5, 0.65, 0.8
"""Shares of the budget after which the kernels, the texts of the first dtype, and the speeds have had their time."""

Tell = Callable[[str, int, int], None]
"""Hears what is done next, how many steps are done, and of how many."""


def check(config: EngineConfig, dtypes: tuple[DtypeName, ...], seconds: float, tell: Tell) -> Report:
    """Checks this machine. config: its model, a folder, and its device. dtypes: of the texts; speeds are measured in
    the first.

    Raises CheckpointError for a model that cannot be read, ValueError for kernels and devices that are not there.
    """
    config.check()
    read_config(Path(config.model))
    device = device_of(config)
    kernels = choose_kernels(config.kernels, device)
    found = Report(machine.look(config.device, kernels), config.model)
    found.wrong += machine.unsupported(found.machine)
    found.notes += machine.slower(found.machine)
    _Check(config, dtypes, seconds, tell, kernels, device, found).run()
    return found


class _Check:
    def __init__(
        self,
        config: EngineConfig,
        dtypes: tuple[DtypeName, ...],
        seconds: float,
        tell: Tell,
        kernels: Kernels,
        device: torch.device,
        found: Report,
    ) -> None:
        self.config, self.dtypes, self.kernels, self.device = config, dtypes, kernels, device
        self.found, self._tell, self._seconds = found, tell, seconds
        self.began, self._done = time.monotonic(), 0
        self.unmeasured = True
        """Whether the time was up before all speeds were known."""
        self.trials = trials(kernels)
        # Of a dtype: blt, the decoders, and torch's kernels in float32; and the speeds.
        self._total = len(self.trials) + 3 * len(dtypes) + 6

    def until(self, share: float) -> float:
        """When that share of the budget is used."""
        return self.began + share * self._seconds

    def step(self, doing: str) -> None:
        self._tell(doing, self._done, self._total)
        self._done += 1

    @contextmanager
    def noting(self, what: str) -> Iterator[None]:
        """What is raised within is wrong with the machine."""
        try:
            yield
        except Exception as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            self.found.add_wrong(f"{what}: raised {type(error).__name__}: {first}")

    def run(self) -> None:
        self.compare_kernels()
        for number, dtype in enumerate(self.dtypes):
            with self.noting(f"the model in {dtype}"):
                expected = self.use_engine(dtype, first=number == 0)
                self.free()
                self.step(f"torch's kernels in {dtype}")
                # In bfloat16 sums of other orders change texts.
                if dtype == "float32" and self.config.weights is None and self.kernels.name != "torch":
                    self.against_torch(dtype, expected)
            self.free()
        self.found.judge_speed()
        self._note_rest()
        self.found.seconds = time.monotonic() - self.began

    def compare_kernels(self) -> None:
        found, ends = self.found, self.until(KERNELS_UNTIL)
        found.trials = len(self.trials)
        for trial in self.trials:
            if time.monotonic() > ends or len(found.wrong) >= MOST_WRONG:
                break
            self.step(str(trial))
            with self.noting(str(trial)):
                for fault in faults(trial, self.kernels, self.device):
                    self.found.add_wrong(fault)
            found.trials_done += 1
        self._done = len(self.trials)

    def use_engine(self, dtype: DtypeName, *, first: bool) -> texts.Texts:
        """All exact decoders in one batch, against blt with each prompt alone, whose texts are returned; of the first
        dtype also the speeds."""
        ends = self.until(TEXTS_UNTIL if first else 1.0)
        self.step(f"blt in {dtype}")
        engine = self.engine(dtype)
        expected = texts.of_blt(engine, ends)
        self.step(f"the exact decoders in {dtype}")
        for decoder, found in texts.of_decoders(engine, texts.exact(engine), ends).items():
            self.take(texts.compare(dtype, decoder, found, expected))
        if first:
            self.measure(engine, dtype, self.until(SPEED_UNTIL))
        return expected

    def against_torch(self, dtype: DtypeName, expected: texts.Texts) -> None:
        found = texts.of_decoders(self.engine(dtype, kernels="torch"), ["blt"], self.until(1.0))["blt"]
        self.take(texts.compare(dtype, "blt beside torch's kernels", expected, found))

    def take(self, comparison: texts.Comparison) -> None:
        self.found.texts.append(comparison)
        for difference in comparison.wrong:
            if self.kernels.name == "torch":
                self.found.notes.append(f"{difference}; torch's products depend on the batch")
            else:
                self.found.add_wrong(difference)

    def measure(self, engine: Engine, dtype: DtypeName, ends: float) -> None:
        self.step("the memory's speed")
        info, found = engine.info(), self.found
        found.copy, found.product = info.peak_bandwidth["copy"], info.peak_bandwidth["gemv"]
        found.speed_dtype, found.weight_bytes = dtype, sum(info.weight_bytes.values())
        runs = speed.runs(engine)
        for number, (decoder, sequences) in enumerate(runs):
            left = ends - time.monotonic()
            if left < 0:
                break
            self.step(f"the speed of {decoder} with {sequences} sequence{'s' * (sequences != 1)}")
            share = left / (len(runs) - number)
            found.speeds.append(speed.measure(engine, decoder, sequences, share, found.copy))
        self.unmeasured = len(found.speeds) < len(runs)

    def engine(self, dtype: DtypeName, **choices: Any) -> Engine:
        return Engine(replace(self.config, dtype=dtype, **choices))

    def free(self) -> None:
        """Frees engines that are no longer used: their parts refer to each other."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _note_rest(self) -> None:
        found, rest = self.found, []
        if found.trials_done < found.trials:
            rest.append(f"{found.trials - found.trials_done} of {found.trials} trials of kernels")
        if missing := sum(1 for c in found.texts if c.compared < c.texts * texts.NEW_BYTES):
            rest.append(f"the end of {missing} comparisons of texts")
        if self.unmeasured:
            rest.append(f"{'some of ' if found.speeds else ''}the speeds")
        found.complete = not rest
        if rest and found.fit:
            found.notes.append(f"the time was up before {', '.join(rest)}: a larger --seconds reaches them")
