"""`/tokenize`, `/detokenize` and `/tokenizer_info` in vLLM's shapes."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import BOE_ID, BOS_ID, BYTE_OFFSET, EOS_ID, PAD_ID, SPECIAL_NAMES
from server import tokenizer
from server.parsing import OTHER_BYTES
from tests.scripted_server import ScriptedClient, serving

MOST = 1000


def ids(data: bytes) -> list[int]:
    return [byte + BYTE_OFFSET for byte in data]


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with serving(ScriptedClient(), max_scores=MOST) as client:
        yield client


async def tokens(http: httpx.AsyncClient, prompt: str, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/tokenize", json={"prompt": prompt, **fields})
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def text(http: httpx.AsyncClient, tokens: list[int]) -> str:
    answer = await http.post("/detokenize", json={"model": "scripted", "tokens": tokens})
    assert answer.status_code == 200, answer.text
    (prompt,) = answer.json().values()
    return str(prompt)


@given(st.text() | st.sampled_from(list(SPECIAL_NAMES.values())))
def test_a_text_has_the_ids_of_its_bytes_and_comes_back(prompt: str) -> None:
    special = [token for token, name in SPECIAL_NAMES.items() if name == prompt]
    assert tokenizer.ids_of(prompt) == (special or ids(prompt.encode()))
    assert tokenizer.text_of(tokenizer.ids_of(prompt)) == prompt


@given(st.binary())
def test_bytes_that_are_no_text_come_back_with_replacements(data: bytes) -> None:
    assert tokenizer.text_of(ids(data)) == data.decode(errors="replace")


async def test_answers_have_the_shape_of_vllm(http: httpx.AsyncClient) -> None:
    asked = await tokens(http, "é<s>", model="scripted:blt", return_token_strs=True)
    assert asked == {
        "count": 6,
        "max_model_len": 1000,
        "tokens": [BOS_ID, *ids("é<s>".encode())],
        "token_strs": ["<s>", "bytes:\\xc3", "bytes:\\xa9", "<", "s", ">"],
    }
    assert await tokens(http, "", add_special_tokens=False) == {
        "count": 0,
        "max_model_len": 1000,
        "tokens": [],
        "token_strs": None,
    }
    assert await text(http, [BOS_ID, *ids("aé".encode()), EOS_ID, *ids(b"\xff\xc3")]) == "<s>aé</s>\ufffd\ufffd"
    assert await text(http, []) == ""


@pytest.mark.parametrize(("name", "token"), [("<boe>", BOE_ID), ("<s>", BOS_ID), ("</s>", EOS_ID), ("<pad>", PAD_ID)])
async def test_the_name_of_a_special_id_alone_is_that_id(http: httpx.AsyncClient, name: str, token: int) -> None:
    assert (await tokens(http, name, add_special_tokens=False))["tokens"] == [token]
    assert (await tokens(http, name + " ", add_special_tokens=False))["tokens"] == ids(f"{name} ".encode())
    assert await text(http, [token]) == name


async def test_tokens_with_special_ones_are_the_ids_of_the_same_prompt(http: httpx.AsyncClient) -> None:
    for special in (True, False):
        asked = {"prompt": "naïve <s>", "add_special_tokens": special}
        completion = await http.post("/v1/completions", json=asked | {"max_tokens": 1, "return_token_ids": True})
        assert completion.json()["choices"][0]["prompt_token_ids"] == (await tokens(http, **asked))["tokens"]


async def test_the_information_suffices_for_a_program_without_a_tokenizer(http: httpx.AsyncClient) -> None:
    """What lm-eval's remote tokenizer does with it."""
    told = (await http.get("/tokenizer_info")).json()
    assert told["model_max_length"] == 1000 and told["tokenizer_class"] and "chat_template" not in told
    names = [told[f"{kind}_token"] for kind in ("bos", "eos", "pad")]
    found = [(await tokens(http, name, add_special_tokens=False))["tokens"][0] for name in names]
    assert found == [BOS_ID, EOS_ID, PAD_ID]


BAD: list[tuple[str, Any, str | None, str, str]] = [
    ("/tokenize", {}, "prompt", "missing_required_parameter", "prompt is required"),
    ("/tokenize", {"prompt": 1}, "prompt", "invalid_value", "must be a valid string, not 1"),
    ("/tokenize", {"prompt": "a", "nope": 1}, "nope", "unknown_parameter", "nope is not a known parameter"),
    ("/tokenize", {"messages": []}, "prompt", "missing_required_parameter", "prompt is required"),
    ("/tokenize", {"prompt": "a", "add_special_tokens": 0}, "add_special_tokens", "invalid_value", "not 0"),
    ("/tokenize", {"prompt": "a" * (MOST + 1)}, "prompt", "too_many_scores", f"at most {MOST} ids, not {MOST + 1}"),
    ("/tokenize", {"prompt": "a", "x" * OTHER_BYTES: 1}, "x" * 80, "unknown_parameter", "is not a known parameter"),
    ("/tokenize", b"[]", None, "invalid_value", "the body must be a JSON object, not []"),
    ("/tokenize", b'{"prompt": "\xff"}', None, "invalid_json", "not valid UTF-8"),
    ("/tokenize", b'{"prompt": "\\ud800"}', None, "invalid_json", "not valid JSON"),
    ("/detokenize", {"prompt": "a"}, "tokens", "missing_required_parameter", "tokens is required"),
    ("/detokenize", {"tokens": [5, "a"]}, "tokens.1", "invalid_value", "must be a valid integer, not 'a'"),
    ("/detokenize", {"tokens": [True] * 500_000}, "tokens.0", "invalid_value", "must be a valid integer, not true"),
    ("/detokenize", {"tokens": [5, 260]}, "tokens", "invalid_value", "token ids must be from 0 to 259, not 260"),
    ("/detokenize", {"tokens": [5, -1]}, "tokens", "invalid_value", "token ids must be from 0 to 259, not -1"),
    ("/detokenize", {"tokens": [5] * (MOST + 1)}, "tokens", "too_many_scores", f"at most {MOST} ids"),
]


@pytest.mark.parametrize(("path", "body", "param", "code", "message"), BAD)
async def test_errors_name_field_and_value(
    http: httpx.AsyncClient, path: str, body: Any, param: str | None, code: str, message: str
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = await http.post(path, content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert message in error["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_the_rules_of_other_routes_hold(path: str) -> None:
    body = {"prompt": "a"} if path == "/tokenize" else {"tokens": [5]}
    async with serving(ScriptedClient(), keys=(b"k" * 20,), max_body_bytes=2048) as http:
        assert (await http.post(path, json=body)).status_code == 401
        assert (await http.get("/tokenizer_info")).status_code == 401
        key = {"authorization": f"Bearer {'k' * 20}"}
        assert (await http.post(path, json=body, headers=key)).status_code == 200
        assert (await http.get("/tokenizer_info", headers=key)).status_code == 200
        unknown = await http.post(path, json=body | {"model": "none"}, headers=key)
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        large = await http.post(path, json=body | {"user": "x" * 4096}, headers=key)
        assert large.status_code == 413
        form = await http.post(path, content=json.dumps(body), headers=key | {"content-type": "text/plain"})
        assert form.status_code == 415
