"""What the operator wants to know of an object, read from the JSON that the API server has of it.

Readers trust nothing to be there: a new pod has no status, `replicas: 0` is left out of a `Scale`, a list's items have
no `kind`. Times are Unix seconds, as in `autoscaler.fleet`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TypedDict

from autoscaler.cluster.face import Json
from autoscaler.fleet import Phase

DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
# Reasons of a container that waits, and will not come by waiting: somebody must do something. By the word that is told
# for each, since a kubelet goes back and forth between some of them.
FAILURES = {
    "CrashLoopBackOff": "CrashLoopBackOff",
    "ImagePullBackOff": "ImagePullBackOff",
    "ErrImagePull": "ImagePullBackOff",
    "ErrImageNeverPull": "ErrImageNeverPull",
    "InvalidImageName": "InvalidImageName",
    "CreateContainerConfigError": "CreateContainerConfigError",
    "CreateContainerError": "CreateContainerError",
    "RunContainerError": "RunContainerError",
}
GIVEN_UP = 3  # restarts after which a container that did not last is not expected to
LASTED_SECONDS = 600.0  # of a run after which its kubelet, too, begins to count anew
MAX_SAID = 200  # letters, of what is said of an end
MAX_CAUSE = 64
MAX_TEXT = 1024  # bytes, of what a person reads in an Event or a condition


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a pod does not serve, and somebody must do something.

    Attributes:
        cause: one word in CamelCase.
        text: for people; no figure in it grows from look to look.
    """

    cause: str
    text: str


@dataclass(frozen=True, slots=True)
class Pod:
    """Of a workload.

    Attributes:
        phase: as far as the cluster knows: PENDING, STARTING, READY, DRAINING (it is being deleted) or FAILED. That a
            server is LOADING it says itself.
        holds_place: counts for its controller. One that ended, was evicted, or is being deleted does not: another one
            has been made in its place.
        ready_since: when the condition `Ready` became true; None: it is not.
        ended_at: when its node ended or refused it for good; another one has been made in its place.
        came_up: its server has been ready once, as the startup probe saw it, and may have served.
    """

    name: str
    uid: str
    resource_version: str
    phase: Phase
    holds_place: bool
    created_at: float
    ready_since: float | None = None
    unschedulable_since: float | None = None
    deleted_at: float | None = None  # when its grace ends
    ended_at: float | None = None
    ip: str | None = None
    restarts: int = 0
    came_up: bool = False
    failure: Failure | None = None
    deletion_cost: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)


class _Metadata(TypedDict, total=False):
    name: Any
    uid: Any
    resourceVersion: Any
    creationTimestamp: Any
    deletionTimestamp: Any
    labels: Any
    annotations: Any


class _Spec(TypedDict, total=False):
    nodeName: Any


class _Item(TypedDict, total=False):
    metadata: _Metadata
    spec: _Spec
    status: Any


class PodList(TypedDict, total=False):
    """What `pod` reads of each, as a type: a decoder skips the rest, which is most of it and takes most of its time."""

    metadata: Any
    items: list[_Item] | None


def pod(item: Json) -> Pod:
    meta, status = item.get("metadata", {}), item.get("status", {})
    scheduled, ready = condition(item, "PodScheduled"), condition(item, "Ready")
    phase = _phase(item, is_ready=ready.get("status") == "True")
    unschedulable = phase is Phase.PENDING and scheduled.get("reason") == "Unschedulable"
    deleted = meta.get("deletionTimestamp")
    ended = deleted is None and status.get("phase") == "Failed"
    return Pod(
        name=meta.get("name", ""),
        uid=meta.get("uid", ""),
        resource_version=meta.get("resourceVersion", ""),
        phase=phase,
        holds_place=deleted is None and status.get("phase") not in ("Failed", "Succeeded"),
        created_at=seconds(meta.get("creationTimestamp")) or 0.0,
        ready_since=seconds(ready.get("lastTransitionTime")) if phase is Phase.READY else None,
        unschedulable_since=seconds(scheduled.get("lastTransitionTime")) if unschedulable else None,
        deleted_at=seconds(deleted),
        ended_at=_latest(meta, status) if ended else None,
        ip=status.get("podIP") or None,
        restarts=_restarts(status),
        came_up=bool(main := status.get("containerStatuses")) and all(each.get("started") for each in main),
        failure=_end(status) if ended else _failure(status),
        deletion_cost=_cost((meta.get("annotations") or {}).get(DELETION_COST, "")),
        labels=meta.get("labels") or {},
    )


def _phase(item: Json, *, is_ready: bool) -> Phase:
    status = item.get("status", {})
    if item["metadata"].get("deletionTimestamp"):
        return Phase.DRAINING
    if status.get("phase") in ("Failed", "Succeeded"):
        return Phase.FAILED
    if not item.get("spec", {}).get("nodeName"):
        return Phase.PENDING
    if is_ready:
        return Phase.READY
    if any(_waiting(each).get("reason") in FAILURES for each in _containers(status)):
        return Phase.FAILED
    return Phase.FAILED if any(map(_is_given_up, _containers(status))) else Phase.STARTING


def _is_given_up(container: Json) -> bool:
    """It ends again and again. Restarts count for as long as the pod is there, which may have served for days."""
    ended = _ended(container)
    lasted = (seconds(ended.get("finishedAt")) or 0.0) - (seconds(ended.get("startedAt")) or 0.0)
    return bool(ended) and container.get("restartCount", 0) >= GIVEN_UP and lasted < LASTED_SECONDS


def _failure(status: Json) -> Failure | None:
    """Of the first container that has one: it cannot run, or has ended and has not come up since."""
    for each in _containers(status):
        waits, ended = _waiting(each), _ended(each)
        cause = FAILURES.get(waits["reason"]) if waits.get("reason") else "CrashLoopBackOff" if ended else None
        if cause is None:
            continue
        said = waits.get("message", "")
        if cause == "CrashLoopBackOff":
            cause = "OOMKilled" if ended.get("reason") == "OOMKilled" else cause
            last = ended.get("message", "").strip().rpartition("\n")[2]
            code, reason = ended.get("exitCode"), ended.get("reason", "")
            said = f"ended with {code} ({reason}){last and ': '}{last}" if ended else ""
        return Failure(cause, f"container {each.get('name', '')}: {said[:MAX_SAID] or cause}")
    return None


def _end(status: Json) -> Failure:
    """Of a pod as a whole: evicted, or refused by its node. No condition can have kubelet's `OutOfnvidia.com/gpu`."""
    cause = re.sub("[^A-Za-z0-9]", "", status.get("reason", ""))[:MAX_CAUSE]
    said = str(status.get("message", ""))[:MAX_SAID]
    return Failure(cause or "PodFailed", said or "its containers ended, and are not started anew")


def _latest(meta: Json, status: Json) -> float:
    """The last that is known to have happened to it: no field says when its phase became what it is."""
    ends = [(each.get("state") or {}).get("terminated") or {} for each in _containers(status)]
    times = [each.get("lastTransitionTime") for each in status.get("conditions") or ()]
    times += [meta.get("creationTimestamp"), status.get("startTime"), *(each.get("finishedAt") for each in ends)]
    return max((seconds(each) or 0.0 for each in times), default=0.0)


def _waiting(container: Json) -> Json:
    return (container.get("state") or {}).get("waiting") or {}


def _ended(container: Json) -> Json:
    """The end of its last run, where it is not up again; empty: it is, or never ran, or ended as it should."""
    state = container.get("state") or {}
    if container.get("started"):
        return {}
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    return {} if (state.get("terminated") or {}).get("exitCode") == 0 else ended


def _restarts(status: Json) -> int:
    return max((each.get("restartCount", 0) for each in _containers(status)), default=0)


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


def items(listed: Json) -> list[Json]:
    """Of a list object: an empty one may have null there."""
    return listed.get("items") or []


def shortened(text: str, most: int = MAX_TEXT) -> str:
    """In bytes, as the API server counts them."""
    cut = text.encode()
    return text if len(cut) <= most else cut[: most - 3].decode(errors="ignore") + "…"


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
