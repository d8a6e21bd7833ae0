"""A workload in the fake cluster, with its pods' life, and looks at it by the real client over real HTTP.

What replicas say and what the policy decides is the test's word; time is turned by the test.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from autoscaler.cluster.client import connect
from autoscaler.cluster.events import Recorder
from autoscaler.cluster.face import DEPLOYMENTS, EVENTS, PODS, QUEUE_AUTOSCALERS, STATEFUL_SETS, Json, Kind
from autoscaler.cluster.objects import Pod, timestamp
from autoscaler.controller.drain import SERVES
from autoscaler.controller.front import Front
from autoscaler.controller.metrics import Metrics
from autoscaler.controller.reconcile import Reconciler, Tools
from autoscaler.decision import Decision, Limit
from autoscaler.fleet import Load, Observation, Phase, Replica
from autoscaler.resource import Spec
from autoscaler.settings import Settings
from tests.autoscaler.api_under_test import definition
from tests.autoscaler.controller.clock import TurnedClock, until
from tests.autoscaler.controller.line import Line
from tests.autoscaler.fake_api import FakeApi
from tests.autoscaler.fake_api.workloads import Workloads

NAME = "nemo"
KINDS = {"Deployment": DEPLOYMENTS, "StatefulSet": STATEFUL_SETS}
ACCOUNT = "system:serviceaccount:default:"
IMPOSSIBLE = {"cron": "99 * * * *", "durationSeconds": 60, "minReplicas": 2}  # which the definition lets through
SHIPPED = Path(__file__).parents[3] / "deploy/components/autoscaler/resources.yaml"


@functools.cache
def rules() -> list[Json]:
    """What the shipped Role lets the operator do, of any name, and of StatefulSets too."""
    [role] = [each for each in yaml.safe_load_all(SHIPPED.read_text()) if each["kind"] == "Role"]
    text = json.dumps([{key: rule[key] for key in rule if key != "resourceNames"} for rule in role["rules"]])
    found: list[Json] = json.loads(text.replace('"deployments/scale"', '"deployments/scale", "statefulsets/scale"'))
    return found


@dataclass
class Word:
    """The policy: says what the test wants."""

    desired: int | None = None  # None: as many as there are
    reason: str = "as the test wants"
    limit: Limit | None = None
    figures: dict[str, float] = field(default_factory=dict)
    seen: list[Observation] = field(default_factory=list)
    meanwhile: Callable[[], None] = lambda: None  # between reading and acting

    @property
    def interval_seconds(self) -> float:
        return 5.0

    def decide(self, observation: Observation) -> Decision:
        self.seen.append(observation)
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        desired = observation.desired if self.desired is None else self.desired
        return Decision(desired, self.reason, self.limit, self.figures)


@dataclass
class Ears:
    """The observer: hears what the test puts in their mouths, by the pod's name."""

    running: dict[str, int] = field(default_factory=dict)
    loading: set[str] = field(default_factory=set)
    silent: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    busy: set[str] = field(default_factory=set)  # they served, and answer nobody now
    heard: dict[str, float] = field(default_factory=dict)  # when

    async def look(self, pods: Sequence[Pod], spec: Spec, at: float) -> tuple[Replica, ...]:
        return tuple(self._replica(each, at) for each in pods)

    async def close(self) -> None:
        pass

    def _replica(self, pod: Pod, at: float) -> Replica:
        phase = Phase.LOADING if pod.name in self.loading and pod.phase is Phase.STARTING else pod.phase
        phase = Phase.READY if pod.name in self.busy else Phase.FAILED if pod.name in self.failed else phase
        if phase in (Phase.READY, Phase.DRAINING) and pod.name not in self.silent | self.busy:
            self.heard[pod.name] = at
        load = Load(running_requests=self.running.get(pod.name, 0)) if pod.name in self.heard else None
        ready_at = pod.ready_since
        return Replica(pod.name, phase, pod.created_at, load, self.heard.get(pod.name, 0.0), ready_at)


class Scene:
    """One workload, one resource, and what looks at it."""

    def __init__(self, api: FakeApi, workloads: Workloads, line: Line, clock: TurnedClock, kind: str) -> None:
        self.api, self.workloads, self.line, self.clock = api, workloads, line, clock
        self.kind: Kind = KINDS[kind]
        self.word, self.ears, self.metrics = Word(), Ears(), Metrics()
        self.front: Front | None = None
        self.reconciler = self.successor()

    def successor(self, name: str = NAME) -> Reconciler:
        """Another process, which knows nothing yet; or what looks at another resource."""
        recorder = Recorder(self.line, "operator-0", self.clock)
        policy: Callable[[Settings], Word] = lambda settings: self.word  # noqa: E731
        tools = Tools(
            cluster=self.line,
            recorder=recorder,
            metrics=self.metrics,
            clock=self.clock,
            observer=lambda: self.ears,
            policy=policy,
            front=self.front,
        )
        return Reconciler(name, tools)

    async def look(self, seconds: float = 5.0) -> None:
        """After so long, and then until the cluster has done what follows from it."""
        self.clock.turn(seconds)
        await self.reconciler.look()
        await self.settled()

    async def settled(self) -> None:
        def right() -> bool:
            workload = [each for each in self.api.list(self.kind) if each["metadata"]["name"] == NAME]
            wanted = workload[0]["spec"]["replicas"] if workload else 0
            gone = [each for each in self.api.list(PODS, label_selector="app=nemo") if _ends(each)]
            return not gone and len(self.pods) == wanted

        await until(right)

    # -- what there is -------------------------------------------------------------------------------------------

    @property
    def resource(self) -> Json:
        return self.api.get(QUEUE_AUTOSCALERS, NAME)

    @property
    def status(self) -> Json:
        found: Json = self.resource.get("status", {})
        return found

    @property
    def asked(self) -> int:
        asked: int = self.api.get(self.kind, NAME)["spec"]["replicas"]
        return asked

    @property
    def pods(self) -> list[str]:
        return [each["metadata"]["name"] for each in self.api.list(PODS, label_selector="app=nemo")]

    @property
    def serving(self) -> list[str]:
        """Whom the workload's Service selects."""
        return [each["metadata"]["name"] for each in self.api.list(PODS, label_selector=f"{SERVES}={NAME}")]

    @property
    def events(self) -> list[tuple[str, str]]:
        """Reason and note of each, oldest first."""
        found = sorted(self.api.list(EVENTS), key=lambda each: int(each["metadata"]["resourceVersion"]))
        return [(each["reason"], each["note"]) for each in found]

    @property
    def reasons(self) -> list[str]:
        return [reason for reason, _ in self.events]

    def condition(self, kind: str) -> tuple[str, str, str]:
        """Status, reason and message."""
        [found] = [each for each in self.status["conditions"] if each["type"] == kind]
        return found["status"], found["reason"], found["message"]

    def metric(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"nemoserve_autoscaler_{name}", {"autoscaler": NAME} | labels)

    # -- what others do ------------------------------------------------------------------------------------------

    def change(self, kind: Kind, name: str, **spec: Any) -> None:
        """By another hand. None: the field goes."""

        def alter(old: Json) -> Json:
            merged = old["spec"] | spec
            return old | {"spec": {key: value for key, value in merged.items() if value is not None}}

        resource = self.api.machinery.resource(kind.group, kind.plural)
        self.api.machinery.update(resource, "default", name, alter)

    def report_ready(self, pod_name: str, ip: str) -> None:
        """Of a pod that no node of this cluster runs, as those of the operator."""
        pods = self.api.machinery.resource("", "pods")
        found = self.api.store.find(pods, "default", pod_name)
        assert found is not None
        conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": "2025-11-26T08:00:00Z"}]
        status = {"phase": "Running", "podIP": ip, "conditions": conditions}
        self.api.store.put(pods, found | {"status": status, "spec": found["spec"] | {"nodeName": "node-0"}})

    def label_pod(self, pod_name: str, labels: dict[str, str | None]) -> None:
        def alter(old: Json) -> Json:
            merged = old["metadata"]["labels"] | labels
            kept = {key: value for key, value in merged.items() if value is not None}
            return old | {"metadata": old["metadata"] | {"labels": kept}}

        self.api.machinery.update(self.api.machinery.resource("", "pods"), "default", pod_name, alter)

    def break_container(self, pod_name: str, reason: str, message: str) -> None:
        """Of a pod's container: it waits from now on, and this is why."""
        status = {"name": "server", "state": {"waiting": {"reason": reason, "message": message}}}

        def alter(old: Json) -> Json:
            conditions = [{"type": "Ready", "status": "False"}]
            return old | {"status": old["status"] | {"containerStatuses": [status], "conditions": conditions}}

        self.api.machinery.update(self.api.machinery.resource("", "pods"), "default", pod_name, alter, "status")

    def end_pod(self, pod_name: str, reason: str, message: str) -> None:
        """By its node, for good."""

        def alter(old: Json) -> Json:
            conditions = [{"type": "Ready", "status": "False", "lastTransitionTime": timestamp(self.clock.wall())}]
            return old | {"status": {"phase": "Failed", "reason": reason, "message": message, "conditions": conditions}}

        self.api.machinery.update(self.api.machinery.resource("", "pods"), "default", pod_name, alter, "status")

    def scale_by_hand(self, replicas: int) -> None:
        self.change(self.kind, NAME, replicas=replicas)

    def delete(self, kind: Kind, name: str) -> None:
        self.api.machinery.delete(self.api.machinery.resource(kind.group, kind.plural), "default", name, {})


def _ends(pod: Json) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def workload(kind: str, replicas: int) -> Json:
    labels = {"app": NAME}
    template: Json = {
        "metadata": {"labels": labels | {SERVES: NAME}},
        "spec": {"containers": [{"name": "server", "image": "nemoserve"}]},
    }
    spec: Json = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    if kind == "StatefulSet":
        spec |= {"serviceName": NAME, "podManagementPolicy": "Parallel"}
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": NAME}, "spec": spec}


def scaler(kind: str = "Deployment", name: str = NAME, **spec: Any) -> Json:
    target = {"apiVersion": "apps/v1", "kind": kind, "name": NAME}
    return {
        "apiVersion": "autoscaling.nemoserve.dev/v1alpha1",
        "kind": "QueueAutoscaler",
        "metadata": {"name": name},
        "spec": {"scaleTargetRef": target, "minReplicas": 1, "maxReplicas": 5} | spec,
    }


def grant(api: FakeApi, account: str) -> None:
    """What the operator needs, to a service account."""
    group = "rbac.authorization.k8s.io"
    role = {"kind": "Role", "apiVersion": f"{group}/v1", "metadata": {"name": account}, "rules": rules()}
    binding = {
        "kind": "RoleBinding",
        "apiVersion": f"{group}/v1",
        "metadata": {"name": account},
        "roleRef": {"apiGroup": group, "kind": "Role", "name": account},
        "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": "default"}],
    }
    api.apply(role, binding)


@asynccontextmanager
async def scene(
    folder: Path, *, kind: str = "Deployment", replicas: int = 1, nodes: int | None = None, **spec: Any
) -> AsyncIterator[Scene]:
    """`replicas` that serve, and the resource with this spec."""
    clock = TurnedClock()
    async with FakeApi(clock=clock.wall) as api, Workloads(api, room=nodes) as workloads:
        api.apply(copy.deepcopy(definition()))
        api.apply(workload(kind, replicas), scaler(kind, **spec))
        grant(api, "operator")
        config = api.kubeconfig(folder, f"{ACCOUNT}operator")
        async with connect(str(config), namespace="default") as cluster:
            clock.time.lines.append(Line(cluster))
            here = Scene(api, workloads, clock.time.lines[-1], clock, kind)
            await here.settled()
            await until(lambda: nodes is not None or _ready(api) == replicas)
            yield here


def _ready(api: FakeApi) -> int:
    ready = [each.get("status", {}).get("conditions", []) for each in api.list(PODS)]
    return sum(any(each["type"] == "Ready" and each["status"] == "True" for each in found) for found in ready)
