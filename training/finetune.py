"""Trains block diffusion into a model that has none, so that it runs all decoders: the work of `fastblt finetune`.

Three phases. `table`: the decoder gets a byte table, fitted by the loss of the next byte with all else frozen. `mask`:
the row of [MASK] alone, by the block loss. `blocks`: both losses together (Fast BLT 3.2), for the decoder or for all
but the patcher. Patcher and threshold keep their bits, so patches stay where they were.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import checkpoint
from engine.checkpoint.base import require_finite
from engine.checkpoint.hf import UNFINISHED
from engine.checkpoint.hf_config import render
from engine.config import PAD_ID, ModelConfig
from engine.layout import CONFIG, DECODERS, WEIGHTS, WEIGHTS_INDEX
from engine.transfer import to_device

from . import model, objective
from .continuing import continuing
from .convert import TABLE, first_table, with_blocks
from .device import chosen_device
from .documents import LEAST_HELD_OUT, Documents, check_lines, open_documents, slices
from .loop import Loop, Plan, Step, run_phase, stop_requests
from .metrics import Metrics
from .passes import Passes
from .tuning import FILE, FIRST_ROWS, Settings, Tuning, on_device, read_header, source_digest

ONLY_THE_TABLE = ("table", "mask")
"""Phases that train nothing but the decoder's table."""
OUTPUTS = {CONFIG, WEIGHTS, WEIGHTS_INDEX, DECODERS, "decoders.png", "README.md", "loss.png"}
"""Files of a model's folder, but for numbered parts of the weights."""


def finetune(
    given: Mapping[str, Any],
    out: Path,
    run: Path,
    *,
    resume: bool,
    device: str = "cpu",
    threads: int | None = None,
    prompts: int = 20,
    prefixes: int = 500,
) -> str:
    """Runs all of it, and returns the report for the terminal. given: fields of `Settings`, None for those not given.

    Raises Stopped with the state saved in `run`, Diverged with the last good one there, and OSError or ValueError for
    what cannot be used.
    """
    from .tuning_report import report, summary  # draws a picture, which no training needs

    if run.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"--run: {run} must not lie in {out}, which holds the model alone")
    # A run that was stopped in its report has written some of these.
    others = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if resume:
        others = {name for name in others if name not in OUTPUTS and not name.startswith(("model-", UNFINISHED))}
    if others or (out.exists() and not out.is_dir()):
        raise ValueError(f"{out} exists and is not an empty folder")
    if threads:
        torch.set_num_threads(threads)
    chosen = chosen_device(device)
    wanted = {name: value for name, value in given.items() if value is not None}
    if resume:
        job = resumed(run, chosen, wanted)
        _require_own(out, job)
    else:
        if "steps" not in wanted:
            wanted.setdefault("minutes", 60.0)
        job = begin(Settings(**wanted), out.name, run, chosen)
    train(job)
    save(job, out)
    job.tuning.release()
    return f"{summary(report(job, out, prompts, prefixes))}\n{out} has the model and its card"


def _require_own(out: Path, job: "Job") -> None:
    """Raises ValueError unless a model in `out` is one that this run wrote: it is about to be replaced."""
    if (out / CONFIG).exists() and checkpoint.read_config(out) != job.tuning.config:
        raise ValueError(f"{out} holds another model than the run in {job.run} makes: name its own or a new folder")


@dataclass(frozen=True, slots=True)
class Job:
    """A run with its text, ready to go on."""

    tuning: Tuning
    training: Documents
    held_out: Documents
    run: Path


def begin(settings: Settings, name: str, run: Path, device: torch.device) -> Job:
    """A new run. Measures the model as it is. Raises OSError or ValueError (CheckpointError among them) for input that
    cannot be used, before any training."""
    if (run / FILE).exists():
        raise ValueError(f"{run} holds a run already: --resume goes on with it; to begin anew, delete it")
    source, training, held_out = _opened(settings)
    config = with_blocks(source.config, name, settings.block_size)
    render(config, "float32")  # what cannot be saved is said before the training
    if settings.row_bytes >= config.max_length:
        raise ValueError(f"--row-bytes {settings.row_bytes}: the model has {config.max_length} positions, one for BOS")
    check_lines(training, held_out)
    with source.reading():
        for tensor_name, tensor in source.tensors.items():
            require_finite(tensor_name, tensor)
    weights = on_device(source, device, settings)
    rows = held_out_rows(held_out, settings)
    if _size(rows) < (least := min(LEAST_HELD_OUT, settings.held_out_bytes)):
        names = ", ".join(settings.held_out or settings.files)
        raise ValueError(
            f"{names}: {_size(rows)} bytes of held-out text are too few to measure; give at least {least:,}"
        )
    before, _ = next_byte_bits(source.config, weights, rows, settings)
    print(f"{source.config.name}: {before:.4f} bits per next byte on {_size(rows):,} held-out bytes", flush=True)
    draw = np.random.default_rng([settings.seed, len(settings.files)])
    first = training.rows(draw, FIRST_ROWS, settings.row_bytes).to(device)
    table = first_table(source.config, weights, first.split(settings.rows), settings.products)
    digests = training.digest, _digest(rows)
    return Job(Tuning.new(settings, source, name, *digests, table, weights, before), training, held_out, run)


def resumed(run: Path, device: torch.device, given: Mapping[str, Any]) -> Job:
    """The run in a folder. given: settings that must be the run's. Raises as `begin`."""
    header = read_header(run)
    settings = header.settings
    for name, value in given.items():
        if value != (theirs := getattr(settings, name)):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} {value}: the run in {run} has {theirs}, and keeps its settings")
    source, training, held_out = _opened(settings)
    if source_digest(source) != header.source:
        raise ValueError(f"{settings.model} is not the model that the run in {run} began with")
    if training.digest != header.text:
        raise ValueError(f"{', '.join(settings.files)}: not the text that the run in {run} began with")
    if _digest(held_out_rows(held_out, settings)) != header.held_out:
        names = ", ".join(settings.held_out or settings.files)
        raise ValueError(f"{names}: not the held-out text that the run in {run} began with")
    weights = on_device(source, device, settings)
    shape = source.config.vocab_size + 1, source.config.decoder.dim
    table = torch.zeros(shape, device=device)
    tuning = Tuning.new(
        settings,
        source,
        header.name,
        header.text,
        header.held_out,
        table,
        weights,
        header.bits_before,
        header.table_size,
    )
    tuning.restore(header, run)
    return Job(tuning, training, held_out, run)


def train(job: Job) -> None:
    """Runs the rest of all phases. Raises Stopped after SIGINT or SIGTERM, with the state saved, and
    Diverged."""
    tuning, settings = job.tuning, job.tuning.settings
    job.run.mkdir(parents=True, exist_ok=True)
    with stop_requests() as asked, Metrics(job.run, tuning.steps) as metrics:
        loop = Loop(job.run, tuning.save, metrics, Passes(), tuning.device, tuning.machines, asked)
        # At once, to notice a folder that cannot be written before there is work to lose.
        loop.save()
        for number, (name, phase) in enumerate(tuning.phases.items()):
            taught = (TABLE,) if name in ONLY_THE_TABLE else tuning.trained
            for weight_name in tuning.trained:
                tuning.weights[weight_name].requires_grad_(weight_name in taught)
            plan = Plan(
                name,
                (settings.seed, number),
                settings.warm_up,
                _done(tuning, name),
                lambda draw, done: job.training.rows(draw, settings.rows * settings.accumulate, settings.row_bytes),
                _step(tuning, name, [tuning.weights[n] for n in taught]),
                last=name == "blocks",
            )
            run_phase(loop, phase, plan)
            for optimizer in phase.optimizers:
                optimizer.state.clear()


def _done(tuning: Tuning, name: str) -> Callable[[], float]:
    return lambda: tuning.fraction(name)


def _step(tuning: Tuning, name: str, taught: list[Tensor]) -> Step:
    """A step of a phase: its loss over micro-batches, each with its own forward and backward pass."""
    settings, config, weights = tuning.settings, tuning.config, tuning.weights
    of_clean = 0.0 if name == "mask" else 1.0
    of_blocks = {"table": 0.0, "mask": 1.0, "blocks": settings.mask_weight}[name]
    per_text = max(1, settings.blocks_per_kib * settings.row_bytes // 1024)

    def step(rows: Tensor, draw: torch.Generator) -> dict[str, Tensor]:
        parts = rows.split(settings.rows)
        figures: dict[str, Tensor] = {}
        for row in parts:
            with torch.no_grad():
                patches = model.patch(config.patching, model.entropies(config, weights, row[:, :-1]))
            dtype, recompute = settings.products, settings.recompute
            clean, found = objective.next_bytes(config, weights, row, patches, dtype, recompute=recompute)
            total, told = of_clean * found.nats, {"bits": found.nats / math.log(2), "right": found.right}
            if of_blocks:
                share = settings.own_share if name == "blocks" else 0.0
                continued = continuing(config, weights, clean, dtype)
                corruption = objective.corrupt(
                    config, row, patches, per_text, draw, own_share=share, continued=continued
                )
                found = objective.block_bytes(config, weights, row, clean, corruption, dtype, recompute=recompute)
                total = total + of_blocks * found.nats
                told |= {"mask": found.nats / math.log(2), "mask_right": found.right}
            (total / len(parts)).backward()
            for key, value in told.items():
                figures[key] = figures.get(key, torch.zeros_like(value)) + value.detach() / len(parts)
        if name == "mask" and (gradient := weights[TABLE].grad) is not None:
            gradient[:-1] = 0
        return figures | {"norm": torch.nn.utils.clip_grad_norm_(taught, 1.0)}

    return step


def save(job: Job, out: Path) -> None:
    """Writes the model as it is now into `out`, in the dtypes of the model that the run began with."""
    checkpoint.save(out, job.tuning.config, job.tuning.finished())


def held_out_rows(held_out: Documents, settings: Settings) -> Tensor:
    return slices(held_out.texts(settings.held_out_bytes), settings.row_bytes)


@torch.no_grad()
def next_byte_bits(
    config: ModelConfig, weights: model.Weights, rows: Tensor, settings: Settings
) -> tuple[float, float]:
    """Bits per next byte of `rows` (R, T + 1), in the run's dtype, and the share of bytes predicted."""
    nats = right = asked = 0.0
    device = next(iter(weights.values())).device
    for host in rows.split(settings.rows):
        row = to_device(host.numpy(), device)
        ids, wanted = row[:, :-1], row[:, 1:]
        patches = model.patch(config.patching, model.entropies(config, weights, ids))
        clean = model.clean_rows(config, weights, ids, patches, settings.products)
        found, text = model.logits(config, weights, clean.rows, settings.products), wanted != PAD_ID
        nats += float(F.cross_entropy(found[text], wanted[text], reduction="sum"))
        right += float((found.argmax(-1) == wanted)[text].sum())
        asked += float(text.sum())
    return nats / math.log(2) / asked, right / asked


def _opened(settings: Settings) -> tuple[checkpoint.Checkpoint, Documents, Documents]:
    source = checkpoint.load(settings.model, patcher=settings.patcher)
    files, held_out = (tuple(map(Path, names)) for names in (settings.files, settings.held_out))
    return source, *open_documents(files, held_out, settings.field)


def _digest(rows: Tensor) -> str:
    """Tells other held-out text, of which every byte is measured."""
    return sha256(rows.numpy().tobytes()).hexdigest()


def _size(rows: Tensor) -> int:
    return int((rows[:, 1:] != PAD_ID).sum())
