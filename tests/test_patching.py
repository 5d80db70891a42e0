"""Where patches start: the known vectors, every rule in the engine's incremental form against the oracle's whole."""

from bisect import bisect_right

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.blt.modeling_blt import BltPatcher

from engine.config import PatchingRule
from engine.patching import Patching, boundary_rule
from kernels.dispatch import Kernels, NativeKernels
from kernels.text import Text
from tests import reference

ENTROPIES = [3.0, 1.0, 2.5, 1.0, 4.0, 4.5, 1.0, 3.0]
KNOWN = [
    (PatchingRule(threshold=2), [0, 1, 3, 5, 6, 8]),
    (PatchingRule(threshold=0.7, monotonic=True), [0, 1, 2, 3, 5, 8]),
    (PatchingRule(threshold=2, threshold_add=0.2), [0, 1, 2, 5, 6, 8]),
    (PatchingRule(mode="bytes"), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    (PatchingRule(threshold=9, max_patch_length=3), [0, 1, 4, 7]),
    (PatchingRule(threshold=9, max_patch_length=7), [0, 1, 8]),
    (PatchingRule(threshold=9, max_patch_length=8), [0, 1]),
    (PatchingRule(threshold=2, max_patch_length=1), [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    (PatchingRule(threshold=4.2, max_patch_length=2), [0, 1, 3, 5, 6, 8]),
]


def incremental(rule: PatchingRule, entropies: list[float], chunk: int = 1) -> list[int]:
    """The starts in the engine's sequence, which are also those in the text."""
    patching, size = Patching(), len(entropies) + 1
    texts = [Text(torch.zeros(size).long(), torch.zeros(size), *torch.zeros(2, size).int()) for _ in range(2)]
    for at in range(0, len(entropies), chunk):
        some, before = entropies[at : at + chunk], list(patching.starts)
        span = torch.tensor([[0, len(some), patching.decided, patching.decided]])
        (_, opens), (_, also) = (
            kernels.boundaries(torch.tensor(some), text, span, boundary_rule(rule))
            for kernels, text in zip((Kernels(), NativeKernels()), texts, strict=True)
        )
        assert torch.equal(opens, also)
        patching.take(some, opens.tolist())
        assert patching.starts[: len(before)] == before, "a decided start is never revised"
        assert patching.decided == at + len(some)
    for text in texts:
        assert text.patch_start.unique().tolist() == patching.starts
        assert text.patch.tolist() == [bisect_right(patching.starts, byte) - 1 for byte in range(size)]
    return patching.starts


@pytest.mark.parametrize(("rule", "starts"), KNOWN)
def test_patch_starts_equal_known_vectors(rule: PatchingRule, starts: list[int]) -> None:
    assert reference.patch_starts(rule, ENTROPIES) == starts
    assert incremental(rule, ENTROPIES) == starts


rules = st.builds(
    PatchingRule,
    mode=st.sampled_from(["entropy", "entropy", "entropy", "bytes"]),
    threshold=st.sampled_from([-0.5, 0.0, 0.5, 1.0, 1.5]),
    threshold_add=st.none() | st.sampled_from([-0.5, 0.0, 0.5]),
    monotonic=st.booleans(),
    max_patch_length=st.none() | st.integers(1, 6),
)
# Multiples of a quarter: sums and differences are exact, and ties with the thresholds are common.
quarters = st.lists(st.integers(0, 12).map(lambda n: n / 4), min_size=1, max_size=40)


@given(rule=rules, entropies=quarters, chunk=st.integers(1, 9))
def test_incremental_patch_starts_equal_the_oracles(rule: PatchingRule, entropies: list[float], chunk: int) -> None:
    starts = reference.patch_starts(rule, entropies)
    assert incremental(rule, entropies, chunk) == starts


@given(rule=rules, entropies=quarters)
def test_patch_starts_of_a_prefix_are_a_prefix_of_the_patch_starts(rule: PatchingRule, entropies: list[float]) -> None:
    starts = reference.patch_starts(rule, entropies)
    for count in range(1, len(entropies)):
        assert reference.patch_starts(rule, entropies[:count]) == [s for s in starts if s <= count]


@given(entropies=quarters, threshold=st.sampled_from([0.5, 1.0, 1.335442066192627]))
def test_the_threshold_rule_equals_hugging_faces(entropies: list[float], threshold: float) -> None:
    lengths = BltPatcher.patch_lengths_from_entropies(
        torch.tensor([entropies]), len(entropies), patch_size=4, threshold=threshold
    )[0]
    starts = [0, *lengths.cumsum(0)[:-1].tolist()]
    assert incremental(PatchingRule(threshold=threshold), entropies) == starts


def test_the_threshold_is_compared_in_single_precision() -> None:
    threshold = 1.335442066192627
    at = torch.tensor(threshold).item()
    above = torch.nextafter(torch.tensor(threshold), torch.tensor(2.0)).item()
    assert incremental(PatchingRule(threshold=threshold), [1.0, at, above]) == [0, 1, 3]
    assert reference.patch_starts(PatchingRule(threshold=threshold), torch.tensor([1.0, at, above])) == [0, 1, 3]
