"""Which sequence gets pages: what fits, what is taken and given back, and which prefixes are forgotten for it.

Caches and pools do not depend on this. The scheduler asks, and preempts if rows do not fit.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple

from ..rows import Rows
from ..sequence import Sequence
from .caches import Caches
from .pages import BlockTable, OutOfPages, PagePool
from .prefix import PrefixCache
from .text import Slots


class Reach(NamedTuple):
    """Rows that a sequence will write: of the text up to `end`, and cells up to `reach`."""

    sequence: Sequence
    end: int
    reach: int


class Memory:
    """The pages and slots of all sequences, and the prefixes that are kept in what they leave."""

    def __init__(self, caches: Caches, prefixes: PrefixCache | None, slots: Slots) -> None:
        self.caches, self.prefixes, self.slots = caches, prefixes, slots
        self._of_patches = {name for name, spec in caches.specs.items() if spec.rows_from == "patch"}
        self._held: Mapping[int, int] = {}

    def room(self, sequence: Sequence) -> int:
        """Rows of the text that a sequence may run next without outgrowing the caches, even with all pages its own:
        those whose boundaries are decided, or else one per patch that still fits, since each may close one."""
        decided, computed = sequence.patching.decided, sequence.num_computed
        return decided - computed if computed < decided else self.caches.max_patches - sequence.patch_of(computed)

    def reserve(self, rows: Rows) -> bool:
        """Takes the pages for all rows, and forgets prefixes for them if need be; or takes none, forgets nothing and
        returns False. An undecided byte counts as closing a patch, and one more patch may be closed for a block."""
        return self._take(self._short(Reach(rows.sequence, rows.end, rows.reach)))

    def reserve_all(self, reaches: Seq[Reach]) -> bool:
        """Does `reserve` for rows of several sequences that may run in addition; False, too, beyond the longest
        text."""
        if any(reach > self.caches.max_length for _, _, reach in reaches):
            return False
        return self._take([table for reach in reaches for table in self._short(reach)])

    def attach(self, sequence: Sequence) -> None:
        """Before a sequence is admitted: lets it begin after its longest cached prefix, unless its prompt's rows must
        run for their scores."""
        if self.prefixes:
            self.prefixes.attach(sequence, from_root=sequence.scores_prompt)

    def remember(self, sequence: Sequence) -> None:
        """Keeps what the sequence has computed for later texts."""
        if self.prefixes:
            self.prefixes.remember(sequence)

    def trim(self, sequence: Sequence) -> None:
        """After a step: remembers, then gives back pages before every window, and those of rejected rows and
        patches."""
        self.remember(sequence)
        computed = sequence.num_computed
        patch = sequence.patch_of(computed)
        start = sequence.patching.starts[patch]
        end = max(computed, self._held.get(sequence.arrival, 0))
        for name, table in sequence.tables.items():
            first = self.caches.first_live(name, computed, patch, start)
            table.trim(first, patch if name in self._of_patches else end)

    def release(self, sequence: Sequence) -> None:
        """Gives back all pages of a sequence, and its slot."""
        self.slots.drop(sequence)
        for table in sequence.tables.values():
            table.release()

    def hold(self, ends: Mapping[int, int]) -> None:
        """Keeps pages that the device is writing ahead of the host, instead of those held so far. ends: per sequence's
        arrival, the position after the rows there."""
        self._held = ends

    def _short(self, rows: Reach) -> list[tuple[str, BlockTable, int]]:
        """The caches that lack pages, and up to which row."""
        sequence, end, reach = rows
        patches = sequence.most_patches(end) + (reach > end)
        short = []
        for name, table in sequence.tables.items():
            last = patches if name in self._of_patches else reach
            if last > table.capacity:
                short.append((name, table, last))
        return short

    def _take(self, short: Seq[tuple[str, BlockTable, int]]) -> bool:
        missing: dict[PagePool, int] = {}
        for name, table, last in short:
            pool = self.caches.pools[name]
            missing[pool] = missing.get(pool, 0) + table.missing(last)
        if not all(pages <= pool.num_free + pool.num_idle for pool, pages in missing.items()):
            return False
        self._forget_for(missing)
        for name, table, last in short:
            if borrowed := table.own():
                self.caches.copy_page(name, *borrowed)
            table.extend(last)
        return True

    def _forget_for(self, missing: Mapping[PagePool, int]) -> None:
        """Forgets prefixes, the least recently used first, until that many pages are free. Raises OutOfPages."""
        while not all(pool.can_take(pages) for pool, pages in missing.items()):
            if not (self.prefixes and self.prefixes.forget()):
                raise OutOfPages("some pages are marked as kept, but belong to no prefix")
