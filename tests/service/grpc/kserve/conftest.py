"""A real gRPC server on a loopback port with the servicer under test, and clients for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from service.grpc.interceptors import Guard
from service.grpc.kserve import KServeServicer, llm_models
from tests.service.fakes import FakeHost

UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass
class Running:
    """A server, its address for clients in threads, and a stub in this event loop."""

    address: str
    stub: Any


@asynccontextmanager
async def serving(models: Sequence[Any], **options: Any) -> AsyncIterator[Running]:
    server = grpc.aio.server(interceptors=[Guard()], options=UNLIMITED)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(KServeServicer(models, **options), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address, options=UNLIMITED) as channel:
            yield Running(address, service_pb2_grpc.GRPCInferenceServiceStub(channel))
    finally:
        await server.stop(None)


@pytest.fixture
def serve() -> Callable[..., Any]:
    return serving


@pytest.fixture
async def host() -> FakeHost:
    return FakeHost()


@pytest.fixture
async def llm(host: FakeHost) -> AsyncIterator[Running]:
    """Both views of the fake host."""
    async with serving(llm_models(host)) as running:
        yield running
