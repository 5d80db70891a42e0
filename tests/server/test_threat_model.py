"""docs/security.md says who may call which route."""

import re
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute, Route

from server.app import create_app
from server.settings import ServerSettings
from tests.conftest import ROOT
from tests.scripted_server import ScriptedClient, listening

API, ADMIN = "the-key-of-a-client", "the-key-of-the-operator"
TEXT = (ROOT / "docs" / "security.md").read_text()
BODIES: dict[str, Any] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [101]},
}
FILLED = {"{name:path}": "scripted", "/page/{name}": "/page/main.js", "{level}": "info", "{name}": "none"}


def documented() -> dict[tuple[str, str], list[str]]:
    """What each route answers to no key, an API key and an admin key."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in re.findall(r"^\| `(?:GET|POST) .*\|$", TEXT, re.M):
        routes, *answers = [cell.strip() for cell in row.strip("|").split("|")]
        found |= {(method, path): answers for method, path in re.findall(r"`(GET|POST) (\S+)`", routes)}
    return found


def served(routes: Iterable[BaseRoute]) -> Iterator[tuple[str, str]]:
    """All routes, in the schema or not."""
    for route in routes:
        if isinstance(route, Route):
            yield from ((method, route.path) for method in (route.methods or set()) & {"GET", "POST"})
        elif router := getattr(route, "original_router", None):
            yield from served(router.routes)


@pytest.mark.parametrize("is_open", [False, True], ids=["keys", "open"])
async def test_the_routes_answer_those_whom_the_threat_model_names(is_open: bool, levels: None) -> None:
    chosen = ServerSettings()
    app = create_app(chosen, ScriptedClient(), () if is_open else (API.encode(),), None, (ADMIN.encode(),))
    table = documented()
    # The last is one of the page's files.
    assert table.keys() == set(served(app.routes)) - {("GET", "/page/table.js")}
    async with listening(app, chosen) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        for (method, path), wanted in table.items():
            where = path
            for name, value in FILLED.items():
                where = where.replace(name, value)
            for key, answer in zip(("", API, ADMIN), wanted, strict=True):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                got = (await http.request(method, where, json=BODIES.get(path), headers=headers)).status_code
                if is_open and not path.startswith("/admin/"):
                    answer = "yes"
                # An unknown id is asked for only where the key was right.
                assert (got == 401) == (answer == "401") and got in (200, 401, 404), (path, key, got)
                if path == "/admin/drain" and got == 200:
                    app.state.gate.resume()
