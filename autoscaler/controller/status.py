"""The status of a QueueAutoscaler: what its owner reads. Pure.

It is written when something has happened: a number, a condition, a decision. Texts hold figures that differ at every
look; a change of these alone waits for `TEXT_SECONDS`, so that a fleet at rest costs the API server next to nothing.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoscaler.cluster.face import Json
from autoscaler.cluster.objects import shortened, timestamp

DECISIONS = 10
TEXT_SECONDS = 60.0


class Is(enum.Enum):
    """A condition's status."""

    TRUE = "True"
    FALSE = "False"
    UNKNOWN = "Unknown"


@dataclass(frozen=True, slots=True)
class Condition:
    """One of `Ready`, `MetricsAvailable`, `ReplicasFailing`, `ScalingActive`, `ScalingLimited`; `reason` is a word in
    CamelCase, or several with commas between them."""

    type: str
    status: Is
    reason: str
    message: str = ""
    warning: bool = False  # it is the matter of a person


@dataclass(frozen=True, slots=True)
class Scaled:
    """The number that a workload is asked for has been changed, or would have been."""

    at: float
    before: int
    after: int
    reason: str
    written: bool = True  # False: dry run


@dataclass(frozen=True, slots=True)
class Report:
    """What a look led to. None: not known this time, and the last value stays."""

    generation: int
    conditions: tuple[Condition, ...]
    reason: str = ""
    desired: int | None = None
    spare: int | None = None
    ready: int | None = None
    loading: int | None = None
    draining: int | None = None
    replicas: int | None = None
    selector: str | None = None
    held_requests: int | None = None
    learned: Mapping[str, float] = field(default_factory=dict)
    scaled: Scaled | None = None


def merged(before: Json, report: Report, at: float) -> Json:
    """The status after a look, of the one before it."""
    numbers = {
        "desired": report.desired,
        "spare": report.spare,
        "ready": report.ready,
        "loading": report.loading,
        "draining": report.draining,
        "observedReplicas": report.replicas,
        "replicas": report.replicas,
        "selector": report.selector,
        "heldRequests": report.held_requests,
    }
    after = dict(before) | {name: value for name, value in numbers.items() if value is not None}
    after["observedGeneration"] = report.generation
    after["reason"] = shortened(report.reason)
    if report.learned:
        after["learned"] = {name: float(f"{value:.4g}") for name, value in sorted(report.learned.items())}
    known = {each["type"]: each for each in before.get("conditions", ())}
    after["conditions"] = [_condition(known.get(each.type), each, report.generation, at) for each in report.conditions]
    if report.scaled is not None:
        after["decisions"] = [_decision(report.scaled), *before.get("decisions", ())][:DECISIONS]
        if report.scaled.written:
            after["lastScaleTime"] = timestamp(report.scaled.at)
    return after


def zero_is_ours(resource: Json) -> bool:
    """Whether the resource itself wanted no replica, as it was looked at last: who finds none then sees no pause."""
    status = resource.get("status") or {}
    reasons = {each["type"]: each["reason"] for each in status.get("conditions", ())}
    return status.get("desired") == 0 and reasons.get("ScalingActive") in ("Deciding", "Pinned")


def worth_writing(before: Json, after: Json, seconds: float) -> bool:
    """Whether a status that was last written `seconds` ago should be written anew."""
    return after != before and (seconds >= TEXT_SECONDS or _without_text(before) != _without_text(after))


def news(before: Json, conditions: tuple[Condition, ...]) -> list[Condition]:
    """The conditions that were different before, as far as a person should hear of it: warnings, and their end."""
    known = {each["type"]: (each["status"], each["reason"]) for each in before.get("conditions", ())}
    changed = [each for each in conditions if known.get(each.type) != (each.status.value, each.reason)]
    return [each for each in changed if each.warning or (each.type in known and each.type != "ScalingLimited")]


def _condition(before: Json | None, condition: Condition, generation: int, at: float) -> Json:
    same = before is not None and before["status"] == condition.status.value
    return {
        "type": condition.type,
        "status": condition.status.value,
        "reason": condition.reason,
        "message": shortened(condition.message),
        "observedGeneration": generation,
        "lastTransitionTime": before["lastTransitionTime"] if before is not None and same else timestamp(at),
    }


def _decision(scaled: Scaled) -> Json:
    reason = scaled.reason if scaled.written else f"dry run: {scaled.reason}"
    return {
        "at": timestamp(scaled.at),
        "from": scaled.before,
        "to": scaled.after,
        "reason": shortened(reason),
    }


def _without_text(status: Json) -> Json:
    rest = {name: value for name, value in status.items() if name not in ("reason", "learned", "conditions")}
    conditions = [{**each, "message": ""} for each in status.get("conditions", ())]
    return rest | {"conditions": conditions}
