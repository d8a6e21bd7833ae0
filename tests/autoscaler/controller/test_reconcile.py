"""Looks at one resource: what is written when, and what becomes of it whatever happens meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autoscaler.cluster.face import QUEUE_AUTOSCALERS, ClusterError
from autoscaler.controller.reconcile import GoneError
from autoscaler.controller.rivals import HPAS
from autoscaler.decision import Limit
from tests.autoscaler.controller.scene import IMPOSSIBLE, NAME, Scene, scaler, scene, workload
from tests.autoscaler.fake_api import Fault

# -- more, and nothing -------------------------------------------------------------------------------------------------


async def test_more_are_asked_for_at_once_with_the_reason_everywhere(tmp_path: Path) -> None:
    async with scene(tmp_path) as here:
        here.word.desired, here.word.reason = 3, "queue of 9 needs 3"
        await here.look()
        assert (here.asked, len(here.pods)) == (3, 3)
        assert ("ScaledOut", "Deployment/nemo from 1 to 3: queue of 9 needs 3") in here.events
        status = here.status
        assert (status["desired"], status["reason"], status["selector"]) == (3, "queue of 9 needs 3", "app=nemo")
        assert status["decisions"][0] | {"at": ""} == {"at": "", "from": 1, "to": 3, "reason": "queue of 9 needs 3"}
        assert status["lastScaleTime"] == status["decisions"][0]["at"]
        assert here.condition("ScalingActive")[:2] == ("True", "Deciding")
        await here.look()
        assert (here.status["ready"], here.status["replicas"], here.status["observedReplicas"]) == (3, 3, 3)
        assert here.metric("scale_events_total", direction="out") == 1
        assert (here.metric("desired_replicas"), here.metric("ready_replicas")) == (3, 3)


async def test_where_nothing_happens_nothing_is_written(three: Scene) -> None:
    await three.look()
    before = len(three.api.writes(user=three.api.calls[-1].request.user))
    for number in range(8):
        three.word.reason = f"work {number} needs 3"
        await three.look()
    assert len(three.api.writes(user=three.api.calls[-1].request.user)) == before
    three.word.figures = {"replica_work_ratio": 0.8}
    await three.look(60)
    assert three.status["reason"] == "work 7 needs 3"
    assert three.status["learned"] == {"replicaWorkRatio": 0.8}
    assert three.metric("replica_work_ratio") == 0.8


async def test_no_node_for_a_replica_is_a_warning(tmp_path: Path) -> None:
    async with scene(tmp_path, replicas=2, nodes=1) as here:
        here.word.limit = Limit.NO_NODES
        await here.look()
        assert here.condition("ScalingLimited")[:2] == ("True", "GPUUnavailable")
        assert "GPUUnavailable" in here.reasons
        assert (here.status["ready"], here.status["loading"]) == (1, 1)


async def test_a_cold_start_is_measured(tmp_path: Path) -> None:
    async with scene(tmp_path, replicas=1, nodes=1) as here:
        here.word.desired = 2
        await here.look()
        await here.look(30)
        here.workloads.make_room(2)
        await here.look(30)
        await here.look()
        assert here.metric("cold_start_seconds_count") == 1
        assert here.metric("cold_start_seconds_sum") == pytest.approx(60, abs=6)


async def test_a_figure_may_bear_the_name_of_a_metric(three: Scene) -> None:
    """As the cold start that the policy has learnt does: it stands in the status, and the histogram stays as it is."""
    three.word.figures = {"cold_start_seconds": 62.5, "reconcile_total": 1.0, "no name": 1.0, "headroom_ratio": 1.2}
    await three.look(60)
    assert three.status["learned"] == {"coldStartSeconds": 62.5}
    assert three.metric("cold_start_seconds") is None
    assert three.metric("headroom_ratio") == 1.2


# -- by whom -----------------------------------------------------------------------------------------------------------


async def test_a_pin_holds_until_it_is_taken_away(three: Scene) -> None:
    three.change(QUEUE_AUTOSCALERS, NAME, replicas=4)  # as `kubectl scale qas nemo --replicas=4` does
    await three.look()
    assert three.asked == 4
    assert three.condition("ScalingActive")[:2] == ("False", "Pinned")
    assert three.status["reason"] == "pinned to 4 by spec.replicas; load alone would have 3"
    three.change(QUEUE_AUTOSCALERS, NAME, replicas=None)
    three.word.desired = 5
    await three.look()
    assert three.asked == 5
    assert three.condition("ScalingActive")[:2] == ("True", "Deciding")


async def test_a_scale_by_another_hand_is_told_and_is_where_the_next_decision_starts(three: Scene) -> None:
    three.scale_by_hand(5)
    await three.settled()
    await three.look()
    assert ("ScaledByHand", "Deployment/nemo was scaled from 3 to 5 by another hand") in three.events
    assert three.word.seen[-1].desired == 5
    assert three.asked == 5


async def test_zero_by_hand_is_a_pause(three: Scene) -> None:
    three.scale_by_hand(0)
    await three.settled()
    three.word.desired = 3
    await three.look()
    await three.look()
    assert three.asked == 0
    assert three.condition("ScalingActive")[:2] == ("False", "Paused")
    three.scale_by_hand(1)
    await three.settled()
    await three.look()
    assert three.asked == 3
    assert three.condition("ScalingActive")[:2] == ("True", "Deciding")


@pytest.mark.parametrize("by", ["policy", "pin"])
async def test_zero_by_the_resource_itself_is_no_pause_once_that_asks_for_it_no_more(three: Scene, by: str) -> None:
    if by == "policy":
        three.change(QUEUE_AUTOSCALERS, NAME, minReplicas=0, scaleToZero={"enabled": True})
        three.word.desired = 0
    else:
        three.change(QUEUE_AUTOSCALERS, NAME, replicas=0)
    for _ in range(3):
        await three.look()
    assert three.asked == 0
    three.change(QUEUE_AUTOSCALERS, NAME, minReplicas=2, scaleToZero=None, replicas=None)
    three.word.desired = 0  # what the policy says of a workload at 0 without scale to zero
    three.reconciler = three.successor()
    await three.look()
    assert three.asked == 2
    assert three.status["reason"] == "scale to zero is off"
    three.scale_by_hand(0)
    await three.look()
    await three.look()
    assert (three.asked, three.condition("ScalingActive")[1]) == (0, "Paused")


async def test_a_dry_run_tells_once_and_does_nothing(tmp_path: Path) -> None:
    async with scene(tmp_path, dryRun=True) as here:
        here.word.desired, here.word.reason = 3, "queue"
        await here.look()
        await here.look()
        assert here.asked == 1
        [decision] = here.status["decisions"]
        assert (decision["from"], decision["to"], decision["reason"]) == (1, 3, "dry run: queue")
        assert here.status["desired"] == 3
        assert "lastScaleTime" not in here.status
        assert {call.resource for call in here.api.writes()} <= {"queueautoscalers/status", "events"}


def hpa() -> dict[str, Any]:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": NAME}
    spec = {"scaleTargetRef": target, "maxReplicas": 3}
    return {"apiVersion": "autoscaling/v2", "kind": HPA, "metadata": {"name": "other"}, "spec": spec}


HPA = "HorizontalPodAutoscaler"


async def test_another_scaler_of_the_same_workload_is_left_alone(three: Scene) -> None:
    three.api.apply(hpa())
    three.word.desired = 5
    await three.look(30)
    assert three.asked == 3
    status, reason, message = three.condition("ScalingActive")
    assert (status, reason) == ("False", "OtherScaler")
    assert message == "HorizontalPodAutoscaler/other scales Deployment/nemo too: delete one of the two"
    assert "OtherScaler" in three.reasons
    three.delete(HPAS, "other")
    await three.look(30)
    assert three.asked == 5


async def test_of_two_resources_with_the_same_workload_the_older_one_acts(three: Scene) -> None:
    three.clock.turn(5)
    three.api.apply(scaler(name="late"))
    three.word.desired = 4
    await three.look(30)
    assert three.asked == 4  # a later one changes nothing for it
    three.delete(QUEUE_AUTOSCALERS, NAME)
    three.clock.turn(5)
    three.api.apply(scaler())
    three.word.desired = 2
    three.reconciler = three.successor()
    await three.look()
    assert three.asked == 4
    assert three.condition("ScalingActive")[2].startswith("QueueAutoscaler/late scales")


async def test_the_younger_of_two_resources_leaves_the_drains_of_the_older_alone(three: Scene) -> None:
    three.clock.turn(5)
    three.api.apply(scaler(name="late"))
    three.ears.running = dict.fromkeys(three.pods, 1)
    three.word.desired = 2
    await three.look()
    assert len(three.serving) == 2
    late = three.successor("late")
    await late.look()
    assert len(three.serving) == 2
    three.change(QUEUE_AUTOSCALERS, "late", schedules=[IMPOSSIBLE])
    await late.look()
    assert len(three.serving) == 2


# -- wrong, and gone ---------------------------------------------------------------------------------------------------


async def test_a_spec_that_cannot_be_followed_is_a_condition_until_it_can(three: Scene) -> None:
    three.change(QUEUE_AUTOSCALERS, NAME, schedules=[IMPOSSIBLE])
    three.word.desired = 5
    await three.look()
    assert three.asked == 3
    status, reason, message = three.condition("Ready")
    assert (status, reason) == ("False", "InvalidSpec")
    assert message.startswith("spec.schedules[0]: ")
    assert "99" in message
    assert three.condition("ScalingActive")[:2] == ("False", "InvalidSpec")
    assert ("InvalidSpec", f"Ready is False: {message}") in three.events
    three.change(QUEUE_AUTOSCALERS, NAME, schedules=None)
    await three.look()
    assert three.asked == 5
    assert three.condition("Ready")[0] == "True"


async def test_a_workload_that_is_not_there_is_a_condition_until_it_is(three: Scene) -> None:
    three.delete(three.kind, NAME)
    await three.look()
    assert three.condition("Ready")[:2] == ("False", "TargetNotFound")


async def test_a_workload_that_goes_between_reading_and_writing_is_an_error_and_then_a_condition(three: Scene) -> None:
    three.word.desired = 5
    three.word.meanwhile = lambda: three.delete(three.kind, NAME)
    with pytest.raises(ClusterError) as caught:
        await three.look()
    assert caught.value.not_found
    await three.look()
    assert three.condition("Ready")[:2] == ("False", "TargetNotFound")


async def test_a_resource_that_goes_between_reading_and_writing_is_gone_at_the_next_look(three: Scene) -> None:
    three.word.desired = 5
    three.word.meanwhile = lambda: three.delete(QUEUE_AUTOSCALERS, NAME)
    with pytest.raises(ClusterError):
        await three.look()
    with pytest.raises(GoneError):
        await three.look()


async def test_what_has_changed_meanwhile_is_a_conflict_and_the_next_look_sees_it(three: Scene) -> None:
    three.word.desired = 5
    three.word.meanwhile = lambda: three.scale_by_hand(4)
    with pytest.raises(ClusterError) as caught:
        await three.look()
    assert caught.value.conflict
    assert three.asked == 4
    await three.settled()
    await three.look()
    assert three.asked == 5
    assert three.status["decisions"][0]["from"] == 4


async def test_a_decision_that_could_not_be_told_is_told_at_the_next_look(three: Scene) -> None:
    three.word.desired, three.word.reason = 4, "once"
    three.word.meanwhile = lambda: three.change(QUEUE_AUTOSCALERS, NAME, maxReplicas=6)
    with pytest.raises(ClusterError) as caught:
        await three.look()
    assert caught.value.conflict
    assert three.asked == 4
    three.word.reason = "later"
    await three.settled()
    await three.look()
    [decision] = three.status["decisions"]
    assert (decision["from"], decision["to"], decision["reason"]) == (3, 4, "once")


async def test_a_write_whose_answer_is_lost_is_not_taken_for_another_hand(three: Scene) -> None:
    three.api.faults.append(Fault(verb="patch", path="/scale", cut=True, after=True))
    three.word.desired = 4
    with pytest.raises(ClusterError) as caught:
        await three.look()
    assert caught.value.code == 0
    await three.settled()
    await three.look()
    assert three.asked == 4
    assert "ScaledByHand" not in three.reasons


async def test_another_workload_is_no_scale_by_another_hand(three: Scene) -> None:
    other = workload("Deployment", 1)
    other["metadata"]["name"] = "other"
    three.api.apply(other)
    target = three.resource["spec"]["scaleTargetRef"] | {"name": "other"}
    three.change(QUEUE_AUTOSCALERS, NAME, scaleTargetRef=target)
    three.clock.turn(5)
    await three.reconciler.look()
    assert three.word.seen[-1].desired == 1
    assert "ScaledByHand" not in three.reasons


async def test_an_event_that_cannot_be_written_stops_nothing(three: Scene) -> None:
    three.api.faults.append(Fault(verb="create", path="/events", code=500, times=None))
    three.word.desired = 4
    await three.look()
    assert (three.asked, three.status["desired"]) == (4, 4)
