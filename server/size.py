"""`fastblt size`: finds the numbers that sizes depend on, and prints the sizes as tables.

A number is given by a flag, measured, or assumed. Measured ones are in the model's folder, in the `decoders.json` that
`fastblt compare --write` writes; assumed ones are from the Fast BLT paper.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from engine.checkpoint import load
from engine.checkpoint.describe import format_size
from engine.checkpoint.files import is_there, read_json
from engine.checkpoint.names import HASHES, PATCHER
from engine.config import ModelConfig
from engine.decoders.paper import PAPER_ACCEPTANCE, PAPER_PASSES
from engine.layout import DECODERS

from .sizing import ASSUMED_PATCH, Drafting, Sizing, check_patch
from .tables import drawn, number_table

WRITTEN_ITEMSIZE = 2
"""`fastblt init` writes bfloat16 unless told otherwise."""

Source = Literal["given", "measured", "assumed"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The model to size. card: what `fastblt compare` measured, by the names of its settings."""

    config: ModelConfig
    hash_itemsize: int = WRITTEN_ITEMSIZE
    patcher_itemsize: int = WRITTEN_ITEMSIZE
    card: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, patcher: str | None = None) -> "Subject":
        """Reads a checkpoint's configuration and card, not its tensors. Raises CheckpointError, or ValueError for a
        broken card."""
        checkpoint = load(folder, patcher=patcher)
        of_hashes, of_patcher = (
            next(tensor.itemsize for name, tensor in checkpoint.tensors.items() if name.startswith(start))
            for start in (HASHES, f"{PATCHER}.")
        )
        return cls(checkpoint.config, of_hashes, of_patcher, _read_card(folder / DECODERS))


@dataclass(frozen=True, slots=True)
class Text:
    """What sizes depend on besides the model. patch: mean bytes. sources: where each number is from, by its flag's
    name."""

    patch: float
    drafting: Drafting
    sources: Mapping[str, Source]


def text_of(subject: Subject, draft_length: int, **given: float | None) -> Text:
    """given: patch_size, acceptance, block_acceptance and block_passes, each None if its flag is not given.

    Raises ValueError for a number that is neither given, measured nor assumed, for a broken card, for patches that the
    model cannot have, and for block flags of a model without blocks.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if subject.config.block_size is None and (blocks := [name for name in asked if name.startswith("block_")]):
        flag = blocks[0].replace("_", "-")
        raise ValueError(f"--{flag}: {subject.config.name} was not trained with block diffusion")
    try:
        measured = _measured(subject, draft_length)
    except (LookupError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{DECODERS}: must be as `fastblt compare --write` writes it ({error!r})") from error
    assumed = _assumed(subject.config, draft_length)
    numbers = assumed | measured | asked
    if "acceptance" not in numbers:
        known = ", ".join(str(length) for decoder, length in PAPER_ACCEPTANCE if decoder == "blt-s")
        raise ValueError(f"--acceptance is needed for --draft-length {draft_length}; it is known only for {known}")
    sources: dict[str, Source] = {
        name: "given" if name in asked else "measured" if name in measured else "assumed" for name in numbers
    }
    check_patch(subject.config, patch := numbers.pop("patch_size"))
    return Text(patch, Drafting(draft_length, **numbers), sources)


def _measured(subject: Subject, draft_length: int) -> dict[str, float]:
    found = {}
    size, card = subject.config.block_size, subject.card
    if row := card.get("BLT"):
        found["patch_size"] = 1 / row["global_calls"]
    # Along real text, as greedy text repeats itself and flatters drafts.
    if row := card.get(f"BLT-S k={draft_length}"):
        found["acceptance"] = row["real_acceptance"]
    if row := card.get(f"BLT-DV-{size} one step"):
        found["block_acceptance"] = row["real_acceptance"]
    if row := card.get(f"BLT-D-{size} conf 0.7"):
        found["block_passes"] = row["decoder_calls"] * row["bytes_per_round"]
    return found


def _assumed(config: ModelConfig, draft_length: int) -> dict[str, float]:
    most = config.patching.max_patch_length or ASSUMED_PATCH
    found = {"patch_size": 1.0 if config.patching.mode == "bytes" else min(ASSUMED_PATCH, most)}
    if ("blt-s", draft_length) in PAPER_ACCEPTANCE:
        found["acceptance"] = PAPER_ACCEPTANCE["blt-s", draft_length]
    if (size := config.block_size) is not None:
        found["block_acceptance"] = PAPER_ACCEPTANCE["blt-dv", 8]
        found["block_passes"] = max(PAPER_PASSES[8] * size / 8, 1.0)
    return found


def _read_card(path: Path) -> dict[str, dict[str, Any]]:
    if not is_there(path):
        return {}
    data = read_json(path)
    try:
        return {row["name"]: row for row in data["rows"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: must be as `fastblt compare --write` writes it ({error!r})") from error


def to_json(sizing: Sizing, text: Text) -> dict[str, Any]:
    """The sizing, and where the numbers about the text are from."""
    return asdict(sizing) | {"sources": dict(text.sources)}


def render(sizing: Sizing, text: Text, model: str) -> str:
    """As text for people. model: the flags that name the model, as they were given."""
    s = sizing
    return "\n\n".join(
        (
            _headline(s),
            _weights(s),
            _caches(s),
            _memory(s),
            _flags(s, model),
            _decoders(s),
            _notes(s, text),
        )
    )


def render_training(model: str, rows: int, row_bytes: int, needs: list[dict[str, Any]]) -> str:
    """What `fastblt finetune` needs, as text for people. needs: as `training.needs.all_needs` gives them."""
    table = number_table("trained", "parameters", "weights", "gradients", "optimizer", "activations", "total GB")
    for need in needs:
        name = need["train"] + (", --recompute" if need["recompute"] else "")
        sizes = (need[part] for part in ("weights", "gradients", "optimizer", "activations", "total"))
        table.add_row(name, f"{need['trained']:,}", *(f"{size / 1e9:.2f}" for size in sizes))
    return f"""\
{model}: memory of fastblt finetune in GB (1e9 bytes), micro-batches of {rows:,} rows of {row_bytes:,} bytes

{drawn(table)}

Weights and gradients in float32 where they are trained, frozen weights and products in bfloat16. Optimizer: Muon's
momentum of matrices, AdamW's two averages of the rest. Activations: what a pass keeps for its gradients. Not counted:
the buffers of single operations, and torch itself."""


def _headline(s: Sizing) -> str:
    matrices = ", large matrices in float8" if s.float8 else ""
    hashes = f"hash tables of {s.hash_itemsize} bytes a number"
    return f"{s.model}: {s.parameters:,} parameters in {s.dtype}{matrices}; {hashes}"


def _weights(s: Sizing) -> str:
    rows = [(stage, count, "all read in each call of the stage") for stage, count in s.weights.stages.items()]
    tables = {
        "byte tables": s.weights.byte_tables,
        "hash tables": s.weights.hash_tables,
        "rotary tables": s.weights.rotary_tables,
    }
    rows += [(name, count, "a few rows read per byte") for name, count in tables.items()]
    return drawn(_bytes_table("weights", [*rows, ("total", s.weights.total, "")]))


def _caches(s: Sizing) -> str:
    table = number_table(
        f"cache of a sequence of {s.context:,} bytes", "row", "bytes a row", "rows", "pages", "bytes", ""
    )
    for name, held in s.caches.items():
        size = (f"{held.num_bytes:,}", format_size(held.num_bytes))
        table.add_row(name, held.row, f"{held.bytes_per_row:,}", f"{held.rows:,}", f"{held.pages:,}", *size)
    table.add_row("total", "", "", "", "", f"{s.sequence_bytes:,}", format_size(s.sequence_bytes))
    return drawn(table)


def _memory(s: Sizing) -> str:
    rows = [
        ("weights", s.weights.total, ""),
        ("caches", s.cache_bytes, f"for {s.sequences:,} sequences at once"),
        (
            "reserve",
            s.memory_needed - s.weights.total - s.cache_bytes,
            f"{s.reserve:.0%} for activations, CUDA graphs, the driver",
        ),
        ("needed", s.memory_needed, ""),
    ]
    if s.memory is not None:
        if s.sequences_fitting:
            fits = f"enough for {s.sequences_fitting:,} sequences of this length"
        elif s.weights.total < s.memory * (1 - s.reserve):
            fits = "too little for one sequence of this length"
        else:
            fits = "too little for the weights"
        rows.append(("given", s.memory, fits))
    return drawn(_bytes_table("memory", rows))


def _flags(s: Sizing, model: str) -> str:
    weights = " --weights float8" if s.float8 else ""
    return (
        f"fastblt serve {model} --dtype {s.dtype}{weights} --max-sequences {s.max_sequences} "
        f"--max-step-rows {s.max_step_rows} --cache-bytes {s.cache_bytes}\n"
        f"With these flags a sequence may have up to {s.max_length:,} bytes and up to {s.max_patches:,} patches."
    )


def _decoders(s: Sizing) -> str:
    calls = ("bytes\na round", "decoder\ncalls", "global\ncalls")
    crowd = f"{s.sequences:,} together"
    bounds = [] if s.bandwidth is None else ["bound alone\nbytes/s", f"{crowd}\nbytes/s"]
    table = number_table("decoder", *calls, "formula\nbytes", "read alone\nbytes", f"{crowd}\nbytes", *bounds)
    for r in s.decoders:
        row = [f"{r.committed:.2f}", f"{r.decoder_calls:.3f}", f"{r.global_calls:.3f}"]
        row += [f"{read:,.0f}" for read in (r.estimated_bytes, r.bytes_read, r.shared_bytes_read)]
        row += [f"{bound:,.0f}" for bound in (r.bytes_per_second, r.shared_bytes_per_second) if bound is not None]
        table.add_row(r.decoder, *row)
    return drawn(table)


def _notes(s: Sizing, text: Text) -> str:
    drafting = s.drafting
    numbers = {
        "patch_size": f"a patch has {s.patch:.4g} bytes on average",
        "acceptance": f"blt-s drafts {drafting.draft_length} bytes per round; {drafting.acceptance:.1%} are accepted",
        "block_acceptance": f"blt-dv drafts a block per round; {drafting.block_acceptance:.1%} of it is accepted",
        "block_passes": f"blt-d takes {drafting.block_passes:.3g} decoder passes per block",
    }
    lines = [
        f"Calls and bytes are per generated byte, at {s.context:,} bytes of context; prompts are not counted. Alone:",
        "one sequence. Together: all in the same steps, so that they share each read of the weights. auto is not",
        "listed: for each round it takes the fastest of the decoders that write the text of blt.",
        *(f"* {what}: {text.sources[name]}" for name, what in numbers.items() if name in text.sources),
    ]
    if s.bandwidth is not None:
        lines.append(f"* bound: {s.bandwidth:,.0f} bytes/s of bandwidth / bytes read, as if only reading took time")
    return "\n".join(lines)


def _bytes_table(name: str, rows: list[tuple[str, int, str]]) -> Table:
    """A row per part: its bytes, the same for people, and a note."""
    table = number_table(name, "bytes", "")
    table.add_column("")
    for what, count, note in rows:
        table.add_row(what, f"{count:,}", format_size(count), note)
    return table
