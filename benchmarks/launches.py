"""Counts every launch on the device that a byte takes: Triton's kernels, torch's own operations, and copies.

`python -m benchmarks.launches` runs the stages of a preset in Fast-BLT's form on tensors without storage, as the
engine's recordings hold them, for one request, and counts what each call launches. With the Fast BLT paper's rates of
calls, as measured with the replayed acceptance of the GPU check, that gives the launches of a committed byte. A view or
an allocation is no launch; an operation of torch that a device does in two counts as two.
"""

import os

if __name__ == "__main__":
    # Nothing is computed, and nothing need be compiled. Triton reads this when the kernels are defined.
    os.environ["TRITON_INTERPRET"] = "1"

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from engine.checkpoint import PRESETS, expected_shapes
from engine.config import EngineConfig, ModelConfig
from engine.memory.caches import Caches
from engine.model import Model
from engine.step.blocks import BlockPasses
from engine.step.sampling import draw_ids
from kernels import gate
from kernels.attention import AttentionPlan
from kernels.boundary import Rule
from kernels.closing import Sizes, Tables
from kernels.dispatch import TritonKernels
from kernels.embedding import Ids
from kernels.pooling import PageTable
from kernels.text import Text

from .models import shaped

META = torch.device("meta")
TWICE = {"index_fill", "index_copy", "masked_fill", "index_put", "scatter", "constant_pad_nd"}
"""Operations that copy their input first."""
NO_LAUNCH = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
AROUND = {"copy of the inputs": 1, "copy of the output": 1}
"""What a recording launches besides its stage."""


class Rates(NamedTuple):
    """Calls of a round, and the bytes that it commits."""

    local: float
    """Of patcher and encoder."""
    global_: float
    drafts: float
    """Passes of the decoder over single bytes."""
    blocks: float
    """Passes over blocks of cells."""
    bytes: float


RATES = {
    "blt": Rates(1, 0.351, 1, 0, 1),
    "blt-s k=8": Rates(1, 1, 8.83, 0, 7.78),
    "blt-d B=8": Rates(1, 1, 0, 3, 8),
    "blt-dv B=8": Rates(1, 1, 1, 1, 7.60),
}


class Watch(TorchDispatchMode):
    """Counts launches by name, and runs no kernel."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_LAUNCH:
            self.counts[name] += 2 if name in TWICE else 1
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        def kernel(executor: GridExecutor, *_: Any, **__: Any) -> None:
            self.counts[executor.fn.__name__] += 1

        with mock.patch.object(GridExecutor, "__call__", kernel), self:
            yield


def calls(config: ModelConfig, rows: int = 1) -> dict[str, Counter[str]]:
    """What a call of each stage launches, for so many sequences: "patcher", "encoder", "global", "decoder", a pass
    over single bytes, and "blocks", one over blocks of 8 cells."""
    tensors = {n: torch.empty(s, dtype=torch.bfloat16, device=META) for n, s in expected_shapes(config).items()}
    kernels = TritonKernels()
    model = Model(config, tensors, torch.bfloat16, META, kernels)
    caches = Caches(config, EngineConfig(model="", dtype="bfloat16", max_length=4096, device="meta"))  # type: ignore[arg-type]

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=META)

    def plan(queries: int) -> AttentionPlan:
        where = ints(queries), ints(queries), ints(queries)
        arrays = *where, ints(queries), ints(queries), ints(queries, 5), ints(10 * queries)
        return AttentionPlan.of(*arrays, most_pages=8)

    def of_bytes(dtype: torch.dtype) -> Tensor:
        return torch.empty(4096, dtype=dtype, device=META)

    text = Text(ints(4096), of_bytes(torch.float32), of_bytes(torch.int32), of_bytes(torch.int32))
    table, width = PageTable(ints(rows, 16), ints(rows)), 8
    of_open, of_global, of_latent = (caches.specs[name].page_size for name in ("open", "global", "latent"))
    sizes = Sizes(of_open, of_global, of_latent, config.slots, 4)
    # Made before: the arrays of a recording are parts of one.
    plans = {n: plan(n) for n in {rows, rows * width, rows * config.slots}}
    at, cells, spans, blocks = ints(rows), ints(rows * width), ints(rows, 4), ints(5, rows)
    slots = ints(rows * config.slots)

    def patcher() -> None:
        entropies = model.patcher(Ids(text.ids, at), caches.patcher, plans[rows])
        kernels.boundaries(entropies, text, spans, Rule(1.0, longest=8))

    def encoder() -> None:
        opened = caches.open_states, caches.open_kv, plans[rows]
        model.encoder(text.ids, at, caches.encoder, plans[rows], *opened)

    def global_() -> None:
        """Launched before the host knows whether a patch has closed."""
        found = kernels.closing(text, at, at, at, Tables(table, table, table, at), sizes)
        with gate.under(found.any):
            pooled = model.encoder.close(
                caches.open_states, caches.open_kv, table, at, at, at, plans[rows * config.slots]
            )
            latents = model.global_transformer(pooled, caches.global_, plans[rows])
            model.decoder.write_latents(latents, caches.latent, slots, slots)

    def decode(places: Tensor) -> Tensor:
        page, offset = kernels.latent_places(text, places, places, places, table, of_latent, config.slots)
        of = plans[len(places)]
        return model.decoder(Ids(text.ids, places), caches.latent, page, offset, caches.decoder, of, places)

    def decoder() -> None:
        drawn, _ = draw_ids(decode(at), {}, None, kernels)
        text.ids.index_copy_(0, at, drawn)

    passes = BlockPasses(kernels, text.ids, blocks, width, mask_id=260)

    def over_blocks() -> None:
        allowed = passes.allowed(decode(cells))
        drawn, _ = draw_ids(allowed, {}, None, kernels)
        passes.settle(allowed, drawn)

    stages: dict[str, Callable[[], None]] = {
        "patcher": patcher, "encoder": encoder, "global": global_, "decoder": decoder, "blocks": over_blocks
    }  # fmt: skip
    found = {}
    for name, stage in stages.items():
        # What is made once, such as tables of addresses, is made in the first call.
        for _ in range(2):
            watch = Watch()
            with watch.watching():
                stage()
        found[name] = watch.counts
    return found


def per_byte(of_calls: dict[str, Counter[str]], rates: Rates) -> float:
    """Launches of a committed byte. A round of passes is one recording."""
    total = {name: counts.total() for name, counts in of_calls.items()}
    around = sum(AROUND.values())
    local = total["patcher"] + total["encoder"] + 2 * around
    passes = rates.drafts * total["decoder"] + rates.blocks * total["blocks"]
    recordings = (rates.drafts > 0) + (rates.blocks > 0)
    return (
        rates.local * local + rates.global_ * (total["global"] + around) + passes + recordings * around
    ) / rates.bytes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument("--model", choices=PRESETS, default="1b")
    found = calls(shaped(parser.parse_args().model, "fast"))
    print("| call | launches | of which |\n|---|---|---|")
    for name, counts in found.items():
        parts = ", ".join(f"{count} {of.removesuffix('_kernel')}" for of, count in counts.most_common())
        print(f"| {name} | {counts.total()} | {parts} |")
    print("\n| decoder | launches a byte |\n|---|---|")
    for name, rates in RATES.items():
        print(f"| {name} | {per_byte(found, rates):.0f} |")


if __name__ == "__main__":
    main()
