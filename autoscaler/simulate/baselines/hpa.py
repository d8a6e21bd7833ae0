"""HorizontalPodAutoscaler v2 of Kubernetes 1.36, by its code.

Sources, below `pkg/controller/podautoscaler/` of kubernetes/kubernetes: `replica_calculator.go`
(`calcPlainMetricReplicas`, `groupPods`, `GetExternalPerPodMetricReplicas`) and `horizontal.go`
(`stabilizeRecommendationWithBehaviors`, `convertDesiredReplicasWithBehaviorRate`). Defaults are those of
`pkg/apis/autoscaling/v2/defaults.go` and of `HorizontalPodAutoscalerSyncPeriod` (15 s).

`Controller` is what comes after a recommendation, and KEDA and WVA go through it as well.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal

from autoscaler.decision import Decision, Limit
from autoscaler.fleet import Observation, Phase
from autoscaler.settings import Settings
from autoscaler.simulate.baselines.signals import METRICS, alive, bounded, ready, total

SYNC_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Rate:
    """At most so many replicas, or so many percent of them, in a period."""

    kind: Literal["Pods", "Percent"]
    value: int
    period_seconds: float = 15.0


@dataclass(frozen=True, slots=True)
class Rules:
    """Of one direction; of several rates the one counts that changes most (`selectPolicy: Max`)."""

    stabilization_seconds: float
    rates: tuple[Rate, ...]


UP = Rules(0.0, (Rate("Pods", 4), Rate("Percent", 100)))
DOWN = Rules(300.0, (Rate("Percent", 100),))


class Controller:
    """From a recommendation to a number of replicas: stabilisation, rates, limits."""

    def __init__(self, settings: Settings, up: Rules = UP, down: Rules = DOWN) -> None:
        self._settings, self._up, self._down = settings, up, down
        self._recommendations: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()  # when, and by how many replicas

    def apply(self, at: float, current: int, recommendation: int) -> tuple[int, Limit | None]:
        """`current` is spec.replicas of the scale; the recommendation comes straight from the metrics."""
        stable = self._stabilized(at, current, recommendation)
        limit = Limit.STABILIZING if stable != recommendation else None
        desired = self._within_rates(at, current, stable)
        if desired != stable:
            limit = Limit.RATE
        if not self._settings.min_replicas <= desired <= self._settings.max_replicas:
            limit = Limit.MIN_REPLICAS if desired < self._settings.min_replicas else Limit.MAX_REPLICAS
            desired = max(self._settings.min_replicas, min(desired, self._settings.max_replicas))
        if desired != current:
            self._changes.append((at, desired - current))
        return desired, limit

    def _stabilized(self, at: float, current: int, recommendation: int) -> int:
        """Up to the lowest of the window of scale-up, down to the highest of the one of scale-down."""
        longest = max(self._up.stabilization_seconds, self._down.stabilization_seconds)
        while self._recommendations and self._recommendations[0][0] <= at - longest:
            self._recommendations.popleft()
        lowest = highest = recommendation
        for when, value in self._recommendations:
            if when > at - self._up.stabilization_seconds:
                lowest = min(lowest, value)
            if when > at - self._down.stabilization_seconds:
                highest = max(highest, value)
        self._recommendations.append((at, recommendation))
        return min(max(current, lowest), highest)

    def _within_rates(self, at: float, current: int, desired: int) -> int:
        longest = max(rate.period_seconds for rate in (*self._up.rates, *self._down.rates))
        while self._changes and self._changes[0][0] <= at - longest:
            self._changes.popleft()
        if desired > current:
            highest = max(self._proposed(rate, at, current, 1) for rate in self._up.rates)
            return min(desired, max(highest, current))
        if desired < current:
            lowest = min(self._proposed(rate, at, current, -1) for rate in self._down.rates)
            return max(desired, min(lowest, current))
        return desired

    def _proposed(self, rate: Rate, at: float, current: int, sign: int) -> int:
        start = current - sum(change for when, change in self._changes if when > at - rate.period_seconds)
        if rate.kind == "Pods":
            return start + sign * rate.value
        share = start * (1 + sign * rate.value / 100)
        return math.ceil(share) if sign > 0 else int(share)


@dataclass(frozen=True, slots=True)
class Parameters:
    """HPA has no default metric and target; these are those of the operator's sample of vLLM's production-stack
    (`operator/config/samples/…vllmruntime_autoscaling.yaml`: 5 running requests per replica)."""

    metric: str = "concurrency"  # of `signals.METRICS`
    target: float = 5.0  # per replica
    form: str = "Pods"  # or "External", AverageValue both
    tolerance: float = 0.1
    up_stabilization_seconds: float = UP.stabilization_seconds
    up_pods: int = 4
    up_percent: int = 100
    down_stabilization_seconds: float = DOWN.stabilization_seconds
    down_percent: int = 100
    period_seconds: float = 15.0  # of all three rates

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric: {self.metric!r} is none of {', '.join(METRICS)}")
        if self.form not in ("Pods", "External"):
            raise ValueError(f"form: {self.form!r} is neither Pods nor External")
        if self.target <= 0:
            raise ValueError(f"target: {self.target} is not more than 0")

    def controller(self, settings: Settings) -> Controller:
        period = self.period_seconds
        up = (Rate("Pods", self.up_pods, period), Rate("Percent", self.up_percent, period))
        down = (Rate("Percent", self.down_percent, period),)
        return Controller(
            settings, Rules(self.up_stabilization_seconds, up), Rules(self.down_stabilization_seconds, down)
        )


class Hpa:
    def __init__(self, parameters: Parameters, settings: Settings) -> None:
        self._parameters, self._settings = parameters, settings
        self._controller = parameters.controller(settings)

    @property
    def interval_seconds(self) -> float:
        return SYNC_SECONDS

    def decide(self, observation: Observation) -> Decision:
        chosen = self._parameters
        if observation.desired == 0:
            return Decision(0, "paused: a workload with 0 replicas is left alone")
        if chosen.form == "Pods":
            wanted = pods_metric(observation, chosen)
        else:
            value = total(observation, METRICS[chosen.metric])
            wanted = external_metric(value, chosen.target, len(alive(observation)), chosen.tolerance)
        if wanted is None:
            return bounded(observation.desired, self._settings, f"no replica tells its {chosen.metric}")
        desired, limit = self._controller.apply(observation.at, observation.desired, wanted)
        return Decision(desired, f"{chosen.metric} for {wanted} replicas at {chosen.target:g} each", limit)


def within(ratio: float, tolerance: float) -> bool:
    return 1.0 - tolerance <= ratio <= 1.0 + tolerance


def external_metric(value: float, target: float, status_replicas: int, tolerance: float) -> int:
    """`GetExternalPerPodMetricReplicas`: ceil(value / target), unless that is within the tolerance of what there is."""
    if status_replicas and within(value / (target * status_replicas), tolerance):
        return status_replicas
    return math.ceil(value / target)


def pods_metric(observation: Observation, chosen: Parameters) -> int | None:
    """`calcPlainMetricReplicas`: by the mean over replicas that tell it.

    Those that are not on their feet yet count as idle when more are wanted, and those that do not answer as idle then
    and as exactly at their target when fewer are.

    Returns:
        None where none tells it.
    """
    metric, current = METRICS[chosen.metric], observation.desired
    values = [metric(each.load) for each in ready(observation) if each.load is not None]
    if not values:
        return None
    unready = len(observation.in_phase(Phase.PENDING, Phase.STARTING))
    missing = len(alive(observation)) - unready - len(values)
    ratio = sum(values) / len(values) / chosen.target
    fill_unready = unready > 0 and ratio > 1.0
    if not fill_unready and missing == 0:
        return current if within(ratio, chosen.tolerance) else math.ceil(ratio * len(values))
    count, filled = len(values) + missing, sum(values)
    if ratio < 1.0:
        filled += missing * chosen.target
    if fill_unready:
        count += unready
    again = filled / count / chosen.target
    if within(again, chosen.tolerance) or (ratio < 1.0 < again) or (again < 1.0 < ratio):
        return current
    wanted = math.ceil(again * count)
    if (again < 1.0 and wanted > current) or (again > 1.0 and wanted < current):
        return current
    return wanted
