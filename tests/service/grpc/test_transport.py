"""What every RPC of the port gets: malformed messages, faults, limits, pings, cancellation, health, reflection."""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from msgspec.structs import replace
from nemoserve.v1 import generation_pb2 as pb

from engine import EngineStats
from service.grpc.server import LIVE, OPTIONS, READY, SERVICES, GrpcServer
from service.served import CPU_BEAT_SECONDS, ServedModel
from tests.service.fake_engine import INFO, FakeEngine, toy_text
from tests.service.fakes import Gate
from tests.service.grpc.ports import Port, drained, refusal, served, serving

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
ENDLESS = pb.GenerateRequest(prompt="Hi")


@pytest.fixture
async def engine() -> FakeEngine:
    return FakeEngine(b"abc")


@pytest.fixture
async def port(engine: FakeEngine) -> AsyncIterator[Port]:
    async with serving(served(engine)) as running:
        yield running


# -- malformed messages and faults -----------------------------------------------------------------------------------

TYPED, KSERVE = SERVICES
METHODS = {
    f"/{TYPED}/Tokenize": "unary_unary",
    f"/{TYPED}/Generate": "unary_stream",
    f"/{KSERVE}/ModelInfer": "unary_unary",
    f"/{KSERVE}/ModelStreamInfer": "stream_stream",
    "/grpc.health.v1.Health/Check": "unary_unary",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "stream_stream",
}


def raw_call(port: Port, method: str, data: bytes) -> Any:
    """The method with bytes instead of a message."""
    kind = METHODS[method]
    return getattr(port.channel, kind)(method)(iter([data]) if kind == "stream_stream" else data, timeout=10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "data", [b"\xff", b"\x0a\x05ab", b"\x0a\x02\xc3\x28", b"\x0b" * 200], ids=["garbage", "truncated", "utf8", "groups"]
)
async def test_a_malformed_message_is_an_invalid_argument_that_tells_nothing_inside(
    port: Port, method: str, data: bytes
) -> None:
    error = await refusal(raw_call(port, method, data))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "the request is not a valid protobuf message of this method"


async def test_no_mutation_of_a_request_gets_past_the_guard(port: Port) -> None:
    random_ = random.Random(7)
    sampling = pb.SamplingParameters(max_tokens=2, temperature=0.5, stop=["x"], logit_bias={3: 1.0})
    whole = pb.GenerateRequest(request_id="id", prompt="Hello", sampling=sampling).SerializeToString()
    codes = set()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(random_.randint(1, 4)):
            data[random_.randrange(len(data))] = random_.randrange(256)
        try:
            async for _ in raw_call(port, f"/{TYPED}/Generate", bytes(data)):
                pass
            codes.add("OK")
        except grpc.aio.AioRpcError as error:
            codes.add(error.code().name)
    assert codes <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}
    assert {"OK", "INVALID_ARGUMENT"} <= codes


class Faulty(ServedModel):
    """Has a fault of ours in it."""

    @property
    def stats(self) -> EngineStats:
        raise RuntimeError("/models/secret token=abc")


@pytest.mark.parametrize(
    ("method", "request_"), [("GetLoad", pb.GetLoadRequest()), ("WatchLoad", pb.WatchLoadRequest())]
)
async def test_a_fault_of_ours_shows_an_id_to_the_client_and_the_rest_to_the_log(
    method: str, request_: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(Faulty("toy")) as port:
        with caplog.at_level(logging.ERROR, "service.grpc.interceptors"):
            error = await refusal(getattr(port.typed, method)(request_, timeout=10))
    assert error.code() == grpc.StatusCode.INTERNAL
    found = re.fullmatch(r"internal error ([0-9a-f]{16})", error.details())
    assert found
    [record] = caplog.records
    assert record.__dict__["error_id"] == found[1]
    assert "token=abc" in caplog.text


async def test_an_unknown_method_is_unimplemented(port: Port) -> None:
    error = await refusal(port.channel.unary_unary(f"/{TYPED}/Nothing")(b"", timeout=10))
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED


# -- limits ----------------------------------------------------------------------------------------------------------


async def test_a_message_above_the_limit_is_refused_and_the_connection_goes_on(engine: FakeEngine) -> None:
    async with serving(served(engine), max_request_bytes=10_000) as port:
        error = await refusal(port.typed.Tokenize(pb.TokenizeRequest(text="x" * 10_000), timeout=10))
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert list((await port.typed.Tokenize(pb.TokenizeRequest(text="x"), timeout=10)).token_ids) == [120]


async def test_a_message_above_grpcs_own_default_is_read(port: Port) -> None:
    error = await refusal(port.typed.Tokenize(pb.TokenizeRequest(text="x" * 5 * 2**20), timeout=10))
    assert (error.code(), "5242880" in error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def pings(port: Port, seconds: float) -> None:
    """Hold an idle stream while the client pings; its end is an error."""
    watch = port.typed.WatchLoad(pb.WatchLoadRequest(interval_seconds=60))
    await anext(aiter(watch))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(aiter(watch)), seconds)
    watch.cancel()


async def test_clients_may_ping_as_often_as_they_like(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = [
        ("grpc.keepalive_time_ms", 50),
        ("grpc.keepalive_timeout_ms", 5000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    async with serving(served(engine), options=eager) as port:
        await pings(port, 1.0)
    # The same client against gRPC's default, so that the test shows what it tests.
    monkeypatch.setattr("service.grpc.server.OPTIONS", [each for each in OPTIONS if "ping_strikes" not in each[0]])
    async with serving(served(engine), options=eager) as port:
        with pytest.raises(grpc.aio.AioRpcError, match="Too many pings"):
            await pings(port, 10.0)


async def test_a_second_server_on_the_same_port_fails_to_start(engine: FakeEngine, port: Port) -> None:
    second = GrpcServer(served(engine))
    with pytest.raises(OSError, match=port.address):
        await second.start(port.address)


# -- the end of a request --------------------------------------------------------------------------------------------


async def test_cancelling_the_call_cancels_the_request_in_the_engine(engine: FakeEngine, port: Port) -> None:
    engine.gate = Gate()
    waiting, running = port.typed.Generate(ENDLESS), port.typed.Generate(ENDLESS)
    engine.gate.allow()
    await engine.until(lambda: len(engine.requests) == 2)
    for count, call in enumerate((waiting, running), start=1):
        call.cancel()
        await engine.until(lambda count=count: len(engine.cancelled) == count)  # type: ignore[misc]


async def test_closing_the_connection_cancels_its_requests(engine: FakeEngine, port: Port) -> None:
    engine.gate = Gate()
    other = grpc.aio.insecure_channel(port.address, options=[("grpc.use_local_subchannel_pool", 1)])
    calls = [other.unary_stream(f"/{TYPED}/Generate")(ENDLESS.SerializeToString()) for _ in range(3)]
    await engine.until(lambda: len(engine.requests) == 3)
    await other.close()
    await engine.until(lambda: len(engine.cancelled) == 3)
    assert all(call.done() for call in calls)


@pytest.mark.parametrize("tokens", [0, 2])
async def test_a_deadline_ends_the_request_in_the_engine_before_and_after_its_first_token(
    engine: FakeEngine, port: Port, tokens: int
) -> None:
    engine.gate = Gate()
    engine.gate.allow(tokens)
    [end] = await asyncio.gather(drained(port.typed.Generate(ENDLESS, timeout=0.2)), return_exceptions=True)
    if isinstance(end, grpc.aio.AioRpcError):
        assert end.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    else:  # the server's clock was before the client's
        assert tokens
        assert end[-1].finished.reason == pb.FINISH_REASON_DEADLINE
    await engine.until(lambda: len(engine.cancelled) == 1)
    assert engine.produced == tokens


async def test_a_client_that_never_reads_holds_up_nobody_and_goes_when_it_cancels() -> None:
    """Its stream blocks in the middle of a write, which is where the cancellation has to find it."""
    engine = FakeEngine(b"abcdefgh", info=replace(INFO, max_model_len=100_000, kv_pages=10_000))
    model = served(engine)
    small = [("grpc.http2.lookahead_bytes", 65536), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with serving(model, options=small) as own:
        stalled = own.typed.Generate(pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(logprobs=20)))
        await anext(aiter(stalled))  # and never again
        before = -1
        while engine.produced > before:  # until the flow stops
            before = engine.produced
            assert await health(own, READY) == SERVING  # the event loop went round meanwhile
        assert 0 < before < engine.info.max_model_len // 2
        reader = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=50))
        assert len([response async for response in own.typed.Generate(reader, timeout=10)]) == 52
        assert (engine.cancelled, model.in_flight) == ([], 1)
        stalled.cancel()
        await engine.until(lambda: len(engine.cancelled) == 1)
        await asyncio.wait_for(model.idle.wait(), 10)


# -- health and reflection -------------------------------------------------------------------------------------------


async def health(port: Port, service: str) -> int:
    answer = await health_pb2_grpc.HealthStub(port.channel).Check(
        health_pb2.HealthCheckRequest(service=service), timeout=10
    )
    status: int = answer.status
    return status


@pytest.mark.parametrize("service", ["", READY, *SERVICES, LIVE])
async def test_watched_health_follows_the_model_through_its_life(service: str) -> None:
    model = ServedModel("toy")
    async with serving(model) as port:
        assert await health(port, service) == (SERVING if service == LIVE else NOT_SERVING)
        watch = aiter(
            health_pb2_grpc.HealthStub(port.channel).Watch(health_pb2.HealthCheckRequest(service=service), timeout=10)
        )

        async def becomes(status: int) -> None:
            assert (await anext(watch)).status == status

        await becomes(SERVING if service == LIVE else NOT_SERVING)
        model.ready(FakeEngine(), toy_text())
        if service != LIVE:
            await becomes(SERVING)
            model.draining()
            await becomes(NOT_SERVING)
        else:
            model.failed("gone")
            await becomes(NOT_SERVING)


async def test_health_turns_off_when_the_heart_of_the_engine_stops(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.grpc.server.HEALTH_SECONDS", 0.05)
    async with serving(served(engine)) as port:
        for service in (READY, LIVE):
            watch = aiter(
                health_pb2_grpc.HealthStub(port.channel).Watch(
                    health_pb2.HealthCheckRequest(service=service), timeout=10
                )
            )
            assert (await anext(watch)).status == SERVING
            engine.heartbeat_age = CPU_BEAT_SECONDS + 1
            assert (await anext(watch)).status == NOT_SERVING
            engine.heartbeat_age = 0.0
            assert (await anext(watch)).status == SERVING


async def test_an_unknown_service_is_not_found(port: Port) -> None:
    request = health_pb2.HealthCheckRequest(service="nobody")
    stub = health_pb2_grpc.HealthStub(port.channel)
    assert (await refusal(stub.Check(request, timeout=10))).code() == grpc.StatusCode.NOT_FOUND
    assert (await anext(aiter(stub.Watch(request, timeout=10)))).status == UNKNOWN


async def test_health_answers_while_the_server_is_full(engine: FakeEngine) -> None:
    engine.gate = Gate()
    model = served(engine)
    async with serving(model) as port:
        calls = [port.typed.Generate(ENDLESS) for _ in range(300)]
        codes = [asyncio.create_task(call.code()) for call in calls]
        for refused in asyncio.as_completed(codes):
            assert await refused is grpc.StatusCode.RESOURCE_EXHAUSTED
            break
        assert (model.in_flight, await health(port, READY)) == (9 + 64, SERVING)
        for call in calls:
            call.cancel()
        await asyncio.wait_for(model.idle.wait(), 10)
        await asyncio.gather(*codes)
    assert len(engine.cancelled) == len(engine.requests)


async def test_reflection_lists_every_service(port: Port) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(port.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    answer = await anext(aiter(stub.ServerReflectionInfo(iter([request]), timeout=10)))
    assert {each.name for each in answer.list_services_response.service} == {
        *SERVICES,
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=TYPED)
    answer = await anext(aiter(stub.ServerReflectionInfo(iter([request]), timeout=10)))
    assert answer.file_descriptor_response.file_descriptor_proto


async def test_a_client_without_stubs_calls_by_what_reflection_tells(port: Port) -> None:
    """As grpcurl does."""

    def call() -> tuple[set[str], list[Any]]:
        with grpc.insecure_channel(port.address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = DescriptorPool(database)
            methods = {method.full_name for name in SERVICES for method in pool.FindServiceByName(name).methods}
            method = pool.FindMethodByName(f"{TYPED}.Generate")
            asked, answer = (GetMessageClass(kind) for kind in (method.input_type, method.output_type))
            generate = channel.unary_stream(f"/{TYPED}/Generate", asked.SerializeToString, answer.FromString)
            request = ParseDict({"prompt": "Hi", "sampling": {"maxTokens": 3}}, asked())
            return methods, list(generate(request, timeout=10))

    methods, events = await asyncio.to_thread(call)
    assert {"inference.GRPCInferenceService.ModelStreamInfer", f"{TYPED}.WatchLoad"} <= methods
    assert "".join(event.delta.text for event in events) == "abc"


# -- connections that grow old -----------------------------------------------------------------------------------------


async def test_a_client_is_told_to_make_a_new_connection_and_what_runs_on_the_old_one_ends_well(
    engine: FakeEngine,
) -> None:
    async with serving(served(engine), max_connection_age=0.2) as port:
        engine.gate = Gate()
        request = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=3))
        stream = port.typed.Generate(request, timeout=20)
        engine.gate.allow()
        assert (await stream.read()).HasField("started")
        async with asyncio.timeout(20):
            await port.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
        engine.gate.allow(100)
        last: Any = None
        while (response := await stream.read()) is not grpc.aio.EOF:
            last = response
        assert last.finished.usage.completion_tokens == 3
        for _ in range(3):
            assert await drained(port.typed.Generate(request, timeout=20))
