"""Admission over the wire: deadlines, hints for gRPC's own retries, readers that stop."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import grpc
import pytest
from msgspec.structs import replace
from nemoserve.v1 import generation_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from service.admission import Admission, QueueLimits
from service.errors import Code, ServiceError
from service.served import ServedModel
from tests.service.fake_engine import INFO, FakeEngine, toy_text
from tests.service.fakes import Answer, FakeHost, Gate
from tests.service.grpc.kserve.calls import ask
from tests.service.grpc.ports import Port, drained, refusal, serving

HANDED = 9  # completions that an engine of 8 rows gets
REQUEST = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=3))


def gated(limits: QueueLimits | None = None, **info: Any) -> tuple[ServedModel, FakeEngine]:
    """A model whose tokens wait for the engine's gate."""
    engine = FakeEngine(b"abc", replace(INFO, **info))
    engine.gate = Gate()
    model = ServedModel("toy", admission=Admission(limits))
    model.ready(engine, toy_text())
    return model, engine


async def fill(port: Port, engine: FakeEngine) -> list[asyncio.Task[list[Any]]]:
    calls = [asyncio.create_task(drained(port.typed.Generate(REQUEST))) for _ in range(HANDED)]
    await engine.until(lambda: len(engine.requests) == HANDED)
    return calls


def retrying(*codes: str) -> list[tuple[str, Any]]:
    """Channel options under which gRPC itself tries again, at once where the server does not say when."""
    policy = {
        "maxAttempts": 3,
        "initialBackoff": "0.01s",
        "maxBackoff": "0.01s",
        "backoffMultiplier": 1,
        "retryableStatusCodes": list(codes),
    }
    return [("grpc.service_config", json.dumps({"methodConfig": [{"name": [{}], "retryPolicy": policy}]}))]


async def test_the_deadline_of_a_call_ends_its_wait_in_the_queue() -> None:
    model, engine = gated()
    async with serving(model) as port:
        calls = await fill(port, engine)
        typed = refusal(port.typed.Generate(REQUEST, timeout=0.3))
        stub = service_pb2_grpc.GRPCInferenceServiceStub(port.channel)
        unary = refusal(stub.ModelInfer(ask("toy", text_input="Hi"), timeout=0.3))
        for error in await asyncio.gather(typed, unary):
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert engine.gate is not None
        engine.gate.allow(100)
        await asyncio.gather(*calls)
        await asyncio.wait_for(model.idle.wait(), 10)
        assert (len(engine.requests), model.queue.queued) == (HANDED, 0)


async def test_a_call_that_finds_the_queue_full_learns_when_to_come_back() -> None:
    model, engine = gated(QueueLimits(max_requests=0))
    async with serving(model) as port:
        await fill(port, engine)
        began = time.monotonic()
        error = await refusal(port.typed.Generate(REQUEST, timeout=10))
        assert time.monotonic() - began < 5
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        hints = dict(error.trailing_metadata())
        assert 1000 <= int(hints["retry-after-ms"]) <= 1500
        assert hints["grpc-retry-pushback-ms"] == hints["retry-after-ms"]


async def test_grpcs_own_retries_wait_as_they_are_told_and_then_succeed() -> None:
    host = FakeHost()
    host.answers["busy"] = Answer(error=ServiceError(Code.RESOURCE_EXHAUSTED, "full", retry_after_ms=300))
    request = pb.GenerateRequest(prompt="busy", sampling=pb.SamplingParameters(max_tokens=1))
    async with serving(host, retrying("RESOURCE_EXHAUSTED")) as port:
        began = time.monotonic()
        call = asyncio.create_task(drained(port.typed.Generate(request, timeout=10)))
        await host.until(lambda: len(host.requests) == 1)
        host.answers["busy"] = Answer()
        assert (await call)[-1].HasField("finished")
        assert time.monotonic() - began >= 0.3
        assert len(host.requests) == 2


async def test_until_the_first_event_nothing_is_sent_so_that_grpc_may_try_again() -> None:
    """Not even initial metadata: they would commit the call to its first attempt."""
    host = FakeHost()
    gate = Gate()
    host.answers["unlucky"] = Answer(gate=gate, error=ServiceError(Code.UNAVAILABLE, "the engine is down"))
    request = pb.GenerateRequest(prompt="unlucky", sampling=pb.SamplingParameters(max_tokens=1))
    async with serving(host, retrying("UNAVAILABLE")) as port:
        call = asyncio.create_task(drained(port.typed.Generate(request, timeout=10)))
        await host.until(lambda: len(host.requests) == 1)
        host.answers["unlucky"] = Answer()
        gate.allow()
        assert [response.WhichOneof("event") for response in await call] == ["started", "delta", "finished"]


async def test_a_deadline_of_kserve_that_passes_on_the_way_is_an_error() -> None:
    model, engine = gated()
    async with serving(model) as port:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(port.channel)
        assert engine.gate is not None
        engine.gate.allow()
        error = await refusal(stub.ModelInfer(ask("toy", text_input="Hi"), timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await engine.until(lambda: len(engine.cancelled) == 1)


async def test_a_client_that_does_not_read_is_cut_off_while_others_are_served() -> None:
    model, engine = gated(QueueLimits(slow_reader_seconds=0.3), max_model_len=400_000, kv_pages=30_000)
    engine.gate, engine.per_event = None, 20_000
    narrow = [("grpc.http2.bdp_probe", 0)]  # or 4 MiB would be on their way
    long = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=300_000))
    async with serving(model, narrow) as port:
        call = port.typed.Generate(long)
        stream = aiter(call)
        assert (await anext(stream)).HasField("started")
        await engine.until(lambda: len(engine.cancelled) == 1)
        assert (await drained(port.typed.Generate(REQUEST, timeout=10)))[-1].HasField("finished")
        assert (model.in_flight, model.queue.slow_readers) == (0, 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            [_ async for _ in stream]
        error = caught.value
        assert (error.code(), "were not read for 0.3 s" in error.details()) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            True,
        )
