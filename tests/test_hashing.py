"""Hash n-grams: the released code's numbers, and kernel, windows and oracle agreeing on every id sequence."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.blt.modeling_blt import byte_group_hash_function

from engine.config import HashConfig
from engine.model.encoder import ngram_windows
from kernels.hash_embed import PRIMES, HashTables, hash_embed, ngram_hashes
from tests import reference
from tests.models import our_config

IDS = [1, 88, 108, 105, 36, 100, 101, 106, 200]
KNOWN = {
    3: [443987, 49195, 178009, 266281, 257309, 237369, 425735, 238229, 435365],
    8: [172383, 353159, 75783, 117746, 59740, 358554, 110181, 399105, 1442],
}


def kernel_rows(ids: list[int], sizes: tuple[int, ...], functions: int, rows: int) -> list[list[int]]:
    windows = torch.tensor(ngram_windows(ids, 0, len(ids), max(sizes))).view(len(ids), -1)
    return ngram_hashes(windows, sizes, functions, rows).T.tolist()


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


@given(ids=st.lists(st.integers(0, 259), min_size=1, max_size=20), cut=st.integers(0, 20), width=st.integers(1, 9))
def test_ngram_windows_do_not_depend_on_where_a_chunk_starts(ids: list[int], cut: int, width: int) -> None:
    cut = min(cut, len(ids))
    whole = ngram_windows(ids, 0, len(ids), width)
    assert ngram_windows(ids, 0, cut, width) + ngram_windows(ids, cut, len(ids), width) == whole
    padded = [0] * (width - 1) + ids
    assert whole == [token for j in range(len(ids)) for token in padded[j : j + width]]


def test_hash_embed_is_a_plain_sum_and_takes_tables_of_another_dtype() -> None:
    torch.manual_seed(0)
    embedding, tables = torch.randn(260, 8), [torch.randn(50, 8).bfloat16() for _ in range(3)]
    windows = torch.tensor(ngram_windows(IDS, 0, len(IDS), 5)).view(-1, 5)
    hashes = ngram_hashes(windows, (2, 3, 5), 1, 50)
    found = hash_embed(windows, embedding, HashTables(tables, (2, 3, 5), 1, 50, torch.device("cpu")))
    for j, token in enumerate(IDS):
        expected = embedding[token] + sum(table[hashes[j, t]].float() for t, table in enumerate(tables))
        torch.testing.assert_close(found[j], expected)
    assert found.dtype == torch.float32
