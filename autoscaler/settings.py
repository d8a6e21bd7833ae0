"""What the owner of a workload chooses: the spec of a QueueAutoscaler, checked. Durations are seconds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Target:
    """What is promised to requests. The first that is set decides: queued tokens per replica, else time."""

    ttft_seconds: float = 2.0  # from arrival to the first token
    itl_seconds: float = 0.06  # mean between two tokens of one request
    late_share: float = 0.01  # of requests that may get it later
    queue_wait_seconds: float | None = None  # most of the first that may go by in the queue; None: worked out
    queued_tokens_per_replica: int | None = None  # a plain rule in place of all of the above


@dataclass(frozen=True, slots=True)
class Direction:
    """How fast replicas may come, or go."""

    window_seconds: float  # the need must have been there all along this time
    max_step: int | None = None  # replicas at once; None: any
    period_seconds: float = 60.0  # in which `max_step` counts


@dataclass(frozen=True, slots=True)
class Behavior:
    scale_out: Direction = field(default_factory=lambda: Direction(window_seconds=0.0))
    # None: no window beside that of the policy, which keeps a need at least as long as a replica takes to come
    scale_in: Direction | None = None


@dataclass(frozen=True, slots=True)
class ScaleToZero:
    enabled: bool = False
    idle_seconds: float = 900.0  # without a request


@dataclass(frozen=True, slots=True)
class Schedule:
    """From each time that `cron` names on, for so long, there are at least so many."""

    cron: str  # five fields, UTC unless `timezone` says otherwise
    duration_seconds: float
    min_replicas: int
    timezone: str = "UTC"


@dataclass(frozen=True, slots=True)
class Settings:
    min_replicas: int = 1
    max_replicas: int = 1
    target: Target = field(default_factory=Target)
    behavior: Behavior = field(default_factory=Behavior)
    scale_to_zero: ScaleToZero = field(default_factory=ScaleToZero)
    schedules: tuple[Schedule, ...] = ()
