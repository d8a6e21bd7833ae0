"""Knative's pod autoscaler, by its code.

Sources: `pkg/autoscaler/scaling/autoscaler.go` (`Scale`) and `pkg/reconciler/autoscaling/kpa/scaler.go` of
knative/serving, defaults of `config/core/configmaps/autoscaler.yaml`: a target of 70 % of 100 concurrent requests,
windows of 60 s and 6 s, panic at twice what is there, up by any factor, down by half at most, a look every 2 s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoscaler.decision import Decision
from autoscaler.fleet import Observation
from autoscaler.settings import Settings
from autoscaler.simulate.baselines.signals import Window, bounded, concurrency, ready, total

TICK_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Parameters:
    target: float = 70.0  # concurrent requests per replica
    stable_window_seconds: float = 60.0
    panic_window_seconds: float = 6.0
    panic_threshold: float = 2.0  # of what the panic window asks for, to what is ready
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    scale_down_delay_seconds: float = 0.0
    scale_to_zero_grace_seconds: float = 30.0

    def __post_init__(self) -> None:
        if self.target <= 0:
            raise ValueError(f"target: {self.target} is not more than 0")


class Kpa:
    def __init__(self, parameters: Parameters, settings: Settings) -> None:
        self._parameters, self._settings = parameters, settings
        self._concurrency = Window(parameters.stable_window_seconds)
        self._delayed = Window(parameters.scale_down_delay_seconds)
        self._looked = False
        self._panic_at: float | None = None
        self._panic_most = 0
        self._idle_at: float | None = None

    @property
    def interval_seconds(self) -> float:
        return TICK_SECONDS

    def decide(self, observation: Observation) -> Decision:
        chosen, at, count = self._parameters, observation.at, len(ready(observation))
        if not self._looked:  # without history it begins in panic, lest it scale in at once
            self._looked = True
            if count > 1:
                self._panic_at, self._panic_most = at, count
        self._concurrency.add(at, total(observation, concurrency))
        stable = self._concurrency.mean()
        panic = self._concurrency.mean(chosen.panic_window_seconds)
        wanted = self._wanted(at, max(1, count), stable, panic)
        if chosen.scale_down_delay_seconds:
            self._delayed.add(at, wanted)
            wanted = int(self._delayed.highest())
        mode = "panic" if self._panic_at is not None else "stable"
        reason = f"{mode}: {stable:.1f} concurrent requests in the long window, {panic:.1f} in the short one"
        return bounded(self._above_zero(at, wanted), self._settings, reason)

    def _wanted(self, at: float, count: int, stable: float, panic: float) -> int:
        chosen = self._parameters
        most = math.ceil(chosen.max_scale_up_rate * count)
        least = math.floor(count / chosen.max_scale_down_rate)
        for_panic = math.ceil(panic / chosen.target)
        wanted = min(max(math.ceil(stable / chosen.target), least), most)
        over = for_panic / count >= chosen.panic_threshold
        if over:
            self._panic_at = at
        elif self._panic_at is not None and self._panic_at + chosen.stable_window_seconds < at:
            self._panic_at, self._panic_most = None, 0
        if self._panic_at is None:
            return wanted
        self._panic_most = max(self._panic_most, wanted, min(max(for_panic, least), most))
        return self._panic_most

    def _above_zero(self, at: float, wanted: int) -> int:
        """The last replica stays for the grace period after the window is empty."""
        if wanted > 0 or not self._settings.scale_to_zero.enabled:
            self._idle_at = None
            return wanted
        if self._idle_at is None:
            self._idle_at = at
        return int(at - self._idle_at < self._parameters.scale_to_zero_grace_seconds)
