"""The lease over the real client and real HTTP: one leads, however wrong clocks are and whatever becomes of lines."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from autoscaler.clock import SystemClock
from autoscaler.cluster.client import connect
from autoscaler.cluster.face import LEASES, PODS
from autoscaler.cluster.lease import FencedCluster, Lease, LeaseTimes, NotLeaderError
from tests.autoscaler.controller.clock import Time, TurnedClock, until
from tests.autoscaler.controller.line import Line
from tests.autoscaler.fake_api import FakeApi, Fault

HOUR = 3600.0
NAME = "operator"


class Process:
    """One that wants to lead."""

    def __init__(self, name: str, line: Line, clock: TurnedClock) -> None:
        self.line, self.clock = line, clock
        self.lease = Lease(line, NAME, name, clock=clock)
        self.task: asyncio.Task[None] | None = None

    @property
    def leads(self) -> bool:
        return self.lease.left > 0

    def stand(self) -> None:
        async def forever() -> None:
            while True:
                await self.lease.acquire()
                await self.lease.keep()

        self.task = asyncio.create_task(forever())

    async def die(self) -> None:
        """Without a word."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
            self.task = None


class Stage:
    def __init__(self, api: FakeApi, processes: dict[str, Process]) -> None:
        self.api, self.processes = api, processes
        self.clock = processes["a"].clock

    def __getitem__(self, name: str) -> Process:
        return self.processes[name]

    @property
    def leaders(self) -> list[str]:
        return [name for name, each in self.processes.items() if each.leads]

    @property
    def spec(self) -> dict[str, object]:
        found: dict[str, object] = self.api.get(LEASES, NAME)["spec"]
        return found


@pytest.fixture(params=[(0.0, 0.0), (-HOUR, HOUR), (HOUR, -HOUR)], ids=["same", "behind", "ahead"])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    """Two processes, a and b, with walls that differ by the hours of the parameter."""
    time = Time()
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(FakeApi())
        processes = {}
        for name, skew in zip("ab", request.param, strict=True):
            cluster = await stack.enter_async_context(connect(str(api.kubeconfig(tmp_path))))
            time.lines.append(Line(cluster))
            processes[name] = Process(name, time.lines[-1], TurnedClock(time, skew))
        yield Stage(api, processes)
        for each in processes.values():
            await each.die()


async def lead_by_a(stage: Stage) -> None:
    stage["a"].stand()
    await until(lambda: stage["a"].leads)
    stage["b"].stand()
    await until(lambda: stage["b"].lease.holder == "a")


async def test_the_first_leads_and_keeps_it(stage: Stage) -> None:
    await lead_by_a(stage)
    for _ in range(30):
        stage.clock.turn(1.0)
        await stage.clock.settle()
        assert stage["a"].lease.left > 6
        assert stage.leaders == ["a"]
    assert (stage.spec["holderIdentity"], stage.spec["leaseDurationSeconds"]) == ("a", 15)
    assert stage.spec["leaseTransitions"] == 0


async def test_one_that_says_nothing_any_more_is_followed_after_the_duration_and_not_before(stage: Stage) -> None:
    await lead_by_a(stage)
    await stage["a"].die()
    began = stage.clock.time.now
    await stage.clock.turn_until(lambda: stage["b"].leads, step=0.5)
    assert 15.0 <= stage.clock.time.now - began < 15.0 + 2.4 + 2.0
    assert stage.spec["leaseTransitions"] == 1


async def test_one_that_is_cut_off_stops_before_another_begins(stage: Stage) -> None:
    await lead_by_a(stage)
    stage["a"].line.up = False
    began = stage.clock.time.now
    await stage.clock.turn_until(lambda: not stage["a"].leads, step=0.5)
    assert stage.clock.time.now - began <= 10.0
    assert not stage["b"].leads
    await stage.clock.turn_until(lambda: stage["b"].leads, step=0.5)
    stage["a"].line.up = True
    await stage.clock.turn_until(lambda: stage["a"].lease.holder == "b")
    assert stage.leaders == ["b"]


async def test_a_holder_counts_from_before_it_asked_however_late_the_answer_comes(stage: Stage) -> None:
    stage["a"].line.answering = lambda: stage.clock.turn(2.0)
    stage["a"].stand()
    await until(lambda: stage["a"].leads)
    assert stage["a"].lease.left <= 10.0 - 2.0


async def test_one_that_gives_it_back_is_followed_at_the_next_try(stage: Stage) -> None:
    await lead_by_a(stage)
    await stage["a"].die()
    await stage["a"].lease.release()
    assert stage.spec["holderIdentity"] == ""
    assert not stage["a"].leads
    began = stage.clock.time.now
    await stage.clock.turn_until(lambda: stage["b"].leads, step=0.5)
    assert stage.clock.time.now - began <= 1.2 + 0.5


async def test_who_does_not_lead_writes_nothing(stage: Stage) -> None:
    fenced = FencedCluster(stage["a"].line, stage["a"].lease)
    with pytest.raises(NotLeaderError, match="a does not hold the lease operator"):
        await fenced.patch(PODS, "x", {})
    await lead_by_a(stage)
    await fenced.create(PODS, {"metadata": {"name": "x"}, "spec": {"containers": [{"name": "x", "image": "x"}]}})
    stage["a"].line.up = False
    stage.clock.turn(10.0)  # it may not even have noticed
    with pytest.raises(NotLeaderError):
        await fenced.patch(PODS, "x", {"metadata": {"labels": {"a": "b"}}})
    assert "labels" not in stage.api.get(PODS, "x")["metadata"]


async def test_a_write_that_takes_longer_than_the_lead_is_given_up(tmp_path: Path) -> None:
    async with FakeApi() as api, connect(str(api.kubeconfig(tmp_path))) as cluster:
        lease = Lease(cluster, NAME, "a", LeaseTimes(duration=0.6, deadline=0.4, retry=0.1), SystemClock())
        await lease.acquire()
        api.faults.append(Fault(verb="patch", path="/pods/", delay=3.0))
        with pytest.raises(NotLeaderError, match="ended while a write was under way"):
            await FencedCluster(cluster, lease).patch(PODS, "x", {})


async def test_never_two_whatever_becomes_of_lines_and_processes(stage: Stage) -> None:
    chance = random.Random(int(stage.clock.skew) + 1)
    for each in stage.processes.values():
        each.stand()
    terms = 0
    before: list[str] = []
    for _ in range(150):
        process = stage[(stage.leaders or chance.sample("ab", 1))[0]]  # whom it would hurt
        match chance.randrange(16):
            case 0:
                process.line.up = False
            case 1 if process.task is not None:
                await process.die()
                if chance.random() < 0.5:
                    await process.lease.release()
            case 2:
                stage.api.faults.append(Fault(verb="update", path="/leases/", code=500, after=chance.random() < 0.5))
            case 3 | 4:
                back = stage[chance.choice("ab")]
                back.line.up = True
                if back.task is None:
                    back.stand()
        stage.clock.turn(chance.choice([0.5, 1.0, 2.0, 5.0]))
        assert len(stage.leaders) <= 1
        await (stage.clock.settle() if chance.random() < 0.9 else asyncio.sleep(0.001))
        assert len(stage.leaders) <= 1
        terms += stage.leaders not in ([], before)
        before = stage.leaders or before
    assert terms >= 2  # else nothing was tried
