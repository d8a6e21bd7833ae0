"""One look at one QueueAutoscaler: read everything, decide, do the next step, tell.

resource, /scale, pods ─► GetLoad of each ─► policy ─► verdict ─► plan ─► pods, /scale ─► status, Events, metrics

Level-triggered: each look starts from what the cluster says now, and does the first steps of the way from there to
where it should be. So it does not matter what woke it, what became of the step before, or who led then. What is
remembered between looks makes better decisions, and is not needed for right ones. Nothing is written where nothing has
changed.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from autoscaler.clock import Clock
from autoscaler.cluster.face import PODS, QUEUE_AUTOSCALERS, Cluster, ClusterError, Json
from autoscaler.cluster.objects import Pod, items, pod, scale
from autoscaler.decision import Decision, Policy
from autoscaler.drain import DrainTimes, Hands, Plan, Scene, draining_since, plan
from autoscaler.events import Recorder
from autoscaler.fleet import Observation, Phase, Replica
from autoscaler.front import Cover, Front
from autoscaler.metrics import Metrics
from autoscaler.resource import InvalidSpecError, Spec, read_spec
from autoscaler.rivals import rival
from autoscaler.settings import Settings
from autoscaler.status import Condition, Is, Report, Scaled, merged, news, worth_writing
from autoscaler.verdict import Verdict, judge

log = logging.getLogger(__name__)

COMING = (Phase.PENDING, Phase.STARTING, Phase.LOADING)
STALE_INTERVALS = 3  # after which a load is not known any more
RIVAL_SECONDS = 30.0  # between two looks for others that scale the same workload
WRONG_SECONDS = 30.0  # between two looks at a resource that cannot be followed as it is
# Figures of decisions that are facts about the workload, and stand in the status.
LEARNED = {"cold_start_seconds": "coldStartSeconds", "replica_work_ratio": "replicaWorkRatio"}


class GoneError(Exception):
    """There is no such resource any more."""


class Observer(Protocol):
    """Asks replicas for their load."""

    async def look(self, pods: Sequence[Pod], spec: Spec, at: float) -> tuple[Replica, ...]:
        """Of each pod; who does not answer keeps its last load. `at`: Unix seconds."""

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Tools:
    """What looks are done with. `cluster` lets nothing be written by a process that does not lead."""

    cluster: Cluster
    recorder: Recorder
    metrics: Metrics
    clock: Clock
    observer: Callable[[], Observer]  # one for each resource
    policy: Callable[[Settings], Policy]  # raises ValueError that says what cannot be
    front: Front | None = None
    drain: DrainTimes = field(default_factory=DrainTimes)


class Reconciler:
    """Of the resource of this name. `look` is never called twice at the same time."""

    def __init__(self, name: str, tools: Tools) -> None:
        self.name = name
        self.selector = ""  # of the workload's pods, once known
        self._tools = tools
        self._hands = Hands(tools.cluster)
        ours = tools.front is not None and tools.front.autoscaler == name
        self._cover = Cover(tools.front, tools.cluster) if tools.front is not None and ours else None
        self._observer = tools.observer()
        self._policy: Policy | None = None
        self._settings: Settings | None = None
        self._rival: str | None = None
        self._rival_at = -math.inf
        self._told_at = -math.inf  # when the status was written
        self._asked: int | None = None  # that the workload should be asked for, if nobody else has changed it
        self._untold: Scaled | None = None  # what the status does not say yet
        self._started: dict[str, float] = {}  # creation of pods that were not ready yet, by name

    async def look(self) -> float:
        """Returns after how many seconds to look again.

        Raises:
            GoneError, NotLeaderError
            ClusterError: try again.
        """
        resource = await self._resource()
        try:
            spec = read_spec(resource)
            policy = self._policy_for(spec.settings)
        except (InvalidSpecError, ValueError) as error:
            return await self._refuse(resource, "InvalidSpec", str(error))
        try:
            scene = await self._see(spec, policy)
        except ClusterError as error:
            if error.code not in (403, 404):
                raise
            word = "TargetNotFound" if error.not_found else "TargetForbidden"
            return await self._refuse(resource, word, f"{spec.target} cannot be scaled: {error}")
        await self._look_for_rival(resource, spec)
        decision = self._decide(policy, scene)
        verdict = judge(spec, scene.scale.replicas, decision, self._rival)
        self._untold = await self._act(resource, spec, scene, verdict) or self._untold
        await self._tell(resource, self._report(resource, scene, decision, verdict))
        self._untold = None
        return policy.interval_seconds

    # -- seeing --------------------------------------------------------------------------------------------------

    async def _resource(self) -> Json:
        try:
            return await self._tools.cluster.get(QUEUE_AUTOSCALERS, self.name)
        except ClusterError as error:
            if error.not_found:
                raise GoneError(self.name) from error
            raise

    def _policy_for(self, settings: Settings) -> Policy:
        """A new one for new settings: what was promised is part of what it learnt."""
        if self._policy is None or settings != self._settings:
            self._policy, self._settings = self._tools.policy(settings), settings
        return self._policy

    async def _see(self, spec: Spec, policy: Policy) -> Scene:
        cluster, target = self._tools.cluster, spec.target
        asked = scale(await cluster.get(target.resource, target.name, "scale"))
        self.selector = asked.selector
        listed = items(await cluster.list(PODS, asked.selector)) if asked.selector else ()
        pods = [each for each in map(pod, listed) if each.holds_place or each.deleted_at is not None]
        at = self._tools.clock.wall()
        replicas = await self._observer.look(pods, spec, at)
        here = {each.name: each for each in pods if each.holds_place}
        seen = [_as_marked(each, here) for each in replicas]
        return Scene(
            at=at,
            target=target,
            scale=asked,
            pods=here,
            replicas=tuple(each for each in seen if each.name in here),
            others=tuple(each for each in seen if each.name not in here),
            fresh_since=at - STALE_INTERVALS * policy.interval_seconds,
        )

    async def _look_for_rival(self, resource: Json, spec: Spec) -> None:
        now = self._tools.clock.monotonic()
        if now - self._rival_at >= RIVAL_SECONDS:
            self._rival = await rival(self._tools.cluster, resource, spec.target)
            self._rival_at = now

    # -- deciding ------------------------------------------------------------------------------------------------

    def _decide(self, policy: Policy, scene: Scene) -> Decision:
        observation = Observation(
            at=scene.at,
            desired=scene.wanted,
            replicas=(*scene.replicas, *scene.others),
            held_requests=self._cover.held_requests if self._cover is not None else 0,
            oldest_held_seconds=self._cover.oldest_held_seconds if self._cover is not None else 0.0,
        )
        with self._tools.metrics.decision_seconds.labels(self.name).time():
            return policy.decide(observation)

    # -- acting --------------------------------------------------------------------------------------------------

    async def _act(self, resource: Json, spec: Spec, scene: Scene, verdict: Verdict) -> Scaled | None:
        """The next step. What was decided, if that is another number than before."""
        asked, before = scene.scale.replicas, scene.wanted
        if self._asked is not None and asked != self._asked:
            note = f"{scene.target} was scaled from {self._asked} to {asked} by another hand"
            await self._record(resource, "ScaledByHand", "Look", note)
        self._asked = asked
        steps = plan(scene, verdict.desired, self._tools.drain) if verdict.acts else Plan(asked)
        if self._cover is not None and not spec.dry_run:
            await self._cover.arrange(spec, scene, steps)
        if not verdict.acts:
            told = verdict.desired == (resource.get("status") or {}).get("desired")
            news = spec.dry_run and not told and verdict.desired != before
            return Scaled(scene.at, before, verdict.desired, verdict.reason, written=False) if news else None
        self._asked = None  # until it is certain what has become of it
        await self._hands.carry_out(steps, scene)
        self._asked = steps.asked
        await self._announce(resource, scene, steps, verdict)
        return Scaled(scene.at, before, verdict.desired, verdict.reason) if verdict.desired != before else None

    async def _announce(self, resource: Json, scene: Scene, steps: Plan, verdict: Verdict) -> None:
        asked = scene.scale.replicas
        metrics = self._tools.metrics
        for why in steps.doomed.values():
            metrics.drained.labels(self.name, why).inc()
        if steps.drain:
            names = ", ".join(steps.drain)
            await self._record(resource, "Draining", "Drain", f"{names} drain for {verdict.desired}: {verdict.reason}")
        if back := [name for name in steps.keep if name in scene.draining]:
            await self._record(resource, "DrainReversed", "Drain", f"{', '.join(back)} serve again: {verdict.reason}")
        if steps.asked == asked:
            return
        out = steps.asked > asked
        metrics.scale_events.labels(self.name, "out" if out else "in").inc()
        gone = "".join(f"; {name}: {why}" for name, why in steps.doomed.items())
        word = "ScaledOut" if out else "ScaledIn"
        note = f"{scene.target} from {asked} to {steps.asked}: {verdict.reason}{gone}"
        log.info("scaled", extra={"autoscaler": self.name, "from": asked, "to": steps.asked, "reason": verdict.reason})
        await self._record(resource, word, "Scale", note)

    # -- telling -------------------------------------------------------------------------------------------------

    def _report(self, resource: Json, scene: Scene, decision: Decision, verdict: Verdict) -> Report:
        replicas = scene.replicas
        ready = [each for each in replicas if each.phase is Phase.READY]
        loading = [each for each in replicas if each.phase in COMING]
        held = self._cover.held_requests if self._cover is not None else 0
        self._measure(scene, decision, verdict, len(ready), len(loading), held)
        return Report(
            generation=resource["metadata"].get("generation", 0),
            conditions=(
                Condition("Ready", Is.TRUE, "Reconciled", f"{scene.target} is looked after"),
                self._metrics_available(scene),
                verdict.active,
                verdict.limited,
            ),
            reason=verdict.reason,
            desired=verdict.desired,
            ready=len(ready),
            loading=len(loading),
            draining=len(scene.draining),
            replicas=scene.scale.observed,
            selector=scene.scale.selector,
            held_requests=held,
            learned={LEARNED[name]: value for name, value in decision.figures.items() if name in LEARNED},
            scaled=self._untold,
        )

    def _metrics_available(self, scene: Scene) -> Condition:
        serving = [each for each in scene.replicas if each.phase in (Phase.READY, Phase.DRAINING)]
        silent = [each.name for each in serving if each.load is None or each.observed_at < scene.fresh_since]
        if not serving:
            return Condition("MetricsAvailable", Is.UNKNOWN, "NoReplicas", "no replica serves")
        if not silent:
            return Condition("MetricsAvailable", Is.TRUE, "Found", f"all of {len(serving)} replicas say what they do")
        names = ", ".join(silent[:5]) + (" …" if len(silent) > 5 else "")
        word = "Missing" if len(silent) == len(serving) else "Partial"
        told = f"{len(silent)} of {len(serving)} are silent: {names}"
        return Condition("MetricsAvailable", Is.FALSE, word, told, warning=True)

    def _measure(self, scene: Scene, decision: Decision, verdict: Verdict, ready: int, loading: int, held: int) -> None:
        metrics = self._tools.metrics
        gauges = {
            metrics.desired: verdict.desired,
            metrics.asked: self._asked if self._asked is not None else scene.scale.replicas,
            metrics.ready: ready,
            metrics.loading: loading,
            metrics.draining: len(scene.draining),
            metrics.held: held,
        }
        for gauge, value in gauges.items():
            gauge.labels(self.name).set(value)
        metrics.show_figures(self.name, decision.figures)
        for each in scene.replicas:
            started = self._started.pop(each.name, None)
            if each.ready_at is None:
                self._started[each.name] = each.created_at
            elif started is not None:
                metrics.cold_start.labels(self.name).observe(each.ready_at - started)
        self._started = {name: at for name, at in self._started.items() if name in scene.pods}

    async def _refuse(self, resource: Json, word: str, message: str) -> float:
        """The resource cannot be followed as it is; nothing is done."""
        unknown = Condition("MetricsAvailable", Is.UNKNOWN, word)
        report = Report(
            generation=resource["metadata"].get("generation", 0),
            conditions=(
                Condition("Ready", Is.FALSE, word, message, warning=True),
                unknown,
                Condition("ScalingActive", Is.FALSE, word, message),
                Condition("ScalingLimited", Is.FALSE, word),
            ),
            reason=message,
        )
        self._asked = None
        await self._tell(resource, report)
        return WRONG_SECONDS

    async def _tell(self, resource: Json, report: Report) -> None:
        """Status and Events, where there is something new."""
        self._tools.metrics.show_conditions(self.name, report.conditions)
        now = self._tools.clock.monotonic()
        before = resource.get("status") or {}
        after = merged(before, report, self._tools.clock.wall())
        if not worth_writing(before, after, now - self._told_at):
            return
        patch = {"metadata": {"resourceVersion": resource["metadata"]["resourceVersion"]}, "status": after}
        await self._tools.cluster.patch(QUEUE_AUTOSCALERS, self.name, patch, "status")
        self._told_at = now
        for each in news(before, report.conditions):
            note = f"{each.type} is {each.status.value}: {each.message}"
            await self._record(resource, each.reason, each.type, note, warning=each.warning)

    async def close(self) -> None:
        """There will be no more looks by this process, or none for now."""
        self._tools.metrics.forget(self.name)
        await self._observer.close()

    async def end(self) -> None:
        """The resource is gone. Raises ClusterError."""
        if self._cover is not None:
            await self._cover.end()

    async def _record(self, about: Json, reason: str, action: str, note: str, *, warning: bool = False) -> None:
        await self._tools.recorder.record(about, reason, action, note, warning=warning)


def _as_marked(replica: Replica, pods: Mapping[str, Pod]) -> Replica:
    """A server does not know that it drains for us: that stands with its pod."""
    pod = pods.get(replica.name)
    marked = pod is not None and draining_since(pod) is not None
    return replace(replica, phase=Phase.DRAINING) if marked and replica.phase is Phase.READY else replica
