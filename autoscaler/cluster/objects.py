"""What the operator wants to know of an object, read from the JSON that the API server has of it.

Readers trust nothing to be there: a new pod has no status, `replicas: 0` is left out of a `Scale`, a list's items have
no `kind`. Times are Unix seconds, as in `autoscaler.fleet`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from autoscaler.cluster.face import Json
from autoscaler.fleet import Phase

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
# Reasons of a container that waits, and will not come by waiting: somebody must do something.
FAILURES = {
    "CrashLoopBackOff",
    "ImagePullBackOff",
    "ErrImagePull",
    "InvalidImageName",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
}
OPERATORS = {
    "In": "{key} in ({values})",
    "NotIn": "{key} notin ({values})",
    "Exists": "{key}",
    "DoesNotExist": "!{key}",
}


@dataclass(frozen=True, slots=True)
class Owner:
    kind: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Pod:
    """Of a workload.

    Attributes:
        phase: as far as the cluster knows: PENDING, STARTING, READY, DRAINING (it is being deleted) or FAILED. That a
            server is LOADING it says itself.
        reason: why it is FAILED, or PENDING: `CrashLoopBackOff`, `Unschedulable` …
        holds_place: counts for its controller. One that ended, was evicted, or is being deleted does not: another one
            has been made in its place.
        ready_since: when the condition `Ready` became true; None: it is not.
        started_at: when its node took it; None: none has.
    """

    name: str
    uid: str
    resource_version: str
    phase: Phase
    reason: str
    holds_place: bool
    created_at: float
    started_at: float | None = None
    ready_since: float | None = None
    unschedulable_since: float | None = None
    deleted_at: float | None = None  # when its grace ends
    ip: str | None = None
    node: str | None = None
    restarts: int = 0
    deletion_cost: int = 0
    owner: Owner | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def ordinal(self) -> int:
        """Of a StatefulSet's pod; -1: its name does not end in a number."""
        number = self.name.rpartition("-")[2]
        return int(number) if number.isdecimal() else -1


def pod(item: Json) -> Pod:
    meta, status = item.get("metadata", {}), item.get("status", {})
    node = item.get("spec", {}).get("nodeName")
    scheduled, ready = condition(item, "PodScheduled"), condition(item, "Ready")
    unschedulable = node is None and scheduled.get("reason") == "Unschedulable"
    deleted = meta.get("deletionTimestamp")
    phase, reason = _phase(item, is_ready=ready.get("status") == "True")
    return Pod(
        name=meta.get("name", ""),
        uid=meta.get("uid", ""),
        resource_version=meta.get("resourceVersion", ""),
        phase=phase,
        reason=reason,
        holds_place=deleted is None and status.get("phase") not in ("Failed", "Succeeded"),
        created_at=seconds(meta.get("creationTimestamp")) or 0.0,
        started_at=seconds(status.get("startTime")) if node else None,
        ready_since=seconds(ready.get("lastTransitionTime")) if phase is Phase.READY else None,
        unschedulable_since=seconds(scheduled.get("lastTransitionTime")) if unschedulable else None,
        deleted_at=seconds(deleted),
        ip=status.get("podIP") or None,
        node=node or None,
        restarts=max((each.get("restartCount", 0) for each in _containers(status)), default=0),
        deletion_cost=_cost((meta.get("annotations") or {}).get(DELETION_COST, "")),
        owner=owner(item),
        labels=meta.get("labels") or {},
    )


def _phase(item: Json, *, is_ready: bool) -> tuple[Phase, str]:
    status = item.get("status", {})
    if item["metadata"].get("deletionTimestamp"):
        return Phase.DRAINING, ""
    if status.get("phase") in ("Failed", "Succeeded"):
        return Phase.FAILED, status.get("reason") or status["phase"]
    if not item.get("spec", {}).get("nodeName"):
        return Phase.PENDING, condition(item, "PodScheduled").get("reason", "")
    waiting = [((each.get("state") or {}).get("waiting") or {}).get("reason", "") for each in _containers(status)]
    if failed := [reason for reason in waiting if reason in FAILURES]:
        return Phase.FAILED, failed[0]
    return (Phase.READY, "") if is_ready else (Phase.STARTING, "")


def _containers(status: Json) -> list[Json]:
    return [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]


def _cost(text: str) -> int:
    """Kubernetes takes what is no number for 0."""
    try:
        return int(text)
    except ValueError:
        return 0


def condition(item: Json, kind: str) -> Json:
    """The status condition of this type; empty where there is none."""
    found = [each for each in item.get("status", {}).get("conditions") or () if each.get("type") == kind]
    return found[0] if found else {}


def owner(item: Json) -> Owner | None:
    """The controller that the object belongs to."""
    for each in item.get("metadata", {}).get("ownerReferences") or ():
        if each.get("controller"):
            return Owner(each["kind"], each["name"], each["uid"])
    return None


@dataclass(frozen=True, slots=True)
class Scale:
    """Attributes:
    replicas: that are asked for.
    observed: that there are, as the workload's controller counts them.
    selector: of the pods.
    """

    replicas: int
    observed: int
    selector: str
    resource_version: str


def scale(item: Json) -> Scale:
    status = item.get("status") or {}
    return Scale(
        replicas=(item.get("spec") or {}).get("replicas", 0),
        observed=status.get("replicas", 0),
        selector=status.get("selector", ""),
        resource_version=item.get("metadata", {}).get("resourceVersion", ""),
    )


def scale_patch(scale: Scale, replicas: int) -> Json:
    """Merge patch of `/scale` that is refused with 409 where anything has changed since `scale` was read."""
    return {"metadata": {"resourceVersion": scale.resource_version}, "spec": {"replicas": replicas}}


@dataclass(frozen=True, slots=True)
class Lease:
    """Attributes:
    holder: identity; "": nobody.
    renewed_at: by the holder's clock, of which nothing is known: compare it with itself alone.
    """

    holder: str
    seconds: float
    acquired_at: float | None
    renewed_at: float | None
    transitions: int
    resource_version: str


def lease(item: Json) -> Lease:
    spec = item.get("spec") or {}
    return Lease(
        holder=spec.get("holderIdentity") or "",
        seconds=float(spec.get("leaseDurationSeconds") or 0),
        acquired_at=seconds(spec.get("acquireTime")),
        renewed_at=seconds(spec.get("renewTime")),
        transitions=spec.get("leaseTransitions") or 0,
        resource_version=item.get("metadata", {}).get("resourceVersion", ""),
    )


def selector(match: Mapping[str, Any]) -> str:
    """A workload's `spec.selector` as the text that lists are asked with."""
    words = [f"{key}={value}" for key, value in sorted((match.get("matchLabels") or {}).items())]
    for each in match.get("matchExpressions") or ():
        values = ",".join(sorted(each.get("values") or ()))
        words.append(OPERATORS[each["operator"]].format(key=each["key"], values=values))
    return ",".join(words)


def items(listed: Json) -> list[Json]:
    """Of a list object: an empty one may have null there."""
    return listed.get("items") or []


def seconds(timestamp: str | None) -> float | None:
    """A `Time` or `MicroTime` of Kubernetes as Unix seconds."""
    if not timestamp:
        return None
    return datetime.fromisoformat(timestamp).timestamp()


def timestamp(at: float) -> str:
    """A `Time`: whole seconds."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def micro_timestamp(at: float) -> str:
    """A `MicroTime`, of leases and events: an API server refuses one that has not six digits after the point."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
