"""An HTTP port: uvicorn with its h11 parser, which bounds heads, in the event loop of the process.

Whatever is waited for has a time limit: the head of a request, and that an answer is read.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 75  # longer than load balancers keep theirs (60 s), so that none sends into a connection that we close
HEAD_SECONDS = 15.0  # for the head of a request to arrive, from its first byte on or from the start of the connection
STALL_SECONDS = 60.0  # for a reader to take what is sent: at less than 1 KB/s nobody reads any more
TICK_SECONDS = 1.0  # what the Date header can tell
BACKLOG = 2048  # connections that the kernel holds while the loop is busy


class HttpPort:
    """Start and stop of one port. Belongs to one event loop.

    Args:
        max_head_bytes: of a request.
        connection: what makes a `Connection`.
        tls: context of the port's certificates; without, it is in plain text.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_head_bytes: int,
        connection: Callable[..., Connection] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = uvicorn.Config(
            app,
            interface="asgi3",
            http=cast("type[asyncio.Protocol]", connection or Connection),
            ws="none",
            lifespan="off",
            log_config=None,
            log_level=logging.CRITICAL,  # whatever a client can cause is no line in our log
            access_log=False,
            proxy_headers=False,  # nobody is trusted to say who the client is
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            h11_max_incomplete_event_size=max_head_bytes,
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )
        self._server = _Uvicorn(self._config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self, address: str) -> int:
        """Listen on HOST:PORT, port 0 for any free one. Returns the port.

        Raises:
            OSError: the address cannot be bound.
        """
        listener = _listen(address)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http-port")
        await self._server.listening.wait()
        port: int = listener.getsockname()[1]
        return port

    def refuse(self) -> None:
        """Close the port to new connections; those that are open end with the answer that they wait for."""
        for listener in self._server.servers:
            listener.close()
        for connection in list(self._server.server_state.connections):
            connection.shutdown()

    async def stop(self, grace: float) -> None:
        """Refuse new connections at once, let running requests end for `grace` seconds, then cancel them."""
        if self._serving is None:
            return
        self._config.timeout_graceful_shutdown = grace  # type: ignore[assignment]  # asyncio takes it as it is
        self._server.leave()
        await self._serving
        tasks = self._server.server_state.tasks
        if tasks:  # they have been cancelled, and say so to their clients
            await asyncio.wait(tasks)


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()
        self._left = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    def leave(self) -> None:
        self.should_exit = True
        self._left.set()

    async def main_loop(self) -> None:
        """Renews the Date header each second. uvicorn's own wakes up ten times as often to see whether it shall end."""
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), TICK_SECONDS)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the server's owner."""
        yield


class Connection(H11Protocol):
    """A connection that ends when what is to come does not come, or what is sent is not taken."""

    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client is not None:  # IPv4 on a port of both, as sockets tell it
            self.client = (self.client[0].removeprefix("::ffff:"), self.client[1])
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.waits():  # the beginning of another request
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        elif self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The buffer is full."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has been read, or the connection is gone."""
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
        super().resume_writing()

    def waits(self) -> bool:
        """No request is being served."""
        return self.cycle is None or self.cycle.response_complete

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.waits():
            self.transport.close()


def _listen(address: str) -> socket.socket:
    """A bound socket; the kernel queues connections from now on.

    0.0.0.0 and :: are all addresses of this machine, IPv4 and IPv6 alike, as they are to gRPC: whoever listens on both
    ports listens on the same addresses, and clusters of either kind are served without a setting.

    Raises:
        OSError: one line that says what is wrong.
    """
    name, _, port = address.rpartition(":")
    name = name.removeprefix("[").removesuffix("]")
    everywhere = name in ("0.0.0.0", "::")
    if everywhere:
        name = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            name, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not REUSEPORT: one server per port
            if everywhere and family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(where)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except OSError:
        raise OSError(f"cannot listen on {address} for HTTP: it is in use or not of this machine") from None
    return listener
