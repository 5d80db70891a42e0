"""Builds the parts of an engine from an EngineConfig, and measures how long their steps take."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from kernels.dispatch import Kernels, choose_kernels

from . import checkpoint
from .checkpoint.base import Checkpoint
from .config import EngineConfig, ModelConfig, ModelLimits
from .costs import calibration
from .costs.accounting import PaperFormula, StageBytes
from .costs.clock import clock_of
from .costs.latency import LatencyModel
from .costs.ledger import Ledger
from .decoders.table import available
from .memory.caches import Caches, plan_caches
from .memory.memory import Memory
from .memory.prefix import PrefixCache
from .memory.room import check_room
from .model import Model, RowFloors, find_row_floors
from .model.layers import matrix_dtype
from .step.ahead import RunAhead
from .step.graphs import Eager, Graphs
from .step.launch import Launcher
from .step.stages import Stages
from .step.step import Stepper
from .types import Request

if TYPE_CHECKING:
    from .engine import Engine

log = logging.getLogger("fastblt.engine")


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of an engine except its requests."""

    model: Model
    limits: ModelLimits
    kernels: Kernels
    memory: Memory
    ledger: Ledger
    stepper: Stepper
    stage_bytes: StageBytes
    formula: PaperFormula
    isolates_documents: bool


def build(config: EngineConfig) -> Parts:
    """Builds all parts. Raises CheckpointError for a checkpoint that cannot be served, ValueError for a missing device
    and for sizes that cannot work."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device, dtype = torch.device(config.device), getattr(torch, config.dtype)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device 'cuda': torch {torch.__version__} finds no CUDA device; 'cpu' needs none")
    loaded = checkpoint.load(config.model, patcher=config.patcher, patching_threshold=config.patching_threshold)
    for note in loaded.notes:
        log.warning("%s", note)
    kernels = choose_kernels(config.kernels, device)
    if device.type == "cpu" and config.kernels is None and kernels.name == "torch":
        log.warning("fastblt's own CPU kernels are not compiled: falling back to torch, several times slower")
    # Our own CPU kernels keep float8 weights as bfloat16, in panels.
    fp8 = config.weights == "float8" and not kernels.widens
    model, caches = _load(config, loaded, kernels, device, dtype, fp8=fp8)
    floors = find_row_floors(model, caches.specs, dtype, device)
    if not floors.proven:
        log.warning("this machine's matrix products depend on the batch: equal requests may differ in near-ties")
    stage_bytes = StageBytes.of(
        loaded.config, dtype.itemsize, model.hash_itemsize, matrix_itemsize=model.matrix_itemsize, fp8=fp8
    )
    latency = LatencyModel(loaded.config.decoder_input == "encoder", has_device=device.type != "cpu")
    ledger = Ledger(stage_bytes, latency, clock_of(device))
    memory = Memory(caches, PrefixCache(caches) if config.prefix_cache else None)
    given = config.isolate_documents
    isolate = loaded.config.isolate_documents if given is None else given
    stages = _stages(config, model, floors, memory, ledger, device, isolate=isolate)
    return Parts(
        model=model,
        limits=_limits(loaded.config, caches, model.parameters),
        kernels=kernels,
        memory=memory,
        ledger=ledger,
        stepper=Stepper(stages, memory, ledger, kernels, RunAhead.everywhere(config.run_ahead)),
        stage_bytes=stage_bytes,
        formula=PaperFormula.of(loaded.config, dtype.itemsize),
        isolates_documents=isolate,
    )


def _load(
    config: EngineConfig, loaded: Checkpoint, kernels: Kernels, device: torch.device, dtype: torch.dtype, *, fp8: bool
) -> tuple[Model, Caches]:
    """The model on its device, and its caches, after a check that the memory suffices."""
    check_room(
        loaded.config,
        loaded.tensors,
        plan_caches(loaded.config, config),
        dtype,
        matrix_dtype(loaded.tensors, dtype, kernels),
        device,
        fp8=fp8,
        mapped=kernels.name == "torch",
    )
    model = Model(loaded.config, loaded.tensors, dtype, device, kernels, fp8=config.weights == "float8")
    caches = Caches(loaded.config, config)
    model.check_lengths(caches.max_length, caches.max_patches)
    return model, caches


def _stages(
    config: EngineConfig,
    model: Model,
    floors: RowFloors,
    memory: Memory,
    ledger: Ledger,
    device: torch.device,
    *,
    isolate: bool,
) -> Stages:
    records = device.type == "cuda" if config.graphs is None else config.graphs
    executor = (Graphs if records else Eager)(device, floors.rows)
    launcher = Launcher(
        memory.caches, floors, executor, clock_of(device), device, large_tile=model.kernels.tile, isolate=isolate
    )
    return Stages(model, memory.caches, launcher, memory, ledger, isolate=isolate)


def _limits(config: ModelConfig, caches: Caches, parameters: int) -> ModelLimits:
    return ModelLimits(
        name=config.name,
        max_length=caches.max_length,
        vocab_size=config.vocab_size,
        block_size=config.block_size,
        decoders=available(mask=config.mask_id is not None),
        parameters=parameters,
        pages={name: pool.num_total for name, pool in caches.pools.items()},
        patching=config.patching,
    )


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def calibrate(engine: "Engine") -> int:
    """Calibrates an engine's latency model, from its file of stage costs if there is one, else from steps that it runs;
    the engine is otherwise unchanged. Takes up to two seconds, and up to a minute more if kernels must be compiled and
    recorded. Returns how many rows of prompts a step can have.

    Raises ValueError for a file that does not hold stage costs, OSError for one that cannot be read or written.
    """
    config, identity = engine.config, _identity(engine)
    path = Path(config.stage_costs) if config.stage_costs else None
    steps = calibration.read(path, identity) if path else None
    if steps is None:
        steps = measure(engine)
        if path:
            calibration.write(path, identity, steps)
    for measured in steps:
        for stage, (rows, seconds) in measured.stages.items():
            engine.ledger.latency.calibrate(stage, rows, seconds)
    rows = calibration.prompt_rows(steps, config.max_stall_ms / 1000, config.max_step_rows)
    log.info("calibrated: shortest step %.3g ms, prompt budget %d rows", 1000 * steps[0].seconds, rows)
    return rows


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
    ledger, memory, recording = engine.ledger, engine.memory, calibration.RecordingModel()
    latency, ledger.latency = ledger.latency, recording
    prefixes, memory.prefixes = memory.prefixes, None

    def step(rows: int) -> calibration.MeasuredStep:
        prompt = calibration.PROMPT[:rows]
        engine.add(Request(id="calibration", prompt_ids=prompt, max_tokens=1, ignore_eos=True))
        began = time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds = time.perf_counter() - began
        ledger.poll()
        return recording.step(rows, seconds)

    try:
        most_rows = min(engine.config.max_step_rows, memory.caches.max_length - 1)
        return calibration.measure_steps(step, most_rows, lambda: engine.stepper.executor.num_recorded)
    finally:
        ledger.latency, memory.prefixes = latency, prefixes
        engine.reset()
