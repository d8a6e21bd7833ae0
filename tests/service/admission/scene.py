"""A served model over a fake engine of 8 rows, which is handed 9 completions at most, and requests to it by name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from msgspec.structs import replace

from engine import FinishReason, SamplingParams
from service.admission import Admission, QueueLimits
from service.caller import TenantLimits
from service.errors import ServiceError
from service.generation import Finished, GenerationEvent, GenerationRequest
from service.served import ServedModel
from tests.service.fake_engine import INFO, FakeEngine, toy_text
from tests.service.fakes import Gate

HANDED = 9  # completions that an engine of 8 rows gets
Task = asyncio.Task[list[GenerationEvent]]


class Scene:
    """A served model, its engine, and the requests of a test by name."""

    def __init__(self, model: ServedModel, engine: FakeEngine) -> None:
        self.model = model
        self.engine = engine
        self.tasks: dict[str, Task] = {}

    @property
    def gate(self) -> Gate:
        assert self.engine.gate is not None
        return self.engine.gate

    @property
    def reached(self) -> list[str]:
        """Names of the requests that the engine has got, in their order."""
        return [request.request_id for request in self.engine.requests]

    def request(self, name: str, prompt: str | list[int] = "Hi", **fields: Any) -> GenerationRequest:
        sampling = SamplingParams(**{"max_tokens": 3} | fields.pop("sampling", {}))
        return GenerationRequest(request_id=name, prompt=prompt, sampling=sampling, **fields)

    async def answer(self, request: GenerationRequest) -> list[GenerationEvent]:
        return [event async for event in self.model.generate(request)]

    def ask(self, name: str, prompt: str | list[int] = "Hi", **fields: Any) -> Task:
        task = self.tasks[name] = asyncio.create_task(self.answer(self.request(name, prompt, **fields)), name=name)
        return task

    async def ask_in_turn(self, names: str, **fields: Any) -> None:
        """One request for each letter, each in the queue or at the engine before the next comes."""
        for name in names:
            known = len(self.reached) + self.model.queue.queued
            self.ask(name, **fields)
            await until(lambda known=known: len(self.reached) + self.model.queue.queued > known)  # type: ignore[misc]

    async def fill(self, count: int = HANDED, **fields: Any) -> None:
        """All that the engine gets is there, and waits for the gate."""
        for number in range(count):
            self.ask(f"full {number}", **fields)
        await until(lambda: len(self.reached) == count)

    async def end(self) -> dict[str, list[GenerationEvent] | BaseException]:
        """Let everything end that can; what became of each."""
        self.gate.allow(10_000)
        results = await asyncio.wait_for(asyncio.gather(*self.tasks.values(), return_exceptions=True), 20)
        return dict(zip(self.tasks, results, strict=True))


async def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Let the other tasks go on until `condition` holds."""
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "it never came to that"
        await asyncio.sleep(0)


@asynccontextmanager
async def scene(
    limits: QueueLimits | None = None, tenants: Mapping[str, TenantLimits] | None = None, **info: Any
) -> AsyncIterator[Scene]:
    """In the end nothing of any request may be left anywhere."""
    engine = FakeEngine(b"abc", replace(INFO, **info))
    engine.gate = Gate()
    given = tenants or {}
    model = ServedModel("toy", admission=Admission(limits, lambda name: given.get(name, TenantLimits())))
    model.ready(engine, toy_text())
    here = Scene(model, engine)
    try:
        yield here
    finally:
        for task in here.tasks.values():
            task.cancel()
        await asyncio.gather(*here.tasks.values(), return_exceptions=True)
        assert_nothing_is_left(model.admission)


def assert_nothing_is_left(admission: Admission) -> None:
    stats = admission.stats
    assert (stats.queued, stats.queued_tokens, stats.oldest_queued_seconds, stats.handed) == (0, 0, 0.0, 0)
    assert (admission.in_flight, admission.idle.is_set()) == (0, True)
    assert (admission._handed, admission._entering, admission._queue._classes) == ({}, {}, {})
    assert admission._tenants._running == {}
    if admission._room is not None:
        assert (admission._room.completions, admission._room._starting) == (0, {})


async def refused(task: Task) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        await asyncio.wait_for(task, 10)
    return caught.value


def ends(events: list[GenerationEvent] | BaseException) -> dict[int, FinishReason]:
    assert isinstance(events, list), events
    return {event.index: event.reason for event in events if isinstance(event, Finished)}
