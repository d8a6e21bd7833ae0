"""ServiceError to gRPC status, once for every gRPC adapter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc

from service.errors import Code, ServiceError

MAX_DETAILS_BYTES = 2048  # escaped it may be three times as long, and clients take headers of 8 KiB in all
Context = grpc.aio.ServicerContext[Any, Any]

STATUS_CODES = {
    Code.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Code.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Code.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Code.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Code.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Code.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Code.UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
    Code.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
}


def trailing_metadata(error: ServiceError) -> tuple[tuple[str, str], ...]:
    """When a retry makes sense, if one does: once for people's code, and once for gRPC's own retries (gRFC A6), which
    wait for exactly so long where a client's retryPolicy names the status."""
    if error.retry_after_ms is None:
        return ()
    hint = str(error.retry_after_ms)
    return ("retry-after-ms", hint), ("grpc-retry-pushback-ms", hint)


def deadline_of(context: Context) -> float | None:
    """The client's deadline on the clock of time.monotonic(); None without one."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining


def metadata_value(context: Context, key: str) -> str | None:
    """The text that the client sent under `key`, None without one."""
    for name, value in context.invocation_metadata() or ():
        if name == key and isinstance(value, str):
            return value
    return None


def shortened(message: str) -> str:
    """The message as it fits into a header, valid UTF-8: errors may quote what a client sent, whatever its size."""
    data = message.encode("utf-8", "replace")
    return data[:MAX_DETAILS_BYTES].decode("utf-8", "ignore") + ("…" if len(data) > MAX_DETAILS_BYTES else "")


async def abort(context: Context, error: ServiceError) -> NoReturn:
    """End the RPC with the error's status, message and retry hint; trailing metadata set before stay."""
    kept = tuple(context.trailing_metadata() or ())
    with client_may_be_gone():
        await context.abort(STATUS_CODES[error.code], shortened(error.message), (*kept, *trailing_metadata(error)))
    raise AssertionError("abort always raises")  # its type does not say so


@contextmanager
def client_may_be_gone() -> Iterator[None]:
    """What cannot be sent is no fault: the client has gone away, and the RPC's task is about to be cancelled."""
    try:
        yield
    except grpc.aio.InternalError:
        raise asyncio.CancelledError("the client has gone") from None
