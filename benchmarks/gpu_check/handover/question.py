"""What every question is: cases that are measured apart, and what their figures decide."""

from typing import Any, Protocol

from .scale import Scale

Case = dict[str, Any]
"""What tells a case from others; a row is that and its figures."""


class Question(Protocol):
    """A module with these. TITLE: what is asked."""

    TITLE: str

    @staticmethod
    def cases(scale: Scale) -> list[Case]:
        """Most valuable first."""
        ...

    @staticmethod
    def measure(scale: Scale, case: Case) -> Case:
        """The case's figures. Raises NotHere where this machine cannot do it."""
        ...

    @staticmethod
    def decide(rows: list[Case]) -> str:
        """What follows from the rows that there are, in a sentence."""
        ...


class NotHere(Exception):
    """This device, or this version of torch, cannot do what is asked."""


def find(rows: list[Case], **wanted: Any) -> Case | None:
    """The first row with these values."""
    return next((row for row in rows if wanted.items() <= row.items()), None)


UNDECIDED = "not decided: figures are missing"
