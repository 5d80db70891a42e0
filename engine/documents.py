"""Documents of a text: a list says at which byte, or at which patch, each of them begins."""

from bisect import bisect_right
from itertools import pairwise


def start_of(documents: list[int], place: int) -> int:
    """Where the document of a byte or a patch begins. An EOS belongs to the document that it ends."""
    return documents[bisect_right(documents, place) - 1]


def pieces(documents: list[int], start: int, end: int) -> list[tuple[int, int, int]]:
    """start..end-1, cut where documents begin: each piece's first, its end, and where its document begins."""
    if documents[-1] <= start:
        return [(start, end, documents[-1])]
    cuts = [start, *(cut for cut in documents if start < cut < end), end]
    return [(begin, after, start_of(documents, begin)) for begin, after in pairwise(cuts)]
