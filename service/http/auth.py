"""Lets requests in: who calls is found out from headers and client certificate, and stands in CALLER from there on.

What a route needs is asked of the route itself, found as the router finds it: whatever spelling of a path a router
takes for a route, there is no other that gets past this door. Who is refused here has asked for that route as well:
metrics and log name it.
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Any

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service.caller import CALLER
from service.security.access import Access, Level
from service.security.tls import certificate_name

CERTIFICATE = "client_certificate"
"""Where `scope["state"]` has the name in the client's certificate, if the connection has shown one."""


class Authenticate:
    """Goes right around the router of these routes; each request must have a task of its own.

    Raises:
        ServiceError: UNAUTHENTICATED or PERMISSION_DENIED, before anything is read.
    """

    def __init__(self, app: ASGIApp, access: Access, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._access = access
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        level = self._level(scope)
        self._access.check_origin(next((value for name, value in headers if name == "origin"), None))
        certificate: str | None = scope.get("state", {}).get(CERTIFICATE)
        CALLER.set(self._access.admit(level, headers, lambda: certificate))
        await self._app(scope, receive, send)

    def _level(self, scope: Scope) -> Level:
        """Of the route that answers; if there is none, who has no key need not know that."""
        for route in self._routes:
            if route.matches(scope)[0] is Match.FULL:
                scope["route"] = route
                method = "GET" if scope["method"] == "HEAD" else scope["method"]
                return self._access.level_of_route(f"{method} {getattr(route, 'path', '')}")
        return Level.TENANT


def name_in_certificate(connection: ssl.SSLObject) -> str | None:
    """Who the client's certificate is of, if it was asked for one and has shown it."""
    found: dict[str, Any] = connection.getpeercert() or {}
    common = [value for part in found.get("subject", ()) for key, value in part if key == "commonName"]
    others = [value for _, value in found.get("subjectAltName", ()) if isinstance(value, str)]
    return certificate_name(common, others)
