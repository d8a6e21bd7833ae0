"""What every RPC gets, whichever servicer answers it.

- A message that is no valid protobuf is INVALID_ARGUMENT; gRPC alone says UNKNOWN and shows Python's exception.
- Whatever a handler raises by mistake is INTERNAL with an id, which stands beside the traceback in the log.
"""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from service.errors import Code, ServiceError
from service.grpc.status import abort, client_may_be_gone

log = logging.getLogger(__name__)


class Malformed:
    """Stands in for a request that could not be parsed, until the handler's turn comes to say so."""


class Guard(grpc.aio.ServerInterceptor):
    """See the module."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None  # no such method: gRPC answers UNIMPLEMENTED
        parse = handler.request_deserializer
        return with_behaviour(handler, _guard_stream, _guard_unary, parse and _tolerant(parse))


def with_behaviour(
    handler: Any,
    stream: Callable[[Any], Any],
    unary: Callable[[Any], Any],
    parse: Callable[[bytes], Any] | None,
) -> grpc.RpcMethodHandler[Any, Any]:
    """The handler with its behaviour wrapped by `stream` or `unary`, whichever its responses are, and its requests
    parsed by `parse`."""
    kinds = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }
    name, make = kinds[handler.request_streaming, handler.response_streaming]
    wrap = stream if handler.response_streaming else unary
    return make(wrap(getattr(handler, name)), parse, handler.response_serializer)


def _tolerant(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse_or_mark(data: bytes) -> Any:
        try:
            return parse(data)
        except (DecodeError, ValueError):
            return Malformed()

    return parse_or_mark


def _guard_unary(behaviour: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            with client_may_be_gone():
                return await behaviour(await _checked(request, context), context)
        except grpc.aio.AbortError:
            raise
        except Exception:  # a fault of ours: the client learns an id, the log the rest
            await _internal(context)

    return guarded


def _guard_stream(behaviour: Callable[[Any, Any], Any]) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def guarded(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            responses = behaviour(await _checked(request, context), context)
            if inspect.isawaitable(responses):  # writes through the context instead of yielding
                with client_may_be_gone():
                    await responses
                return
            try:
                async for response in responses:
                    yield response
            finally:
                await responses.aclose()
        except grpc.aio.AbortError:
            raise
        except Exception:  # as above
            await _internal(context)

    return guarded


async def _checked(request: Any, context: Any) -> Any:
    """The request, or the stream of requests, without malformed ones: the first of those ends the RPC."""
    if isinstance(request, Malformed):
        await _refuse(context)
    return _checked_stream(request, context) if hasattr(request, "__aiter__") else request


async def _checked_stream(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
    async for request in requests:
        if isinstance(request, Malformed):
            await _refuse(context)
        yield request


async def _refuse(context: Any) -> NoReturn:
    message = "the request is not a valid protobuf message of this method"
    await abort(context, ServiceError(Code.INVALID_ARGUMENT, message))


async def _internal(context: Any) -> NoReturn:
    reference = secrets.token_hex(8)
    log.exception("an RPC failed", extra={"error_id": reference})
    await abort(context, ServiceError(Code.INTERNAL, f"internal error {reference}"))
