"""A request that the loaded model cannot run is refused in the same words over HTTP and by the engine itself."""

from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
import pytest

from engine import admission
from engine.config import BOS_ID, BYTE_OFFSET
from engine.engine import Engine
from engine.types import Failed, Request
from server.errors import ApiError
from server.origin import Origin
from server.requests import make_plan
from server.schemas import CompletionRequest
from server.settings import ServerSettings
from tests.engines import make_engine, run, save_ours
from tests.models import our_config, our_model

HOLDS = 4096
"""Ids of a sequence of the preset "tiny". Its blocks have 8 bytes, and its vocabulary 260 ids."""


class Case(NamedTuple):
    """fields: of the engine's request. body: the same over HTTP; None where no body can ask for it. code: of the error
    over HTTP."""

    fields: dict[str, Any]
    body: dict[str, Any] | None
    param: str
    message: str
    code: str = "invalid_value"


def both(field: str, value: Any, message: str, code: str = "invalid_value", **further: Any) -> Case:
    """For fields that have the same name on both sides."""
    fields = {field: value} | further
    return Case(fields, fields, field, f"{field}: {message}", code)


def bias(token: int) -> dict[str, Any]:
    return {"sampling": {"logit_bias": {token: 1.0}}}


TOO_LONG = "context_length_exceeded"
CASES = (
    both("decoder", "blt-x", "must be 'blt', 'blt-s', 'blt-d', 'blt-dv' or 'auto', not 'blt-x'"),
    both("draft_length", 0, "must be at least 1, not 0", decoder="blt-s"),
    both("draft_length", 33, "must be at most 32, not 33", decoder="blt-s"),
    both("block_size", 0, "must be at least 1, not 0", decoder="blt-d"),
    both(
        "block_size",
        9,
        "must be at most 8, not 9: this model was trained with blocks of up to 8 bytes",
        decoder="blt-dv",
    ),
    both("max_tokens", -1, "must be at least 0, not -1"),
    both(
        "max_tokens",
        HOLDS,
        "must be at most 4093 after a prompt of 3 ids, not 4096: this model and its caches hold 4096 ids",
        TOO_LONG,
    ),
    both(
        "max_tokens",
        4089,
        "must be at most 4088 after a prompt of 3 ids, not 4089: this model and its caches hold 4096 ids, and the last "
        "block may reach 5 ids past max_tokens",
        TOO_LONG,
        decoder="blt-d",
        block_size=6,
    ),
    Case(
        {"prompt_ids": []},
        {"prompt": "", "add_special_tokens": False},
        "prompt",
        "prompt: must not be empty; a begin-of-sequence id is enough",
    ),
    *(
        Case(
            {"prompt_ids": [BOS_ID, *[ord("a") + BYTE_OFFSET] * HOLDS]},
            {"prompt": prompt},
            "prompt",
            "prompt: must have at most 4096 ids, begin-of-sequence included, not 4097: this model and its caches hold "
            "no more",
            TOO_LONG,
        )
        for prompt in ("a" * HOLDS, [70] * (HOLDS + 1), [[70] * (HOLDS + 1)])
    ),
    *(
        Case(
            {"prompt_ids": [1, token, -7]},
            {"prompt": [1, token, -7]},
            "prompt",
            f"prompt: token ids must be from 0 to 259, not {token}",
        )
        for token in (-1, 260)
    ),
    Case(bias(260), {"logit_bias": {"260": 1}}, "logit_bias", "logit_bias: token ids must be from 0 to 259, not 260"),
    # A body has no such field, and its keys for biases are digits.
    Case(bias(-1), None, "logit_bias", "logit_bias: token ids must be from 0 to 259, not -1"),
    Case(
        {"stop_ids": [3, 999]},
        {"stop_token_ids": [3, 999]},
        "stop_token_ids",
        "stop_token_ids: token ids must be from 0 to 259, not 999",
    ),
    *(
        Case({"sampling": {"allowed_ids": ids}}, {"allowed_token_ids": ids}, "allowed_token_ids", message)
        for ids, message in (
            ([70, 261], "allowed_token_ids: token ids must be from 0 to 259, not 261"),
            (
                [0, 1, 3],
                "allowed_token_ids: must have at least one byte (4 to 259) or the end of sequence (2), not only others",
            ),
        )
    ),
    Case(
        {"sampling": {"allowed_ids": [70]}, "grammar": 'start: "a"'},
        {"allowed_token_ids": [70], "structured_outputs": {"regex": "a"}},
        "allowed_token_ids",
        "allowed_token_ids: must be left out where the text must match a grammar, which says itself what is allowed",
    ),
    both("min_tokens", 9, "must be at most 8, not 9: max_tokens is 8"),
    *(
        Case(
            {"sampling": {"allowed_ids": allowed}, "stop_ids": stops, "min_tokens": 1},
            {"stop_token_ids": stops, "min_tokens": 1} | ({"allowed_token_ids": allowed} if allowed else {}),
            "min_tokens",
            "min_tokens: must be 0, not 1: every id that may be chosen ends the text",
        )
        for allowed, stops in (([70], [70]), ([2, 1], []), ([], [*range(4, 260)]))
    ),
    # Over HTTP the field has its client's name: see tests/server/test_structured.py.
    Case(
        {"grammar": 'start: "a"', "decoder": "blt-d"},
        None,
        "grammar",
        "grammar: needs the decoder 'blt', 'blt-s', 'blt-dv' or 'auto', not 'blt-d', whose blocks are not checked",
    ),
    Case(
        {"grammar": 'start: "a"', "decoder": "auto", "exact": False},
        None,
        "grammar",
        "grammar: needs exact to be true, not false: 'auto' may then choose blocks, which are not checked",
    ),
    Case({"output_ids": [70] * 9}, None, "output_ids", "output_ids: must have at most max_tokens ids (8), not 9"),
    # The server counts the samples itself.
    Case({"sample_index": -1}, None, "sample_index", "sample_index: must be at least 0, not -1"),
    Case({"output_ids": [260]}, None, "output_ids", "output_ids: token ids must be from 0 to 259, not 260"),
)


def asked(fields: dict[str, Any]) -> Request:
    fields = {"prompt_ids": [BOS_ID, 70, 71], "max_tokens": 8} | fields
    return msgspec.convert({"id": "a"} | fields, Request)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return make_engine(tiny)


def refusal(url: str, body: dict[str, Any]) -> dict[str, Any]:
    body = {"prompt": "BC", "max_tokens": 8} | body
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 400, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


def failed(engine: Engine, fields: dict[str, Any]) -> Failed:
    end = run(engine, [asked(fields)])["a"].end
    assert isinstance(end, Failed)
    return end


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.message[:40])
def test_engine_and_server_refuse_in_the_same_words(case: Case, engine: Engine, tiny_server: str) -> None:
    end = failed(engine, case.fields)
    assert (end.param, end.message) == (case.param, case.message)
    if case.body is not None:
        error = refusal(tiny_server, case.body)
        assert (error["param"], error["message"], error["code"]) == (end.param, end.message, case.code)


@pytest.mark.parametrize(
    ("prompts", "max_tokens", "param", "message"),
    [
        (
            ["a", "b" * HOLDS],
            8,
            "prompt",
            "prompt[1]: must have at most 4096 ids, begin-of-sequence included, not 4097",
        ),
        ([[70], [71], [260]], 8, "prompt", "prompt[2]: token ids must be from 0 to 259, not 260"),
        (["a", "bc"], HOLDS - 2, "max_tokens", "max_tokens: must be at most 4093 after prompt[1] of 3 ids, not 4094"),
        (["a", "b"], HOLDS, "max_tokens", "max_tokens: must be at most 4094 after prompt[0] of 2 ids, not 4096"),
        (["a" * HOLDS], 8, "prompt", "prompt: must have at most 4096 ids, begin-of-sequence included, not 4097"),
    ],
)
def test_of_several_prompts_the_refused_one_is_named(
    tiny_server: str, prompts: list[Any], max_tokens: int, param: str, message: str
) -> None:
    error = refusal(tiny_server, {"prompt": prompts, "max_tokens": max_tokens, "n": 2})
    assert (error["param"], error["message"].partition(": this model")[0]) == (param, message)


def test_every_rule_has_refused_something(engine: Engine) -> None:
    """Of the requests above, by the rule that comes first."""
    found = set()
    for case in CASES:
        found.add(next(rule for rule in admission.RULES if rule(asked(case.fields), engine.limits)))
    assert found == set(admission.RULES)


def test_a_decoder_that_the_model_was_not_trained_for(tmp_path: Path) -> None:
    folder = save_ours(tmp_path / "model", our_model(our_config(), 3))
    expected = (
        "decoder: must be 'blt', 'blt-s' or 'auto', not 'blt-d': this checkpoint was not trained with block diffusion "
        "and has no [MASK]"
    )
    engine = make_engine(folder)
    end = failed(engine, {"decoder": "blt-d"})
    assert (end.code, end.param, end.message) == ("decoder_unavailable", "decoder", expected)
    with pytest.raises(ApiError) as refused:
        make_plan(CompletionRequest(decoder="blt-d", prompt="BC"), Origin(), ServerSettings(), engine.limits)
    error = refused.value.body["error"]
    assert (error["code"], error["param"], error["message"]) == ("decoder_unavailable", "decoder", expected)


def test_the_longest_request_is_taken(engine: Engine) -> None:
    for count, how in ((4093, {}), (4088, {"decoder": "blt-d", "block_size": 6}), (0, {"decoder": "blt-d"})):
        assert admission.check(asked({"max_tokens": count} | how), engine.limits) is None
    assert admission.check(asked({"prompt_ids": [70] * HOLDS, "max_tokens": 0}), engine.limits) is None
