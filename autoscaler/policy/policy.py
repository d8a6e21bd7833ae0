"""How many replicas: what the load asks for, then what the owner allows.

    arrivals ─► work ─► forecasts ─► shadows ─► need ─┬─► blind? ─► limits ─► decision
    (meter)     (seconds of engine)  (headroom)       │
    real queue, KV pages, held requests ──────────────┘

Invariants: the answer is within the bounds of that moment; more in the queue never makes it smaller; a sample that is
missing never makes it smaller; replicas that load are among those that are asked for, so that a queue that waits for
them asks for no more; the same looks make the same answers.
"""

from __future__ import annotations

import math

from autoscaler.decision import Decision, Limit
from autoscaler.fleet import Observation, Phase
from autoscaler.policy.arrivals import ArrivalMeter, Traffic
from autoscaler.policy.coldstart import ColdStart
from autoscaler.policy.fluid import flow_of
from autoscaler.policy.forecast import FAST, Forecasts, Most
from autoscaler.policy.limits import Limits
from autoscaler.policy.mirror import Mirror
from autoscaler.policy.plain import by_queue, by_slots
from autoscaler.policy.shadows import Look, Promise, Shadows
from autoscaler.policy.work import Calibration, Engine, engine_of, scaled
from autoscaler.settings import Settings

INTERVAL = 5.0  # seconds between two looks
SETTLING = 60.0  # seconds of arrivals before shadows start: the first rates are chance
KV_SHARE = 0.9  # of its pages that a replica may use
NODE_SECONDS = 120.0  # that a node may take to come, before we take it that there is none
CHANCE = 2.0  # variance of work, over its mean times that of one request: Poisson arrivals of exponential work
QUEUE_SHARE = 0.5  # of the time that may go by in the queue, at which the real one is a reason to grow


class QueuePolicy:
    """See the module. Implements `autoscaler.decision.Policy`."""

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError that names what in the settings cannot be."""
        self._settings = settings
        self._limits = Limits(settings)
        self._meter = ArrivalMeter(INTERVAL)
        self._cold = ColdStart()
        self._forecasts = Forecasts()
        self._shadows = Shadows(self._forecasts.names, settings.max_replicas)
        self._mirror = Mirror()
        self._urgent = Most(0.0)  # replicas that the real queue and pages asked for
        self._calibration = Calibration()
        self._engine: Engine | None = None
        self._settled = 0.0
        self._busy_at: float | None = None  # when there was something to do
        self._asked: int | None = None  # what we answered
        self._first = 0  # what there was asked for when we came
        self._found: int | None = None  # what there was asked for at the look before
        self._grew = -math.inf  # when that became more

    @property
    def interval_seconds(self) -> float:
        return INTERVAL

    def decide(self, observation: Observation) -> Decision:
        at, current = observation.at, observation.desired
        self._cold.observe(at, observation.replicas)
        traffic = self._meter.observe(observation)
        if self._busy_at is None or self._is_busy(observation, traffic):
            self._busy_at = at
        least, most = self._limits.bounds(at)
        if self._found is not None and not self._is_ours(current):
            self._limits.restart(at, current, self._cold.horizon(at, observation.replicas) + INTERVAL)
        elif self._found is None:
            self._first = current
        if self._found is not None and current > self._found:
            self._grew = at
        self._found = current
        decision = self._at_zero(observation, traffic, least) or self._some(observation, traffic, least, most)
        self._asked = decision.desired
        return decision

    def _is_ours(self, current: int) -> bool:
        """Whether what is asked for now is what was found before, what we answered to that, or on the way there."""
        ends = [each for each in (self._found, self._asked) if each is not None]
        return min(ends) <= current <= max(ends)

    # -- from and to nothing -------------------------------------------------------------------------------------

    def _is_busy(self, observation: Observation, traffic: Traffic) -> bool:
        waiting = any(each.load.running_requests or each.load.queued_requests for each in traffic.heard if each.load)
        return bool(observation.held_requests or traffic.requests or traffic.silent or waiting)

    def _at_zero(self, observation: Observation, traffic: Traffic, least: int) -> Decision | None:
        """What there is to say while nothing is asked for, or nothing is to be; None: as usual."""
        zero, current = self._settings.scale_to_zero, observation.desired
        if current == 0 and not zero.enabled and self._settings.min_replicas > 0:
            return Decision(0, "paused: set to 0 by hand, and scale to zero is off")
        if current == 0 and least == 0 and not observation.held_requests:
            if traffic.requests > 0 and observation.in_phase(Phase.DRAINING):
                return None  # they come to the last one while it drains: it is to stay
            return Decision(0, "no requests")
        if not zero.enabled or least > 0 or current == 0:
            return None
        idle = observation.at - (self._busy_at or observation.at)
        if idle >= zero.idle_seconds:
            return Decision(0, f"no requests for {idle:.0f} s", figures={"idle_seconds": idle})
        return None

    # -- as usual --------------------------------------------------------------------------------------------------

    def _some(self, observation: Observation, traffic: Traffic, least: int, most: int) -> Decision:
        at, current = observation.at, observation.desired
        horizon = self._cold.horizon(at, observation.replicas) + INTERVAL
        lowest = max(least, 1)
        need, why, figures = self._need(observation, traffic, horizon, lowest, most)
        figures |= {"horizon_seconds": horizon, "silent_replicas": float(len(traffic.silent))}
        if self._cold.seconds is not None:
            figures["cold_start_seconds"] = self._cold.seconds
        limit: Limit | None = None
        if traffic.silent:
            need, why = self._blind(need, current, traffic, why)
            limit = Limit.BLIND if need >= current else None
        wanted = need
        desired, paced = self._limits.apply(at, current, need)
        limit = paced or limit
        stuck = [
            each
            for each in observation.replicas
            if each.unschedulable_since is not None and at - each.unschedulable_since >= NODE_SECONDS
        ]
        if stuck and desired >= current:
            desired, limit = current, Limit.NO_NODES
            why += f"; no node for {len(stuck)} pending, no further growth"
        bounded = min(max(desired, lowest), most)
        if bounded != desired or (wanted > most and bounded == most):
            limit = Limit.MAX_REPLICAS if wanted > most else Limit.MIN_REPLICAS
        return Decision(bounded, self._words(observation, why, wanted, bounded), limit, figures)

    def _need(
        self, observation: Observation, traffic: Traffic, horizon: float, lowest: int, most: int
    ) -> tuple[int, str, dict[str, float]]:
        """Replicas that the load asks for, why, and figures."""
        loads = [each.load for each in traffic.heard if each.load is not None]
        target = self._settings.target
        if target.queued_tokens_per_replica:
            need, why = by_queue(loads, target.queued_tokens_per_replica)
            return max(need, lowest), why, {}
        self._engine = engine_of(loads) or self._engine
        if self._engine is None:
            return *(by_slots(loads) or (observation.desired, "step costs and slots unknown, holding")), {}
        return self._by_work(self._engine, observation, traffic, horizon, lowest, most)

    def _by_work(
        self, engine: Engine, observation: Observation, traffic: Traffic, horizon: float, lowest: int, most: int
    ) -> tuple[int, str, dict[str, float]]:
        target = self._settings.target
        mix = traffic.mix
        if traffic.heard and traffic.seconds > 0:
            count = len(traffic.heard)
            prefill = engine.cost.per_prefill_token * traffic.computed / traffic.seconds / count
            rows = traffic.row_seconds / traffic.seconds / count
            self._calibration.add(engine, mix, prefill, rows, traffic.tokens / count, traffic.seconds)
        engine = scaled(engine, self._calibration.factor)
        flow = flow_of(engine, mix, traffic.requests, traffic.prompt_tokens)
        each = engine.most_work(mix, target.itl_seconds)
        work = flow.prefill + flow.arrivals * flow.out * flow.row_seconds
        wait = target.queue_wait_seconds or max(target.ttft_seconds - flow.own, target.ttft_seconds / 4)
        promise = Promise(wait, target.itl_seconds, target.late_share)
        demands = self._forecasts.add(observation.at, traffic.seconds, work, horizon)
        self._settled += traffic.seconds
        level = self._forecasts.level
        figures = {"demand_work_ratio": level, "replica_work_ratio": each}
        if self._settled < SETTLING or traffic.seconds <= 0:
            headroom = 1.0
            need = max(math.ceil(self._sure(level, traffic) / each - 1e-6), observation.desired)
        else:
            efficiency = self._mirror.efficiency
            look = Look(
                at=observation.at,
                seconds=traffic.seconds,
                flow=flow,
                mean=self._forecasts.mean,
                demands=demands,
                most_work=each,
                horizon=horizon,
                efficiency=efficiency,
                ready=len(traffic.heard),
                real=len(traffic.heard) if observation.at - self._grew < horizon else observation.desired,
                late=traffic.late,
                slow=traffic.slow,
                lowest=lowest,
                highest=most,
            )
            self._mirror.advance(look, promise)
            shadow = self._shadows.advance(look, promise, self._first, self._mirror.floor)
            need, headroom = shadow.ordered, shadow.factor
            figures["forecast_work_ratio"] = demands[shadow.signal]
            figures["efficiency_ratio"] = efficiency
            figures["step_cost_ratio"] = self._calibration.factor
        figures["headroom_ratio"] = headroom
        why = f"work {level:.2f} s/s, headroom {headroom:.2f}, {each:.2f} s/s each"
        urgent = 0
        for count, reason in (
            self._for_queue(engine, observation, traffic, wait, level, each, horizon),
            self._for_kv(traffic),
        ):
            if count > need:
                need, why = count, reason
            urgent = max(urgent, count)
        self._urgent.seconds = horizon
        held = int(self._urgent.add(observation.at, urgent))
        if held > need:
            need, why = held, f"{why}; {held} were needed for what waited within the last {horizon:.0f} s"
        return need, why, figures

    def _for_queue(
        self,
        engine: Engine,
        observation: Observation,
        traffic: Traffic,
        wait: float,
        level: float,
        each: float,
        horizon: float,
    ) -> tuple[int, str]:
        """Replicas that work the real queue off within a horizon, if those that are there would not in time."""
        loads = [replica.load for replica in traffic.heard if replica.load is not None]
        tokens = sum(load.queued_tokens for load in loads)
        requests = sum(load.queued_requests for load in loads) + observation.held_requests
        oldest = max([observation.oldest_held_seconds, *(load.oldest_queued_seconds for load in loads)])
        mix = traffic.mix
        prompts = engine.cost.per_prefill_token * tokens
        soon = len(loads) + sum(
            1
            for replica in observation.in_phase(Phase.STARTING, Phase.LOADING)
            if self._cold.remaining(observation.at, replica) <= wait
        )
        if max(oldest, prompts / max(soon, 1)) < QUEUE_SHARE * wait:
            return 0, ""
        backlog = prompts + requests * mix.new_tokens * engine.row_seconds(mix)
        level = self._sure(level, traffic)
        if loads and backlog + (level - soon * each) * horizon <= 0:
            return 0, ""  # it has gone before another replica is there
        most = level if loads else math.inf  # for a queue that goes, no more than twice what will be needed then
        count = math.ceil((level + min(backlog / horizon, most)) / each - 1e-6)
        return count, f"{requests} wait, the first for {oldest:.1f} s: {backlog:.1f} s of work beside {level:.2f} s/s"

    def _sure(self, level: float, traffic: Traffic) -> float:
        """Work a second that is there for sure: one standard deviation of chance below what was measured."""
        seen = traffic.requests * min(self._settled, 2 * FAST)
        return level * max(0.0, 1 - math.sqrt(CHANCE / seen)) if seen > 0 else 0.0

    def _for_kv(self, traffic: Traffic) -> tuple[int, str]:
        """Replicas whose KV pages hold what is held now."""
        loads = [each.load for each in traffic.heard if each.load is not None and each.load.kv_pages_total > 0]
        if not loads:
            return 0, ""
        used = sum(load.kv_pages_used for load in loads)
        total = sum(load.kv_pages_total for load in loads)
        return math.ceil(len(loads) * used / (KV_SHARE * total) - 1e-6), f"KV pages {used} of {total} used"

    def _blind(self, need: int, current: int, traffic: Traffic, why: str) -> tuple[int, str]:
        """Who does not say what he does is idle to a fleet that would grow, and busy to one that would shrink."""
        silent = len(traffic.silent)
        why += f"; {silent} silent"
        if not traffic.heard:
            return current, f"no replica says what it does ({silent} silent), holding"
        return (need, why) if need >= current else (min(need + silent, current), why)

    def _words(self, observation: Observation, why: str, wanted: int, desired: int) -> str:
        ready = len(observation.in_phase(Phase.READY))
        coming = observation.in_phase(Phase.PENDING, Phase.STARTING, Phase.LOADING)
        words = f"{why} → {wanted}"
        if desired != wanted:
            words += f", allowed {desired}"
        words += f"; ready {ready}"
        if coming:
            first = min(self._cold.remaining(observation.at, each) for each in coming)
            words += f", loading {len(coming)} (ready in {first:.0f} s)"
        return words
