"""The stop matcher against a search of the whole text."""

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.stopping import StopMatcher

TEXTS = st.text("ab", max_size=40).map(str.encode)
STOPS = st.lists(st.text("ab", min_size=1, max_size=6).map(str.encode), max_size=4)


def search(text: bytes, stops: list[bytes]) -> tuple[bytes, int | None]:
    """What may be said of `text`, and the length at which a stop string was first complete."""
    for end in range(len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], end
    return text, None


@settings(max_examples=400)
@given(TEXTS, STOPS)
def test_the_stop_matcher_fed_byte_by_byte_equals_a_search_of_the_whole_text(text: bytes, stops: list[bytes]) -> None:
    expected, end = search(text, stops)
    matcher, released, stopped_at = StopMatcher(stops), b"", None
    for i, byte in enumerate(text):
        certain, stopped = matcher.feed(byte)
        released += certain
        assert expected.startswith(released)
        if stopped:
            assert stopped in stops and text[: i + 1] == expected + stopped
            stopped_at = i + 1
            break
        held = text[len(released) : i + 1]
        # All that could still become a stop string is held back, and nothing else.
        prefixes = [n for n in range(i + 2) if any(stop.startswith(text[i + 1 - n : i + 1]) for stop in stops)]
        assert len(held) == max(prefixes, default=0)
    assert stopped_at == end
    assert released + matcher.flush() == expected
    assert matcher.flush() == b""


@settings(max_examples=200)
@given(TEXTS, STOPS, st.integers(0, 12), st.booleans())
def test_a_stop_string_counts_from_some_byte_on_and_may_be_kept(
    text: bytes, stops: list[bytes], first: int, include: bool
) -> None:
    ends = [end for end in range(first + 1, len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    matcher, released, stopped = StopMatcher(stops, include=include), b"", b""
    for number, byte in enumerate(text[: ends[0] if ends else None]):
        assert not stopped
        certain, stopped = matcher.feed(byte, may_stop=number >= first)
        released += certain
        assert text.startswith(released)
    assert bool(stopped) == bool(ends)
    whole = text[: ends[0]] if ends else text
    assert released + matcher.flush() == (whole if include else whole[: len(whole) - len(stopped)])


@settings(max_examples=100)
@given(TEXTS, STOPS, st.data())
def test_a_stop_matcher_fed_the_same_bytes_again_has_the_same_state(
    text: bytes, stops: list[bytes], data: st.DataObject
) -> None:
    _, end = search(text, stops)
    text = text[:end]
    cut = data.draw(st.integers(0, max(len(text) - 1, 0)))
    whole, resumed = StopMatcher(stops), StopMatcher(stops)
    for byte in text[:cut]:
        assert whole.feed(byte) == resumed.feed(byte)
    assert [whole.feed(b) for b in text[cut:]] == [resumed.feed(b) for b in text[cut:]]


def test_a_stop_string_may_lie_across_code_points() -> None:
    matcher = StopMatcher(["ü".encode()[1:] + b"x"])
    assert b"".join(matcher.feed(b)[0] for b in "aüx".encode()) == b"a\xc3"


def test_an_empty_stop_string_never_matches() -> None:
    assert StopMatcher([b""]).feed(97) == (b"a", b"")
