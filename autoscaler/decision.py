"""What a policy answers."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from autoscaler.fleet import Observation


class Limit(enum.Enum):
    """Why there are not as many replicas as load would ask for, or not as few."""

    MIN_REPLICAS = "TooFewReplicas"
    MAX_REPLICAS = "TooManyReplicas"
    RATE = "RateLimited"
    STABILIZING = "ScaleInStabilizing"
    NO_NODES = "GPUUnavailable"
    BLIND = "MetricsMissing"


@dataclass(frozen=True, slots=True)
class Decision:
    desired: int
    reason: str  # in words, with the numbers that led to it
    limit: Limit | None = None
    # What it was worked out from, by the name of the gauge that shows it: `demand_work_ratio`, `horizon_seconds` …
    figures: Mapping[str, float] = field(default_factory=dict)


class Policy(Protocol):
    """Depends on nothing but what it was shown: no clock, no chance, no I/O; the same looks make the same decisions.

    It keeps what it learnt between looks. The one that runs in the cluster runs in the simulator.
    """

    @property
    def interval_seconds(self) -> float:
        """How often it wants to look."""

    def decide(self, observation: Observation) -> Decision: ...
