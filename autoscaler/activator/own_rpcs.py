"""RPCs that no replica is woken for: health, and load.

health     what a client's channel asks for before it sends ("" and names of services): SERVING, since requests are
           taken, whoever answers them. `nemoserve.live`: SERVING. `nemoserve.ready`, whether an answer could begin
           now: only while there is a replica. KServe's three questions likewise.
GetLoad    the load of nobody: what waits, and how far the first replica is. As soon as there is one, it answers.

Streams of both stay open for as long as clients want. There may be as many as requests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2
from nemoserve.v1 import generation_pb2 as pb

from autoscaler.activator.hold import Room

HEALTH = "grpc.health.v1.Health"
KSERVE = "inference.GRPCInferenceService"
TYPED = "nemoserve.v1.GenerationService"
LIVE, READY = "nemoserve.live", "nemoserve.ready"
SERVICES = ("", LIVE, READY, TYPED, KSERVE)
INTERVAL_SECONDS = (0.1, 60.0)  # of WatchLoad, as servers take it
CHECK_SECONDS = 60.0  # how long a watch waits for news at most before it looks by itself
TRUE, FALSE = b"\x08\x01", b""  # of KServe's messages, whose one field is a boolean: its stubs are not ours to have
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # a type for mypy alone


@dataclass(frozen=True, slots=True)
class OwnRpc:
    """Attributes:
    always: also while there are replicas.
    """

    handler: Handler
    always: bool = False


def own_rpcs(room: Room) -> Mapping[str, OwnRpc]:
    """By the path of their method."""
    own = _Own(room)
    typed: Mapping[str, Handler] = {
        "GetLoad": grpc.unary_unary_rpc_method_handler(
            own.get_load,
            request_deserializer=pb.GetLoadRequest.FromString,
            response_serializer=pb.GetLoadResponse.SerializeToString,
        ),
        "WatchLoad": grpc.unary_stream_rpc_method_handler(
            own.watch_load,
            request_deserializer=pb.WatchLoadRequest.FromString,
            response_serializer=pb.WatchLoadResponse.SerializeToString,
        ),
    }
    health: Mapping[str, Handler] = {
        "Check": grpc.unary_unary_rpc_method_handler(
            own.check,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        ),
        "Watch": grpc.unary_stream_rpc_method_handler(
            own.watch,
            request_deserializer=health_pb2.HealthCheckRequest.FromString,
            response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
        ),
    }
    kserve = {"ServerLive": TRUE, "ServerReady": FALSE, "ModelReady": FALSE}
    return (
        {f"/{TYPED}/{name}": OwnRpc(handler) for name, handler in typed.items()}
        | {f"/{HEALTH}/{name}": OwnRpc(handler, always=True) for name, handler in health.items()}
        | {f"/{KSERVE}/{name}": OwnRpc(_constant(answer)) for name, answer in kserve.items()}
    )


def _constant(answer: bytes) -> Handler:
    async def say(request: bytes, context: Context) -> bytes:
        return answer

    return grpc.unary_unary_rpc_method_handler(say)


class _Own:
    def __init__(self, room: Room) -> None:
        self._room = room
        self._watches = 0

    @asynccontextmanager
    async def _watched(self, context: Context) -> AsyncIterator[None]:
        """Around a stream."""
        if self._watches >= (most := self._room.limits.max_requests):
            message = f"{self._watches} watches are open, and there is no place for more than {most}; retry later"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._watches += 1
        try:
            yield
        finally:
            self._watches -= 1

    async def check(self, request: Any, context: Context) -> Any:
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"{request.service!r} is no service here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def watch(self, request: Any, context: Context) -> AsyncIterator[Any]:
        last = None
        async with self._watched(context):
            while True:
                seen = self._room.changes
                if (status := self._status(request.service)) != last:
                    last = status
                    yield health_pb2.HealthCheckResponse(status=status)
                if self._room.closed:
                    return
                await self._room.changed(seen, CHECK_SECONDS)

    def _status(self, service: str) -> Any:
        kinds = health_pb2.HealthCheckResponse
        if service not in SERVICES:
            return kinds.SERVICE_UNKNOWN
        serves = not self._room.closed and (service != READY or bool(self._room.replicas))
        return kinds.SERVING if serves or service == LIVE else kinds.NOT_SERVING

    async def get_load(self, request: Any, context: Context) -> pb.GetLoadResponse:
        return pb.GetLoadResponse(load=self._load())

    async def watch_load(self, request: pb.WatchLoadRequest, context: Context) -> AsyncIterator[pb.WatchLoadResponse]:
        low, high = INTERVAL_SECONDS
        interval = request.interval_seconds or 1.0
        if not low <= interval <= high:
            message = f"interval_seconds: {interval} must be between {low:g} and {high:g}, or 0"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
        async with self._watched(context):
            while not self._room.replicas and not self._room.closed:
                seen = self._room.changes
                yield pb.WatchLoadResponse(load=self._load())
                await self._room.changed(seen, interval)
        await context.abort(grpc.StatusCode.UNAVAILABLE, "there are replicas now; watch one of them")

    def _load(self) -> pb.Load:
        room, loading = self._room, self._room.loading
        nobody = "no replica; asked for one" if room.held_requests else "no replica; the next request asks for one"
        return pb.Load(
            phase=pb.PHASE_LOADING,
            eta_seconds=loading.left(room.now()) or 0.0,
            queued_requests=room.held_requests,
            oldest_queued_seconds=room.oldest_held_seconds,
            detail=loading.text or nobody,
        )
