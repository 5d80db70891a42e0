"""The live page: plain files from `page/`, which need nothing from elsewhere and hold nothing secret."""

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

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
}


def page_router() -> APIRouter:
    """`/` and `/page/NAME`."""
    router = APIRouter(include_in_schema=False)
    files = StaticFiles(directory=FOLDER)

    async def serve(name: str, request: Request) -> Response:
        response = await files.get_response(name, request.scope)
        response.headers.update(HEADERS)
        return response

    @router.api_route("/", methods=["GET", "HEAD"])
    async def index(request: Request) -> Response:
        return await serve("index.html", request)

    @router.api_route("/page/{name}", methods=["GET", "HEAD"])
    async def file(request: Request, name: str) -> Response:
        return await serve(name, request)

    return router
