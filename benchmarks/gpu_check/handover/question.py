"""The interface of a question: cases that are measured apart, and a conclusion from their figures."""

from typing import Any, Protocol

from .scale import Scale

Case = dict[str, Any]
"""The parameters of a case; a row adds its figures."""


class Question(Protocol):
    """A module with these. TITLE: the subject."""

    TITLE: str

    @staticmethod
    def cases(scale: Scale) -> list[Case]:
        """Most valuable first."""
        ...

    @staticmethod
    def measure(scale: Scale, case: Case) -> Case:
        """The case's figures. Raises NotHere if this machine cannot do it."""
        ...

    @staticmethod
    def decide(rows: list[Case]) -> str:
        """The conclusion from the rows so far, in a sentence."""
        ...


class NotHere(Exception):
    """This device, or this version of torch, cannot run the case."""


def find(rows: list[Case], **wanted: Any) -> Case | None:
    """The first row with these values."""
    return next((row for row in rows if wanted.items() <= row.items()), None)


UNDECIDED = "not decided: figures are missing"
