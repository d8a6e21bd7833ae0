"""A QueueAutoscaler as its owner wrote it, read into settings.

The API server checks a resource against the schema of its definition. Everything is checked here once more: the
definition in a cluster may be older than this program, and whoever wrote a wrong value is to learn of the field, the
value and the limit by a condition of the resource, while all other resources are taken care of. Defaults stand in
`autoscaler.settings` alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, overload

from autoscaler.cluster.face import DEPLOYMENTS, STATEFUL_SETS, Json, Kind
from autoscaler.policy.cron import read_cron
from autoscaler.settings import Behavior, Direction, ScaleToZero, Schedule, Settings, Target

GRPC_PORT, METRICS_PORT = 8001, 8000  # of the server, unless it is told otherwise
# Time for most answers, and for connections to reach their age; what still runs then has the server's own drain.
DRAIN_SECONDS = 300.0
MAX_DRAIN_SECONDS = 86_400.0
MAX_REPLICAS = 1_000
MAX_NAME = 63  # letters: of a label's value
MAX_SECONDS = 7 * 86_400.0
MAX_SCHEDULES = 32
TARGETS = {("apps", "Deployment"): DEPLOYMENTS, ("apps", "StatefulSet"): STATEFUL_SETS}


class InvalidSpecError(Exception):
    """The spec cannot be followed. The message names the field, its value and the limit."""


@dataclass(frozen=True, slots=True)
class TargetRef:
    """The workload that is scaled."""

    api_version: str
    kind: str
    name: str

    @property
    def resource(self) -> Kind:
        return TARGETS[self.api_version.partition("/")[0], self.kind]

    @property
    def ordered(self) -> bool:
        """Its replicas go in the order of their names, the highest first, whatever one wishes."""
        return self.kind == "StatefulSet"

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class Spec:
    """What the owner of a workload wants.

    Attributes:
        pin: as many replicas as a person has asked for; None: as many as load needs.
        dry_run: decide and tell, and change nothing.
        drain_seconds: that a replica which is to go has to become idle.
    """

    target: TargetRef
    settings: Settings
    pin: int | None = None
    dry_run: bool = False
    drain_seconds: float = DRAIN_SECONDS
    grpc_port: int = GRPC_PORT
    metrics_port: int = METRICS_PORT


def read_target(resource: Json) -> TargetRef:
    """Of a spec that may be wrong otherwise. Raises InvalidSpecError."""
    return _target(_Fields(resource, "").part("spec").part("scaleTargetRef"))


def read_spec(resource: Json) -> Spec:
    """Raises InvalidSpecError."""
    spec = _Fields(resource, "").part("spec")
    return Spec(
        target=read_target(resource),
        settings=_settings(spec),
        pin=spec.count("replicas", None, most=MAX_REPLICAS),
        dry_run=spec.flag("dryRun", False),
        drain_seconds=spec.part("behavior").number("drainSeconds", DRAIN_SECONDS, most=MAX_DRAIN_SECONDS, zero=True),
        grpc_port=spec.count("grpcPort", GRPC_PORT, least=1, most=65_535),
        metrics_port=spec.count("metricsPort", METRICS_PORT, least=1, most=65_535),
    )


class _Fields:
    """A JSON object, read field by field. `null` is as good as a field that is not there."""

    def __init__(self, json: Json, path: str) -> None:
        self._json, self.path = json, path

    def refuse(self, name: str, limit: str) -> InvalidSpecError:
        given = self._json.get(name)
        told = "is missing" if given is None else f"is {given!r}"
        return InvalidSpecError(f"{self._of(name)} {told}, must be {limit}")

    def part(self, name: str) -> _Fields:
        """An object; an empty one where there is none."""
        value = self._json.get(name)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(name, "an object")
        return _Fields(value or {}, self._of(name))

    def parts(self, name: str, most: int) -> list[_Fields]:
        value = self._json.get(name)
        if value is not None and (not isinstance(value, list) or not all(isinstance(each, dict) for each in value)):
            raise self.refuse(name, "a list of objects")
        if value and len(value) > most:
            raise InvalidSpecError(f"{self._of(name)} has {len(value)} entries, must have at most {most}")
        return [_Fields(each, f"{self._of(name)}[{index}]") for index, each in enumerate(value or [])]

    def flag(self, name: str, default: bool) -> bool:
        value = self._json.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._json.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or not value:
            raise self.refuse(name, "text")
        return value

    @overload
    def count(self, name: str, default: int, *, least: int = 0, most: int) -> int: ...
    @overload
    def count(self, name: str, default: None, *, least: int = 0, most: int) -> int | None: ...
    def count(self, name: str, default: int | None, *, least: int = 0, most: int) -> int | None:
        value = self._json.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refuse(name, f"a whole number from {least} to {most}")
        return value

    @overload
    def number(self, name: str, default: float, *, most: float = MAX_SECONDS, zero: bool = False) -> float: ...
    @overload
    def number(self, name: str, default: None, *, most: float = MAX_SECONDS, zero: bool = False) -> float | None: ...
    def number(
        self, name: str, default: float | None, *, most: float = MAX_SECONDS, zero: bool = False
    ) -> float | None:
        """Above 0, or 0 itself where that makes sense."""
        value: Any = self._json.get(name)
        if value is None:
            return default
        right = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not right or not 0 <= value <= most or (value == 0 and not zero):
            raise self.refuse(name, f"a number {'from' if zero else 'above'} 0 {'' if zero else 'and '}up to {most:g}")
        return float(value)

    def _of(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


def _target(ref: _Fields) -> TargetRef:
    target = TargetRef(ref.text("apiVersion", "apps/v1"), ref.text("kind"), ref.text("name"))
    if (target.api_version.partition("/")[0], target.kind) not in TARGETS:
        raise ref.refuse("kind", f"one of {', '.join(kind for _, kind in TARGETS)} of apps/v1")
    if len(target.name) > MAX_NAME:
        raise ref.refuse("name", f"at most {MAX_NAME} letters, as pods bear it in a label")
    return target


def _settings(spec: _Fields) -> Settings:
    default = Settings()
    zero = _scale_to_zero(spec.part("scaleToZero"))
    smallest = spec.count("minReplicas", default.min_replicas, most=MAX_REPLICAS)
    if smallest == 0 and not zero.enabled:
        raise spec.refuse("minReplicas", "1 or more while spec.scaleToZero.enabled is false")
    largest = spec.count("maxReplicas", max(smallest, default.max_replicas), least=1, most=MAX_REPLICAS)
    if largest < smallest:
        raise spec.refuse("maxReplicas", f"spec.minReplicas = {smallest} or more")
    return Settings(
        min_replicas=smallest,
        max_replicas=largest,
        target=_promise(spec.part("target")),
        behavior=_behavior(spec.part("behavior")),
        scale_to_zero=zero,
        schedules=tuple(_schedule(each, largest) for each in spec.parts("schedules", MAX_SCHEDULES)),
    )


def _promise(target: _Fields) -> Target:
    default = Target()
    return Target(
        ttft_seconds=target.number("ttftSeconds", default.ttft_seconds),
        itl_seconds=target.number("itlSeconds", default.itl_seconds),
        late_share=target.number("lateShare", default.late_share, most=0.5),
        queue_wait_seconds=target.number("queueWaitSeconds", default.queue_wait_seconds),
        queued_tokens_per_replica=target.count(
            "queuedTokensPerReplica", default.queued_tokens_per_replica, least=1, most=10**9
        ),
    )


def _behavior(behavior: _Fields) -> Behavior:
    scale_out, scale_in = behavior.part("scaleOut"), behavior.part("scaleIn")
    default = Behavior()
    if scale_in.number("windowSeconds", None, zero=True) is None:
        if scale_in.count("maxStep", None, least=1, most=MAX_REPLICAS) is not None:
            raise scale_in.refuse("windowSeconds", "given where spec.behavior.scaleIn.maxStep is")
        return Behavior(scale_out=_direction(scale_out, default.scale_out))
    return Behavior(
        scale_out=_direction(scale_out, default.scale_out),
        scale_in=_direction(scale_in, Direction(window_seconds=0.0)),
    )


def _direction(direction: _Fields, default: Direction) -> Direction:
    return replace(
        default,
        window_seconds=direction.number("windowSeconds", default.window_seconds, zero=True),
        max_step=direction.count("maxStep", default.max_step, least=1, most=MAX_REPLICAS),
        period_seconds=direction.number("periodSeconds", default.period_seconds),
    )


def _scale_to_zero(zero: _Fields) -> ScaleToZero:
    default = ScaleToZero()
    return ScaleToZero(
        enabled=zero.flag("enabled", default.enabled),
        idle_seconds=zero.number("idleSeconds", default.idle_seconds),
    )


def _schedule(schedule: _Fields, largest: int) -> Schedule:
    duration = schedule.number("durationSeconds", None)
    if duration is None:
        raise schedule.refuse("durationSeconds", "a number of seconds")
    cron, timezone = schedule.text("cron"), schedule.text("timezone", "UTC")
    try:
        read_cron(cron, timezone)
    except ValueError as error:
        raise InvalidSpecError(f"{schedule.path}: {error}") from error
    return Schedule(cron, duration, schedule.count("minReplicas", 0, most=largest), timezone)
