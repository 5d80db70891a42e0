"""For Schemathesis: names of the model that is served, where it would make some up, so that requests get somewhere; and
streams, which it seldom asks for among so many fields."""

from typing import Any

import schemathesis

MODEL = "tiny"


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("model"), str):
        body = body | {"model": MODEL}
    completes = context.operation is not None and context.operation.path == "/v1/completions"
    # A stream cannot be ranked.
    return body | {"stream": True} if completes and "best_of" not in body and len(body) % 2 else body


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: Any) -> Any:
    return {"name": MODEL} if path_parameters else path_parameters
