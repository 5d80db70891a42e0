"""How much memory a model needs where it runs, and how much there is: checked before gigabytes are read or reserved."""

import logging
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.describe import format_size
from ..checkpoint.names import HASHES
from ..config import EngineConfig, ModelConfig
from ..shortage import flags_that_need_less, is_out_of_memory
from .caches import CachePlan, longest_text
from .text import SLOT_ITEMSIZE
from .weights import WeightBytes

log = logging.getLogger("fastblt.engine")

MEMINFO = Path("/proc/meminfo")
STATM = Path("/proc/self/statm")
CGROUP = Path("/sys/fs/cgroup")
"""Of the container, or of the whole machine."""


def check_room(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    plan: CachePlan,
    engine: EngineConfig,
    matrix_dtype: torch.dtype,
    *,
    fp8: bool,
    mapped: bool,
) -> None:
    """Logs how much memory the weights and caches need and how much is free. No tensor is read.

    mapped: whether matrices can be used in the file, without a copy. Raises ValueError if a GPU cannot hold weights and
    caches, or a CPU's memory the weights that are copied into it. On a CPU the caches take memory only as they fill,
    and hash tables stay in their file; but it raises ValueError, too, if the system would not even reserve all of it.
    """
    device, dtype = torch.device(engine.device), getattr(torch, engine.dtype)
    on_cpu = device.type == "cpu"
    tables = max(tensor.itemsize for name, tensor in tensors.items() if name.startswith(HASHES))
    hash_itemsize = tables if on_cpu else min(tables, dtype.itemsize)
    sizes = WeightBytes.of(config, dtype.itemsize, hash_itemsize, matrix_itemsize=matrix_dtype.itemsize, fp8=fp8)
    weights = sizes.total - (sizes.hash_tables if on_cpu else 0)
    there = available(device)
    texts = 0 if on_cpu else engine.max_sequences * _text_bytes(config, plan)
    log.info(
        "%s takes %s for its weights%s and up to %s for its caches; %s",
        config.name,
        format_size(weights),
        f", {format_size(sizes.hash_tables)} of hash tables in their file," if on_cpu else "",
        format_size(plan.num_bytes),
        "free memory is unknown" if there is None else f"{format_size(there)} are free on {device.type}",
    )
    _check_reserved(sizes.rotary_tables if mapped else weights, _parts(config, plan, engine))
    if there is None or weights + plan.num_bytes + texts <= there:
        return
    also = f", {format_size(texts)} for the texts of --max-sequences" if texts else ""
    short = (
        f"{config.name} takes {format_size(weights)} for its weights{also} and {format_size(plan.num_bytes)} for its "
        f"caches, and {format_size(there)} are free on {device.type}"
    )
    if not on_cpu or (weights > there and not mapped):
        raise ValueError(f"{short}: --cache-bytes makes the caches smaller; `fastblt size --memory` shows what fits")
    log.warning("%s: it may run out of memory when it is busy; --cache-bytes makes the caches smaller", short)


class _Part(NamedTuple):
    """Bytes that the host reserves because of a flag, which needs `each` of them per unit of its value."""

    size: int
    each: int
    of: str
    flag: str
    value: int


def _text_bytes(config: ModelConfig, plan: CachePlan) -> int:
    """Of a running sequence: its ids, entropies and boundaries."""
    return longest_text(config, plan.max_length) * SLOT_ITEMSIZE


def _parts(config: ModelConfig, plan: CachePlan, engine: EngineConfig) -> list[_Part]:
    text, threads = _text_bytes(config, plan), engine.num_threads or torch.get_num_threads()
    texts = f"texts of {plan.max_length} ids, which --max-length shortens"
    parts = [_Part(engine.max_sequences * text, text, texts, "max-sequences", engine.max_sequences)]
    if engine.device == "cpu":
        parts.append(_Part(plan.num_bytes, 1, "caches", "cache-bytes", engine.cache_bytes))
    unlimited = resource.RLIM_INFINITY
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if stack != unlimited and resource.getrlimit(resource.RLIMIT_AS)[0] != unlimited:
        # Torch has a pool of threads, and our own kernels have another. Stacks take addresses, and hardly any memory.
        parts.append(_Part(2 * threads * stack, 2 * stack, "stacks of threads", "num-threads", threads))
    return parts


def _check_reserved(weights: int, parts: list[_Part]) -> None:
    if (limit := reservable()) is None:
        return
    there, where = limit
    excess = weights + sum(part.size for part in parts) - there
    if excess > 0:
        largest = max(parts)
        most = (largest.size - excess) // largest.each
        told = [f"{format_size(part.size)} for {part.of} (--{part.flag} {part.value})" for part in parts]
        raise ValueError(
            f"{format_size(excess + there)} must be reserved, and there are {format_size(there)} {where}: "
            f"{', '.join([f'{format_size(weights)} for weights', *told])}; "
            + (f"a --{largest.flag} of at most {most} would fit" if most > 0 else "lower several of these")
        )


def reservable() -> tuple[int, str] | None:
    """Bytes that this process may reserve, used or not, and of what; None where the system does not tell. Linux refuses
    what is more than all memory."""
    found = []
    if rows := _meminfo():
        found.append((rows["MemTotal"] + rows.get("SwapTotal", 0), "of memory and swap space in all"))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY and (taken := _address_space()) is not None:
        found.append((max(limit - taken, 0), "left of the address space (ulimit -v)"))
    return min(found, default=None)


@contextmanager
def naming_flags(engine: EngineConfig) -> Iterator[None]:
    """While an engine is made. Raises ValueError with the flags that matter where the system has no memory."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        there = available(torch.device(engine.device))
        limit = reservable()
        free = [f"{format_size(there)} are free on {engine.device}"] if there is not None else []
        free += [f"{format_size(limit[0])} {limit[1]}"] if limit else []
        raise ValueError(
            f"out of memory while loading: {(str(error).splitlines() or [type(error).__name__])[0]} "
            f"({', '.join(free) or 'free memory is unknown'}); {flags_that_need_less(engine)}"
        ) from error


def available(device: torch.device) -> int | None:
    """Free bytes. On a CPU also those that can be freed and swap space, within the container's limit. None where the
    system does not report them."""
    if device.type == "cuda":
        # torch's allocator keeps the memory of freed tensors and reuses it.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if not (rows := _meminfo()) or "MemAvailable" not in rows:
        return None
    free, limit = rows["MemAvailable"] + rows.get("SwapFree", 0), _container_room()
    return free if limit is None else min(free, limit)


def _meminfo() -> dict[str, int] | None:
    """Bytes by name; None where the system does not report them."""
    try:
        rows = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return {name: int(row.split()[0]) << 10 for name, row in rows.items() if name.startswith(("Mem", "Swap"))}
    except (OSError, KeyError, ValueError):
        return None


def _address_space() -> int | None:
    """Bytes that this process has reserved so far."""
    try:
        return int(STATM.read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return None


def _container_room() -> int | None:
    """Free bytes of the control group, with its page cache counted as free; None if it has no limit."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        taken = int((CGROUP / "memory.current").read_text())
        rows = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(limit - taken + int(rows["inactive_file"]) + int(rows["active_file"]), 0)
    except (OSError, KeyError, ValueError):
        return None
