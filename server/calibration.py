"""`fastblt calibrate`: the patching threshold that gives a user's files patches of a requested length."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig, PatchingRule
from engine.entropies import Entropies
from engine.thresholds import Calibration, Thresholds

from .progress import Progress
from .tables import drawn, number_table
from .texts import Slice, Texts, check_context

NEARBY = (-1.0, -0.5, 0.5, 1.0)
"""Bytes by which the other patch lengths of the table differ from the requested one."""
BINS = 24
BAR = 50
"""Characters of the longest bar."""
EIGHTHS = "▏▎▍▌▋▊▉█"
PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True)
class Nearby:
    """A patch length, the threshold that comes nearest to it, and the mean length that it gives."""

    patch_size: float
    threshold: float
    mean_patch: float


@dataclass(frozen=True, slots=True)
class Found:
    """found: for the requested `patch_size`. own: the model's threshold, with the mean that it gives. nearby:
    ascending, the found one among them. range: the least and the greatest mean that a threshold gives. histogram:
    counts of what is compared with a threshold, and the edges of the bins."""

    config: EngineConfig
    model: str
    rule: PatchingRule
    bytes: int
    slices: int
    context: int
    patch_size: float
    found: Calibration
    own: Calibration
    range: tuple[float, float]
    nearby: Sequence[Nearby]
    counts: NDArray[np.int64]
    edges: NDArray[np.float64]


def calibrate(config: EngineConfig, texts: Texts, patch_size: float) -> Found:
    """Reads the files with the model's patcher and searches. Raises what loading raises, ValueError and OSError for the
    files, and ValueError for a length that no threshold gives."""
    total = texts.check()
    reader = Entropies(config)
    model, rule = reader.model_config, reader.model_config.patching
    if rule.mode == "bytes":
        raise ValueError(f"{model.name}: every byte is a separate patch (mode 'bytes'), so there is no threshold")
    check_context(texts.context, model.max_length)
    read: list[NDArray[np.float32]] = []
    with Progress("reading", total) as progress:
        for text in texts:
            read.append(_read(reader, text))
            progress.advance(text.num_new)
    thresholds = Thresholds(rule, read)
    least, most = thresholds.range
    if not least <= patch_size <= most:
        longest = (
            "" if rule.max_patch_length is None else f"; no patch may be longer than {rule.max_patch_length} bytes"
        )
        raise ValueError(
            f"--patch-size: no threshold gives {patch_size:g}: on these files the mean goes from {least:.4f} to "
            f"{most:.4f}{longest}"
        )
    lengths = sorted({patch_size, *(patch_size + more for more in NEARBY if least <= patch_size + more <= most)})
    counts, edges = np.histogram(thresholds.judged, BINS)
    return Found(
        config,
        model.name,
        rule,
        thresholds.num_bytes,
        len(read),
        texts.context,
        patch_size,
        thresholds.nearest(patch_size),
        Calibration(rule.threshold, thresholds.mean_patch(rule.threshold)),
        (least, most),
        [Nearby(length, **asdict(thresholds.nearest(length))) for length in lengths],
        counts,
        edges.astype(np.float64),
    )


def _read(reader: Entropies, text: Slice) -> NDArray[np.float32]:
    entropies = reader.of(text.ids)
    if not np.isfinite(entropies).all():
        raise ValueError("the patcher's entropies are not finite: its weights are broken")
    return entropies


def to_json(f: Found) -> dict[str, Any]:
    """The object that `--json` prints. Thresholds in nats; lengths in bytes."""
    return {
        "model": f.model,
        "bytes": f.bytes,
        "slices": f.slices,
        "context": f.context,
        "dtype": f.config.dtype,
        "rule": asdict(f.rule),
        "patch_size": f.patch_size,
        "threshold": f.found.threshold,
        "mean_patch": f.found.mean_patch,
        "own_threshold": f.own.threshold,
        "own_mean_patch": f.own.mean_patch,
        "range": f.range,
        "nearby": [asdict(one) for one in f.nearby],
        "histogram": {"edges": f.edges.tolist(), "counts": f.counts.tolist()},
    }


def render(f: Found, *, histogram: bool) -> str:
    """The result as text. Its last line is a command that uses the threshold."""
    slices = "1 slice" if f.slices == 1 else f"{f.slices:,} slices"
    parts = [
        f"{f.model}: {f.bytes:,} bytes in {slices} of up to {f.context:,} bytes; the rule is: {_law(f.rule)}",
        _table(f),
        *([_histogram(f)] if histogram else []),
        f"threshold {f.found.threshold!r}: patches of {f.found.mean_patch:.4f} bytes on average, "
        f"where thresholds give {f.range[0]:.4f} to {f.range[1]:.4f}",
        _command(f),
    ]
    return "\n\n".join(parts)


def _law(rule: PatchingRule) -> str:
    if rule.monotonic:
        law = "a patch starts where the entropy rises by more than the threshold"
    elif rule.threshold_add is not None:
        law = f"a patch starts where the entropy is above the threshold and rises by more than {rule.threshold_add:g}"
    else:
        law = "a patch starts where the entropy is above the threshold"
    return law if rule.max_patch_length is None else f"{law}, or after {rule.max_patch_length} bytes"


def _table(f: Found) -> str:
    table = number_table("bytes a patch", "threshold", "mean reached")
    for one in f.nearby:
        table.add_row(f"{one.patch_size:g}", repr(one.threshold), f"{one.mean_patch:.4f}")
    table.add_row("the model's own", repr(f.own.threshold), f"{f.own.mean_patch:.4f}")
    return drawn(table)


def _histogram(f: Found) -> str:
    """A line per bin, with the thresholds that lie in it."""
    what = "rises" if f.rule.monotonic else "entropies"
    lines = [f"{what} in nats, and how many bytes have them"]
    tallest, last = max(int(f.counts.max()), 1), len(f.counts) - 1
    for number, count in enumerate(f.counts.tolist()):
        low, high = f.edges[number], f.edges[number + 1]
        here = [
            f"{label}: {threshold:.6g}"
            for label, threshold in _marks(f)
            if (low <= threshold or number == 0) and (threshold < high or number == last)
        ]
        marks = f"  <- {', '.join(here)}" if here else ""
        lines.append(f"{low:8.3f} to {high:7.3f} {count:9,} {_bar(count / tallest)}{marks}".rstrip())
    return "\n".join(lines)


def _marks(f: Found) -> list[tuple[str, float]]:
    return [*((f"{one.patch_size:g} bytes", one.threshold) for one in f.nearby), ("own", f.own.threshold)]


def _bar(share: float) -> str:
    eighths = math.ceil(8 * BAR * share)
    return EIGHTHS[-1] * (eighths // 8) + (EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def _command(f: Found) -> str:
    config = f.config
    words = ["fastblt", "serve", "--model", config.model]
    words += ["--patcher", config.patcher] if config.patcher else []
    words += ["--dtype", config.dtype] if config.dtype != "float32" else []
    words += ["--device", config.device] if config.device != "cpu" else []
    return shlex.join([*words, "--patching-threshold", repr(f.found.threshold)])


def check_plot(picture: Path) -> None:
    """Raises ValueError for a picture that could not be drawn, before much work is done for it."""
    if picture.suffix.lower() not in PICTURES:
        raise ValueError(f"--plot: {picture} must end with {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    if not picture.parent.is_dir():
        raise ValueError(f"--plot: {picture.parent} is no directory")
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib")


def draw(f: Found, picture: Path) -> None:
    """The histogram with the thresholds as lines."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    axes.stairs(f.counts, f.edges, fill=True, color="C0", alpha=0.5)
    for number, one in enumerate(f.nearby, 1):
        label = f"{one.patch_size:g} bytes a patch: {one.threshold:.6g}"
        wanted = one.patch_size == f.patch_size
        axes.axvline(one.threshold, color=f"C{number}", lw=2.5 if wanted else 1, label=label)
    own = f"the model's own: {f.own.threshold:.6g} ({f.own.mean_patch:.3g} bytes)"
    axes.axvline(f.own.threshold, color="black", lw=1, ls="--", label=own)
    what = "rise of the entropy" if f.rule.monotonic else "entropy"
    axes.set(xlabel=f"{what}, nats", ylabel="bytes", title=f"{f.model}: {f.bytes:,} bytes")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)
