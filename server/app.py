"""The HTTP application over a running engine."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import Response

from engine.client import EngineClient

from .admission import Gate
from .completions import complete
from .errors import Code, ErrorBody, add_error_handlers
from .generation import Service
from .metrics import Metrics
from .middleware import ApiKeys, RequestContext
from .names import check_model, offered_models
from .page import page_router
from .responses import JsonResponse
from .schemas import Completion, CompletionRequest
from .settings import ServerSettings

if TYPE_CHECKING:
    from .traces import Traces

OPENAPI_BODY = {
    "requestBody": {
        "required": True,
        # The $id makes the schema's own $defs resolve inside it.
        "content": {
            "application/json": {"schema": {"$id": "CompletionRequest", **CompletionRequest.model_json_schema()}}
        },
    }
}


def server_version() -> str:
    """Of the installed distribution, or "unknown" in a bare clone."""
    try:
        return version("fastblt")
    except PackageNotFoundError:
        return "unknown"


def create_app(settings: ServerSettings, client: EngineClient, traces: "Traces | None" = None) -> FastAPI:
    """The client must have been started; whoever started it stops it, and closes the traces. `app.state.gate` is what a
    drain closes.

    Raises OSError or ValueError if the API keys cannot be read.
    """
    gate = Gate(settings)
    metrics = Metrics(client, gate, server_version())
    service = Service(settings, client, gate, metrics)
    app = FastAPI(title="fastblt", version=server_version(), docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.gate = gate
    app.include_router(_api(service))
    app.include_router(_operations(service))
    if settings.page:
        app.include_router(page_router())
    add_error_handlers(app)
    # The last one added is the outermost.
    if keys := settings.load_api_keys():
        app.add_middleware(ApiKeys, keys=keys)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(RequestContext, metrics=metrics, traces=traces)
    return app


def _api(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")
    settings, client = service.settings, service.client
    created = int(service.started)

    def describe(name: str) -> dict[str, str | int]:
        return {"id": name, "object": "model", "created": created, "owned_by": "fastblt"}

    statuses = (400, 401, 404, 413, 429, 503)
    errors: dict[int | str, dict[str, type]] = {status: {"model": ErrorBody} for status in statuses}

    @router.post("/completions", response_model=Completion, responses=errors, openapi_extra=OPENAPI_BODY)
    async def completions(request: Request) -> Response:
        """Continues one or several prompts, as OpenAI's legacy completions do; a token is a byte."""
        return await complete(request, service)

    @router.get("/models")
    async def models() -> Response:
        """The model, and an alias of it for each decoder that it can be used with."""
        data = [describe(name) for name in offered_models(settings, client.limits)]
        return JsonResponse({"object": "list", "data": data})

    @router.get("/models/{name:path}", responses={404: {"model": ErrorBody}})
    async def model(name: str) -> Response:
        """One of them."""
        check_model(name, settings, client.limits)
        return JsonResponse(describe(name))

    return router


def _operations(service: Service) -> APIRouter:
    router = APIRouter()
    client, gate = service.client, service.gate

    @router.get("/health/live", responses={503: {"model": ErrorBody}})
    async def live() -> Response:
        """503 once the engine is gone for good, and only a new server helps."""
        if client.state == "dead":
            raise gate.unavailable("the engine is gone and will not come back", "engine_dead")
        return JsonResponse({"status": "live"})

    @router.get("/health/ready", responses={503: {"model": ErrorBody}})
    async def ready() -> Response:
        """503 while requests had better go elsewhere."""
        gate.check_open()
        if client.state != "ready":
            code: Code = "engine_dead" if client.state == "dead" else "engine_restarting"
            raise gate.unavailable(f"the engine is {client.state}", code)
        return JsonResponse({"status": "ready"})

    @router.get("/version")
    async def version_of() -> Response:
        """The server's version and what it serves."""
        limits = client.limits
        return JsonResponse(
            {
                "version": server_version(),
                "model": limits.name,
                "parameters": limits.parameters,
                "max_length": limits.max_length,
                "block_size": limits.block_size,
                "decoders": limits.decoders,
            }
        )

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
