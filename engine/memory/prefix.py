"""The prefix cache: later texts reuse the cached rows of an earlier text that begins like them.

A tree over ids, in blocks of `BLOCK`. A node keeps what a sequence needs to continue after its block: the live pages
of the caches, where patches start, and the entropies. (These take 4 bytes an id, so that a request for them can begin
after a prefix too.) Full pages are shared, not copied. A sequence that continues after a node writes into its last
page, so it gets its own copy if that page is not full (`BlockTable.own`).

No pages are reserved for it. When a sequence needs pages, those that only this cache keeps are freed, the least
recently used prefix first. A prefix is used when a sequence begins right after it. Of a long prompt that many requests
share only the end is used. So a node with children becomes hollow first: it keeps the rows that its children need,
those that stay live, and gives up the windows ending here, which no new sequence needs.

Texts share prefixes only if their requests have the same salt (`Request.cache_salt`): it is part of every block's key.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..sequence import Sequence
from .caches import Caches

BLOCK = 64
"""Ids between two places where a cached prefix can end."""

Key = tuple[bytes, tuple[int, ...]]
"""The salt of a text, and the ids of one of its blocks."""


@dataclass(eq=False, slots=True)
class Node:
    """The prefix of `end` ids that the blocks from the root to here make."""

    parent: "Node | None"
    key: Key
    end: int
    starts: list[int]
    """Patch starts after the parent's end, up to and including `end`: that one is decided too."""
    num_closed: int
    """Patches that end before `end`."""
    entropies: "array[float]"
    """After each byte of the block, as `Patching.entropies`."""
    pages: dict[str, tuple[int, list[int]]]
    """Per cache the index of the first page, and the pages: all live ones or, where all rows stay live, those of the
    rows after the parent's end. A hollow node has only the latter."""
    children: dict[Key, "Node"] = field(default_factory=dict)
    alive: bool = True


class PrefixCache:
    """Finds, keeps and forgets prefixes."""

    def __init__(self, caches: Caches) -> None:
        self._caches = caches
        self.root = Node(None, (b"", ()), 0, [], 0, array("f"), {})
        self._by_use: OrderedDict[Node, None] = OrderedDict()
        """All nodes but hollow ones, the least recently used first. A node without children is never hollow."""
        self._lasting = {name for name, spec in caches.specs.items() if name != "open" and spec.window is None}

    def attach(self, sequence: Sequence, *, from_root: bool = False) -> None:
        """Lets a sequence without rows begin after its longest cached prefix; one id is left to compute. from_root: it
        begins at its first id, and its prefixes are only remembered."""
        sequence.prefix = node = self.root if from_root else self._find(sequence)
        if node is self.root:
            return
        path = _path(node)
        for name, table in sequence.tables.items():
            if name in self._lasting:
                # Where two nodes share a page index, the later node's page has the earlier one's rows too.
                found = {
                    index + i: page for n in path for index, pages in [n.pages[name]] for i, page in enumerate(pages)
                }
                table.borrow(0, list(found.values()), self._rows(name, node))
            else:
                table.borrow(*node.pages[name], self._rows(name, node))
        entropies = array("f")
        for n in path:
            entropies += n.entropies
        sequence.begin_after(node.end, node.num_closed, (start for n in path for start in n.starts), entropies)
        self._by_use.move_to_end(node)

    def remember(self, sequence: Sequence) -> None:
        """Keeps the rows that the sequence has computed, up to the last whole block. Call it before pages that a step
        has made dead are given back."""
        node = sequence.prefix
        # A round that ends its request may have computed more than is committed.
        end = min(sequence.num_computed, len(sequence.ids))
        while node and node.alive and node.end + BLOCK <= end:
            node = sequence.prefix = self._child(node, sequence)
            self._by_use.move_to_end(node)

    def forget(self) -> bool:
        """Gives back pages of the least recently used node: all, or only its windows if it has children. False if there
        is no node."""
        if not self._by_use:
            return False
        node = next(iter(self._by_use))
        if node.children:
            del self._by_use[node]
            self._give_back(node, [name for name in node.pages if name not in self._lasting])
        else:
            self._remove(node)
        return True

    def _remove(self, node: Node) -> None:
        """Removes the node, and those before it that only led to it."""
        while node.parent and not node.children:
            self._give_back(node, list(node.pages))
            self._by_use.pop(node, None)
            del node.parent.children[node.key]
            node.alive = False
            node = node.parent
            if node in self._by_use:
                return

    def _give_back(self, node: Node, names: Iterable[str]) -> None:
        for name in names:
            self._caches.pools[name].forget(node.pages.pop(name)[1])

    def _find(self, sequence: Sequence) -> Node:
        node = found = self.root
        while node.end + BLOCK < len(sequence.ids):
            child = node.children.get(_key(sequence, node.end))
            # With all patches that there is room for, no row could come after it.
            if child is None or child.num_closed >= self._caches.max_patches:
                break
            node = child
            if node in self._by_use:
                found = node
        return found

    def _child(self, parent: Node, sequence: Sequence) -> Node:
        """The parent's child for the sequence's next block, with the sequence's pages for it."""
        key = _key(sequence, parent.end)
        node = parent.children.get(key)
        if node is None:
            end = parent.end + BLOCK
            starts, num_closed = sequence.patching.starts, sequence.patch_of(end)
            added = starts[sequence.patch_of(parent.end) + 1 : num_closed + 1]
            node = Node(parent, key, end, added, num_closed, sequence.patching.entropies[parent.end : end], {})
            parent.children[key] = node
        if node not in self._by_use:
            start = sequence.patching.starts[node.num_closed]
            for name, table in sequence.tables.items():
                if name in node.pages:
                    continue
                first = self._caches.first_live(name, node.end, node.num_closed, start)
                if name in self._lasting:
                    first = self._rows(name, parent)
                node.pages[name] = _, pages = table.covering(first, self._rows(name, node))
                self._caches.pools[name].keep(pages)
            self._by_use[node] = None
        return node

    def _rows(self, name: str, node: Node) -> int:
        """How many rows of a cache a prefix has."""
        return node.end if self._caches.specs[name].rows_from == "byte" else node.num_closed


def _key(sequence: Sequence, start: int) -> Key:
    """Of the block that begins at `start`."""
    return sequence.request.cache_salt, tuple(sequence.ids[start : start + BLOCK])


def _path(node: Node) -> list[Node]:
    """From the first block to the node; without the root."""
    nodes = []
    while node.parent:
        nodes.append(node)
        node = node.parent
    return nodes[::-1]
