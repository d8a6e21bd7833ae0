"""The loop of whole processes, two of them, over a cluster that misbehaves."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from autoscaler.cluster.client import connect
from autoscaler.cluster.events import Recorder
from autoscaler.cluster.face import DEPLOYMENTS, LEASES, PODS, QUEUE_AUTOSCALERS
from autoscaler.cluster.lease import FencedCluster, Lease
from autoscaler.controller.controller import Controller
from autoscaler.controller.drain import DRAINING, SERVES
from autoscaler.controller.metrics import Metrics
from autoscaler.controller.reconcile import Reconciler, Tools
from autoscaler.controller.tend import Tender
from tests.autoscaler.api_under_test import definition
from tests.autoscaler.controller.clock import Time, TurnedClock, until
from tests.autoscaler.controller.line import Line
from tests.autoscaler.controller.scene import ACCOUNT, NAME, Ears, Word, grant, scaler, workload
from tests.autoscaler.fake_api import FakeApi, Fault
from tests.autoscaler.fake_api.workloads import Workloads

LEASE = "operator"


class Process:
    """An operator without its ports."""

    def __init__(self, name: str, line: Line, clock: TurnedClock, word: Word) -> None:
        self.name, self.line = name, line
        self.metrics = Metrics()
        self.lease = Lease(line, LEASE, name, clock=clock)
        fenced = FencedCluster(line, self.lease)
        tools = Tools(fenced, Recorder(fenced, name, clock), self.metrics, clock, Ears, lambda settings: word)

        def tender(name: str, gone: Callable[[str], None]) -> Tender:
            return Tender(Reconciler(name, tools), fenced, self.metrics, clock, front=None, gone=gone)

        self.controller = Controller(line, self.lease, tender, self.metrics, clock)
        self.task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self.task = asyncio.create_task(self.controller.run())

    async def stop(self) -> None:
        """As by SIGTERM."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)

    def looks(self, result: str = "ok", name: str = NAME) -> float:
        labels = {"autoscaler": name, "result": result}
        found = self.metrics.registry.get_sample_value("nemoserve_autoscaler_reconcile_total", labels)
        return found or 0.0

    def api_errors(self, code: int) -> float:
        found = self.metrics.registry.get_sample_value("nemoserve_autoscaler_api_errors_total", {"code": str(code)})
        return found or 0.0

    @property
    def leads(self) -> bool:
        return self.metrics.registry.get_sample_value("nemoserve_autoscaler_leader") == 1


class Stage:
    def __init__(self, api: FakeApi, clock: TurnedClock, word: Word, a: Process, b: Process) -> None:
        self.api, self.clock, self.word, self.a, self.b = api, clock, word, a, b

    @property
    def asked(self) -> int:
        asked: int = self.api.get(DEPLOYMENTS, NAME)["spec"]["replicas"]
        return asked

    async def lead_by_a(self) -> None:
        self.a.start()
        await until(lambda: self.a.looks() >= 1)
        self.b.start()
        await until(lambda: self.b.lease.holder == "a" and self.b.controller.ready)

    async def turn_until(self, condition: Callable[[], bool], step: float = 1.0) -> None:
        await self.clock.turn_until(condition, step)


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    """Two processes, not started; their walls differ by two hours. One replica serves."""
    time, word = Time(), Word()
    clock = TurnedClock(time)
    async with AsyncExitStack() as stack:
        api = await stack.enter_async_context(FakeApi(clock=clock.wall))
        await stack.enter_async_context(Workloads(api))
        api.apply(copy.deepcopy(definition()))
        api.apply(workload("Deployment", 1), scaler())
        processes = []
        for name, skew in (("a", -3600.0), ("b", 3600.0)):
            grant(api, name)
            config = str(api.kubeconfig(tmp_path, ACCOUNT + name))
            line = Line(await stack.enter_async_context(connect(config, namespace="default")))
            time.lines.append(line)
            processes.append(Process(name, line, TurnedClock(time, skew), word))
        yield Stage(api, clock, word, *processes)
        for each in processes:
            await each.stop()


def writers(stage: Stage) -> list[str]:
    """Whoever changed anything but the lease, without repetitions of the one before."""
    found: list[str] = []
    for call in stage.api.writes():
        name = call.request.user.removeprefix(ACCOUNT)
        if call.resource != "leases" and found[-1:] != [name]:
            found.append(name)
    return found


# -- who leads -------------------------------------------------------------------------------------------------------


async def test_one_of_two_acts_and_the_other_waits(stage: Stage) -> None:
    await stage.lead_by_a()
    stage.word.desired = 3
    await stage.turn_until(lambda: stage.asked == 3)
    assert (stage.a.leads, stage.b.leads) == (True, False)
    assert stage.b.looks() == 0
    assert writers(stage) == ["a"]


async def test_one_that_ends_is_followed_by_the_other_at_once(stage: Stage) -> None:
    await stage.lead_by_a()
    await stage.a.stop()
    assert stage.api.get(LEASES, LEASE)["spec"]["holderIdentity"] == ""
    began = stage.clock.time.now
    stage.word.desired = 2
    await stage.turn_until(lambda: stage.asked == 2, step=0.5)
    assert stage.clock.time.now - began < 5
    assert writers(stage) == ["a", "b"]


async def test_one_that_is_cut_off_is_followed_and_when_it_is_back_it_waits(stage: Stage) -> None:
    await stage.lead_by_a()
    stage.a.line.up = False
    await stage.turn_until(lambda: stage.b.looks() >= 1)
    stage.a.line.up = True
    stage.word.desired = 4
    await stage.turn_until(lambda: stage.asked == 4)
    await stage.turn_until(lambda: stage.a.lease.holder == "b")
    assert (stage.a.leads, stage.b.leads) == (False, True)
    assert writers(stage) == ["a", "b"]


async def test_two_that_fight_for_it_never_write_in_turns(stage: Stage) -> None:
    await stage.lead_by_a()
    terms = ["a"]
    for number in range(6):
        leader = stage.a if stage.a.leads else stage.b
        other = stage.b if leader is stage.a else stage.a
        if number % 2:
            leader.line.up = False
        else:
            await leader.stop()
        before = other.looks()
        await stage.turn_until(lambda other=other, before=before: other.leads and other.looks() > before)  # type: ignore[misc]
        terms.append(other.name)
        stage.word.desired = 1 + (number + 1) % 4
        await stage.turn_until(lambda: stage.asked == stage.word.desired)
        leader.line.up = True
        if leader.task is not None and leader.task.done():
            leader.start()
        await stage.turn_until(lambda leader=leader, other=other: leader.lease.holder == other.name)  # type: ignore[misc]
    assert writers(stage) == terms
    assert len(terms) == 7


# -- what there is to look at ----------------------------------------------------------------------------------------


async def test_a_new_resource_is_looked_at_and_one_that_is_gone_no_more(stage: Stage) -> None:
    await stage.lead_by_a()
    stage.api.apply(scaler(name="late"))
    await stage.turn_until(lambda: stage.a.looks(name="late") >= 1)
    resource = stage.api.machinery.resource("autoscaling.nemoserve.dev", "queueautoscalers")
    stage.api.machinery.delete(resource, "default", "late", {})
    await stage.turn_until(lambda: stage.a.looks("gone", "late") == 1)
    seen = stage.a.looks(name="late")
    stage.clock.turn(60)
    await stage.clock.settle()
    assert (stage.a.looks(name="late"), stage.a.looks("gone", "late")) == (seen, 1)
    stage.api.apply(scaler(name="late"))
    await stage.turn_until(lambda: stage.a.looks(name="late") > seen)


async def test_a_change_of_the_resource_wakes_it_before_its_time(stage: Stage) -> None:
    await stage.lead_by_a()
    await stage.turn_until(lambda: stage.a.looks() >= 3)
    before, began = stage.a.looks(), stage.clock.time.now
    resource = stage.api.machinery.resource("autoscaling.nemoserve.dev", "queueautoscalers")
    stage.api.machinery.update(resource, "default", NAME, lambda old: old | {"spec": old["spec"] | {"maxReplicas": 9}})
    await stage.turn_until(lambda: stage.a.looks() > before, step=0.25)
    assert stage.clock.time.now - began < 4


# -- an API server that misbehaves -----------------------------------------------------------------------------------


async def test_a_watch_that_began_too_long_ago_lists_anew(stage: Stage) -> None:
    await stage.lead_by_a()
    stage.api.apply(scaler(name="late"))
    stage.api.store.compact()
    began = stage.clock.time.now
    await stage.turn_until(lambda: stage.a.looks(name="late") >= 1)
    assert stage.clock.time.now - began < 60
    assert stage.a.api_errors(410) + stage.b.api_errors(410) >= 1


async def test_a_watch_that_says_nothing_any_more_costs_an_interval(stage: Stage) -> None:
    stage.api.faults.append(Fault(verb="watch", silent=True, times=None))
    await stage.lead_by_a()
    stage.word.desired = 3
    began = stage.clock.time.now
    await stage.turn_until(lambda: stage.asked == 3)
    assert stage.clock.time.now - began <= 6


@pytest.mark.parametrize(
    ("code", "asked", "least", "most"),
    [(429, 20, 20, 31), pytest.param(503, 3600, 60, 91, id="503, an hour: a minute or so")],
)
async def test_who_is_asked_to_wait_waits(stage: Stage, code: int, asked: int, least: float, most: float) -> None:
    await stage.lead_by_a()
    stage.api.faults.append(Fault(verb="get", path="/deployments/nemo/scale", code=code, retry_after=asked))
    await stage.turn_until(lambda: stage.a.looks("error") == 1)
    looks, began = stage.a.looks(), stage.clock.time.now
    await stage.turn_until(lambda: stage.a.looks() > looks)
    assert least <= stage.clock.time.now - began <= most
    assert stage.a.api_errors(code) == 1


async def test_errors_are_tried_again_ever_more_slowly_until_they_are_over(stage: Stage) -> None:
    await stage.lead_by_a()
    fault = Fault(verb="get", path="/queueautoscalers/nemo", code=500, times=None)
    stage.api.faults.append(fault)
    began = stage.clock.time.now
    await stage.turn_until(lambda: stage.a.looks("error") >= 6, step=0.25)
    assert stage.clock.time.now - began > 0.25 * (1 + 2 + 4 + 8 + 16)
    assert stage.a.leads
    stage.api.faults.remove(fault)
    looks = stage.a.looks()
    stage.word.desired = 2
    await stage.turn_until(lambda: stage.a.looks() > looks)
    await stage.turn_until(lambda: stage.asked == 2)


async def test_a_conflict_is_looked_at_again_soon(stage: Stage) -> None:
    await stage.lead_by_a()
    resource = stage.api.machinery.resource("apps", "deployments")

    def change() -> None:
        labels = {"touched": "yes"}
        stage.api.machinery.update(
            resource, "default", NAME, lambda old: old | {"metadata": old["metadata"] | {"labels": labels}}
        )

    stage.word.desired, stage.word.meanwhile = 3, change
    await stage.turn_until(lambda: stage.a.looks("conflict") == 1)
    began = stage.clock.time.now
    await stage.turn_until(lambda: stage.asked == 3, step=0.25)
    assert stage.clock.time.now - began <= 1


async def test_an_api_server_that_starts_anew_is_found_again(stage: Stage) -> None:
    await stage.lead_by_a()
    await stage.api.stop()
    stage.clock.turn(3)
    await stage.clock.settle()
    await stage.api.start()
    stage.word.desired = 3
    stage.api.apply(scaler(name="late"))
    await stage.turn_until(lambda: stage.asked == 3 and stage.a.looks(name="late") + stage.b.looks(name="late") >= 1)
    assert writers(stage) in (["a"], ["a", "b"])


async def test_a_process_that_has_not_reached_the_api_server_is_not_ready(stage: Stage) -> None:
    stage.b.line.up = False
    stage.b.start()
    await stage.turn_until(lambda: stage.clock.time.now >= 20)
    assert not stage.b.controller.ready
    stage.b.line.up = True
    await stage.turn_until(lambda: stage.b.controller.ready)
    await stage.turn_until(lambda: stage.b.looks() >= 1)


async def test_a_fault_of_ours_in_one_resource_does_not_stop_the_others(stage: Stage) -> None:
    await stage.lead_by_a()

    def fail() -> None:
        raise RuntimeError("a fault of ours")

    stage.word.meanwhile = fail
    await stage.turn_until(lambda: stage.a.looks("error") == 1)
    looks = stage.a.looks()
    await stage.turn_until(lambda: stage.a.looks() > looks)
    assert stage.api.get(QUEUE_AUTOSCALERS, NAME)["status"]["desired"] == 1


async def test_a_fault_outside_of_all_looks_ends_the_process_and_gives_the_lease_back(stage: Stage) -> None:
    def broken(name: str, gone: Callable[[str], None]) -> Tender:
        raise OSError("a key cannot be read")

    process = stage.a
    process.controller = Controller(process.line, process.lease, broken, process.metrics, stage.clock)
    process.start()
    assert process.task is not None
    await until(process.task.done)
    with pytest.raises(ExceptionGroup) as ended:
        await process.task
    assert isinstance(ended.value.exceptions[0], OSError)
    await stage.b.lease.acquire()


async def test_what_was_begun_is_tidied_up_though_the_api_server_fails_at_first(stage: Stage) -> None:
    """Else what drained would not serve again, and a pod of ours would be an endpoint, for ever."""
    stage.word.desired = 2
    await stage.lead_by_a()
    await stage.turn_until(lambda: stage.asked == 2 and len(stage.api.list(PODS, label_selector=SERVES)) == 2)
    stage.word.desired = 1
    await stage.turn_until(lambda: len(stage.api.list(PODS, label_selector=DRAINING)) == 1, step=0.25)
    stage.api.faults.append(Fault(verb="patch", path="/pods/", code=500))
    resource = stage.api.machinery.resource("autoscaling.nemoserve.dev", "queueautoscalers")
    stage.api.machinery.delete(resource, "default", NAME, {})
    await stage.turn_until(lambda: len(stage.api.list(PODS, label_selector=SERVES)) == 2)
    assert stage.asked == 2
