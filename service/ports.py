"""The ports of one server, gRPC and HTTP, which open and close together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.routing import BaseRoute

from service.grpc.server import GrpcServer
from service.host import Host
from service.http.server import HttpServer
from service.security.access import EVERYBODY, Access
from service.security.limits import MAX_REQUEST_BYTES
from service.security.tls import Tls
from service.telemetry.telemetry import Telemetry


class Ports:
    """Start and stop of both. Belongs to one event loop.

    Args:
        http_address: None = no HTTP.
        routes: what else the HTTP port serves.
        access: who may call what.
        tls: certificates of both; None = they are in plain text.
        max_request_bytes: of one request, on either.
        max_connection_age: seconds after which a client is told to make a new connection, on either; 0 = never.
        telemetry: is told of every request.

    Attributes:
        grpc_address, http_address: HOST:PORT as bound, once they are.
    """

    def __init__(
        self,
        host: Host,
        grpc_address: str,
        http_address: str | None = None,
        *,
        routes: Sequence[BaseRoute] = (),
        access: Access = EVERYBODY,
        tls: Tls | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        max_connection_age: float = 0.0,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.grpc_address = grpc_address
        self.http_address = http_address
        both: Any = {
            "access": access,
            "tls": tls,
            "max_request_bytes": max_request_bytes,
            "max_connection_age": max_connection_age,
            "telemetry": telemetry,
        }
        self._grpc = GrpcServer(host, **both)
        self._http = None if http_address is None else HttpServer(host, routes=routes, **both)

    async def start(self) -> None:
        """Listen on both, or on none.

        Raises:
            OSError: an address cannot be bound.
        """
        self.grpc_address = _bound(self.grpc_address, await self._grpc.start(self.grpc_address))
        if self._http is not None and self.http_address is not None:
            try:
                self.http_address = _bound(self.http_address, await self._http.start(self.http_address))
            except OSError:
                await self._grpc.stop(0)
                raise

    def refuse(self) -> None:
        """Close both to new connections, and tell those that are open to go elsewhere; what runs goes on."""
        self._grpc.refuse()
        if self._http is not None:
            self._http.refuse()

    async def stop(self, grace: float) -> None:
        """Refuse new requests at once, let running ones end for `grace` seconds, then cancel them."""
        stopping = [self._grpc.stop(grace)]
        if self._http is not None:
            stopping.append(self._http.stop(grace))
        await asyncio.gather(*stopping)


def _bound(address: str, port: int) -> str:
    return f"{address.rpartition(':')[0]}:{port}"
