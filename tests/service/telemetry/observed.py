"""The real gRPC port, served model and generator over a fake engine, watched by telemetry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from nemoserve.v1 import generation_pb2 as pb

from service.admission import Admission
from service.served import ServedModel
from service.telemetry.spans import Tracing
from service.telemetry.telemetry import Telemetry
from tests.service.fake_engine import FakeEngine, toy_text
from tests.service.grpc.ports import Port, serving
from tests.service.telemetry.reports import Scrape


class Bell:
    """Rung when something may have changed; a call ends a moment after its client has the last message."""

    def __init__(self) -> None:
        self._rung = asyncio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def until(self, condition: Callable[[], bool], seconds: float = 10.0) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await self._rung.wait()
                self._rung.clear()


@dataclass
class Observed:
    port: Port
    engine: FakeEngine
    model: ServedModel
    telemetry: Telemetry

    def scrape(self) -> Scrape:
        return Scrape(self.telemetry)


@asynccontextmanager
async def observed(
    tracing: Tracing | None = None, admission: Admission | None = None, **server_options: Any
) -> AsyncIterator[Observed]:
    engine = FakeEngine(b"abc")
    model = ServedModel("toy", ("short",), admission=admission)
    model.ready(engine, toy_text())
    telemetry = Telemetry(model, tracing=tracing)
    model.observer = telemetry.requests
    async with serving(model, telemetry=telemetry, **server_options) as port:
        yield Observed(port, engine, model, telemetry)


def ask(prompt: str = "Hi", model: str = "", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=prompt, model=model, sampling=pb.SamplingParameters(**{"max_tokens": 3} | sampling)
    )
