"""Page accounting: who holds which page. Integers only; the tensors behind the pages are `engine.caches`."""

from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """A pool has fewer free pages than were asked for."""


class PagePool:
    """Pages 1..num_pages-1 of one cache. Page 0 is never handed out: padding rows write there.

    The page given back last is taken first, since it is the one that is still warm.
    """

    def __init__(self, name: str, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"pool {name!r} needs a page besides the scratch page, not {num_pages} pages")
        self.name = name
        self.num_total = num_pages - 1
        self._free = list(range(self.num_total, 0, -1))
        self._is_free = [False] + [True] * self.num_total

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_free

    def can_take(self, n: int) -> bool:
        return n <= self.num_free

    def take(self, n: int) -> list[int]:
        """Takes n pages, or raises OutOfPages and takes none."""
        if not self.can_take(n):
            raise OutOfPages(f"pool {self.name!r} has {self.num_free} of {self.num_total} pages free, {n} are needed")
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._is_free[page] = False
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Frees pages. Raises ValueError, with none freed, if one of them is not in use or is named twice."""
        pages = list(pages)
        for page in pages:
            if not 1 <= page <= self.num_total or self._is_free[page]:
                raise ValueError(f"page {page} of pool {self.name!r} is not in use")
        if len(set(pages)) < len(pages):
            raise ValueError(f"pool {self.name!r} was given a page twice: {pages}")
        for page in pages:
            self._is_free[page] = True
        self._free += pages

    def check_integrity(self) -> None:
        """Raises RuntimeError if the free list and the pages' marks disagree. O(pages); for idle moments and tests."""
        marked = {page for page, free in enumerate(self._is_free) if free}
        if marked != set(self._free) or len(marked) != len(self._free):
            raise RuntimeError(f"pool {self.name!r}: {len(self._free)} pages listed as free, {len(marked)} marked")


class BlockTable:
    """The pages of one sequence in one cache.

    `pages` hold rows [first * page_size, (first + len(pages)) * page_size); rows before were trimmed and stay dead
    until `release`.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self.pages: list[int] = []
        self.first = 0
        """Absolute index of the first live page; where the next page will stand if there is none."""

    def missing(self, end: int) -> int:
        """Pages that `extend(end)` would take."""
        return max(self._pages_up_to(end) - self.first - len(self.pages), 0)

    def extend(self, end: int) -> None:
        """Takes pages until every live row before `end` has a place. Raises OutOfPages, with nothing taken."""
        self.pages += self._pool.take(self.missing(end))

    def trim_before(self, row: int) -> None:
        """Declares rows before `row` dead and gives back the pages that hold no other rows."""
        first = max(self.first, row // self._page_size)
        dead, self.pages = self.pages[: first - self.first], self.pages[first - self.first :]
        self.first = first
        self._pool.give_back(dead)

    def cut(self, end: int) -> None:
        """Gives back the pages that only hold rows at or behind `end`."""
        keep = max(self._pages_up_to(end) - self.first, 0)
        tail, self.pages = self.pages[keep:], self.pages[:keep]
        self._pool.give_back(tail)

    def slot(self, row: int) -> int:
        """Where a row lies in the cache: page * page_size + offset. Raises IndexError for a row without a place."""
        index = row // self._page_size - self.first
        if not 0 <= index < len(self.pages):
            raise IndexError(f"row {row} has no page in pool {self._pool.name!r}")
        return self.pages[index] * self._page_size + row % self._page_size

    def release(self) -> None:
        """Gives everything back; the table starts anew at row 0."""
        self._pool.give_back(self.pages)
        self.pages, self.first = [], 0

    def _pages_up_to(self, end: int) -> int:
        return -(-end // self._page_size)
