"""What all parts are told."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.config import EngineConfig, WeightsName


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and at what scale a part measures.

    quick: toy sizes, to see whether everything runs. work: a folder that the parts of a run share. trace: where the
    profile's chrome traces go, None for nowhere.
    """

    device: Literal["cpu", "cuda"]
    quick: bool
    work: Path
    trace: Path | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def has_float8(self) -> bool:
        """Whether the device computes with e4m3 numbers; a CPU converts them."""
        if not self.on_gpu:
            return True
        import torch  # here, as not every part needs it

        return torch.cuda.get_device_capability() >= (8, 9)

    def engine(self, model: Path, *, float8: bool = False, **choices: Any) -> EngineConfig:
        """An engine's configuration on this device."""
        weights: WeightsName | None = "float8" if float8 else None
        cache_bytes = (2 << 30) if self.on_gpu else (256 << 20)
        return EngineConfig(
            **({"model": str(model), "device": self.device, "weights": weights, "cache_bytes": cache_bytes} | choices)
        )
