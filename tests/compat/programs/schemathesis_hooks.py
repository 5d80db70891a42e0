"""For Schemathesis: names of the model that is served, where it would make some up, so that requests get somewhere."""

from typing import Any

import schemathesis

MODEL = "tiny"


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    return body | {"model": MODEL} if isinstance(body, dict) and isinstance(body.get("model"), str) else body


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: Any) -> Any:
    return {"name": MODEL} if path_parameters else path_parameters
