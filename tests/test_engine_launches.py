"""Launches of the engine for each committed byte, with the layers of 1b: how many there may be, and that none hides."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.engine_launches import AHEAD, Calls, Launches, Watch, count, engine_of, render
from benchmarks.launches import RATES
from kernels.dispatch import TritonKernels
from kernels.lang import IN_INTERPRETER

pytestmark = pytest.mark.skipif(not IN_INTERPRETER, reason="compiled kernels cannot be left out")

MOST: dict[str, tuple[float, float]] = {
    "blt": (207.7, 286.5),
    "blt-s k=8": (113.5, 107.6),
    "blt-d B=8": (55.3, 55.2),
    "blt-dv B=8": (51.3, 51.3),
}
"""Launches for a committed byte, where the host reads every pass, and running ahead. Ahead of the host blt launches the
global stage for every byte: where no patch closes its kernels return at once."""


@pytest.fixture(scope="module")
def launches() -> Launches:
    return Launches.of("1b")


@pytest.mark.parametrize("way", RATES)
def test_no_decoder_launches_more_for_a_byte_than_it_may(launches: Launches, way: str) -> None:
    found = [launches.per_byte(way, ahead) for ahead in AHEAD]
    assert all(number <= most for number, most in zip(found, MOST[way], strict=True)), found


def test_every_stage_is_counted_with_its_layers(launches: Launches) -> None:
    stages = launches.stages("never") | launches.stages("always")
    assert set(stages) == {"patcher", "encoder", "global", "global unread", "decoder", "draft", "unmask"}
    layers = {"patcher": 14, "encoder": 1, "global": 25, "global unread": 25, "decoder": 9, "draft": 9, "unmask": 9}
    for name, calls in stages.items():
        kernels = sum(number for launched, number in calls.tally.items() if launched.kind == "kernel")
        assert calls.passes >= calls.calls > 0
        assert calls.per_pass > kernels / calls.passes > layers[name]


def test_the_table_names_kernels_operations_and_their_lines(launches: Launches) -> None:
    told = render(launches)
    assert "| blt-dv B=8 | always |" in told and "## patcher: " in told and "## around the stages, blt," in told
    assert "| copy | output of the recording | 1 | engine/step/graphs.py:" in told


def patcher(folder: Path) -> Calls:
    with Watch() as watch:
        counted = count(engine_of(folder, "tiny", "never"), watch, "blt", 1)
    return counted.stages["patcher"]


def test_planted_kernels_and_operations_are_seen_and_views_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, entropy = patcher(tmp_path), TritonKernels.entropy

    def planted(logits: Tensor) -> Tensor:
        entropy(logits)  # a kernel
        entropy(logits[:0])  # one of no programs
        logits.view(-1)[1:].flatten()  # views
        torch.empty_like(logits)
        return entropy(logits.double().float())  # two casts

    monkeypatch.setattr(TritonKernels, "entropy", staticmethod(planted))
    more = patcher(tmp_path).tally - before.tally
    found = sorted((launched.kind, launched.name, number) for launched, number in more.items())
    assert found == [("kernel", "entropy", 1), ("torch", "_to_copy", 2)]
    assert all(launched.where.startswith(("engine/", "kernels/")) for launched in more)
