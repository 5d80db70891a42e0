"""How much memory a model needs where it runs, and how much is free: checked before gigabytes are read."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.describe import format_size
from ..checkpoint.names import HASHES
from ..config import ModelConfig
from .caches import CachePlan
from .weights import WeightBytes

log = logging.getLogger("fastblt.engine")

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
"""Of the container, or of the whole machine."""


def check_room(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    plan: CachePlan,
    dtype: torch.dtype,
    matrix_dtype: torch.dtype,
    device: torch.device,
    *,
    fp8: bool,
    mapped: bool,
) -> None:
    """Logs how much memory the weights and caches need and how much is free. No tensor is read.

    mapped: whether matrices can be used in the file, without a copy. Raises ValueError if a GPU cannot hold weights and
    caches, or a CPU's memory the weights that are copied into it. On a CPU the caches take memory only as they fill,
    and hash tables stay in their file.
    """
    on_cpu = device.type == "cpu"
    tables = next(tensor.dtype for name, tensor in tensors.items() if name.startswith(HASHES))
    hash_itemsize = tables.itemsize if on_cpu else min(tables.itemsize, dtype.itemsize)
    sizes = WeightBytes.of(config, dtype.itemsize, hash_itemsize, matrix_itemsize=matrix_dtype.itemsize, fp8=fp8)
    weights = sizes.total - (sizes.hash_tables if on_cpu else 0)
    there = available(device)
    log.info(
        "%s takes %s for its weights%s and up to %s for its caches; %s",
        config.name,
        format_size(weights),
        f", {format_size(sizes.hash_tables)} of hash tables in their file," if on_cpu else "",
        format_size(plan.num_bytes),
        "free memory is unknown" if there is None else f"{format_size(there)} are free on {device.type}",
    )
    if there is None or weights + plan.num_bytes <= there:
        return
    short = (
        f"{config.name} takes {format_size(weights)} for its weights and {format_size(plan.num_bytes)} for its caches, "
        f"and {format_size(there)} are free on {device.type}"
    )
    if not on_cpu or (weights > there and not mapped):
        raise ValueError(f"{short}: --cache-bytes makes the caches smaller; `fastblt size --memory` shows what fits")
    log.warning("%s: it may run out of memory when it is busy; --cache-bytes makes the caches smaller", short)


def available(device: torch.device) -> int | None:
    """Free bytes. On a CPU also those that can be freed and swap space, within the container's limit. None where the
    system does not report them."""
    if device.type == "cuda":
        # torch's allocator keeps the memory of freed tensors and reuses it.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        rows = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free = sum(int(rows[name].split()[0]) << 10 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        return None
    limit = _container_room()
    return free if limit is None else min(free, limit)


def _container_room() -> int | None:
    """Free bytes of the control group, with its page cache counted as free; None if it has no limit."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        taken = int((CGROUP / "memory.current").read_text())
        rows = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(limit - taken + int(rows["inactive_file"]) + int(rows["active_file"]), 0)
    except (OSError, KeyError, ValueError):
        return None
