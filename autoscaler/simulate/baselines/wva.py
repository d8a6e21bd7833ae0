"""llm-d's Workload Variant Autoscaler, version 2 (token saturation), applied by an HPA.

Sources, of llm-d/llm-d-workload-variant-autoscaler: `internal/engines/analyzers/saturation_v2/analyzer.go` (`Analyze`,
`computeReplicaCapacity`, `computeK2`, `estimateCapacityFromParams`) and, for one variant,
`internal/engines/pipeline/cost_aware_optimizer.go`. Thresholds are those of `SaturationScalingConfig.ApplyDefaults`,
metrics are peaks of the last minute (`max_over_time[1m]`), means of tokens are of the last 5 minutes. The HPA takes
External, AverageValue 1, with its own defaults, as in the guides; `config/samples/hpa-integration.yaml` has no
stabilisation and 10 replicas per 15 s both ways instead, which oscillates here. Every 15 s.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field, replace
from statistics import median

from autoscaler.decision import Decision
from autoscaler.fleet import Counters, Load, Observation
from autoscaler.settings import Settings
from autoscaler.simulate.baselines.hpa import DOWN, UP, Controller, external_metric
from autoscaler.simulate.baselines.signals import Flow, Window, alive, bounded, increase, kv_usage, ready

LOOP_SECONDS = 15.0
PEAK_SECONDS = 60.0
RATE_SECONDS = 300.0
HISTORY = 10  # observations of compute capacity that are averaged


@dataclass(frozen=True, slots=True)
class Parameters:
    kv_threshold: float = 0.80  # of the cache, beyond which a replica counts as full
    queue_threshold: float = 5.0  # requests, from which on a replica counts as saturated
    scale_up_threshold: float = 0.85
    scale_down_boundary: float = 0.70
    up_stabilization_seconds: float = UP.stabilization_seconds
    down_stabilization_seconds: float = DOWN.stabilization_seconds
    tolerance: float = 0.1  # of the HPA

    def __post_init__(self) -> None:
        if not 0 < self.scale_down_boundary < self.scale_up_threshold:
            raise ValueError(
                f"scale_down_boundary: {self.scale_down_boundary} is not between 0 and "
                f"scale_up_threshold {self.scale_up_threshold}"
            )


@dataclass(slots=True)
class _Seen:
    """Of one replica."""

    kv: Window = field(default_factory=lambda: Window(PEAK_SECONDS))
    queue: Window = field(default_factory=lambda: Window(PEAK_SECONDS))
    counters: deque[tuple[float, Counters]] = field(default_factory=deque)

    def look(self, at: float, load: Load) -> Flow:
        """Returns what went through it in the last 5 minutes."""
        self.kv.add(at, kv_usage(load))
        self.queue.add(at, load.queued_requests)
        self.counters.append((at, load.counters))
        while self.counters[0][0] < at - RATE_SECONDS:
            self.counters.popleft()
        return increase(load.counters, self.counters[0][1])


class Wva:
    def __init__(self, parameters: Parameters, settings: Settings) -> None:
        self._parameters, self._settings = parameters, settings
        self._controller = Controller(
            settings,
            replace(UP, stabilization_seconds=parameters.up_stabilization_seconds),
            replace(DOWN, stabilization_seconds=parameters.down_stabilization_seconds),
        )
        self._seen: dict[str, _Seen] = {}
        self._history: dict[str, deque[float]] = {}  # of compute capacity, by length of outputs
        self._capacity = 0.0  # of a replica, the last that was worked out

    @property
    def interval_seconds(self) -> float:
        return LOOP_SECONDS

    def decide(self, observation: Observation) -> Decision:
        current = observation.desired
        if current == 0:  # scale from zero: its engine polls the queue in front of the servers
            return bounded(int(observation.held_requests > 0), self._settings, f"{observation.held_requests} held")
        supply, demand = self._analyze(observation)
        if self._capacity <= 0:
            return bounded(current, self._settings, "no replica tells the size of its cache")
        target = self._optimize(supply, demand, observation)
        wanted = external_metric(target, 1.0, len(alive(observation)), self._parameters.tolerance)
        desired, limit = self._controller.apply(observation.at, current, wanted)
        reason = f"demand of {demand:.0f} tokens, supply of {supply:.0f}, {self._capacity:.0f} per replica"
        return Decision(desired, reason, limit)

    def _analyze(self, observation: Observation) -> tuple[float, float]:
        """Tokens that ready replicas hold at most, and that are asked of them."""
        capacities, demand = [], 0.0
        loads = {each.name: each.load for each in ready(observation) if each.load is not None}
        self._seen = {name: self._seen.get(name, _Seen()) for name in loads}
        for name, load in loads.items():
            seen = self._seen[name]
            flow = seen.look(observation.at, load)
            cache = float(load.kv_pages_total * load.kv_page_tokens)
            if cache <= 0:
                continue
            in_use, queue = int(seen.kv.highest() * cache), seen.queue.highest()
            demand += in_use + queue * flow.mean_input
            memory_bound = cache * self._parameters.kv_threshold
            capacities.append(min(memory_bound, self._compute_bound(load, flow, in_use, queue) or memory_bound))
        if capacities:
            self._capacity = median(capacities)
        return len(loads) * self._capacity, demand

    def _compute_bound(self, load: Load, flow: Flow, in_use: int, queue: float) -> float:
        """k2: what is in use where requests queue, else what was then, else by the engine's limits; 0: unknown."""
        bucket = "short" if flow.mean_output < 100 else "medium" if flow.mean_output < 500 else "long"
        if queue >= self._parameters.queue_threshold and in_use > 0:
            self._history.setdefault(bucket, deque(maxlen=HISTORY)).append(in_use)
            return in_use
        if history := self._history.get(bucket):
            return sum(history) / len(history)
        return derived_capacity(load.max_step_tokens, load.capacity, flow.mean_input, flow.mean_output)

    def _optimize(self, supply: float, demand: float, observation: Observation) -> int:
        """Of the one variant that there is: what is missing rounded up, or what is spare rounded down, in replicas."""
        chosen, current = self._parameters, len(alive(observation))
        coming = (current - len(ready(observation))) * self._capacity
        required = demand / chosen.scale_up_threshold - supply - coming
        if required > 0:
            return current + math.ceil(required / self._capacity)
        spare = supply - demand / chosen.scale_down_boundary
        if spare > 0:
            return max(1, current - int(spare / self._capacity))
        return current


def derived_capacity(step_tokens: int, sequences: int, mean_input: float, mean_output: float) -> float:
    """`estimateCapacityFromParams`: N = min(B · O / (I + O), S) requests of I + O / 2 tokens each; 0: unknown."""
    if step_tokens <= 0 or mean_output <= 0:
        return 0.0
    steady = min(step_tokens * mean_output / (mean_input + mean_output), float(sequences))
    return steady * (mean_input + mean_output / 2)
