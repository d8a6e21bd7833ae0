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
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

from autoscaler.clock import Clock
from autoscaler.cluster.events import Recorder
from autoscaler.cluster.face import PODS, QUEUE_AUTOSCALERS, Cluster, ClusterError, Json
from autoscaler.cluster.objects import Pod, Scale, items, pod, scale
from autoscaler.controller.drain import Hands, Plan, Scene, draining_since, is_marked, let_go, plan
from autoscaler.controller.front import Cover, Front
from autoscaler.controller.metrics import Metrics
from autoscaler.controller.rivals import OLDER, rival
from autoscaler.controller.spare import Spare
from autoscaler.controller.status import Report, Scaled, zero_is_ours
from autoscaler.controller.tell import Teller, refusal, report_of
from autoscaler.controller.verdict import Verdict, held_back, judge
from autoscaler.decision import Decision, Policy
from autoscaler.fleet import Observation, Phase, Replica
from autoscaler.resource import InvalidSpecError, Spec, TargetRef, read_spec, read_target
from autoscaler.settings import Settings

log = logging.getLogger(__name__)

ENDED_SECONDS = 60.0  # that a pod which ended is told of
STALE_INTERVALS = 3  # after which a load is not known any more
RIVAL_SECONDS = 30.0  # between two looks for others that scale the same workload, or that changed our own pod
WRONG_SECONDS = 30.0  # between two looks at a resource that cannot be followed as it is


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


class Reconciler:
    """Of the resource of this name. `look` is never called twice at the same time."""

    def __init__(self, name: str, tools: Tools) -> None:
        self.name = name
        self.selector = ""  # of the workload's pods, once known
        self._tools = tools
        self._hands = Hands(tools.cluster)
        self._teller = Teller(name, tools.cluster, tools.recorder, tools.metrics, tools.clock)
        ours = tools.front is not None and tools.front.autoscaler == name
        self._cover = Cover(tools.front, tools.cluster) if tools.front is not None and ours else None
        self._observer = tools.observer()
        self._policy: Policy | None = None
        self._settings: Settings | None = None
        self._target: TargetRef | None = None
        self._rival: str | None = None
        self._rival_at = -math.inf
        self._asked: int | None = None  # that the workload should be asked for, if nobody else has changed it
        self._draining: dict[str, float] = {}  # see `_since`
        self._spare = Spare()
        self._untold: Scaled | None = None  # what the status does not say yet

    async def look(self) -> float:
        """Returns after how many seconds to look again.

        Raises:
            GoneError, NotLeaderError
            ClusterError: try again.
        """
        resource = await self._resource()
        try:
            spec = read_spec(resource)
            if self._target is not None and self._target != spec.target:
                await self._serve_again(self._target)
            policy = self._policy_for(spec)
        except (InvalidSpecError, ValueError) as error:
            await self._refuse(replace(refusal(resource, "InvalidSpec", str(error)), draining=0), resource)
            await self._stop(resource)
            return WRONG_SECONDS
        try:
            scene = await self._see(spec, policy)
        except ClusterError as error:
            if error.code not in (403, 404):
                raise
            word = "TargetNotFound" if error.not_found else "TargetForbidden"
            return await self._refuse(refusal(resource, word, f"{spec.target} cannot be scaled: {error}"), resource)
        await self._look_for_rival(resource, spec.target)
        self._spare.see(scene, self._tools.clock.monotonic(), (resource.get("status") or {}).get("spare"))
        decision = self._decide(policy, scene)
        asked, ours = scene.scale.replicas, zero_is_ours(resource)
        verdict = judge(spec, asked, decision, self._rival, zero_is_ours=ours, spare=self._spare.due)
        if scene.rolls_out:
            verdict = held_back(verdict, scene.wanted)
        self._untold = await self._act(resource, spec, scene, verdict) or self._untold
        held = self._cover.held_requests if self._cover is not None else 0
        spare = self._spare.included
        report = report_of(resource, scene, decision, verdict, spare=spare, held=held, scaled=self._untold)
        self._teller.measure(scene, report, self._asked or 0, decision.figures)
        await self._teller.tell(resource, report)
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

    def _policy_for(self, spec: Spec) -> Policy:
        """A new one for another workload, or new settings: what was promised is part of what it learnt."""
        if self._target != spec.target:
            self._target, self._policy, self._asked, self._rival_at = spec.target, None, None, -math.inf
            self._spare = Spare()
        if self._policy is None or spec.settings != self._settings:
            self._policy, self._settings = self._tools.policy(spec.settings), spec.settings
        return self._policy

    async def _find(self, target: TargetRef) -> tuple[Scale, list[Pod]]:
        cluster = self._tools.cluster
        asked = scale(await cluster.get(target.resource, target.name, "scale"))
        listed = items(await cluster.list(PODS, asked.selector)) if asked.selector else ()
        return asked, [pod(each) for each in listed]

    async def _see(self, spec: Spec, policy: Policy) -> Scene:
        target = spec.target
        asked, every = await self._find(target)
        self.selector = asked.selector
        pods = [each for each in every if each.holds_place or each.deleted_at is not None]
        at = self._tools.clock.wall()
        replicas = await self._observer.look(pods, spec, at)
        here = {each.name: each for each in pods if each.holds_place}
        going = let_go(here, asked, target)
        here = {name: each for name, each in here.items() if name not in going}
        self._draining = self._since(here, at)
        seen = [_as_marked(each, self._draining, going) for each in replicas]
        return Scene(
            at=at,
            target=target,
            scale=asked,
            pods=here,
            replicas=tuple(each for each in seen if each.name in here),
            others=tuple(each for each in seen if each.name not in here),
            ended=tuple(each for each in every if each.ended_at is not None and at - each.ended_at < ENDED_SECONDS),
            draining=self._draining,
            fresh_since=at - STALE_INTERVALS * policy.interval_seconds,
        )

    def _since(self, pods: Mapping[str, Pod], at: float) -> dict[str, float]:
        """When each that drains began to: as it is marked, which may be by a clock ahead of ours, and no later than it
        was seen here first, nor than now, where a clock was set back."""
        marks = {name: since for name, pod in pods.items() if (since := draining_since(pod)) is not None}
        return {name: min(self._draining.get(name, since), at) for name, since in marks.items()}

    async def _look_for_rival(self, resource: Json, target: TargetRef) -> None:
        now = self._tools.clock.monotonic()
        if now - self._rival_at >= RIVAL_SECONDS:
            self._rival = await rival(self._tools.cluster, resource, target)
            self._rival_at = now
            if self._cover is not None:
                self._cover.doubt()

    @property
    def _yields(self) -> bool:
        """What an older QueueAutoscaler has begun is not ours to undo."""
        return self._rival is not None and self._rival.startswith(OLDER)

    # -- deciding ------------------------------------------------------------------------------------------------

    def _decide(self, policy: Policy, scene: Scene) -> Decision:
        observation = Observation(
            at=scene.at,
            desired=scene.wanted - self._spare.included,
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
            await self._teller.record(resource, "ScaledByHand", "Look", note)
        self._asked = asked
        # Who does not act leaves the workload as if it had never been touched: what drains serves again.
        desired = verdict.desired if verdict.acts else asked
        steps = Plan(asked) if self._yields else plan(scene, desired, spec.drain_seconds)
        if self._cover is not None:
            await self._cover.arrange(spec, scene, steps)
        self._spare.note(before, verdict)
        self._asked = None  # until it is certain what has become of it
        await self._hands.carry_out(steps, scene)
        self._asked = steps.asked
        await self._teller.announce(resource, scene, steps, verdict)
        scaled = Scaled(scene.at, before, verdict.desired, verdict.reason, written=verdict.acts)
        if verdict.acts:
            return scaled if verdict.desired != before else None
        told = verdict.desired == (resource.get("status") or {}).get("desired")
        return scaled if spec.dry_run and not told and verdict.desired != before else None

    async def _stop(self, resource: Json) -> None:
        """The spec cannot be followed: what drains would neither go nor serve until somebody has corrected it."""
        with suppress(InvalidSpecError):
            target = self._target or read_target(resource)
            await self._look_for_rival(resource, target)
            await self._serve_again(target)

    async def _serve_again(self, target: TargetRef) -> None:
        """All that drain or were to go, but for those that their controller is about to delete. Raises ClusterError."""
        if self._yields:
            return
        try:
            asked, pods = await self._find(target)
        except ClusterError as error:
            if error.code not in (403, 404):
                raise
            log.warning("drains not ended", extra={"autoscaler": self.name, "reason": str(error)})
            return
        here = {each.name: each for each in pods if each.holds_place}
        going = let_go(here, asked, target)
        marked = [each for each in here.values() if is_marked(each) and each.name not in going]
        await self._hands.give_back(marked, target)

    async def _refuse(self, report: Report, resource: Json) -> float:
        self._asked = None
        await self._teller.tell(resource, report)
        return WRONG_SECONDS

    # -- the end, and what is done without leading -----------------------------------------------------------------

    async def close(self) -> None:
        """There will be no more looks by this process, or none for now."""
        self._teller.forget()
        await self._observer.close()

    async def end(self) -> None:
        """The resource is gone: the workload stays as it is, and what drains serves again. Raises ClusterError."""
        if self._cover is not None:
            await self._cover.end()
        if self._target is not None:
            await self._serve_again(self._target)

    async def hand_over(self) -> None:
        """What is held by this process goes to replicas, or to the process that leads. Nothing is written.

        Raises:
            GoneError, InvalidSpecError, ValueError, ClusterError
        """
        if self._cover is not None:
            spec = read_spec(await self._resource())
            await self._cover.pass_on(spec, await self._see(spec, self._policy_for(spec)))


def _as_marked(replica: Replica, draining: Collection[str], going: Collection[str]) -> Replica:
    """A server does not know that it drains for us, or will be deleted: that stands with its pod."""
    marked = (replica.name in draining and replica.phase is Phase.READY) or replica.name in going
    return replace(replica, phase=Phase.DRAINING) if marked else replica
