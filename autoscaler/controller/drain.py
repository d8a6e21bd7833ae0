"""From what a workload is asked for to what it should be, without a lost request. `plan` is pure, `Hands` does it.

          label off, mark on              idle, or too long             deleted by its controller, as /scale shrank
serving ───────────────────► draining ───────────────────► doomed ───────────────────────────────────► gone
   ▲    label on, mark off       │       deletion cost on     │         (SIGTERM: the server finishes the rest)
   └─────────────────────────────┴────────────────────────────┘
                wanted again: costs nothing, a new one costs a cold start

The Service of the servers selects `nemoserve.dev/serves`. Without that label a pod gets no new connections; it stays,
since its controller's selector does not contain the label. What is draining stands in the cluster, with the time since
when, so that whoever leads next goes on where this one stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoscaler.cluster.face import PODS, Cluster, ClusterError
from autoscaler.cluster.objects import DELETION_COST, Pod, Scale, scale_patch
from autoscaler.controller.victims import SERVING, choose, drained, ordinal
from autoscaler.fleet import Replica
from autoscaler.resource import TargetRef

SERVES = "nemoserve.dev/serves"  # label: name of the workload; the Service selects it
DRAINING = "nemoserve.dev/draining-since"  # label: Unix seconds
# Labels: which ReplicaSet of a Deployment made the pod, or which revision of a StatefulSet
TEMPLATE, REVISION = "pod-template-hash", "controller-revision-hash"
DOOMED = -1000  # deletion cost; those of others are 0
# Seconds that endpoints take, about, to reach all nodes; a look before says nothing of who still comes.
SETTLE = 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """Names of pods, and the number to ask for; see the module.

    Attributes:
        doomed: why it may go now, by the pod: `free`, `idle`, `limit`.
    """

    asked: int
    keep: tuple[str, ...] = ()
    drain: tuple[str, ...] = ()
    doomed: Mapping[str, str] = field(default_factory=dict)


def draining_since(pod: Pod) -> float | None:
    """Unix seconds; None: it is not draining. A mark that cannot be read is one of long ago."""
    if (mark := pod.labels.get(DRAINING)) is None:
        return None
    try:
        return float(mark)
    except ValueError:
        return 0.0


def is_marked(pod: Pod) -> bool:
    """It drains, or was to go."""
    return DRAINING in pod.labels or pod.deletion_cost == DOOMED


@dataclass(frozen=True, slots=True)
class Scene:
    """A workload at one moment.

    Attributes:
        pods: those that count for the workload's controller, by name.
        replicas: the same, as they say themselves.
        others: which are being deleted, and finish what they accepted.
        draining: Unix seconds since when, by the pod's name.
        fresh_since: Unix seconds; a load seen before is not known any more.
        ended: pods that ended lately and stay in the list; others were made in their place.
    """

    at: float
    target: TargetRef
    scale: Scale
    pods: Mapping[str, Pod]
    replicas: tuple[Replica, ...]
    others: tuple[Replica, ...]
    draining: Mapping[str, float]
    fresh_since: float
    ended: tuple[Pod, ...] = ()

    @property
    def wanted(self) -> int:
        """Replicas that were decided on last: what drains is only asked for until it has."""
        return max(0, self.scale.replicas - len(self.draining))

    @property
    def mixed(self) -> bool:
        """Its pods are not all of one template."""
        return len({(pod.labels.get(TEMPLATE), pod.labels.get(REVISION)) for pod in self.pods.values()}) > 1

    @property
    def rolls_out(self) -> bool:
        """A Deployment that shrinks meanwhile takes from the ReplicaSets of both templates, and each of them deletes
        by the cost of its own pods alone: one that serves would go in place of one that has drained."""
        return not self.target.ordered and self.mixed


def let_go(pods: Mapping[str, Pod], scale: Scale, target: TargetRef) -> frozenset[str]:
    """Names of those that are not asked for any more, and that their controller has still to delete: it will, and what
    was decided about them stays decided. While a Deployment rolls out it has more pods than it is asked for, none of
    which is doomed."""
    surplus = max(0, len(pods) - scale.replicas)
    if target.ordered:
        going = sorted(pods, key=ordinal, reverse=True)
    else:
        going = [name for name, pod in pods.items() if pod.deletion_cost == DOOMED]
    return frozenset(going[:surplus])


def plan(scene: Scene, desired: int, limit: float) -> Plan:
    """What to do next, so that there will be `desired` replicas. While a Deployment rolls out none begins to drain, and
    none goes.

    Args:
        limit: seconds after which one that drains goes, idle or not. Clients may go on using connections that they
            have; SIGTERM tells them to go, and the server's own drain, within the pod's grace, finishes the rest.
    """
    asked, since = scene.scale.replicas, scene.draining
    marked = [name for name, pod in scene.pods.items() if is_marked(pod)]
    if desired >= asked:
        return Plan(desired, keep=tuple(marked))
    excess = asked - desired
    if scene.rolls_out:
        drain = choose([each for each in scene.replicas if each.name in since], excess, fresh_since=scene.fresh_since)
        names = {each.name for each in drain}
        return Plan(asked, keep=tuple(name for name in marked if name not in names))
    missing = min(excess, max(0, asked - len(scene.replicas)))  # asked for, and not even made: the first to go
    ordered = scene.target.ordered
    unready = {name for name, pod in scene.pods.items() if pod.phase not in SERVING}
    victims = choose(scene.replicas, excess - missing, fresh_since=scene.fresh_since, ordered=ordered, unready=unready)
    doomed: dict[str, str] = {}
    for each in victims:
        if (why := _may_go(each, since.get(each.name), scene.at, limit)) is not None:
            doomed[each.name] = why
        elif ordered:  # none goes before those above it
            break
    names = {each.name for each in victims}
    return Plan(
        asked - missing - len(doomed),
        keep=tuple(name for name in marked if name not in names),
        drain=tuple(each.name for each in victims if each.name not in doomed and each.name not in since),
        doomed=doomed,
    )


def _may_go(replica: Replica, since: float | None, at: float, limit: float) -> str | None:
    if replica.phase not in SERVING:
        return "free"
    if since is None:
        return None
    if drained(replica, since + SETTLE):
        return "idle"
    return "limit" if at - since >= limit else None


class Hands:
    """What is done to the pods and the scale of workloads. Every write names the version that was read; where that is
    not the newest any more (ClusterError with `conflict`) the next look sees why."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    async def carry_out(self, plan: Plan, scene: Scene) -> None:
        """Capacity that comes back first, then what goes."""
        target, scale, pods = scene.target, scene.scale, scene.pods
        await self.give_back([pods[name] for name in plan.keep], target)
        for name in plan.drain:
            await self._mark(pods[name], {SERVES: None, DRAINING: f"{scene.at:.3f}"})
        if plan.asked == scale.replicas:
            return
        for name in plan.doomed:
            if not target.ordered and pods[name].deletion_cost != DOOMED:
                await self._mark(pods[name], {}, cost=str(DOOMED))
        await self._cluster.patch(target.resource, target.name, scale_patch(scale, plan.asked), "scale")

    async def give_back(self, pods: Iterable[Pod], target: TargetRef) -> None:
        """They serve again."""
        for each in pods:
            await self._mark(each, {SERVES: target.name, DRAINING: None}, cost=None)

    async def _mark(self, pod: Pod, labels: Mapping[str, str | None], **annotations: str | None) -> None:
        metadata: dict[str, Any] = {"resourceVersion": pod.resource_version}
        if labels:
            metadata["labels"] = dict(labels)
        if "cost" in annotations:
            metadata["annotations"] = {DELETION_COST: annotations["cost"]}
        try:
            await self._cluster.patch(PODS, pod.name, {"metadata": metadata})
        except ClusterError as error:
            if not error.not_found:  # gone meanwhile: as good
                raise
