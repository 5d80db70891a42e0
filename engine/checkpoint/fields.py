"""How the fields of a configuration are accounted for: none is ignored silently.

A field that a section declares is used, or its type allows only the one value that this architecture has. `immaterial`
lists the fields that do not change what the model computes, each with the reason. Any other field with a value is
reported to the user as unknown.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from .base import printable

Size = Annotated[int, Field(ge=1, lt=2**31)]
"""Kernels count with 32 bits."""
Positions = Annotated[int, Field(ge=1, le=2**24)]
"""No tensor in the file has as many, and tables of all of them are made. Their angles are computed in float32, in which
later positions would be rounded to others."""
Few = Annotated[int, Field(ge=1, le=1000)]
"""For layers, whose tensors are listed before a file is opened, for the bytes of a hash group, which every row keeps,
and for blocks, which every sequence has memory for: a typing error must not fill the memory."""
Groups = Annotated[list[Few], Field(max_length=64)]

Theta = Annotated[float, Field(ge=1, le=1e15)]
"""Base of the rotary angles. A base far below 1 would make them infinite."""


class Section(BaseModel):
    """A part of a configuration file."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    immaterial: ClassVar[dict[str, str]] = {}
    """Reason by field."""

    def unknown_fields(self, inside: str = "") -> Iterator[str]:
        """'field = value' for all fields that are not accounted for, here and in nested sections; no nulls."""
        for name, value in (self.model_extra or {}).items():
            if name not in self.immaterial and value is not None:
                yield f"{inside}{name} = {str(value)[:60]}"
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                yield from value.unknown_fields(f"{inside}{name}.")


def unknown_note(section: Section, file: str, inside: str = "") -> list[str]:
    """One line about all unknown fields, or none if there are none."""
    unknown = list(section.unknown_fields(inside))
    return [printable(f"{file}: unknown fields, ignored: {', '.join(unknown)}")] if unknown else []
