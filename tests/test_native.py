"""Our own CPU kernels against their torch twins, and their promise: a row's bits depend on nothing but the row."""

import _ctypes
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import BOS_ID, BYTE_OFFSET, EngineConfig
from engine.engine import Engine
from kernels import available, native
from kernels.attention import AttentionPlan
from kernels.boundary import Rule
from kernels.dispatch import Kernels, NativeKernels, choose_kernels
from kernels.embedding import Ids
from kernels.hash_embed import HashTables
from kernels.linear import FP8, Matrix, quantize
from kernels.rope import rope_table
from kernels.stack import CrossCache, CrossKvWeights, HeadWeights, KvCache, LayerWeights, SlotsWeights, StackWeights
from tests.engines import engine_logits, make_engine, request, run, threads
from tests.operands import CPU, FLOATS, RULES, SEEDS, Draw, Laid, Layout, close, layouts
from tests.operands import few as quick

TORCH, NATIVE = Kernels(), NativeKernels()
NANO = Path(__file__).parents[1] / "models" / "nano"
few = settings(quick, max_examples=40)
SHAPES = st.sampled_from([(4, 4, 8), (4, 2, 16), (6, 2, 20), (1, 1, 2), (2, 1, 64), (2, 2, 32), (2, 1, 116)])


def test_native_kernels_are_compiled_and_chosen_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make` compiles them wherever it can install fastblt at all."""
    assert native.LIBRARY
    assert choose_kernels(None, CPU).name == "native"
    with pytest.raises(ValueError, match="run on the CPU, not on 'cuda'"):
        choose_kernels("native", torch.device("cuda"))
    monkeypatch.setattr(native, "LIBRARY", None)
    assert choose_kernels(None, CPU).name == "torch"
    with pytest.raises(ValueError, match="not compiled"):
        choose_kernels("native", CPU)


def test_an_engine_warns_when_native_kernels_are_not_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "LIBRARY", None)
    Engine(EngineConfig(str(NANO)))
    assert "not compiled" in caplog.text
    caplog.clear()
    Engine(EngineConfig(str(NANO), kernels="torch"))
    assert "not compiled" not in caplog.text


@few
@given(
    SEEDS, FLOATS, FLOATS, st.integers(1, 40), st.integers(1, 300), st.integers(1, 150), st.booleans(), st.booleans(),
    st.booleans(), st.integers(0, 2),
)  # fmt: skip
def test_linear_equals_torch(
    seed: int, dtype: torch.dtype, stored: torch.dtype, rows: int, out: int, width: int, normed: bool, gated: bool,
    fp8: bool, residuals: int,
) -> None:  # fmt: skip
    draw = Draw(seed)
    stored = torch.bfloat16 if dtype == torch.bfloat16 else stored
    x, weight = draw.randn(rows, width, dtype=dtype), draw.randn(out * (1 + gated), width, dtype=stored) * width**-0.5
    how: dict[str, Any] = {
        "norm": draw.randn(width, dtype=dtype) if normed else None,
        "eps": 1e-5,
        "gated": gated,
        "residual": draw.randn(rows, out, dtype=dtype) if residuals else None,
        "twice": residuals == 2,
    }
    matrix = quantize(weight) if fp8 else Matrix(weight)
    found = NATIVE.linear(x, NATIVE.matrix(matrix), **how)
    close(found, TORCH.linear(x, matrix if fp8 else Matrix(weight.to(dtype)), **how))
    if residuals:
        how["residual"] = how["residual"][rows // 2 :]
    assert torch.equal(NATIVE.linear(x[rows // 2 :], NATIVE.matrix(matrix), **how), found[rows // 2 :])


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize(("out", "width"), [(32, 32), (260, 96), (704, 256), (7, 45), (2000, 500)])
def test_linear_rows_are_the_same_bits_in_any_batch_and_with_any_number_of_threads(
    out: int, width: int, stored: torch.dtype
) -> None:
    draw, dtype = Draw(out), torch.float32 if stored == torch.float32 else torch.bfloat16
    drawn = draw.randn(out, width, dtype=dtype)
    weight = NATIVE.matrix(quantize(drawn) if stored == FP8 else Matrix(drawn))
    x = draw.randn(300, width, dtype=dtype)
    with threads(1):
        expected = NATIVE.linear(x, weight)
    for count in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 24, 25, 77, 299):
        for start in (0, 1, 300 - count):
            with threads(1 + start % 3):
                found = NATIVE.linear(x[start : start + count], weight)
            assert torch.equal(found, expected[start : start + count]), (count, start)


def test_float8_weights_take_a_byte_and_give_the_bits_of_the_same_weights_in_bfloat16() -> None:
    """All 256 codes, subnormal ones and NaN among them."""
    draw = Draw(0)
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)[:, None]
    single = native.pack(Matrix(codes))
    for rows in (1, 13, 40):
        found = NATIVE.linear(torch.ones(rows, 1), single)
        torch.testing.assert_close(found, codes.float().T.expand(rows, -1), rtol=0, atol=0, equal_nan=True)
    data, scale = draw.below(126, 96, 300).to(torch.uint8).view(FP8), draw.randn(96).abs()
    packed, wide = native.pack(Matrix(data, scale)), native.pack(Matrix(data.bfloat16(), scale))
    assert packed.data.nbytes == data.nbytes == wide.data.nbytes // 2
    for dtype in (torch.float32, torch.bfloat16):
        x = draw.randn(40, 300, dtype=dtype)
        expected = NATIVE.linear(x, wide)
        for rows in (*range(1, 15), 24, 25, 40):
            assert torch.equal(NATIVE.linear(x[:rows], packed), expected[:rows]), rows


def test_an_engine_reads_float8_weights_as_such_and_computes_the_logits_of_torch() -> None:
    ours, theirs = (make_engine(NANO, kernels=name, weights="float8") for name in ("native", "torch"))
    assert ours.info().weight_bytes["global"] == theirs.info().weight_bytes["global"]
    ids = list(range(60, 100))
    # Roundings of all layers add up, and logits are up to eleven; weights that are not float8 change them by 1.
    torch.testing.assert_close(engine_logits(ours, ids, 16), engine_logits(theirs, ids, 16), atol=1e-4, rtol=1e-4)


def test_multiplying_in_the_nearest_cache_is_about_as_fast_as_the_fastest_products() -> None:
    """By processor time, as other work may run. Work that the compiler left out would take none."""

    def rate(work: Callable[[], int]) -> float:
        start = time.process_time()
        return work() / (time.process_time() - start)

    def product() -> int:
        for _ in range(20):
            NATIVE.linear(x, weight)
        return 20 * 24 * 1024 * 1024

    weight, x = NATIVE.matrix(Matrix(torch.ones(1024, 1024, dtype=torch.bfloat16))), torch.ones(24, 1024)
    with threads(1):
        limit, fastest = (max(rate(work) for _ in range(5)) for work in (native.multiply, product))
    assert 0.5 < fastest / limit < 1.5


def test_linear_over_200000_rows_does_not_overflow_the_thread_stack() -> None:
    """As `--max-step-rows` may ask for; a thread's stack is a few megabytes, or less."""
    draw = Draw(0)
    weight, x = Matrix(draw.randn(40, 8)), draw.randn(200_000, 8)
    with threads(3):
        close(NATIVE.linear(x, NATIVE.matrix(weight)), TORCH.linear(x, weight))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_step_gives_the_same_texts_with_any_number_of_threads(count: int) -> None:
    """Which stay awake during it, and take rows of their own; there are more than cores, at times."""
    engine = make_engine(NANO)
    requests = [
        request(f"{n}", [BOS_ID, *(byte + BYTE_OFFSET for byte in b"def %d" % n * (1 + n))], 40, decoder=decoder)
        for n, decoder in enumerate(("blt", "blt-s", "blt-d", "blt-dv") * 5)
    ]
    with threads(1):
        expected = {name: output.text for name, output in run(engine, requests).items()}
    with threads(count):
        assert {name: output.text for name, output in run(engine, requests).items()} == expected


def test_the_sources_compile_as_gcc_11_reads_them() -> None:
    """The oldest that is taken. It shuffles vectors by another name."""
    gcc = shutil.which("gcc")
    if not gcc or "clang" in subprocess.run([gcc, "--version"], capture_output=True, text=True, check=True).stdout:
        pytest.skip("there is no gcc")
    flags = ["-std=c11", "-Wno-psabi", "-fsyntax-only", "-DFASTBLT_AS_GCC_11", '-DFASTBLT_SOURCES=""']
    subprocess.run([gcc, *flags, str(Path(native.__file__).with_name("native.c"))], check=True, timeout=120)


def test_several_threads_may_call_native_kernels_at_once() -> None:
    weight, x = NATIVE.matrix(Matrix(Draw(0).randn(3000, 700))), Draw(1).randn(9, 700)
    expected = NATIVE.linear(x, weight)
    with threads(3), ThreadPoolExecutor(3) as pool:
        assert all(pool.map(lambda _: torch.equal(NATIVE.linear(x, weight), expected), range(300)))


def test_a_forked_process_may_call_native_kernels() -> None:
    """In a process of its own: forking one that has threads is what Python warns of."""
    code = """
import os, signal, torch
from kernels import native
from kernels.linear import Matrix
torch.set_num_threads(3)
weight, x = native.pack(Matrix(torch.ones(3000, 700))), torch.ones(9, 700)
expected = native.linear(x, weight).numpy().tobytes()
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    signal.alarm(60)
    os._exit(native.linear(x, weight).numpy().tobytes() != expected)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120, cwd=NANO.parents[1])


def test_a_product_of_no_rows_writes_nothing() -> None:
    """A step of prompt chunks alone wants no logits. In a thread of its own, which has little scratch memory."""
    weight = NATIVE.matrix(Matrix(torch.randn(260, 8)))

    def work() -> Tensor:
        before = NATIVE.linear(torch.ones(4, 8), weight)
        assert NATIVE.linear(torch.zeros(0, 8), weight).shape == (0, 260)
        return NATIVE.linear(torch.ones(4, 8), weight) - before

    with threads(1), ThreadPoolExecutor(1) as pool:
        assert not pool.submit(work).result().any()
    code = """
import torch
from kernels import native
from kernels.linear import Matrix
weight = native.pack(Matrix(torch.randn(260, 8)))
native.linear(torch.zeros(0, 8), weight)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120, cwd=NANO.parents[1])


@pytest.mark.parametrize("wrong", ["no library", "other sources", "an older one"])
def test_a_library_that_does_not_fit_is_not_used(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.so"
    path.write_text("no library")
    if wrong == "other sources":
        path = available.library() or path
        monkeypatch.setattr(available, "sources", lambda: "0123")
    elif wrong == "an older one":
        path = Path(_ctypes.__file__)
    monkeypatch.setattr(available, "library", lambda: path)
    assert native._library() is None
    assert str(path) in caplog.text and "is not used" in caplog.text


@few
@given(SEEDS, FLOATS, layouts(), SHAPES)
def test_attention_equals_torch(seed: int, dtype: torch.dtype, layout: Layout, shape: tuple[int, int, int]) -> None:
    draw, (heads, kv_heads, head_dim) = Draw(seed), shape
    laid = Laid(layout, draw)
    caches = [draw.randn(laid.num_pages, kv_heads, laid.page_size, head_dim, dtype=dtype) for _ in range(2)]
    plan = laid.on_device()
    q = draw.randn(len(plan.first), heads, head_dim, dtype=dtype)
    found = NATIVE.attention(q, *caches, plan)
    close(found[: laid.num_rows], TORCH.attention(q, *caches, plan)[: laid.num_rows])
    assert not found[laid.num_rows :].any(), "padding is zeros"
    # Every row in a tile of its own, over the pages of the tile that it was in.
    tiles = [
        [row, 1, *tile[2:]] for tile in plan.tiles.tolist() for row in range(tile[0], tile[0] + tile[1]) if tile[4]
    ]
    alone = AttentionPlan.of(
        plan.positions, plan.page, plan.offset, plan.first, plan.last, torch.tensor(tiles), plan.pages,
        page_size=laid.page_size,
    )  # fmt: skip
    assert torch.equal(NATIVE.attention(q, *caches, alone)[: laid.num_rows], found[: laid.num_rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("page_size", "head_dim"), [(64, 32), (40, 48), (16, 116)])
@pytest.mark.parametrize("kernels", [NATIVE, TORCH], ids=["native", "torch"])
def test_attention_is_softmax_over_the_rows_that_are_seen(
    kernels: Kernels, dtype: torch.dtype, page_size: int, head_dim: int
) -> None:
    """Memory of other rows holds NaN: vectors of keys are computed whole, and only lanes that are seen count."""
    draw, firsts, lasts = Draw(3), [0, 5, 13, 63, 101], [0, 90, 93, 64, 127]
    plan = AttentionPlan.of(
        *(torch.zeros(5, dtype=torch.int64) for _ in range(3)), torch.tensor(firsts), torch.tensor(lasts),
        torch.tensor([[row, 1, 0, 0, -(-128 // page_size)] for row in range(5)]), torch.arange(9).flip(0)[:8],
        page_size=page_size,
    )  # fmt: skip
    q, keys, values = (draw.randn(n, 2, head_dim, dtype=dtype) for n in (5, 128, 128))
    for row, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        caches = torch.full((2, 9, 2, page_size, head_dim), math.nan, dtype=dtype)
        for at in range(first, last + 1):
            place = plan.pages[at // page_size], slice(None), at % page_size
            caches[0][place], caches[1][place] = keys[at], values[at]
        found = kernels.attention(q, caches[0], caches[1], plan)[row]
        k, v = (x[first : last + 1].double().transpose(0, 1) for x in (keys, values))
        scores = k @ q[row].double()[:, :, None] * head_dim**-0.5
        close(found, (scores.softmax(1) * v).sum(1).to(dtype))


@few
@given(
    SEEDS, FLOATS, layouts(), SHAPES, st.integers(1, 2), st.sampled_from(["layers", "slots", "keys"]),
    st.integers(1, 2), st.booleans(), st.booleans(), st.booleans(), st.sampled_from([24, 160]),
)  # fmt: skip
def test_stack_equals_torch_and_is_the_same_bits_with_any_number_of_threads(
    seed: int, dtype: torch.dtype, layout: Layout, shape: tuple[int, int, int], layers: int, kind: str, of_them: int,
    embeds: bool, has_head: bool, some: bool, dim: int,
) -> None:  # fmt: skip
    """With the larger width threads are worth their while: each takes rows of its own, if there are enough of them."""
    draw, (heads, kv_heads, head_dim) = Draw(seed), shape
    laid, ffn_dim, slots = Laid(layout, draw), dim * 3 // 2, 2
    plan, of_them = laid.on_device(), min(of_them, layers)
    rows = len(plan.first)

    def matrix(out: int, width: int) -> Tensor:
        return draw.randn(out, width, dtype=dtype) * width**-0.5

    def norm() -> Tensor:
        return draw.randn(dim, dtype=dtype)

    rope = rope_table(head_dim, 100.0, 400, CPU)
    qkv, kv, inner = (heads + 2 * kv_heads) * head_dim, 2 * kv_heads * head_dim, heads * head_dim
    of_layers = [
        (norm(), matrix(qkv, dim), matrix(dim, inner), norm(), matrix(2 * ffn_dim, dim), matrix(dim, ffn_dim))
        for _ in range(layers)
    ]
    of_slots = [(norm(), matrix(inner, dim), matrix(dim, inner)) for _ in range(of_them if kind == "slots" else 0)]
    of_keys = [(norm(), matrix(kv, dim)) for _ in range(of_them if kind == "keys" else 0)]
    embedding, of_head = draw.randn(50, dim, dtype=dtype), (norm(), matrix(300, dim))
    x = Ids(draw.below(50, rows), torch.arange(rows)) if embeds else draw.randn(rows, dim, dtype=dtype)
    caches = draw.randn(layers, 2, laid.num_pages, kv_heads, laid.page_size, head_dim, dtype=dtype)
    besides = draw.randn(of_them, 2, rows, kv_heads, 3 * slots, head_dim, dtype=dtype)
    page, offset = torch.tensor(draw.shuffled(rows)), draw.below(3, rows) * slots
    wanted = draw.below(laid.num_rows, draw.below(5, 1).item()) if some else torch.arange(laid.num_rows)

    def run(k: Kernels) -> list[Tensor]:
        def packed(weights: tuple[Tensor, ...]) -> list[Any]:
            return [k.matrix(Matrix(w)) if w.ndim == 2 else w for w in weights]

        function = k.stack(
            StackWeights(
                [LayerWeights(*packed(w), rope, heads, kv_heads, head_dim, 1e-5) for w in of_layers],
                embedding=embedding if embeds else None,
                slots=[SlotsWeights(*packed(w), heads, kv_heads, head_dim, 1e-5, slots) for w in of_slots],
                cross_kv=[CrossKvWeights(*packed(w), head_dim, 1e-5) for w in of_keys],
                head=HeadWeights(*packed(of_head), 1e-5) if has_head else None,
            )
        )
        own, others = caches.clone(), besides.clone()
        states = torch.zeros(rows, 3 * slots, dim, dtype=dtype)
        beside = None
        if k is NATIVE:
            # Leaves NaN in the memory that the next call takes.
            k.linear(torch.full((99, 999), math.nan), k.matrix(Matrix(torch.ones(1, 999))))
        if kind != "layers":
            beside = CrossCache(KvCache(tuple(kv) for kv in others), page, offset, states if kind == "keys" else None)  # type: ignore[misc]
        y = function(x, KvCache(tuple(kv) for kv in own), plan, beside, wanted)  # type: ignore[misc]
        whole = function(x, KvCache(tuple(kv) for kv in own), plan, beside)  # type: ignore[misc]
        if k is NATIVE and len(wanted):
            assert torch.equal(whole[wanted], y)
        # Padding rows write to cells that are never read.
        live = page[: laid.num_rows]
        return [y.flatten().to(dtype), own[:, :, 1:], others[:, :, live], states[live]]

    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(NATIVE))
    for expected, found, *again in zip(run(TORCH), *results, strict=True):
        close(found, expected)
        assert all(torch.equal(found, other) for other in again)


@few
@given(SEEDS, FLOATS, st.integers(1, 40), st.integers(1, 3), st.sampled_from([(8, 32), (4, 8), (2, 20), (1, 2)]))
def test_cross_kv_equals_torch(seed: int, dtype: torch.dtype, rows: int, layers: int, shape: tuple[int, int]) -> None:
    draw, (kv_heads, head_dim), dim = Draw(seed), shape, 160
    places = torch.tensor(draw.shuffled(11 * 4)[:rows])
    x, norm = draw.randn(rows, dim, dtype=dtype), draw.randn(dim, dtype=dtype)
    matrices = [draw.randn(2 * kv_heads * head_dim, dim, dtype=dtype) * dim**-0.5 for _ in range(layers)]
    results = []
    for k, count in ((TORCH, 1), (NATIVE, 1), (NATIVE, 2)):
        caches = torch.zeros(layers, 2, 11, kv_heads, 4, head_dim, dtype=dtype)
        function = k.cross_kv([CrossKvWeights(norm, k.matrix(Matrix(m)), head_dim, 1e-5) for m in matrices])
        with threads(count):
            function(x, KvCache(tuple(kv) for kv in caches), places // 4, places % 4)  # type: ignore[misc]
        results.append(caches)
    close(results[1], results[0])
    assert torch.equal(results[1], results[2])


@few
@given(
    SEEDS, FLOATS, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 9),
    st.integers(1, 70), st.integers(1, 3),
)  # fmt: skip
def test_hash_embed_equals_torch(
    seed: int, dtype: torch.dtype, stored: torch.dtype, rows: int, dim: int, functions: int
) -> None:  # fmt: skip
    draw, sizes = Draw(seed), (3, 4, 8)
    tables = HashTables([draw.randn(500, dim, dtype=stored) for _ in range(3 * functions)], sizes, functions, 500, CPU)
    text, embedding = draw.text(3), draw.randn(260, dim, dtype=dtype)
    how = text.ids, *draw.bytes_of(3, rows), embedding, tables
    assert torch.equal(NATIVE.hash_embed(*how), TORCH.hash_embed(*how))


@few
@given(SEEDS, FLOATS, st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 300))
def test_patch_max_equals_torch(seed: int, dtype: torch.dtype, lengths: list[int], dim: int) -> None:
    draw = Draw(seed)
    num_pages, *patches = draw.pooled(lengths, 5)
    how = draw.randn(num_pages, 5, dim, dtype=dtype), *patches
    assert torch.equal(NATIVE.patch_max(*how), TORCH.patch_max(*how))


@few
@given(SEEDS, FLOATS, st.integers(1, 6), st.integers(1, 300), st.sampled_from([0.1, 3.0, 40.0, 400.0]))
def test_entropy_equals_torch(seed: int, dtype: torch.dtype, rows: int, vocab_size: int, spread: float) -> None:
    logits = Draw(seed).randn(rows, vocab_size, dtype=dtype) * spread
    close(NATIVE.entropy(logits), TORCH.entropy(logits))


@few
@given(SEEDS, st.sampled_from(RULES), st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=4))
def test_boundaries_equals_torch(seed: int, rule: Rule, sequences: list[tuple[int, int]]) -> None:
    results = []
    for kernels in (TORCH, NATIVE):
        entropies, text, spans = Draw(seed).patches(sequences)
        results.append([kernels.boundaries(entropies, text, spans, rule), *text])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found, expected)


@few
@given(SEEDS, st.integers(1, 6), st.sampled_from([1, 5, 260]), st.sampled_from([-math.inf, math.inf, math.nan]))
def test_argmax_equals_torch(seed: int, rows: int, vocab_size: int, bad: float) -> None:
    draw = Draw(seed)
    logits = draw.below(5, rows, vocab_size).float()
    logits[0, draw.below(vocab_size, 2)] = bad
    for found, expected in zip(NATIVE.argmax(logits), TORCH.argmax(logits), strict=True):
        assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@few
@given(SEEDS, st.integers(1, 6), st.sampled_from([1, 5, 260]), st.booleans())
def test_sample_equals_torch(seed: int, rows: int, vocab_size: int, double: bool) -> None:
    draw = Draw(seed)
    logits, params, uniforms = draw.randn(rows, vocab_size) * 3, draw.params(rows, vocab_size), draw.uniform(rows)
    logits[:, -1] = logits[:, 0]
    logits = logits.double() if double else logits
    found = NATIVE.sample(logits, params, uniforms)
    assert torch.equal(found, TORCH.sample(logits, params, uniforms))
    for row in range(rows):
        at = slice(row, row + 1)
        assert torch.equal(NATIVE.sample(logits[at], params[at], uniforms[at]), found[at])


def test_sampling_from_logits_that_are_no_distribution_gives_a_valid_id() -> None:
    """It is sampled before the host knows that its logits are no distribution, and may be fed meanwhile."""
    logits = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [0.0, math.nan], [-math.inf, -math.inf]])
    law = torch.tensor([1.0, 2.0, 0.9, 0.1]).double()
    found = NATIVE.sample(logits, law.repeat(4, 1), torch.full((4,), 0.999, dtype=torch.float64))
    assert set(found.tolist()) <= {0, 1}


@few
@given(SEEDS, st.integers(1, 5), st.integers(1, 17))
def test_accepted_equals_torch(seed: int, num: int, width: int) -> None:
    draw = Draw(seed)
    drafts, drawn, lengths = draw.below(2, num, width), draw.below(2, num, width), draw.below(width + 1, num)
    drawn[0] = drafts[0]
    assert torch.equal(NATIVE.accepted(drafts, drawn, lengths), TORCH.accepted(drafts, drawn, lengths))


@few
@given(SEEDS, st.integers(1, 5), st.integers(1, 12), st.sampled_from([0.1, 3.0, 20.0]))
def test_unmasking_equals_torch(seed: int, num_blocks: int, size: int, spread: float) -> None:
    draw = Draw(seed)
    logits = draw.randn(num_blocks * size, 260) * spread
    logits[:, :3] = -math.inf
    found, expected = NATIVE.confidence_and_entropy(logits), TORCH.confidence_and_entropy(logits)
    for ours, theirs, alone in zip(found, expected, NATIVE.confidence_and_entropy(logits[1:]), strict=True):
        close(ours, theirs)
        assert torch.equal(ours[1:], alone)
    # Some of them equal.
    confidence, entropy = (t.view(num_blocks, size) for t in found)
    entropy[:, ::2] = entropy[:, :1].clone()
    confidence[:, 1::3] = confidence[:, :1].clone()
    how = (
        draw.below(3, num_blocks, size) > 0, confidence, entropy, draw.below(4, num_blocks),
        draw.uniform(num_blocks) * 3,
    )  # fmt: skip
    assert torch.equal(NATIVE.unmask(*how), TORCH.unmask(*how))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_row(bad: float) -> None:
    """The engine fails the request whose logits are no distribution, and no other."""
    x = Draw(0).randn(3, 40)
    x[1, 7] = bad
    weight = NATIVE.matrix(Matrix(Draw(1).randn(50, 40)))
    y = NATIVE.linear(x, weight, norm=torch.ones(40), eps=1e-5, gated=True)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()
    assert NATIVE.entropy(x).isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exponentials_are_accurate_for_scores_of_any_size(dtype: torch.dtype) -> None:
    """Attention over one slot after another: a score of any size against one of zero."""
    scores = torch.linspace(-200, 200, 4001, dtype=torch.float64)
    keys, values = torch.zeros(4001, 1, 2, 1), torch.zeros(4001, 1, 2, 1)
    keys[:, 0, 0, 0], values[:, 0, 0, 0] = scores.float(), 1.0
    plan = AttentionPlan.of(
        *(torch.zeros(4001, dtype=torch.int64) for _ in range(4)), torch.ones(4001, dtype=torch.int64),
        torch.tensor([[row, 1, row, 0, 1] for row in range(4001)]), torch.arange(4001), page_size=2,
    )  # fmt: skip
    q = torch.ones(4001, 1, 1)
    found = NATIVE.attention(q.to(dtype), keys.to(dtype), values.to(dtype), plan).flatten()
    rounded = scores.float().to(dtype).double()
    close(found, torch.sigmoid(rounded).to(dtype))


def test_hash_embed_takes_tables_of_different_dtypes() -> None:
    draw = Draw(3)
    tables = HashTables([draw.randn(50, 5), draw.randn(50, 5, dtype=torch.bfloat16)], (2, 3), 1, 50, CPU)
    how = draw.text(2).ids, *draw.bytes_of(2, 4), draw.randn(260, 5), tables
    assert torch.equal(NATIVE.hash_embed(*how), TORCH.hash_embed(*how))


def test_hash_embed_of_single_bytes_copies_the_embedding() -> None:
    """No table, no sum: what is left of `hash_embed` is the byte's own row."""
    embedding = Draw(0).randn(10, 5)
    tables = HashTables([torch.zeros(4, 5)], (1,), 1, 4, CPU)
    ids, at, positions = torch.tensor([3, 9]), torch.tensor([1, 0]), torch.tensor([1, 0])
    assert torch.equal(NATIVE.hash_embed(ids, at, positions, embedding, tables), embedding[[9, 3]])
