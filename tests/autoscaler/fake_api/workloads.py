"""What the rest of a cluster does about workloads: their controllers, and the nodes below.

    Deployment ─► ReplicaSet ─► pods ─► nodes
    StatefulSet ────────────────┘

Level-triggered, as the real ones: each change of the store is followed by a look at the whole of it. There are no
rollouts (a pod keeps the template that it was made of), and orphans that match are not adopted.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import math
import time
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from autoscaler.cluster import objects
from autoscaler.cluster.face import PODS
from autoscaler.cluster.objects import condition
from tests.autoscaler.fake_api import selectors
from tests.autoscaler.fake_api.errors import Json
from tests.autoscaler.fake_api.nodes import Nodes, Program, idle, owner_of
from tests.autoscaler.fake_api.resources import Resource
from tests.autoscaler.fake_api.server import FakeApi

PHASES = {"Pending": 0, "Unknown": 1, "Running": 2}


class Workloads:
    """`async with Workloads(api) as cluster:` runs until the end; then all programs are stopped.

    Args:
        program: what the container of each pod runs; by default it is ready at once.
        room: pods that there are nodes for; None: always one more.
        restart_seconds: from a crash to the next start.
    """

    def __init__(
        self, api: FakeApi, program: Program = idle, *, room: int | None = None, restart_seconds: float = 0.05
    ) -> None:
        self._api = api
        self._nodes = Nodes(api, program, room, restart_seconds)
        self._pods = api.machinery.resource("", "pods")
        self._sets = api.machinery.resource("apps", "replicasets")
        self._again = asyncio.Event()
        self._stalled = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="workloads")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._nodes.close()

    def make_room(self, room: int | None) -> None:
        self._nodes.room = room
        self._again.set()

    def stall(self, stalled: bool) -> None:
        """No controller does anything, as while a new leader of them is found."""
        self._stalled = stalled
        self._again.set()

    async def _run(self) -> None:
        with self._api.store.changed() as self._again:
            while True:
                self._again.clear()
                if self._stalled:
                    await self._again.wait()
                    continue
                self._collect_garbage()
                for kind in ("deployments", "statefulsets"):
                    resource = self._api.machinery.resource("apps", kind)
                    for workload in self._api.store.list(resource):
                        self._control(resource, workload)
                self._nodes.look()
                await self._again.wait()

    # -- controllers -------------------------------------------------------------------------------------------

    def _control(self, resource: Resource, workload: Json) -> None:
        if resource.plural == "statefulsets":
            owner, pods = workload, self._owned(workload)
            self._control_ordinals(workload, pods)
        else:
            owner = self._replica_set(workload)
            pods = self._owned(owner)
            self._control_any(owner, workload["spec"]["replicas"], pods)
        pods = self._owned(owner)
        ready = sum(condition(pod, "Ready").get("status") == "True" for pod in pods)
        counts = {
            "replicas": len(pods),
            "readyReplicas": ready,
            "availableReplicas": ready,
            "updatedReplicas": len(pods),
        }
        status = {key: value for key, value in counts.items() if value}
        status |= {"observedGeneration": workload["metadata"]["generation"]}
        self._set_status(resource, workload, status)

    def _control_any(self, owner: Json, replicas: int, pods: list[Json]) -> None:
        """A ReplicaSet's: any pod is as good as another, but for their order as victims."""
        for _ in range(replicas - len(pods)):
            self._create(owner, {"generateName": owner["metadata"]["name"] + "-"})
        for pod in victims(pods, len(pods) - replicas, time.time()):
            self._delete(pod)

    def _control_ordinals(self, workload: Json, pods: list[Json]) -> None:
        """A StatefulSet's: 0, 1, 2 … in this order, and back; one after the other unless it is Parallel."""
        ordered = workload["spec"].get("podManagementPolicy", "OrderedReady") == "OrderedReady"
        every = self._owned(workload, ending=True)
        have = {_ordinal(pod) for pod in every}
        replicas = workload["spec"]["replicas"]
        for ordinal in (each for each in range(replicas) if each not in have):
            if ordered and any(condition(pod, "Ready").get("status") != "True" for pod in every):
                break
            self._create(workload, {"name": f"{workload['metadata']['name']}-{ordinal}"})
            if ordered:
                break
        surplus = sorted((pod for pod in pods if _ordinal(pod) >= replicas), key=_ordinal, reverse=True)
        if ordered and any(pod["metadata"].get("deletionTimestamp") for pod in every):
            return
        for pod in surplus[:1] if ordered else surplus:
            self._delete(pod)

    def _replica_set(self, deployment: Json) -> Json:
        meta, spec = deployment["metadata"], deployment["spec"]
        found = [each for each in self._api.store.list(self._sets, meta["namespace"]) if _is_of(each, deployment)]
        if found:
            if found[0]["spec"]["replicas"] != spec["replicas"]:
                grown = found[0]["spec"] | {"replicas": spec["replicas"]}
                return self._api.store.put(self._sets, found[0] | {"spec": grown})
            return found[0]
        text = json.dumps(spec["template"], sort_keys=True).encode()
        made = {
            "name": f"{meta['name']}-{hashlib.sha256(text).hexdigest()[:10]}",
            "ownerReferences": [_owner(deployment)],
        }
        body = {"metadata": made, "spec": {key: spec[key] for key in ("replicas", "selector", "template")}}
        return self._api.machinery.create(self._sets, meta["namespace"], copy.deepcopy(body))

    def _owned(self, owner: Json, *, ending: bool = False) -> list[Json]:
        """Those that hold a place; with `ending`, those too that are being deleted."""
        match = selectors.labels(selectors.text_of(owner["spec"]["selector"]))
        found = []
        for pod in self._api.store.list(self._pods, owner["metadata"]["namespace"]):
            if not _is_of(pod, owner):
                continue
            if not match(pod):  # released: it is nobody's from now on
                meta = {key: value for key, value in pod["metadata"].items() if key != "ownerReferences"}
                self._api.store.put(self._pods, pod | {"metadata": meta})
            elif ending or objects.pod(pod).holds_place:
                found.append(pod)
        return found

    def _create(self, owner: Json, named: Json) -> None:
        template = copy.deepcopy(owner["spec"]["template"])
        meta = template.get("metadata", {}) | named | {"ownerReferences": [_owner(owner)]}
        self._api.machinery.create(self._pods, owner["metadata"]["namespace"], template | {"metadata": meta})

    def _delete(self, pod: Json) -> None:
        meta = pod["metadata"]
        self._api.machinery.delete(self._pods, meta["namespace"], meta["name"], {})

    def _collect_garbage(self) -> None:
        """What belonged to an owner that is gone goes too."""
        living = {item["metadata"]["uid"] for item in self._api.store.everything()}
        for resource in (self._sets, self._pods):
            for item in self._api.store.list(resource):
                owner = owner_of(item)
                if owner and owner["uid"] not in living and not item["metadata"].get("deletionTimestamp"):
                    self._api.machinery.delete(resource, item["metadata"]["namespace"], item["metadata"]["name"], {})

    def _set_status(self, resource: Resource, workload: Json, status: Json) -> None:
        meta = workload["metadata"]
        self._api.machinery.update(
            resource, meta["namespace"], meta["name"], lambda old: old | {"status": status}, "status"
        )


def victims(pods: Iterable[Json], count: int, now: float) -> list[Json]:
    """Whom a ReplicaSet ends first: `ActivePodsWithRanks.Less` of pkg/controller/controller_utils.go, Kubernetes 1.36.

    Unassigned before assigned, Pending before Running, not ready before ready, cheap before dear, and those that came
    last; but ages count by their logarithm, so that of pods nearly as old the uid decides, which is chance. Each pod
    has a node of its own here, so that none shares one with others.
    """

    def order(item: Json) -> tuple[Any, ...]:
        pod = objects.pod(item)
        is_ready = condition(item, "Ready").get("status") == "True"
        since = objects.seconds(condition(item, "Ready").get("lastTransitionTime")) if is_ready else None
        return (
            "nodeName" in item["spec"],
            PHASES.get(item["status"].get("phase", ""), 1),
            is_ready,
            pod.deletion_cost,
            0 if since is None else _magnitude(now - since),
            pod.uid if since is not None else "",
            -pod.restarts,
            _magnitude(now - pod.created_at),
            pod.uid,
        )

    return sorted(pods, key=order)[: max(0, count)]


def _magnitude(seconds: float) -> int:
    return int(math.log2(seconds * 1e9)) if seconds > 0 else -1


def endpoints(api: FakeApi, label_selector: str, namespace: str = "default") -> list[str]:
    """Addresses that a Service with this selector would send to: of pods that are ready and not being deleted."""
    pods = map(objects.pod, api.list(PODS, namespace, label_selector))
    return [pod.ip for pod in pods if pod.ip and pod.ready_since is not None]


def _is_of(item: Json, owner: Json) -> bool:
    found = owner_of(item)
    return found is not None and found["uid"] == owner["metadata"]["uid"]


def _ordinal(pod: Json) -> int:
    """Of a StatefulSet's; -1: its name does not end in a number."""
    number = pod["metadata"]["name"].rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _owner(item: Json) -> Json:
    of = {"apiVersion": item["apiVersion"], "kind": item["kind"], "name": item["metadata"]["name"]}
    return of | {"uid": item["metadata"]["uid"], "controller": True, "blockOwnerDeletion": True}
