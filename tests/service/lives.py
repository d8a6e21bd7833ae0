"""A running server over fake engines: the real port and the signals' own entry, without a process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from engine import Done, EngineConfig, LoadProgress
from service.host import Status
from service.loading import Find
from service.management import Package
from service.server import Server, ServerConfig
from service.text.tokenizer import TextModel
from tests.service.fake_engine import FakeEngine, toy_text
from tests.service.fakes import Gate


@dataclass
class Engines:
    """Starts fake engines, one after the other.

    Attributes:
        started: all of them.
        paths: the model of each start, also of those that failed.
        failures: errors of the next starts, None = it works; when there are no more, they work.
        gate: the next start waits for it, if there is one.
    """

    started: list[FakeEngine] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    failures: list[Exception | None] = field(default_factory=list)
    gate: asyncio.Event | None = None

    async def __call__(self, config: EngineConfig, progress: LoadProgress) -> FakeEngine:
        self.paths.append(Path(config.model_path).name)
        progress("read weights", Done(0.5))
        if self.gate is not None:
            await self.gate.wait()
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            raise failure
        self.started.append(FakeEngine(b"abc"))
        return self.started[-1]


@dataclass
class Life:
    """A running server, where it listens, and its end."""

    server: Server
    engines: Engines
    address: str
    end: asyncio.Task[int]
    channel: grpc.aio.Channel = field(init=False)

    @property
    def engine(self) -> FakeEngine:
        return self.engines.started[-1]

    @property
    def typed(self) -> Any:
        return rpc.GenerationServiceStub(self.channel)

    def ask(self) -> Any:
        request = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=3))
        return self.typed.Generate(request, timeout=10)

    async def answer(self) -> str:
        return "".join([response.delta.text async for response in self.ask()])

    async def accepted(self) -> Any:
        """A call whose first token has arrived and whose others wait for the gate."""
        self.engine.gate = Gate()
        self.engine.gate.allow()
        call = self.ask()
        assert (await anext(aiter(call))).HasField("started")
        return call

    async def until(self, condition: Callable[[Status], bool], seconds: float = 10.0) -> None:
        """Wait for a status of the model."""
        async with asyncio.timeout(seconds):
            async for status in self.server.model.watch(0.05):
                if condition(status):
                    return


def config(tmp_path: Path, **changes: Any) -> ServerConfig:
    engine = EngineConfig(model_path=str(tmp_path / "model.gguf"))
    return ServerConfig(
        **{"engine": engine, "model_name": "toy", "grpc_address": "127.0.0.1:0", "http_address": None} | changes
    )


@asynccontextmanager
async def living(
    settings: ServerConfig,
    engines: Engines | None = None,
    load_text: Callable[[Path], TextModel] = lambda path: toy_text(),
    find: Find | None = None,
    describe: Callable[[EngineConfig], Package] | None = None,
) -> AsyncIterator[Life]:
    """A server that is ready."""
    engines = engines or Engines()
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def on_ready(address: str) -> None:
        ready.set_result(address)

    server = Server(settings, engines, load_text, find=find, describe=describe)
    end = asyncio.create_task(server.run(on_ready))
    life = Life(server, engines, await asyncio.wait_for(ready, 10), end)
    try:
        async with grpc.aio.insecure_channel(life.address) as life.channel:
            yield life
    finally:
        end.cancel()
        await asyncio.gather(end, return_exceptions=True)
        assert all(engine.closed for engine in engines.started)


async def health(channel: grpc.aio.Channel, service: str) -> bool:
    request = health_pb2.HealthCheckRequest(service=service)
    answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
