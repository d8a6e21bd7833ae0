"""NIM's management routes: `service.management` over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import yaml
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from service import management
from service.host import Host
from service.management import Health, Package


def management_routes(host: Host, package: Callable[[], Package], repository_override: str = "") -> list[Route]:
    """For `service.http.app.create_app`; GET (and HEAD) only.

    Args:
        package: of the model that is served now; looks at its files, so it is called in a thread.
        repository_override: see `service.management.metadata`.
    """

    async def metadata(request: Request) -> Response:
        found = await asyncio.to_thread(package)
        return _json(management.metadata(host, found, repository_override))

    async def manifest(request: Request) -> Response:
        found = management.manifest(await asyncio.to_thread(package), management.info_of(host))
        if "json" in request.headers.get("accept", ""):
            return _json(found)
        return Response(yaml.safe_dump(found, sort_keys=False, width=120), media_type="application/yaml")

    async def version(request: Request) -> Response:
        return _json(management.version())

    async def licence(request: Request) -> Response:
        return _json(management.licence(await asyncio.to_thread(package)))

    def health(check: Callable[[Host], Health]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            found = check(host)
            return _json(found.body, 200 if found.ok else 503)

        return answer

    return [
        Route("/v1/health/live", health(management.live)),
        Route("/v1/health/ready", health(management.ready)),
        Route("/v1/metadata", metadata),
        Route("/v1/manifest", manifest),
        Route("/v1/version", version),
        Route("/v1/license", licence),
    ]


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
