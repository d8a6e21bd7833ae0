"""The application of the HTTP port: routes, and what every request gets whichever route answers it.

- `x-request-id`: the client's own or a new one, in the answer and in `scope["state"]["request_id"]`.
- Every error has OpenAI's shape. What a handler raises by mistake is a 500 with an id, which stands beside the
  traceback in the log; its text reaches nobody.
- No CORS headers: pages of other origins are not served.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import BaseRoute, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import Code, ServiceError, invalid
from service.host import Host
from service.http.auth import Authenticate
from service.http.errors import RouteError
from service.http.kserve import kserve_routes
from service.http.observe import Observe, metrics_routes
from service.http.openai.routes import UNSERVED, openai_routes
from service.http.openapi import openapi_routes
from service.http.page import page_routes
from service.http.reply import fault, send_error
from service.names import MAX_REQUEST_ID, is_request_id
from service.security.access import EVERYBODY, Access
from service.security.limits import MAX_REQUEST_BYTES
from service.telemetry.telemetry import Telemetry

log = logging.getLogger(__name__)


def create_app(
    host: Host,
    *,
    routes: Sequence[BaseRoute] = (),
    access: Access = EVERYBODY,
    max_request_bytes: int = MAX_REQUEST_BYTES,
    telemetry: Telemetry | None = None,
) -> ASGIApp:
    """The whole application: telemetry sees everything, Guard words every error, Authenticate lets in to the routes.

    Args:
        routes: more of them; they come first.
        access: who may call what; everybody everything by default.
        max_request_bytes: larger bodies are refused before they are read.
        telemetry: is told of every request, and asked for metrics.
    """
    metrics = [] if telemetry is None else metrics_routes(telemetry)
    served = [*openai_routes(host, max_request_bytes), *kserve_routes(host), *openapi_routes(), *page_routes()]
    known = [*routes, *metrics, *served]
    router = Router(known, redirect_slashes=False)  # one path, one meaning
    app = Guard(Authenticate(router, access, known))
    return app if telemetry is None else Observe(app, telemetry)


class Guard:
    """See the module."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "the server speaks nothing else"
        scope["app"] = self  # by this the router knows that it may raise
        given = Headers(scope=scope).get("x-request-id", "")
        usable = is_request_id(given)
        request_id = given if usable else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if given and not usable:
                raise invalid("x-request-id", f"must be printable ASCII of at most {MAX_REQUEST_ID} characters")
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            log.debug("client gone", extra={"request_id": request_id, "path": scope["path"]})
        except (Exception, asyncio.CancelledError) as error:
            answer = _answer(error, scope["path"])
            if not started:
                await send_error(send_with_id, answer)


def _answer(error: BaseException, path: str) -> ServiceError | RouteError:
    """What a client is told."""
    if isinstance(error, ServiceError | RouteError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 404 and (instead := _instead_of(path)):
            return RouteError(404, "not_served", f"this route is not served: {instead}")
        what = {404: "there is no such route", 405: "this route does not answer to this method"}
        message = what.get(error.status_code, error.detail)
        code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        return RouteError(error.status_code, code, message, dict(error.headers or {}))
    if isinstance(error, asyncio.CancelledError):  # by the server, which stops
        return ServiceError(Code.UNAVAILABLE, "the server is shutting down; retry with another replica")
    return fault(error)


def _instead_of(path: str) -> str | None:
    """What to do where OpenAI has a route and we have none."""
    return next((words for route, words in UNSERVED.items() if path == route or path.startswith(route + "/")), None)
