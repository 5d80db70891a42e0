"""Every Triton kernel against its torch twin: on a CUDA device where there is one, else in Triton's interpreter.

Both get the same random operands; layouts are ragged and drawn: one row, no rows, lengths at the edges of pages.
"""

import inspect
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from itertools import product as pairs
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from kernels import attention as attention_file
from kernels.attention import AttentionPlan
from kernels.boundary import Rule
from kernels.dispatch import Kernels, TritonKernels, choose_kernels
from kernels.hash_embed import HashTables
from kernels.linear import Matrix, quantize
from kernels.norm import rms_norm, rms_norm_triton
from kernels.product import cut, product
from kernels.rope import rope_table
from kernels.stack import CrossKvWeights, KvCache
from kernels.unmasking import Blocks
from tests.operands import FLOATS, LONGEST, RULES, SEEDS, Draw, Laid, Layout, close, few, layouts
from tests.operands import TRITONS as DEVICE

TORCH, TRITON = Kernels(), TritonKernels()


def test_triton_and_torch_kernels_have_the_same_signatures() -> None:
    names = [name for name, value in vars(TritonKernels).items() if isinstance(value, staticmethod)]
    every = [name for name, value in vars(Kernels).items() if isinstance(value, staticmethod)]
    # Parts of `settle`, which Triton has as one kernel.
    assert names == [name for name in every if name not in ("confidence_and_entropy", "unmask")]
    for name in names:
        assert inspect.signature(getattr(TRITON, name)) == inspect.signature(getattr(TORCH, name)), name
        assert getattr(TRITON, name) is not getattr(TORCH, name)


def test_kernels_are_chosen_by_name_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_kernels(None, cuda).name == "triton"
    assert choose_kernels("torch", cuda).name == "torch"
    monkeypatch.setattr("kernels.lang.IN_INTERPRETER", False)
    with pytest.raises(ValueError, match="CUDA device, not 'cpu'.*TRITON_INTERPRET"):
        choose_kernels("triton", cpu)
    monkeypatch.setattr("kernels.lang.AVAILABLE", False)
    with pytest.raises(ValueError, match="not installed"):
        choose_kernels("triton", cuda)
    assert choose_kernels(None, cuda).name == "torch"


@few
@given(
    SEEDS, FLOATS, st.integers(1, 40), st.integers(1, 70), st.integers(1, 150), st.booleans(), st.booleans(),
    st.booleans(), st.integers(0, 2), st.booleans(),
)  # fmt: skip
def test_linear_equals_torch(
    seed: int, dtype: torch.dtype, rows: int, out: int, width: int, normed: bool, gated: bool, fp8: bool,
    residuals: int, picked: bool,
) -> None:  # fmt: skip
    draw = Draw(seed, DEVICE)
    x, weight = draw.randn(rows, width, dtype=dtype), draw.randn(out * (1 + gated), width, dtype=dtype) * width**-0.5
    how: dict[str, Any] = {
        "norm": draw.randn(width, dtype=dtype) if normed else None,
        "eps": 1e-5,
        "gated": gated,
        "residual": draw.randn(rows, out, dtype=dtype) if residuals else None,
        "twice": residuals == 2,
    }
    matrix = quantize(weight) if fp8 else Matrix(weight)
    found = TRITON.linear(x, matrix, **how)
    close(found, TORCH.linear(x, matrix, **how))
    if picked:
        chosen = draw.below(rows, rows)
        wide = TRITON.linear(x, matrix, rows=chosen, wide=True, **how)
        assert torch.equal(wide, TRITON.linear(x[chosen].contiguous(), matrix, **how).float())
    if residuals:
        how["residual"] = how["residual"][rows // 2 :].contiguous()
    assert torch.equal(TRITON.linear(x[rows // 2 :].contiguous(), matrix, **how), found[rows // 2 :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [40, 700, 3000])
def test_a_product_sums_in_the_order_of_the_law(dtype: torch.dtype, width: int) -> None:
    """One number in a segment, so that every rounding of a sum is one between segments, and these nearly cancel."""
    draw, x = Draw(width, DEVICE), torch.zeros(5, width, dtype=dtype, device=DEVICE)
    segment = cut(width, dtype).width
    columns = range(0, width, segment)
    x[:, columns] = draw.randn(5, len(columns), dtype=dtype)
    weight = draw.randn(7, width, dtype=dtype)
    weight[:, columns[0]] -= (x.float() @ weight.float().T)[0].to(dtype) / x[0, 0]
    found = TRITON.linear(x, Matrix(weight)).float()
    if DEVICE.type == "cpu" and dtype == torch.float32:
        assert torch.equal(found, product(x, weight))
    # A device adds the sums of the warps in an order of its own: an error of this size where they cancel.
    terms = x.float().abs() @ weight.float().abs().T
    assert ((found - product(x, weight)).abs() <= 2**-7 * found.abs() + 2**-23 * terms).all()


@few
@given(SEEDS, FLOATS, st.integers(1, 40), st.integers(1, 150))
def test_rms_norm_equals_torch(seed: int, dtype: torch.dtype, rows: int, width: int) -> None:
    draw = Draw(seed, DEVICE)
    x, weight = draw.randn(rows, width, dtype=dtype), draw.randn(width, dtype=dtype)
    found = rms_norm_triton(x, weight, 1e-5)
    close(found, rms_norm(x, weight, 1e-5))
    assert torch.equal(rms_norm_triton(x[-1:].contiguous(), weight, 1e-5), found[-1:])


def test_float8_quantization_keeps_three_bits_of_every_weight() -> None:
    weight = Draw(0, DEVICE).randn(20, 50)
    data, scale = quantize(weight)
    assert scale is not None
    error = (data.float() * scale[:, None] - weight).abs()
    # CrossCache the rounding of a mantissa of three bits, what is too small for the least exponent.
    assert bool((error <= weight.abs() * 2**-4 + scale[:, None] * 2**-9).all())
    assert quantize(torch.zeros(2, 3)).data.float().abs().sum() == 0


@few
@given(SEEDS, FLOATS, layouts(), st.sampled_from([(4, 4, 8), (4, 2, 16), (6, 2, 20), (1, 1, 32)]))
def test_attention_equals_torch(
    seed: int,
    dtype: torch.dtype,
    layout: Layout,
    shape: tuple[int, int, int],
) -> None:
    draw, (heads, kv_heads, head_dim) = Draw(seed, DEVICE), shape
    laid = Laid(layout, draw)
    caches = [draw.randn(laid.num_pages, kv_heads, laid.page_size, head_dim, dtype=dtype) for _ in range(2)]
    plan = laid.on_device()
    q = draw.randn(len(plan.first), heads, head_dim, dtype=dtype)
    unseen = unseen_rows(plan, laid.num_pages)
    for cache in caches:
        cache.transpose(1, 2)[unseen] = torch.nan
    with mock.patch.object(attention_file, "SCRATCH", 0):
        found = TRITON.attention(q, *caches, plan)
    rows = slice(0, laid.num_rows)
    assert found.isfinite().all()
    close(found[rows], TORCH.attention(q, *caches, plan)[rows])
    assert not found[laid.num_rows :].any(), "padding is zeros"


@settings(few, max_examples=6)
@given(SEEDS, FLOATS, layouts(most=2, longest=50))
def test_attention_split_in_any_order_of_programs_is_the_same_bits(
    seed: int, dtype: torch.dtype, layout: Layout
) -> None:
    q, k, v, plan = attended(seed, dtype, layout)
    with mock.patch.object(attention_file, "SCRATCH", 0):
        whole = TRITON.attention(q, k, v, plan)
    orders = (None, seed) if DEVICE.type == "cpu" else (None,)  # a device has an order of its own
    for order in orders:
        with programs_in_drawn_order(order) as ran, mock.patch.object(attention_file, "WHOLE", 512):
            assert torch.equal(TRITON.attention(q, k, v, plan), whole)
        assert not any(made.any() for made in attention_file._counters[q.device]), "reset by the last to arrive"
        if order is not None and plan.shape.most_pages > 1:
            assert len(ran) == plan.shape.tiles * plan.shape.most_pages and (len(ran) < 4 or ran != sorted(ran))


def unseen_rows(plan: AttentionPlan, num_pages: int) -> Tensor:
    """Which rows of a cache no row of its tiles sees, (pages, page size) bool: what others left there."""
    unseen = torch.ones(num_pages, plan.page_size, dtype=torch.bool, device=plan.tiles.device)
    for begin, count, at, first_page, pages in plan.tiles.tolist():
        if pages:
            low, high = int(plan.first[begin : begin + count].min()), int(plan.last[begin : begin + count].max())
            for key in range(low, high + 1):
                unseen[plan.pages[at + key // plan.page_size - first_page], key % plan.page_size] = False
    return unseen


def attended(seed: int, dtype: torch.dtype, layout: Layout) -> tuple[Tensor, Tensor, Tensor, AttentionPlan]:
    """Arguments of attention."""
    draw = Draw(seed, DEVICE)
    laid = Laid(layout, draw)
    k, v = (draw.randn(laid.num_pages, 1, laid.page_size, 8, dtype=dtype) for _ in range(2))
    plan = laid.on_device()
    return draw.randn(len(plan.first), 2, 8, dtype=dtype), k, v, plan


@contextmanager
def programs_in_drawn_order(seed: int | None) -> Iterator[list[tuple[int, int, int]]]:
    """The interpreter runs a kernel's programs in an order drawn from the seed, if any: in `set_grid_idx` it learns
    which is next. Gives the programs that ran."""
    if seed is None:
        yield []
        return
    builder = interpreter.interpreter_builder
    known, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, int, int]] = []
    ran: list[tuple[int, int, int]] = []

    def set_grid_dim(*grid: int) -> None:
        order[:] = [(x, y, z) for x, y, z in pairs(*map(range, grid))]
        random.Random(seed).shuffle(order)
        known(*grid)

    def set_grid_idx(*_: int) -> None:
        ran.append(order.pop())
        set_index(*ran[-1])

    with mock.patch.multiple(builder, set_grid_dim=set_grid_dim, set_grid_idx=set_grid_idx):
        yield ran


@settings(few, max_examples=3)
@given(SEEDS, FLOATS, layouts(most=1, longest=50))
def test_attention_does_not_depend_on_the_batch(seed: int, dtype: torch.dtype, layout: Layout) -> None:
    draw = Draw(seed, DEVICE)
    laid = Laid(layout, draw)
    caches = [draw.randn(laid.num_pages, 2, laid.page_size, 8, dtype=dtype) for _ in range(2)]
    plan = laid.on_device()
    q = draw.randn(len(plan.first), 4, 8, dtype=dtype)
    with mock.patch.object(attention_file, "WHOLE", 512):
        found = TRITON.attention(q, *caches, plan)
    # Every row in a tile of its own, over the pages of the tile that it was in.
    tiles = [
        [row, 1, *tile[2:]] for tile in plan.tiles.tolist() for row in range(tile[0], tile[0] + tile[1]) if tile[4]
    ]
    alone = AttentionPlan.of(
        plan.positions, plan.page, plan.offset, plan.first, plan.last,
        torch.tensor(tiles, device=DEVICE), plan.pages, page_size=laid.page_size,
    )  # fmt: skip
    assert torch.equal(TRITON.attention(q, *caches, alone)[: laid.num_rows], found[: laid.num_rows])


def test_the_longest_context_of_these_tests_spans_many_pages() -> None:
    """What the tests of split contexts rely on."""
    laid = Laid((4, 0, [(50, 1, 0, 0)]), Draw(0, DEVICE))
    assert laid.plan.shape.most_pages == 50 // 4 + 1


def test_counters_grow_by_doubling_and_earlier_ones_stay() -> None:
    made: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    with mock.patch.object(attention_file, "_counters", made):
        first, same, more = (attention_file.counters(n, DEVICE) for n in (3, 1000, 5000))
        assert first is same and [len(some) for some in made[DEVICE]] == [1024, 8192] and made[DEVICE][1] is more


@few
@given(SEEDS, FLOATS, st.integers(1, 40), st.sampled_from([(4, 4, 8), (6, 2, 20), (1, 1, 2)]), st.booleans())
def test_qkv_equals_torch(seed: int, dtype: torch.dtype, rows: int, shape: tuple[int, int, int], fp8: bool) -> None:
    draw, (heads, kv_heads, head_dim) = Draw(seed, DEVICE), shape
    out, width = (heads + 2 * kv_heads) * head_dim, heads * head_dim
    x, norm = draw.randn(rows, width, dtype=dtype), draw.randn(width, dtype=dtype)
    weight = draw.randn(out, width, dtype=dtype) * width**-0.5
    matrix = quantize(weight) if fp8 else Matrix(weight)
    places = torch.tensor(draw.shuffled(12 * 4)[:rows], device=DEVICE)
    how = rope_table(head_dim, 100.0, 50, DEVICE), draw.below(50, rows), places // 4, places % 4
    results = []
    for kernels, some in ((TORCH, slice(0, None)), (TRITON, slice(0, None)), (TRITON, slice(rows // 2, None))):
        caches = [torch.zeros(12, kv_heads, 4, head_dim, dtype=dtype, device=DEVICE) for _ in range(2)]
        q = kernels.qkv(
            x[some].contiguous(), matrix, norm, 1e-5, how[0], *(t[some].contiguous() for t in how[1:]), *caches
        )
        results.append((q, *(cache[how[2], :, how[3]] for cache in caches)))
    for expected, found in zip(*results[:2], strict=True):
        close(found, expected)
    assert torch.equal(results[2][0], results[1][0][rows // 2 :])
    for found, part in zip(results[1][1:], results[2][1:], strict=True):
        assert torch.equal(part[rows // 2 :], found[rows // 2 :]) and not part[: rows // 2].any()


@few
@given(SEEDS, FLOATS, st.integers(1, 40), st.integers(1, 3), st.sampled_from([(2, 20, 70), (4, 16, 64)]), st.booleans())
def test_keys_and_values_equal_torch(
    seed: int, dtype: torch.dtype, rows: int, layers: int, shape: tuple[int, int, int], fp8: bool
) -> None:
    draw, (kv_heads, head_dim, dim) = Draw(seed, DEVICE), shape
    places = torch.tensor(draw.shuffled(12 * 4)[:rows], device=DEVICE)
    x, matrices = draw.randn(rows, dim, dtype=dtype), []
    for _ in range(layers):
        weight = draw.randn(2 * kv_heads * head_dim, dim, dtype=dtype) * dim**-0.5
        matrices.append(quantize(weight) if fp8 else Matrix(weight))
    weights = [CrossKvWeights(draw.randn(dim, dtype=dtype), matrix, head_dim, 1e-5) for matrix in matrices]
    results = []
    for kernels in (TORCH, TRITON):
        caches = torch.zeros(layers + 1, 2, 12, kv_heads, 4, head_dim, dtype=dtype, device=DEVICE)
        states = torch.zeros(12, 4, dim, dtype=dtype, device=DEVICE)
        where = places // 4, places % 4
        kernels.cross_kv(weights)(x, KvCache(tuple(kv) for kv in caches[:-1]), *where)  # type: ignore[misc]
        kernels.keys_values(x, weights[-1], (caches[-1, 0], caches[-1, 1]), *where, states)
        results.append((caches, states))
    close(results[1][0], results[0][0])
    assert torch.equal(results[1][1], results[0][1]), "states are only moved"
    assert torch.equal(results[1][0][-1], results[1][0][-2]), "the same bits in one launch and alone"


@few
@given(
    SEEDS, FLOATS, st.integers(1, 20), st.integers(1, 4),
    st.sampled_from([(4, 4, 8), (10, 2, 20), (1, 1, 2), (4, 2, 64), (3, 1, 32)]), st.booleans(),
)  # fmt: skip
def test_reading_slots_equals_torch(
    seed: int, dtype: torch.dtype, rows: int, slots: int, shape: tuple[int, int, int], fp8: bool
) -> None:
    draw, (heads, kv_heads, head_dim), dim = Draw(seed, DEVICE), shape, 24
    caches = [draw.randn(5, kv_heads, 3 * slots, head_dim, dtype=dtype) for _ in range(2)]
    q, page, offset = draw.randn(rows, heads, head_dim, dtype=dtype), draw.below(5, rows), draw.below(3, rows) * slots
    weight = draw.randn(dim, heads * head_dim, dtype=dtype) * (heads * head_dim) ** -0.5
    o, x = quantize(weight) if fp8 else Matrix(weight), draw.randn(rows, dim, dtype=dtype)
    found = TRITON.read_slots(q, *caches, page, offset, slots, o, x)
    close(found, TORCH.read_slots(q, *caches, page, offset, slots, o, x))
    few_rows = (t[rows // 2 :].contiguous() for t in (page, offset))
    alone = TRITON.read_slots(q[rows // 2 :].contiguous(), *caches, *few_rows, slots, o, x[rows // 2 :].contiguous())
    assert torch.equal(alone, found[rows // 2 :])


@few
@given(SEEDS, FLOATS, st.integers(1, 9), st.integers(1, 70))
def test_embed_equals_torch(seed: int, dtype: torch.dtype, rows: int, dim: int) -> None:
    draw = Draw(seed, DEVICE)
    how = draw.text(2).ids, draw.below(2 * LONGEST, rows), draw.randn(260, dim, dtype=dtype)
    assert torch.equal(TRITON.embed(*how), TORCH.embed(*how))


@few
@given(SEEDS, FLOATS, FLOATS, st.integers(1, 9), st.integers(1, 70), st.integers(1, 3))
def test_hash_embed_equals_torch(
    seed: int, dtype: torch.dtype, stored: torch.dtype, rows: int, dim: int, functions: int
) -> None:  # fmt: skip
    draw, sizes = Draw(seed, DEVICE), (3, 4, 8)
    tables = HashTables(
        [draw.randn(500_002 // 1000, dim, dtype=stored) for _ in range(3 * functions)], sizes, functions, 500, DEVICE
    )
    text, embedding = draw.text(3), draw.randn(260, dim, dtype=dtype)
    how = text.ids, *draw.bytes_of(3, rows), embedding, tables
    found, expected = TRITON.hash_embed(*how), TORCH.hash_embed(*how)
    close(found, expected) if dtype == torch.bfloat16 else torch.testing.assert_close(found, expected, rtol=0, atol=0)


@few
@given(SEEDS, FLOATS, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 300))
def test_patch_max_equals_torch(seed: int, dtype: torch.dtype, lengths: list[int], dim: int) -> None:
    draw = Draw(seed, DEVICE)
    num_pages, *patches = draw.pooled(lengths, 5)
    states = draw.randn(num_pages, 5, dim, dtype=dtype)
    if seed % 2:
        states[0, seed % 5, seed % dim] = float("nan")
    torch.testing.assert_close(
        TRITON.patch_max(states, *patches), TORCH.patch_max(states, *patches), rtol=0, atol=0, equal_nan=True
    )


@few
@given(SEEDS, FLOATS, st.integers(1, 6), st.integers(1, 300), st.sampled_from([0.1, 3.0, 40.0]))
def test_entropy_equals_torch(seed: int, dtype: torch.dtype, rows: int, vocab_size: int, spread: float) -> None:
    logits = Draw(seed, DEVICE).randn(rows, vocab_size, dtype=dtype) * spread
    close(TRITON.entropy(logits), TORCH.entropy(logits))


@few
@given(SEEDS, st.sampled_from(RULES), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=4))
def test_boundaries_equals_torch(seed: int, rule: Rule, sequences: list[tuple[int, int]]) -> None:
    results = []
    for kernels in (TORCH, TRITON):
        entropies, text, spans = Draw(seed, DEVICE).patches(sequences)
        found = kernels.boundaries(entropies, text, spans, rule)
        results.append([found[:, : sum(count for count, _ in sequences)], *text])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


@settings(few, max_examples=6)
@given(SEEDS, st.lists(st.integers(0, 12), min_size=1, max_size=5), st.sampled_from([0.1, 3.0, 200.0]), st.booleans())
def test_settling_equals_torch(seed: int, sizes: list[int], spread: float, broken: bool) -> None:
    """Pass after pass over blocks of different lengths, some of them padding, until all is settled."""
    assume(max(sizes))
    mask, passes = 260, 4
    results = []
    for kernels in (TORCH, TRITON):
        draw = Draw(seed, DEVICE)
        length, ends = torch.tensor(sizes), [0, *accumulate(sizes)]
        place = torch.arange(len(sizes)) * LONGEST
        text = draw.below(3, len(sizes) * LONGEST) + mask - 2
        at = (t.to(DEVICE) for t in (torch.tensor(ends[:-1]), length, place))
        # Logits in steps, so that figures are equal or far apart, and near-ties decide alike. (In steps of 20, the
        # second likeliest of many ids change the last bits alone.) In steps of 200 only the likeliest count: each cell
        # has a number of them of its own, or two would tie but for the order in which these are summed.
        rules, bounds = draw.below(4, len(sizes)), draw.uniform(len(sizes)) * 3
        blocks = Blocks(*at, rules, bounds)
        cells = torch.empty(3, len(sizes), max(sizes), dtype=torch.int64, device=DEVICE)
        for number in range(passes):
            logits, likeliest = draw.below(9, ends[-1], 260).float(), draw.uniform(ends[-1]).argsort() + 1
            logits[:, 3:][draw.uniform(ends[-1], 257).argsort(1) < likeliest[:, None]] = 9
            logits[1::4] = logits[:-1:4]  # these do tie
            logits *= spread
            logits[:, :3] = -torch.inf
            if broken and number == 1:
                logits[::2, 7] = torch.nan
            kernels.settle(cells, text, logits, draw.below(256, ends[-1]), blocks, number, mask)
        inside = torch.arange(max(sizes)) < length[:, None]
        results.append((text, cells[:, inside.to(DEVICE)]))
    (expected, right), (found, cells) = results
    assert torch.equal(cells[2], right[2])
    if not broken:
        # Which cells settle by figures that are no numbers does not matter: their block fails.
        assert torch.equal(cells, right) and torch.equal(found, expected) and not cells[2].any()


@few
@given(SEEDS, st.integers(1, 6), st.sampled_from([1, 5, 260]))
def test_argmax_equals_torch(seed: int, rows: int, vocab_size: int) -> None:
    draw = Draw(seed, DEVICE)
    logits = draw.below(5, rows, vocab_size).float()
    logits[0, 0] = -torch.inf
    for found, expected in zip(TRITON.argmax(logits), TORCH.argmax(logits), strict=True):
        assert torch.equal(found, expected)
    logits[0, -1] = torch.nan
    assert TRITON.argmax(logits)[1].isnan().tolist() == [True] + [False] * (rows - 1)


@few
@given(SEEDS, st.integers(1, 6), st.sampled_from([1, 5, 260]), st.booleans())
def test_sample_equals_torch(seed: int, rows: int, vocab_size: int, double: bool) -> None:
    draw = Draw(seed, DEVICE)
    logits, params = draw.randn(rows, vocab_size) * 3, draw.params(rows, vocab_size)
    logits[:, -1] = logits[:, 0]
    how = logits.double() if double else logits, params, draw.uniform(rows)
    assert torch.equal(TRITON.sample(*how), TORCH.sample(*how))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("vocab_size", [1, 5, 260])
def test_rows_of_nan_give_valid_ids(vocab_size: int) -> None:
    """It is fed on before the host knows that it means nothing; an embedding has no rows for other numbers."""
    logits = torch.full((3, vocab_size), torch.nan, device=DEVICE)
    params = torch.tensor([[0.0, vocab_size, 1, 0], [1, vocab_size, 1, 0], [0.7, 1, 0.9, 0.1]], device=DEVICE).double()
    uniforms = torch.full((3,), 0.999, dtype=torch.float64, device=DEVICE)
    for ids in (TRITON.argmax(logits)[0], TRITON.sample(logits, params, uniforms)):
        assert all(0 <= i < vocab_size for i in ids.tolist())


@few
@given(SEEDS, st.integers(1, 5), st.integers(1, 17))
def test_accepted_equals_torch(seed: int, num: int, width: int) -> None:
    draw = Draw(seed, DEVICE)
    drafts, drawn, lengths = draw.below(2, num, width), draw.below(2, num, width), draw.below(width + 1, num)
    drawn[0] = drafts[0]
    found = TRITON.accepted(drafts, drawn, lengths)
    assert torch.equal(found, TORCH.accepted(drafts, drawn, lengths))
    for row, length in enumerate(lengths.tolist()):
        right = [a == b for a, b in zip(drafts[row].tolist(), drawn[row].tolist(), strict=True)][:length]
        assert found[row] == (right.index(False) if False in right else length)
