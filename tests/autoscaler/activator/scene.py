"""A port of the activator on loopback, real servers that stand for replicas, and clients.

async with grpc_scene() as here:
    answer = asyncio.create_task(here.call(b"Hi"))        # held: there is no replica
    await here.held(1)
    async with here.replica() as replica:                 # answers each message with "name:message"
        assert await answer == [b"r0:Hi"]
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from autoscaler.activator import HoldLimits, Replica, Room
from autoscaler.activator.grpc_proxy import GrpcProxy
from autoscaler.activator.http_proxy import HttpProxy
from autoscaler.activator.http_server import port_for
from process.http_port import HttpPort

METHOD = "/some.Service/Method"
Rpc = Callable[["FakeReplica", Any], Awaitable[None]]
Route = Callable[["FakeReplica", Request], Awaitable[Response]]


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Let the other tasks go on until `condition` holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came to that"
        await asyncio.sleep(0.001)


async def echo(replica: FakeReplica, context: Any) -> None:
    """Answer each message, as soon as it is there."""
    while (message := await context.read()) is not grpc.aio.EOF:
        replica.messages.append(message)
        await context.write(f"{replica.name}:".encode() + message)


async def tell(replica: FakeReplica, request: Request) -> Response:
    """Answer with what came."""
    body = await request.body()
    return JSONResponse({"replica": replica.name, "path": request.url.path, "body": body.decode()})


@dataclass
class FakeReplica(grpc.GenericRpcHandler):
    """Attributes record what came; `rpc` and `route` are what it does with it."""

    name: str
    rpc: Rpc = echo
    route: Route = tell
    capacity: int = 0
    calls: list[str] = field(default_factory=list)  # methods of RPCs, and paths of requests
    metadata: list[dict[str, Any]] = field(default_factory=list)
    remaining: list[float | None] = field(default_factory=list)  # of the deadline of each RPC
    messages: list[bytes] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0
    most: int = 0  # that ran at once
    address: Replica = field(init=False)
    _grpc: grpc.aio.Server | None = None
    _http: HttpPort | None = None

    async def start(self, *, grpc_port: bool, http_port: bool) -> None:
        ports = [0, 0]
        if grpc_port:
            self._grpc = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
            self._grpc.add_generic_rpc_handlers((self,))
            ports[0] = self._grpc.add_insecure_port("127.0.0.1:0")
            await self._grpc.start()
        if http_port:
            self._http = port_for(self.app)
            ports[1] = await self._http.start("127.0.0.1:0")
        self.address = Replica(self.name, "127.0.0.1", *ports, self.capacity)

    async def stop(self) -> None:
        """At once, whatever runs: as a process that is killed."""
        if self._http is not None:
            for connection in list(self._http._server.server_state.connections):
                connection.transport.abort()
        for server in (self._grpc, self._http):
            if server is not None:
                await server.stop(0)

    def service(self, details: Any) -> Any:
        async def behave(_: Any, context: Any) -> None:
            self.calls.append(details.method)
            self.metadata.append(dict(context.invocation_metadata()))
            self.remaining.append(context.time_remaining())
            try:
                await self._run(self.rpc(self, context))
            except grpc.aio.InternalError:  # who asked has gone
                raise asyncio.CancelledError from None

        return grpc.stream_stream_rpc_method_handler(behave)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        self.calls.append(request.url.path)
        self.requests.append(request)

        async def answer() -> None:
            response = await self.route(self, request)
            await response(scope, receive, send)

        await self._run(answer())

    async def _run(self, work: Awaitable[None]) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await work
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1


@dataclass
class Scene:
    room: Room
    grpc_address: str = ""
    http_address: str = ""
    channel: grpc.aio.Channel = field(init=False)
    http: httpx.AsyncClient = field(init=False)
    tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    stopping: list[asyncio.Task[None]] = field(default_factory=list)
    replicas: int = 0

    async def held(self, count: int) -> None:
        await until(lambda: self.room.held_requests == count)

    def start(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.ensure_future(work)
        self.tasks.append(task)
        return task

    def stream(self, method: str = METHOD, **options: Any) -> Any:
        return self.channel.stream_stream(method)(**options)

    async def call(self, *messages: bytes, method: str = METHOD, **options: Any) -> list[bytes]:
        """All answers to these messages."""
        call = self.stream(method, **{"timeout": 20} | options)
        for message in messages:
            await call.write(message)
        await call.done_writing()
        return [answer async for answer in call]

    @asynccontextmanager
    async def replica(self, *, serve: bool = True, **fields: Any) -> AsyncIterator[FakeReplica]:
        """A replica that listens to the scene's protocol, and that the room is told of."""
        replica = FakeReplica(f"r{self.replicas}", **fields)
        self.replicas += 1
        await replica.start(grpc_port=bool(self.grpc_address), http_port=bool(self.http_address))
        if serve:
            self.serve(replica)
        try:
            yield replica
        finally:
            self.stopping.append(asyncio.create_task(replica.stop()))

    def serve(self, *replicas: FakeReplica) -> None:
        self.room.serve([each.address for each in replicas])


@asynccontextmanager
async def grpc_scene(limits: HoldLimits | None = None, **options: Any) -> AsyncIterator[Scene]:
    here = Scene(Room(limits))
    port = GrpcProxy(here.room, **options)
    here.grpc_address = f"127.0.0.1:{await port.start('127.0.0.1:0')}"
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(here.grpc_address, options=options) as here.channel, _ending(here, port):
        yield here


@asynccontextmanager
async def http_scene(limits: HoldLimits | None = None) -> AsyncIterator[Scene]:
    here = Scene(Room(limits))
    port = HttpProxy(here.room)
    here.http_address = f"http://127.0.0.1:{await port.start('127.0.0.1:0')}"
    client = httpx.AsyncClient(base_url=here.http_address, timeout=20, verify=False)
    async with client as here.http, _ending(here, port):
        yield here


@asynccontextmanager
async def _ending(here: Scene, port: GrpcProxy | HttpProxy) -> AsyncIterator[None]:
    """In the end nothing of any request may be left anywhere, and nothing may have been logged as an error."""
    errors = _Errors(logging.ERROR)
    logging.getLogger().addHandler(errors)
    try:
        yield
        for task in here.tasks:
            task.cancel()
    finally:
        await asyncio.gather(port.stop(0), *here.stopping, *here.tasks, return_exceptions=True)
        logging.getLogger().removeHandler(errors)
    await until(lambda: not here.room._entered)  # the tasks of RPCs end after their port
    assert_nothing_is_left(here.room)
    assert errors.messages == []


class _Errors(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(("autoscaler", "grpc")):  # asyncio also has what other tests leave behind
            self.messages.append(record.getMessage())


def assert_nothing_is_left(room: Room) -> None:
    assert (room.held_requests, room.held_bytes, room.oldest_held_seconds) == (0, 0, 0.0)
    assert room._entered == set()
    assert [window.handed for window in room._windows] == [0] * len(room._windows)


async def error_of(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    try:
        await asyncio.wait_for(call, 20)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the RPC went well")


def hints(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    return dict(error.trailing_metadata() or ())
