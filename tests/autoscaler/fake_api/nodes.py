"""A scheduler, and nodes that run pods: each pod that a workload owns gets a node and an address of its own.

Pending ─ room ─► on a node: Running ─ its program says so ─► Ready ─ deleted ─► stopping ─ program ended ─► gone
   └─ none: Unschedulable               └─ program ended by itself: CrashLoopBackOff, and again    └─ grace over: killed
"""

from __future__ import annotations

import asyncio
import copy
import ipaddress
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from autoscaler.cluster.objects import condition
from tests.autoscaler.fake_api.errors import Json
from tests.autoscaler.fake_api.server import FakeApi

ENDED = ("Failed", "Succeeded")
NO_ROOM = "0/{} nodes are available: {} Insufficient nvidia.com/gpu."
BLOCK = 1024  # addresses of a cluster's pods
CLOSE_SECONDS = 10.0  # that programs have to end when all is over


@dataclass
class Container:
    """What a pod's program is told, and tells.

    Attributes:
        ip: an address of the loopback that nothing else has.
        stopping: the pod is being deleted: the SIGTERM.
    """

    pod: Json
    ip: str
    report: Callable[[bool], None]
    stopping: asyncio.Event = field(default_factory=asyncio.Event)

    def ready(self, is_ready: bool = True) -> None:
        """What the readiness probe finds."""
        self.report(is_ready)


# From a container's start to its end; cancelled when the pod's grace is over: the SIGKILL. One that ends, or raises,
# before `stopping` has crashed.
Program = Callable[[Container], Awaitable[None]]


async def idle(container: Container) -> None:
    """Ready at once, and gone at once."""
    container.ready()
    await container.stopping.wait()


@dataclass
class _Life:
    stopping: asyncio.Event
    task: asyncio.Task[None]
    killer: asyncio.TimerHandle | None = None


class Nodes:
    """Attributes:
    room: pods that there are nodes for; None: always one more.
    """

    def __init__(self, api: FakeApi, program: Program, room: int | None, restart_seconds: float) -> None:
        self.room = room
        self._api = api
        self._program = program
        self._restart_seconds = restart_seconds
        self._pods = api.machinery.resource("", "pods")
        self._lives: dict[str, _Life] = {}  # by uid
        self._placed = 0
        # Of 16,383 blocks one by chance: programs of another cluster on this machine may listen on the same ports
        self._addresses = ipaddress.IPv4Address("127.0.0.0") + BLOCK * random.randrange(1, 2**24 // BLOCK)

    def look(self) -> None:
        """Place who waits, start who is placed, stop who is deleted."""
        self._schedule()
        self._run_pods()

    async def close(self) -> None:
        """Stop all programs. Raises what was wrong here, not with them."""
        lives = list(self._lives.values())
        for life in lives:
            life.stopping.set()
        if lives:
            await asyncio.wait({life.task for life in lives}, timeout=CLOSE_SECONDS)
        for life in lives:
            life.task.cancel()
        for result in await asyncio.gather(*(life.task for life in lives), return_exceptions=True):
            if isinstance(result, Exception):
                raise result

    def _schedule(self) -> None:
        pods = [pod for pod in self._api.store.list(self._pods) if owner_of(pod)]
        taken = sum("nodeName" in pod["spec"] and pod["status"].get("phase") not in ENDED for pod in pods)
        waiting = [pod for pod in pods if "nodeName" not in pod["spec"] and "schedulingGates" not in pod["spec"]]
        for pod in sorted(waiting, key=_created):
            if self.room is None or taken < self.room:
                taken += 1
                self._placed += 1
                placed = pod | {"spec": pod["spec"] | {"nodeName": f"node-{self._placed}"}}
                self._report(placed, PodScheduled=(True, ""))
            else:
                self._report(pod, PodScheduled=(False, "Unschedulable", NO_ROOM.format(self.room, self.room)))

    def _run_pods(self) -> None:
        for pod in self._api.store.list(self._pods):
            meta = pod["metadata"]
            life = self._lives.get(meta["uid"])
            if life is None and owner_of(pod) and "nodeName" in pod["spec"] and pod["status"].get("phase") not in ENDED:
                stopping = asyncio.Event()
                task = asyncio.create_task(self._live(pod, stopping), name=meta["name"])
                self._lives[meta["uid"]] = _Life(stopping, task)
            elif life is not None and "deletionTimestamp" in meta and life.killer is None:
                life.stopping.set()
                loop = asyncio.get_running_loop()
                life.killer = loop.call_later(meta["deletionGracePeriodSeconds"], life.task.cancel)
        present = {pod["metadata"]["uid"] for pod in self._api.store.list(self._pods)}
        for uid, life in self._lives.items():  # deleted by force
            if uid not in present and not life.stopping.is_set():
                life.stopping.set()
                life.task.cancel()

    async def _live(self, pod: Json, stopping: asyncio.Event) -> None:
        uid = pod["metadata"]["uid"]
        ip = str(self._addresses + int(pod["spec"]["nodeName"].removeprefix("node-")))
        restarts, last = 0, {}
        try:
            while not stopping.is_set():
                running = {"running": {"startedAt": self._api.machinery.now()}}
                tell = partial(self._tell, pod, ip, restarts, last, running)
                tell(False)
                ended = {"exitCode": 0, "reason": "Completed"}
                try:
                    await self._program(Container(pod, ip, tell, stopping))
                except Exception as error:
                    ended = {"exitCode": 1, "reason": "Error", "message": str(error)}
                if stopping.is_set():
                    break
                restarts += 1
                last = {"terminated": ended}
                self._tell(pod, ip, restarts, last, {"waiting": {"reason": "CrashLoopBackOff"}}, False)
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), self._restart_seconds)
        finally:
            life = self._lives.pop(uid)
            if life.killer is not None:
                life.killer.cancel()
            if (now := self._present(pod)) is not None and "deletionTimestamp" in now["metadata"]:
                meta = now["metadata"]
                self._api.machinery.delete(self._pods, meta["namespace"], meta["name"], {"gracePeriodSeconds": 0})

    def _tell(self, pod: Json, ip: str, restarts: int, last: Json, state: Json, is_ready: bool) -> None:
        """Its startup probe asks what its readiness probe does."""
        now = self._present(pod)
        if now is None:
            return
        before = {each["name"]: each for each in now["status"].get("containerStatuses", ())}
        statuses = []
        for name in (each["name"] for each in pod["spec"]["containers"]):
            same = before.get(name, {}).get("state") == state
            started = is_ready or (same and before[name]["started"])
            told = {"name": name, "ready": is_ready, "started": started, "restartCount": restarts, "state": state}
            statuses.append(told | {"lastState": last})
        status = {"phase": "Running", "podIP": ip, "containerStatuses": statuses}
        status["startTime"] = now["status"].get("startTime") or self._api.machinery.now()
        reason = "" if is_ready else "ContainersNotReady"
        self._report(now | {"status": now["status"] | status}, Ready=(is_ready, reason))

    def _report(self, pod: Json, **conditions: tuple[Any, ...]) -> None:
        """Store the pod with these conditions, unless it is stored like that."""
        pod = copy.deepcopy(pod)
        listed = pod["status"].setdefault("conditions", [])
        for kind, (is_so, reason, *message) in conditions.items():
            old = condition(pod, kind)
            new = {"type": kind, "status": str(is_so), "reason": reason, "message": "".join(message)}
            same = old.get("status") == new["status"]
            new["lastTransitionTime"] = old["lastTransitionTime"] if same else self._api.machinery.now()
            if old:
                listed[listed.index(old)] = new
            else:
                listed.append(new)
        if pod != self._present(pod):
            self._api.store.put(self._pods, pod)

    def _present(self, pod: Json) -> Json | None:
        found = self._api.store.find(self._pods, pod["metadata"]["namespace"], pod["metadata"]["name"])
        return found if found is not None and found["metadata"]["uid"] == pod["metadata"]["uid"] else None


def _created(pod: Json) -> tuple[str, str]:
    return pod["metadata"]["creationTimestamp"], pod["metadata"]["name"]


def owner_of(item: Json) -> Json | None:
    """The reference to the controller that it belongs to."""
    return next((each for each in item["metadata"].get("ownerReferences") or () if each.get("controller")), None)
