"""The names of models on the hub: `org/name` or `org/name/folder`, with `@revision` if need be."""

import re
from dataclasses import dataclass

_PART = r"\w[\w.-]*"
_REFERENCE = re.compile(rf"({_PART}/{_PART})((?:/{_PART})*)(?:@(\w[\w./-]*))?", re.ASCII)


class HubError(ValueError):
    """A model that cannot be downloaded, or a folder that does not exist. One line that says what to do."""


@dataclass(frozen=True, slots=True)
class Reference:
    """repository: `org/name`. folder: inside the repository, "" for its root. revision: branch, tag or commit; None
    for the main branch."""

    repository: str
    folder: str = ""
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference | None":
        """None if the text cannot be such a name."""
        found = _REFERENCE.fullmatch(text)
        # Neither the hub nor git has names with "..", and revisions become paths in the cache.
        if not found or ".." in text:
            return None
        return cls(found[1], found[2].removeprefix("/"), found[3])

    def __str__(self) -> str:
        name = f"{self.repository}/{self.folder}" if self.folder else self.repository
        return f"{name}@{self.revision}" if self.revision else name
