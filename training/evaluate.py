"""Evaluates a model with block diffusion on its held-out files: `python -m training.evaluate models/nano`. `fastblt
eval` gives the bits per byte of any model on any files; only this command scores masked bytes."""

import argparse
import json
import lzma
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from engine import checkpoint
from engine.config import PAD_ID, ModelConfig, flag_help
from kernels.linear import quantize

from . import model, objective
from .continuing import continuing
from .corpus import Corpus, corpora
from .device import chosen_device
from .loops import looping
from .state import PATCHER

ROWS_AT_ONCE = 8
EVALUATED_BYTES = 1 << 20
"""Of held-out files, which take a few minutes: a sample by a hash of their names."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """bits_per_byte: of next bytes, an EOS per file included. xz_bits_per_byte: `xz -9` of the same files as one.

    byte_accuracy: share of next bytes predicted. masked_accuracy: share of cells predicted in fully masked blocks, by
    place in the block. kept: of blocks drafted in one step from anywhere, the share of bytes up to the first that the
    model's own greedy continuation does not have: of the bytes in the first half of each block, and of all its bytes.
    That is what `blt-dv` keeps, except that no patch ends inside. mean_patch: bytes per patch.
    """

    bytes: int
    bits_per_byte: float
    xz_bits_per_byte: float
    byte_accuracy: float
    masked_accuracy: float
    masked_accuracy_by_place: tuple[float, ...]
    kept: tuple[float, float]
    mean_patch: float
    context: int


@torch.no_grad()
def evaluate(config: ModelConfig, weights: model.Weights, corpus: Corpus, context: int = 1024) -> Evaluation:
    """Reads all of `corpus` in slices of `context` bytes, each a separate text that begins with BOS, on the device of
    `weights`.

    Raises ValueError for a model without block diffusion, and for a context that is shorter than a block.
    """
    block_size = _block_size(config)
    if context < block_size:
        raise ValueError(f"--context {context}: must be at least {block_size}, the bytes of a block")
    rows, device = corpus.slices(context), next(iter(weights.values())).device
    draw = torch.Generator().manual_seed(0)
    nats = asked = right = patches_seen = bytes_seen = 0.0
    hits, cells, kept, drafted = torch.zeros(4, block_size, device=device)
    for row in tqdm(rows.split(ROWS_AT_ONCE), desc="evaluating", disable=not sys.stderr.isatty()):
        row = row.to(device)
        ids, wanted = row[:, :-1], row[:, 1:]
        text = wanted != PAD_ID
        patches = model.patch(config.patching, model.entropies(config, weights, ids))
        corruption = objective.corrupt(config, row, patches, max(1, context // 32), draw, rate=1.0)
        clean = model.clean_rows(config, weights, ids, patches, torch.float32)
        continued = continuing(config, weights, clean, torch.float32)
        few = max(1, context // 128)
        own = objective.corrupt(config, row, patches, few, draw, 1.0, own_share=1.0, continued=continued)
        rows_of_blocks = model.block_rows(
            config, weights, clean, model.joined(corruption.blocks, own.blocks), torch.float32
        )
        of_cells = model.logits(config, weights, rows_of_blocks, torch.float32).argmax(-1)
        blocks, drafts = of_cells.split([corruption.targets.shape[1], own.targets.shape[1]], 1)
        found = model.logits(config, weights, clean.rows, torch.float32)
        nats += float(F.cross_entropy(found[text], wanted[text], reduction="sum"))
        right += float((found.argmax(-1) == wanted)[text].sum())
        asked += float(text.sum())
        hit = (blocks == corruption.targets) & corruption.scores
        hits += hit.sum((0, 1))
        cells += corruption.scores.sum((0, 1))
        same = (drafts == own.targets) & own.scores
        kept += same.long().cumprod(-1).sum((0, 1))
        drafted += own.scores.sum((0, 1))
        inside = text.sum(1, keepdim=True)
        patches_seen += float((patches.starts < inside).sum())
        bytes_seen += float(inside.sum())
    packed = lzma.compress(b"".join(corpus.texts), preset=9)
    return Evaluation(
        bytes=corpus.num_bytes,
        bits_per_byte=nats / math.log(2) / corpus.num_bytes,
        xz_bits_per_byte=8 * len(packed) / corpus.num_bytes,
        byte_accuracy=right / asked,
        masked_accuracy=float(hits.sum() / cells.sum()),
        masked_accuracy_by_place=tuple(round(float(share), 4) for share in hits / cells),
        kept=(_share(kept, drafted, block_size // 2), _share(kept, drafted, block_size)),
        mean_patch=bytes_seen / patches_seen,
        context=context,
    )


def _share(kept: Tensor, drafted: Tensor, size: int) -> float:
    return round(float(kept[:size].sum() / drafted[:size].sum()), 4)


def _block_size(config: ModelConfig) -> int:
    if config.block_size is None:
        why = "was not trained with block diffusion, which this measures"
        raise ValueError(f"{config.name} {why}; `fastblt eval --model FOLDER FILE...` scores any model")
    return config.block_size


def as_float8(weights: model.Weights) -> dict[str, Tensor]:
    """The weights as rounded by an engine with `weights="float8"`, in float32."""

    def rounded(name: str, weight: Tensor) -> Tensor:
        if name.startswith(PATCHER) or not name.endswith(("_proj.weight", "_projection.weight")):
            return weight
        data, scale = quantize(weight)
        assert scale is not None
        return data.float() * scale[:, None]

    return {name: rounded(name, weight) for name, weight in weights.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__)
    parser.add_argument("model", type=Path, help="a model folder")
    parser.add_argument("--context", type=int, default=1024, help="bytes per slice of a file")
    most = "bytes of held-out files, a sample of them (default 1 MiB)"
    parser.add_argument("--held-out-bytes", type=int, default=EVALUATED_BYTES, help=most)
    parser.add_argument("--float8", action="store_true", help="round the matrices that `--weights float8` rounds")
    parser.add_argument(
        "--corpus", type=Path, help="archive of python -m training.corpus (default: this Python's library)"
    )
    device_help = f"{flag_help('device', phrase=True)} (default cpu)"
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help=device_help)
    options = parser.parse_args(arguments)
    try:
        device = chosen_device(options.device)
        loaded = checkpoint.load(options.model)
        _block_size(loaded.config)
        weights = {name: tensor.float().to(device) for name, tensor in loaded.tensors.items()}
        if options.float8:
            weights = as_float8(weights)
        held_out = corpora(options.corpus)[1]
        result = evaluate(loaded.config, weights, held_out.sample(options.held_out_bytes), options.context)
        loops = looping(options.model, held_out, "float8" if options.float8 else None, options.device)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(asdict(result) | {"looping": loops}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
