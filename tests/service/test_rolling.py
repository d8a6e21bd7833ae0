"""Replicas that come and go under clients that use the service config which we ship: no request is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
from nemoserve.v1 import generation_pb2 as pb
from nemoserve.v1 import generation_pb2_grpc as rpc

from tests.service.lives import Life, config, living
from tests.service_address import SERVICE_CONFIG, service_address


def channel_to(*replicas: Life) -> grpc.aio.Channel:
    addresses = ",".join(replica.address for replica in replicas)
    options = [("grpc.service_config", SERVICE_CONFIG.read_text())]
    return grpc.aio.insecure_channel(f"ipv4:{addresses}", options=options)


async def ask(stub: Any) -> str:
    request = pb.GenerateRequest(prompt="Hi", sampling=pb.SamplingParameters(max_tokens=3))
    return "".join([response.delta.text async for response in stub.Generate(request, timeout=30)])


async def clients(stub: Any, stop: asyncio.Event, answers: list[str], wanted: asyncio.Semaphore) -> None:
    while not stop.is_set():
        answers.append(await ask(stub))
        wanted.release()


async def served_some(wanted: asyncio.Semaphore, count: int = 20) -> None:
    for _ in range(count):
        await asyncio.wait_for(wanted.acquire(), 30)


async def test_a_rolling_update_loses_no_request(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        old, new = [await stack.enter_async_context(living(config(tmp_path, lame_duck=0.3))) for _ in range(2)]
        stub: Any = rpc.GenerationServiceStub(await stack.enter_async_context(channel_to(old, new)))
        stop, answers, wanted = asyncio.Event(), list[str](), asyncio.Semaphore(0)
        asking = [asyncio.create_task(clients(stub, stop, answers, wanted)) for _ in range(4)]
        await served_some(wanted)
        assert old.engine.requests  # both are asked
        assert new.engine.requests
        old.server.stop()
        assert await asyncio.wait_for(old.end, 10) == 0
        await served_some(wanted)
        stop.set()
        await asyncio.gather(*asking)
        print(f"{len(answers)} requests, {len(old.engine.requests)} of them by the replica that stopped, 0 lost")
        assert set(answers) == {"abc"}
        assert len(old.engine.requests) + len(new.engine.requests) == len(answers)


async def test_a_request_that_meets_a_dead_engine_is_repeated_by_the_client_itself(tmp_path: Path) -> None:
    async with living(config(tmp_path)) as only, channel_to(only) as channel:
        stub: Any = rpc.GenerationServiceStub(channel)
        assert await ask(stub) == "abc"
        dead = only.engine
        dead.die()
        assert await ask(stub) == "abc"
        assert only.engine is not dead


async def test_a_request_that_crossed_the_goaway_of_its_server_is_repeated_by_the_client_itself() -> None:
    """grpc drops it with CANCELLED; when one crosses is a matter of chance, so here a server always does that once."""

    asked = 0

    async def generate(request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        nonlocal asked
        asked += 1
        if asked == 1:
            await context.abort(grpc.StatusCode.CANCELLED, "CANCELLED")
        yield pb.GenerateResponse(delta=pb.Delta(text="abc"))

    server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(
        generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
    )
    name = pb.DESCRIPTOR.services_by_name["GenerationService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, {"Generate": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        options = [("grpc.service_config", SERVICE_CONFIG.read_text())]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            assert await ask(rpc.GenerationServiceStub(channel)) == "abc"
        assert asked == 2
    finally:
        await server.stop(0)


async def test_clients_leave_a_replica_that_left_the_service_though_they_ask_without_a_pause(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(living(config(tmp_path, max_connection_age=0.3)))
        new = await stack.enter_async_context(living(config(tmp_path)))
        service = stack.enter_context(service_address(old.address))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(service.address))
        stub: Any = rpc.GenerationServiceStub(channel)
        stop, answers, wanted = asyncio.Event(), list[str](), asyncio.Semaphore(0)
        asking = [asyncio.create_task(clients(stub, stop, answers, wanted)) for _ in range(4)]
        await served_some(wanted)
        assert not new.engine.requests
        service.endpoint = new.address
        async with asyncio.timeout(20):
            await new.engine.until(lambda: bool(new.engine.requests))
            await old.server.model.idle.wait()
        before = len(old.engine.requests)
        await served_some(wanted)
        assert len(old.engine.requests) == before  # the operator sees it idle, and lets it go
        stop.set()
        await asyncio.gather(*asking)
        assert set(answers) == {"abc"}
