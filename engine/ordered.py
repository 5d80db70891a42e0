"""A map that iterates over its values in the ascending order of their keys, found by binary search."""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=tuple[Any, ...])
Value = TypeVar("Value")


class Ordered(Generic[Key, Value]):
    """No two keys may be equal."""

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self._values: dict[Key, Value] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Value]:
        return map(self._values.__getitem__, self._keys)

    def add(self, key: Key, value: Value) -> None:
        insort(self._keys, key)
        self._values[key] = value

    def remove(self, key: Key) -> None:
        """Raises KeyError."""
        del self._values[key]
        del self._keys[bisect_left(self._keys, key)]

    def after(self, key: Key | None) -> Value | None:
        """The first value with a greater key, or the first of all."""
        place = 0 if key is None else bisect_right(self._keys, key)
        return self._values[self._keys[place]] if place < len(self._keys) else None
