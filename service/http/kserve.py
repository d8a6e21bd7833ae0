"""Health as KServe's v2 REST protocol asks for it, and vLLM's clients; inference by KServe's is served over gRPC."""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import Route

from service.errors import Code, ServiceError
from service.host import Host, Phase
from service.http.reply import Json
from service.names import adapter_of


def kserve_routes(host: Host) -> list[Route]:
    async def live(request: Request) -> Json:
        if not host.alive:
            raise ServiceError(Code.UNAVAILABLE, "the engine does not answer")
        return Json({"live": True})

    async def ready(request: Request) -> Json:
        check_ready(host)
        return Json({"ready": True})

    async def model_ready(request: Request) -> Json:
        name = request.path_params["model"]
        adapter_of(host, name)
        check_ready(host)
        return Json({"name": name, "ready": True})

    return [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/health", ready),  # load generators ask vLLM's before they begin
        Route("/v2/models/{model:path}/ready", model_ready),
    ]


def check_ready(host: Host) -> None:
    """Ready means: a token could be made now.

    Raises:
        ServiceError: UNAVAILABLE.
    """
    status = host.status
    if status.phase is not Phase.READY or not host.alive:
        known = f" ({status.progress:.0%})" if status.phase is Phase.LOADING else ""
        raise ServiceError(Code.UNAVAILABLE, f"not ready: {status.phase.value}{known}")
