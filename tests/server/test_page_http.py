"""How the live page is served; what it does is tested in a browser (tests/ops)."""

import re

import pytest

from engine.decoders import DECODERS
from server.ui import FOLDER, decoder_table
from tests.scripted_server import ScriptedClient, serving
from tests.serving import RunningServer

FILES = sorted(path.name for path in FOLDER.iterdir())
GENERATED = {"table.js": decoder_table(DECODERS)}
TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in (*FILES, *GENERATED))])
def test_page_files_have_content_type_security_policy_and_etag(server: RunningServer, path: str) -> None:
    with server.client() as http:
        found = http.get(path)
        again = http.get(path, headers={"if-none-match": found.headers["etag"]})
        head = http.head(path)
    name = path.rpartition("/")[2] or "index.html"
    assert (found.status_code, found.content) == (200, GENERATED.get(name) or (FOLDER / name).read_bytes())
    assert found.headers["content-type"].split(";")[0] == TYPES[name.rpartition(".")[2]]
    assert (again.status_code, again.content, head.status_code, head.content) == (304, b"", 200, b"")
    for response in (found, again, head):
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert "require-trusted-types-for 'script'" in policy
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("wanted", ["nonsense", "bytes=999999999-", "bytes=0-9"])
def test_a_page_file_is_sent_whole_whatever_range_is_asked_for(server: RunningServer, wanted: str) -> None:
    with server.client() as http:
        for path, name in (("/", "index.html"), ("/page/main.js", "main.js")):
            response = http.get(path, headers={"range": wanted})
            assert (response.status_code, response.content) == (200, (FOLDER / name).read_bytes())
            assert response.headers["accept-ranges"] == "none"


@pytest.mark.parametrize("path", ["/page/", "/page/none.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py"])
def test_paths_outside_the_page_are_not_found(server: RunningServer, path: str) -> None:
    with server.client() as http:
        response = http.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")


def test_page_files_reference_only_each_other() -> None:
    text = {name: (FOLDER / name).read_text() for name in FILES}
    everything = "\n".join(text.values()).replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"(?:https?:)?//[\w-]+\.\w+|@import|url\(", everything)
    named = set(re.findall(r'(?:src|href)="page/([^"]+)"', text["index.html"]))
    named |= {name for script in text.values() for name in re.findall(r'from "\./([^"]+)"', script)}
    assert named == {*FILES, *GENERATED} - {"index.html"}


async def test_the_page_needs_no_api_key_and_can_be_switched_off() -> None:
    async with serving(ScriptedClient(), keys=(b"a-secret-of-the-test",)) as closed:
        statuses = [(await closed.get(path)).status_code for path in ("/", "/page/main.js", "/version")]
    assert statuses == [200, 200, 401]
    async with serving(ScriptedClient(), page=False) as without:
        for path in ("/", "/page/main.js"):
            assert (await without.get(path)).json()["error"]["code"] == "unknown_url"
