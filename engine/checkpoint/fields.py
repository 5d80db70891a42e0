"""How the fields of a configuration are accounted for: none is passed over in silence.

A field that a section declares is honoured, or refused by its type, which then allows only the value that this
architecture has. `immaterial` lists the fields that change nothing about what the model computes, with the reason.
Any other field with a value is reported to the user as unknown.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from .base import printable

Size = Annotated[int, Field(ge=1, lt=2**63)]
"""Beyond it, products with floats overflow."""
Few = Annotated[int, Field(ge=1, le=1000)]
"""Layers, whose tensors are listed before a file is looked at, and bytes of a hash group, of which every row keeps as
many: a slip in a number must not fill the memory."""


Theta = Annotated[float, Field(ge=1, le=1e15)]
"""Base of the rotary angles. One far below 1 would turn them into infinities."""


class Section(BaseModel):
    """A part of a configuration file."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    immaterial: ClassVar[dict[str, str]] = {}
    """Reason by field."""

    @classmethod
    def accounted_fields(cls) -> set[str]:
        """Every name that is honoured, refused or immaterial."""
        names = set(cls.model_fields) | set(cls.immaterial)
        for info in cls.model_fields.values():
            choices = getattr(info.validation_alias, "choices", [])
            names |= {choice for choice in choices if isinstance(choice, str)}
        return names

    def unknown_fields(self, inside: str = "") -> Iterator[str]:
        """'field = value' of all that is not accounted for, here and in the sections within. A null says nothing."""
        for name, value in (self.model_extra or {}).items():
            if name not in self.immaterial and value is not None:
                yield f"{inside}{name} = {str(value)[:60]}"
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                yield from value.unknown_fields(f"{inside}{name}.")


def unknown_note(section: Section, file: str, inside: str = "") -> list[str]:
    """The one note about them, if there are any: a line."""
    unknown = list(section.unknown_fields(inside))
    return [printable(f"{file}: unknown fields, ignored: {', '.join(unknown)}")] if unknown else []
