"""The setting shared by all parts."""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import DeviceName, EngineConfig, WeightsName

if TYPE_CHECKING:
    from engine.engine import Engine

CACHE_BYTES = 256 << 20
"""Enough for toy models and for models/nano."""
CACHE_BYTES_1B = 2 << 30


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and at what scale a part measures.

    quick: toy sizes, to see whether everything runs. work: a folder that the parts of a run share. trace: where the
    profile's chrome traces go, or None.
    """

    device: DeviceName
    quick: bool
    work: Path
    trace: Path | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def has_float8(self) -> bool:
        """Whether the device supports e4m3 numbers; a CPU converts them."""
        if not self.on_gpu:
            return True
        import torch  # here, as not every part needs it

        return torch.cuda.get_device_capability() >= (8, 9)

    def engine(self, model: Path, *, float8: bool = False, **choices: Any) -> "Engine":
        """An engine on this device; `choices` are of its configuration. Unused earlier engines are freed first."""
        import torch

        from engine.engine import Engine

        # An engine and its parts reference each other.
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
        weights: WeightsName | None = "float8" if float8 else None
        given = {"model": str(model), "device": self.device, "weights": weights, "cache_bytes": CACHE_BYTES}
        engine = Engine(EngineConfig(**(given | choices)))
        # A CPU stands in for a GPU: it launches the same stages.
        engine.stepper.one_call = None
        return engine
