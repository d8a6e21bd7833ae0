"""The gRPC port: both services, health, reflection, and the options that every connection gets."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, suppress

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from nemoserve.v1 import generation_pb2, generation_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from service.grpc.auth import Authenticate
from service.grpc.generation import GenerationServicer
from service.grpc.interceptors import Guard
from service.grpc.kserve import KServeServicer, LoraModels, llm_models
from service.grpc.observe import Observe
from service.host import Host, Phase
from service.security.access import EVERYBODY, Access
from service.security.limits import MAX_HEADER_BYTES, MAX_REQUEST_BYTES
from service.security.tls import Tls
from service.telemetry.telemetry import Telemetry

HANDSHAKE_SECONDS = 15  # a few round trips, of TLS and HTTP/2
FOREVER_SECONDS = 86400.0
HEALTH_SECONDS = 1.0  # how late health may notice that the engine's heart has stopped
OPTIONS = [
    ("grpc.max_send_message_length", -1),
    # Clients that ping every second are welcome; by default gRPC cuts them off after a few pings.
    ("grpc.http2.max_ping_strikes", 0),
    # A second server on the same port must fail to start, not take half of the connections.
    ("grpc.so_reuseport", 0),
    # By default refusal is a matter of chance between 8 and 16 KiB.
    ("grpc.max_metadata_size", MAX_HEADER_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_HEADER_BYTES),
    # Who connects and then says nothing is cut off; by default after two minutes.
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
]
SERVICES = (
    generation_pb2.DESCRIPTOR.services_by_name["GenerationService"].full_name,
    service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
LIVE, READY = "nemoserve.live", "nemoserve.ready"


class GrpcServer:
    """Start, stop, and the health of one port. Belongs to one event loop.

    Args:
        access: who may call what; everybody everything by default.
        tls: the port's certificates; without, it is in plain text.
        max_request_bytes: larger messages are refused with RESOURCE_EXHAUSTED before they are read.
        max_connection_age: seconds, give or take a tenth, after which a client is told to make a new connection; what
            runs on the old one ends there. 0 = never.
        telemetry: is told of every RPC.
    """

    def __init__(
        self,
        host: Host,
        *,
        access: Access = EVERYBODY,
        tls: Tls | None = None,
        max_request_bytes: int = MAX_REQUEST_BYTES,
        max_connection_age: float = 0.0,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._host = host
        self._tls = tls
        options = [*OPTIONS, ("grpc.max_receive_message_length", max_request_bytes)]
        if max_connection_age:
            options.append(("grpc.max_connection_age_ms", round(1000 * max_connection_age)))
        observed = [] if telemetry is None else [Observe(telemetry)]
        self._server = grpc.aio.server(interceptors=[*observed, Authenticate(access), Guard()], options=options)
        self._health = health.aio.HealthServicer()
        self._health_task: asyncio.Task[None] | None = None
        self._going_away: asyncio.Task[None] | None = None
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(GenerationServicer(host, telemetry), self._server)  # type: ignore[no-untyped-call,unused-ignore]
        loras = LoraModels(host, host.loras) if host.loras else None
        kserve = KServeServicer(llm_models(host), loras, host.control)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME], self._server)

    async def start(self, address: str) -> int:
        """Listen on HOST:PORT, port 0 for any free one. Returns the port.

        Raises:
            OSError: the address cannot be bound.
        """
        try:
            port: int
            if self._tls is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, self._tls.grpc_credentials())
        except RuntimeError:
            raise OSError(f"cannot listen on {address} for gRPC: it is in use or not of this machine") from None
        await self._report()
        await self._server.start()
        self._health_task = asyncio.create_task(self._watch(), name="grpc-health")
        return port

    def refuse(self) -> None:
        """Close the port to new connections, and tell those that are open to go away; running RPCs go on until `stop`.

        gRPC alone would wait for them, but an open Watch or an idle stream never ends.
        """
        self._going_away = asyncio.create_task(self._server.stop(FOREVER_SECONDS), name="grpc-goaway")

    async def stop(self, grace: float) -> None:
        """Refuse new RPCs at once, let running ones end for `grace` seconds, then cancel them."""
        await self._server.stop(grace)
        if self._going_away is not None:
            await self._going_away
        if self._health_task is not None:
            self._health_task.cancel()
            with suppress(asyncio.CancelledError):
                await self._health_task

    async def _watch(self) -> None:
        async with aclosing(self._host.watch(HEALTH_SECONDS)) as changes:
            async for _ in changes:
                await self._report()

    async def _report(self) -> None:
        """Serving means: a token could be made now. Live means: a restart would not help."""
        serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
        ready = self._host.status.phase is Phase.READY and self._host.alive
        for service in ("", READY, *SERVICES):
            await self._health.set(service, serving if ready else not_serving)
        await self._health.set(LIVE, serving if self._host.alive else not_serving)
