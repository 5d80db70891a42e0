"""OpenAPI's links: what can be asked next with what a route has answered.

A value that begins with $ stands for a part of the answer, as OpenAPI's runtime expressions define it.
"""

from typing import Any

Link = dict[str, Any]


def _link(method: str, path: str, description: str, **filled: Any) -> Link:
    """filled: `parameters` or `requestBody`."""
    return {"operationRef": f"#/paths/{path.replace('/', '~1')}/{method}", "description": description, **filled}


def _model(description: str, name: str) -> Link:
    return _link("get", "/v1/models/{name}", description, parameters={"name": name})


def _completion(description: str, **body: Any) -> Link:
    return _link("post", "/v1/completions", description, requestBody={**body, "max_tokens": 16})


TOKENS = "$response.body#/tokens"
FIRST = "$response.body#/data/0/id"
LINKS: dict[str, dict[str, Link]] = {
    "/v1/models": {
        "model": _model("The first model.", FIRST),
        "completion": _completion("Continues a text with the first model.", model=FIRST, prompt="import "),
    },
    "/v1/completions": {"model": _model("The model that answered.", "$response.body#/model")},
    "/tokenize": {
        "text": _link("post", "/detokenize", "The text of the ids.", requestBody={"tokens": TOKENS}),
        "completion": _completion("Continues the text: a prompt may be ids.", prompt=TOKENS),
    },
    "/detokenize": {
        "tokens": _link(
            "post",
            "/tokenize",
            "The ids of the text, without a begin-of-sequence id.",
            requestBody={"prompt": "$response.body#/prompt", "add_special_tokens": False},
        )
    },
}
"""By path, then by name. Each of these paths has one method."""
