"""Parameters that look at the text so far, or end it: against a plain forward without caches, for every decoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import BYTE_OFFSET, EOS_ID, is_byte, text_of
from engine.output import Output
from engine.types import Finished, Request, SamplingParams
from tests import reference
from tests.engines import Output as Heard
from tests.engines import make_engine, request, run, save_ours
from tests.models import our_config, our_model, text
from tests.test_sampling import distribution

MADE = our_model(our_config(decoder_input="embedding", mask_id=260, block_size=6), 5)
LENGTH = 40
LETTERS = [*range(97 + BYTE_OFFSET, 123 + BYTE_OFFSET)]
ENDS = {EOS_ID: 6.0, 100: 2.0}
"""Bias that makes texts end now and then."""
KINDS: list[dict[str, Any]] = [
    {"sampling": {"repetition_penalty": 1.5}},
    {"sampling": {"repetition_penalty": 0.8, "logit_bias": ENDS, "frequency_penalty": 0.4}},
    {"sampling": {"repetition_penalty": 1.1, "presence_penalty": -0.5}, "min_tokens": 5, "stop_ids": [120, 121, 122]},
    {"sampling": {"allowed_ids": LETTERS}},
    {"sampling": {"allowed_ids": [EOS_ID, *LETTERS], "logit_bias": ENDS}, "min_tokens": 12},
    {"sampling": {"logit_bias": ENDS}, "min_tokens": LENGTH},
    {"sampling": {"logit_bias": {100: 8.0}}, "stop_ids": [100], "min_tokens": 9},
    {"sampling": {"logit_bias": ENDS}, "ignore_eos": True, "stop_ids": [100], "include_stop": True, "min_tokens": 3},
    {"sampling": {}, "stop": [b"\x81", b"e", b"\x05"], "min_tokens": 7},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ours(tmp_path_factory.mktemp("fields") / "model", MADE)


def asked(decoder: str, temperature: float, kinds: Sequence[dict[str, Any]] = KINDS) -> list[Request]:
    return [
        request(
            str(number), text(2 + 4 * number, number, specials=False), LENGTH, decoder=decoder,
            **{"ignore_eos": False} | kind
            | {"sampling": SamplingParams(temperature=temperature, seed=number, **kind["sampling"])},
        )
        for number, kind in enumerate(kinds)
    ]  # fmt: skip


def greedy(asked: Request) -> list[int]:
    """The ids, a full forward for each."""
    config, tensors = MADE
    ids, ends = list(asked.prompt_ids), {*asked.stop_ids, *([] if asked.ignore_eos else [EOS_ID])}
    while len(ids) < len(asked.prompt_ids) + asked.max_tokens:
        output = ids[len(asked.prompt_ids) :]
        logits = reference.forward(config, tensors, ids)[-1].tolist()
        if len(output) < asked.min_tokens:
            logits = [value if token not in ends else -float("inf") for token, value in enumerate(logits)]
        counts = dict.fromkeys(asked.prompt_ids, 0) | {token: output.count(token) for token in output}
        ids.append(distribution(logits, asked.sampling, counts).index(1.0))
        said = text_of(ids[len(asked.prompt_ids) :])
        stopped = is_byte(ids[-1]) and any(said.endswith(stop) for stop in asked.stop)
        if len(output) >= asked.min_tokens and (ids[-1] in ends or stopped):
            break
    return ids[len(asked.prompt_ids) :]


def test_blt_takes_what_a_plain_forward_takes(model: Path) -> None:
    found = run(make_engine(model), asked("blt", 0))
    for number, wanted in enumerate(asked("blt", 0)):
        assert found[str(number)].ids == greedy(wanted), KINDS[number]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_exact_decoders_give_the_text_of_blt_and_every_decoder_keeps_the_rules(model: Path, temperature: float) -> None:
    wanted = run(make_engine(model), asked("blt", temperature))
    engine = make_engine(model)
    for decoder in engine.limits.decoders:
        found = run(engine, asked(decoder, temperature))
        for number, about in enumerate(asked(decoder, temperature)):
            out, blt = found[str(number)], wanted[str(number)]
            keeps_the_rules(about, out)
            if decoder != "blt-d":
                assert (out.ids, out.text) == (blt.ids, blt.text), about
                assert isinstance(out.end, Finished) and isinstance(blt.end, Finished)
                assert (out.end.reason, out.end.stopped_by) == (blt.end.reason, blt.end.stopped_by), about
    assert len({len(out.ids) for out in wanted.values()}) > 2


def keeps_the_rules(about: Request, out: Heard) -> None:
    assert isinstance(out.end, Finished)
    ends, allowed = {*about.stop_ids, *([] if about.ignore_eos else [EOS_ID])}, about.sampling.allowed_ids
    assert not ends.intersection(out.ids[: about.min_tokens])
    assert not ends.intersection(out.ids[:-1]) and (not allowed or set(out.ids) <= set(allowed))
    assert len(out.ids) > about.min_tokens or out.end.reason == "length"
    assert (out.ids[-1] in ends or out.end.stopped_by is not None) == (out.end.reason == "stop")
    by = out.end.stopped_by
    dropped = len(by) if isinstance(by, bytes) else isinstance(by, int) and is_byte(by)
    whole = text_of(out.ids)
    assert out.text == (whole if about.include_stop else whole[: len(whole) - dropped])


def test_an_engine_that_goes_on_with_another_ones_request_gives_the_same(model: Path) -> None:
    engine = make_engine(model)
    for decoder in ("blt", "blt-s"):
        wanted = run(engine, asked(decoder, 1.0))
        begun = [
            Request(**{f: getattr(r, f) for f in r.__struct_fields__} | {"output_ids": wanted[r.id].ids[: 3 + n]})
            for n, r in enumerate(asked(decoder, 1.0))
        ]
        found = run(engine, begun)
        for one in begun:
            assert [*one.output_ids, *found[one.id].ids] == wanted[one.id].ids, one


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([EOS_ID, 1, 101, 102, 103]), max_size=14),
    st.lists(st.sampled_from([b"a", b"ab", b"ba", b"cb"]), max_size=2),
    st.lists(st.sampled_from([1, EOS_ID, 103]), max_size=2),
    st.integers(0, 9),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_an_output_ends_where_a_search_of_its_ids_says(
    ids: list[int], stop: list[bytes], stop_ids: list[int], least: int, eos: bool, include: bool, data: st.DataObject
) -> None:
    about = request(
        "", [1], 12, stop=stop, stop_ids=stop_ids, min_tokens=least, ignore_eos=not eos, include_stop=include
    )
    end, by, reason = len(ids), b"", None
    for number, token in enumerate(ids, 1):
        said = text_of(ids[:number])
        strings = [s for s in stop if is_byte(token) and said.endswith(s) and number > least]
        if token == EOS_ID and eos:
            end, reason = number, "stop"
        elif token in stop_ids and number > least:
            end, by, reason = number, token, "stop"
        elif strings:
            end, by, reason = number, max(strings, key=len), "stop"
        elif number == about.max_tokens:
            end, reason = number, "length"
        if reason:
            break
    output, kept, told, found = Output(about), [], b"", None
    while len(kept) < len(ids) and not found:
        some, text, found = output.take(ids[len(kept) : len(kept) + data.draw(st.integers(1, 4))])
        kept += some
        told += text
    finished = output.finished(found or "length", usage=None)  # type: ignore[arg-type]
    assert (kept, found, finished.stopped_by) == (ids[:end], reason, by if by != b"" else None)
    dropped = 0 if include else len(by) if isinstance(by, bytes) else int(is_byte(by))
    whole = text_of(kept)
    assert told + finished.text == whole[: len(whole) - dropped]
