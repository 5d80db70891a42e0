"""The fuzzers' invariants under hypothesis: they hold, and they find planted faults. `make fuzz` runs them for long."""

from contextlib import suppress

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.target import Target
from tests.fuzz.targets import NAMES, target

EXAMPLES = 200
MOST_EXAMPLES = 5000
"""In which a planted fault must be found."""


def mutated(target: Target) -> st.SearchStrategy[bytes]:
    """Seeds of which pieces are cut out, doubled or replaced, by other seeds' pieces, words or any bytes."""
    letter = st.integers(32, 126).map(lambda byte: bytes([byte]))
    piece = st.one_of(st.sampled_from([b"", *target.words]), letter, st.binary(max_size=4))
    cut = st.tuples(st.integers(0, 1 << 16), st.sampled_from([0, 1, 1, 1, 4]), piece)

    def changed(seed: bytes, cuts: list[tuple[int, int, bytes]]) -> bytes:
        for at, length, put in cuts:
            at %= len(seed) + 1
            seed = seed[:at] + put + seed[at + length :]
        return seed

    return st.builds(changed, st.sampled_from([b"", *target.seeds]), st.lists(cut, max_size=3))


@pytest.mark.parametrize("name", NAMES)
def test_invariants_hold_for_mutated_seeds(name: str) -> None:
    part = target(name)
    for seed in part.seeds:
        part.one(seed)

    @settings(max_examples=EXAMPLES)
    @given(mutated(part))
    def run(data: bytes) -> None:
        part.one(data)

    run()


@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name in NAMES for fault in target(name).faults])
def test_a_planted_fault_is_found(name: str, fault: str) -> None:
    """By mutation: no seed shows it."""
    part, found = target(name), list[bytes]()

    @settings(max_examples=MOST_EXAMPLES, phases=[Phase.generate], database=None, derandomize=True)
    @given(mutated(part))
    def run(data: bytes) -> None:
        try:
            part.one(data)
        except Exception:
            found.append(data)
            raise

    with part.faults[fault]():
        for seed in part.seeds:
            part.one(seed)
        with suppress(Exception):
            run()
    assert found
