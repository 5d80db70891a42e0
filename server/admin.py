"""Routes for the operator of a running server. They need an admin key; without `--admin-key-file` there are none."""

import logging
from typing import get_args

from fastapi import APIRouter
from starlette.responses import Response

from engine.logs import LevelName, set_level

from . import salt
from .errors import ApiError, shown
from .generation import Generation, Service
from .middleware import ADMIN_PATHS
from .responses import JsonResponse

log = logging.getLogger("fastblt.server")


def admin_router(service: Service) -> APIRouter:
    # Not in the schema, which every client may read.
    router = APIRouter(prefix=ADMIN_PATHS.rstrip("/"), include_in_schema=False)
    gate = service.gate

    def described(generation: Generation) -> dict[str, object]:
        usage = generation.usage_so_far()
        return {
            "id": generation.id,
            "request_id": generation.request_id,
            "seconds": round(generation.age, 3),
            "prompt_bytes": usage.prompt_tokens,
            "completion_bytes": usage.completion_tokens,
        }

    def intake() -> Response:
        return JsonResponse({"draining": gate.draining, "requests": gate.num_requests})

    @router.get("/requests")
    async def requests() -> Response:
        """The completions under way."""
        return JsonResponse({"requests": [described(generation) for generation in service.generations.values()]})

    @router.post("/requests/{name}/end")
    async def end(name: str) -> Response:
        """Ends a completion by its own id, or all those with this request id."""
        found = [g for g in service.generations.values() if name in (g.id, g.request_id)]
        if not found:
            message = f"no completion under way has the id {shown(name)}"
            raise ApiError(404, message, code="request_not_found")
        for generation in found:
            log.warning("the operator ended %s", generation.id, extra={"request_id": generation.request_id})
            generation.end(ApiError(403, "the operator of this server ended the request", code="ended_by_operator"))
        return JsonResponse({"ended": [generation.id for generation in found]})

    @router.post("/drain")
    async def drain() -> Response:
        """Refuses new completions; those under way go on."""
        gate.drain()
        log.warning("the operator drains the server")
        return intake()

    @router.post("/resume")
    async def resume() -> Response:
        """Ends a drain, unless the server shuts down."""
        gate.resume()
        log.warning("the operator ended the drain")
        return intake()

    @router.post("/prefix-cache/forget")
    async def forget() -> Response:
        """From now on no request finds what an earlier one has left in the prefix cache."""
        salt.forget()
        log.warning("the operator had the prefix cache forgotten")
        return JsonResponse({"forgotten": True})

    @router.post("/log-level/{level}")
    async def log_level(level: str) -> Response:
        """Of both processes, until they end."""
        name = next((name for name in get_args(LevelName) if name == level), None)
        if name is None:
            message = f"level: must be one of {', '.join(get_args(LevelName))}, not {shown(level)}"
            raise ApiError(400, message, param="level", code="invalid_value")
        log.warning("the operator set the log level to %s", name)
        set_level(name)
        service.client.set_log_level(name)
        return JsonResponse({"level": name})

    return router
