"""`trace` over HTTP, against what an engine in this process reports of the same request."""

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import BOS_ID, BYTE_OFFSET
from engine.engine import Engine
from engine.types import DecoderName, Delta, Request, SamplingParams, Trace
from tests.engines import make_engine
from tests.serving import RunningServer

PROMPT = "def f(x):"
BASE = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0.9, "seed": 7, "ignore_eos": True}
DECODERS: tuple[DecoderName, ...] = ("blt", "blt-s", "blt-d", "blt-dv")
"""Those whose rounds follow from the request alone."""


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return make_engine(tiny_model, num_threads=1)


def told(engine: Engine, **fields: Any) -> tuple[list[int], list[Trace]]:
    """Ids and traces of `BASE` with these fields of an engine request."""
    sampling = SamplingParams(temperature=0.9, seed=7)
    prompt = [BOS_ID, *(byte + BYTE_OFFSET for byte in PROMPT.encode())]
    base = {"id": "a", "prompt_ids": prompt, "max_tokens": 40, "sampling": sampling, "ignore_eos": True}
    engine.add(Request(**base | {"trace": True} | fields))
    ids: list[int] = []
    traces: list[Trace] = []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, Delta):
                ids += event.ids
                traces += event.traces
    return ids, traces


def whole(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    with server.client() as http:
        response = http.post("/v1/completions", json={**BASE, "trace": True, **fields})
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def streamed(server: RunningServer, **fields: Any) -> list[dict[str, Any]]:
    """The choices of all chunks."""
    with server.client() as http:
        body = http.post("/v1/completions", json={**BASE, "trace": True, "stream": True, **fields}).text
    chunks = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    assert body.endswith("data: [DONE]\n\n")
    return [choice for chunk in chunks for choice in chunk["choices"]]


def joined(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """What a client makes of the chunks of one choice."""
    own = [chunk for chunk in chunks if chunk["index"] == index]
    return {
        "index": index,
        "text": "".join(chunk["text"] for chunk in own),
        "logprobs": None,
        "finish_reason": own[-1]["finish_reason"],
        "stop_reason": own[-1]["stop_reason"],
        "trace": {
            "rounds": [entry for chunk in own for entry in chunk["trace"]["rounds"]],
            "patch_starts": [start for chunk in own for start in chunk["trace"]["patch_starts"]],
            "text_bytes": sum(chunk["trace"]["text_bytes"] for chunk in own),
        },
    }


def ids_of(choice: dict[str, Any]) -> list[int]:
    return [token for entry in choice["trace"]["rounds"] for token in entry["ids"]]


def text_of(choice: dict[str, Any]) -> str:
    """The text, made from the trace alone."""
    data = bytes(token - BYTE_OFFSET for token in ids_of(choice) if token >= BYTE_OFFSET)
    return data[: choice["trace"]["text_bytes"]].decode(errors="replace")


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_trace_of_a_response_is_the_engines(server: RunningServer, engine: Engine, decoder: DecoderName) -> None:
    ids, traces = told(engine, decoder=decoder)
    (choice,) = whole(server, decoder=decoder)
    trace = choice["trace"]
    assert ids_of(choice) == ids
    assert [len(entry["ids"]) for entry in trace["rounds"]] == [told.num_ids for told in traces]
    for key in ("drafts", "accepted", "passes"):
        assert [entry[key] for entry in trace["rounds"]] == [getattr(told, key) for told in traces]
    assert trace["patch_starts"] == [start for told in traces for start in told.patch_starts]
    assert trace["patch_starts"] and any(entry["drafts"] for entry in trace["rounds"]) == (decoder != "blt")
    assert text_of(choice) == choice["text"]


@pytest.mark.parametrize("decoder", [*DECODERS, "auto"])
def test_streamed_traces_add_up_to_the_whole_response(server: RunningServer, decoder: str) -> None:
    chunks = streamed(server, decoder=decoder)
    (choice,) = whole(server, decoder=decoder)
    found = joined(chunks)
    assert text_of(found) == found["text"] == choice["text"]
    if decoder != "auto":
        assert found == choice
    seen = ""
    for end in range(1, len(chunks) + 1):
        # At every moment, and not only at the end.
        so_far = joined(chunks[:end])
        assert text_of(so_far) == so_far["text"]
        assert so_far["text"].startswith(seen)
        seen = so_far["text"]


def test_the_trace_streams_ids_held_back_for_a_stop_string(server: RunningServer) -> None:
    bytes_alone = {"logit_bias": {str(special): -100 for special in range(BYTE_OFFSET)}}
    (free,) = whole(server, **bytes_alone)
    data = bytes(token - BYTE_OFFSET for token in ids_of(free))
    # A stop string is text, which these bytes need not be.
    stop, place = next(
        (data[at : at + size].decode(), at)
        for size in (3, 2, 1)
        for at in range(20, 37)
        if data[at : at + size].isascii() and data.index(data[at : at + size]) == at
    )
    chunks = streamed(server, stop=stop, **bytes_alone)
    found = joined(chunks)
    assert found["finish_reason"] == "stop"
    assert ids_of(found) == ids_of(free)[: place + len(stop)]
    assert found["trace"]["text_bytes"] == place
    assert text_of(found) == found["text"] == data[:place].decode(errors="replace")
    assert whole(server, stop=stop, **bytes_alone) == [found]


def test_the_trace_streams_the_ids_of_an_almost_complete_stop_string(server: RunningServer) -> None:
    # Text throughout, so that one stop string can agree with most of it, however the chunks fall.
    ascii_alone = {str(byte + BYTE_OFFSET): 60 for byte in range(ord("a"), ord("z") + 1)}
    (free,) = whole(server, logit_bias=ascii_alone)
    almost = free["text"][:39] + "\N{SNOWMAN}"
    for _ in range(10):
        late = streamed(server, stop=almost, decoder="blt-s", draft_length=1, logit_bias=ascii_alone)
        # On a busy machine all rounds until the text is free may come in one chunk.
        if any(chunk["trace"]["rounds"] and not chunk["text"] for chunk in late):
            break
    else:
        pytest.fail("no chunk has rounds and no text")
    held = [chunk for end, chunk in enumerate(late, 1) if len(ids_of(joined(late[:end]))) <= 39]
    assert held and not text_of(joined(held))
    assert ids_of(joined(late)) == ids_of(free) and text_of(joined(late)) == free["text"]


def test_an_incomplete_character_is_in_the_trace_and_not_in_the_text(server: RunningServer) -> None:
    lead, others = 0xC3, range(0x80, 0xC0)
    bias = {str(byte + BYTE_OFFSET): 50 for byte in others} | {str(lead + BYTE_OFFSET): 56}
    chunks = streamed(server, logit_bias=bias)
    held = 0
    for number, chunk in enumerate(chunks):
        sent = joined(chunks[: number + 1])
        data = bytes(token - BYTE_OFFSET for token in ids_of(sent))
        # Only the next byte shows whether the last byte begins a character; after the end there is none.
        half = data.endswith(bytes([lead])) and not chunk["finish_reason"]
        held += half
        assert sent["trace"]["text_bytes"] == len(data) - half
        assert sent["text"] == data[: len(data) - half].decode(errors="replace")
    assert held
    assert [joined(chunks)] == whole(server, logit_bias=bias)


def test_every_choice_has_its_own_trace(server: RunningServer, engine: Engine) -> None:
    fields = {"decoder": "blt-s", "n": 3, "echo": True}
    choices = whole(server, **fields)
    chunks = streamed(server, **fields)
    for index, choice in enumerate(choices):
        ids, traces = told(engine, decoder="blt-s", sample_index=index)
        assert ids_of(choice) == ids
        assert [entry["accepted"] for entry in choice["trace"]["rounds"]] == [told.accepted for told in traces]
        assert choice["text"] == PROMPT + text_of(choice)
        assert joined(chunks, index) == choice
    assert len({choice["text"] for choice in choices}) == 3


def test_a_special_id_is_in_the_trace_and_not_in_the_text(server: RunningServer) -> None:
    (choice,) = whole(server, max_tokens=4, temperature=0, logit_bias={"2": 100}, ignore_eos=True)
    assert (ids_of(choice), choice["text"], choice["trace"]["text_bytes"]) == ([2, 2, 2, 2], "", 0)


def test_responses_have_no_trace_unless_requested(server: RunningServer) -> None:
    (choice,) = whole(server, trace=False)
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert all(chunk.keys() == choice.keys() for chunk in streamed(server, trace=None))
    with server.client() as http:
        refused = http.post("/v1/completions", json={**BASE, "trace": "yes"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "trace")
