"""ServiceError to gRPC status."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from service.errors import Code, ServiceError
from service.grpc.interceptors import Guard
from service.grpc.status import STATUS_CODES, abort, metadata_value


async def answer(error: ServiceError, *, trailing: tuple[tuple[str, str], ...] = ()) -> grpc.aio.AioRpcError:
    """How a client sees the error."""

    async def fail(request: bytes, context: Any) -> bytes:
        if trailing:
            context.set_trailing_metadata(trailing)
        await abort(context, error)

    handler = grpc.method_handlers_generic_handler("s", {"m": grpc.unary_unary_rpc_method_handler(fail)})
    server = grpc.aio.server(handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary("/s/m")(b"")
            return caught.value
    finally:
        await server.stop(None)


@pytest.mark.parametrize("code", Code)
async def test_every_code_keeps_its_name(code: Code) -> None:
    assert STATUS_CODES[code].name == code.name
    seen = await answer(ServiceError(code, "so it is"))
    assert (seen.code(), seen.details()) == (grpc.StatusCode[code.name], "so it is")


async def test_a_retry_hint_travels_beside_other_trailing_metadata() -> None:
    full = ServiceError(Code.RESOURCE_EXHAUSTED, "full", retry_after_ms=40)
    seen = await answer(full, trailing=(("x-request-id", "7"),))
    assert dict(seen.trailing_metadata()) == {
        "x-request-id": "7",
        "retry-after-ms": "40",
        "grpc-retry-pushback-ms": "40",
    }
    assert not dict((await answer(ServiceError(Code.RESOURCE_EXHAUSTED, "full"))).trailing_metadata())


def test_metadata_is_found_by_name() -> None:
    class Context:
        def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
            return (("a-bin", b"x"), ("b", "y"))

    context: Any = Context()
    assert [metadata_value(context, key) for key in ("a-bin", "b", "c")] == [None, "y", None]


async def test_nobody_is_told_where_the_client_has_gone(caplog: pytest.LogCaptureFixture) -> None:
    """As gRPC has it where a client goes away while its RPC is aborted, or is written to."""

    class Context:
        async def gone(self, *args: object) -> None:
            raise grpc.aio.InternalError("Failed execute_batch")

        abort = write = gone

        def trailing_metadata(self) -> tuple[()]:
            return ()

    async def refuse(request: bytes, context: Any) -> None:
        await abort(context, ServiceError(Code.NOT_FOUND, "no"))

    async def write(request: bytes, context: Any) -> None:
        await context.write(b"")

    async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield b""
        await abort(context, ServiceError(Code.UNAVAILABLE, "no more"))

    async def fault(request: bytes, context: Any) -> None:
        raise ValueError("of ours")

    for make, behaviour in (
        (grpc.unary_unary_rpc_method_handler, refuse),
        (grpc.unary_stream_rpc_method_handler, write),
        (grpc.unary_stream_rpc_method_handler, stream),
    ):
        with pytest.raises(asyncio.CancelledError):
            await answered(make(behaviour), Context())
    assert not caplog.records
    with pytest.raises(asyncio.CancelledError):
        await answered(grpc.unary_unary_rpc_method_handler(fault), Context())
    assert [record.message for record in caplog.records] == ["an RPC failed"]


async def answered(handler: Any, context: object) -> None:
    """The handler behind the Guard, called as gRPC does."""

    async def find(details: object) -> Any:
        return handler

    details: Any = None
    guarded: Any = await Guard().intercept_service(find, details)
    if guarded.response_streaming:
        async for _ in guarded.unary_stream(b"", context):
            pass
    else:
        await guarded.unary_unary(b"", context)
