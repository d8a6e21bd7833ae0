"""Readiness, statistics and log settings: answers that change."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2 as pb

from service.host import Phase, Status
from tests.service.fakes import Answer, FakeHost, Gate
from tests.service.grpc.kserve.calls import ask, iter_requests, stream, vllm
from tests.service.grpc.kserve.conftest import Running, serving
from tests.service.grpc.kserve.toys import Echo, Failing

# -- readiness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "alive", "ready", "state"),
    [
        (Status(Phase.READY), True, True, "READY"),
        (Status(Phase.READY), False, False, "UNAVAILABLE"),
        (Status(Phase.LOADING, "read weights"), True, False, "LOADING"),
        (Status(Phase.DRAINING), True, False, "UNAVAILABLE"),
        (Status(Phase.FAILED, "out of memory"), False, False, "UNAVAILABLE"),
    ],
    ids=["ready", "engine silent", "loading", "draining", "failed"],
)
async def test_readiness_follows_the_phase_and_liveness_does_not(
    llm: Running, host: FakeHost, status: Status, alive: bool, ready: bool, state: str
) -> None:
    host.status, host.alive = status, alive
    assert (await llm.stub.ServerLive(pb.ServerLiveRequest())).live
    assert (await llm.stub.ServerReady(pb.ServerReadyRequest())).ready is ready
    assert (await llm.stub.ModelReady(pb.ModelReadyRequest(name="vllm_model"))).ready is ready
    index = (await llm.stub.RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert [(m.name, m.version, m.state) for m in index] == [
        (name, "1", state) for name in ("ensemble", "fake", "tensorrt_llm_bls", "vllm_model")
    ]
    assert all(status.detail in model.reason for model in index)
    ready_ones = (await llm.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models
    assert len(ready_ones) == (4 if ready else 0)


async def test_a_request_while_loading_is_unavailable(llm: Running, host: FakeHost) -> None:
    host.status = Status(Phase.LOADING)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await llm.stub.ModelInfer(vllm("hi", stream=False))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_server_can_go_by_another_name(serve: Any, host: FakeHost) -> None:
    async with serve([Echo()], server_name="triton") as running:
        assert (await running.stub.ServerMetadata(pb.ServerMetadataRequest())).name == "triton"


# -- statistics --------------------------------------------------------------------------------------------------------


async def statistics(running: Running, name: str) -> pb.ModelStatistics:
    response = await running.stub.ModelStatistics(pb.ModelStatisticsRequest(name=name))
    (only,) = response.model_stats
    return only


async def test_successes_are_counted_with_their_time_in_the_queue(llm: Running) -> None:
    before = await statistics(llm, "vllm_model")
    assert (before.inference_count, before.inference_stats.queue.count, before.last_inference) == (0, 0, 0)
    await llm.stub.ModelInfer(vllm("hi", stream=False))
    await stream(llm.stub, vllm("hi"))
    after = await statistics(llm, "vllm_model")
    stats = after.inference_stats
    assert (after.inference_count, after.execution_count, stats.success.count, stats.fail.count) == (2, 2, 2, 0)
    counts = {getattr(stats, name).count for name in ("queue", "compute_input", "compute_infer", "compute_output")}
    assert counts == {2}
    assert stats.queue.ns == 2_000_000  # the fake host queues each for a millisecond
    assert after.last_inference > 0


async def test_failures_and_cancelled_requests_count_as_failed(llm: Running, host: FakeHost) -> None:
    host.answers["breaks"] = Answer(finished_error="broke", error_after=1)
    host.answers["waits"] = Answer(gate=Gate())
    await stream(llm.stub, vllm("breaks"), vllm("hi", temperature=-1))
    call = llm.stub.ModelStreamInfer(iter_requests(vllm("waits")))
    await host.until(lambda: host.running == 1)
    call.cancel()
    await host.until(lambda: host.running == 0)
    stats = (await statistics(llm, "vllm_model")).inference_stats
    assert (stats.success.count, stats.fail.count) == (0, 3)


async def test_each_name_counts_for_itself_and_all_are_told_together() -> None:
    async with serving([Echo(), Failing()]) as running:
        await running.stub.ModelInfer(ask("echo", text="hi"))
        response = await running.stub.ModelStatistics(pb.ModelStatisticsRequest())
        assert [(s.name, s.inference_stats.success.count) for s in response.model_stats] == [
            ("echo", 1),
            ("failing", 0),
        ]


# -- log settings ------------------------------------------------------------------------------------------------------


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    made = logging.getLogger("tests.kserve.log_settings")
    made.setLevel(logging.INFO)
    yield made
    made.setLevel(logging.NOTSET)


@pytest.mark.parametrize(
    ("settings", "level"),
    [
        ({}, logging.INFO),
        ({"log_verbose_level": 1}, logging.DEBUG),
        ({"log_verbose_level": 0}, logging.INFO),
        ({"log_info": False}, logging.WARNING),
        ({"log_info": False, "log_warning": False}, logging.ERROR),
        ({"log_info": False, "log_warning": False, "log_error": False}, logging.CRITICAL),
        ({"log_format": "default", "bogus": True}, logging.INFO),
    ],
    ids=json.dumps,
)
async def test_log_settings_move_the_level(logger: logging.Logger, settings: dict[str, Any], level: int) -> None:
    request = pb.LogSettingsRequest()
    for key, value in settings.items():
        field = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
        setattr(request.settings[key], field, value)
    async with serving([Echo()], logger=logger) as running:
        told = (await running.stub.LogSettings(request)).settings
    assert logger.level == level
    assert told["log_info"].bool_param is (level <= logging.INFO)
    assert told["log_warning"].bool_param is (level <= logging.WARNING)
    assert told["log_error"].bool_param is (level <= logging.ERROR)
    assert told["log_verbose_level"].uint32_param == (level == logging.DEBUG)
    assert (told["log_file"].string_param, told["log_format"].string_param) == ("", "default")


async def test_log_settings_are_all_or_nothing(logger: logging.Logger) -> None:
    request = pb.LogSettingsRequest()
    request.settings["log_verbose_level"].uint32_param = 1
    request.settings["log_format"].string_param = "zzz"
    async with serving([Echo()], logger=logger) as running:
        with pytest.raises(grpc.aio.AioRpcError):
            await running.stub.LogSettings(request)
    assert logger.level == logging.INFO
