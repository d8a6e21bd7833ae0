"""The server's HTTP port: the routes that it has, connections that grow old, callers by their certificates."""

from __future__ import annotations

import asyncio
import functools
import math
import random
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.routing import BaseRoute
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import RequestResponseCycle

from process.http_port import Connection, HttpPort
from service.host import Host
from service.http.app import create_app
from service.http.auth import CERTIFICATE, name_in_certificate
from service.http.errors import RouteError, body_of
from service.security.access import EVERYBODY, Access
from service.security.limits import MAX_HEADER_BYTES, MAX_REQUEST_BYTES
from service.security.tls import Tls
from service.telemetry.telemetry import Telemetry

AGE_SPREAD = 0.1


class HttpServer(HttpPort):
    """The port of a host.

    Args:
        routes, access, max_request_bytes, telemetry: see `create_app`.
        tls: the port's certificates; without, it is in plain text.
        max_connection_age: seconds, give or take a tenth, after which a connection ends with its next answer. 0: never.
    """

    def __init__(
        self,
        host: Host,
        *,
        routes: Sequence[BaseRoute] = (),
        access: Access = EVERYBODY,
        tls: Tls | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        max_connection_age: float = 0.0,
        telemetry: Telemetry | None = None,
    ) -> None:
        app = create_app(host, routes=routes, access=access, max_request_bytes=max_request_bytes, telemetry=telemetry)
        super().__init__(
            app,
            max_head_bytes=MAX_HEADER_BYTES,
            connection=functools.partial(_Connection, max_age=max_connection_age),
            tls=None if tls is None else tls.context,
        )


class _Connection(Connection):
    """One that ends when it is old, and says who is at its other end."""

    def __init__(self, *args: Any, max_age: float, **options: Any) -> None:
        super().__init__(*args, **options)
        spread = 1 + random.uniform(-AGE_SPREAD, AGE_SPREAD)  # those that came together do not come again together
        self._old_at = self.loop.time() + max_age * spread if max_age else math.inf

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if (encrypted := transport.get_extra_info("ssl_object")) is not None:
            self.app_state = self.app_state | {CERTIFICATE: name_in_certificate(encrypted)}

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.waits() and self.loop.time() >= self._old_at:
            self._let_go(self.cycle)

    def _let_go(self, cycle: RequestResponseCycle) -> None:
        """The answer says that it is the last one: as if the client had asked for that."""
        cycle.keep_alive = False
        if CLOSE_HEADER not in cycle.scope["headers"]:
            cycle.scope["headers"] = [*cycle.scope["headers"], CLOSE_HEADER]

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered like every other mistake."""
        body = msgspec.json.encode(body_of(RouteError(400, "bad_request", "this is not a valid HTTP request")))
        head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body))
        self.transport.close()
