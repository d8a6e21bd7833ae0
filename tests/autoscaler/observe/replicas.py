"""Servers that say what a test tells them to, each at an address of its own as pods have, and their pods."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from nemoserve.v1 import generation_pb2 as pb

from autoscaler.cluster.objects import Pod
from autoscaler.fleet import Phase
from autoscaler.observe import Observer, Secrets
from autoscaler.settings import Settings

GET_LOAD = "/nemoserve.v1.GenerationService/GetLoad"

VLLM = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
"""


@dataclass(frozen=True, slots=True)
class Spec:
    """As of a resource."""

    grpc_port: int
    metrics_port: int
    settings: Settings = field(default_factory=Settings)


@dataclass
class FakeReplica:
    """Attributes:
    load: what it answers.
    code: it refuses with.
    hangs: it does not answer at all.
    raw: bytes that it answers in place of a message.
    asked: metadata of the calls it got; `reached` is set with the first.
    """

    ip: str
    load: pb.Load = field(default_factory=lambda: pb.Load(phase=pb.PHASE_READY))
    code: grpc.StatusCode | None = None
    hangs: bool = False
    raw: bytes | None = None
    asked: list[dict[str, str]] = field(default_factory=list)
    reached: asyncio.Event = field(default_factory=asyncio.Event)

    async def GetLoad(self, request: Any, context: Any) -> bytes:
        self.asked.append(dict(context.invocation_metadata()))
        self.reached.set()
        if self.hangs:
            await asyncio.Event().wait()
        if self.code is not None:
            await context.abort(self.code, "as the test wants it")
        return pb.GetLoadResponse(load=self.load).SerializeToString() if self.raw is None else self.raw

    async def serve(self, port: int, credentials: grpc.ServerCredentials | None = None) -> grpc.aio.Server:
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        handler: Any = grpc.unary_unary_rpc_method_handler(self.GetLoad, pb.GetLoadRequest.FromString)
        service, _, method = GET_LOAD[1:].partition("/")
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
        address = f"{self.ip}:{port}"
        if credentials is None:
            server.add_insecure_port(address)
        else:
            server.add_secure_port(address, credentials)
        await server.start()
        return server


def free_port() -> int:
    """That nobody has at any address of this machine."""
    with socket.create_server(("0.0.0.0", 0)) as free:
        port: int = free.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class Fleet:
    replicas: tuple[FakeReplica, ...]
    spec: Spec

    @property
    def pods(self) -> list[Pod]:
        return [pod(f"pod-{number}", ip=each.ip) for number, each in enumerate(self.replicas)]


@asynccontextmanager
async def fleet(count: int, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[Fleet]:
    replicas = tuple(FakeReplica(f"127.0.{1 + number // 250}.{1 + number % 250}") for number in range(count))
    port = free_port()
    servers = [await each.serve(port, credentials) for each in replicas]
    try:
        yield Fleet(replicas, Spec(port, free_port()))
    finally:
        for server in servers:
            await server.stop(0)


def pod(name: str, phase: Phase = Phase.READY, *, ip: str | None = None, **facts: Any) -> Pod:
    given: dict[str, Any] = {
        "uid": f"uid of {name}",
        "resource_version": "1",
        "holds_place": True,
        "created_at": 1000.0,
    }
    return Pod(name=name, phase=phase, ip=ip, **given | facts)


def patient(secrets: Secrets | None = None) -> Observer:
    """For tests that are not about limits."""
    return Observer(secrets, seconds=20.0, look_seconds=40.0)


class Web:
    """An HTTP server that says one thing to everybody.

    Attributes:
        head, body: of the answer; the body again and again if it is `endless`.
        requests: heads of the requests.
    """

    def __init__(self, body: str | bytes = b"", head: str = "200 OK\r\ncontent-type: text/plain") -> None:
        self.head = head
        self.body = body.encode() if isinstance(body, str) else body
        self.endless = False
        self.requests: list[str] = []

    @asynccontextmanager
    async def at(self, ip: str, port: int, **options: Any) -> AsyncIterator[Web]:
        server = await asyncio.start_server(self._answer, ip, port, **options)
        try:
            yield self
        finally:
            server.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
            writer.write(f"HTTP/1.1 {self.head}\r\nconnection: close\r\n\r\n".encode() + self.body)
            while self.endless:
                writer.write(self.body)
                await writer.drain()
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def names(replicas: Sequence[Any]) -> list[str]:
    return [each.name for each in replicas]
