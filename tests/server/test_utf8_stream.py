from hypothesis import given
from hypothesis import strategies as st

from server.text import OffsetTracker, Utf8Stream

# Whole characters, pieces of characters and arbitrary bytes, in any order.
PARTS = st.lists(st.one_of(st.text(max_size=3).map(str.encode), st.binary(max_size=3), st.just("🦀".encode()[:3])))
DATA = PARTS.map(b"".join)


@given(DATA, st.data())
def test_decoded_pieces_join_to_the_whole_text_wherever_the_bytes_are_cut(data: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)))))
    stream = Utf8Stream()
    edges = zip([0, *cuts], [*cuts, len(data)], strict=True)
    pieces = [stream.feed(data[a:b]) for a, b in edges]
    assert "".join(pieces) + stream.finish() == data.decode(errors="replace")


@given(st.text())
def test_valid_utf8_never_gives_a_replacement_character(text: str) -> None:
    stream = Utf8Stream()
    pieces = [stream.feed(bytes((byte,))) for byte in text.encode()]
    assert "".join(pieces) == text
    assert stream.finish() == ""
    assert stream.num_pending == 0


@given(DATA)
def test_the_utf8_stream_holds_back_at_most_three_bytes(data: bytes) -> None:
    stream = Utf8Stream()
    for end in range(len(data)):
        text = stream.feed(data[end : end + 1])
        assert 0 <= stream.num_pending <= 3
        if stream.num_pending == 0:
            assert text


def test_invalid_utf8_bytes_are_replaced_at_once() -> None:
    stream = Utf8Stream()
    assert stream.feed(b"\xff") == "�"
    assert stream.feed(b"\xe2\x82") == ""
    assert stream.feed(b"a") == "�a"
    assert stream.feed(b"\xed") == ""
    assert stream.feed(b"\xa0") == "��"


@given(st.text(min_size=1))
def test_text_offsets_point_at_the_character_of_each_byte(text: str) -> None:
    tracker = OffsetTracker()
    expected = [i for i, character in enumerate(text) for _ in character.encode()]
    assert [tracker.feed(byte) for byte in text.encode()] == expected
    assert tracker.end == len(text)


@given(DATA)
def test_text_offsets_of_any_bytes_lie_in_the_text_and_never_decrease(data: bytes) -> None:
    tracker = OffsetTracker()
    offsets = [tracker.feed(byte) for byte in data]
    assert offsets == sorted(offsets)
    assert set(offsets) == set(range(len(data.decode(errors="replace"))))
