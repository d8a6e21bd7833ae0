"""A number of replicas that never changes: what provisioning for the peak does."""

from __future__ import annotations

from dataclasses import dataclass

from autoscaler.decision import Decision
from autoscaler.fleet import Observation
from autoscaler.settings import Settings
from autoscaler.simulate.baselines.signals import bounded


@dataclass(frozen=True, slots=True)
class Parameters:
    replicas: int = 1


class Static:
    def __init__(self, parameters: Parameters, settings: Settings, cold_start_seconds: float = 0.0) -> None:
        self._parameters, self._settings = parameters, settings

    @property
    def interval_seconds(self) -> float:
        return 60.0

    def decide(self, observation: Observation) -> Decision:
        return bounded(int(self._parameters.replicas), self._settings, f"always {self._parameters.replicas}")
