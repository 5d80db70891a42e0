"""Builds the parts of an engine from an EngineConfig."""

import logging
from dataclasses import dataclass

import torch

from kernels.attention import most_page_size
from kernels.dispatch import Kernels, choose_kernels

from . import checkpoint
from .checkpoint.base import Checkpoint
from .config import EngineConfig, ModelConfig, ModelLimits
from .costs.accounting import PaperFormula, StageBytes
from .costs.clock import clock_of
from .costs.latency import MOST_CALLED, LatencyModel
from .costs.ledger import Ledger
from .decoders.table import available
from .installed import installed
from .memory.caches import Caches, longest_text, plan_caches
from .memory.memory import Memory
from .memory.prefix import PrefixCache
from .memory.room import check_room, naming_flags
from .memory.text import Slots
from .model import Model, RowFloors, find_row_floors
from .model.layers import matrix_dtype
from .step.graphs import Eager, Graphs
from .step.launch import Launcher
from .step.one_call import OneCall
from .step.stages import Stages
from .step.step import Stepper

log = logging.getLogger("fastblt.engine")


@dataclass(frozen=True, slots=True)
class Parts:
    """All parts of an engine except its requests. model: None where stages are simulated."""

    config: ModelConfig
    model: Model | None
    limits: ModelLimits
    kernels: Kernels
    memory: Memory
    ledger: Ledger
    stepper: Stepper
    stage_bytes: StageBytes
    formula: PaperFormula


def build(config: EngineConfig) -> Parts:
    """Builds all parts. Raises CheckpointError for a checkpoint that cannot be served, ValueError for a missing device
    and for sizes that cannot work."""
    config.check()
    with naming_flags(config):
        return _build(config)


def _build(config: EngineConfig) -> Parts:
    device, dtype = device_of(config), getattr(torch, config.dtype)
    loaded = checkpoint.load(config.model, patcher=config.patcher, patching_threshold=config.patching_threshold)
    for note in loaded.notes:
        log.warning("%s", note)
    if config.max_length is not None and config.max_length > loaded.config.max_length:
        log.warning("--max-length %d: the model has only %d positions", config.max_length, loaded.config.max_length)
    kernels = choose_kernels(config.kernels, device)
    if device.type == "cpu" and config.kernels is None and kernels.name == "torch":
        log.warning("fastblt's own CPU kernels are not compiled: falling back to torch, several times slower")
    if kernels.name == "triton":
        _check_pages(config, loaded.config, dtype)
    fp8 = config.weights == "float8"
    model, caches = _load(config, loaded, kernels, device, dtype, fp8=fp8)
    floors = find_row_floors(model, caches.specs, dtype, device)
    if not floors.proven:
        log.warning("this machine's matrix products depend on the batch: equal requests may differ in near-ties")
    stage_bytes = StageBytes.of(
        loaded.config, dtype.itemsize, model.hash_itemsize, matrix_itemsize=model.matrix_itemsize, fp8=fp8
    )
    latency = LatencyModel(loaded.config.decoder_input == "encoder")
    ledger = Ledger(stage_bytes, latency, clock_of(device))
    slots = Slots(config.max_sequences, longest_text(loaded.config, caches.max_length), device)
    memory = Memory(caches, PrefixCache(caches) if config.prefix_cache else None, slots)
    given = config.isolate_documents
    isolate = loaded.config.isolate_documents if given is None else given
    stages = _stages(config, model, floors, memory, ledger, device, isolate=isolate)
    # With graphs a CPU runs single stages over padded buffers, as a CUDA device would.
    one_call = (
        None
        if config.graphs
        else OneCall.of(model, memory, ledger, stages.launcher, isolates=isolate, max_rows=config.max_step_rows)
    )
    latency.runs_ahead = config.run_ahead != "never" and (one_call is not None or device.type != "cpu")
    if latency.runs_ahead and (one_call is not None or loaded.config.decoder_input == "embedding"):
        latency.drafting = "before" if one_call is None else "within"
    if one_call:
        latency.most_bytes = MOST_CALLED
    decides = (config.dtype, config.weights, _arithmetic(kernels, device), isolate)
    return Parts(
        config=loaded.config,
        model=model,
        limits=_limits(loaded, caches, model.parameters, decides),
        kernels=kernels,
        memory=memory,
        ledger=ledger,
        stepper=Stepper(stages, memory, ledger, kernels, config.run_ahead, one_call),
        stage_bytes=stage_bytes,
        formula=PaperFormula.of(loaded.config, dtype.itemsize),
    )


def _check_pages(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> None:
    """Raises ValueError for pages that are too large for the attention kernel."""
    widest = max(stack.head_dim for stack in (model.patcher, model.encoder, model.global_, model.decoder))
    if config.page_size > (most := most_page_size(widest, dtype.itemsize)):
        raise ValueError(
            f"--page-size {config.page_size}: must be at most {most} for heads of {widest} in {config.dtype} on a GPU"
        )


def _load(
    config: EngineConfig, loaded: Checkpoint, kernels: Kernels, device: torch.device, dtype: torch.dtype, *, fp8: bool
) -> tuple[Model, Caches]:
    """The model on its device, and its caches, after a check that the memory suffices."""
    check_room(
        loaded.config,
        loaded.tensors,
        plan_caches(loaded.config, config),
        config,
        matrix_dtype(loaded.tensors, dtype, kernels),
        fp8=fp8,
        mapped=kernels.name == "torch",
    )
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    with loaded.reading():
        model = Model(loaded.config, loaded.tensors, dtype, device, kernels, fp8=fp8)
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
    records = records_graphs(config, model.kernels, device)
    executor = (Graphs if records else Eager)(device, floors.rows)
    launcher = Launcher(
        memory.caches, floors, executor, clock_of(device), device, large_tile=model.kernels.tile, isolate=isolate
    )
    return Stages(model, memory.caches, launcher, memory, ledger, isolate=isolate)


def records_graphs(config: EngineConfig, kernels: Kernels, device: torch.device) -> bool:
    """Whether stages run as recorded graphs. Raises ValueError for kernels of which a device can record none."""
    if config.graphs and device.type == "cuda" and not kernels.records:
        raise ValueError(f"--graphs: a CUDA device cannot record {kernels.name}'s kernels; leave --graphs out")
    return device.type == "cuda" and kernels.records if config.graphs is None else config.graphs


def _limits(loaded: Checkpoint, caches: Caches, parameters: int, settings: tuple[object, ...]) -> ModelLimits:
    """settings: those that decide the bytes of a text."""
    config = loaded.config
    return ModelLimits(
        name=config.name,
        max_length=caches.max_length,
        vocab_size=config.vocab_size,
        block_size=config.block_size,
        decoders=available(mask=config.mask_id is not None),
        parameters=parameters,
        pages={name: pool.num_total for name, pool in caches.pools.items()},
        patching=config.patching,
        fingerprint=checkpoint.fingerprint(loaded, *settings),
    )


def device_of(config: EngineConfig) -> torch.device:
    """Raises ValueError if it is missing."""
    device = torch.device(config.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device 'cuda': torch {torch.__version__} finds no CUDA device; 'cpu' needs none")
    return device


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _arithmetic(kernels: Kernels, device: torch.device) -> str:
    """Of two that differ, one may round another way: the kernels, with the kind of GPU or the processor's level."""
    if device.type == "cuda":
        return f"{kernels.name} {torch.cuda.get_device_name(device)}"
    return f"{kernels.name} {installed().instruction_set} {torch.backends.cpu.get_cpu_capability()}"
