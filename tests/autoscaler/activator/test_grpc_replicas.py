"""RPCs through the activator to replicas that are full, die, or are not there."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from autoscaler.activator import HoldLimits
from tests.autoscaler.activator.scene import FakeReplica, error_of, grpc_scene, hints, until


async def test_a_replica_that_is_full_gets_the_request_again_when_it_said() -> None:
    refusals = 3

    async def full_at_first(replica: FakeReplica, context: Any) -> None:
        await context.read()
        if len(replica.calls) <= refusals:
            trailing = (("retry-after-ms", "30"), ("grpc-retry-pushback-ms", "30"))
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", trailing)
        await context.write(b"answer")

    async with grpc_scene() as here, here.replica(rpc=full_at_first) as replica:
        assert await here.call(b"x") == [b"answer"]
        assert len(replica.calls) == refusals + 1


async def test_a_replica_that_stays_full_is_quoted_at_the_end() -> None:
    async def full(replica: FakeReplica, context: Any) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", (("retry-after-ms", "20"),))

    async with grpc_scene(HoldLimits(hold_seconds=0.3)) as here, here.replica(rpc=full) as replica:
        error = await error_of(here.call(b"x", timeout=None))
        assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full")
        assert hints(error) == {"retry-after-ms": "20"}
        assert len(replica.calls) > 1


async def test_a_refusal_without_a_hint_is_final() -> None:
    async def too_large(replica: FakeReplica, context: Any) -> None:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too large")

    async with grpc_scene() as here, here.replica(rpc=too_large) as replica:
        assert (await error_of(here.call(b"x"))).details() == "too large"
        assert len(replica.calls) == 1


async def test_one_tenants_refusal_holds_up_nobody_else() -> None:
    async def refuses_a(replica: FakeReplica, context: Any) -> None:
        if await context.read() == b"a":
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "quota", (("retry-after-ms", "60000"),))
        await context.write(b"ok")

    async with grpc_scene() as here, here.replica(rpc=refuses_a):
        here.start(here.call(b"a"))
        await here.held(1)
        assert await asyncio.gather(*(here.call(b"b") for _ in range(5))) == [[b"ok"]] * 5


async def test_a_replica_that_dies_before_it_answers_costs_nothing() -> None:
    async def dies(replica: FakeReplica, context: Any) -> None:
        await context.read()
        await asyncio.Event().wait()

    async with grpc_scene() as here, here.replica(rpc=dies) as first, here.replica(serve=False) as second:
        here.serve(first)
        answer = here.start(here.call(b"0", b"1", b"2"))
        await until(lambda: first.running == 1)
        here.serve(first, second)
        await first.stop()
        assert await answer == [b"r1:0", b"r1:1", b"r1:2"]
        assert second.messages == [b"0", b"1", b"2"]


async def test_a_replica_that_dies_after_it_began_is_told_and_not_repeated() -> None:
    async def dies(replica: FakeReplica, context: Any) -> None:
        await context.read()
        await context.write(b"first")
        await asyncio.Event().wait()

    async with grpc_scene() as here, here.replica(rpc=dies) as first, here.replica(serve=False) as second:
        here.serve(first)
        call = here.stream(timeout=10)
        await call.write(b"x")
        assert await call.read() == b"first"
        here.serve(first, second)
        await first.stop()
        assert (await error_of(call.read())).code() is grpc.StatusCode.UNAVAILABLE
        assert second.calls == []


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
async def test_a_request_that_ends_three_replicas_is_given_to_no_fourth(code: grpc.StatusCode) -> None:
    async def lost(replica: FakeReplica, context: Any) -> None:
        await context.abort(code, "the engine is down")

    async with (
        grpc_scene() as here,
        here.replica(rpc=lost) as a,
        here.replica(rpc=lost) as b,
        here.replica(rpc=lost) as c,
        here.replica() as d,
    ):
        here.serve(a, b, c)
        call = here.stream(timeout=20)
        await call.write(b"x")
        assert (await call.code(), await call.details()) == (code, "the engine is down")
        await until(lambda: here.room.outcomes == {"lost": 1})
        assert [len(each.calls) for each in (a, b, c, d)] == [1, 1, 1, 0]


async def test_a_replica_that_is_not_there_is_no_attempt() -> None:
    async with grpc_scene() as here, here.replica() as gone, here.replica(serve=False) as other:
        await gone.stop()
        here.serve(gone, other)
        assert await asyncio.gather(*(here.call(b"%d" % number) for number in range(4))) == [
            [b"r1:%d" % number] for number in range(4)
        ]


async def test_when_all_replicas_go_requests_are_held_again() -> None:
    async with grpc_scene() as here:
        async with here.replica():
            assert await here.call(b"1") == [b"r0:1"]
        here.room.wake.clear()
        here.room.serve(())
        answer = here.start(here.call(b"2"))
        await asyncio.wait_for(here.room.wake.wait(), 10)
        async with here.replica():
            assert await answer == [b"r1:2"]
