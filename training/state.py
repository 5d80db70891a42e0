"""The state of a training run, and its files: a stopped run continues as if it had never stopped.

A run's folder holds `state.json` (settings, progress, lists of tensors and parts) and the tensors' bytes in
`state-NUMBER-DIGEST.part`. The files do not depend on the machine or device: any other can continue from them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.optim import AdamW

from engine.checkpoint import PRESETS, expected_shapes, load
from engine.config import ModelConfig

from .model import initial_weights
from .muon import Muon
from .packing import packed, unpacked
from .parts import PART_BYTES, Part, read_parts, remove_others, write_parts, write_whole

PATCHER = "model.patcher."
MANIFEST = "state.json"
WEIGHTS = "model.safetensors"
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Settings:
    """A run's choices. Either `minutes` (both phases together) or `steps` (of each phase) bounds it."""

    minutes: float | None = None
    steps: int | None = None
    seed: int = 0
    preset: str = "nano"
    patcher_share: float = 0.1
    """Share of the minutes for the patcher."""
    batch_bytes: int = 6144
    lengths: tuple[tuple[float, int], ...] = ((0.0, 256), (0.3, 512), (0.8, 1024))
    """Bytes per row, each from a given share of the run on."""
    blocks_per_kib: int = 32
    """Corrupted blocks drawn per 1024 bytes of a row."""
    mask_weight: float = 0.5
    blocks_from: float = 0.6
    """Share of the model's phase before the block term joins the next byte's."""
    block_warm_up: float = 0.1
    """Share of the model's phase in which the block term then rises to its weight, in a straight line: at once, it
    costs the next byte more than it gives the blocks."""
    full_share: float = 0.5
    """Share of the blocks that are masked whole, as a draft in one step finds them; the others draw their rate."""
    own_share: float = 0.5
    """Share of the texts whose blocks start anywhere and hold what the model itself would write there."""
    hold: float = 0.6
    """Share of a phase before the learning rates begin to fall."""
    matrix_rate: float = 0.02
    table_rate: float = 0.004
    warm_up: int = 40
    mean_patch: float = 4.5
    bf16: bool = True
    model_of: str | None = None
    """The finished model that the run began from, with the digest of its weights; else it began from random ones."""

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("give either minutes or steps")
        for name in ("blocks_from", "block_warm_up", "full_share", "own_share", "hold"):
            if not 0 <= (share := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, not {share}")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


def is_matrix(name: str, dimensions: int) -> bool:
    """Whether a weight is trained by Muon: a matrix inside layers or between stages."""
    return dimensions == 2 and ("layers." in name or "projection" in name)


@dataclass(slots=True)
class Phase:
    """Training of some of the weights: matrices inside layers by Muon, tables, heads and norms by AdamW.

    names: the weights' names, per optimizer.
    """

    names: tuple[tuple[str, ...], ...]
    optimizers: tuple[torch.optim.Optimizer, ...]
    rates: tuple[float, ...]
    step: int = 0
    seconds: float = 0.0
    bytes: int = 0

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], matrix_rate: float, table_rate: float) -> "Phase":
        matrices = tuple(n for n, w in weights.items() if is_matrix(n, w.dim()))
        others = tuple(n for n in weights if n not in matrices)
        names, optimizers, rates = [], list[torch.optim.Optimizer](), []
        if matrices:
            names, rates = [matrices], [matrix_rate]
            optimizers.append(Muon([weights[n] for n in matrices], weight_decay=0.01))
        if others:
            names, rates = [*names, others], [*rates, table_rate]
            of = [weights[n] for n in others]
            optimizers.append(AdamW(of, betas=(0.9, 0.95), weight_decay=0.0, fused=True))
        return cls(tuple(names), tuple(optimizers), tuple(rates))

    @property
    def progress(self) -> "Progress":
        return Progress(self.step, self.seconds, self.bytes)

    def kept(self, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What the optimizers keep of each weight, as "NAME KEY"."""
        for names, optimizer in zip(self.names, self.optimizers, strict=True):
            for name in names:
                of_weight = optimizer.state.get(weights[name], {})
                yield from ((f"{name} {key}", tensor) for key, tensor in of_weight.items())

    def restore(self, done: "Progress", found: Mapping[str, Tensor]) -> None:
        """Takes over a saved progress, and what `kept` gave."""
        self.step, self.seconds, self.bytes = done.step, done.seconds, done.bytes
        for names, optimizer in zip(self.names, self.optimizers, strict=True):
            kept: dict[int, dict[str, Tensor]] = {}
            for i, weight_name in enumerate(names):
                start = f"{weight_name} "
                if of_weight := {n[len(start) :]: t for n, t in found.items() if n.startswith(start)}:
                    kept[i] = of_weight
            optimizer.load_state_dict({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})


class Progress(msgspec.Struct, frozen=True):
    """Progress of a phase."""

    step: int
    seconds: float
    bytes: int


class Entry(msgspec.Struct, frozen=True):
    """A float32 tensor and its packed size in bytes; tensors lie end to end in the parts."""

    name: str
    shape: tuple[int, ...]
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """`state.json`."""

    settings: Settings
    threshold: float
    settled: bool
    corpus: str | None
    machines: dict[str, float]
    phases: dict[str, Progress]
    tensors: list[Entry]
    parts: list[Part]


class StateError(ValueError):
    """A run's folder does not hold a state to continue from."""


@dataclass(slots=True)
class State:
    """A run: weights under canonical names, and its two phases. `config` gets its threshold between them."""

    settings: Settings
    config: ModelConfig
    weights: dict[str, Tensor]
    phases: dict[str, Phase] = field(default_factory=dict)
    settled: bool = False
    """Whether the patcher is rounded as it will be stored, and the threshold set."""
    corpus: str | None = None
    """The digest of the training text, from the first step on."""
    machines: dict[str, float] = field(default_factory=dict)
    """Seconds of steps, by device."""

    @classmethod
    def new(cls, settings: Settings, config: ModelConfig | None = None, device: torch.device = CPU) -> "State":
        config = config or PRESETS[settings.preset]
        # Drawn on the host: the same for every device.
        drawn = initial_weights(config, expected_shapes(config), settings.seed)
        weights = {name: weight.to(device).requires_grad_() for name, weight in drawn.items()}
        patcher = {n: w for n, w in weights.items() if n.startswith(PATCHER)}
        rest = {n: w for n, w in weights.items() if n not in patcher}
        rates = settings.matrix_rate, settings.table_rate
        return cls(settings, config, weights, {"patcher": Phase.of(patcher, *rates), "model": Phase.of(rest, *rates)})

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @property
    def steps(self) -> int:
        """Steps of both phases."""
        return sum(phase.step for phase in self.phases.values())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights, then each one's optimizer state, all float32."""
        yield from self.weights.items()
        for phase in self.phases.values():
            yield from phase.kept(self.weights)

    def save(self, run: Path, most: int = PART_BYTES) -> None:
        """Writes the run into its folder, atomically, in parts of at most `most` bytes."""
        run.mkdir(parents=True, exist_ok=True)
        entries, pieces = [], []
        for name, tensor in self._tensors():
            pieces.append(packed(tensor))
            entries.append(Entry(name, tuple(tensor.shape), len(pieces[-1])))
        parts = write_parts(run, b"".join(pieces), most)
        manifest = Manifest(
            self.settings,
            self.config.patching.threshold,
            self.settled,
            self.corpus,
            self.machines,
            {name: phase.progress for name, phase in self.phases.items()},
            entries,
            parts,
        )
        write_whole(run / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest)))
        remove_others(run, parts)

    @classmethod
    def load(cls, run: Path, config: ModelConfig | None = None, device: torch.device = CPU) -> "State":
        """Loads a saved run; `config` is needed only for a shape that is not a preset.

        Raises StateError or PartError, which name the file that is missing or wrong.
        """
        path = run / MANIFEST
        try:
            manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
        except FileNotFoundError:
            raise StateError(f"{path} does not exist: there is no run in {run}") from None
        except msgspec.DecodeError as error:
            raise StateError(f"{path}: {error}") from None
        data = memoryview(read_parts(run, manifest.parts))
        found: dict[str, Tensor] = {}
        for entry in manifest.tensors:
            try:
                found[entry.name] = unpacked(bytes(data[: entry.bytes]), entry.shape)
            except ValueError as error:
                raise StateError(f"{path}: {entry.name}: {error}") from None
            data = data[entry.bytes :]

        state = cls.new(manifest.settings, config, device)
        state.set_threshold(manifest.threshold)
        state.settled, state.corpus, state.machines = manifest.settled, manifest.corpus, manifest.machines
        if missing := state.weights.keys() - found.keys():
            raise StateError(f"{path} lacks {min(missing)}: it is a run of another shape")
        with torch.no_grad():
            for name, weight in state.weights.items():
                weight.copy_(found.pop(name))
        for name, phase in state.phases.items():
            phase.restore(manifest.phases[name], found)
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

    def adopt_model(self, folder: Path) -> None:
        """Takes the weights, patcher and threshold of a finished model, which was stored in bfloat16; the optimizers
        begin anew. Raises ValueError for another shape, or what `checkpoint.load` raises."""
        loaded = load(folder)
        if replace(loaded.config, name=self.config.name, patching=self.config.patching) != self.config:
            raise ValueError(f"the model in {folder} has not the shape of the preset {self.config.name}")
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(loaded.tensors[name])
        self.set_threshold(loaded.config.patching.threshold)
        digest = sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        self.settings = replace(self.settings, model_of=f"{folder.name}, SHA-256 {digest:.12}", patcher_share=0.0)
        self.settled = True

    def set_threshold(self, threshold: float) -> None:
        self.config = replace(self.config, patching=replace(self.config.patching, threshold=threshold))


def fraction(state: State, phase: Phase) -> float:
    """The part of a phase that is done, 0..1, by its steps or by its share of the minutes."""
    settings = state.settings
    if settings.steps is not None:
        return min(1.0, phase.step / settings.steps)
    assert settings.minutes is not None
    is_patcher = phase is state.phases["patcher"]
    share = settings.patcher_share if is_patcher else 1 - settings.patcher_share
    return min(1.0, phase.seconds / (60 * settings.minutes * share))
