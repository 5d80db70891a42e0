"""The device and its driver."""

import os
import subprocess
from typing import Any

import torch

from kernels import native

from .setting import Setting

_FIELDS = ("driver_version", "power.limit", "clocks.max.memory", "clocks.max.sm", "utilization.gpu", "memory.used")

DATA_SHEETS = {"H200": 4800, "H100 NVL": 3938, "H100 PCIe": 2039, "H100": 3352}
"""GB/s of a card's memory by NVIDIA's data sheets. The first whose words are all in the card's name counts."""


def data_sheet_gb_s(name: str) -> int | None:
    """What the memory of a card of that name moves at most, None for one that is not known."""
    words = set(name.split())
    return next((rate for card, rate in DATA_SHEETS.items() if words >= set(card.split())), None)


def describe(setting: Setting) -> dict[str, Any]:
    """Name, size and load of the device, and whether the host plans for it in C."""
    planner = {"native planner": native.LIBRARY is not None}
    if not setting.on_gpu:
        capability = torch.backends.cpu.get_cpu_capability()
        return {"name": "CPU", "cores": os.cpu_count(), "capability": capability, **planner}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GB/s by its data sheet": data_sheet_gb_s(properties.name),
        "memory GB": round(properties.total_memory / 1e9, 1),
        "L2 MB": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
        "CUDA": torch.version.cuda,
        **planner,
        **nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str]:
    """The driver's version, limits and load; empty without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader", "--id=0"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_FIELDS, (value.strip() for value in said.split(",")), strict=False))
