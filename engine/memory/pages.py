"""Page accounting: which table holds which page. Integers only; the tensors are in `engine.memory.caches`."""

from array import array
from collections.abc import Iterable


class OutOfPages(RuntimeError):
    """A pool has fewer free pages than were asked for."""


class PagePool:
    """Pages 1..num_pages-1 of one cache. Page 0 is never handed out: padding rows write there.

    Any number of tables may hold a page, and the prefix cache may also keep it for later texts. It is free again once
    it is neither held nor kept. The page that became free last is taken first, since it is still warm.
    """

    def __init__(self, name: str, num_pages: int) -> None:
        if num_pages < 2:
            raise ValueError(f"pool {name!r} must have at least 2 pages, one of them for padding, not {num_pages}")
        self.name = name
        self.num_total = num_pages - 1
        self._free = list(range(self.num_total, 0, -1))
        self._holders = [0] * num_pages
        self._kept = [0] * num_pages
        self.num_idle = 0
        """Pages that are kept and that no table holds."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_total - self.num_free - self.num_idle

    def can_take(self, n: int) -> bool:
        return n <= self.num_free

    def take(self, n: int) -> list[int]:
        """Takes n pages, or raises OutOfPages and takes none."""
        if not self.can_take(n):
            raise OutOfPages(f"pool {self.name!r} has {self.num_free} of {self.num_total} pages free, {n} are needed")
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a holder to pages that are held or kept."""
        for page in pages:
            self.num_idle -= not self._holders[page]
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Removes a holder. Raises ValueError, with nothing changed, if a page is not in use or is named twice."""
        pages = list(pages)
        for page in pages:
            if not 1 <= page <= self.num_total or not self._holders[page]:
                raise ValueError(f"page {page} of pool {self.name!r} is not in use")
        if len(set(pages)) < len(pages):
            raise ValueError(f"pool {self.name!r} was given a page twice: {pages}")
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                if self._kept[page]:
                    self.num_idle += 1
                else:
                    self._free.append(page)

    def keep(self, pages: Iterable[int]) -> None:
        """Keeps pages that are held; call `forget` once per `keep`."""
        for page in pages:
            assert self._holders[page]
            self._kept[page] += 1

    def forget(self, pages: Iterable[int]) -> None:
        """Undoes one `keep`."""
        for page in pages:
            self._kept[page] -= 1
            if not self._kept[page] and not self._holders[page]:
                self.num_idle -= 1
                self._free.append(page)

    def check_integrity(self) -> None:
        """Raises RuntimeError if the free list and the pages' marks disagree. O(pages); for idle moments and tests."""
        pages = range(1, self.num_total + 1)
        marked = {page for page in pages if not self._holders[page] and not self._kept[page]}
        if marked != set(self._free) or len(marked) != len(self._free):
            raise RuntimeError(f"pool {self.name!r}: {len(self._free)} pages listed as free, {len(marked)} marked")
        idle = sum(not self._holders[page] and self._kept[page] > 0 for page in pages)
        if idle != self.num_idle:
            raise RuntimeError(f"pool {self.name!r}: {self.num_idle} pages counted as kept alone, {idle} marked")


class BlockTable:
    """The pages of one sequence in one cache.

    `pages` hold rows [first * page_size, (first + len(pages)) * page_size). Earlier rows were trimmed and stay dead
    until `release`.
    """

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self._pool = pool
        self._page_size = page_size
        self.pages = array("q")
        self.first = 0
        """Absolute index of the first live page, or of the next page to be taken if there is none."""
        self.capacity = 0
        """No page is missing for rows before this one."""
        self._trimmed = (1, 0)
        """`trim` changes nothing for a first row below the first number and an end above the second."""
        self._tail_is_borrowed = False
        self._count()

    def missing(self, end: int) -> int:
        """How many pages `own()` and `extend(end)` would take."""
        if end <= self.capacity:
            return 0
        return max(self._pages_up_to(end) - self.first - len(self.pages), 0) + self._tail_is_borrowed

    def covering(self, first: int, end: int) -> tuple[int, list[int]]:
        """The index of the page that holds row `first`, and the pages of rows first..end-1."""
        index = first // self._page_size
        if first >= end:
            return index, []
        return index, self.pages[index - self.first : self._pages_up_to(end) - self.first].tolist()

    def borrow(self, first: int, pages: list[int], end: int) -> None:
        """Fills an empty table with pages of others, from page index `first` on; they hold rows up to `end`. Call `own`
        before a row is written."""
        self._pool.share(pages)
        self.first, self.pages = first, array("q", pages)
        self._tail_is_borrowed = bool(pages) and end % self._page_size > 0
        self._count()

    def own(self) -> tuple[int, int] | None:
        """Takes a page to replace the borrowed one that rows will be written into. Returns (old, new) for the caller to
        copy. Raises OutOfPages, with nothing taken."""
        if not self._tail_is_borrowed:
            return None
        (page,) = self._pool.take(1)
        old, self.pages[-1] = self.pages[-1], page
        self._pool.give_back((old,))
        self._tail_is_borrowed = False
        self._count()
        return old, page

    def extend(self, end: int) -> None:
        """Takes pages until every live row before `end` has a place. Raises OutOfPages, with nothing taken."""
        if end > self.capacity:
            self.pages.extend(self._pool.take(self.missing(end)))
            self._count()

    def trim(self, first: int, end: int) -> None:
        """Does `trim_before` and `cut`: rows first..end-1 stay."""
        if first >= self._trimmed[0]:
            self.trim_before(first)
        if end <= self._trimmed[1]:
            self.cut(end)

    def trim_before(self, row: int) -> None:
        """Declares rows before `row` dead and gives back the pages that hold no other rows."""
        first = max(self.first, row // self._page_size)
        dead, self.pages = self.pages[: first - self.first], self.pages[first - self.first :]
        self.first = first
        self._pool.give_back(dead)
        self._count()

    def cut(self, end: int) -> None:
        """Gives back the pages that only hold rows from `end` on."""
        keep = max(self._pages_up_to(end) - self.first, 0)
        tail, self.pages = self.pages[keep:], self.pages[:keep]
        self._pool.give_back(tail)
        self._count()

    def release(self) -> None:
        """Gives all pages back; the table starts again at row 0."""
        self._pool.give_back(self.pages)
        self.pages, self.first, self._tail_is_borrowed = array("q"), 0, False
        self._count()

    def _count(self) -> None:
        end = (self.first + len(self.pages)) * self._page_size
        self.capacity = 0 if self._tail_is_borrowed else end
        self._trimmed = (self.first + 1) * self._page_size, end - self._page_size

    def _pages_up_to(self, end: int) -> int:
        return -(-end // self._page_size)
