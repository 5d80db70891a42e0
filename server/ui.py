"""The live page: plain files from `ui/`, which need nothing from elsewhere and hold nothing secret."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.staticfiles import NotModifiedResponse, StaticFiles

from engine.decoders.table import DECODERS

FOLDER = Path(__file__).parent / "ui"
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # The browser itself refuses to make HTML out of strings, such as what a model wrote.
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Asks each time whether the file is still the same; after an upgrade no old part is left.
    "cache-control": "no-cache",
    "accept-ranges": "none",
}


def page_router(decoders: Iterable[str]) -> APIRouter:
    """`/` and `/page/NAME`, with what the page must know of these decoders."""
    table = decoder_table(decoders)
    tag = f'"{hashlib.sha256(table).hexdigest()}"'
    router = APIRouter(include_in_schema=False)
    files = StaticFiles(directory=FOLDER)

    async def serve(name: str, request: Request) -> Response:
        # A file is sent whole: the framework would refuse a range in words of its own.
        request.scope["headers"] = [header for header in request.scope["headers"] if header[0] != b"range"]
        response = await files.get_response(name, request.scope)
        response.headers.update(HEADERS)
        return response

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return await serve("index.html", request)

    @router.api_route("/page/table.js", methods=["GET", "HEAD"])
    async def offered(request: Request) -> Response:
        response = Response(table, media_type="text/javascript", headers={"etag": tag})
        if files.is_not_modified(response.headers, request.headers):
            response = NotModifiedResponse(response.headers)
        response.headers.update(HEADERS)
        return response

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        return await serve(name, request)

    return router


def decoder_table(decoders: Iterable[str]) -> bytes:
    """Rows of the table of decoders, as a module of the page."""
    rows = {
        spec.name: {
            "about": spec.about,
            "exact": spec.exact,
            "options": spec.options,
            "rule": spec.rule.rule if spec.rule else None,
        }
        for spec in map(DECODERS.__getitem__, decoders)
    }
    return f"export const DECODERS = {json.dumps(rows, indent=2)};\n".encode()
