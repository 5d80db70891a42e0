"""Every kernel: equal to the formula written as loops, and row-invariant to the last bit.

Row-invariance: a row computed alone (padded to the floor where the kernel needs it), and the same row at any place in
a call with any number of others, are the same bits.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.attention import product_dtype, products
from kernels.cross_attention import slot_attention
from kernels.dispatch import choose_kernels
from kernels.entropy import entropy
from kernels.hash_embed import HashTables, hash_embed
from kernels.linear import Matrix, batched_row_floor, linear, row_floor
from kernels.norm import rms_norm
from kernels.pooling import PageTable, patch_max
from kernels.product import before_product
from kernels.rope import apply_rope, rope_table
from kernels.swiglu import swiglu
from tests.engines import threads

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def one_and_two_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with threads(request.param):
        yield


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_rms_norm_equals_the_formula() -> None:
    x, weight = randn(5, 7), randn(7, seed=1)
    for row, found in zip(x.tolist(), rms_norm(x, weight, 1e-5), strict=True):
        scale = 1 / math.sqrt(sum(v * v for v in row) / 7 + 1e-5)
        torch.testing.assert_close(
            found, torch.tensor([v * scale * w for v, w in zip(row, weight.tolist(), strict=True)])
        )


def test_rope_rotates_neighbouring_pairs() -> None:
    x, theta = randn(3, 2, 6), 500.0
    positions = [0, 7, 1000]
    found = apply_rope(x, rope_table(6, theta, 1001, CPU)[positions])
    for r, position in enumerate(positions):
        for head in range(2):
            for pair in range(3):
                turn = complex(math.cos(a := position * theta ** (-2 * pair / 6)), math.sin(a))
                turned = complex(*x[r, head, 2 * pair : 2 * pair + 2].tolist()) * turn
                torch.testing.assert_close(
                    found[r, head, 2 * pair : 2 * pair + 2], torch.tensor([turned.real, turned.imag]), atol=1e-4, rtol=0
                )


def test_entropy_is_in_nats() -> None:
    logits = torch.tensor([[0.0] * 4, [math.log(3), 0.0, -1e9, -1e9], [50.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([math.log(4), -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), 0.0])
    torch.testing.assert_close(entropy(logits), expected, atol=1e-6, rtol=0)


def test_swiglu_equals_the_formula() -> None:
    gate, up = randn(3, 5), randn(3, 5, seed=1)
    torch.testing.assert_close(swiglu(gate, up), gate / (1 + (-gate).exp()) * up)


def test_patch_max_keeps_nan() -> None:
    cache = randn(1, 4, 8)
    cache[0, 1, 3] = float("nan")
    page = torch.zeros(1, dtype=torch.int64)
    for kernels in (choose_kernels(name, CPU) for name in ("torch", "native")):
        found = kernels.patch_max(cache, PageTable(page[:, None], page), page, page, page + 3)
        assert found.isnan().tolist() == [[place == 3 for place in range(8)]], kernels.name


def test_patch_max_is_elementwise_also_for_single_bytes_and_negative_states() -> None:
    states = randn(9, 4) - 5
    expected = [part.max(0).values for part in states.split([1, 5, 1, 2])]
    # A sequence that begins with its page 1; its first six bytes, then the last three.
    cache = torch.zeros(4, 3, 4)
    cache[[2, 0, 3]] = states.view(3, 3, 4)
    table = PageTable(torch.tensor([[2, 0, 3]]), torch.tensor([1]))
    begin, after = torch.tensor([3, 4, 9, 10, 12]), torch.tensor([4, 9, 10, 12, 12])
    found = patch_max(cache, table, torch.zeros_like(begin), begin, after)
    assert torch.equal(found, torch.cat((torch.stack(expected), torch.zeros(1, 4))))


def test_slot_attention_equals_the_formula() -> None:
    q, k, v = randn(4, 3, 8), randn(4, 5, 3, 8, seed=1), randn(4, 5, 3, 8, seed=2)
    # Latent r lies in page r, after r rows of another.
    caches = [torch.zeros(4, 3, 9, 8) for _ in range(2)]
    for r in range(4):
        caches[0][r, :, r : r + 5], caches[1][r, :, r : r + 5] = k[r].transpose(0, 1), v[r].transpose(0, 1)
    found = slot_attention(q, *caches, torch.arange(4), torch.arange(4), 5)
    for r in range(4):
        for head in range(3):
            weights = [math.exp(float(q[r, head] @ k[r, slot, head]) / math.sqrt(8)) for slot in range(5)]
            expected = sum(w * v[r, slot, head] for slot, w in enumerate(weights)) / sum(weights)
            torch.testing.assert_close(found[r, head], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), [(32, 32), (260, 96), (704, 256), (7, 45)])
@pytest.mark.usefixtures("one_and_two_threads")
def test_linear_is_row_invariant_from_the_floor_on(out: int, width: int, dtype: torch.dtype) -> None:
    floor = row_floor([(out, width)], dtype, CPU)
    if floor is None:
        pytest.skip("this machine's matrix products have no floor; the engine warns about it")
    # One element off: a tensor in a mapped file is aligned to its element only.
    weight = randn(out * width + 1, dtype=dtype)[1:].view(out, width)
    x, half = randn(300, width, seed=1, dtype=dtype), width // 2
    # Sums that almost cancel show every rounding, and so the order of summation.
    x[:, -half:], weight[:, -half:] = -x[:, :half].flip(1), weight[:, :half].flip(1)
    x[:, half : width - half] = 0
    expected = linear(x, Matrix(weight))
    for count in (floor, floor + 1, 19, 27, 40, 77, 100, 129, 200, 299):
        for start in (0, 1, 300 - count):
            rows = slice(start, start + count)
            assert torch.equal(linear(x[rows].contiguous(), Matrix(weight)), expected[rows]), (count, start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "width"), [(16, 8), (8, 16), (64, 8), (8, 4)])
@pytest.mark.usefixtures("one_and_two_threads")
def test_products_of_attention_do_not_depend_on_how_many_there_are(out: int, width: int, dtype: torch.dtype) -> None:
    floor = batched_row_floor([(out, width)], product_dtype(dtype, CPU), CPU)
    assert floor is not None, "this machine's matrix products have no floor; the engine warns about it"
    x, weight, half = randn(40, 32, width, dtype=dtype), randn(40, width, out, seed=1, dtype=dtype), width // 2
    x[..., half:], weight[:, half:] = -x[..., :half].flip(2), weight[:, :half].flip(1)
    expected = products(x, weight)
    for rows in {floor, 17, 32}:
        for count in (2, 3, 5, 8, 13, 39):
            assert torch.equal(products(x[:count, :rows], weight[:count]), expected[:count, :rows]), (rows, count)


def _slots(x: Tensor) -> Tensor:
    heads = x.view(len(x), 4, -1)
    k = heads.unsqueeze(2) * torch.tensor([0.5, -1, 2], dtype=x.dtype)[:, None]
    page = torch.arange(len(x))
    return slot_attention(heads, k.contiguous(), k.flip(2).contiguous(), page, torch.zeros_like(page), 3)


def _hashed(x: Tensor) -> Tensor:
    """Texts of three bytes each."""
    ids = ((x[:, :3].float().abs() * 100).long() % 260).flatten()
    at = torch.arange(len(x)) * 3 + 2
    width = x.shape[1]
    tables = HashTables([randn(50, width, seed=s, dtype=x.dtype) for s in range(4)], (2, 3), 2, 50, CPU)
    return hash_embed(ids, at, torch.full_like(at, 2), randn(260, width, dtype=x.dtype), tables)


def _pooled(x: Tensor) -> Tensor:
    """Sequences of one page, and of one byte."""
    own = torch.arange(len(x))
    return patch_max(x[:, None], PageTable(own[:, None], torch.zeros_like(own)), own, 0 * own, 0 * own + 1)


ROW_BY_ROW: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: rms_norm(x, randn(x.shape[1], seed=3, dtype=x.dtype), 1e-5),
    "rope": lambda x: apply_rope(
        x.view(len(x), 2, -1), rope_table(x.shape[1] // 2, 1e4, 64, CPU)[(x[:, 0] > 0).long()]
    ),
    "entropy": entropy,
    "swiglu": lambda x: swiglu(x, x.flip(1).contiguous()),
    "slot_attention": _slots,
    "patch_max": _pooled,
    "hash_embed": _hashed,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [36, 260, 20])
@pytest.mark.parametrize("name", ROW_BY_ROW)
@pytest.mark.usefixtures("one_and_two_threads")
def test_rows_are_the_same_bits_alone_and_beside_other_rows(name: str, width: int, dtype: torch.dtype) -> None:
    kernel, x = ROW_BY_ROW[name], randn(131, width, dtype=dtype)
    expected = kernel(x)
    for count in (1, 2, 3, 7, 16, 33, 130):
        for start in (0, 1, 131 - count):
            rows = slice(start, start + count)
            assert torch.equal(kernel(x[rows].clone()), expected[rows]), (count, start)


@pytest.mark.parametrize(("width", "inside"), [(1024, True), (2048, True), (1280, False), (4096, False)])
def test_a_norm_is_inside_a_product_where_registers_are_left(width: int, inside: bool) -> None:
    x, norm = torch.randn(3, width).bfloat16(), torch.rand(width).bfloat16()
    rows, left = before_product(x, norm, 1e-5)
    assert (left is not None) == inside
    torch.testing.assert_close(rows, x if inside else rms_norm(x, norm, 1e-5), atol=2e-2, rtol=2e-2)
