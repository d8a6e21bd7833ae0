"""Tells telemetry of every RPC, whichever interceptor or servicer answers it: goes first, so that it sees those that
are refused, and makes the RPC the CALL of all that happens in it. Methods that there are not have no name here: who
has no key is refused whatever he calls."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any

import grpc

from service.grpc.interceptors import with_behaviour
from service.security.access import RPCS
from service.telemetry import orca
from service.telemetry.calls import CALL, Call
from service.telemetry.metrics import OTHER
from service.telemetry.telemetry import Telemetry

QUIET = (
    *("/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/"),
    *("/nemoserve.v1.GenerationService/GetLoad", "/nemoserve.v1.GenerationService/WatchLoad"),
    *("/inference.GRPCInferenceService/ServerLive", "/inference.GRPCInferenceService/ServerReady"),
    "/inference.GRPCInferenceService/ModelReady",
)
"""Beginnings of methods that probers and scrapers call every few seconds."""
REPORTING = (
    "/nemoserve.v1.GenerationService/Generate",
    "/inference.GRPCInferenceService/ModelInfer",
    "/inference.GRPCInferenceService/ModelStreamInfer",
)
"""Methods whose trailing metadata brings a load report: those that a balancer has to share out. It comes unasked, as
gRFC A51 has no way to ask, and costs a hundred bytes an RPC."""

CODES: Mapping[int | None, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class Observe(grpc.aio.ServerInterceptor):
    """See the module. gRPC runs interceptors and handler in one task, so that CALL is set for all of them."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:  # gRPC answers by itself, and shows nobody how it ends
            self._telemetry.metrics.calls["grpc", OTHER, "unimplemented"] += 1
            return None
        method = handler_call_details.method
        stream, unary = partial(self._stream, method), partial(self._unary, method)
        return with_behaviour(handler, stream, unary, handler.request_deserializer)

    def _begin(self, method: str, context: Any) -> Call:
        headers = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
        name, peer = method.removeprefix("/") if method in RPCS else OTHER, context.peer()
        call = self._telemetry.open(
            "grpc",
            lambda: name,
            peer=peer,
            headers=headers,
            span=name,
            attributes=lambda: {"rpc.system.name": "grpc", "rpc.method": name, "network.peer.address": peer},
        )
        CALL.set(call)
        return call

    def _end(self, method: str, call: Call, context: Any, ended: BaseException | None) -> None:
        """The handler is done, or `ended` ends it."""
        code = _code(context, ended)
        if method in REPORTING and ended is None:
            kept = tuple(context.trailing_metadata() or ())
            context.set_trailing_metadata((*kept, (orca.TRAILER, orca.encode(self._telemetry.stats))))
        self._telemetry.close(
            call,
            code.name.lower(),
            lambda: {"rpc.response.status_code": code.name},
            quiet=method.startswith(QUIET),
        )

    def _unary(self, method: str, behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Any:
        async def observed(request: Any, context: Any) -> Any:
            with self._watch(method, context):
                return await behaviour(request, context)

        return observed

    def _stream(self, method: str, behaviour: Callable[[Any, Any], Any]) -> Any:
        async def observed(request: Any, context: Any) -> AsyncIterator[Any]:
            with self._watch(method, context):
                responses = behaviour(request, context)
                if inspect.isawaitable(responses):  # writes through the context instead of yielding
                    await responses
                    return
                async with aclosing(responses):
                    async for response in responses:
                        yield response

        return observed

    @contextmanager
    def _watch(self, method: str, context: Any) -> Iterator[None]:
        call = self._begin(method, context)
        try:
            yield
        except BaseException as ended:
            self._end(method, call, context, ended)
            raise
        else:
            self._end(method, call, context, None)


def _code(context: Any, ended: BaseException | None) -> grpc.StatusCode:
    """How the RPC ends. A context has the code as a number, and none where nobody set one."""
    if isinstance(ended, asyncio.CancelledError | GeneratorExit):
        left = context.time_remaining()
        late = left is not None and left <= 0
        return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return CODES.get(code, grpc.StatusCode.OK) if ended is None or code else grpc.StatusCode.UNKNOWN
