"""What is read of objects, whatever they lack."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.cluster import objects
from autoscaler.cluster.face import Json
from autoscaler.fleet import Phase

AT = "2026-11-26T08:00:00Z"
SECONDS = 1_795_680_000.0


def a_pod(*, node: str | None = "node-1", meta: Json | None = None, **status: Any) -> Json:
    spec = {"nodeName": node} if node else {}
    head = {"name": "nemo-7d9-x2", "uid": "u", "resourceVersion": "7", "creationTimestamp": AT}
    return {"metadata": head | (meta or {}), "spec": spec, "status": status}


def is_so(kind: str, status: str = "True", reason: str = "") -> Json:
    return {"type": kind, "status": status, "reason": reason, "lastTransitionTime": AT}


def waits(reason: str, restarts: int = 0) -> Json:
    return {"name": "server", "restartCount": restarts, "state": {"waiting": {"reason": reason}}}


@pytest.mark.parametrize(
    ("item", "phase", "holds_place"),
    [
        (a_pod(node=None), Phase.PENDING, True),
        (
            a_pod(node=None, phase="Pending", conditions=[is_so("PodScheduled", "False", "Unschedulable")]),
            Phase.PENDING,
            True,
        ),
        (a_pod(phase="Pending", containerStatuses=[waits("ContainerCreating")]), Phase.STARTING, True),
        (a_pod(phase="Running", conditions=[is_so("Ready", "False")]), Phase.STARTING, True),
        (a_pod(phase="Running", conditions=[is_so("Ready")]), Phase.READY, True),
        (a_pod(meta={"deletionTimestamp": AT}, conditions=[is_so("Ready")]), Phase.DRAINING, False),
        (a_pod(containerStatuses=[waits("CrashLoopBackOff", 3)]), Phase.FAILED, True),
        (a_pod(initContainerStatuses=[waits("ImagePullBackOff")]), Phase.FAILED, True),
        (a_pod(phase="Failed", reason="Evicted"), Phase.FAILED, False),
        (a_pod(phase="Succeeded"), Phase.FAILED, False),
    ],
)
def test_a_pod_has_a_phase(item: Json, phase: Phase, holds_place: bool) -> None:
    pod = objects.pod(item)
    assert (pod.phase, pod.holds_place) == (phase, holds_place)


def runs(restarts: int = 0, *, started: bool = False, ended: Json | None = None) -> Json:
    last = {"terminated": ended} if ended is not None else {}
    state = {"running": {"startedAt": AT}}
    return {"name": "server", "restartCount": restarts, "started": started, "state": state, "lastState": last}


KILLED = {"exitCode": 137, "reason": "OOMKilled"}
ENDED = {"exitCode": 78, "reason": "Error", "message": "loading\nexit 78: no model named nemo\n"}


@pytest.mark.parametrize(
    ("container", "cause", "text"),
    [
        (waits("ErrImagePull"), "ImagePullBackOff", "container server: ImagePullBackOff"),
        (
            {"name": "server", "state": {"waiting": {"reason": "CreateContainerConfigError", "message": "no key x"}}},
            "CreateContainerConfigError",
            "container server: no key x",
        ),
        (
            waits("CrashLoopBackOff", 1) | {"lastState": {"terminated": ENDED}},
            "CrashLoopBackOff",
            "container server: ended with 78 (Error): exit 78: no model named nemo",
        ),
        (
            {"name": "server", "restartCount": 1, "state": {"terminated": KILLED}},
            "OOMKilled",
            "container server: ended with 137 (OOMKilled)",
        ),
        (runs(1, ended=KILLED), "OOMKilled", "container server: ended with 137 (OOMKilled)"),
    ],
)
def test_who_cannot_run_or_has_ended_and_is_not_up_again_says_why(container: Json, cause: str, text: str) -> None:
    assert objects.pod(a_pod(containerStatuses=[container])).failure == objects.Failure(cause, text)


@pytest.mark.parametrize(
    "container",
    [
        waits("ContainerCreating"),
        waits("ContainerCreating", 1) | {"lastState": {"terminated": KILLED}},  # its node has started anew
        runs(),
        runs(7, started=True, ended=KILLED),
        {"name": "fetch", "state": {"terminated": {"exitCode": 0}}, "lastState": {"terminated": ENDED}},
    ],
)
def test_who_comes_or_is_up_or_has_done_its_work_has_no_failure(container: Json) -> None:
    assert objects.pod(a_pod(containerStatuses=[container])).failure is None


def test_one_that_ends_again_and_again_is_no_replica_that_starts_but_one_that_served_is_none_that_failed() -> None:
    phases = [objects.pod(a_pod(containerStatuses=[runs(count, ended=KILLED)])).phase for count in (1, 2, 3)]
    assert phases == [Phase.STARTING, Phase.STARTING, Phase.FAILED]
    served = KILLED | {"startedAt": "2026-11-26T07:00:00Z", "finishedAt": AT}  # for an hour, before it ended again
    assert objects.pod(a_pod(containerStatuses=[runs(9, ended=served)])).phase is Phase.STARTING
    overloaded = a_pod(conditions=[is_so("Ready", "False")], containerStatuses=[runs(9, started=True, ended=KILLED)])
    assert objects.pod(overloaded).phase is Phase.STARTING


def test_a_pod_that_its_node_ended_says_why_and_when_as_far_as_anything_tells() -> None:
    late = "2026-11-26T08:00:09Z"
    ended = {"name": "server", "state": {"terminated": {"exitCode": 137, "finishedAt": late}}}
    evicted = objects.pod(a_pod(phase="Failed", reason="Evicted", message="no memory", containerStatuses=[ended]))
    assert (evicted.failure, evicted.ended_at) == (objects.Failure("Evicted", "no memory"), SECONDS + 9)
    refused = objects.pod(a_pod(phase="Failed", reason="OutOfnvidia.com/gpu", startTime=AT))
    assert refused.failure is not None
    assert (refused.failure.cause, refused.ended_at) == ("OutOfnvidiacomgpu", SECONDS)
    for other in (a_pod(phase="Failed", meta={"deletionTimestamp": AT}), a_pod(phase="Succeeded"), a_pod()):
        assert objects.pod(other).ended_at is None


def test_times_are_told_where_they_mean_something() -> None:
    ready = objects.pod(a_pod(phase="Running", startTime=AT, conditions=[is_so("Ready")]))
    assert (ready.created_at, ready.ready_since) == (SECONDS, SECONDS)
    assert (ready.unschedulable_since, ready.deleted_at) == (None, None)
    waiting = objects.pod(a_pod(node=None, conditions=[is_so("PodScheduled", "False", "Unschedulable")]))
    assert (waiting.unschedulable_since, waiting.ready_since) == (SECONDS, None)
    going = objects.pod(a_pod(meta={"deletionTimestamp": AT}, conditions=[is_so("Ready")]))
    assert (going.deleted_at, going.ready_since) == (SECONDS, None)


def test_the_rest_of_a_pod() -> None:
    meta = {"labels": {"app": "nemo"}, "annotations": {objects.DELETION_COST: "-5"}}
    pod = objects.pod(a_pod(meta=meta, podIP="10.0.0.7", containerStatuses=[waits("CrashLoopBackOff", 3)]))
    assert (pod.name, pod.uid, pod.resource_version, pod.ip) == ("nemo-7d9-x2", "u", "7", "10.0.0.7")
    assert (pod.restarts, pod.deletion_cost, pod.labels) == (3, -5, {"app": "nemo"})
    bare = objects.pod(a_pod(node=None, meta={"annotations": {objects.DELETION_COST: "dear"}}))
    assert (bare.ip, bare.deletion_cost) == (None, 0)


def test_a_scale_of_zero_says_so_by_silence() -> None:
    item = {"metadata": {"resourceVersion": "3"}, "spec": {}, "status": {"replicas": 2, "selector": "app=nemo"}}
    assert objects.scale(item) == objects.Scale(0, 2, "app=nemo", "3")
    assert objects.scale_patch(objects.scale(item), 4) == {
        "metadata": {"resourceVersion": "3"},
        "spec": {"replicas": 4},
    }


def test_times_are_written_as_kubernetes_reads_them() -> None:
    assert objects.timestamp(SECONDS) == AT
    assert objects.micro_timestamp(SECONDS) == "2026-11-26T08:00:00.000000Z"
    assert objects.seconds(AT) == objects.seconds("2026-11-26T09:00:00+01:00") == SECONDS
    assert objects.seconds(None) is None


def test_a_list_may_have_null_for_items() -> None:
    assert objects.items({"items": None}) == []
