"""Two checkouts give the same answers: the program that says so finds no difference where there is none, and tells the
first where there are some."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import same_answers
from benchmarks.recorded import Run, runs
from benchmarks.same_answers import Line, first_difference, happened, pairs, play, texts_differ

RUN = Run("toy", {}, [])
LINES: list[Line] = [
    {"run": "toy", "step": 0, "event": {"type": "Failed", "id": "b", "code": "invalid", "message": "m", "param": "p"}},
    {"run": "toy", "step": 0, "event": {"type": "Delta", "id": "a", "ids": [104, 105], "text": "ZGU="}},
    {"run": "toy", "step": 3, "event": {"type": "Delta", "id": "a", "ids": [106], "text": "Zg=="}},
    {"run": "toy", "step": 3, "event": {"type": "Finished", "id": "a", "reason": "length", "usage": {"rounds": 2}}},
    {"run": "toy", "counted": {"steps": 4, "decoders": {"blt": {"accepted": 0}}}},
]


def changed(place: int, *path: Any, to: Any) -> list[Line]:
    """The lines with one value set to something else."""
    lines: Any = deepcopy(LINES)
    at = lines[place]
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return list(lines)


def test_an_engine_gives_the_same_answers_twice(tmp_path: Path) -> None:
    model = same_answers.models(tmp_path)["isolated"]
    # The first requests of two runs.
    toys = [run._replace(schedule=run.schedule[:30]) for run in runs(12) if run.name in ("crowded", "ahead")]
    files = play(model, toys, {"other": same_answers.ROOT, "this": same_answers.ROOT}, tmp_path / "events")
    found = list(pairs(toys, files["other"], files["this"]))
    assert [run.name for run, _, _ in found] == ["crowded", "ahead"]
    for run, other, this in found:
        assert first_difference(run, other, this) is None and not texts_differ(other, this)
        assert len(this) > 60 and "counted" in this[-1] and "seconds" not in str(this)
    run, _, this = found[0]
    assert {"a request ends with length", "a request fails with invalid", "events have traces"} <= happened(run, this)


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        (changed(1, "event", "ids", 1, to=9), (0, "a", "event.ids[1]", 105, 9)),
        (changed(1, "event", "ids", to=[104]), (0, "a", "event.ids[1]", 105, "nothing")),
        (changed(2, "step", to=4), (3, "a", "step", 3, 4)),
        (changed(0, "event", "param", to=None), (0, "b", "event.param", "p", None)),
        (changed(3, "event", "usage", "rounds", to=3), (3, "a", "event.usage.rounds", 2, 3)),
        (
            changed(4, "counted", "decoders", "blt", "accepted", to=1),
            (None, None, "counted.decoders.blt.accepted", 0, 1),
        ),
        (LINES[:-1], (None, None, "counted", LINES[-1]["counted"], "nothing")),
    ],
)
def test_the_first_difference_is_told(lines: list[Line], where: tuple[Any, ...]) -> None:
    difference = first_difference(RUN, LINES, lines)
    assert difference == ("toy", *where)
    assert all(str(said) in str(difference) for said in where[1:3] if said)
    assert f"this   {same_answers.shown(where[-1])}" in str(difference)


def test_the_message_of_a_refusal_may_change() -> None:
    reworded = changed(0, "event", "message", to="no")
    assert first_difference(RUN, LINES, reworded) is None
    assert (texts_differ(LINES, reworded), texts_differ(LINES, LINES)) == (1, 0)


def test_where_times_decide_answers_alone_are_compared() -> None:
    timed = RUN._replace(timed=True)
    for lines in (changed(2, "step", to=4), changed(3, "event", "usage", to={}), changed(4, "counted", "steps", to=9)):
        assert first_difference(timed, LINES, lines) is None and first_difference(RUN, LINES, lines)
    at_once = [*LINES[:1], changed(1, "event", "ids", to=[104, 105, 106])[1], *LINES[3:]]
    at_once[1]["event"]["text"] = "ZGVm"
    assert first_difference(timed, LINES, at_once) is None, "it does not matter how many events a text comes in"
    assert first_difference(timed, LINES, changed(2, "event", "text", to="Zw==")) == (
        *("toy", None, "a"),
        *("event.text", "def", "deg"),
    )


def test_a_folder_without_an_engine_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        same_answers.main(["--against", str(tmp_path)])
    assert f"{tmp_path} is no checkout" in capsys.readouterr().err
