"""`fastblt eval`: bits per byte of a user's own files, by the engine that would serve the model."""

import lzma
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

from rich.text import Text

from engine.checkpoint.describe import format_size
from engine.config import EngineConfig
from engine.engine import Engine
from engine.scoring import Refused, Score, score
from engine.types import Snapshot

from .progress import Progress
from .tables import drawn, number_table
from .texts import Slice, Texts, check_context

LEVEL = 0.95
LEAST_SLICES = 5
"""Fewer slices give no useful variance."""


class Estimate:
    """Estimates nats per byte from slices, which count as independent samples; bytes within a slice do not."""

    def __init__(self) -> None:
        self.slices = self.bytes = 0
        self.nats = 0.0
        # Sums of squares and products, so that no slice is kept.
        self._nats_nats = self._nats_bytes = self._bytes_bytes = 0.0

    def add(self, nats: float, num_bytes: int) -> None:
        self.slices += 1
        self.bytes += num_bytes
        self.nats += nats
        self._nats_nats += nats * nats
        self._nats_bytes += nats * num_bytes
        self._bytes_bytes += num_bytes * num_bytes

    @property
    def mean(self) -> float:
        return self.nats / self.bytes

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean: the ratio estimator's linearised variance (Cochran, Sampling Techniques, 6.3)
        and Student's t. None for fewer than `LEAST_SLICES`."""
        if self.slices < LEAST_SLICES:
            return None
        mean, free = self.mean, self.slices - 1
        squares = self._nats_nats - 2 * mean * self._nats_bytes + mean * mean * self._bytes_bytes
        half = _student(free) * math.sqrt(max(squares, 0.0) * self.slices / free) / self.bytes
        return mean - half, mean + half


def _student(free: int) -> float:
    """Student's t by the first terms of its expansion around the normal quantile; within 2 % from 4 degrees on."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)


@dataclass(slots=True)
class FileScore:
    """One file. bytes: number of scored bytes."""

    name: str
    bytes: int = 0
    nats: float = 0.0
    patches: int = 0

    @property
    def bits_per_byte(self) -> float:
        return _bits(self.nats / self.bytes)

    @property
    def mean_patch(self) -> float | None:
        return _mean_patch(self.bytes, self.patches)


@dataclass(frozen=True, slots=True)
class StageReads:
    """A stage's work for the texts, by the engine's accounting. cache_bytes: keys, values and look-ups."""

    passes: int
    rows: int
    weight_bytes: int
    cache_bytes: int


@dataclass(slots=True)
class Evaluation:
    """Of all files together. seconds: of scoring alone, reading the files included."""

    model: str
    context: int
    stride: int
    dtype: str
    weights: str
    device: str
    estimate: Estimate = field(default_factory=Estimate)
    files: list[FileScore] = field(default_factory=list)
    stages: Mapping[str, StageReads] = field(default_factory=dict)
    xz_bytes: int = 0
    seconds: float = 0.0

    def take(self, text: Slice, score: Score) -> None:
        self.estimate.add(score.nats, text.num_new)
        file = self.files[text.file]
        file.bytes += text.num_new
        file.nats += score.nats
        file.patches += score.patches

    @property
    def patches(self) -> int:
        return sum(file.patches for file in self.files)

    @property
    def mean_patch(self) -> float | None:
        return _mean_patch(self.estimate.bytes, self.patches)

    @property
    def bits_per_byte(self) -> float:
        return _bits(self.estimate.mean)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the bits per byte."""
        ends = self.estimate.interval
        return ends and (_bits(ends[0]), _bits(ends[1]))

    @property
    def xz_bits_per_byte(self) -> float:
        return 8 * self.xz_bytes / self.estimate.bytes


def evaluate(config: EngineConfig, texts: Texts) -> Evaluation:
    """Scores every byte of the texts once. Raises what loading raises, ValueError and OSError for the files, and
    ValueError for a context longer than the engine's limit."""
    total = texts.check()
    engine = Engine(config)
    check_context(texts.context, engine.limits.max_length)
    result = Evaluation(
        engine.limits.name,
        texts.context,
        texts.stride,
        config.dtype,
        config.weights or config.dtype,
        config.device,
    )
    packed = _Packed()
    result.files = [FileScore(str(path)) for path in texts.paths]
    before, began = engine.snapshot(), time.perf_counter()
    try:
        with Progress("scoring", total) as progress:
            for text, scored in score(engine, map(packed.take, texts)):
                result.take(text, scored)
                progress.advance(text.num_new)
    except Refused as error:
        raise ValueError(f"{error}: make --context smaller than {texts.context}") from error
    result.seconds = time.perf_counter() - began - packed.seconds
    after, weights = engine.snapshot(), engine.parts.stage_bytes.weights
    result.stages = {stage: _reads(stage, before, after, weights) for stage in after.calls}
    result.files = [file for file in result.files if file.bytes]
    result.xz_bytes = packed.finish()
    return result


class _Packed:
    """Size of everything that passes, compressed with `xz -9` as one file. seconds: what that took so far, between the
    steps of the engine."""

    def __init__(self) -> None:
        self._xz, self._size = lzma.LZMACompressor(preset=9), 0
        self.seconds = 0.0

    def take(self, text: Slice) -> Slice:
        began = time.perf_counter()
        self._size += len(self._xz.compress(text.new))
        self.seconds += time.perf_counter() - began
        return text

    def finish(self) -> int:
        """Its size in bytes."""
        return self._size + len(self._xz.flush())


def _reads(stage: str, before: Snapshot, after: Snapshot, weights: Mapping[str, int]) -> StageReads:
    passes = after.calls[stage] - before.calls[stage]
    read, once = after.bytes_read[stage] - before.bytes_read[stage], passes * weights[stage]
    return StageReads(passes, after.rows[stage] - before.rows[stage], once, read - once)


def _bits(nats: float) -> float:
    return nats / math.log(2)


def _mean_patch(num_bytes: int, patches: int) -> float | None:
    """None if no patch starts among the bytes."""
    return num_bytes / patches if patches else None


def to_json(e: Evaluation) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "model": e.model,
        "bytes": e.estimate.bytes,
        "slices": e.estimate.slices,
        "context": e.context,
        "stride": e.stride,
        "bits_per_byte": e.bits_per_byte,
        "interval": e.interval,
        "level": LEVEL,
        "xz_bits_per_byte": e.xz_bits_per_byte,
        "mean_patch": e.mean_patch,
        "patches": e.patches,
        "dtype": e.dtype,
        "weights": e.weights,
        "device": e.device,
        "seconds": e.seconds,
        "stages": {stage: asdict(reads) for stage, reads in e.stages.items()},
        "files": [
            {"file": f.name, "bytes": f.bytes, "bits_per_byte": f.bits_per_byte, "mean_patch": f.mean_patch}
            for f in e.files
        ],
    }


def render(e: Evaluation) -> str:
    """The result as text."""
    parts = [_headline(e), _figures(e), _stages(e)]
    if len(e.files) > 1:
        parts.append(_files(e.files))
    return "\n\n".join(parts)


def _headline(e: Evaluation) -> str:
    slices = "1 slice" if e.estimate.slices == 1 else f"{e.estimate.slices:,} slices"
    context = f"{slices} of up to {e.context:,} bytes"
    overlap = "" if e.stride == e.context else f", {e.stride:,} bytes apart"
    matrices = "" if e.weights == e.dtype else f", large matrices in {e.weights}"
    return f"{e.model}: {e.estimate.bytes:,} bytes in {context}{overlap}; {e.dtype}{matrices} on {e.device}"


def _figures(e: Evaluation) -> str:
    table = number_table("", "")
    table.add_column("")
    ends = e.interval
    sure = (
        f"{LEVEL:.0%} interval {ends[0]:.4f} to {ends[1]:.4f}, over {e.estimate.slices:,} slices"
        if ends
        else (f"no interval: {e.estimate.slices} of the {LEAST_SLICES} slices that it needs")
    )
    table.add_row("bits a byte", f"{e.bits_per_byte:.4f}", sure)
    table.add_row("xz -9", f"{e.xz_bits_per_byte:.4f}", "bits a byte, all files as one")
    table.add_row("bytes a patch", _length(e.mean_patch), f"{e.patches:,} patches")
    table.add_row("bytes a second", f"{e.estimate.bytes / e.seconds:,.0f}", f"{e.seconds:.1f} s")
    return drawn(table).lstrip("\n")


def _stages(e: Evaluation) -> str:
    table = number_table("read", "passes", "rows", "weights", "caches and tables", "bytes a byte of text")
    for stage, reads in e.stages.items():
        read = reads.weight_bytes + reads.cache_bytes
        sizes = (format_size(reads.weight_bytes), format_size(reads.cache_bytes), f"{read / e.estimate.bytes:,.0f}")
        table.add_row(stage, f"{reads.passes:,}", f"{reads.rows:,}", *sizes)
    return drawn(table)


def _files(files: Iterable[FileScore]) -> str:
    table = number_table("file", "bytes", "bits a byte", "bytes a patch")
    for f in files:
        table.add_row(Text(f.name), f"{f.bytes:,}", f"{f.bits_per_byte:.4f}", _length(f.mean_patch))
    return drawn(table)


def _length(mean_patch: float | None) -> str:
    return "" if mean_patch is None else f"{mean_patch:.3f}"
