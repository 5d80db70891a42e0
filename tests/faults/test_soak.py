"""The soak of `benchmarks.soak`: a minute of it, and what it calls wrong."""

from collections import Counter
from typing import Any

import pytest

from benchmarks import soak
from tests.faults.asking import Answer, Choice, Record, Scores

WHOLE = Choice(text="abcdé", ids=[1, 2, 3], tokens=["a", "b"], finish_reason="length", scores=Scores([-1.0, -2.0]))


@pytest.mark.faults
async def test_a_minute_of_random_faults_breaks_nothing(record_property: Record, monkeypatch: Any) -> None:
    monkeypatch.setattr(soak, "FAULT_SECONDS", 4.0)
    noted: list[int] = []
    seen = await soak.soak(60.0, seed=5, each_minute=lambda seen: noted.append(seen.right.total()))
    assert noted, "what it has seen is told while it runs"
    assert not seen.wrong and seen.faults.total() >= 2 and seen.right["read"] > 20
    record_property("figure", soak.said(seen))


@pytest.mark.parametrize(
    ("habit", "choice", "wrong"),
    [
        ("read", WHOLE, False),
        ("read", Choice(**vars(WHOLE) | {"text": "abcdX"}), True),
        ("read", Choice(**vars(WHOLE) | {"scores": Scores([-1.0, -2.1])}), True),
        ("read", Choice(**vars(WHOLE) | {"finish_reason": None}), True),
        ("leave", Choice(text="abc", ids=[1, 2], tokens=["a"], scores=Scores([-1.0])), False),
        ("leave", Choice(text="abc", ids=[1, 3]), True),
        ("leave", Choice(text="b"), True),
        ("deadline", Choice(text="abcd\ufffd", finish_reason="timeout"), False),
        ("deadline", Choice(text="abcdé", finish_reason="timeout", scores=Scores([-1.5])), True),
        ("deadline", Choice(text="abc", finish_reason="length"), True),
    ],
)
def test_what_a_soak_calls_wrong(habit: str, choice: Choice, wrong: bool) -> None:
    run = soak.Soak(None, None, seed=1)  # type: ignore[arg-type]
    run._judge({"prompt": "x"}, Answer(choices={0: choice}), Answer(choices={0: WHOLE}), habit)
    assert bool(run.seen.wrong) == wrong and run.seen.right == Counter({} if wrong else {habit: 1})
    if wrong:
        assert '"prompt": "x"' in run.seen.wrong[0]


def test_an_error_and_a_missing_choice_are_wrong() -> None:
    for answer in (Answer(status=500, error={"code": "internal_error"}), Answer()):
        run = soak.Soak(None, None, seed=1)  # type: ignore[arg-type]
        run._judge({}, answer, Answer(choices={0: WHOLE}), "read")
        assert len(run.seen.wrong) == 1
