"""Tells telemetry of every HTTP request, makes it the CALL of all that happens in it, and answers scrapers."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.telemetry import orca
from service.telemetry.calls import CALL
from service.telemetry.metrics import OTHER
from service.telemetry.telemetry import Telemetry

CLIENT_GONE = 499  # nginx' word for a client that went away before it had its answer
QUIET = ("/metrics", "/v1/metrics", "/v1/health/live", "/v1/health/ready", "/v2/health/live", "/v2/health/ready")
"""Paths that probers and scrapers ask for every few seconds."""


class Observe:
    """An ASGI application around all others, so that it sees what is sent in the end."""

    def __init__(self, app: ASGIApp, telemetry: Telemetry) -> None:
        self._app = app
        self._telemetry = telemetry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, client = Headers(scope=scope), scope.get("client")
        status, complete = CLIENT_GONE, False
        wanted = headers.get(orca.FORMAT_HEADER)
        address = client[0] if client else ""
        call = self._telemetry.open(
            "http",
            lambda: _route(scope),
            peer=f"{address}:{client[1]}" if client else "",
            headers=headers,
            span=scope["method"],
            attributes=lambda: {
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "url.scheme": scope["scheme"],
                "client.address": address,
            },
        )
        CALL.set(call)

        async def watched_send(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if wanted and (report := orca.header(self._telemetry.stats, wanted)) is not None:
                    message["headers"] = [*message.get("headers", ()), (orca.HEADER.encode(), report.encode())]
            elif message["type"] == "http.response.body":
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            status = status if complete else CLIENT_GONE
            call.request_id = scope.get("state", {}).get("request_id", call.request_id)
            if call.span is not None:
                call.span.update_name(_route(scope))
            self._telemetry.close(
                call,
                str(status),
                lambda: {"http.response.status_code": status, "http.route": _path(scope)},
                failed=status >= 500,
                quiet=scope["path"] in QUIET,
            )


def metrics_routes(telemetry: Telemetry) -> list[Route]:
    """Where scrapers look."""

    async def metrics(request: Request) -> Response:
        text, content_type = telemetry.metrics.exposition(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return [Route(path, metrics) for path in ("/metrics", "/v1/metrics")]


def _route(scope: Scope) -> str:
    """Method and path of the route that answers: nothing that clients can make up."""
    route = scope.get("route")
    if route is None or scope["method"] not in (getattr(route, "methods", None) or ()):
        return OTHER
    return f"{scope['method']} {_path(scope)}"


def _path(scope: Scope) -> str:
    path: str = getattr(scope.get("route"), "path", "")
    return path
