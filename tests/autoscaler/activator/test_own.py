"""What the activator answers itself, so that looking wakes nobody."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc.aio import InferenceServerClient

from autoscaler.activator import HoldLimits
from autoscaler.activator.own_rpcs import KSERVE, TYPED
from tests.autoscaler.activator.scene import Scene, error_of, grpc_scene, http_scene

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


async def health(here: Scene, service: str) -> Any:
    request = health_pb2.HealthCheckRequest(service=service)
    return (await health_pb2_grpc.HealthStub(here.channel).Check(request, timeout=10)).status


def nobody_was_woken(here: Scene) -> bool:
    return not here.room.wake.is_set() and here.room.held_requests == 0


async def test_health_says_that_requests_are_taken_and_whether_one_would_begin_now() -> None:
    async with grpc_scene() as here:
        for service in ("", "nemoserve.live", TYPED, KSERVE):
            assert await health(here, service) == SERVING
        assert await health(here, "nemoserve.ready") == NOT_SERVING
        assert nobody_was_woken(here)
        async with here.replica():
            assert await health(here, "nemoserve.ready") == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await health(here, "other")
        assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watches_of_health_are_told_of_each_change_every_one_of_them() -> None:
    async with grpc_scene() as here:
        stub = health_pb2_grpc.HealthStub(here.channel)
        request = health_pb2.HealthCheckRequest(service="nemoserve.ready")
        calls = [stub.Watch(request) for _ in range(3)]
        watches = [aiter(call) for call in calls]
        assert [(await anext(each)).status for each in watches] == [NOT_SERVING] * 3
        async with here.replica():
            assert (await anext(watches[0])).status == SERVING
            calls[0].cancel()
            assert [(await anext(each)).status for each in watches[1:]] == [SERVING] * 2
            here.room.serve(())
            assert [(await anext(each)).status for each in watches[1:]] == [NOT_SERVING] * 2
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await anext(aiter(unknown))).status == UNKNOWN
        here.room.close()
        assert await health(here, "") == NOT_SERVING


async def test_a_client_that_checks_health_before_it_sends_is_held() -> None:
    config = '{"healthCheckConfig": {"serviceName": ""}, "loadBalancingConfig": [{"round_robin": {}}]}'
    options = [("grpc.service_config", config)]
    async with grpc_scene() as here, grpc.aio.insecure_channel(here.grpc_address, options=options) as channel:
        call = channel.unary_unary("/some.Service/Method")(b"Hi", timeout=20)
        await here.held(1)
        async with here.replica():
            assert await call == b"r0:Hi"


async def test_load_tells_who_waits_and_how_far_the_replica_is() -> None:
    async with grpc_scene() as here:
        typed: Any = rpc.GenerationServiceStub(here.channel)
        load = (await typed.GetLoad(pb.GetLoadRequest(), timeout=10)).load
        assert (load.phase, load.queued_requests) == (pb.PHASE_LOADING, 0)
        assert load.detail == "no replica; the next request asks for one"
        assert nobody_was_woken(here)
        here.start(here.call(b"x"))
        await here.held(1)
        load = (await typed.GetLoad(pb.GetLoadRequest(), timeout=10)).load
        assert (load.queued_requests, load.detail) == (1, "no replica; asked for one")
        here.room.progress("loading the model", eta=30)
        load = (await typed.GetLoad(pb.GetLoadRequest(), timeout=10)).load
        assert load.detail == "loading the model"
        assert 20 < load.eta_seconds <= 30
        assert load.oldest_queued_seconds > 0


async def test_a_watch_of_load_follows_and_ends_when_there_is_a_replica() -> None:
    async with grpc_scene() as here:
        typed: Any = rpc.GenerationServiceStub(here.channel)
        watch = aiter(typed.WatchLoad(pb.WatchLoadRequest(interval_seconds=60)))
        assert (await anext(watch)).load.detail == "no replica; the next request asks for one"
        here.room.progress("loading the model")
        assert (await anext(watch)).load.detail == "loading the model"
        async with here.replica():
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await anext(watch)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        here.room.serve(())
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await anext(aiter(typed.WatchLoad(pb.WatchLoadRequest(interval_seconds=61))))
        assert error.value.details() == "interval_seconds: 61.0 must be between 0.1 and 60, or 0"


async def test_streams_that_watch_are_as_many_as_requests_at_most_and_one_that_ends_gives_its_place_back() -> None:
    async with grpc_scene(HoldLimits(max_requests=2)) as here:
        typed: Any = rpc.GenerationServiceStub(here.channel)
        check = health_pb2_grpc.HealthStub(here.channel)
        load = typed.WatchLoad(pb.WatchLoadRequest(interval_seconds=60))
        health = check.Watch(health_pb2.HealthCheckRequest())
        assert await anext(aiter(load))
        assert await anext(aiter(health))
        for third in (check.Watch(health_pb2.HealthCheckRequest()), typed.WatchLoad(pb.WatchLoadRequest())):
            error = await error_of(anext(aiter(third)))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert error.details() == "2 watches are open, and there is no place for more than 2; retry later"
        load.cancel()
        async with asyncio.timeout(20):  # until the server has seen it
            while not await watches(check):
                pass


async def watches(check: Any) -> bool:
    """Whether one more may watch."""
    with suppress(grpc.aio.AioRpcError):
        return bool(await anext(aiter(check.Watch(health_pb2.HealthCheckRequest()))))
    return False


async def test_with_a_replica_it_answers_for_itself() -> None:
    async with grpc_scene() as here, here.replica() as replica:
        await here.call(b"", method=f"/{TYPED}/GetLoad")
        await here.call(b"", method=f"/{KSERVE}/ServerReady")
        assert replica.calls == [f"/{TYPED}/GetLoad", f"/{KSERVE}/ServerReady"]


async def test_kserves_questions_of_health_wake_nobody() -> None:
    async with grpc_scene() as here:
        client = InferenceServerClient(here.grpc_address)
        assert await client.is_server_live() is True
        assert await client.is_server_ready() is False
        assert await client.is_model_ready("m") is False
        await client.close()
        assert nobody_was_woken(here)


@pytest.mark.parametrize("path", ["/v1/health/live", "/v2/health/live"])
async def test_live_over_http(path: str) -> None:
    async with http_scene() as here:
        assert (await here.http.get(path)).status_code == 200
        assert nobody_was_woken(here)


async def test_ready_over_http_is_503_until_there_is_a_replica() -> None:
    async with http_scene() as here:
        here.room.progress("loading the model", eta=20)
        for path in ("/v1/health/ready", "/v2/health/ready", "/health"):
            response: httpx.Response = await here.http.get(path)
            assert response.status_code == 503
            assert 20 <= int(response.headers["retry-after"]) <= 30
            assert response.json()["reason"].startswith("starting a replica, loading the model, about ")
        assert nobody_was_woken(here)
        async with here.replica():
            assert (await here.http.get("/v1/health/ready")).status_code == 200


async def test_metrics_tell_who_waits_by_the_name_that_servers_use() -> None:
    async with http_scene() as here:
        here.start(here.http.post("/v1/chat/completions", content=b"12345"))
        await here.held(1)
        response = await here.http.get("/metrics")
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }
        assert samples[("nemoserve_requests_queued",)] == 1
        assert samples[("nemoserve_queue_oldest_seconds",)] > 0
        assert samples[("nemoserve_activator_held_bytes",)] == 5
        assert samples[("nemoserve_activator_requests_total", "full")] == 0
