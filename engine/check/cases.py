"""Every operation of `Kernels` with drawn operands: the one table by which backends are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.boundary import Rule
from kernels.closing import Sizes, Tables
from kernels.dispatch import Kernels
from kernels.embedding import Ids
from kernels.hash_embed import HashTables
from kernels.linear import Matrix, quantize
from kernels.pooling import PageTable
from kernels.rope import rope_table
from kernels.stack import CrossCache, CrossKvWeights, HeadWeights, KvCache, LayerWeights, SlotsWeights, StackWeights
from kernels.text import Text
from kernels.unmasking import Blocks

from .operands import LONGEST, Draw, Laid

HEADS, KV_HEADS, HEAD_DIM, DIM, FFN_DIM = 4, 2, 16, 48, 80
"""Small, and not all of them powers of two."""
QKV, KV, INNER = (HEADS + 2 * KV_HEADS) * HEAD_DIM, 2 * KV_HEADS * HEAD_DIM, HEADS * HEAD_DIM
PAGE_SIZE, SLOTS, IDS, POSITIONS = 16, 2, 260, 400
EPS = 1e-5

Row = int | None
"""One row by itself, or all."""
Run = Callable[[Kernels, Row], list[Tensor]]


@dataclass(frozen=True, slots=True)
class Case:
    """An operation with its operands. run: what it gives for one row or for all, the first axis being the rows. exact:
    whether backends agree to the bit."""

    rows: int
    run: Run
    exact: bool = False


Operation = Callable[[Draw, torch.dtype, int], Case]
"""An operation with operands drawn in a dtype for so many rows."""


def of(tensor: Tensor, row: Row) -> Tensor:
    """The row, aligned as a tensor of its own."""
    return tensor if row is None else tensor[row : row + 1].clone()


def linear(
    out: int = 70, width: int = 150, *, norm: bool = False, gated: bool = False, residuals: int = 0, fp8: bool = False
) -> Operation:
    """residuals: 0, 1, or 2 for one that counts twice."""

    def drawn(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
        x = draw.randn(rows, width, dtype=dtype)
        weight = draw.randn(out * (1 + gated), width, dtype=dtype) * width**-0.5
        matrix = quantize(weight) if fp8 else Matrix(weight)
        scale = draw.randn(width, dtype=dtype) if norm else None
        residual = draw.randn(rows, out, dtype=dtype) if residuals else None

        def run(k: Kernels, row: Row) -> list[Tensor]:
            beside = None if residual is None else of(residual, row)
            how: dict[str, Any] = {"norm": scale, "eps": EPS, "gated": gated, "residual": beside}
            return [k.linear(of(x, row), k.matrix(matrix), **how, twice=residuals == 2)]

        return Case(rows, run)

    return drawn


def picked(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    """A head: some rows, in any order, to wide logits, which are rounded to `dtype` all the same."""
    x, norm, which = draw.randn(rows + 5, DIM, dtype=dtype), draw.randn(DIM, dtype=dtype), draw.below(rows + 5, rows)
    matrix = Matrix(draw.randn(IDS, DIM, dtype=dtype) * DIM**-0.5)

    def run(k: Kernels, row: Row) -> list[Tensor]:
        y = k.linear(x, k.matrix(matrix), norm=norm, eps=EPS, rows=of(which, row), wide=True)
        assert y.dtype == torch.float32
        return [y.to(dtype), (y != y.to(dtype)).sum(1)]

    return Case(rows, run)


def joined(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    x, parts = draw.randn(rows, DIM, dtype=dtype), [draw.randn(n, DIM, dtype=dtype) * DIM**-0.5 for n in (40, 30)]
    return Case(rows, lambda k, row: [k.linear(of(x, row), k.join(parts))])


def attention(of_each: int, mutual: int = 0, window: int = 0) -> Operation:
    """of_each, mutual: as `Draw.sequences` takes them."""

    def drawn(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
        laid = Laid((PAGE_SIZE, window, draw.sequences(rows, of_each, mutual)), draw, padded=0)
        keys, values = draw.randn(2, laid.num_pages, KV_HEADS, PAGE_SIZE, HEAD_DIM, dtype=dtype)
        q = draw.randn(rows, HEADS, HEAD_DIM, dtype=dtype)
        return Case(rows, lambda k, row: [k.attention(of(q, row), keys, values, laid.of(row))])

    return drawn


def places(draw: Draw, rows: int) -> tuple[int, Tensor, Tensor]:
    """How many pages of 4 rows a cache has, and the page and offset of each row in it: all different."""
    pages = rows // 4 + 2
    at = torch.tensor(draw.shuffled(4 * pages)[:rows], device=draw.device)
    return pages, at // 4, at % 4


def stored(cache: Tensor, page: Tensor, offset: Tensor, row: Row) -> list[Tensor]:
    """What was written into a cache of zeros for these rows, and how many other cells were."""
    at = of(page, row), of(offset, row)
    cells = cache[at] if cache.ndim == 3 else cache[at[0], :, at[1]]
    return [cells, (cache.count_nonzero() - cells.count_nonzero()).expand(len(cells))]


def qkv(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    x, norm = draw.randn(rows, DIM, dtype=dtype), draw.randn(DIM, dtype=dtype)
    matrix, rope = Matrix(draw.randn(QKV, DIM, dtype=dtype) * DIM**-0.5), rope_table(HEAD_DIM, 1e4, 64, draw.device)
    positions, (pages, page, offset) = draw.below(64, rows), places(draw, rows)

    def run(k: Kernels, row: Row) -> list[Tensor]:
        keys, values = x.new_zeros(2, pages, KV_HEADS, 4, HEAD_DIM)
        at = of(positions, row), of(page, row), of(offset, row)
        q = k.qkv(of(x, row), k.matrix(matrix), norm, EPS, rope, *at, keys, values)
        return [q, *stored(keys, page, offset, row), *stored(values, page, offset, row)]

    return Case(rows, run)


def keys_values(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    x, norm = draw.randn(rows, DIM, dtype=dtype), draw.randn(DIM, dtype=dtype)
    matrix, (pages, page, offset) = Matrix(draw.randn(KV, DIM, dtype=dtype) * DIM**-0.5), places(draw, rows)

    def run(k: Kernels, row: Row) -> list[Tensor]:
        keys, values = x.new_zeros(2, pages, KV_HEADS, 4, HEAD_DIM)
        states, at = x.new_zeros(pages, 4, DIM), (of(page, row), of(offset, row))
        k.keys_values(of(x, row), CrossKvWeights(norm, k.matrix(matrix), HEAD_DIM, EPS), (keys, values), *at, states)
        return [found for cache in (keys, values, states) for found in stored(cache, page, offset, row)]

    return Case(rows, run)


def read_slots(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    keys, values = draw.randn(2, 5, KV_HEADS, 3 * SLOTS, HEAD_DIM, dtype=dtype)
    q, x = draw.randn(rows, HEADS, HEAD_DIM, dtype=dtype), draw.randn(rows, DIM, dtype=dtype)
    o, page, offset = (
        Matrix(draw.randn(DIM, INNER, dtype=dtype) * INNER**-0.5),
        draw.below(5, rows),
        draw.below(3, rows),
    )

    def run(k: Kernels, row: Row) -> list[Tensor]:
        at = of(page, row), of(offset * SLOTS, row)
        return [k.read_slots(of(q, row), keys, values, *at, SLOTS, k.matrix(o), of(x, row))]

    return Case(rows, run)


def embed(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    text, table = draw.text(3), draw.randn(IDS, DIM, dtype=dtype)
    at, _ = draw.bytes_of(3, rows)
    return Case(rows, lambda k, row: [k.embed(text.ids, of(at, row), table)], exact=True)


def hash_embed(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    tables = HashTables([draw.randn(500, DIM, dtype=dtype) for _ in range(6)], (3, 4, 8), 2, 500, draw.device)
    text, embedding, (at, positions) = draw.text(3), draw.randn(IDS, DIM, dtype=dtype), draw.bytes_of(3, rows)
    return Case(rows, lambda k, row: [k.hash_embed(text.ids, of(at, row), of(positions, row), embedding, tables)])


def patch_max(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    num_pages, table, *patches = draw.pooled([number % 7 for number in range(rows)], 5)
    cache = draw.randn(num_pages, 5, DIM, dtype=dtype)
    return Case(rows, lambda k, row: [k.patch_max(cache, table, *(of(p, row) for p in patches))], exact=True)


def entropy(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    logits = draw.randn(rows, IDS, dtype=dtype) * 3
    return Case(rows, lambda k, row: [k.entropy(of(logits, row))])


def boundaries(rule: Rule) -> Operation:
    """A sequence for each row, of one to four bytes."""

    def drawn(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
        entropies, text, spans = draw.patches([(1 + number % 4, number % 6) for number in range(rows)])

        def run(k: Kernels, row: Row) -> list[Tensor]:
            # It writes into the text.
            own = Text(*(tensor.clone() for tensor in text))
            found = k.boundaries(entropies, own, of(spans, row), rule)
            some = range(rows) if row is None else [row]
            numbers = spans.tolist()
            seen = [torch.zeros(4, 4) for _ in some]
            for values, (first, count, at, _) in zip(seen, (numbers[i] for i in some), strict=True):
                values[:2, :count] = found[:, first : first + count]
                values[2, :count] = own.patch[at + 1 : at + count + 1]
                values[3, :count] = own.patch_start[at + 1 : at + count + 1]
            return [torch.stack(seen)]

        return Case(rows, run, exact=True)

    return drawn


def closing(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    slots = 3
    text, sizes = draw.text(slots), Sizes(8, 4, 4, SLOTS, 4)
    opened, patches, latents = (page_table(draw, slots, size) for size in sizes[:3])
    tables = Tables(opened, patches, latents, draw.below(1, slots))
    at, positions = draw.bytes_of(slots, rows)

    def run(k: Kernels, row: Row) -> list[Tensor]:
        found = k.closing(text, of(at, row), of(positions, row), of(at // LONGEST, row), tables, sizes)
        places = (t.view(-1, SLOTS) for t in (found.page, found.offset, found.pooling.first, found.pooling.last))
        return [found.begin, found.after, found.plan.page, found.plan.first, found.plan.last, *places]

    return Case(rows, run, exact=True)


def page_table(draw: Draw, slots: int, page_size: int) -> PageTable:
    """Pages for whole texts."""
    count = LONGEST // page_size + 1
    pages = torch.tensor(draw.shuffled(slots * count), device=draw.device).view(slots, count) + 1
    return PageTable(pages, torch.zeros(slots, dtype=torch.int64, device=draw.device))


def latent_places(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    text, table, (look, _), closed = draw.text(3), page_table(draw, 3, 4), draw.bytes_of(3, rows), draw.below(2, rows)

    def run(k: Kernels, row: Row) -> list[Tensor]:
        own = of(look, row)
        return [k.latent_places(text, own, of(closed, row), own // LONGEST, table, 4, SLOTS).T.contiguous()]

    return Case(rows, run, exact=True)


def confidence_and_entropy(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    logits = draw.randn(rows, IDS) * 3
    logits[:, :3] = -torch.inf
    return Case(rows, lambda k, row: list(k.confidence_and_entropy(of(logits, row))))


def unmask(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    """A block of 8 cells for each row."""
    masked, confidence, entropies = draw.below(3, rows, 8) > 0, *draw.uniform(2, rows, 8).float()
    how = masked, confidence, entropies, draw.below(4, rows), draw.uniform(rows) * 3
    return Case(rows, lambda k, row: [k.unmask(*(of(t, row) for t in how))], exact=True)


def settle(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    """A block of 8 cells for each row. Logits in steps, so that figures are equal or far apart."""
    logits, drawn = draw.below(9, rows, 8, IDS).float(), draw.below(256, rows, 8)
    ids, rules, bounds = draw.below(3, rows, 8) + IDS - 2, draw.below(4, rows), draw.uniform(rows) * 3
    first = torch.arange(rows, device=draw.device) * 8

    def run(k: Kernels, row: Row) -> list[Tensor]:
        text, own = ids.flatten().clone(), of(first, row)
        begin = own if row is None else own - own
        blocks = Blocks(begin, torch.full_like(own, 8), own, of(rules, row), of(bounds, row))
        cells = own.new_empty(3, len(own), 8)
        k.settle(cells, text, of(logits, row).flatten(0, 1), of(drawn, row).flatten(), blocks, 0, IDS)
        return [*cells, of(text.view(rows, 8), row)]

    return Case(rows, run, exact=True)


def argmax(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    """With ties."""
    logits = draw.below(5, rows, IDS).float()
    return Case(rows, lambda k, row: list(k.argmax(of(logits, row))), exact=True)


def sample(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    how = draw.randn(rows, IDS) * 3, draw.params(rows, IDS), draw.uniform(rows)
    return Case(rows, lambda k, row: [k.sample(*(of(t, row) for t in how))], exact=True)


def accepted(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    how = draw.below(2, rows, 9), draw.below(2, rows, 9), draw.below(10, rows)
    return Case(rows, lambda k, row: [k.accepted(*(of(t, row) for t in how))], exact=True)


def stack(kind: Literal["head", "slots", "cross_kv"]) -> Operation:
    """Two layers of a decoder that reads slots, or of an encoder that writes them, or of a patcher. A row by itself
    finds what all rows have left in the caches."""

    def drawn(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
        laid = Laid((PAGE_SIZE, 0, draw.sequences(rows, 3, 2)), draw, padded=0)
        rope = rope_table(HEAD_DIM, 1e4, POSITIONS, draw.device)

        def matrix(out: int, width: int) -> Tensor:
            scaled: Tensor = draw.randn(out, width, dtype=dtype) * width**-0.5
            return scaled

        def norm() -> Tensor:
            return draw.randn(DIM, dtype=dtype)

        of_layers = [
            {
                "attention_norm": norm(),
                "qkv": matrix(QKV, DIM),
                "o": matrix(DIM, INNER),
                "ffn_norm": norm(),
                "gate_up": matrix(2 * FFN_DIM, DIM),
                "down": matrix(DIM, FFN_DIM),
            }
            for _ in range(2)
        ]
        of_slots = [
            {"norm": norm(), "q": matrix(INNER, DIM), "o": matrix(DIM, INNER)} for _ in range(2 * (kind == "slots"))
        ]
        of_keys = [{"norm": norm(), "kv": matrix(KV, DIM)} for _ in range(kind == "cross_kv")]
        of_head = {"norm": norm(), "matrix": matrix(IDS, DIM)}
        embedding = draw.randn(IDS, DIM, dtype=dtype)
        ids, x = draw.below(IDS, rows), draw.randn(rows, DIM, dtype=dtype)
        places = torch.arange(rows, device=draw.device)
        cache = draw.randn(2, 2, laid.num_pages, KV_HEADS, PAGE_SIZE, HEAD_DIM, dtype=dtype)
        slots = draw.randn(2, 2, rows, KV_HEADS, 3 * SLOTS, HEAD_DIM, dtype=dtype)
        page, offset = torch.tensor(draw.shuffled(rows), device=draw.device), draw.below(3, rows) * SLOTS
        wanted = torch.arange(rows, device=draw.device)

        def run(k: Kernels, row: Row) -> list[Tensor]:
            def packed(weights: dict[str, Tensor]) -> dict[str, Any]:
                return {name: k.matrix(Matrix(w)) if w.ndim == 2 else w for name, w in weights.items()}

            heads: dict[str, Any] = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "eps": EPS}
            function = k.stack(
                StackWeights(
                    [LayerWeights(rope=rope, **packed(w), **heads) for w in of_layers],
                    embedding=embedding if kind == "head" else None,
                    slots=[SlotsWeights(slots=SLOTS, **packed(w), **heads) for w in of_slots],
                    cross_kv=[CrossKvWeights(head_dim=HEAD_DIM, eps=EPS, **packed(w)) for w in of_keys],
                    head=None if kind == "cross_kv" else HeadWeights(eps=EPS, **packed(of_head)),
                )
            )
            own, others, states = cache.clone(), slots.clone(), x.new_zeros(rows, 3 * SLOTS, DIM, dtype=dtype)

            def pass_of(row: Row) -> Tensor:
                beside = CrossCache(caches(others), of(page, row), of(offset, row), states if of_keys else None)
                some = wanted[: len(of(wanted, row))] if kind == "head" else None
                cross = None if kind == "head" else beside
                read = Ids(ids, of(places, row)) if kind == "head" else of(x, row)
                return function(read, caches(own), laid.of(row), cross, some)

            y = pass_of(None)
            if row is not None:
                y = pass_of(row)
            plan = laid.of(row)
            # Some backends give wide logits, which are rounded all the same.
            found = [y.to(dtype), *(kv[plan.page, :, plan.offset] for layer in own for kv in layer)]
            at = of(page, row), of(offset, row)
            if of_keys:
                found += [states[at], *(kv[at[0], :, at[1]] for kv in others[0])]
            return found

        return Case(rows, run)

    return drawn


def caches(tensor: Tensor) -> KvCache:
    """A cache of (layers, 2, ...)."""
    return KvCache((keys, values) for keys, values in tensor)


def cross_kv(draw: Draw, dtype: torch.dtype, rows: int) -> Case:
    x, scale = draw.randn(rows, DIM, dtype=dtype), draw.randn(DIM, dtype=dtype)
    pages, page, offset = places(draw, rows)
    matrices = [draw.randn(KV, DIM, dtype=dtype) * DIM**-0.5 for _ in range(2)]

    def run(k: Kernels, row: Row) -> list[Tensor]:
        cache = x.new_zeros(2, 2, pages, KV_HEADS, 4, HEAD_DIM)
        function = k.cross_kv([CrossKvWeights(scale, k.matrix(Matrix(m)), HEAD_DIM, EPS) for m in matrices])
        function(of(x, row), caches(cache), of(page, row), of(offset, row))
        return [found for layer in cache for kv in layer for found in stored(kv, page, offset, row)]

    return Case(rows, run)


OPERATIONS: dict[str, Operation] = {
    "linear": linear(),
    "linear, long rows": linear(40, 2816),
    "linear, norm": linear(norm=True),
    "linear, norm, gated": linear(norm=True, gated=True),
    "linear, residual": linear(residuals=1),
    "linear, residual twice": linear(residuals=2),
    "linear, float8": linear(fp8=True),
    "linear, float8, norm, gated": linear(norm=True, gated=True, fp8=True),
    "linear, some rows, wide": picked,
    "join": joined,
    "attention, one row each": attention(1),
    "attention, drafts": attention(9),
    "attention, blocks": attention(5, mutual=4),
    "attention, window": attention(3, window=33),
    "qkv": qkv,
    "keys_values": keys_values,
    "read_slots": read_slots,
    "embed": embed,
    "hash_embed": hash_embed,
    "patch_max": patch_max,
    "entropy": entropy,
    "boundaries": boundaries(Rule(1.0)),
    "boundaries, monotonic": boundaries(Rule(0.3, monotonic=True, longest=3)),
    "closing": closing,
    "latent_places": latent_places,
    "confidence_and_entropy": confidence_and_entropy,
    "unmask": unmask,
    "settle": settle,
    "argmax": argmax,
    "sample": sample,
    "accepted": accepted,
    "stack, head": stack("head"),
    "stack, slots": stack("slots"),
    "stack, cross_kv": stack("cross_kv"),
    "cross_kv": cross_kv,
}
"""By the operation's name in `Kernels`, and the form after a comma."""
COMPOSED = ("settle", "join", "stack", "cross_kv")
"""Made of other operations where a backend has none of its own."""


def own(kernels: Kernels) -> list[str]:
    """Of `OPERATIONS`, those that are not torch's."""
    operations = {name: name.partition(",")[0] for name in OPERATIONS}
    return [
        name
        for name, operation in operations.items()
        if operation in COMPOSED or getattr(type(kernels), operation) is not getattr(Kernels, operation)
    ]
