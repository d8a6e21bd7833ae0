"""What the operator's HTTP port tells: /metrics for Prometheus, /healthz and /readyz for the kubelet.

Ready is a process that knows the resources, whether it leads or not: one that waits to lead does its work. Alive is one
whose event loop answers: nothing outside this process makes the kubelet start it anew, as that helps nobody.
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route


def create_app(registry: CollectorRegistry, *, ready: Callable[[], bool], leads: Callable[[], bool]) -> Starlette:
    async def metrics(request: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        if not ready():
            return PlainTextResponse("the API server has not answered yet\n", 503)
        return PlainTextResponse("ok, leads\n" if leads() else "ok, waits to lead\n")

    return Starlette(routes=[Route("/metrics", metrics), Route("/healthz", healthz), Route("/readyz", readyz)])
