import msgspec
from hypothesis import given
from hypothesis import strategies as st

from engine.config import BOS_ID, EOS_ID, PatchingRule
from engine.stopping import StopMatcher
from engine.types import Delta, Finished, FinishReason, TokenLogprob, Trace, Usage
from server.choice import ChoiceStream, Piece, empty_patches
from server.token_names import token_name


def ids_of(data: bytes) -> list[int]:
    return [byte + 4 for byte in data]


def scored(token: int) -> TokenLogprob:
    return TokenLogprob(token, -token / 100, {token + 1: -3.0})


def events(ids: list[int], stops: list[bytes], reason: FinishReason = "length") -> list[Delta | Finished]:
    """As the engine sends them, one id a step."""
    matcher, out = StopMatcher(stops), list[Delta | Finished]()
    for token in ids:
        text, stopped = matcher.feed(token - 4) if token >= 4 else (b"", b"")
        out.append(Delta(id="x", ids=[token], text=text, logprobs=[scored(token)]))
        if stopped:
            return [*out, Finished(id="x", reason="stop", stopped_by=stopped, usage=Usage())]
        if token == EOS_ID:
            reason = "stop"
            break
    return [*out, Finished(id="x", reason=reason, text=matcher.flush(), usage=Usage())]


def read(choice: ChoiceStream, said: list[Delta | Finished]) -> tuple[Piece, list[Piece]]:
    whole, pieces = choice.empty_piece(), [choice.feed(event) for event in said]
    for piece in pieces:
        whole.add(piece)
    return whole, pieces


@given(
    st.binary(max_size=12), st.lists(st.sampled_from([b"a", b"\xc3\xa9x", b"\x82", b"ab", b"\xe2\x82\xac"]), max_size=2)
)
def test_logprobs_cover_exactly_the_bytes_of_the_text(data: bytes, stops: list[bytes]) -> None:
    data = data + "é€xab".encode()
    whole, pieces = read(ChoiceStream([BOS_ID], False, True), events(ids_of(data), stops))
    assert whole.logprobs
    shown = bytes(b for b in whole.logprobs.bytes if b is not None)
    assert data.startswith(shown)
    assert shown.decode(errors="replace") == whole.text
    if whole.finish_reason == "length":
        assert shown == data
    for piece in pieces:
        assert piece.logprobs
        assert bool(piece.text) == bool(piece.logprobs.tokens)


def test_an_end_of_sequence_is_reported_where_it_was_generated() -> None:
    ended, _ = read(ChoiceStream([BOS_ID], False, True), events([*ids_of(b"ab"), EOS_ID], []))
    assert ended.logprobs and ended.logprobs.tokens == ["a", "b", "</s>"]
    assert ended.logprobs.token_logprobs == [-1.01, -1.02, -0.02]
    assert ended.logprobs.text_offset == [0, 1, 2] and ended.text == "ab"
    # What might have become a stop string is text, and so are its bytes' entries.
    held, pieces = read(ChoiceStream([BOS_ID], False, True), events([*ids_of(b"ab"), EOS_ID], [b"bc"]))
    assert held.text == "ab" and held.logprobs and held.logprobs.tokens == ["a", "b", "</s>"]
    going_on = [
        Delta(id="x", ids=[t], text=b"" if t < 4 else bytes((t - 4,)), logprobs=[scored(t)]) for t in [101, 2, 102]
    ]
    kept, _ = read(ChoiceStream([BOS_ID], False, True), [*going_on, Finished(id="x", reason="length", usage=Usage())])
    assert kept.logprobs and kept.logprobs.tokens == ["a", "</s>", "b"]
    assert kept.logprobs.text_offset == [0, 1, 1]
    assert kept.logprobs.bytes == [97, None, 98]


def test_echo_begins_text_and_logprobs_with_the_prompt() -> None:
    prompt = [BOS_ID, *ids_of("né".encode())]
    scores = [TokenLogprob(prompt[0], None, {}), *map(scored, prompt[1:])]
    said = [Delta(id="x", prompt_logprobs=scores), *events(ids_of(b"!"), [])]
    whole, _ = read(ChoiceStream(prompt, True, True), said)
    assert whole.text == "né!"
    assert whole.logprobs
    assert whole.logprobs.tokens == ["<s>", "n", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert whole.logprobs.token_logprobs[0] is whole.logprobs.model_dump()["top_logprobs"][0] is None
    assert whole.logprobs.text_offset == [0, 0, 1, 1, 2]


def test_patches_repeated_by_a_restarted_engine_are_sent_once() -> None:
    first = Trace(num_ids=2, drafts=ids_of(b"ab"), accepted=2, patch_starts=[0, 1])
    again = Trace(num_ids=1, patch_starts=[0, 1, 2])
    said: list[Delta | Finished] = [
        Delta(id="x", ids=ids_of(b"ab"), text=b"ab", traces=[first]),
        Delta(id="x", ids=ids_of(b"\xc3"), text=b"\xc3", traces=[again]),
        Finished(id="x", reason="length", usage=Usage()),
    ]
    whole, pieces = read(ChoiceStream([BOS_ID], False, False, with_trace=True), said)
    assert whole.trace and whole.trace.patch_starts == [0, 1, 2]
    assert [entry.ids for entry in whole.trace.rounds] == [ids_of(b"ab"), ids_of(b"\xc3")]
    # The end flushes half a character as U+FFFD, which stands for one byte.
    assert [piece.trace and piece.trace.text_bytes for piece in pieces] == [2, 0, 1]


def with_patches(said: list[Delta | Finished], num_prompt: int, late: int) -> tuple[list[Delta | Finished], list[int]]:
    """The same events, every id followed by its entropy `late` ids later, and all places where patches start: a third
    of them, the first two among them."""
    ids = [token for event in said if isinstance(event, Delta) for token in event.ids]
    places = [place for place in range(num_prompt + len(ids) + 1) if place < 2 or place % 3 == 2]
    told, count, out = 0, num_prompt, list[Delta | Finished]()
    for event in said:
        if isinstance(event, Delta):
            count += len(event.ids)
            end = max(count - late, num_prompt)
            starts = [place for place in places if (told < place or not told) and place <= end]
            event = msgspec.structs.replace(
                event, entropies=[place / 7 for place in range(told, end)], patch_starts=starts
            )
            told = end
        out.append(event)
    return out, places


@given(
    st.binary(max_size=12),
    st.lists(st.sampled_from([b"a", b"\xc3\xa9x", b"\x82", b"ab", b"\xe2\x82\xac"]), max_size=2),
    st.integers(1, 9),
    st.booleans(),
)
def test_patches_cover_the_prompt_and_the_output_text(data: bytes, stops: list[bytes], late: int, scored: bool) -> None:
    prompt = [BOS_ID, *ids_of(b"xyz")]
    data = data + "é€xab".encode()
    said, places = with_patches(events(ids_of(data), stops), len(prompt), late)
    whole, pieces = read(ChoiceStream(prompt, False, scored, patching=PatchingRule()), said)
    assert whole.patches
    entropies = [place / 7 for place in range(len(prompt) + len(data))]
    seen, text = Piece(patches=empty_patches(PatchingRule(), len(prompt))), b""
    for event, piece in zip(said, pieces, strict=True):
        seen.add(piece)
        text += event.text
        assert seen.patches and piece.patches
        known = len(seen.patches.entropies)
        assert len(prompt) <= known <= len(prompt) + len(text)
        assert seen.patches.entropies == [float(f"{entropy:.9g}") for entropy in entropies[:known]]
        assert seen.patches.starts == [place for place in places if place <= known]
        assert not piece.is_empty or not piece.patches.entropies
    assert seen.patches == whole.patches
    told = sum(len(event.entropies) for event in said if isinstance(event, Delta))
    assert len(whole.patches.entropies) == min(told, len(prompt) + len(text))


def test_top_logprobs_include_the_chosen_byte() -> None:
    whole, _ = read(ChoiceStream([BOS_ID], False, True), events(ids_of(b"a"), []))
    assert whole.logprobs and whole.logprobs.model_dump()["top_logprobs"] == [{"a": -1.01, "b": -3.0}]


def test_every_id_has_a_unique_token_name() -> None:
    assert len({token_name(token) for token in range(260)}) == 260
