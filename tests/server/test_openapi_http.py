"""What programs read about the API."""

from typing import Any

import httpx

from server.neutral import NEUTRAL
from server.schemas import CompletionRequest
from tests.scripted_server import ScriptedClient, body, serving


def refs(of: Any) -> list[str]:
    if isinstance(of, dict):
        own = [of["$ref"]] if "$ref" in of else []
        return own + [ref for value in of.values() for ref in refs(value)]
    return [ref for value in of for ref in refs(value)] if isinstance(of, list) else []


async def read(path: str) -> httpx.Response:
    async with serving(ScriptedClient()) as http:
        return await http.get(path)


async def test_all_references_in_openapi_json_resolve() -> None:
    document = (await read("/openapi.json")).json()
    found = set(refs(document))
    assert "#/components/schemas/CompletionRequest" in found and "#/components/schemas/ErrorBody" in found
    for ref in found:
        at = document
        root, *parts = ref.split("/")
        assert root == "#"
        for part in parts:
            at = at[part]
    assert "$defs" not in str(document)


async def test_openapi_json_describes_requests_and_responses_of_each_route() -> None:
    document = (await read("/openapi.json")).json()
    request = document["components"]["schemas"]["CompletionRequest"]
    assert set(request["properties"]) == {*CompletionRequest.model_fields, *NEUTRAL}
    assert request["additionalProperties"] is False and "required" not in request
    completions = document["paths"]["/v1/completions"]["post"]
    assert set(completions["requestBody"]["content"]) == {"application/json"}
    assert {"400", "401", "404", "408", "413", "415", "429", "431", "500", "503"} <= set(completions["responses"])
    metrics = document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert list(metrics) == ["text/plain"]
    for path, operations in document["paths"].items():
        ids = [operation["operationId"] for operation in operations.values()]
        assert len(ids) == len(set(ids)), path


async def test_every_link_leads_from_an_answer_to_another() -> None:
    asked = {"/v1/completions": body("x"), "/tokenize": {"prompt": "naïve"}, "/detokenize": {"tokens": [101, 102]}}
    told: dict[tuple[str, str], Any] = {}
    async with serving(ScriptedClient()) as http:
        document = (await http.get("/openapi.json")).json()
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                links = operation["responses"]["200"].get("links", {})
                answer = (await http.request(method, path, json=asked.get(path))).json() if links else None
                for name, link in links.items():
                    pointer, next_method = link["operationRef"].removeprefix("#/paths/").rsplit("/", 1)
                    target = pointer.replace("~1", "/")
                    assert next_method in document["paths"][target]
                    filled = expand(link.get("parameters", {}), answer)
                    following = await http.request(
                        next_method, target.format(**filled), json=expand(link.get("requestBody"), answer)
                    )
                    assert following.status_code == 200, (path, name, following.text)
                    told[path, name] = following.json()
    assert told["/v1/models", "model"]["id"] == told["/v1/completions", "model"]["id"] == "scripted"
    # The ids of a text begin with that of <s>.
    assert told["/tokenize", "text"]["prompt"] == "<s>naïve" and told["/detokenize", "tokens"]["tokens"] == [101, 102]
    assert len(told) == 6


def expand(value: Any, answer: Any) -> Any:
    """With OpenAPI's expressions replaced by these parts of an answer."""
    if isinstance(value, dict):
        return {name: expand(part, answer) for name, part in value.items()}
    if not isinstance(value, str) or not value.startswith("$"):
        return value
    for part in value.removeprefix("$response.body#/").split("/"):
        answer = answer[int(part) if isinstance(answer, list) else part]
    return answer


async def test_the_models_route_reports_maximum_length_and_decoders() -> None:
    models = {model["id"]: model for model in (await read("/v1/models")).json()["data"]}
    assert models["scripted"]["max_model_len"] == 1000
    assert models["scripted"]["decoders"] == ["auto", "blt"]
    assert models["scripted:auto"]["decoders"] == ["auto"]


async def test_a_request_may_leave_out_the_model() -> None:
    async with serving(ScriptedClient(), served_model_name=["first", "second"]) as http:
        for fields, name in (({}, "first"), ({"model": None}, "first"), ({"model": "second:auto"}, "second:auto")):
            answer = await http.post("/v1/completions", json={"prompt": "x", **fields})
            assert answer.json()["model"] == name
