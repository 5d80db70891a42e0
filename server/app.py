"""The HTTP application over a running engine."""

from typing import TYPE_CHECKING

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from engine.installed import installed
from engine.process.client import EngineClient

from .admin import admin_router
from .admission import Gate
from .completions import complete
from .errors import add_error_handlers
from .generation import Service
from .grammars import Grammars
from .http import Connections
from .keys import KeyRing
from .metrics import Metrics
from .middleware import Failures, Keys, RequestContext, with_cors
from .model_names import check_model, offered_models
from .openapi import BODY_ERRORS, COMPLETION_ANSWERS, Application, body_of, errors
from .responses import JsonResponse
from .schemas import Completion, CompletionRequest, Health, ModelCard, ModelList, Version
from .settings import ServerSettings
from .token_schemas import Detokenized, DetokenizeRequest, Tokenized, TokenizeRequest, TokenizerInfo
from .tokenizer import CONFIG
from .tokens import detokenize, tokenize
from .ui import page_router

if TYPE_CHECKING:
    from .telemetry import Traces


def create_app(
    settings: ServerSettings,
    client: EngineClient,
    keys: tuple[bytes, ...] = (),
    traces: "Traces | None" = None,
    admin_keys: tuple[bytes, ...] = (),
) -> FastAPI:
    """The client must have been started; its owner stops it, and closes the traces. Without keys the server is open,
    without admin keys it has no routes for its operator.

    A drain closes `app.state.gate`; `app.state.connections` counts connections, if the server reports them. At its end
    the owner closes `app.state.grammars`.
    """
    ring = KeyRing("API keys", keys, settings.api_key_file, settings.load_api_keys)
    admin_ring = KeyRing("admin keys", admin_keys, settings.admin_key_file, settings.load_admin_keys)
    gate = Gate(settings, is_shared=lambda: len(ring) > 1)
    connections = Connections(settings, lambda: gate.draining)
    version = installed().version
    metrics = Metrics(client, gate, connections, version, settings)
    grammars = Grammars(settings.retry_after, gate.is_shared)
    service = Service(settings, client, gate, metrics, grammars)
    app = Application(title="fastblt", version=version, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.gate, app.state.connections, app.state.grammars = gate, connections, grammars
    app.state.service = service
    app.include_router(_api(service))
    app.include_router(_tokenizer(service))
    app.include_router(_operations(service))
    if admin_keys:
        app.include_router(admin_router(service))
    if settings.page:
        app.include_router(page_router(client.limits.decoders))
    add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(Failures)
    if keys or admin_keys:
        app.add_middleware(Keys, keys=ring, admin_keys=admin_ring)
    if settings.cors_origins:
        app.add_middleware(with_cors, origins=settings.cors_origins)
    app.add_middleware(RequestContext, metrics=metrics, trusted_proxies=settings.trusted_proxies, traces=traces)
    return app


def _api(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1")
    settings, client = service.settings, service.client

    def describe(name: str) -> ModelCard:
        limits = client.limits
        decoders = [decoder] if (decoder := offered_models(settings, limits)[name]) else list(limits.decoders)
        return ModelCard(
            id=name,
            root=limits.name,
            created=int(service.started),
            max_model_len=limits.max_length,
            decoders=decoders,
        )

    @router.post(
        "/completions",
        response_model=Completion,
        responses=COMPLETION_ANSWERS,
        openapi_extra=body_of(CompletionRequest),
    )
    async def completions(request: Request) -> Response:
        """Continues one or several prompts, as OpenAI's legacy completions do; a token is a byte."""
        return await complete(request, service)

    @router.get("/models", response_model=ModelList, responses=errors())
    async def models() -> Response:
        """The model, and an alias of it for each decoder that it can be used with."""
        return JsonResponse(ModelList(data=[describe(name) for name in offered_models(settings, client.limits)]))

    @router.get("/models/{name:path}", response_model=ModelCard, responses=errors(404))
    async def model(name: str) -> Response:
        """One of the models."""
        check_model(name, settings, client.limits)
        return JsonResponse(describe(name))

    return router


def _tokenizer(service: Service) -> APIRouter:
    """vLLM's routes."""
    router = APIRouter()

    @router.post("/tokenize", response_model=Tokenized, responses=BODY_ERRORS, openapi_extra=body_of(TokenizeRequest))
    async def tokens_of(request: Request) -> Response:
        """The ids of a text."""
        return await tokenize(request, service)

    @router.post(
        "/detokenize", response_model=Detokenized, responses=BODY_ERRORS, openapi_extra=body_of(DetokenizeRequest)
    )
    async def text_of(request: Request) -> Response:
        """The text of ids."""
        return await detokenize(request, service)

    @router.get("/tokenizer_info", response_model=TokenizerInfo, responses=errors())
    async def about_tokenizer() -> Response:
        """What a program must know about the tokenizer; there is none to download."""
        return JsonResponse(CONFIG | {"model_max_length": service.client.limits.max_length})

    return router


def _operations(service: Service) -> APIRouter:
    router = APIRouter()
    client, gate = service.client, service.gate

    async def live() -> Response:
        """503 once the engine is gone, or has failed for longer than `--restart-seconds`."""
        service.check_engine()
        return JsonResponse(Health(status="live"))

    async def ready() -> Response:
        """503 while requests should go to another server."""
        gate.check_open()
        service.check_engine()
        if not client.responds:
            what = "does not respond" if client.state == "ready" else f"is {client.state}"
            raise gate.unavailable(f"the engine {what}", "engine_restarting")
        return JsonResponse(Health(status="ready"))

    for path, answer in {"/health/live": live, "/health/ready": ready, "/health": ready, "/ping": ready}.items():
        router.add_api_route(path, answer, response_model=Health, responses=errors(503, keys=False))
        router.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

    @router.get("/version", response_model=Version, responses=errors())
    async def version_of() -> Response:
        """The server's version, what it runs on and what it serves."""
        limits, here, kernels = client.limits, installed(), client.info.kernels
        return JsonResponse(
            Version(
                version=here.version,
                commit=here.commit,
                torch=here.torch,
                triton=here.triton,
                kernels=kernels,
                instruction_set=here.instruction_set if kernels == "native" else None,
                model=limits.name,
                parameters=limits.parameters,
                max_length=limits.max_length,
                block_size=limits.block_size,
                decoders=list(limits.decoders),
            )
        )

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(await service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router
