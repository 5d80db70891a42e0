"""A hub of its own: what `huggingface_hub` needs of the protocol, over folders of this machine.

A repository is a folder of the root, `org/name`. Its branch `main`, its tag `v1` and its commit name the same files. As
on the real one, what is listed is open even where files are gated, and large files are redirected to another host.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".pth", ".gguf", ".bin")
TOKEN = "hf_the-right-token"
WITHOUT_ACCESS = "hf_of-another-account"


@dataclass
class Hub:
    """gated, private: repositories that want TOKEN. break_after: bytes of the next large file after which the
    connection breaks, once. pause: seconds that each 64 KiB of a large file take."""

    root: Path
    port: int = 0
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    down: bool = False
    break_after: int | None = None
    pause: float = 0.0
    requests: list[tuple[str, str, str | None, str | None]] = field(default_factory=list)
    """Method, path, Authorization and Range, in order."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repository: str) -> str:
        return hashlib.sha1(repository.encode()).hexdigest()

    def fetched(self) -> set[str]:
        """Files whose contents were asked for, by their paths in the repository."""
        return {found[1] for method, path, *_ in self.requests if method == "GET" and (found := _FILE.search(path))}


_FILE = re.compile(r"(?:/resolve/[^/]+/|/cdn/[^/]+/[^/]+/)(.*)")


@contextmanager
def running_hub(root: Path) -> Iterator[Hub]:
    hub = Hub(root)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub})) as server:
        hub.port = server.server_port
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers["Authorization"], self.headers["Range"]))
        if self.hub.down:
            return self._send(500)
        if found := re.fullmatch(r"/cdn/([^/]+/[^/]+)/(.*)", path):
            return self._send_file(self.hub.root / found[1] / found[2])
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        found = about or re.fullmatch(r"/([^/]+/[^/]+)/(resolve)/([^/]+)/(.+)", path)
        if not found:
            return self._send(404)
        repository, kind, revision = found[1], found[2], found[3] or "main"
        folder, commit = self.hub.root / repository, self.hub.commit(repository)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, WITHOUT_ACCESS):
            return self._send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        if not folder.is_dir() or (repository in self.hub.private and token != TOKEN):
            return self._send(404 if token else 401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1", commit):
            return self._send(404, {"X-Error-Code": "RevisionNotFound"})
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = {file.relative_to(folder).as_posix(): file for file in files}
        if kind == "tree":
            return self._send_json([_entry(name, file) for name, file in names.items()])
        if kind != "resolve":
            siblings = [{"rfilename": name} for name in names]
            return self._send_json({"id": repository, "sha": commit, "siblings": siblings})
        if repository in self.hub.gated and token != TOKEN:
            return self._send(403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access..."})
        if (file := names.get(found[4])) is None:
            return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha(file)}"'}
        if file.name.endswith(LARGE):
            headers |= {"X-Linked-Etag": headers.pop("ETag"), "X-Linked-Size": str(file.stat().st_size)}
            other_host = f"http://localhost:{self.hub.port}/cdn/{repository}/{found[4]}"
            return self._send(302, headers | {"Location": other_host})
        self._send_file(file, headers)

    def _send_json(self, data: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(data).encode())

    def _send_file(self, file: Path, headers: dict[str, str] | None = None) -> None:
        data, status, headers = file.read_bytes(), 200, {"Accept-Ranges": "bytes", **(headers or {})}
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            headers["Content-Range"] = f"bytes {wanted[1]}-{len(data) - 1}/{len(data)}"
            data, status = data[int(wanted[1]) :], 206
        self._send(status, headers, data, large=file.name.endswith(LARGE))

    def _send(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"", large: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if large and self.hub.break_after is not None:
            self.wfile.write(body[: self.hub.break_after])
            self.hub.break_after = None
            self.close_connection = True
            return
        if not (large and self.hub.pause):
            self.wfile.write(body)
            return
        for start in range(0, len(body), 1 << 16):
            time.sleep(self.hub.pause)
            self.wfile.write(body[start : start + (1 << 16)])


def _entry(name: str, file: Path) -> dict[str, Any]:
    size, sha = file.stat().st_size, _sha(file)
    entry = {"type": "file", "path": name, "size": size, "oid": sha[:40]}
    return entry | {"lfs": {"oid": sha, "size": size, "pointerSize": 134}} if name.endswith(LARGE) else entry


def _sha(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
