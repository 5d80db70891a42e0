"""All that a training run must remember, and its file: a run that is stopped goes on as if it had not been."""

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon

from engine.checkpoint import PRESETS, expected_shapes
from engine.config import ModelConfig

from .model import initial_weights

PATCHER = "model.patcher."


@dataclass(frozen=True, slots=True)
class Settings:
    """A run's choices. Either `minutes` (both phases together) or `steps` (of each phase) bounds it."""

    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    preset: str = "nano"
    patcher_share: float = 0.1
    """Part of the minutes that the patcher gets."""
    batch_bytes: int = 6144
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.3, 512), (0.8, 1024))
    """Bytes per row, each from some part of the run on."""
    blocks_per_kib: int = 32
    """Corrupted blocks drawn per 1024 bytes of a row."""
    mask_weight: float = 0.5
    matrix_rate: float = 0.02
    table_rate: float = 0.004
    warm_up: int = 40
    mean_patch: float = 4.5
    bf16: bool = True

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give either minutes or steps")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


@dataclass(slots=True)
class Phase:
    """Training of some of the weights: matrices inside layers by Muon, tables, heads and norms by AdamW."""

    optimizers: tuple[torch.optim.Optimizer, ...]
    rates: tuple[float, ...]
    step: int = 0
    seconds: float = 0.0
    bytes: int = 0

    @classmethod
    def of(cls, weights: dict[str, Tensor], settings: Settings) -> "Phase":
        matrices = {n for n, w in weights.items() if w.dim() == 2 and ("layers." in n or "projection" in n)}
        return cls(
            (
                Muon([w for n, w in weights.items() if n in matrices], weight_decay=0.01),
                AdamW(
                    [w for n, w in weights.items() if n not in matrices],
                    betas=(0.9, 0.95),
                    weight_decay=0.0,
                    fused=True,
                ),
            ),
            (settings.matrix_rate, settings.table_rate),
        )


@dataclass(slots=True)
class State:
    """A run: weights under canonical names, and its two phases. `config` gets its threshold between them."""

    settings: Settings
    config: ModelConfig
    weights: dict[str, Tensor]
    phases: dict[str, Phase] = field(default_factory=dict)
    settled: bool = False
    """The patcher is as it will be stored, and the threshold is set."""

    @classmethod
    def new(cls, settings: Settings, config: ModelConfig | None = None) -> "State":
        config = config or PRESETS[settings.preset]
        weights = initial_weights(config, expected_shapes(config), settings.seed)
        for weight in weights.values():
            weight.requires_grad_()
        patcher = {n: w for n, w in weights.items() if n.startswith(PATCHER)}
        rest = {n: w for n, w in weights.items() if n not in patcher}
        return cls(
            settings, config, weights, {"patcher": Phase.of(patcher, settings), "model": Phase.of(rest, settings)}
        )

    def save(self, path: Path) -> None:
        """Writes the run to a file, at once or not at all."""
        data = {
            "settings": asdict(self.settings),
            "threshold": self.config.patching.threshold,
            "settled": self.settled,
            "weights": {n: w.detach() for n, w in self.weights.items()},
            "phases": {
                name: {
                    "optimizers": [o.state_dict() for o in phase.optimizers],
                    "step": phase.step,
                    "seconds": phase.seconds,
                    "bytes": phase.bytes,
                }
                for name, phase in self.phases.items()
            },
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        torch.save(data, unfinished)
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path, config: ModelConfig | None = None) -> "State":
        """The run as it was saved; `config` is needed only for a shape that is no preset."""
        data: dict[str, Any] = torch.load(path, weights_only=True)
        state = cls.new(Settings(**data["settings"]), config)
        state.set_threshold(data["threshold"])
        state.settled = data["settled"]
        with torch.no_grad():
            for name, weight in state.weights.items():
                weight.copy_(data["weights"][name])
        for name, phase in state.phases.items():
            saved = data["phases"][name]
            for optimizer, optimizer_state in zip(phase.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(optimizer_state)
            phase.step, phase.seconds, phase.bytes = saved["step"], saved["seconds"], saved["bytes"]
        return state

    def adopt_patcher(self, other: "State") -> None:
        """Takes the settled patcher of another run, so that both models see the same patches."""
        if not other.settled:
            raise ValueError("the other run has not finished its patcher")
        with torch.no_grad():
            for name, weight in self.weights.items():
                if name.startswith(PATCHER):
                    weight.copy_(other.weights[name])
        theirs, ours = other.phases["patcher"], self.phases["patcher"]
        ours.step, ours.seconds, ours.bytes = theirs.step, theirs.seconds, theirs.bytes
        self.set_threshold(other.config.patching.threshold)
        self.settled = True

    def set_threshold(self, threshold: float) -> None:
        self.config = replace(self.config, patching=replace(self.config.patching, threshold=threshold))
