"""The fake's workloads: pods come and go as a real cluster makes them, with a program in each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from autoscaler.cluster import objects
from autoscaler.cluster.face import DEPLOYMENTS, PODS, STATEFUL_SETS, Kind
from autoscaler.fleet import Phase
from tests.autoscaler.fake_api import Container, FakeApi, Workloads, endpoints
from tests.autoscaler.fake_api.errors import Json
from tests.autoscaler.fake_api.nodes import owner_of
from tests.autoscaler.fake_api.workloads import victims


def workload(replicas: int, kind: str = "Deployment", **spec: Any) -> Json:
    labels = {"app": "nemo"}
    template = {
        "metadata": {"labels": labels | {"serves": "nemo"}},
        "spec": {"containers": [{"name": "server"}], "terminationGracePeriodSeconds": 5},
    }
    whole = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template} | spec
    return {"kind": kind, "apiVersion": "apps/v1", "metadata": {"name": "nemo"}, "spec": whole}


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


def pods(api: FakeApi) -> list[objects.Pod]:
    return [objects.pod(item) for item in api.list(PODS)]


def phases(api: FakeApi) -> list[Phase]:
    return sorted((pod.phase for pod in pods(api)), key=list(Phase).index)


def change(api: FakeApi, kind: Kind, name: str, **parts: Json) -> None:
    api.update(kind, name, lambda old: old | {key: old[key] | parts[key] for key in parts})


def scale(api: FakeApi, replicas: int, kind: Kind = DEPLOYMENTS) -> None:
    change(api, kind, "nemo", spec={"replicas": replicas})


async def test_replicas_become_pods_with_addresses_of_their_own(api: FakeApi) -> None:
    api.apply(workload(3))
    async with Workloads(api):
        await api.until(lambda: phases(api) == [Phase.READY] * 3)
        await api.until(lambda: api.get(DEPLOYMENTS, "nemo")["status"].get("readyReplicas") == 3)
        assert len({pod.ip for pod in pods(api)}) == 3
        assert {owner["kind"] for each in api.list(PODS) if (owner := owner_of(each))} == {"ReplicaSet"}
        assert sorted(endpoints(api, "serves=nemo")) == sorted(pod.ip or "" for pod in pods(api))


async def test_who_waits_for_a_node_is_ended_before_who_has_one(api: FakeApi) -> None:
    api.apply(workload(3))
    async with Workloads(api, room=2) as cluster:
        await api.until(lambda: phases(api) == [Phase.PENDING, Phase.READY, Phase.READY])
        [waiting] = [pod for pod in pods(api) if pod.phase is Phase.PENDING]
        assert waiting.unschedulable_since is not None
        assert waiting.unschedulable_since is not None
        scale(api, 2)
        await api.until(lambda: waiting.name not in {pod.name for pod in pods(api)})
        assert phases(api) == [Phase.READY, Phase.READY]
        scale(api, 3)
        await api.until(lambda: Phase.PENDING in phases(api))
        cluster.make_room(3)
        await api.until(lambda: phases(api) == [Phase.READY] * 3)


async def test_the_cheapest_pod_is_ended_and_has_its_time(api: FakeApi) -> None:
    told, leave = asyncio.Event(), asyncio.Event()

    async def program(container: Container) -> None:
        container.ready()
        await container.stopping.wait()
        told.set()
        await leave.wait()

    api.apply(workload(3))
    async with Workloads(api, program):
        await api.until(lambda: phases(api) == [Phase.READY] * 3)
        victim = pods(api)[1]
        change(api, PODS, victim.name, metadata={"annotations": {objects.DELETION_COST: "-1000"}})
        scale(api, 2)
        await told.wait()
        assert {pod.name: pod.phase for pod in pods(api)}[victim.name] is Phase.DRAINING
        assert victim.ip not in endpoints(api, "serves=nemo")
        leave.set()
        await api.until(lambda: len(pods(api)) == 2)
        assert victim.name not in {pod.name for pod in pods(api)}


async def test_a_program_that_stays_is_killed_when_its_grace_is_over(api: FakeApi) -> None:
    killed = asyncio.Event()

    async def program(container: Container) -> None:
        container.ready()
        try:
            await asyncio.Event().wait()
        finally:
            killed.set()

    body = workload(1)
    body["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] = 1
    api.apply(body)
    async with Workloads(api, program):
        await api.until(lambda: phases(api) == [Phase.READY])
        scale(api, 0)
        await api.until(lambda: pods(api) == [])
        assert killed.is_set()


async def test_a_program_that_ends_is_started_again(api: FakeApi) -> None:
    starts: list[str] = []

    async def program(container: Container) -> None:
        starts.append(container.ip)
        if len(starts) == 1:
            raise RuntimeError("no GPU")
        container.ready()
        await container.stopping.wait()

    api.apply(workload(1))
    async with Workloads(api, program):
        await api.until(lambda: phases(api) == [Phase.FAILED])
        [server] = api.list(PODS)[0]["status"]["containerStatuses"]
        assert server["state"]["waiting"]["reason"] == "CrashLoopBackOff"
        await api.until(lambda: phases(api) == [Phase.READY])
        assert pods(api)[0].restarts == 1
        assert len(set(starts)) == 1


async def test_a_pod_without_the_label_has_no_traffic_and_keeps_its_place(api: FakeApi) -> None:
    api.apply(workload(2))
    async with Workloads(api):
        await api.until(lambda: phases(api) == [Phase.READY] * 2)
        first = pods(api)[0]
        change(api, PODS, first.name, metadata={"labels": {"app": "nemo"}})
        assert endpoints(api, "serves=nemo") == [pods(api)[1].ip]
        scale(api, 3)
        await api.until(lambda: phases(api) == [Phase.READY] * 3)
        assert first.name in {pod.name for pod in pods(api)}


async def test_with_the_workload_go_its_pods(api: FakeApi) -> None:
    api.apply(workload(2))
    async with Workloads(api):
        await api.until(lambda: phases(api) == [Phase.READY] * 2)
        api.delete(DEPLOYMENTS, "nemo")
        await api.until(lambda: pods(api) == [])


async def test_a_stateful_set_counts_up_and_down(api: FakeApi) -> None:
    api.apply(workload(2, "StatefulSet"))
    async with Workloads(api):
        await api.until(lambda: phases(api) == [Phase.READY] * 2)
        assert [pod.name for pod in pods(api)] == ["nemo-0", "nemo-1"]
        scale(api, 1, STATEFUL_SETS)
        await api.until(lambda: [pod.name for pod in pods(api)] == ["nemo-0"])
        await api.until(lambda: api.get(STATEFUL_SETS, "nemo")["status"].get("replicas") == 1)


def ranked(
    name: str, *, node: bool = True, phase: str = "Running", ready: int = 0, cost: str = "0", age: int = 0
) -> Json:
    """`ready`: seconds for which it has been; 0: it is not. Now is 1,000,000."""
    conditions = []
    if ready:
        since = objects.timestamp(1_000_000 - ready)
        conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": since}]
    meta: Json = {"name": name, "uid": name, "creationTimestamp": objects.timestamp(1_000_000 - age)}
    meta["annotations"] = {objects.DELETION_COST: cost}
    spec = {"nodeName": f"node-{name}"} if node else {}
    return {"metadata": meta, "spec": spec, "status": {"phase": phase, "conditions": conditions}}


def test_victims_come_in_the_order_of_a_replica_set() -> None:
    order = [
        ranked("unassigned", node=False, phase="Pending"),
        ranked("pending", phase="Pending"),
        ranked("not-ready", age=90),
        ranked("cheap", ready=9000, cost="-1000", age=9000),
        ranked("young", ready=10, age=9000),
        ranked("old-a", ready=1000, age=9000),  # about as old as the next: the uid decides
        ranked("old-b", ready=990, age=9000),
        ranked("dear", ready=5, cost="10", age=10),
    ]
    shuffled = sorted(order, key=lambda pod: pod["metadata"]["name"])
    assert [pod["metadata"]["name"] for pod in victims(shuffled, 8, 1_000_000.0)] == [
        p["metadata"]["name"] for p in order
    ]
    assert len(victims(shuffled, 3, 1_000_000.0)) == 3
