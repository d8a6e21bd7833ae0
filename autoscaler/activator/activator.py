"""The activator: one room, and the two ports through which requests come into it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from autoscaler.activator.grpc_proxy import GrpcProxy
from autoscaler.activator.hold import Room
from autoscaler.activator.http_proxy import HttpProxy
from autoscaler.activator.settings import ActivatorSettings


@dataclass(frozen=True, slots=True)
class Addresses:
    """Ports that it listens on."""

    grpc_port: int
    http_port: int


class Activator:
    """Belongs to one event loop.

    Attributes:
        room: what the controller speaks with: `wake`, `serve`, `progress`, and the figures.
    """

    def __init__(self, settings: ActivatorSettings | None = None) -> None:
        self._settings = settings or ActivatorSettings()
        self.room = Room(self._settings.limits)
        self._grpc = GrpcProxy(self.room, self._settings.tls)
        self._http = HttpProxy(self.room, self._settings.tls)

    async def start(self) -> Addresses:
        """Listen on both ports.

        Raises:
            OSError: an address cannot be bound; nothing listens then.
        """
        grpc_port = await self._grpc.start(self._settings.grpc_address)
        try:
            http_port = await self._http.start(self._settings.http_address)
        except OSError:
            await self._grpc.stop(0)
            raise
        return Addresses(grpc_port, http_port)

    async def stop(self, grace: float) -> None:
        """What waits ends at once with UNAVAILABLE or 503, so that its clients ask whoever leads next; what replicas
        answer goes on for `grace` seconds."""
        self.room.close()
        await asyncio.gather(self._grpc.stop(grace), self._http.stop(grace))
