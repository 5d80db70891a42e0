"""The device and its driver."""

import os
import subprocess
from typing import Any

import torch

from kernels import native

from .setting import Setting

_FIELDS = ("driver_version", "power.limit", "clocks.max.memory", "clocks.max.sm", "utilization.gpu", "memory.used")


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
