"""Where documents begin for the global stage: noted once each, however many a text has."""

from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from engine.config import EOS_ID
from engine.memory.prefix import Node, _path
from engine.sequence import Sequence
from engine.types import Request

LENGTH = 60


def from_scratch(documents: list[int], starts: list[int], end: int) -> list[int]:
    """The first patch, and those up to `end` that follow one with an EOS."""
    holding = {max(patch for patch, start in enumerate(starts) if start < document) for document in documents[1:]}
    return [0, *sorted(patch + 1 for patch in holding if patch + 1 <= end)]


@given(data=st.data())
def test_documents_of_patches_are_those_counted_from_scratch(data: st.DataObject) -> None:
    ids = [data.draw(st.sampled_from([5, 5, 5, EOS_ID])) for _ in range(LENGTH)]
    prompt = data.draw(st.integers(1, LENGTH))
    sequence = Sequence(Request(id="a", prompt_ids=ids[:prompt], max_tokens=LENGTH), 0, {})
    sequence.append(ids[prompt:])
    assert sequence.documents == [0, *(i + 1 for i, token in enumerate(ids) if token == EOS_ID)]
    starts = sorted({0, *data.draw(st.lists(st.integers(1, LENGTH - 1), max_size=30))})
    sequence.patching.starts = starts
    for end in sorted(data.draw(st.lists(st.integers(0, len(starts) - 1), min_size=1, max_size=5))):
        sequence.note_patch_documents(end)
        assert sequence.patch_documents == from_scratch(sequence.documents, starts, end)


def test_a_text_of_thousands_of_documents_is_not_looked_through_in_every_step() -> None:
    count = 5_000
    sequence = Sequence(Request(id="a", prompt_ids=[EOS_ID] * count, max_tokens=1), 0, {})
    sequence.documents = [*range(count + 1)]
    sequence.patching.starts = [*range(count + 1)]
    sequence.note_patch_documents(count)
    assert len(sequence.patch_documents) == count + 1
    with patch.object(Sequence, "patch_of", autospec=True, side_effect=Sequence.patch_of) as asked:
        for _ in range(10):
            sequence.note_patch_documents(count)
    assert asked.call_count <= 20


def test_the_path_to_a_node_of_a_long_prefix_is_no_recursion() -> None:
    node = root = Node(None, ("", ()), 0, [], 0, None, {})  # type: ignore[arg-type]
    for end in range(1, 3_000):
        node = Node(node, ("", (end,)), end, [], 0, None, {})  # type: ignore[arg-type]
    path = _path(node)
    assert [one.end for one in path] == [*range(1, 3_000)] and path[0].parent is root
