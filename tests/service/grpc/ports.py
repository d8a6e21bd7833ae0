"""The whole gRPC port over a fake engine, on loopback, and what tests ask of calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from nemoserve.v1 import generation_pb2_grpc as rpc

from service.grpc.server import GrpcServer
from service.host import Host
from service.served import ServedModel
from service.text.tokenizer import TextModel
from tests.service.fake_engine import FakeEngine, toy_text


def served(engine: FakeEngine, text: TextModel | None = None) -> ServedModel:
    """A model that is ready."""
    model = ServedModel("toy", ("short",))
    model.ready(engine, text or toy_text())
    return model


@dataclass
class Port:
    """A server on a loopback port and a channel to it."""

    address: str
    channel: grpc.aio.Channel

    @property
    def typed(self) -> Any:
        return rpc.GenerationServiceStub(self.channel)  # its stub class says that it is synchronous


@asynccontextmanager
async def serving(
    host: Host, options: list[tuple[str, Any]] | None = None, **server_options: Any
) -> AsyncIterator[Port]:
    """`options` are the channel's; `server_options` those of GrpcServer."""
    server = GrpcServer(host, **server_options)
    address = f"127.0.0.1:{await server.start('127.0.0.1:0')}"
    try:
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            yield Port(address, channel)
    finally:
        await server.stop(0)


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """The error that ends a call, unary or streamed."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (drained(call) if hasattr(call, "__aiter__") else call)
    return caught.value


async def drained(call: Any) -> list[Any]:
    """All responses of a call."""
    return [response async for response in call]
