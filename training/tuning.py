"""The state of a fine-tuning run: what it was told, how far it is, and the weights that it trains.

A run's folder holds `tuning.safetensors`: the trained weights in float32 and what the optimizers keep of them, with all
else in its header. It is replaced whole. Frozen weights stay in the model that the run began with.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from engine import checkpoint
from engine.checkpoint.base import Checkpoint
from engine.checkpoint.hf import write_tensors
from engine.config import DtypeName, ModelConfig

from .convert import TABLE, with_blocks
from .state import PATCHER, Phase, Progress, StateError

FILE = "tuning.safetensors"
HEADER = "fastblt"
SHARES = {"table": 0.15, "mask": 0.05, "blocks": 0.8}
"""The phases in their order, and the part of the run's steps or minutes that each takes."""
TABLE_RATE = 0.03
"""AdamW's learning rate where the table alone is trained, relative to its numbers' size: all else is frozen, so that
large steps spoil nothing."""
FIRST_ROWS = 64
"""Rows of text from which the decoder's first table is fitted."""

Trained = Literal["decoder", "all"]


@dataclass(frozen=True, slots=True)
class Settings:
    """A run's choices. Either `minutes` or `steps` bounds it, all phases together.

    train: "decoder" trains the decoder and the head; "all" trains all but the patcher. rows: of a micro-batch, of
    `row_bytes` bytes each; a step averages the gradients of `accumulate` of them. mask_weight: of the block loss beside
    the next byte's. own_share: of the rows, whose blocks start anywhere and hold what the model itself would write
    there. recompute: whether layers compute their activations again for the gradients.
    """

    model: str
    files: tuple[str, ...]
    held_out: tuple[str, ...] = ()
    field: str = "text"
    patcher: str | None = None
    train: Trained = "decoder"
    block_size: int = 8
    minutes: float | None = None
    steps: int | None = None
    rows: int = 8
    row_bytes: int = 1024
    accumulate: int = 1
    learning_rate: float = 0.005
    mask_weight: float = 0.25
    own_share: float = 0.0
    dtype: DtypeName = "bfloat16"
    recompute: bool = False
    held_out_bytes: int = 256 << 10
    """Most held-out bytes to score."""
    seed: int = 0
    warm_up: int = 20
    blocks_per_kib: int = 32
    """Corrupted blocks drawn per 1024 bytes of a row."""
    table_share: float = 0.2
    """The learning rate of tables, head and norms (AdamW), relative to that of matrices (Muon)."""

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give either --minutes or --steps")
        for name in ("minutes", "learning_rate", "mask_weight"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and (value > 0 or name == "mask_weight")):
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be a number above 0")
        for name in ("rows", "row_bytes", "accumulate", "held_out_bytes"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if not 0 <= self.own_share <= 1:
            raise ValueError(f"--own-share {self.own_share}: must be a share from 0 to 1")
        if self.steps is not None and self.steps < len(SHARES):
            raise ValueError(f"--steps {self.steps}: must be at least {len(SHARES)}, one for each phase")

    @property
    def products(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


class Header(msgspec.Struct, frozen=True):
    """What the state's file says beside its tensors."""

    settings: Settings
    source: str
    text: str
    held_out: str
    name: str
    bits_before: float
    table_size: float
    machines: dict[str, float]
    phases: dict[str, Progress]


@dataclass(slots=True)
class Tuning:
    """A run. weights: all of the model's, by canonical names; the trained ones are float32. source: the model that it
    began with. text, held_out: the digests of the text and of the held-out rows. bits_before: of a held-out next byte,
    by that model. table_size: the root mean square of the decoder's first table."""

    settings: Settings
    config: ModelConfig
    source: Checkpoint
    weights: dict[str, Tensor]
    trained: tuple[str, ...]
    text: str
    held_out: str
    bits_before: float
    table_size: float
    phases: dict[str, Phase]
    device: torch.device
    machines: dict[str, float] = field(default_factory=dict)

    @classmethod
    def new(
        cls,
        settings: Settings,
        source: Checkpoint,
        name: str,
        text: str,
        held_out: str,
        table: Tensor,
        frozen: dict[str, Tensor],
        bits_before: float,
        table_size: float | None = None,
    ) -> "Tuning":
        """frozen: the source's weights on the run's device, from `on_device`. table_size: of a resumed run, whose table
        is yet to be restored."""
        config = with_blocks(source.config, name, settings.block_size)
        names = checkpoint.expected_shapes(config)
        trained = tuple(n for n in names if is_trained(n, settings.train))
        weights = {n: table.clone() if n == TABLE else frozen[n] for n in names}
        weights |= {n: weights[n].float().clone() for n in trained}
        rates = settings.learning_rate, settings.table_share * settings.learning_rate
        of_table = {TABLE: weights[TABLE]}
        size = float(table.square().mean().sqrt()) if table_size is None else table_size
        of_rows = 0.0, TABLE_RATE * size
        phases = {
            # The table of a model that had one is as its decoder knows it.
            **({} if source.config.decoder_input == "embedding" else {"table": Phase.of(of_table, *of_rows)}),
            "mask": Phase.of(of_table, *of_rows),
            "blocks": Phase.of({n: weights[n] for n in trained}, *rates),
        }
        digests = text, held_out
        return cls(settings, config, source, weights, trained, *digests, bits_before, size, phases, table.device)

    @property
    def steps(self) -> int:
        return sum(phase.step for phase in self.phases.values())

    def fraction(self, name: str) -> float:
        """The part of a phase that is done, 0..1."""
        phase, settings = self.phases[name], self.settings
        if settings.steps is not None:
            return min(1.0, phase.step / self._steps_of(name, settings.steps))
        assert settings.minutes is not None
        return min(1.0, phase.seconds / (60 * settings.minutes * self._share(name)))

    def _share(self, name: str) -> float:
        return SHARES[name] / sum(SHARES[other] for other in self.phases)

    def _steps_of(self, name: str, steps: int) -> int:
        """A phase's part of all `steps`; the last phase has what the others, with a step or more each, leave."""
        *others, last = self.phases
        of = {other: max(1, round(self._share(other) * steps)) for other in others}
        return of[name] if name != last else steps - sum(of.values())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The trained weights, and what the optimizers of unfinished phases keep of them."""
        yield from ((name, self.weights[name]) for name in self.trained)
        for name, phase in self.phases.items():
            if self.fraction(name) < 1:
                yield from ((f"{name}: {key}", tensor) for key, tensor in phase.kept(self.weights))

    def save(self, run: Path) -> None:
        """Writes the state into the run's folder, atomically. Raises OSError."""
        run.mkdir(parents=True, exist_ok=True)
        header = Header(
            self.settings,
            source_digest(self.source),
            self.text,
            self.held_out,
            self.config.name,
            self.bits_before,
            self.table_size,
            self.machines,
            {name: phase.progress for name, phase in self.phases.items()},
        )
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors()}
        unfinished = run / f"{FILE}.new"
        write_tensors(unfinished, tensors, {HEADER: msgspec.json.encode(header).decode()})
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(run / FILE)

    def restore(self, header: Header, run: Path) -> None:
        """Takes over a saved run."""
        found = load_file(run / FILE)
        with torch.no_grad():
            for name in self.trained:
                self.weights[name].copy_(found[name])
        for name, phase in self.phases.items():
            start = f"{name}: "
            kept = {key.removeprefix(start): tensor for key, tensor in found.items() if key.startswith(start)}
            phase.restore(header.phases[name], kept)
        self.machines = dict(header.machines)

    def release(self) -> None:
        """Gives back the memory of the weights, their gradients and what optimizers keep. Only the figures of the run
        remain, for the report."""
        self.weights = {}
        for phase in self.phases.values():
            phase.optimizers = ()

    def finished(self) -> dict[str, Tensor]:
        """All weights, in the dtypes of the model that the run began with; the patcher has the same bits."""
        table = self.source.tensors["lm_head.weight"].dtype
        return {
            name: weight.detach().to("cpu", self.source.tensors[name].dtype if name in self.source.tensors else table)
            if name in self.trained
            else self.source.tensors[name]
            for name, weight in self.weights.items()
        }


def read_header(run: Path) -> Header:
    """Raises StateError if there is no run in the folder."""
    path = run / FILE
    if not path.is_file():
        raise StateError(f"{path} does not exist: there is no run to resume in {run}")
    try:
        with safe_open(path, "pt") as file:
            return msgspec.json.decode(file.metadata()[HEADER], type=Header)
    except (SafetensorError, KeyError, TypeError, msgspec.DecodeError) as error:
        raise StateError(f"{path} is not the state of a fine-tuning run: {error}") from None


def source_digest(source: Checkpoint) -> str:
    """Tells another model: of its configuration and its heads."""
    found = sha256(repr(source.config).encode())
    for name in ("lm_head.weight", f"{PATCHER}lm_head.weight"):
        found.update(source.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def on_device(source: Checkpoint, device: torch.device, settings: Settings) -> dict[str, Tensor]:
    """The source's weights for a training pass: norms in float32, all else as stored. But a GPU has the frozen matrices
    and tables no wider than the products, as it serves them; the patcher's, whose products are float32, excepted. On a
    CPU they stay in their files."""

    def dtype(name: str, tensor: Tensor) -> torch.dtype:
        if tensor.dim() == 1:
            return torch.float32
        as_it_is = device.type == "cpu" or name.startswith(PATCHER) or is_trained(name, settings.train)
        return tensor.dtype if as_it_is or tensor.itemsize <= settings.products.itemsize else settings.products

    return {name: tensor.to(dtype(name, tensor)).to(device) for name, tensor in source.tensors.items()}


def is_trained(name: str, train: Trained) -> bool:
    """Whether a run trains the weight of this name."""
    if train == "all":
        return not name.startswith(PATCHER)
    return name.startswith(("model.local_decoder.", "lm_head."))
