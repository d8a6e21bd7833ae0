"""RPCs through the activator: held, handed over, and passed on exactly."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from autoscaler.activator import HoldLimits, Replica
from tests.autoscaler.activator.scene import METHOD, FakeReplica, error_of, grpc_scene, hints, until


async def test_an_rpc_is_held_until_there_is_a_replica_and_then_answered() -> None:
    async with grpc_scene() as here:
        answer = here.start(here.call(b"Hi"))
        await asyncio.wait_for(here.room.wake.wait(), 10)
        assert (here.room.held_requests, here.room.held_bytes) == (1, 2)
        assert not answer.done()
        async with here.replica() as replica:
            assert await answer == [b"r0:Hi"]
        assert replica.calls == [METHOD]
        assert here.room.outcomes == {"answered": 1}


async def test_one_process_that_holds_passes_on_to_another_which_wakes_the_replica() -> None:
    async with grpc_scene() as leads, grpc_scene() as passes:
        port = int(leads.grpc_address.rpartition(":")[2])
        answer = passes.start(passes.call(b"Hi"))
        await passes.held(1)
        passes.room.serve([Replica("leads", "127.0.0.1", port)])
        await leads.held(1)
        assert leads.room.wake.is_set()
        async with leads.replica():
            assert await answer == [b"r0:Hi"]


async def test_the_second_request_wakes_nobody_again() -> None:
    async with grpc_scene() as here:
        here.start(here.call(b"1"))
        await here.held(1)
        here.room.wake.clear()
        here.start(here.call(b"2"))
        await here.held(2)
        assert not here.room.wake.is_set()


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary", "stream_stream"])
async def test_all_kinds_of_methods_pass(kind: str) -> None:
    async def one_answer(replica: FakeReplica, context: Any) -> None:
        got = []
        while (message := await context.read()) is not grpc.aio.EOF:
            got.append(message)
        for message in [b"+".join(got)] if kind.endswith("unary") else got:
            await context.write(message)

    async with grpc_scene() as here, here.replica(rpc=one_answer):
        method: Any = getattr(here.channel, kind)(METHOD)
        sent = [b"a", b"b"]
        call = method(b"a", timeout=10) if kind.startswith("unary") else method(iter(sent), timeout=10)
        answer = [await call] if kind.endswith("unary") else [each async for each in call]
        expected = [b"a"] if kind.startswith("unary") else sent
        assert answer == ([b"+".join(expected)] if kind.endswith("unary") else expected)


async def test_metadata_goes_both_ways_and_hop_by_hop_does_not() -> None:
    async def told(replica: FakeReplica, context: Any) -> None:
        await context.read()
        await context.send_initial_metadata((("x-first", "1"), ("x-data-bin", b"\x00\xff")))
        await context.write(b"answer")
        context.set_trailing_metadata((("x-last", "2"), ("x-last", "3")))

    async with grpc_scene() as here, here.replica(rpc=told) as replica:
        sent = (("authorization", "Bearer key"), ("x-request-id", "r"), ("x-some-bin", b"\x01\xfe"))
        call = here.stream(metadata=sent)
        await call.write(b"question")
        assert await call.read() == b"answer"
        assert tuple(await call.initial_metadata()) == (("x-first", "1"), ("x-data-bin", b"\x00\xff"))
        assert await call.read() is grpc.aio.EOF
        assert tuple(await call.trailing_metadata()) == (("x-last", "2"), ("x-last", "3"))
        [metadata] = replica.metadata
        assert dict(sent).items() <= metadata.items()
        assert metadata.keys() - dict(sent) == {"user-agent"}  # of the activator's own connection


@pytest.mark.parametrize("after", [0, 2])
async def test_statuses_come_through_exactly(after: int) -> None:
    trailing = (("x-why", "because"), ("grpc-status-details-bin", b"\x00\x01\xff"))
    repeated = () if after else (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
    codes = [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK and code not in repeated]

    async def fails(replica: FakeReplica, context: Any) -> None:
        number = int(await context.read())
        for _ in range(after):
            await context.write(b"part")
        await context.abort(codes[number], "prompt: „é“ 100 % wrong", trailing)

    async with grpc_scene() as here, here.replica(rpc=fails) as replica:
        for number, code in enumerate(codes):
            call = here.stream(timeout=10)
            await call.write(b"%d" % number)
            assert [await call.read() for _ in range(after)] == [b"part"] * after
            assert await call.code() is code
            assert await call.details() == "prompt: „é“ 100 % wrong"
            assert tuple(await call.trailing_metadata()) == trailing
        assert len(replica.calls) == len(codes)


async def test_nothing_is_sent_before_the_replica_answers() -> None:
    gate = asyncio.Event()

    async def waits(replica: FakeReplica, context: Any) -> None:
        await context.read()
        await gate.wait()
        await context.write(b"answer")

    async with grpc_scene() as here:
        call = here.stream()
        await call.write(b"question")
        head = here.start(call.initial_metadata())
        await here.held(1)
        async with here.replica(rpc=waits) as replica:
            await until(lambda: replica.running == 1)
            await asyncio.wait({head}, timeout=0.1)
            assert not head.done()
            gate.set()
            assert await call.read() == b"answer"


async def test_a_bidirectional_stream_flows_both_ways() -> None:
    async with grpc_scene() as here:
        call = here.stream()
        await call.write(b"0")
        await here.held(1)
        async with here.replica():
            assert await call.read() == b"r0:0"
            for number in range(1, 20):
                await call.write(b"%d" % number)
                assert await call.read() == b"r0:%d" % number
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF
            assert here.room.held_bytes == 0


async def test_an_idle_stream_asks_for_no_replica() -> None:
    async with grpc_scene() as here:
        idle = here.stream()
        started = here.start(idle.read())
        await until(lambda: len(here.room._entered) == 1)
        assert not here.room.wake.is_set()
        assert here.room.held_requests == 0
        await idle.write(b"now")
        await here.held(1)
        assert here.room.wake.is_set()
        async with here.replica():
            assert await started == b"r0:now"


async def test_a_deadline_that_passes_in_the_room_is_told_and_never_forwarded() -> None:
    async with grpc_scene() as here:
        error = await error_of(here.call(b"late", timeout=0.2))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await here.held(0)
        async with here.replica() as replica:
            assert await here.call(b"next") == [b"r0:next"]
        assert replica.messages == [b"next"]


async def test_the_deadline_goes_on_to_the_replica() -> None:
    async with grpc_scene() as here, here.replica() as replica:
        await here.call(b"x", timeout=15)
        [remaining] = replica.remaining
        assert remaining is not None
        assert 5 < remaining < 16


async def test_without_a_deadline_hold_seconds_ends_the_wait() -> None:
    async with grpc_scene(HoldLimits(hold_seconds=0.2)) as here:
        error = await error_of(here.call(b"x", timeout=None))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert error.details() == "no replica took the request within 0.2 s; retry later"
        assert int(hints(error)["retry-after-ms"]) >= 1000
        assert here.room.outcomes == {"timeout": 1}


async def test_cancelling_in_the_room_frees_the_place_at_once() -> None:
    async with grpc_scene() as here:
        call = here.stream()
        await call.write(b"x" * 1000)
        await here.held(1)
        call.cancel()
        await here.held(0)
        await until(lambda: here.room.held_bytes == 0)
        async with here.replica() as replica:
            assert await here.call(b"next") == [b"r0:next"]
        assert replica.messages == [b"next"]
        assert here.room.outcomes == {"cancelled": 1, "answered": 1}


@pytest.mark.parametrize("answered", [False, True])
async def test_cancelling_later_cancels_at_the_replica(answered: bool) -> None:
    async def endless(replica: FakeReplica, context: Any) -> None:
        await context.read()
        if answered:
            await context.write(b"first")
        await asyncio.Event().wait()

    async with grpc_scene() as here, here.replica(rpc=endless) as replica:
        call = here.stream()
        await call.write(b"x")
        if answered:
            await call.read()
        await until(lambda: replica.running == 1)
        call.cancel()
        await until(lambda: replica.cancelled == 1)


async def test_a_full_room_refuses_at_once_with_a_hint() -> None:
    async with grpc_scene(HoldLimits(max_requests=2)) as here:
        here.start(here.call(b"1"))
        here.start(here.call(b"2"))
        await here.held(2)
        here.room.progress("loading the model", eta=20)
        error = await error_of(here.call(b"3"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        full = "2 requests are here, 2 of them wait for a replica, and there is no place for more; retry later"
        assert error.details() == full
        assert 19_000 < int(hints(error)["retry-after-ms"]) <= 30_000
        assert hints(error)["grpc-retry-pushback-ms"] == hints(error)["retry-after-ms"]
        assert here.room.outcomes == {"full": 1}


async def test_a_stream_that_is_being_answered_has_its_place_until_its_end() -> None:
    async with grpc_scene(HoldLimits(max_requests=1)) as here, here.replica():
        stream = here.stream(timeout=20)
        await stream.write(b"1")
        assert await stream.read() == b"r0:1"
        error = await error_of(here.call(b"2"))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(error.details()).startswith("1 requests are here, 0 of them wait for a replica")
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
        assert await here.call(b"3") == [b"r0:3"]


async def test_a_room_full_of_bytes_refuses() -> None:
    async with grpc_scene(HoldLimits(max_bytes=1000, max_request_bytes=1000)) as here:
        here.start(here.call(b"x" * 800))
        await here.held(1)
        error = await error_of(here.call(b"x" * 300))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "requests of 800 bytes wait for a replica, and there is no place for 300 more" in str(error.details())
        assert (here.room.held_requests, here.room.held_bytes) == (1, 800)


async def test_big_messages_pass_and_too_big_ones_are_refused() -> None:
    async with grpc_scene(HoldLimits(max_request_bytes=8 * 2**20)) as here:
        big = b"x" * (8 * 2**20 - 100)

        async def returns(replica: FakeReplica, context: Any) -> None:
            if (message := await context.read()) is not grpc.aio.EOF:
                await context.write(message)

        async with here.replica(rpc=returns) as replica:
            # The replica's limit is 4 MiB: what it says comes through.
            error = await error_of(here.call(big))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert len(replica.calls) == 1
            assert await here.call(b"y" * 3 * 2**20) == [b"y" * 3 * 2**20]
        here.room.serve(())
        error = await error_of(here.call(b"x" * (8 * 2**20 + 100)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert here.room.held_requests == 0


async def test_two_hundred_held_requests_are_each_answered_exactly_once() -> None:
    async with grpc_scene() as here:
        answers = [here.start(here.call(b"%d" % number)) for number in range(200)]
        await here.held(200)
        async with here.replica(capacity=8) as replica:
            got = await asyncio.gather(*answers)
        assert got == [[b"r0:%d" % number] for number in range(200)]
        assert sorted(replica.messages, key=int) == [b"%d" % number for number in range(200)]
        assert replica.most <= 16
        assert here.room.outcomes == {"answered": 200}


async def test_who_does_not_read_stops_who_writes() -> None:
    sent = 0

    async def floods(replica: FakeReplica, context: Any) -> None:
        nonlocal sent
        await context.read()
        while True:
            await context.write(b"x" * 2**16)
            sent += 1

    async with grpc_scene() as here, here.replica(rpc=floods):
        call = here.stream()
        await call.write(b"x")
        await call.read()
        last = -1
        while sent != last:  # as long as it goes on by itself
            last = sent
            await asyncio.sleep(0.05)
        assert sent * 2**16 < 16 * 2**20  # what sockets and windows hold
        call.cancel()
        await until(lambda: not here.room._entered)


async def test_who_reads_nothing_at_the_replica_stops_the_client() -> None:
    async def deaf(replica: FakeReplica, context: Any) -> None:
        await context.write(b"first")
        await asyncio.Event().wait()

    async with grpc_scene() as here, here.replica(rpc=deaf):
        call = here.stream()
        await call.write(b"0")
        assert await call.read() == b"first"
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await call.write(b"x" * 2**16)
                sent += 1

        here.start(flood())
        last = -1
        while sent != last:
            last = sent
            await asyncio.sleep(0.05)
        assert sent * 2**16 < 16 * 2**20
        call.cancel()


async def test_a_long_stream_that_does_not_fit_goes_on_and_is_not_repeated() -> None:
    async def counts(replica: FakeReplica, context: Any) -> None:
        total = 0
        while (message := await context.read()) is not grpc.aio.EOF:
            total += len(message)
        await context.write(b"%d" % total)

    async with grpc_scene(HoldLimits(max_bytes=1000, max_request_bytes=1000)) as here, here.replica(rpc=counts):
        assert await here.call(*[b"x" * 400] * 5) == [b"2000"]


async def test_a_long_stream_that_cannot_be_repeated_ends_with_its_replica() -> None:
    async def swallows(replica: FakeReplica, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            replica.messages.append(message)

    async with (
        grpc_scene(HoldLimits(max_bytes=1000, max_request_bytes=1000)) as here,
        here.replica(rpc=swallows) as first,
        here.replica(serve=False) as second,
    ):
        here.serve(first)
        call = here.stream(timeout=10)
        for _ in range(5):
            await call.write(b"x" * 400)
        await until(lambda: len(first.messages) == 5)
        here.serve(first, second)
        await first.stop()
        assert (await error_of(call.read())).code() is grpc.StatusCode.UNAVAILABLE
        assert second.calls == []


async def test_closing_the_room_tells_who_waits_at_once() -> None:
    async with grpc_scene() as here:
        answer = here.start(here.call(b"x"))
        await here.held(1)
        here.room.close()
        for call in (answer, here.call(b"y")):
            error = await error_of(call)
            if error.code() is grpc.StatusCode.INTERNAL:  # grpc.aio's own, if a refusal overtakes what it still sends
                error = await error_of(here.call(b"z"))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert error.details() == "the activator is shutting down; retry"


@pytest.mark.parametrize("policy", ["pick_first", "round_robin"])
async def test_a_channel_moves_on_while_its_long_stream_goes_on(policy: str) -> None:
    """What stands for a Service sends new connections to the replica and leaves the old ones where they are."""
    config = f'{{"loadBalancingConfig": [{{"{policy}": {{}}}}]}}'
    async with grpc_scene(connection_seconds=0.3) as here, here.replica() as replica, Service() as service:
        service.port = int(here.grpc_address.rpartition(":")[2])
        options = [("grpc.service_config", config), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(f"dns:///localhost:{service.own_port}", options=options) as channel:
            long = channel.stream_stream(METHOD)()
            await long.write(b"0")
            assert await long.read() == b"r0:0"
            service.port = replica.address.grpc_port
            before = -1
            while here.room.outcomes["answered"] != before:  # until a request comes to the replica without us
                before = here.room.outcomes["answered"]
                call = channel.stream_stream(METHOD)(timeout=10)
                await call.write(b"x")
                await call.done_writing()
                assert [answer async for answer in call] == [b"r0:x"]
            await long.write(b"1")
            assert await long.read() == b"r0:1"
            long.cancel()


class Service:
    """A TCP port that leads new connections to `port`."""

    port: int
    own_port: int

    async def __aenter__(self) -> Service:
        self._connections: list[asyncio.Task[None]] = []
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.own_port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.append(asyncio.create_task(self._lead(reader, writer)))

    async def _lead(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        await asyncio.gather(_pump(reader, back), _pump(there, writer), return_exceptions=True)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()


async def test_a_status_that_comes_while_the_client_still_sends_is_exact_too() -> None:
    async def refuses(replica: FakeReplica, context: Any) -> None:
        await context.read()
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first is wrong", (("x-why", "because"),))

    async with grpc_scene() as here:
        calls = []
        for number in range(40):
            calls.append(here.stream(timeout=20))
            for _ in range(50):
                await calls[-1].write(b"x" * 100)
            await calls[-1].done_writing()
            await here.held(number + 1)
        async with here.replica(rpc=refuses):
            for call in calls:
                error = await error_of(call.read())
                assert (error.code(), error.details()) == (grpc.StatusCode.INVALID_ARGUMENT, "the first is wrong")
                assert hints(error) == {"x-why": "because"}
