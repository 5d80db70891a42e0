"""Hash n-grams: the released code's numbers, and kernel, windows and oracle agreeing on every id sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.blt.modeling_blt import byte_group_hash_function

from engine.config import HashConfig
from kernels.hash_embed import PRIMES, HashTables, hash_embed, ngram_hashes
from kernels.text import windows
from tests import reference
from tests.models import our_config

IDS = [1, 88, 108, 105, 36, 100, 101, 106, 200]
KNOWN = {
    3: [443987, 49195, 178009, 266281, 257309, 237369, 425735, 238229, 435365],
    8: [172383, 353159, 75783, 117746, 59740, 358554, 110181, 399105, 1442],
}


def laid(ids: list[int], slot: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The ids in a slot after another text; their places and positions."""
    positions = torch.arange(len(ids))
    return torch.tensor([7] * (slot * len(ids)) + ids), slot * len(ids) + positions, positions


def kernel_rows(ids: list[int], sizes: tuple[int, ...], functions: int, rows: int) -> list[list[int]]:
    return ngram_hashes(windows(*laid(ids), max(sizes)), sizes, functions, rows).T.tolist()


@pytest.mark.parametrize("size", KNOWN)
def test_hash_rows_equal_those_of_the_released_code(size: int) -> None:
    assert kernel_rows(IDS, (size,), 1, 500002) == [KNOWN[size]]
    assert reference.hash_rows(our_config(hashes=HashConfig((size,), 1, 500002)), IDS) == [KNOWN[size]]


def test_kernel_and_reference_use_the_same_primes() -> None:
    assert PRIMES == reference.PRIMES


@settings(max_examples=60)
@given(
    ids=st.lists(st.integers(0, 259), min_size=1, max_size=30),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4, unique=True),
    functions=st.integers(1, 11),
    rows=st.integers(2, 500002),
)
def test_the_hash_kernel_equals_plain_integers_and_hugging_face(
    ids: list[int], sizes: list[int], functions: int, rows: int
) -> None:
    found = kernel_rows(ids, tuple(sizes), functions, rows)
    config = our_config(hashes=HashConfig(tuple(sizes), functions, rows))
    assert found == reference.hash_rows(config, ids)
    theirs = [
        byte_group_hash_function(torch.tensor([ids]), size, PRIMES[f], rows)[0].tolist()
        for f in range(functions)
        for size in sizes
    ]
    assert found == theirs


@given(ids=st.lists(st.integers(0, 259), min_size=1, max_size=20), slot=st.integers(0, 2), width=st.integers(1, 9))
def test_windows_hold_the_last_ids_of_their_own_text(ids: list[int], slot: int, width: int) -> None:
    padded = [0] * (width - 1) + ids
    assert windows(*laid(ids, slot), width).tolist() == [padded[j : j + width] for j in range(len(ids))]


def test_hash_embed_is_a_plain_sum_and_takes_tables_of_another_dtype() -> None:
    torch.manual_seed(0)
    embedding, tables = torch.randn(260, 8), [torch.randn(50, 8).bfloat16() for _ in range(3)]
    hashes = ngram_hashes(windows(*laid(IDS), 5), (2, 3, 5), 1, 50)
    found = hash_embed(*laid(IDS), embedding, HashTables(tables, (2, 3, 5), 1, 50, torch.device("cpu")))
    for j, token in enumerate(IDS):
        expected = embedding[token] + sum(table[hashes[j, t]].float() for t, table in enumerate(tables))
        torch.testing.assert_close(found[j], expected)
    assert found.dtype == torch.float32
