"""The cluster around the engines: nodes, cold starts, failures, drains; and the policy that looks at it.

                create            node                       server answers      ready
    desired ───────────► PENDING ──────► STARTING ─────────────────────► LOADING ──────► READY ──► DRAINING ──► gone
                                            ▲      what failed begins anew  │              │ crash
                                            └───────────────────────────────┴──────────────┘

Time goes from event to event; between two of them the kernel hands out what arrives. A policy sees what real replicas
say of themselves and nothing else. `desired` is what was asked for last. When it grows, replicas that drain are taken
back first; when it shrinks, those that are furthest from ready go first, then ready ones drain.

A GPU is paid for from the moment a replica has a node until it is gone.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable

import numpy as np

from autoscaler.decision import Policy
from autoscaler.fleet import Load, Observation, Phase, Replica, StepCost
from autoscaler.simulate.curve import Curve
from autoscaler.simulate.engines import Engines
from autoscaler.simulate.options import Slo, WorldOptions
from autoscaler.simulate.pods import Look, Pod
from autoscaler.simulate.result import Life
from autoscaler.simulate.traces import Trace

EPOCH = 1_700_006_400.0  # Unix seconds at which traces start: a midnight, UTC
AGE = 3600.0  # of the replicas that are there when a trace starts
ETA_SIGMA = 0.2  # of the logarithm of the factor by which a loading replica misjudges how long it still needs
Sample = tuple[Load | None, float]  # what a replica said, and when
GONE_FIRST = (Phase.PENDING, Phase.STARTING, Phase.LOADING)


class World:
    def __init__(self, trace: Trace, policy: Policy, curve: Curve, slo: Slo, options: WorldOptions, seed: int) -> None:
        self.engines = Engines(trace, curve, slo, options.dispatch_choices, seed)
        self.looks: list[Look] = []
        self.pods: list[Pod] = []  # that are not gone, in the order of their creation
        self.gone: list[Pod] = []
        self.scale_outs = self.scale_ins = self.crashes = self.failed_starts = self.max_ready = 0
        self.desired = options.initial_replicas
        self._policy, self._options, self._end = policy, options, trace.duration_s
        self._random = np.random.default_rng(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._names = itertools.count()
        error, cost = options.step_cost_error, curve.step_cost
        costs = cost.base, cost.per_prefill_token, cost.per_decode_row, cost.per_context_token
        self._reported_cost = StepCost(*(error * each for each in costs))
        self._samples: dict[str, Sample] = {}  # the latest
        self._snapshots: deque[dict[str, Sample]] = deque()
        for _ in range(options.initial_replicas):
            pod = self._create(-AGE - options.node_delay_seconds - self._around(options.cold_start_seconds))
            pod.reserved, pod.node, pod.eta_factor = True, -AGE, 1.0
            self._become_ready(pod)
            pod.ready = -AGE

    @property
    def now(self) -> float:
        return self.engines.now

    @property
    def lives(self) -> tuple[Life, ...]:
        pods = *self.gone, *self.pods
        return tuple(Life(each.name, each.created, each.node, each.ready, each.gone) for each in pods)

    def run(self) -> None:
        """Until the last arrival with the policy, then without it until all is answered or the tail is over."""
        interval, lag = self._policy.interval_seconds, self._options.metric_lag_seconds
        for number in range(1, int(self._end / interval) + 1):
            self._at(max(number * interval - lag, 0.0), self._snapshot)
            self._at(number * interval, self._decide)
        self._run_events(self._end)
        self._run_events(self._end + self._options.tail_seconds)
        self.engines.look(self._slots())

    def _run_events(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            at, _, happen = heapq.heappop(self._events)
            self.engines.run_to(at)
            happen()
        self.engines.run_to(np.nextafter(until, np.inf))

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), happen))

    def _later(self, pod: Pod, seconds: float, happen: Callable[[Pod], None]) -> None:
        """Unless the pod is gone or started anew by then."""
        life = pod.life
        self._at(self.now + seconds, lambda: happen(pod) if pod.life == life and pod.gone is None else None)

    def _around(self, median: float) -> float:
        return float(median * np.exp(self._random.normal(0, self._options.cold_start_sigma)))

    # -- the life of a pod -----------------------------------------------------------------------------------------

    def _create(self, at: float) -> Pod:
        pod = Pod(f"replica-{next(self._names)}", at)
        pod.eta_factor = float(np.exp(self._random.normal(0, ETA_SIGMA)))
        self.pods.append(pod)
        return pod

    def _schedule(self) -> None:
        """Nodes for those that wait, the oldest first, as far as there are any."""
        reserved = sum(pod.reserved for pod in self.pods)
        for pod in self.pods:
            if pod.reserved:
                continue
            if self._options.schedulable is not None and reserved >= self._options.schedulable:
                pod.unschedulable_since = self.now if pod.unschedulable_since is None else pod.unschedulable_since
                continue
            pod.reserved = True
            reserved += 1
            if self._options.node_delay_seconds:
                pod.unschedulable_since = pod.created
                self._later(pod, self._around(self._options.node_delay_seconds), self._get_node)
            else:
                self._get_node(pod)

    def _get_node(self, pod: Pod) -> None:
        pod.node, pod.unschedulable_since = self.now, None
        self._start(pod)

    def _start(self, pod: Pod) -> None:
        pod.life += 1
        pod.phase = Phase.STARTING
        seconds = self._around(self._options.cold_start_seconds)
        pod.expected = self.now + seconds
        self._later(pod, seconds * (1 - self._options.loading_share), self._load)
        failed = self._random.random() < self._options.provisioning_failure
        self._later(pod, seconds, self._fail if failed else self._become_ready)

    def _load(self, pod: Pod) -> None:
        pod.phase = Phase.LOADING

    def _fail(self, pod: Pod) -> None:
        self.failed_starts += 1
        self._start(pod)

    def _become_ready(self, pod: Pod) -> None:
        pod.phase, pod.slot = Phase.READY, self.engines.open()
        pod.ready = self.now if pod.ready is None else pod.ready
        self._accept()
        if self._options.mtbf_seconds is not None:
            self._later(pod, float(self._random.exponential(self._options.mtbf_seconds)), self._crash)

    def _crash(self, pod: Pod) -> None:
        """Its container starts anew on the node that it has; one that drained is gone."""
        self.crashes += 1
        draining = pod.phase is Phase.DRAINING
        pod.phase = Phase.FAILED
        self._take_engine(pod)
        if draining:
            self._remove(pod, self.now)
        else:
            self._start(pod)

    def _take_engine(self, pod: Pod) -> None:
        """What it had not finished goes to others, or is lost."""
        self._accept()
        if pod.slot is None:
            return
        self.engines.look([pod.slot])
        unfinished = self.engines.close(pod.slot)
        pod.slot = None
        if self._options.retry:
            self.engines.put_back(unfinished)
        else:
            self.engines.lose(unfinished)

    def _drain(self, pod: Pod) -> None:
        pod.phase = Phase.DRAINING
        since = pod.draining_since = self.now
        self._later(pod, self._options.drain_seconds, lambda one: self._end_drain(one, since))

    def _end_drain(self, pod: Pod, since: float) -> None:
        """Unless that drain was taken back: another one has a limit of its own."""
        if pod.phase is Phase.DRAINING and pod.draining_since == since:
            self._take_engine(pod)
            self._remove(pod, self.now)

    def _remove(self, pod: Pod, at: float) -> None:
        pod.gone, pod.reserved = at, False
        self.pods.remove(pod)
        self.gone.append(pod)

    def _reap(self) -> None:
        """Those that drained and are idle are gone since their last step."""
        draining = [pod for pod in self.pods if pod.phase is Phase.DRAINING and pod.slot is not None]
        slots = [pod.slot for pod in draining if pod.slot is not None]
        self.engines.look(slots)
        for pod, slot, left in zip(draining, slots, self.engines.outstanding(slots), strict=True):
            if left == 0:
                at = max(pod.draining_since, self.engines.clock(slot))
                self.engines.close(slot)
                pod.slot = None
                self._remove(pod, at)

    # -- scaling ---------------------------------------------------------------------------------------------------

    def _slots(self, *phases: Phase) -> list[int]:
        return [pod.slot for pod in self.pods if pod.slot is not None and (not phases or pod.phase in phases)]

    def _accept(self) -> None:
        self.engines.accept(self._slots(Phase.READY))

    def _snapshot(self) -> None:
        """What replicas say now; a policy sees it when it is as old as the lag says."""
        serving = [pod for pod in self.pods if pod.slot is not None]
        slots = self._slots()
        self.engines.look(slots)
        loads = self.engines.loads(slots, self._reported_cost)
        said = {pod.name: load for pod, load in zip(serving, loads, strict=True)}
        said |= {pod.name: Load() for pod in self.pods if pod.phase is Phase.LOADING}
        lost = self._options.sample_loss
        heard = {name for name in said if not lost or self._random.random() >= lost}
        before = self._samples
        self._samples = {
            name: (load, EPOCH + self.now) if name in heard else before.get(name, (None, 0.0))
            for name, load in said.items()
        }
        self._snapshots.append(self._samples)

    def _decide(self) -> None:
        self._reap()
        self._schedule()
        observation = self._observe()
        wanted = self._policy.decide(observation).desired
        desired = min(max(wanted, self._options.min_replicas), self._options.max_replicas)
        self.scale_outs += desired > self.desired
        self.scale_ins += desired < self.desired
        self.desired = desired
        self._scale()
        ready = len(observation.in_phase(Phase.READY))
        self.max_ready = max(self.max_ready, ready)
        loads = [each.load for each in observation.replicas if each.load is not None]
        queued = sum(load.queued_requests for load in loads) + observation.held_requests
        running = sum(load.running_requests for load in loads)
        billed = sum(pod.node is not None for pod in self.pods)
        self.looks.append(Look(self.now, desired, ready, billed, queued, running))

    def _observe(self) -> Observation:
        seen = self._snapshots.popleft()
        replicas = tuple(
            Replica(
                pod.name,
                pod.phase,
                EPOCH + pod.created,
                *seen.get(pod.name, (None, 0.0)),
                None if pod.ready is None else EPOCH + pod.ready,
                None if pod.unschedulable_since is None else EPOCH + pod.unschedulable_since,
                max(pod.expected - self.now, 0.0) * pod.eta_factor if pod.phase is Phase.LOADING else None,
            )
            for pod in self.pods
        )
        held, oldest = self.engines.waiting()
        return Observation(EPOCH + self.now, self.desired, replicas, held, self.now - oldest)

    def _scale(self) -> None:
        """Make the pods that do not drain as many as desired."""
        draining = [pod for pod in self.pods if pod.phase is Phase.DRAINING]
        more = self.desired - (len(self.pods) - len(draining))
        if more == 0:
            return
        for pod in draining[: max(more, 0)]:
            pod.phase = Phase.READY
        for _ in range(more - len(draining)):
            self._create(self.now)
        if more < 0:
            self._shrink(-more)
        self._schedule()
        self._accept()

    def _shrink(self, count: int) -> None:
        starting = [pod for phase in GONE_FIRST for pod in reversed(self.pods) if pod.phase is phase]
        for pod in starting[:count]:
            self._remove(pod, self.now)
        ready = [pod for pod in self.pods if pod.phase is Phase.READY]
        for pod in self._victims(ready)[: max(count - len(starting), 0)]:
            self._drain(pod)

    def _victims(self, ready: list[Pod]) -> list[Pod]:
        """The first to go first."""
        if self._options.victims == "newest":
            return ready[::-1]
        if self._options.victims == "random":
            return [ready[place] for place in self._random.permutation(len(ready))]
        slots = [pod.slot for pod in ready if pod.slot is not None]
        self.engines.look(slots)
        loads = self.engines.outstanding(slots)
        return [ready[place] for place in sorted(range(len(ready)), key=lambda place: (loads[place], -place))]
