"""Sampling against a per-row reference in plain Python, row for row bitwise, and against its own law."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.step import sampling
from engine.step.sampling import draw, logprobs_of
from engine.types import SamplingParams
from kernels.dispatch import Kernels, NativeKernels

VOCAB = 260
KERNELS: tuple[Kernels, ...] = Kernels(), NativeKernels()
GREEDY = SamplingParams(temperature=0)


def distribution(logits: list[float], params: SamplingParams, counts: dict[int, int]) -> list[float]:
    """The law that a row must be drawn from, step by step as `SamplingParams` says it."""
    x = [v + params.logit_bias.get(i, 0.0) for i, v in enumerate(logits)]
    factor = params.repetition_penalty
    x = [v if i not in counts else v / factor if v > 0 else v * factor for i, v in enumerate(x)]
    x = [
        v - params.presence_penalty * (counts.get(i, 0) > 0) - params.frequency_penalty * counts.get(i, 0)
        for i, v in enumerate(x)
    ]
    x = [v if not params.allowed_ids or i in params.allowed_ids else -math.inf for i, v in enumerate(x)]
    best_first = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if params.temperature == 0:
        return [float(i == best_first[0]) for i in range(len(x))]
    weights = [math.exp((v - max(x)) / params.temperature) for v in x]
    keep = best_first[: params.top_k or len(x)]
    total, mass, nucleus = sum(weights[i] for i in keep), 0.0, []
    for i in keep:
        if nucleus and mass >= params.top_p * total:
            break
        nucleus.append(i)
        mass += weights[i]
    keep = [i for i in nucleus if weights[i] >= params.min_p * weights[best_first[0]]]
    total = sum(weights[i] for i in keep)
    return [weights[i] / total if i in keep else 0.0 for i in range(len(x))]


def choose(
    logits: Tensor, params: Sequence[SamplingParams], counts: Sequence[Mapping[int, int]], uniforms: Sequence[float]
) -> Tensor:  # fmt: skip
    """By torch and by our own C, which must agree."""
    chosen, also = (sampling.choose(logits, params, counts, uniforms, [], kernels)[0] for kernels in KERNELS)
    assert torch.equal(chosen, also)
    return chosen


def quantile(law: list[float], uniform: float) -> set[int]:
    """The ids that the inverse distribution function may name, rounding errors at a step forgiven."""
    found, below = set(), 0.0
    for i, p in enumerate(law):
        if p and below - 1e-9 <= uniform <= below + p + 1e-9:
            found.add(i)
        below += p
    return found


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-300, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.0, 0.33, 0.77, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 5, 99]),
    min_p=st.sampled_from([0.0, 0.123, 0.456]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.7, 0.6]),
    allowed_ids=st.one_of(st.just([]), st.lists(st.integers(0, 6), min_size=1)),
    logit_bias=st.dictionaries(st.integers(0, 6), st.sampled_from([-100.0, 1.3, 100.0])),
)
ROWS = st.tuples(
    st.lists(st.floats(-8, 8, width=16), min_size=7, max_size=7),
    PARAMS,
    st.dictionaries(st.integers(0, 6), st.integers(0, 3)),
    st.floats(0, 1, exclude_max=True),
)


@settings(max_examples=300)
@given(st.lists(ROWS, min_size=1, max_size=5))
def test_every_row_is_sampled_from_the_reference_distribution(
    rows: list[tuple[list[float], SamplingParams, dict[int, int], float]],
) -> None:
    logits, params, counts, uniforms = map(list, zip(*rows, strict=True))
    chosen = choose(torch.tensor(logits), params, counts, uniforms).tolist()
    for (row, p, seen, uniform), i in zip(rows, chosen, strict=True):
        assert i in quantile(distribution(row, p, seen), uniform)


def random_batch(rows: int) -> tuple[Tensor, list[SamplingParams], list[dict[int, int]], list[float]]:
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(rows)) * 3
    kinds = [
        SamplingParams(),
        GREEDY,
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(temperature=1.3, top_k=40, frequency_penalty=0.5),
        SamplingParams(temperature=0.6, min_p=0.05, logit_bias={65: 4.0}),
        SamplingParams(temperature=0.9, repetition_penalty=1.3, logit_bias={65: 4.1, 7: -0.3}, presence_penalty=0.1),
        SamplingParams(temperature=1.1, allowed_ids=[*range(40, 90)]),
    ]
    params = [kinds[r % len(kinds)] for r in range(rows)]
    counts = [{r % VOCAB: 2, 70: 1} for r in range(rows)]
    return logits, params, counts, [draw(7, r, 3) for r in range(rows)]


@pytest.mark.parametrize("rows", range(1, 34))
def test_a_row_gives_the_same_sample_alone_and_in_any_batch(rows: int) -> None:
    logits, params, counts, uniforms = random_batch(rows)
    together = choose(logits, params, counts, uniforms).tolist()
    alone = [int(choose(logits[r : r + 1], [params[r]], [counts[r]], [uniforms[r]])) for r in range(rows)]
    assert together == alone


@pytest.mark.parametrize("rows", [2, 9, 17, 33])
@pytest.mark.parametrize("width", [7, VOCAB])
def test_softmax_and_log_softmax_are_bitwise_the_same_in_any_batch(rows: int, width: int) -> None:
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)) * 5
    for f in (lambda x: x.double().softmax(-1), lambda x: x.log_softmax(-1)):
        assert torch.equal(f(logits), torch.cat([f(logits[r : r + 1].clone()) for r in range(rows)]))


def test_logprobs_are_bitwise_the_same_in_any_batch_and_ranked() -> None:
    logits = random_batch(9)[0]
    together = logprobs_of(logits, list(range(9)), 5)
    assert together == [logprobs_of(logits[r : r + 1], [r], 5)[0] for r in range(9)]
    for r, entry in enumerate(together):
        exact = logits[r].double().log_softmax(-1)
        assert entry.id == r
        assert entry.logprob == pytest.approx(exact[r].item(), abs=1e-5)
        assert list(entry.top) == exact.argsort(descending=True)[:5].tolist()
        assert list(entry.top.values()) == pytest.approx(exact.sort(descending=True).values[:5].tolist(), abs=1e-5)
    assert all(entry.top == {} for entry in logprobs_of(logits, list(range(9)), 0))


def test_equal_logits_rank_by_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0]])
    assert choose(logits, [GREEDY], [{}], [0.0]).tolist() == [1]
    only_one = SamplingParams(top_k=1)
    assert {int(choose(logits, [only_one], [{}], [u])) for u in (0.0, 0.5, 0.999)} == {1}
    assert list(logprobs_of(logits, [0], 2)[0].top) == [1, 2]


def test_samples_follow_the_softmax() -> None:
    """Chi-square with 5 degrees of freedom; 20.5 is the 0.1 % point, and the seeds are fixed."""
    logits, n = torch.tensor([[0.0, 1.0, -1.0, 0.5, 2.0, -2.0]]), 20_000
    counts = _histogram(logits, SamplingParams(), [draw(123, 0, i) for i in range(n)])
    expected = (logits[0].double().softmax(-1) * n).tolist()
    assert sum((c - e) ** 2 / e for c, e in zip(counts, expected, strict=True)) < 20.5


def _histogram(logits: Tensor, params: SamplingParams, uniforms: Sequence[float]) -> list[int]:
    n = len(uniforms)
    chosen = choose(logits.expand(n, -1), [params] * n, [{}] * n, uniforms)
    return torch.bincount(chosen, minlength=logits.shape[1]).tolist()


def test_random_draws_are_uniform_distinct_and_depend_on_every_argument() -> None:
    draws = [draw(seed, sample, position) for seed in (0, -1, 2**63) for sample in (0, 1) for position in range(500)]
    assert len(set(draws)) == len(draws)
    assert all(0 <= u < 1 for u in draws)
    bins = torch.bincount((torch.tensor(draws) * 10).long(), minlength=10).tolist()
    # Nine degrees of freedom: 27.9 is the 0.1 % point.
    assert sum((b - 300) ** 2 / 300 for b in bins) < 27.9
    assert draw(5, 1, 9) == draw(5, 1, 9)


@given(st.integers(-(2**63), 2**64), st.integers(0, 2**64), st.integers(0, 2**40))
def test_random_draws_equal_numpys_philox(seed: int, sample: int, position: int) -> None:
    mask = 2**64 - 1
    stream = np.random.Philox(key=(sample & mask) << 64 | seed & mask, counter=position)
    assert draw(seed, sample, position) == (int(stream.random_raw()) >> 11) * 2.0**-53


def test_random_draws_of_a_seed_never_change() -> None:
    """A change here breaks the promise that a seed keeps its meaning."""
    assert [draw(42, 0, i) for i in range(2)] == [0.8201981478608876, 0.36812845090913937]


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=2, min_p=0.1)])
@pytest.mark.parametrize("bad", [[math.nan, 1.0], [math.nan] * 2, [math.inf, 1.0], [-math.inf, -math.inf]])
def test_a_row_that_is_no_distribution_is_told_and_still_gives_an_id(params: SamplingParams, bad: list[float]) -> None:
    for kernels in KERNELS:
        for uniform in (0.0, 0.5, 0.999):
            ids, highest = sampling.choose(
                torch.tensor([[1.0, 2.0], bad]), [params] * 2, [{}] * 2, [uniform] * 2, [], kernels
            )
            assert [sampling.are_distributions([best]) for best in highest.tolist()] == [True, False]
            assert 0 <= int(ids[1]) < 2


def test_an_id_with_probability_zero_is_never_sampled() -> None:
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    assert _histogram(logits, SamplingParams(), [0.0, 0.4999999, 0.5, 0.9999999999999999]) == [2, 0, 2]


def test_a_bias_on_an_unknown_id_has_no_effect() -> None:
    params = SamplingParams(temperature=0, logit_bias={9: 5.0, -1: 5.0})
    assert choose(torch.tensor([[1.0, 0.0]]), [params], [{}], [0.0]).tolist() == [0]
