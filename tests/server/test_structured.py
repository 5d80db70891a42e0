"""Texts match what a request asks for, and grammars that cannot be used harm nobody."""

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI
from typer.testing import CliRunner

from engine.grammars import GrammarError, compiled
from server import structured
from server.cli import app
from server.errors import ApiError
from server.parsing import FIELD_BYTES, parse
from server.structured import constraint_of, from_choices
from tests.serving import RunningServer

Json = dict[str, Any]
SECONDS = 5.0
"""Until a bad grammar is refused, also on a busy machine, where half a second of processor time takes longer."""
"""Most time for a refusal: a second, and what other tests on this machine take from it."""
SCHEMA: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "kind": {"enum": ["cat", "dög", None]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "age"],
    "additionalProperties": False,
}


def ask(server: RunningServer, **fields: Any) -> list[Json]:
    with server.client() as http:
        response = http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 99, **fields})
    assert response.status_code == 200, response.text
    choices: list[Json] = response.json()["choices"]
    return choices


def refused(server: RunningServer, **fields: Any) -> Json:
    with server.client() as http:
        response = http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 8, **fields})
    assert response.status_code == 400, response.text
    error: Json = response.json()["error"]
    assert len(error["message"]) < 450
    return error


def outputs(**fields: Any) -> Json:
    return {"structured_outputs": fields}


def response_format(schema: Json) -> Json:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "pet", "schema": schema}}}


@pytest.mark.parametrize(
    "asked",
    [response_format(SCHEMA), outputs(json=SCHEMA), outputs(json=json.dumps(SCHEMA))],
    ids=["openai", "json", "text"],
)
def test_json_is_of_its_schema_and_compact(server: RunningServer, asked: Json) -> None:
    (choice,) = ask(server, **asked, seed=3)
    jsonschema.validate(value := json.loads(choice["text"]), SCHEMA)
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == json.dumps(value, ensure_ascii="\\u" in choice["text"], separators=(",", ":"))


def test_white_space_is_allowed_where_it_is_asked_for(server: RunningServer) -> None:
    spaced = {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}
    texts = [choice["text"] for choice in ask(server, **outputs(json=spaced, whitespace_pattern="~"), n=8)]
    assert all(re.fullmatch(r"\[~?(true|false)~?,~?(true|false)~?\]", text) for text in texts)
    assert any("~" in text for text in texts)


@pytest.mark.parametrize("decoder", ["blt", "blt-s", "blt-dv", "auto"])
def test_all_samples_of_every_exact_decoder_match(server: RunningServer, decoder: str) -> None:
    grammar = 'start: word (" " word)+ "."\nword: /[a-z]{2,4}/ | "ÿ"'
    for asked, pattern in (
        (outputs(regex=r"^(\|[0-9]{3,})+$"), r"(\|[0-9]{3,})+"),
        (outputs(grammar=grammar), r"([a-z]{2,4}|ÿ)( ([a-z]{2,4}|ÿ))+\."),
        (outputs(choice=["yes", "no|", "ja\n"]), r"yes|no\||ja\n"),
    ):
        choices = ask(server, **asked, prompt=["a", "b"], n=2, decoder=decoder, seed=5, logprobs=1, max_tokens=60)
        assert len(choices) == 4
        for choice in choices:
            assert re.fullmatch(pattern, choice["text"]) or choice["finish_reason"] == "length"
            assert bytes(b for b in choice["logprobs"]["bytes"] if b is not None).startswith(
                choice["text"].encode()[:1]
            )
        same = ask(server, **asked, prompt=["a", "b"], n=2, decoder="blt", seed=5, max_tokens=60)
        assert [choice["text"] for choice in choices] == [choice["text"] for choice in same]


def test_streams_echo_ranking_and_stops_work_with_a_grammar(server: RunningServer) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    whole = ask(server, **outputs(regex="[a-z]{12}"), seed=1)[0]["text"]
    chunks = client.completions.create(
        model="tiny", prompt="abc", max_tokens=99, seed=1, stream=True, extra_body=outputs(regex="[a-z]{12}")
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert ask(server, **outputs(regex="[a-z]{12}"), seed=1, echo=True)[0]["text"] == "abc" + whole
    assert (
        ask(server, **outputs(regex="[a-z]{12}"), seed=1, stop=whole[5:7])[0]["text"] == whole.partition(whole[5:7])[0]
    )
    assert re.fullmatch("[a-z]{12}", ask(server, **outputs(regex="[a-z]{12}"), best_of=3)[0]["text"])
    assert ask(server, **outputs(regex="a{3}"), max_tokens=0)[0]["text"] == ""
    assert ask(server, **outputs(choice=[""]))[0]["text"] == ""


def test_a_dead_end_is_a_finish_reason(server: RunningServer) -> None:
    before = server.metrics("fastblt_sequences_total")
    # Nothing is a b and a c.
    (choice,) = ask(server, **outputs(grammar='start: "a" b\nb: X\nX: /b/ & /c/'))
    assert (choice["text"], choice["finish_reason"]) == ("a", "dead_end")
    key = 'fastblt_sequences_total{decoder="blt",finish_reason="dead_end"}'
    assert server.metrics("fastblt_sequences_total")[key] == before[key] + 1


NESTED: Json = {"type": "string"}
for level in range(12):
    NESTED = {"oneOf": [NESTED, {"type": "object", "properties": {f"p{level}": {"type": "integer"}}}]}
FAULTS: dict[str, tuple[Json, str, str]] = {
    "a bad regular expression": (outputs(regex="("), "regex", "unclosed group"),
    "a lone backslash": (outputs(regex="a\\"), "regex", "escapes nothing"),
    "look-behind": (outputs(regex="(?<=x)*"), "regex", "look-around"),
    "state explosion": (outputs(regex="(a{1000}){1000}"), "regex", "more than 0.5 s of processor time"),
    "100,000 parentheses": (outputs(regex="(" * 50_000 + ")" * 50_000), "regex", "at most 100000 are allowed"),
    "40,000 parentheses": (outputs(regex="(" * 20_000 + ")" * 20_000), "regex", "nested parentheses"),
    "parentheses of a grammar": (outputs(grammar="start: " + "(" * 40_000), "grammar", "deeply nested"),
    "an unknown rule": (outputs(grammar="start: other"), "grammar", "unknown name"),
    "JSON for a grammar": (outputs(grammar='{"grammars": []}'), "grammar", "expecting rule"),
    "a grammar without end": (outputs(grammar="start: more\nmore: start"), "grammar", "not 'start"),
    "oneOf in oneOf": (outputs(json=NESTED), "json", "use anyOf"),
    "deep JSON in a text": (outputs(json="[" * 90_000), "json", "recursion limit"),
    "a huge enum": (outputs(json={"enum": [f"{i}" for i in range(20_000)]}), "json", "at most 100000"),
    "a remote $ref": (outputs(json={"$ref": "http://127.0.0.1:1/x"}), "json", "not present"),
    "a $ref to a file": (outputs(json={"$ref": "file:///etc/passwd"}), "json", "not present"),
    "nothing satisfies it": (outputs(json={"type": "integer", "minimum": 2, "maximum": 1}), "json", "Unsatisfiable"),
    "options of the compiler": (outputs(json={"not": {}, "x-guidance": {"lenient": True}}), "json", "Unimplemented"),
    "a bad pattern of spaces": (outputs(json_object=True, whitespace_pattern="["), "whitespace_pattern", "unclosed"),
    "no choices": (outputs(choice=[]), "choice", "1 to 1024"),
    "too many choices": (outputs(choice=["a"] * 1025), "choice", "it has 1025"),
}


@pytest.fixture(scope="module")
def plain_stream(server: RunningServer) -> Any:
    """The times of chunks of one long plain stream, which goes on beside all bad grammars."""
    times: list[float] = []
    leave = threading.Event()

    def read() -> None:
        body = {"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with server.client() as http:
            while not leave.is_set():
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    for line in answer.iter_lines():
                        if line.startswith("data: {"):
                            times.append(time.monotonic())
                        if leave.is_set():
                            break

    reader = threading.Thread(target=read)
    reader.start()
    yield times
    leave.set()
    reader.join()


@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_grammar_is_refused_at_once_and_stops_nobody(
    server: RunningServer, plain_stream: list[float], name: str
) -> None:
    asked, field, why = FAULTS[name]
    began = time.monotonic()
    error = refused(server, **asked)
    ended = time.monotonic()
    assert ended - began < SECONDS
    assert error["param"] == f"structured_outputs.{field}" and error["message"].startswith(
        error["param"] + ": must be "
    )
    assert error["code"] == "invalid_value" and why in error["message"], error["message"]
    # A good one, right after it.
    assert ask(server, **outputs(regex="ok"))[0]["text"] == "ok"
    assert time.monotonic() - began < 2 * SECONDS
    # Chunks may be as far apart as a step of several bytes.
    while not (goes_on := plain_stream[-1:] and plain_stream[-1] > began) and time.monotonic() - began < 2 * SECONDS:
        time.sleep(0.01)
    assert goes_on


def test_the_field_of_the_client_is_named(server: RunningServer) -> None:
    error = refused(server, **response_format({"type": "nothing"}))
    assert error["param"] == "response_format.json_schema.schema" and "'nothing'" in error["message"]
    for asked, field in ((outputs(regex="a"), "structured_outputs"), (response_format({}), "response_format")):
        for decoder in ({"decoder": "blt-d"}, {"decoder": "auto", "exact": False}):
            error = refused(server, **asked, **decoder)
            assert (error["param"], error["code"]) == (field, "decoder_unavailable")
            assert error["message"].startswith(f"{field}: needs ") and "not checked" in error["message"]


def test_deep_json_in_the_body_is_no_valid_json(server: RunningServer) -> None:
    body = b'{"structured_outputs": {"json": {"enum": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}}"
    with server.client() as http:
        error = http.post("/v1/completions", content=body, headers={"content-type": "application/json"}).json()["error"]
    assert error["code"] in ("invalid_json", "invalid_value")


WRONG: list[tuple[Json, str]] = [
    (outputs(), "structured_outputs: must have exactly one of json, regex, choice, grammar and json_object"),
    (outputs(regex="a", choice=["a"]), "structured_outputs: must have exactly one of"),
    (outputs(json_object=False), "structured_outputs: must have exactly one of"),
    (outputs(regex="a", whitespace_pattern=" "), "structured_outputs: whitespace_pattern only goes with json"),
    (outputs(json=1), "structured_outputs.json: must be a JSON schema"),
    (outputs(json="[]"), "structured_outputs.json: must be a JSON schema that can be enforced, not '[]'"),
    (outputs(choice="a"), "structured_outputs.choice: must be a valid array"),
    (outputs(guided="a"), "structured_outputs.guided is not a known parameter"),
    ({"response_format": {"type": "xml"}}, "response_format.type: must be 'text', 'json_object' or 'json_schema'"),
    ({"response_format": {"type": "json_schema"}}, "response_format: must have a json_schema if, and only if"),
    ({"response_format": {"type": "text", "json_schema": {"name": "a", "schema": {}}}}, "response_format: must have"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        "response_format.json_schema.schema is",
    ),
    ({"response_format": {"type": "json_object"}} | outputs(regex="a"), "response_format: must be left out"),
]


def constraint(body: Json) -> structured.TextConstraint | None:
    return constraint_of(parse(json.dumps(body).encode(), 8, 1000))


@pytest.mark.parametrize(("body", "message"), WRONG)
def test_wrong_fields_are_named(body: Json, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        constraint(body)
    assert str(caught.value).startswith(message)


def test_nothing_and_text_ask_for_nothing() -> None:
    text = {"response_format": {"type": "text"}}
    assert constraint({}) is constraint(text) is constraint({"structured_outputs": None}) is None
    both = constraint(text | outputs(regex="a"))
    assert both and both.field == "structured_outputs"


def test_depth_and_size_are_bounded() -> None:
    def nested(levels: int) -> Json:
        return {"items": nested(levels - 1)} if levels > 1 else {}

    assert constraint(outputs(json=nested(structured.MAX_DEPTH)))
    with pytest.raises(ApiError, match="more than 64 levels"):
        constraint(outputs(json=nested(structured.MAX_DEPTH + 1)))
    large = constraint(outputs(regex="a" * 90_000))
    assert large and len(large.grammar) > FIELD_BYTES
    with pytest.raises(ApiError, match="structured_outputs: must have at most 262144 bytes"):
        constraint(outputs(regex="a" * 300_000))


@settings(max_examples=20)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=6), min_size=1, max_size=5), st.data())
def test_choices_are_taken_literally(choices: list[str], data: st.DataObject) -> None:
    grammar = from_choices("choice", choices).text

    def matches(text: str) -> bool:
        matcher, ids = compiled(grammar).matcher, [byte + 4 for byte in text.encode()]
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    assert all(map(matches, choices))
    other = data.draw(st.one_of(st.text(max_size=6), st.sampled_from(choices).map(lambda text: text[1:] + ".")))
    assert "\udfff" >= other[:1] >= "\ud800" or matches(other) == (other in choices)


def test_generate_takes_grammars_too(tiny_model: Path, tmp_path: Path) -> None:
    def generate(*flags: str) -> tuple[int, str]:
        common = ("generate", "--model", str(tiny_model), "--prompt", "abc", "--max-tokens", "99")
        done = CliRunner().invoke(app, [*common, *flags])
        return done.exit_code, done.output.strip()

    (schema := tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (lark := tmp_path / "words.lark").write_text('start: "one" | "two"')
    optional = {"type": "object", "properties": {f"p{n}": {} for n in range(300)}}
    (wide := tmp_path / "wide.json").write_text(json.dumps(optional))
    code, text = generate("--json-schema", str(schema))
    jsonschema.validate(json.loads(text), SCHEMA)
    assert code == 0
    assert generate("--choice", "a.b", "--choice", "a.b|")[1] in ("a.b", "a.b|")
    assert generate("--grammar", str(lark))[1] in ("one", "two")
    assert re.fullmatch("[x-z]{4}", generate("--regex", "[x-z]{4}", "--decoder", "blt-s")[1])
    for flags, message in (
        (("--regex", "("), "--regex: must be a regular expression without look-around and back-references, not '('"),
        (("--regex", "a", "--choice", "b"), "--regex and --choice cannot be combined"),
        (("--regex", "a", "--decoder", "blt-d"), "--regex: needs the decoder 'blt', 'blt-s', 'blt-dv' or 'auto'"),
        (("--json-schema", str(wide)), "make fewer properties of an object optional"),
        (("--json-schema", str(lark)), "--json-schema: must be a JSON schema that can be enforced, not 'start"),
    ):
        code, text = generate(*flags)
        assert code != 0 and message in text, text


def test_a_grammar_of_the_server_is_one_of_the_engine() -> None:
    for body in (outputs(choice=["a"]), response_format(SCHEMA), outputs(json_object=True, whitespace_pattern=" ?")):
        asked = constraint(body)
        assert asked and all(compiled(grammar.text) for grammar in asked.checked)
        assert asked.grammar == asked.checked[-1].text
    with pytest.raises(GrammarError):
        compiled("start: nope")
