"""Launches on a device whose clock is late: every one is timed once, and only after it has ended."""

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import build
from engine.config import Policy
from tests.engines import make_engine, request, run
from tests.models import text
from tests.test_passes import WAYS
from tests.test_passes import model as model


class LateClock:
    """Moments are numbers. One has passed once the host has waited for something launched after it."""

    waits = False

    def __init__(self) -> None:
        self._next, self._passed = count(1), 0

    def now(self) -> int:
        return next(self._next)

    def passed(self, moment: int) -> bool:
        return moment <= self._passed

    def seconds(self, began: int, ended: int) -> float:
        assert began < ended <= self._passed, "asked for the time of a launch that may still run"
        return ended - began

    def host_waits(self) -> None:
        self._passed = next(self._next) - 1


@pytest.mark.parametrize("policy", ["measured", "always", "never"])
def test_every_launch_is_timed_once_and_after_it_has_ended(
    model: Path, policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, to_list, inside = LateClock(), torch.Tensor.tolist, False
    monkeypatch.setattr(build, "clock_of", lambda device: clock)

    def waiting(tensor: torch.Tensor) -> Any:
        if not inside:  # Torch's kernels are the device here.
            clock.host_waits()
        return to_list(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", waiting)
    engine = make_engine(model, run_ahead=policy, kernels="torch")
    launch, launches = engine.stepper.executor.run, 0

    def counted(*given: Any) -> Any:
        nonlocal launches, inside
        launches, inside = launches + 1, True
        try:
            return launch(*given)
        finally:
            inside = False

    monkeypatch.setattr(engine.stepper.executor, "run", counted)
    ways: list[dict[str, Any]] = [{}, *WAYS.values()]
    for way in ways:
        run(engine, [request(str(i), text(20 + i, i), 20, **way) for i in range(3)])
    run(engine, [request(str(i), text(20 + i, i), 20, **way) for i, way in enumerate(ways)])
    engine.stepper.stages.discard()
    clock.host_waits()
    engine.ledger.poll()
    # No other moment is taken between the beginning and the end of a launch: each lasts 1.
    assert sum(engine.ledger.total.seconds.values()) == launches > 100
