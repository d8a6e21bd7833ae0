"""Triton's ModelStatistics beside the service's own counts and the engine's own times."""

from __future__ import annotations

from typing import Any

from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc import service_pb2_grpc

from tests.service.fakes import Gate
from tests.service.grpc.kserve.calls import iter_requests, stream, vllm
from tests.service.grpc.ports import refusal
from tests.service.telemetry.observed import observed

QUEUED = 0.25  # seconds, what the fake engine says of every request


async def test_triton_is_told_what_prometheus_is_told() -> None:
    async with observed() as running:
        stub: Any = service_pb2_grpc.GRPCInferenceServiceStub(running.port.channel)
        for number in range(5):
            await stream(stub, vllm("hi", id=f"a{number}"), vllm("ho", id=f"b{number}", max_tokens=2 + number))
            await stub.ModelInfer(vllm("hi", stream=False))
        await stream(stub, vllm("hi", temperature=-1), vllm("hi"))
        await refusal(stub.ModelInfer(vllm("hi", stream=False, top_p=7)))
        running.engine.fails_after = 1
        await stream(stub, vllm("hi"))
        running.engine.gate = Gate()
        asked = len(running.engine.requests)
        call = stub.ModelStreamInfer(iter_requests(vllm("hi"), vllm("ho")))
        await running.engine.until(lambda: len(running.engine.requests) == asked + 2)
        call.cancel()
        await running.engine.until(lambda: len(running.engine.cancelled) == 2)
        [told] = (await stub.ModelStatistics(kserve.ModelStatisticsRequest(name="vllm_model"))).model_stats
        scrape = running.scrape()
    ended = {dict(labels)["outcome"]: n for labels, n in scrape.values("nemoserve_requests_total").items()}
    assert ended == {"length": 16, "rejected": 2, "error": 1, "cancelled": 2}
    stats = told.inference_stats
    assert told.inference_count == stats.success.count == 16
    assert stats.fail.count == 2 + 1 + 2
    # Before that each waited in the service; and the failed request got as far as a token too.
    assert stats.queue.ns >= 16 * QUEUED * 1e9
    both = scrape.value("nemoserve_queue_time_seconds_sum", model="toy")
    assert 17 * QUEUED <= both < QUEUED + stats.queue.ns / 1e9 + 1
