"""The simulation: its invariants hold, a seed replays, and each repair undone is found."""

import pytest

from .plants import PLANTS, UNFAIR
from .run import main
from .turns import Unfair
from .world import Story, play

FEW = 50
"""Requests of a story."""


@pytest.mark.parametrize("seed", range(12))
def test_every_invariant_holds(seed: int) -> None:
    play(Story(seed, FEW))


def test_a_seed_replays_to_the_same_trace() -> None:
    assert play(Story(3, FEW)) == play(Story(3, FEW))
    assert play(Story(4, FEW)) != play(Story(3, FEW))


@pytest.mark.parametrize("repair", PLANTS)
def test_a_repair_undone_is_found(repair: str) -> None:
    for seed in range(300):
        try:
            play(Story(seed, FEW), PLANTS[repair])
        except AssertionError:
            # It is the plant that breaks it.
            play(Story(seed, FEW))
            return
    pytest.fail("no seed shows it")


@pytest.mark.parametrize(
    ("unfair", "seed"), [("the newest first", 3), ("priorities ignored", 3), ("no rows for prompts", 23)]
)
def test_a_scheduler_that_lets_some_wait_too_long_is_found(unfair: str, seed: int) -> None:
    with pytest.raises(Unfair):
        play(Story(seed, FEW), UNFAIR[unfair])


@pytest.mark.slow
def test_a_hundred_thousand_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--seeds", "500", "--first", "1000", "--requests", "200"])
    assert main() == 0
