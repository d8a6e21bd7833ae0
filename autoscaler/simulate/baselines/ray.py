"""Ray Serve's autoscaler, by its code.

Source: `python/ray/serve/autoscaling_policy.py` of ray-project/ray (`_core_replica_queue_length_policy`,
`_apply_scaling_factors`, `_apply_delay_logic`), defaults of `AutoscalingConfig` in `python/ray/serve/config.py`.

Its loop turns every 0.1 s, but what it sees changes with the reports of replicas, every 10 s: looking once per report
counts the same delays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoscaler.decision import Decision
from autoscaler.fleet import Observation
from autoscaler.settings import Settings
from autoscaler.simulate.baselines.signals import Window, bounded, concurrency, ready, total


@dataclass(frozen=True, slots=True)
class Parameters:
    target_ongoing_requests: float = 2.0  # per replica
    upscale_delay_seconds: float = 30.0
    downscale_delay_seconds: float = 600.0
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0
    metrics_interval_seconds: float = 10.0
    look_back_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("target_ongoing_requests", "metrics_interval_seconds", "look_back_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not more than 0")


class RayServe:
    def __init__(self, parameters: Parameters, settings: Settings) -> None:
        self._parameters, self._settings = parameters, settings
        self._ongoing = Window(parameters.look_back_seconds)
        self._counter = 0  # looks in a row that wanted more, or, below 0, fewer

    @property
    def interval_seconds(self) -> float:
        return self._parameters.metrics_interval_seconds

    def decide(self, observation: Observation) -> Decision:
        chosen, running, current = self._parameters, len(ready(observation)), observation.desired
        self._ongoing.add(observation.at, total(observation, concurrency))
        ongoing = self._ongoing.mean()
        reason = f"{ongoing:.1f} ongoing requests at {chosen.target_ongoing_requests:g} each"
        if running == 0:  # no delay from zero
            first = math.ceil(chosen.upscaling_factor) if total(observation, concurrency) > 0 else 0
            return bounded(max(first, current), self._settings, reason)
        wanted = self._scaled(ongoing / chosen.target_ongoing_requests, running)
        wanted = max(self._settings.min_replicas, min(wanted, self._settings.max_replicas))
        return bounded(self._delayed(wanted, current), self._settings, reason)

    def _scaled(self, wanted: float, running: int) -> int:
        chosen = self._parameters
        factor = chosen.upscaling_factor if wanted > running else chosen.downscaling_factor
        scaled = math.ceil(running + factor * (wanted - running))
        return scaled - 1 if math.ceil(wanted) < running == scaled else scaled

    def _delayed(self, wanted: int, current: int) -> int:
        chosen = self._parameters
        if wanted > current:
            self._counter = max(self._counter, 0) + 1
            if self._counter > int(chosen.upscale_delay_seconds / chosen.metrics_interval_seconds):
                self._counter = 0
                return wanted
        elif wanted < current:
            self._counter = min(self._counter, 0) - 1
            if -self._counter > int(chosen.downscale_delay_seconds / chosen.metrics_interval_seconds):
                self._counter = 0
                return wanted if current == 1 else max(1, wanted)
        else:
            self._counter = 0
        return current
