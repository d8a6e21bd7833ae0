"""What a look led to, told: in the resource's status, by Events, as metrics, in the log."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping

from autoscaler.clock import Clock
from autoscaler.cluster.events import Recorder
from autoscaler.cluster.face import QUEUE_AUTOSCALERS, Cluster, Json
from autoscaler.cluster.objects import Failure
from autoscaler.controller.drain import Plan, Scene
from autoscaler.controller.metrics import Metrics
from autoscaler.controller.status import Condition, Is, Report, Scaled, merged, news, worth_writing
from autoscaler.controller.verdict import Verdict
from autoscaler.controller.victims import SERVING
from autoscaler.decision import Decision
from autoscaler.fleet import Phase

log = logging.getLogger(__name__)

COMING = (Phase.PENDING, Phase.STARTING, Phase.LOADING)
# Figures of decisions that are facts about the workload, and stand in the status.
LEARNED = {"cold_start_seconds": "coldStartSeconds", "replica_work_ratio": "replicaWorkRatio"}
NAMED = 5  # pods, in a message


class Teller:
    """Of one resource, by one process."""

    def __init__(self, name: str, cluster: Cluster, recorder: Recorder, metrics: Metrics, clock: Clock) -> None:
        self._name = name
        self._cluster, self._recorder, self._metrics, self._clock = cluster, recorder, metrics, clock
        self._told_at = -math.inf  # when the status was written
        self._started: dict[str, float] = {}  # creation of pods that were not ready yet, by name

    async def record(self, about: Json, reason: str, action: str, note: str, *, warning: bool = False) -> None:
        """An Event, see `autoscaler.cluster.events.Recorder`."""
        await self._recorder.record(about, reason, action, note, warning=warning)

    async def announce(self, resource: Json, scene: Scene, steps: Plan, verdict: Verdict) -> None:
        """What has been done to the workload."""
        asked, metrics = scene.scale.replicas, self._metrics
        for why in steps.doomed.values():
            metrics.drained.labels(self._name, why).inc()
        if steps.drain:
            names = ", ".join(steps.drain)
            await self.record(resource, "Draining", "Drain", f"{names} drain for {verdict.desired}: {verdict.reason}")
        if back := [name for name in steps.keep if name in scene.draining]:
            await self.record(resource, "DrainReversed", "Drain", f"{', '.join(back)} serve again: {verdict.reason}")
        if steps.asked == asked:
            return
        out = steps.asked > asked
        metrics.scale_events.labels(self._name, "out" if out else "in").inc()
        gone = "".join(f"; {name}: {why}" for name, why in steps.doomed.items())
        word = "ScaledOut" if out else "ScaledIn"
        note = f"{scene.target} from {asked} to {steps.asked}: {verdict.reason}{gone}"
        log.info("scaled", extra={"autoscaler": self._name, "from": asked, "to": steps.asked, "reason": verdict.reason})
        await self.record(resource, word, "Scale", note)

    async def tell(self, resource: Json, report: Report) -> None:
        """Status and Events, where there is something new. Raises ClusterError."""
        self._metrics.show_conditions(self._name, report.conditions)
        now = self._clock.monotonic()
        before = resource.get("status") or {}
        after = merged(before, report, self._clock.wall())
        if not worth_writing(before, after, now - self._told_at):
            return
        patch = {"metadata": {"resourceVersion": resource["metadata"]["resourceVersion"]}, "status": after}
        await self._cluster.patch(QUEUE_AUTOSCALERS, self._name, patch, "status")
        self._told_at = now
        for each in news(before, report.conditions):
            note = f"{each.type} is {each.status.value}: {each.message}"
            await self.record(resource, each.reason, each.type, note, warning=each.warning)

    def measure(self, scene: Scene, report: Report, asked: int, figures: Mapping[str, float]) -> None:
        """As metrics. `asked`: replicas that the workload is asked for now."""
        metrics = self._metrics
        gauges = {
            metrics.desired: report.desired,
            metrics.asked: asked,
            metrics.ready: report.ready,
            metrics.loading: report.loading,
            metrics.draining: report.draining,
            metrics.held: report.held_requests,
        }
        for gauge, value in gauges.items():
            gauge.labels(self._name).set(value or 0)
        metrics.show_figures(self._name, figures)
        for each in scene.replicas:
            started = self._started.pop(each.name, None)
            if each.ready_at is None:
                self._started[each.name] = each.created_at
            elif started is not None:
                metrics.cold_start.labels(self._name).observe(each.ready_at - started)
        self._started = {name: at for name, at in self._started.items() if name in scene.pods}

    def forget(self) -> None:
        """What was true is not any more, or another process tells it."""
        self._metrics.forget(self._name)


def report_of(
    resource: Json,
    scene: Scene,
    decision: Decision,
    verdict: Verdict,
    *,
    spare: int,
    held: int,
    scaled: Scaled | None,
) -> Report:
    return Report(
        generation=resource["metadata"].get("generation", 0),
        conditions=(
            Condition("Ready", Is.TRUE, "Reconciled", f"{scene.target} is looked after"),
            _metrics_available(scene),
            _failing(scene),
            verdict.active,
            verdict.limited,
        ),
        reason=verdict.reason,
        desired=verdict.desired,
        spare=spare,
        ready=sum(each.phase is Phase.READY for each in scene.replicas),
        loading=sum(each.phase in COMING for each in scene.replicas),
        draining=len(scene.draining),
        replicas=scene.scale.observed,
        selector=scene.scale.selector,
        held_requests=held,
        learned={LEARNED[name]: value for name, value in decision.figures.items() if name in LEARNED},
        scaled=scaled,
    )


def refusal(resource: Json, word: str, message: str) -> Report:
    """The resource cannot be followed as it is; nothing is done."""
    return Report(
        generation=resource["metadata"].get("generation", 0),
        conditions=(
            Condition("Ready", Is.FALSE, word, message, warning=True),
            Condition("MetricsAvailable", Is.UNKNOWN, word),
            Condition("ReplicasFailing", Is.UNKNOWN, word),
            Condition("ScalingActive", Is.FALSE, word, message),
            Condition("ScalingLimited", Is.FALSE, word),
        ),
        reason=message,
    )


def _metrics_available(scene: Scene) -> Condition:
    serving = [each for each in scene.replicas if each.phase in SERVING]
    silent = [each.name for each in serving if each.load is None or each.observed_at < scene.fresh_since]
    if not serving:
        return Condition("MetricsAvailable", Is.UNKNOWN, "NoReplicas", "no replica serves")
    if not silent:
        return Condition("MetricsAvailable", Is.TRUE, "Found", f"all of {len(serving)} replicas say what they do")
    names = ", ".join(silent[:NAMED]) + (" …" if len(silent) > NAMED else "")
    word = "Missing" if len(silent) == len(serving) else "Partial"
    told = f"{len(silent)} of {len(serving)} are silent: {names}"
    return Condition("MetricsAvailable", Is.FALSE, word, told, warning=True)


def _failing(scene: Scene) -> Condition:
    """All causes are its reason, so that there is an Event for each new one, however many replicas it stops."""
    found: dict[str, Failure] = {}
    for each in scene.replicas:
        if (failure := scene.pods[each.name].failure) is not None:
            found[each.name] = failure
        elif each.phase is Phase.FAILED:
            found[each.name] = Failure("ServerFailed", "its server says that it has failed, or has no model")
    ended = {each.name: each.failure for each in scene.ended if each.failure is not None}
    if not found and not ended:
        return Condition("ReplicasFailing", Is.FALSE, "NoneFails", "no replica fails")
    told = [f"{len(found)} of {len(scene.replicas)} fail: {_named(found)}"] if found else []
    told += [f"{len(ended)} ended lately, in whose place are others: {_named(ended)}"] if ended else []
    causes = ",".join(sorted({each.cause for each in (*found.values(), *ended.values())}))
    return Condition("ReplicasFailing", Is.TRUE, causes, "; ".join(told), warning=True)


def _named(failures: Mapping[str, Failure]) -> str:
    told = [f"{name}: {each.cause}, {each.text}" for name, each in sorted(failures.items())]
    return "; ".join(told[:NAMED]) + (f"; and {len(told) - NAMED} more" if len(told) > NAMED else "")
