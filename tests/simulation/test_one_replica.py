"""A fleet whose only replica is killed: requests wait until there is another, and their deadlines do not wait."""

from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import pytest

from deploy.ray_call import Call

from .fleet import FleetStory, play
from .fleet_plants import PLANTS
from .world import Plant, Violation


class OneReplica(FleetStory):
    """A crowd comes at once, for more work than the deadlines leave time for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_replicas, self.num_requests, self.max_sequences, self.span = 1, 60, 2, 0.0
        self.faults = [(0.25, "kill")]

    def body(self) -> dict[str, Any]:
        return super().body() | {"prompt": "abc" * 500, "max_tokens": 100, "stop": [], "timeout": 5.0}


def _as_made(self: Call) -> dict[str, Any]:
    """A call says how old its request was when the call was made."""
    return {name: value for name, value in vars(self).items() if name not in ("work", "made")}


UNDONE: dict[str, Plant] = {
    "nothing": ExitStack,
    "the wait for a replica": partial(mock.patch.object, Call, "__getstate__", _as_made),
    "the rest of the timeout": PLANTS["the rest of the timeout"],
}


@pytest.mark.parametrize("undone", UNDONE)
def test_deadlines_are_kept_while_there_is_no_replica(undone: str) -> None:
    late = []
    for seed in (1, 2):
        try:
            play(OneReplica(seed), UNDONE[undone])
        except Violation as error:
            late.append(str(error))
    assert bool(late) == (undone != "nothing"), late
    assert all("after its deadline" in one for one in late)
