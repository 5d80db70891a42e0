"""Measures what steps of an engine cost on this machine, before it serves."""

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .build import device_name
from .costs import calibration
from .types import Request

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("fastblt.engine")


def calibrate(engine: "Engine") -> tuple[int, float]:
    """Calibrates an engine's latency model, from its file of stage costs if there is one, else from steps that it runs;
    the engine is otherwise unchanged. Takes up to two seconds, and up to a minute more if kernels must be compiled and
    recorded. Returns how many rows of prompts a step can have, and the seconds of the shortest step.

    A file that does not help is only a cache that is missing. One of another model, device or setting is overwritten,
    and so, with a warning, is one that cannot be read; one without stage costs is first moved aside, with a warning. If
    none can be written, a warning says so.
    """
    config, identity = engine.config, _identity(engine)
    path = Path(config.stage_costs) if config.stage_costs else None
    steps = _known(path, identity) if path else None
    if steps is None:
        steps = measure(engine)
        if path:
            try:
                calibration.write(path, identity, steps)
            except OSError as error:
                log.warning("--stage-costs: not written, and measured again at the next start: %s", error)
    for measured in steps:
        for stage, (rows, seconds) in measured.stages.items():
            engine.ledger.latency.calibrate(stage, rows, seconds)
    rows = calibration.prompt_rows(steps, config.max_stall_ms / 1000, config.max_step_rows)
    log.info("calibrated: shortest step %.3g ms, prompt budget %d rows", 1000 * steps[0].seconds, rows)
    return rows, steps[0].seconds


def _known(path: Path, identity: dict[str, str | int]) -> list[calibration.MeasuredStep] | None:
    try:
        return calibration.read(path, identity)
    except OSError as error:
        log.warning("--stage-costs: not read: %s", error)
    except ValueError as error:
        aside = path.with_name(f"{path.name}.bad")
        log.warning("--stage-costs: %s; it is moved to %s", error, aside)
        with suppress(OSError):
            path.replace(aside)
    return None


def _identity(engine: "Engine") -> dict[str, str | int]:
    """What the cost of a step depends on."""
    config = engine.config
    return {
        "model": config.model,
        "parameters": engine.limits.parameters,
        "patching": str(engine.model_config.patching),
        "dtype": config.dtype,
        "weights": config.weights or config.dtype,
        "device": device_name(engine.stepper.device),
        "kernels": engine.parts.kernels.name,
        "threads": torch.get_num_threads(),
    }


def measure(engine: "Engine") -> list[calibration.MeasuredStep]:
    """Runs some steps and leaves the engine unchanged; only time passes."""
    ledger, recording = engine.ledger, calibration.RecordingModel()
    latency, ledger.latency = ledger.latency, recording

    def step(rows: int) -> calibration.MeasuredStep:
        prompt = calibration.PROMPT[:rows]
        engine.add(Request(id="calibration", prompt_ids=prompt, max_tokens=1, ignore_eos=True))
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds = time.perf_counter() - began
        ledger.poll()
        return recording.step(rows, seconds)

    most_rows = min(engine.config.max_step_rows, engine.memory.caches.max_length - 1)
    with engine.rehearsing():
        try:
            return calibration.measure_steps(step, most_rows, lambda: engine.stepper.executor.num_recorded)
        finally:
            ledger.latency = latency
