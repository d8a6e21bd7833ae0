"""KEDA: 0 and 1 by activation, 1 to N by the HPA that it generates.

Sources: `pkg/scaling/executor/scale_scaledobjects.go` and `apis/keda/v1alpha1/scaledobject_types.go` of kedacore/keda
(poll every 30 s, cool down for 300 s, External metric with AverageValue); threshold and metric of the trigger that
vLLM's production-stack ships (`helm/templates/scaledobject-vllm.yaml`: vllm:num_requests_waiting, 5), which lacks the
`sum()` that it gets here: with two replicas the query has two series, and KEDA's Prometheus scaler refuses them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoscaler.decision import Decision
from autoscaler.fleet import Observation
from autoscaler.settings import Settings
from autoscaler.simulate.baselines.hpa import DOWN, SYNC_SECONDS, UP, Controller, external_metric
from autoscaler.simulate.baselines.signals import METRICS, alive, total


@dataclass(frozen=True, slots=True)
class Parameters:
    metric: str = "queued"
    threshold: float = 5.0
    activation_threshold: float = 0.0
    polling_seconds: float = 30.0
    cooldown_seconds: float = 300.0
    up_stabilization_seconds: float = UP.stabilization_seconds
    down_stabilization_seconds: float = DOWN.stabilization_seconds
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric: {self.metric!r} is none of {', '.join(METRICS)}")
        if self.threshold <= 0:
            raise ValueError(f"threshold: {self.threshold} is not more than 0")


class Keda:
    def __init__(self, parameters: Parameters, settings: Settings) -> None:
        self._parameters = parameters
        # The generated HPA never goes below 1: what is below is KEDA's own.
        self._controller = Controller(
            replace(settings, min_replicas=max(1, settings.min_replicas)),
            replace(UP, stabilization_seconds=parameters.up_stabilization_seconds),
            replace(DOWN, stabilization_seconds=parameters.down_stabilization_seconds),
        )
        self._to_zero = settings.scale_to_zero.enabled or settings.min_replicas == 0
        self._polled_at = float("-inf")
        self._active_at: float | None = None

    @property
    def interval_seconds(self) -> float:
        return min(SYNC_SECONDS, self._parameters.polling_seconds)

    def decide(self, observation: Observation) -> Decision:
        chosen = self._parameters
        value = total(observation, METRICS[chosen.metric])
        if self._to_zero and observation.at - self._polled_at >= chosen.polling_seconds:
            self._polled_at = observation.at
            if self._active_at is None or value > chosen.activation_threshold:
                self._active_at = observation.at
            if observation.desired == 0:
                return self._activation(value)
            if self._active_at + chosen.cooldown_seconds < observation.at:
                return Decision(0, f"no {chosen.metric} for {chosen.cooldown_seconds:g} s")
        if observation.desired == 0:
            return Decision(0, "waits for the next poll")
        wanted = external_metric(value, chosen.threshold, len(alive(observation)), chosen.tolerance)
        desired, limit = self._controller.apply(observation.at, observation.desired, wanted)
        return Decision(desired, f"{value:g} {chosen.metric} at {chosen.threshold:g} each", limit)

    def _activation(self, value: float) -> Decision:
        active = value > self._parameters.activation_threshold
        return Decision(int(active), f"{value:g} {self._parameters.metric}: {'active' if active else 'idle'}")
