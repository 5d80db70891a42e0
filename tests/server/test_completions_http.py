"""What the API promises, over a socket and with a real engine."""

import json
from typing import Any

import httpx
import pytest

from tests.serving import RunningServer

MEGABYTES = 1_000_000
JSON = {"content-type": "application/json"}


def ask(server: RunningServer, **fields: Any) -> dict[str, Any]:
    with server.client() as http:
        response = http.post("/v1/completions", json={"model": "tiny", "prompt": "abc", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def post(url: str, body: bytes | dict[str, Any]) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(f"{url}/v1/completions", content=content, headers=JSON, timeout=60)


FINE: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": 1}
BAD: dict[str, tuple[bytes | dict[str, Any], int, str | None]] = {
    "a prompt of the wrong type": (FINE | {"prompt": {"a": 1}}, 400, "prompt"),
    "an empty array of prompts": (FINE | {"prompt": []}, 400, "prompt"),
    "an empty array of ids": (FINE | {"prompt": [[]]}, 400, "prompt"),
    "mixed prompts": (FINE | {"prompt": ["a", 1]}, 400, "prompt"),
    "a token id out of range": (FINE | {"prompt": [260]}, 400, "prompt"),
    "max_tokens as a string": (FINE | {"max_tokens": "1"}, 400, "max_tokens"),
    "negative max_tokens": (FINE | {"max_tokens": -1}, 400, "max_tokens"),
    "huge max_tokens": (FINE | {"max_tokens": 10**40}, 400, "max_tokens"),
    "max_tokens beyond the model": (FINE | {"max_tokens": 4096}, 400, "max_tokens"),
    "3 MB of prompt": (FINE | {"prompt": "x" * 3 * MEGABYTES}, 400, "prompt"),
    "5 MB of body": (FINE | {"prompt": "x" * 5 * MEGABYTES}, 413, None),
    "an unknown model": (FINE | {"model": "nope"}, 404, "model"),
    "an unnamed model's decoder": ({"prompt": "a", "decoder": "blt-x"}, 400, "decoder"),
    "a rule without its name": (FINE | {"unmask": {}}, 400, "unmask.rule"),
    "an unknown decoder": (FINE | {"decoder": "beam"}, 400, "decoder"),
    "an option of another decoder": (FINE | {"draft_length": 4}, 400, "draft_length"),
    "a block longer than trained": (FINE | {"decoder": "blt-d", "block_size": 9}, 400, "block_size"),
    "a suffix": (FINE | {"suffix": "x"}, 400, "suffix"),
    "an unknown field": (FINE | {"max_token": 3}, 400, "max_token"),
    "too many logprobs": (FINE | {"logprobs": 261}, 400, "logprobs"),
    "too many stop strings": (FINE | {"stop": ["a"] * 65}, 400, "stop"),
    "an empty stop string": (FINE | {"stop": ""}, 400, "stop"),
    "temperature 3": (FINE | {"temperature": 3}, 400, "temperature"),
    "temperature NaN": (b'{"model":"tiny","temperature":NaN}', 400, "temperature"),
    "top_p 2": (FINE | {"top_p": 2}, 400, "top_p"),
    "n 0": (FINE | {"n": 0}, 400, "n"),
    "n 1000": (FINE | {"n": 1000}, 400, "n"),
    "best_of below n": (FINE | {"n": 2, "best_of": 1}, 400, "best_of"),
    "a ranked stream": (FINE | {"best_of": 2, "stream": True}, 400, "best_of"),
    "stream_options without a stream": (FINE | {"stream_options": {}}, 400, "stream_options"),
    "a bias for no id": (FINE | {"logit_bias": {"x": 1}}, 400, "logit_bias"),
    "a bias out of the vocabulary": (FINE | {"logit_bias": {"260": 1}}, 400, "logit_bias"),
    "a seed of 65 bits": (FINE | {"seed": 2**64}, 400, "seed"),
    "no time": (FINE | {"timeout": 0}, 400, "timeout"),
    "no UTF-8": (b'{"model": "tiny", "prompt": "\xff"}', 400, None),
    "truncated JSON": (b'{"model": "tiny", "prompt": "a', 400, None),
    "no body": (b"", 400, None),
    "an array": (b"[]", 400, None),
    "half a surrogate pair": (b'{"model": "tiny", "prompt": "\\ud800"}', 400, None),
    "nesting without end": (b"[" * 100_000, 400, None),
}


@pytest.mark.parametrize(
    ("fields", "param", "rule"),
    [
        ({"n": 200}, "n", "must be at most 128 with 1 prompt, not 200"),
        ({"prompt": ["a"] * 3, "n": 43}, "n", "must be at most 42 with 3 prompts, not 43"),
        ({"prompt": ["a"] * 100, "best_of": 2}, "best_of", "must be at most 1 with 100 prompts, not 2"),
        ({"prompt": ["\\"] * 129}, "prompt", "must have at most 128 prompts, not 129"),
    ],
)
def test_the_limit_of_sequences_is_told_for_the_field_that_exceeds_it(
    server: RunningServer, fields: dict[str, Any], param: str, rule: str
) -> None:
    error = post(server.url, FINE | fields).json()["error"]
    why = "a request may have at most 128 sequences (--max-choices)"
    assert (error["param"], error["message"]) == (param, f"{param}: {rule}: {why}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"best_of": 3, "stream": True}, "best_of: must be n (1) in a stream, not 3: a stream cannot be ranked"),
        (
            {"stream_options": {"include_usage": True}},
            "stream_options: must be left out where stream is false, not {'include_usage': true}",
        ),
        (
            {"model": "tiny:blt-s", "decoder": "blt-d"},
            "decoder: must be 'blt-s' or left out with the model 'tiny:blt-s', not 'blt-d'",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_told_with_their_values(
    server: RunningServer, fields: dict[str, Any], message: str
) -> None:
    assert post(server.url, FINE | fields).json()["error"]["message"] == message


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> str:
    return texts(ask(server, max_tokens=600, ignore_eos=True, seed=9))[0]


def test_errors_of_bad_requests_name_the_field_and_disturb_no_stream(server: RunningServer, undisturbed: str) -> None:
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 600, "ignore_eos": True, "seed": 9, "stream": True}
    with server.client() as http, http.stream("POST", "/v1/completions", json=asked) as stream:
        lines = stream.iter_lines()
        text = json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"]
        for name, (body, status, param) in BAD.items():
            response = post(server.url, body)
            assert response.status_code == status, (name, response.text)
            assert response.headers["content-type"] == "application/json"
            assert set(response.json()) == {"error"}
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["param"] == param, (name, error)
            assert 0 < len(error["message"]) < 400
            # Says which field it is about.
            assert param is None or param in error["message"], (name, error)
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    assert text + "".join(json.loads(part)["choices"][0]["text"] for part in data) == undisturbed


def test_a_chunked_body_is_bounded(server: RunningServer) -> None:
    response = httpx.post(
        f"{server.url}/v1/completions", content=(b" " * 65536 for _ in range(100)), headers=JSON, timeout=60
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v2", 404), ("POST", "/v1/chat/completions", 404), ("POST", "/v1/completions//x", 404)]
    + [("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/a/b", 404)],
)
def test_wrong_routes_get_the_standard_error_body(server: RunningServer, method: str, path: str, status: int) -> None:
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert ("allow" in response.headers) == (status == 405)


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions/", "/chat/completions"])
def test_a_client_that_chats_learns_what_to_use(server: RunningServer, method: str, path: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    response = httpx.request(method, server.url + path, json=body if method == "POST" else None)
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("not_found_error", "unknown_url")
    assert "base models without a chat template" in error["message"] and "POST /v1/completions" in error["message"]
    assert error["message"].startswith(f"there is no route {method} /")
    # Only these paths: another unknown one tells nothing of chats.
    other = httpx.request(method, f"{server.url}/v1/chat").json()["error"]
    assert other["code"] == "unknown_url" and "chat template" not in other["message"]


@pytest.mark.parametrize(("method", "path"), [("POST", "/completions"), ("GET", "/models"), ("GET", "/models/tiny")])
def test_a_client_whose_base_url_lacks_v1_learns_so(server: RunningServer, method: str, path: str) -> None:
    hint = f"; did you mean /v1{path}? An OpenAI client's base_url ends in /v1"
    error = httpx.request(method, server.url + path).json()["error"]
    assert error["code"] == "unknown_url" and error["message"] == f"there is no route {method} {path}{hint}"
    for other in ("DELETE", path), (method, "/v1"), (method, f"/v2{path}"):
        assert "did you mean" not in httpx.request(other[0], server.url + other[1]).json()["error"]["message"]


def test_the_response_repeats_a_valid_request_id(server: RunningServer) -> None:
    given = httpx.get(f"{server.url}/health/ready", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    unfit = httpx.get(f"{server.url}/nope", headers={"x-request-id": "no spaces"})
    assert unfit.headers["x-request-id"].startswith("req-")


def test_a_string_prompt_is_bos_and_its_bytes_even_when_it_names_a_special_id(server: RunningServer) -> None:
    greedy = {"temperature": 0, "max_tokens": 24}
    as_ids = [1, *(byte + 4 for byte in "<s>é".encode())]
    by_string, by_ids = ask(server, prompt="<s>é", **greedy), ask(server, prompt=as_ids, **greedy)
    assert texts(by_string) == texts(by_ids)
    costs = [dict(answer["usage"].pop("fastblt")) for answer in (by_string, by_ids)]
    assert by_string["usage"] == by_ids["usage"] and costs[0]["rows"] == costs[1]["rows"]
    assert by_string["usage"]["prompt_tokens"] == 6
    assert texts(ask(server, prompt=["<s>é", "b"], **greedy))[0] == texts(by_string)[0]
    assert texts(ask(server, prompt=[as_ids, [5]], **greedy))[0] == texts(by_string)[0]
    assert ask(server, prompt="", **greedy)["usage"]["prompt_tokens"] == 1
    with server.client() as http:
        bare = http.post("/v1/completions", json={"model": "tiny", "prompt": None, "max_tokens": None, "n": None})
    assert bare.json()["usage"]["completion_tokens"] <= 16


def test_choices_are_ordered_by_prompt_and_sampled_independently(server: RunningServer) -> None:
    answer = ask(server, prompt=["a", "a", "b"], n=2, max_tokens=30)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert len(set(texts(answer))) == 6
    assert answer["usage"]["prompt_tokens"] == 6
    again = ask(server, prompt=["a", "b"], n=2, max_tokens=30, seed=3)
    alone = ask(server, prompt="b", n=2, max_tokens=30, seed=3)
    assert texts(again)[2:] == texts(alone)


def test_echo_with_no_tokens_scores_the_prompt(server: RunningServer) -> None:
    (choice,) = ask(server, prompt="aé!", max_tokens=0, echo=True, logprobs=2)["choices"]
    assert choice["text"] == "aé!"
    scores = choice["logprobs"]
    assert scores["tokens"] == ["<s>", "a", "bytes:\\xc3", "bytes:\\xa9", "!"]
    assert scores["bytes"] == [None, 97, 0xC3, 0xA9, 33]
    assert scores["text_offset"] == [0, 0, 1, 1, 2]
    assert scores["token_logprobs"][0] is None and all(p < 0 for p in scores["token_logprobs"][1:])
    assert all(2 <= len(top) <= 3 for top in scores["top_logprobs"][1:])
    # Each byte of the text by itself, scored after what precedes it.
    (shorter,) = ask(server, prompt="aé", max_tokens=0, echo=True, logprobs=2)["choices"]
    assert shorter["logprobs"]["token_logprobs"][1:] == pytest.approx(scores["token_logprobs"][1:4], abs=1e-5)
    assert texts(ask(server, max_tokens=0, echo=True)) == ["abc"]


def test_best_of_returns_the_likeliest_samples_in_order(server: RunningServer) -> None:
    asked = {"max_tokens": 12, "seed": 11, "logprobs": 0, "ignore_eos": True}

    def mean(choice: dict[str, Any]) -> float:
        # The text of a sample may end inside a code point; its ids are all there.
        return float(sum(choice["logprobs"]["token_logprobs"])) / len(choice["logprobs"]["token_logprobs"])

    samples = sorted(ask(server, n=6, **asked)["choices"], key=mean, reverse=True)
    answer = ask(server, n=2, best_of=6, **asked)
    assert texts(answer) == [sample["text"] for sample in samples[:2]]
    assert answer["usage"]["completion_tokens"] == 72
    (plain,) = ask(server, n=1, best_of=6, **(asked | {"logprobs": None}))["choices"]
    assert plain["text"] == samples[0]["text"] and plain["logprobs"] is None


def test_a_stop_string_ends_text_and_logprobs_before_it(server: RunningServer, undisturbed: str) -> None:
    whole = undisturbed
    position = next(
        i for i in range(20, len(whole)) if "�" not in whole[i : i + 3] and whole.find(whole[i : i + 3]) == i
    )
    stop = whole[position : position + 3]
    asked = {"max_tokens": 600, "ignore_eos": True, "seed": 9, "logprobs": 0, "stop": ["no such text", stop]}
    (choice,) = ask(server, **asked)["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == whole[:position]
    shown = bytes(byte for byte in choice["logprobs"]["bytes"] if byte is not None)
    assert shown.decode(errors="replace") == choice["text"]


def test_finish_reasons_name_why_the_text_ended(server: RunningServer) -> None:
    eos, byte_a = "2", "101"
    ended = ask(server, max_tokens=9, logit_bias={eos: 100}, temperature=0, logprobs=0)
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert texts(ended) == [""]
    assert ended["usage"]["completion_tokens"] == 0
    assert ended["choices"][0]["logprobs"]["tokens"] == ["</s>"]
    through = ask(server, max_tokens=9, logit_bias={eos: 100}, temperature=0, ignore_eos=True)
    assert through["choices"][0]["finish_reason"] == "length"
    assert through["usage"]["completion_tokens"] == 9
    forced = ask(server, max_tokens=9, logit_bias={byte_a: 100})
    assert texts(forced) == ["aaaaaaaaa"]
    late = ask(server, max_tokens=4000, ignore_eos=True, timeout=0.05)
    assert late["choices"][0]["finish_reason"] == "timeout"
    assert 0 < late["usage"]["completion_tokens"] < 4000


def test_sampling_options_reach_the_engine(server: RunningServer) -> None:
    greedy = texts(ask(server, temperature=0, max_tokens=20, ignore_eos=True))
    for narrowed in ({"top_k": 1}, {"top_p": 0}, {"min_p": 1}):
        assert texts(ask(server, max_tokens=20, ignore_eos=True, **narrowed)) == greedy
    again = texts(ask(server, max_tokens=20, temperature=0, ignore_eos=True, frequency_penalty=2, presence_penalty=2))
    assert again != greedy


def test_streaming_never_splits_a_code_point(server: RunningServer) -> None:
    # Pushes the model towards bytes of long code points, whole ones and broken ones.
    bias = {str(byte + 4): 8 for byte in (*range(0x80, 0x90), 0xC3, 0xE2, 0xF0)}
    asked = {"model": "tiny", "prompt": "a", "max_tokens": 200, "logit_bias": bias, "seed": 4, "logprobs": 0}
    (whole,) = ask(server, **asked)["choices"]
    with server.client() as http, http.stream("POST", "/v1/completions", json=asked | {"stream": True}) as stream:
        lines = [line[6:] for line in stream.iter_lines() if line and line != "data: [DONE]"]
    chunks = [json.loads(line)["choices"][0] for line in lines]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]
    assert any(len(character.encode()) > 2 and character != "�" for character in whole["text"])
    assert "�" in whole["text"]
    made = bytes(byte for byte in whole["logprobs"]["bytes"] if byte is not None)
    assert made.decode(errors="replace") == whole["text"]
