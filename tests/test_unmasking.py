"""Unmasking rules: what they promise for any block."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.step.blocks import rule_and_bound
from engine.types import UnmaskRule
from kernels.dispatch import Kernels, NativeKernels

BLOCKS = st.integers(1, 12).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(0, size - 1), min_size=1, unique=True).map(sorted),
        st.lists(st.floats(0, 1, width=32), min_size=size, max_size=size),
        st.lists(st.floats(0, 6, width=32), min_size=size, max_size=size),
    )
)
RULES = st.one_of(
    st.floats(0, 1).map(lambda alpha: UnmaskRule(rule="confidence", alpha=alpha)),
    st.tuples(st.floats(0, 10), st.booleans()).map(
        lambda pair: UnmaskRule(rule="entropy", gamma=pair[0], minus_max=pair[1])
    ),
    st.just(UnmaskRule(rule="one_step")),
)

Block = tuple[list[int], list[float], list[float]]


def unmasked(rule: UnmaskRule, masked: list[int], confidence: list[float], entropy: list[float]) -> list[int]:
    """The places that the rule settles, by torch and by our own C."""
    number, bound = rule_and_bound(rule)
    how = (
        torch.tensor([[place in masked for place in range(len(confidence))]]),
        torch.tensor([confidence]),
        torch.tensor([entropy]),
        torch.tensor([number]),
        torch.tensor([bound], dtype=torch.float64),
    )
    settled, also = (kernels.unmask(*how) for kernels in (Kernels(), NativeKernels()))
    assert torch.equal(settled, also)
    places: list[int] = settled[0].nonzero()[:, 0].tolist()
    return places


@given(BLOCKS, RULES)
def test_every_rule_unmasks_at_least_one_masked_position_and_no_other(block: Block, rule: UnmaskRule) -> None:
    found = unmasked(rule, *block)
    assert found and set(found) <= set(block[0])
    assert len(set(found)) == len(found)


@given(BLOCKS, st.floats(0, 1))
def test_the_confidence_rule_unmasks_positions_above_alpha_or_the_most_confident(block: Block, alpha: float) -> None:
    masked, confidence, _ = block
    found = unmasked(UnmaskRule(rule="confidence", alpha=alpha), *block)
    above = {place for place in masked if confidence[place] > alpha}
    assert set(found) == above or (not above and confidence[found[0]] == max(confidence[p] for p in masked))


@given(BLOCKS, st.floats(0, 10), st.booleans())
def test_the_entropy_rule_unmasks_lowest_entropies_within_gamma(block: Block, gamma: float, minus_max: bool) -> None:
    masked, _, entropy = block
    found = unmasked(UnmaskRule(rule="entropy", gamma=gamma, minus_max=minus_max), *block)
    values = [entropy[place] for place in found]
    spent = sum(values) - (max(values) if minus_max else 0)
    assert len(found) == 1 or spent <= gamma + 1e-9
    left = [entropy[place] for place in masked if place not in found]
    assert not left or max(values) <= min(left)
    assert len(unmasked(UnmaskRule(rule="entropy", gamma=gamma + 1, minus_max=minus_max), *block)) >= len(found)
    assert len(unmasked(UnmaskRule(rule="entropy", gamma=gamma, minus_max=True), *block)) >= len(
        unmasked(UnmaskRule(rule="entropy", gamma=gamma), *block)
    )


def test_unmasking_rules_break_ties_to_the_left() -> None:
    assert unmasked(UnmaskRule(rule="confidence", alpha=0.9), [1, 2, 3], [0.5] * 4, [1.0] * 4) == [1]
    assert unmasked(UnmaskRule(rule="entropy", gamma=2.0), [1, 2, 3], [0.5] * 4, [1.0] * 4) == [1, 2]
