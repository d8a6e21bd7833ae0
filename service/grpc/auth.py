"""Lets RPCs in: who calls is found out from metadata and client certificate, and stands in CALLER while the RPC runs.

What is refused is refused before its request is read: who has no key cannot make the server hold his messages.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc

from service.caller import CALLER, Caller
from service.errors import ServiceError
from service.grpc.interceptors import with_behaviour
from service.grpc.status import abort
from service.security.access import Access
from service.security.tls import certificate_name

Admit = Callable[[Any], Caller]
"""From the RPC's context; raises ServiceError."""


class Authenticate(grpc.aio.ServerInterceptor):
    """See the module. Goes first: no other interceptor sees what may not be called.

    gRPC runs interceptors and handler in one task, so that CALLER is set for all of them.
    """

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        level = self._access.level_of_rpc(handler_call_details.method)
        metadata: Any = handler_call_details.invocation_metadata or ()
        headers = [(name, value) for name, value in metadata if isinstance(value, str)]

        def admit(context: Any) -> Caller:
            return self._access.admit(level, headers, lambda: _name_in_certificate(context))

        if self._access.client_certificates:  # which only the handler's context shows
            handler = await continuation(handler_call_details)
            return None if handler is None else _admitting(handler, admit)
        try:
            CALLER.set(admit(None))
        except ServiceError as error:
            return _refusing(error)
        return await continuation(handler_call_details)


def _refusing(error: ServiceError) -> grpc.RpcMethodHandler[Any, Any]:
    """Of any kind of method: a handler of streams runs before a request is read."""

    async def refuse(requests: Any, context: Any) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _admitting(handler: Any, admit: Admit) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler, after the caller was let in."""

    async def enter(context: Any) -> None:
        try:
            CALLER.set(admit(context))
        except ServiceError as error:
            await abort(context, error)

    def unary(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def admitted(request: Any, context: Any) -> Any:
            await enter(context)
            return await behaviour(request, context)

        return admitted

    def stream(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def admitted(request: Any, context: Any) -> AsyncIterator[Any]:
            await enter(context)
            async with aclosing(behaviour(request, context)) as responses:
                async for response in responses:
                    yield response

        return admitted

    return with_behaviour(handler, stream, unary, handler.request_deserializer)


def _name_in_certificate(context: Any) -> str | None:
    """Who the client's certificate is of. Names that are no ASCII are nobody's."""
    found = context.auth_context()
    common, others = (
        [value.decode("ascii", "replace") for value in found.get(key, ())]
        for key in ("x509_common_name", "x509_subject_alternative_name")
    )
    return certificate_name(common, others)
