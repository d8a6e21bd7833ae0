"""The activator as the controller sees it: who takes requests, and whether it stands in for the workload's replicas.

While no replica takes requests, a pod of the operator is the endpoint of their Service: it bears the label that the
Service selects. The label is on before the last replica begins to drain, and off when the first one is an endpoint
itself, so that there is always somebody to connect to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoscaler.activator.hold import Room
from autoscaler.activator.replica import Replica as Taker
from autoscaler.cluster.face import PODS, Cluster, ClusterError
from autoscaler.cluster.objects import items, pod
from autoscaler.controller.drain import SERVES, Plan, Scene
from autoscaler.controller.victims import SERVING
from autoscaler.fleet import Phase, Replica
from autoscaler.resource import Spec

STANDS_IN = "nemoserve.dev/stands-in-for"  # label of an operator's pod that is an endpoint: name of the workload
WORDS = {  # the last that there is one of is told
    Phase.FAILED: "its container or its server has failed",
    Phase.PENDING: "waiting for a node",
    Phase.STARTING: "pulling the image and starting the server",
    Phase.LOADING: "loading the model",
}


@dataclass(frozen=True, slots=True)
class Front:
    """Attributes:
    autoscaler: name of the resource whose workload's requests come here.
    pod_name: of this process.
    """

    autoscaler: str
    pod_name: str
    room: Room


class Cover:
    """Of one workload, by one process while it leads."""

    def __init__(self, front: Front, cluster: Cluster) -> None:
        self._front, self._cluster = front, cluster
        self._workload: str | None = None  # that our pod is an endpoint of
        self._known = False  # what labels there are; see `doubt`

    @property
    def held_requests(self) -> int:
        return self._front.room.held_requests

    @property
    def oldest_held_seconds(self) -> float:
        return self._front.room.oldest_held_seconds

    def doubt(self) -> None:
        """Labels are looked at anew before the next step: another hand may have changed them."""
        self._known = False

    async def arrange(self, spec: Spec, scene: Scene, steps: Plan) -> None:
        """For what is about to be done. Raises ClusterError."""
        staying = [
            each
            for each in _answering(scene)
            if (each.phase is Phase.READY and each.name not in steps.drain)
            or (each.phase is Phase.DRAINING and each.name in steps.keep)
        ]
        # What is held, and what comes here still, goes to those that stay, else to those that drain
        self._hand_to(_takers(staying or _answering(scene), spec, scene), scene)
        endpoints = [each for each in staying if scene.pods[each.name].ready_since is not None]
        stands_in = spec.settings.scale_to_zero.enabled and not spec.dry_run and not endpoints
        await self._label(spec.target.name if stands_in else None)

    async def pass_on(self, spec: Spec, scene: Scene) -> None:
        """By a process that does not lead: what it holds goes to replicas, else to the process that stands in for them,
        which sees it then and has one started. Raises ClusterError."""
        self._hand_to(_takers(_answering(scene), spec, scene) or await self._standing(spec), scene)

    async def _standing(self, spec: Spec) -> list[Taker]:
        listed = items(await self._cluster.list(PODS, f"{STANDS_IN}={spec.target.name}"))
        return [
            Taker(each.name, each.ip, spec.grpc_port, spec.metrics_port)
            for each in map(pod, listed)
            if each.name != self._front.pod_name and each.ip is not None and each.ready_since is not None
        ]

    async def end(self) -> None:
        """The resource is gone. Raises ClusterError."""
        self._front.room.serve(())
        await self._label(None)

    def _hand_to(self, takers: Sequence[Taker], scene: Scene) -> None:
        self._front.room.serve(takers)
        coming = [each for phase in reversed(WORDS) for each in scene.replicas if each.phase is phase]
        if coming and not takers:
            self._front.room.progress(WORDS[coming[0].phase], eta=coming[0].eta_seconds)

    async def _label(self, workload: str | None) -> None:
        """Ours first: so long whoever led before, this process included, is better than nobody."""
        before = () if self._known else await self._led_before()
        if workload != self._workload:
            await self._patch(self._front.pod_name, {SERVES: workload, STANDS_IN: workload})
            self._workload = workload
        for name in before:
            await self._patch(name, {SERVES: None, STANDS_IN: None})
        self._known = True

    async def _led_before(self) -> list[str]:
        """Names of others' pods that are endpoints still."""
        labels = {
            each["metadata"]["name"]: each["metadata"]["labels"]
            for each in items(await self._cluster.list(PODS, STANDS_IN))
        }
        ours = labels.pop(self._front.pod_name, {})
        stood_in = ours.get(STANDS_IN)
        self._workload = stood_in if stood_in == ours.get(SERVES) else ""  # one of both alone is neither
        return [name for name, each in labels.items() if each.get(SERVES) == each[STANDS_IN]]

    async def _patch(self, pod_name: str, labels: Mapping[str, str | None]) -> None:
        try:
            await self._cluster.patch(PODS, pod_name, {"metadata": {"labels": dict(labels)}})
        except ClusterError as error:
            if not error.not_found or pod_name == self._front.pod_name:
                raise


def _answering(scene: Scene) -> list[Replica]:
    """Those that serve, and answer their kubelet or did answer us just now: who answers nobody gets nothing more."""

    def answers(replica: Replica) -> bool:
        its = scene.pods[replica.name]
        return its.ip is not None and (its.ready_since is not None or replica.observed_at >= scene.at)

    return [each for each in scene.replicas if each.phase in SERVING and answers(each)]


def _takers(replicas: Sequence[Replica], spec: Spec, scene: Scene) -> list[Taker]:
    return [
        Taker(
            name=each.name,
            host=scene.pods[each.name].ip or "",
            grpc_port=spec.grpc_port,
            http_port=spec.metrics_port,
            capacity=each.load.capacity if each.load is not None else 0,
        )
        for each in replicas
    ]
