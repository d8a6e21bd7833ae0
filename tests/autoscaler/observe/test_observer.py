"""Looks at real gRPC servers: what is seen of each, what is remembered, and who is let wait for nobody."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb

from autoscaler.fleet import Counters, Load, Phase, StepCost
from autoscaler.observe import Observer
from autoscaler.observe.servers import MAX_LOAD_BYTES
from autoscaler.settings import Settings, Target
from tests.autoscaler.observe.replicas import Spec, fleet, names, patient, pod


async def test_a_look_says_of_each_replica_what_it_says_of_itself() -> None:
    async with fleet(3) as here:
        here.replicas[1].load = pb.Load(
            phase=pb.PHASE_READY,
            queued_requests=3,
            queued_tokens=700,
            oldest_queued_seconds=1.5,
            running_requests=8,
            capacity=16,
            kv_pages_used=40,
            kv_pages_total=64,
            kv_page_tokens=16,
            max_step_tokens=512,
            step_base_seconds=0.006,
            seconds_per_prefill_token=3e-5,
            seconds_per_decode_row=2e-5,
            seconds_per_context_token=6e-8,
            arrived_requests=100,
            arrived_prompt_tokens=50_000,
            finished_requests=89,
            prompt_tokens=30_000,
            prefix_cache_hit_tokens=15_000,
            generated_tokens=20_000,
            time_to_first_token=pb.Histogram(bounds=[1.0, 3.0], counts=[70, 20, 5]),
            time_per_output_token=pb.Histogram(bounds=[0.05, 0.07], counts=[60, 20, 4]),
        )
        observer = patient()

        seen = await observer.look(here.pods, here.spec, 2000.0)

        assert names(seen) == ["pod-0", "pod-1", "pod-2"]
        assert (seen[1].phase, seen[1].observed_at, seen[1].created_at) == (Phase.READY, 2000.0, 1000.0)
        assert seen[1].load == Load(
            queued_requests=3,
            queued_tokens=700,
            oldest_queued_seconds=1.5,
            running_requests=8,
            capacity=16,
            kv_pages_used=40,
            kv_pages_total=64,
            kv_page_tokens=16,
            max_step_tokens=512,
            step_cost=StepCost(0.006, 3e-5, 2e-5, 6e-8),
            counters=Counters(
                arrived_requests=100,
                arrived_prompt_tokens=50_000,
                finished_requests=89,
                computed_prompt_tokens=30_000,
                cached_prompt_tokens=15_000,
                generated_tokens=20_000,
                first_tokens=95,
                late_first_tokens=15,  # 5, and half of those between 1 and 3 seconds: 2 are promised
                slow_requests=14,  # 4, and half of those between 50 and 70 ms: 60 are promised
            ),
        )
        assert seen[0].load == Load()
        await observer.close()


async def test_what_is_late_depends_on_what_is_promised() -> None:
    async with fleet(1) as here:
        here.replicas[0].load.time_to_first_token.CopyFrom(pb.Histogram(bounds=[1.0, 3.0], counts=[70, 20, 5]))
        observer = patient()
        late = []
        for seconds in (0.5, 1.0, 2.5, 99.0):
            spec = replace(here.spec, settings=Settings(target=Target(ttft_seconds=seconds)))
            [seen] = await observer.look(here.pods, spec, 1.0)
            assert seen.load is not None
            late.append(seen.load.counters.late_first_tokens)
        assert late == [60, 25, 10, 5]  # all above the last bound are longer than any time
        await observer.close()


async def test_a_replica_that_falls_silent_keeps_its_last_load_which_grows_old() -> None:
    async with fleet(2) as here:
        silent = here.replicas[0]
        for each in here.replicas:
            each.load.running_requests = 7
        observer = patient()
        await observer.look(here.pods, here.spec, 100.0)
        silent.code = grpc.StatusCode.UNAVAILABLE
        for each in here.replicas:
            each.load.running_requests = 9

        seen = await observer.look(here.pods, here.spec, 105.0)

        assert [(each.observed_at, each.load and each.load.running_requests) for each in seen] == [(100, 7), (105, 9)]
        assert [each.phase for each in seen] == [Phase.READY] * 2  # as the cluster says
        silent.code = None
        seen = await observer.look(here.pods, here.spec, 110.0)
        assert [(each.observed_at, each.load and each.load.running_requests) for each in seen] == [(110, 9)] * 2
        await observer.close()


async def test_nobody_waits_for_a_replica_that_hangs() -> None:
    async with fleet(3) as here:
        here.replicas[1].hangs = True
        observer = Observer(seconds=600.0, look_seconds=0.5)
        began = time.monotonic()

        seen = await observer.look(here.pods, here.spec, 1.0)

        assert time.monotonic() - began < 60
        assert [each.load is not None for each in seen] == [True, False, True]
        await observer.close()


async def test_one_answer_has_a_limit_of_its_own() -> None:
    async with fleet(2) as here:
        here.replicas[1].hangs = True
        observer = Observer(seconds=0.3, look_seconds=600.0)
        seen = await observer.look(here.pods, here.spec, 1.0)
        assert [each.load is not None for each in seen] == [True, False]
        await observer.close()


async def test_a_look_that_is_called_off_leaves_nothing_running() -> None:
    async with fleet(1) as here:
        here.replicas[0].hangs = True
        observer = patient()
        look = asyncio.create_task(observer.look(here.pods, here.spec, 1.0))
        await here.replicas[0].reached.wait()
        look.cancel()
        with pytest.raises(asyncio.CancelledError):
            await look
        assert [each for each in asyncio.all_tasks() if "Servers.ask" in repr(each)] == []
        await observer.close()


# -- phases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cluster", "server", "merged"),
    [
        (Phase.STARTING, None, Phase.STARTING),
        (Phase.STARTING, pb.PHASE_LOADING, Phase.LOADING),
        (Phase.STARTING, pb.PHASE_READY, Phase.READY),  # the kubelet will see it at its next probe
        (Phase.STARTING, pb.PHASE_UNSPECIFIED, Phase.STARTING),
        (Phase.READY, None, Phase.READY),
        (Phase.READY, pb.PHASE_READY, Phase.READY),
        (Phase.READY, pb.PHASE_LOADING, Phase.LOADING),  # its engine was lost
        (Phase.READY, pb.PHASE_DRAINING, Phase.DRAINING),
        (Phase.READY, pb.PHASE_FAILED, Phase.FAILED),
        (Phase.READY, pb.PHASE_UNLOADED, Phase.FAILED),
        (Phase.READY, 99, Phase.READY),
        (Phase.DRAINING, pb.PHASE_READY, Phase.DRAINING),
        (Phase.DRAINING, pb.PHASE_DRAINING, Phase.DRAINING),
        (Phase.FAILED, pb.PHASE_READY, Phase.FAILED),
        (Phase.PENDING, pb.PHASE_READY, Phase.PENDING),
    ],
)
async def test_the_phase_is_what_both_sides_know(cluster: Phase, server: Any, merged: Phase) -> None:
    async with fleet(1) as here:
        [replica] = here.replicas
        if server is None:
            replica.code = grpc.StatusCode.UNAVAILABLE
        else:
            replica.load.phase = server
        observer = patient()
        [seen] = await observer.look([pod("p", cluster, ip=replica.ip)], here.spec, 1.0)
        assert seen.phase is merged
        assert bool(replica.asked) == (cluster not in (Phase.FAILED, Phase.PENDING))
        await observer.close()


async def test_what_the_cluster_knows_of_a_pod_without_an_address_is_told_on() -> None:
    observer = Observer()
    [seen] = await observer.look([pod("p", Phase.PENDING, unschedulable_since=40.0)], Spec(8001, 8000), 50.0)
    assert (seen.phase, seen.unschedulable_since, seen.load, seen.ready_at) == (Phase.PENDING, 40.0, None, None)
    assert await observer.look([], Spec(8001, 8000), 55.0) == ()
    await observer.close()


async def test_a_server_that_loads_says_for_how_long_even_when_it_is_too_busy_to_answer() -> None:
    async with fleet(1) as here:
        [replica] = here.replicas
        replica.load = pb.Load(phase=pb.PHASE_LOADING, progress=0.2, eta_seconds=60.0)
        loading = pod("p", Phase.STARTING, ip=replica.ip)
        observer = patient()

        async def look(at: float, restarts: int = 0) -> tuple[Phase, float | None]:
            [seen] = await observer.look([replace(loading, restarts=restarts)], here.spec, at)
            return seen.phase, seen.eta_seconds

        assert await look(100.0) == (Phase.LOADING, 60.0)
        replica.code = grpc.StatusCode.UNAVAILABLE
        assert await look(110.0) == (Phase.LOADING, 50.0)
        assert await look(500.0) == (Phase.LOADING, 0.0)
        assert await look(501.0, restarts=1) == (Phase.STARTING, None)
        replica.code, replica.load.phase = None, pb.PHASE_READY
        assert await look(510.0, restarts=1) == (Phase.READY, None)
        await observer.close()


async def test_a_server_that_is_too_busy_to_answer_anybody_serves_all_the_same() -> None:
    """The kubelet's probe fails as the look does; it may have a full batch."""
    async with fleet(1) as here:
        [replica] = here.replicas
        observer = patient()
        ready = pod("p", Phase.READY, ip=replica.ip)
        await observer.look([ready], here.spec, 100.0)
        replica.code = grpc.StatusCode.UNAVAILABLE
        [seen] = await observer.look([replace(ready, phase=Phase.STARTING)], here.spec, 105.0)
        assert (seen.phase, seen.observed_at) == (Phase.READY, 100.0)
        [seen] = await observer.look([replace(ready, phase=Phase.STARTING, restarts=1)], here.spec, 110.0)
        assert seen.phase is Phase.STARTING
        await observer.close()


async def test_ready_is_when_it_became_ready_first() -> None:
    async with fleet(1) as here:
        [replica] = here.replicas
        starting = pod("p", Phase.STARTING, ip=replica.ip)
        observer = patient()
        replica.load.phase = pb.PHASE_LOADING
        [seen] = await observer.look([starting], here.spec, 100.0)
        assert seen.ready_at is None
        replica.load.phase = pb.PHASE_READY
        [seen] = await observer.look([replace(starting, phase=Phase.READY, ready_since=103.0)], here.spec, 105.0)
        assert seen.ready_at == 103.0
        [seen] = await observer.look([replace(starting, phase=Phase.READY, ready_since=200.0)], here.spec, 205.0)
        assert seen.ready_at == 103.0
        await observer.close()


@pytest.mark.parametrize(
    ("facts", "ready_at"),
    [
        ({"phase": Phase.READY, "ready_since": 1103.0}, 1103.0),
        ({"phase": Phase.READY, "ready_since": 300_000.0}, 1000.0),  # it was, days ago, and went back since
        ({"phase": Phase.READY, "ready_since": 1103.0, "restarts": 1}, 1000.0),
        ({"phase": Phase.STARTING, "restarts": 1}, 1000.0),
        ({"phase": Phase.STARTING, "came_up": True}, 1000.0),  # overloaded
        ({"phase": Phase.STARTING}, None),
    ],
)
async def test_a_restart_of_the_operator_takes_no_old_replica_for_a_long_start(
    facts: dict[str, Any], ready_at: float | None
) -> None:
    observer = Observer()
    [seen] = await observer.look([pod("p", **facts)], Spec(8001, 8000), 400_000.0)
    assert seen.ready_at == ready_at
    await observer.close()


# -- memory ------------------------------------------------------------------------------------------------------------


async def test_counters_go_on_where_an_engine_or_a_server_starts_anew() -> None:
    async with fleet(1) as here:
        [replica] = here.replicas
        observer = patient()

        async def look(arrived: int, generated: int, *waits: int) -> Counters:
            replica.load = pb.Load(
                phase=pb.PHASE_READY,
                arrived_requests=arrived,
                generated_tokens=generated,
                time_to_first_token=pb.Histogram(bounds=[1.0, 2.0], counts=waits),
            )
            [seen] = await observer.look(here.pods, here.spec, 1.0)
            assert seen.load is not None
            return seen.load.counters

        before = await look(1000, 50_000, 900, 80, 10)
        after = await look(1010, 300, 905, 82, 12)  # the engine died
        assert after.arrived_requests - before.arrived_requests == 10
        assert after.generated_tokens - before.generated_tokens == 300
        assert (after.first_tokens - before.first_tokens, after.late_first_tokens) == (9, 12)
        last = await look(20, 700, 4, 15, 1)  # the server died
        assert last.arrived_requests - after.arrived_requests == 20
        assert last.generated_tokens - after.generated_tokens == 400
        assert (last.first_tokens - after.first_tokens, last.late_first_tokens) == (20, 13)
        await observer.close()


async def test_another_pod_at_the_same_address_is_another_replica() -> None:
    async with fleet(1) as here:
        [replica] = here.replicas
        observer = patient()
        replica.load.arrived_requests = 50
        await observer.look([pod("old", ip=replica.ip)], here.spec, 1.0)
        replica.code = grpc.StatusCode.UNAVAILABLE
        [seen] = await observer.look([pod("new", ip=replica.ip)], here.spec, 2.0)
        assert (seen.load, seen.observed_at) == (None, 0.0)
        await observer.close()


async def test_each_pod_has_one_channel_for_as_long_as_it_is_there() -> None:
    async with fleet(3) as here:
        observer = patient()
        channels = observer._servers._channels
        await observer.look(here.pods, here.spec, 1.0)
        first = dict(channels)
        await observer.look(here.pods, here.spec, 2.0)
        assert channels == first
        await observer.look(here.pods[1:], here.spec, 3.0)
        assert [each.uid for each in channels] == ["uid of pod-1", "uid of pod-2"]
        closed = next(channel for address, channel in first.items() if address.uid == "uid of pod-0")
        assert closed.get_state() is grpc.ChannelConnectivity.SHUTDOWN
        await observer.close()
        assert channels == {}


# -- answers that make no sense ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"oldest_queued_seconds": float("nan")},
        {"step_base_seconds": float("inf")},
        {"seconds_per_prefill_token": -1e-5},
        {"queued_tokens": 2**63},
        {"phase": -3},
        {"eta_seconds": -1.0, "phase": pb.PHASE_LOADING},
        {"time_to_first_token": pb.Histogram(bounds=[1.0], counts=[1])},
        {"time_to_first_token": pb.Histogram(bounds=[2.0, 1.0], counts=[1, 1, 1])},
        {"time_to_first_token": pb.Histogram(bounds=[float("nan")], counts=[1, 1])},
        {"time_to_first_token": pb.Histogram(bounds=range(1, 300), counts=[0] * 300)},
    ],
    ids=str,
)
async def test_an_answer_that_makes_no_sense_is_none(fields: dict[str, Any]) -> None:
    async with fleet(2) as here:
        odd = here.replicas[0]
        observer = patient()
        await observer.look(here.pods, here.spec, 1.0)
        odd.load = pb.Load(**{"phase": pb.PHASE_READY, "running_requests": 9} | fields)
        seen = await observer.look(here.pods, here.spec, 2.0)
        assert [each.observed_at for each in seen] == [1.0, 2.0]
        assert seen[0].load == Load()
        await observer.close()


@pytest.mark.parametrize("raw", [b"\xff" * 50, b"no message", bytes(MAX_LOAD_BYTES + 1)], ids=["bits", "text", "large"])
async def test_bytes_that_are_no_message_or_too_many_are_no_answer(raw: bytes) -> None:
    async with fleet(2) as here:
        here.replicas[0].raw = raw
        observer = patient()
        seen = await observer.look(here.pods, here.spec, 1.0)
        assert [each.load is not None for each in seen] == [False, True]
        await observer.close()


async def test_an_address_that_is_none_stops_nobody_else() -> None:
    async with fleet(1) as here:
        observer = patient()
        seen = await observer.look([pod("odd", ip="dns:///evil"), *here.pods], here.spec, 1.0)
        assert [each.load is not None for each in seen] == [False, True]
        await observer.close()
