"""A checkpoint's sizes and settings, without running it."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import torch

from ..config import HashConfig, ModelConfig, PatchingRule, StackConfig
from ..memory.caches import cache_specs
from .base import Format
from .names import DECODER, ENCODER, GLOBAL, HASHES, PATCHER, expected_shapes
from .reading import load

_PARTS = {HASHES: "hash tables", ENCODER: "encoder", GLOBAL: "global", DECODER: "decoder", PATCHER: "patcher"}
CACHE_DTYPE = torch.bfloat16
"""Of the caches that are described."""


@dataclass(frozen=True, slots=True)
class CacheCost:
    """The memory of one cache per sequence: a row per byte or per patch, at most `most_rows` of them. Rounding up to
    whole pages is not counted."""

    row: Literal["byte", "patch"]
    bytes_per_row: int
    most_rows: int
    most_bytes: int


@dataclass(frozen=True, slots=True)
class Description:
    """Plain data: `dataclasses.asdict` of it is JSON."""

    name: str
    format: Format
    notes: tuple[str, ...]
    """What the user should know about how the files were understood."""
    vocab_size: int
    slots: int
    decoder_input: str
    mask_id: int | None
    block_size: int | None
    isolate_documents: bool
    isolate_global: bool
    max_length: int
    hashes: HashConfig
    patching: PatchingRule
    stages: dict[str, StackConfig]
    parameters: dict[str, int]
    """Per part, and "total"."""
    dtypes: dict[str, int]
    """Parameters per dtype."""
    file_bytes: int
    cache_dtype: str
    caches: dict[str, CacheCost]


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters per part, and "total"; nothing is allocated."""
    counts = dict.fromkeys([*_PARTS.values(), "head", "total"], 0)
    for name, shape in expected_shapes(config).items():
        part = next((part for prefix, part in _PARTS.items() if name.startswith(prefix)), "head")
        counts[part] += prod(shape)
        counts["total"] += prod(shape)
    return counts


def cache_costs(config: ModelConfig, dtype: torch.dtype) -> dict[str, CacheCost]:
    """The caches of one sequence, by name."""
    costs = {}
    for name, spec in cache_specs(config, page_size=1).items():
        row: Literal["byte", "patch"] = "byte" if spec.rows_from == "byte" else "patch"
        limit = config.max_length if row == "byte" else config.global_.max_positions
        rows = min(spec.window or limit, limit)
        size = spec.row_elements * dtype.itemsize
        costs[name] = CacheCost(row, size, rows, rows * size)
    return costs


def describe(
    path: str | Path,
    *,
    patcher: str | Path | None = None,
    patching_threshold: float | None = None,
) -> Description:
    """The checkpoint in a folder, its tensors checked but not read; arguments as of `load`. Raises CheckpointError."""
    checkpoint = load(path, patcher=patcher, patching_threshold=patching_threshold)
    config = checkpoint.config
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[_dtype_name(tensor.dtype)] += tensor.numel()
    return Description(
        name=config.name,
        format=checkpoint.format,
        notes=checkpoint.notes,
        vocab_size=config.vocab_size,
        slots=config.slots,
        decoder_input=config.decoder_input,
        mask_id=config.mask_id,
        block_size=config.block_size,
        isolate_documents=config.isolate_documents,
        isolate_global=config.isolate_global,
        max_length=config.max_length,
        hashes=config.hashes,
        patching=config.patching,
        stages={
            "patcher": config.patcher,
            "encoder": config.encoder,
            "global": config.global_,
            "decoder": config.decoder,
        },
        parameters=count_parameters(config),
        dtypes=dict(dtypes),
        file_bytes=sum(file.stat().st_size for file in checkpoint.files),
        cache_dtype=_dtype_name(CACHE_DTYPE),
        caches=cache_costs(config, CACHE_DTYPE),
    )


def render(description: Description) -> str:
    """The description as text for people."""
    d = description
    form = "reads the encoder's states" if d.decoder_input == "encoder" else "has its own byte embedding"
    if d.block_size is not None:
        form += f", drafts blocks of {d.block_size} (mask id {d.mask_id})"
    groups = ", ".join(map(str, d.hashes.group_sizes))
    lines = [
        f"{d.name}: {d.format} format, {d.parameters['total']:,} parameters, {format_size(d.file_bytes)} on disk ("
        + ", ".join(f"{count:,} in {dtype}" for dtype, count in d.dtypes.items())
        + ")",
        f"decoder    {form}",
        f"patching   {_rule(d.patching)}",
        f"hashes     {d.hashes.num_tables} tables of {d.hashes.rows:,} rows, groups of {groups} bytes",
        f"sequences  up to {d.max_length:,} ids of {d.vocab_size}, {d.slots} slots per patch"
        + (", documents isolated at EOS" if d.isolate_documents else "")
        + (", except in the global stage" if d.isolate_documents and not d.isolate_global else ""),
        "",
        f"{'stage':9}{'layers':>7}{'width':>7}{'heads':>7}{'kv':>5}{'ffn':>7}{'window':>8}{'positions':>11}{'theta':>9}",
    ]
    for name, s in d.stages.items():
        lines.append(
            f"{name:9}{s.num_layers:>7}{s.dim:>7}{s.num_heads:>7}{s.num_kv_heads:>5}{s.ffn_dim:>7}"
            f"{s.window or 'all':>8}{s.max_positions:>11}{s.rope_theta:>9g}"
        )
    lines += ["", "parameters"]
    lines += [f"  {part:12}{count:>15,}" for part, count in d.parameters.items()]
    lines += ["", f"{'cache':9}{'bytes per row':>20}{'rows at most':>15}{'per sequence':>15}   ({d.cache_dtype})"]
    for name, cost in d.caches.items():
        per_row = f"{cost.bytes_per_row:,} a {cost.row}"
        lines.append(f"{name:9}{per_row:>20}{cost.most_rows:>15,}{format_size(cost.most_bytes):>15}")
    lines += ["", *(f"note: {note}" for note in d.notes)] if d.notes else []
    return "\n".join(lines)


def _rule(rule: PatchingRule) -> str:
    if rule.mode == "bytes":
        text = "every byte is a patch"
    elif rule.monotonic:
        text = f"entropy rises by more than {rule.threshold:.4g} nats"
    else:
        text = f"entropy above {rule.threshold:.4g} nats"
        if rule.threshold_add is not None:
            text += f" and rising by more than {rule.threshold_add:.4g}"
    return text if rule.max_patch_length is None else f"{text}, at most {rule.max_patch_length} bytes"


def format_size(count: float) -> str:
    """A number of bytes with three digits and a binary unit."""
    size, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
