"""The end of a fine-tuning run: what it gained and what it cost, measured on held-out text, in the model's folder.

`README.md` is the report, `loss.png` has the curves, `decoders.json` and `decoders.png` are those of `fastblt compare`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from engine import checkpoint
from engine.config import PAD_ID, DeviceName
from engine.shortage import is_out_of_memory

from . import decoding
from .finetune import Job, held_out_rows, next_byte_bits
from .metrics import Line, read_metrics
from .plot import plot
from .tuning import TABLE_RATE, Tuning, on_device

CURVES = (
    ("table", "bits", "table: next byte"),
    ("mask", "mask", "mask: masked cells, 1/t-weighted"),
    ("blocks", "bits", "blocks: next byte"),
    ("blocks", "mask", "blocks: masked cells, 1/t-weighted"),
)
STOPPED = "the report was stopped before"
AGAIN = """\
Measured by `fastblt finetune` on the held-out text. `fastblt compare --model FOLDER FILE...` measures other text."""


@dataclass(frozen=True, slots=True)
class Report:
    """before, after: bits per next byte on the same held-out bytes. right: share of next bytes predicted after it.
    decoders: as `decoding.measure` gives it; None if it was not measured, and then `why`."""

    before: float
    after: float
    right: float
    held_out: int
    decoders: dict[str, Any] | None
    why: str = ""


def report(job: Job, out: Path, prompts: int, prefixes: int) -> Report:
    """Measures the model in `out`, which `finetune.save` wrote, and writes the folder's other files. prompts: to
    continue with every decoder; 0 measures none."""
    tuning, settings = job.tuning, job.tuning.settings
    rows = held_out_rows(job.held_out, settings)
    after, right = _next_byte(out, rows, tuning)
    plot(_end_to_end(read_metrics(job.run)), out / "loss.png", CURVES)
    count = int((rows[:, 1:] != PAD_ID).sum())
    found = Report(tuning.bits_before, after, right, count, None, STOPPED if prompts else "`--prompts 0`")
    # Before the decoders are measured, too, which takes longest: whatever happens there, the other figures are kept.
    (out / "README.md").write_text(card(tuning, found))
    if prompts:
        found = _with_decoders(found, job, out, prompts, prefixes)
        (out / "README.md").write_text(card(tuning, found))
        if found.decoders is not None:
            decoding.write(found.decoders, out, AGAIN)
    return found


def _next_byte(out: Path, rows: Tensor, tuning: Tuning) -> tuple[float, float]:
    """`next_byte_bits` of the saved model, whose weights are gone from the device afterwards: the engine loads them
    again."""
    saved = checkpoint.load(out)
    return next_byte_bits(saved.config, on_device(saved, tuning.device, tuning.settings), rows, tuning.settings)


def _with_decoders(found: Report, job: Job, out: Path, prompts: int, prefixes: int) -> Report:
    settings = job.tuning.settings
    texts = job.held_out.texts(settings.held_out_bytes)
    device: DeviceName = "cuda" if job.tuning.device.type == "cuda" else "cpu"
    # A device that held the weights in the run's dtype may have no room for twice as much.
    dtype = settings.dtype if device == "cuda" else "float32"
    try:
        decoders = decoding.measure(out, texts, prompts, 64, prefixes, dtype, device)
    except ValueError as error:
        return replace(found, why=str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        return replace(found, why=(str(error).splitlines() or ["out of memory"])[0])
    return replace(found, decoders=decoders, why="")


def summary(found: Report) -> str:
    """The report's first figures, for the terminal."""
    change = 100 * (found.after / found.before - 1)
    lines = [f"next byte: {found.before:.4f} bits before, {found.after:.4f} after ({change:+.2f} %), held out"]
    if found.decoders is None:
        lines.append(f"decoders: not measured ({found.why})")
    else:
        lines.append(decoding.table(found.decoders))
    return "\n".join(lines)


def _end_to_end(lines: list[Line]) -> list[Line]:
    """The lines of phases that come one after another, with the bytes counted from the first phase on."""
    seen = before = 0
    phase, found = None, []
    for line in lines:
        if line["phase"] != phase:
            phase, before = line["phase"], seen
        seen = before + line["bytes"]
        found.append(line | {"bytes": seen})
    return found


def card(tuning: Tuning, found: Report) -> str:
    """The model's card as Markdown; `decoding.write` puts the decoders' table into it."""
    settings, config = tuning.settings, tuning.config
    names = ", ".join(Path(name).name for name in settings.files)
    held_out = ", ".join(Path(name).name for name in settings.held_out) or "the part of these that was held out"
    what = "the decoder and the head" if settings.train == "decoder" else "all weights but the patcher's"
    phases = "\n".join(
        f"| {name} | {phase.step:,} | {phase.bytes / 1e6:.1f} | {phase.seconds / 60:.1f} |"
        for name, phase in tuning.phases.items()
    )
    machines = ", ".join(f"{machine} ({seconds / 60:.0f} minutes)" for machine, seconds in tuning.machines.items())
    rows = f"{settings.rows} rows of {settings.row_bytes:,} bytes"
    if settings.accumulate > 1:
        rows += f", {settings.accumulate} times a step"
    recomputed = ", activations computed again" if settings.recompute else ""
    change = 100 * (found.after / found.before - 1)
    compare = "`fastblt compare --model FOLDER --write FILE...` measures them on other text."
    why = f"Not measured ({found.why}). {compare}" if found.decoders is None else ""
    return f"""\
# {config.name}

{tuning.source.config.name}, with block diffusion trained into it by `fastblt finetune`: its decoder looks bytes up in a
table of its own, and [MASK] is id {config.mask_id}, in blocks of up to {config.block_size}. It runs all decoders. Its
patcher and threshold have the same bits as before.

| held out: {found.held_out:,} bytes | before | after | |
|---|---|---|---|
| next byte, bits | {found.before:.4f} | {found.after:.4f} | {change:+.2f} % |
| next byte, right | | {found.right:.1%} | |

Held out: {held_out}, in rows of {settings.row_bytes:,} bytes that each begin anew, products in {settings.dtype}.

## Training

Fast BLT (arXiv 2605.08044), section 3.2, from {names}. Trained: {what}. {_order(tuning)}

| phase | steps | MB seen | minutes |
|---|---|---|---|
{phases}

{rows}; AdamW {TABLE_RATE * tuning.table_size:.2g} for the decoder's table where it is trained alone,
{TABLE_RATE:g} of the root mean square of its numbers; then Muon {settings.learning_rate:g} for matrices, AdamW
{settings.table_share * settings.learning_rate:g} for the rest; in every phase {settings.warm_up} steps of warm-up and
then a cosine to 0; seed {settings.seed}; products in {settings.dtype}{recomputed}. On {machines}.

![training losses over bytes seen](loss.png)

## Decoders

{decoding.BEGIN}

{why}

{decoding.END}
"""


def _order(tuning: Tuning) -> str:
    """What the phases trained, one after another, in sentences."""
    settings = tuning.settings
    if "table" in tuning.phases:
        first = """\
First the decoder's table alone, by the loss of
the next byte, from the mean of the encoder's states for each byte; then the row of [MASK] alone, by the block loss"""
    else:
        first = """\
The decoder had a table, and
kept it. First the row of [MASK] alone, by the block loss"""
    found = f"""\
{first};
then everything trained, by the next byte's loss plus {settings.mask_weight:g} times the block loss."""
    if settings.own_share:
        found += f"""\
 There the blocks of
{settings.own_share:.0%} of the rows start anywhere and hold the model's own greedy continuations instead of
the text."""
    return found
