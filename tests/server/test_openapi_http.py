"""What programs read about the API."""

from typing import Any

import httpx

from server.neutral import NEUTRAL
from server.schemas import CompletionRequest
from tests.scripted_server import ScriptedClient, serving


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
