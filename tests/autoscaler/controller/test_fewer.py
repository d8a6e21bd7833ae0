"""How replicas go, look by look, whoever leads and whatever happens meanwhile; and those that fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoscaler.cluster.face import PODS, QUEUE_AUTOSCALERS, ClusterError
from autoscaler.cluster.objects import pod
from autoscaler.controller.drain import DOOMED, DRAINING, TEMPLATE
from tests.autoscaler.controller.clock import until
from tests.autoscaler.controller.scene import IMPOSSIBLE, NAME, Scene, scene
from tests.autoscaler.fake_api import Fault


async def test_the_idlest_drains_and_goes_when_it_is_idle(three: Scene) -> None:
    a, idlest, c = three.pods
    three.ears.running = {a: 3, idlest: 1, c: 2}
    three.word.desired, three.word.reason = 2, "2 are enough"
    await three.look()
    assert three.asked == 3
    assert three.serving == [a, c]
    assert ("Draining", f"{idlest} drain for 2: 2 are enough") in three.events
    assert (three.status["draining"], three.status["desired"]) == (0, 2)  # as it was seen; the next look sees one
    await three.look(20)
    assert (three.asked, three.status["draining"]) == (3, 1)
    assert three.word.seen[-1].desired == 2
    three.ears.running[idlest] = 0
    await three.look()
    assert three.asked == 2
    assert three.pods == [a, c]
    assert ("ScaledIn", f"Deployment/nemo from 3 to 2: 2 are enough; {idlest}: idle") in three.events
    assert [each["to"] for each in three.status["decisions"]] == [2]
    assert three.metric("drained_total", how="idle") == 1


async def test_one_that_is_never_idle_goes_at_the_limit(three: Scene) -> None:
    three.ears.running = dict.fromkeys(three.pods, 2)
    three.word.desired = 2
    await three.look()
    [drains] = set(three.pods) - set(three.serving)
    await three.look(299)
    assert three.asked == 3
    await three.look(1)
    assert drains not in three.pods
    assert three.metric("drained_total", how="limit") == 1


async def test_how_long_one_may_drain_is_the_owners_word(three: Scene) -> None:
    three.change(QUEUE_AUTOSCALERS, NAME, behavior={"drainSeconds": 30})
    three.ears.running = dict.fromkeys(three.pods, 2)
    three.word.desired = 2
    await three.look()
    await three.look(29)
    assert three.asked == 3
    await three.look(1)
    assert three.asked == 2


async def test_no_replica_goes_while_its_deployment_rolls_out(three: Scene) -> None:
    new = three.pods[0]
    three.label_pod(new, {TEMPLATE: "new"})
    three.word.desired, three.word.reason = 2, "2 are enough"
    for _ in range(3):
        await three.look()
    assert (three.asked, len(three.serving), three.status["desired"]) == (3, 3, 3)
    assert three.status["reason"] == "2 are enough; still 3: none goes while a rollout is under way"
    assert three.condition("ScalingLimited")[:2] == ("True", "RolloutUnderWay")
    assert "decisions" not in three.status
    three.label_pod(new, {TEMPLATE: None})
    await three.look()
    await three.look()
    assert three.asked == 2


async def test_one_that_is_wanted_again_serves_again_and_none_is_made(three: Scene) -> None:
    before = three.pods
    three.ears.running = dict.fromkeys(three.pods, 2)
    three.word.desired = 1
    await three.look()
    assert len(three.serving) == 1
    three.word.desired, three.word.reason = 3, "load is back"
    await three.look()
    assert (three.serving, three.pods, three.asked) == (before, before, 3)
    assert not three.api.list(PODS, label_selector=DRAINING)
    assert "DrainReversed" in three.reasons


@pytest.mark.parametrize("change", ["dry run", "gone", "wrong", "wrong, and another leader", "another workload"])
async def test_who_acts_no_more_leaves_none_draining(three: Scene, change: str) -> None:
    before = three.pods
    three.ears.running = dict.fromkeys(three.pods, 2)
    three.word.desired = 1
    await three.look()
    assert len(three.serving) == 1
    if change == "dry run":
        three.change(QUEUE_AUTOSCALERS, NAME, dryRun=True)
        await three.look()
    elif change.startswith("wrong"):
        three.change(QUEUE_AUTOSCALERS, NAME, schedules=[IMPOSSIBLE])
        three.reconciler = three.successor() if "leader" in change else three.reconciler
        await three.look()
        assert (three.condition("Ready")[1], three.status["draining"]) == ("InvalidSpec", 0)
    elif change == "another workload":
        target = three.resource["spec"]["scaleTargetRef"] | {"name": "other"}
        three.change(QUEUE_AUTOSCALERS, NAME, scaleTargetRef=target)
        await three.look()
    else:
        three.delete(QUEUE_AUTOSCALERS, NAME)
        await three.reconciler.end()
    assert (three.serving, three.pods, three.asked) == (before, before, 3)


async def test_a_wrong_spec_is_told_though_what_drains_cannot_be_changed(three: Scene) -> None:
    three.ears.running = dict.fromkeys(three.pods, 2)
    three.word.desired = 1
    await three.look()
    three.change(QUEUE_AUTOSCALERS, NAME, schedules=[IMPOSSIBLE])
    three.api.faults.append(Fault(verb="patch", path="/pods/", code=500, times=None))
    with pytest.raises(ClusterError):
        await three.look()
    assert three.condition("Ready")[:2] == ("False", "InvalidSpec")


async def test_one_that_was_doomed_and_not_let_go_costs_as_much_as_others_again(three: Scene) -> None:
    three.api.faults.append(Fault(verb="patch", path="/scale", code=500))
    three.ears.failed = {three.pods[0]}
    three.word.desired = 2
    with pytest.raises(ClusterError):
        await three.look()
    assert [each.deletion_cost for each in map(pod, three.api.list(PODS))].count(DOOMED) == 1
    three.change(QUEUE_AUTOSCALERS, NAME, schedules=[IMPOSSIBLE])
    await three.look()
    assert [each.deletion_cost for each in map(pod, three.api.list(PODS))] == [0, 0, 0]


async def test_who_leads_next_goes_on_where_the_drain_was(three: Scene) -> None:
    three.ears.running = dict.fromkeys(three.pods, 1)
    three.word.desired = 2
    await three.look()
    [drains] = set(three.pods) - set(three.serving)
    others = three.serving
    three.ears.running = {drains: 0, others[0]: 0, others[1]: 0}
    three.reconciler = three.successor()
    await three.look()
    assert three.pods == others
    assert three.asked == 2


async def test_a_drain_goes_on_though_it_was_begun_by_a_clock_far_ahead(three: Scene) -> None:
    three.ears.running = dict.fromkeys(three.pods, 1)
    three.word.desired = 2
    three.clock.skew = 3600.0
    await three.look()
    [drains] = set(three.pods) - set(three.serving)
    three.clock.skew = 0.0
    three.reconciler = three.successor()
    await three.look()
    three.ears.running[drains] = 0
    await three.look()
    assert drains not in three.pods


async def test_a_drain_goes_on_though_the_clock_was_set_back_meanwhile(three: Scene) -> None:
    three.ears.running = dict.fromkeys(three.pods, 1)
    three.word.desired = 2
    await three.look()
    [drains] = set(three.pods) - set(three.serving)
    await three.look()
    three.clock.skew = -3600.0
    await three.look()
    three.ears.running[drains] = 0
    await three.look()
    assert drains not in three.pods


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet"])
async def test_one_that_was_let_go_is_not_taken_back_before_its_controller_has_deleted_it(
    tmp_path: Path, kind: str
) -> None:
    async with scene(tmp_path, kind=kind, replicas=3) as here:
        here.word.desired = 2
        await here.look()
        [drains] = set(here.pods) - set(here.serving)
        here.ears.running = {name: 1 for name in here.serving}
        here.workloads.stall(True)
        here.clock.turn(5)
        await here.reconciler.look()
        assert here.asked == 2
        assert drains in here.pods
        writes = len(here.api.writes(resource="pods"))
        here.word.desired = None
        here.clock.turn(1)
        await here.reconciler.look()
        assert here.word.seen[-1].desired == 2
        assert len(here.api.writes(resource="pods")) == writes
        here.workloads.stall(False)
        await here.settled()
        assert drains not in here.pods


async def test_what_loads_goes_first_and_at_once(tmp_path: Path) -> None:
    async with scene(tmp_path, replicas=3, nodes=2) as here:
        served = here.serving
        here.word.desired = 2
        await here.look()
        assert here.asked == 2
        assert len(here.pods) == 2
        assert set(here.pods) < set(served)
        assert not any(reason == "Draining" for reason in here.reasons)


async def test_a_stateful_set_gives_its_highest_ordinals(tmp_path: Path) -> None:
    async with scene(tmp_path, kind="StatefulSet", replicas=3) as here:
        here.ears.running = {"nemo-0": 0, "nemo-1": 0, "nemo-2": 5}
        here.word.desired = 1
        await here.look()
        assert here.serving == ["nemo-0"]
        await here.look(10)
        assert here.asked == 3  # nemo-1 is idle, and may not go before nemo-2
        here.ears.running["nemo-2"] = 0
        await here.look()
        assert here.pods == ["nemo-0"]


async def test_who_is_not_heard_counts_as_busy(three: Scene) -> None:
    silent, *others = three.pods
    three.ears.running = dict.fromkeys(others, 9)
    three.ears.silent = {silent}
    await three.look(20)
    status, reason, message = three.condition("MetricsAvailable")
    assert (status, reason, message) == ("False", "Partial", f"1 of 3 are silent: {silent}")
    assert "Partial" in three.reasons
    three.word.desired = 2
    await three.look()
    assert silent in three.serving


async def test_replicas_that_fail_are_told_with_the_reason_once_for_each_cause(three: Scene) -> None:
    assert three.condition("ReplicasFailing")[:2] == ("False", "NoneFails")
    three.change(QUEUE_AUTOSCALERS, NAME, replicas=3)
    a, b, c = three.pods
    three.break_container(a, "ErrImagePull", "no such image")
    await three.look(20)
    await three.look(60)
    told = f"1 of 3 fail: {a}: ImagePullBackOff, container server: no such image"
    assert three.condition("ReplicasFailing") == ("True", "ImagePullBackOff", told)
    three.break_container(a, "ImagePullBackOff", "no such image")  # as a kubelet says in turns
    three.break_container(b, "ImagePullBackOff", "no such image")
    await three.look(60)
    assert three.condition("ReplicasFailing")[2].startswith(f"2 of 3 fail: {a}: ")
    failing = [event for event in three.events if "ReplicasFailing" in event[1]]
    assert failing == [("ImagePullBackOff", f"ReplicasFailing is True: {told}")]
    three.break_container(c, "CreateContainerConfigError", 'secret "key" not found')
    await three.look(60)
    assert three.condition("ReplicasFailing")[1] == "CreateContainerConfigError,ImagePullBackOff"
    assert 'secret "key" not found' in three.events[-1][1]


async def test_a_server_that_has_failed_is_a_replica_that_fails(three: Scene) -> None:
    three.ears.failed = {three.pods[0]}
    await three.look()
    assert three.condition("ReplicasFailing")[:2] == ("True", "ServerFailed")
    three.ears.failed = set()
    await three.look()
    assert three.condition("ReplicasFailing")[:2] == ("False", "NoneFails")
    assert ("NoneFails", "ReplicasFailing is False: no replica fails") in three.events


async def test_pods_that_their_nodes_ended_are_told_for_a_minute_and_are_no_replicas_that_fail(three: Scene) -> None:
    evicted, refused, _ = three.pods
    three.end_pod(evicted, "Evicted", "The node was low on resource: memory.")
    three.end_pod(refused, "OutOfnvidia.com/gpu", "Node didn't have enough resource: nvidia.com/gpu")
    await until(lambda: len(three.pods) == 5)
    await three.reconciler.look()
    assert three.condition("ReplicasFailing")[:2] == ("True", "Evicted,OutOfnvidiacomgpu")
    message = three.condition("ReplicasFailing")[2]
    assert message.startswith("2 ended lately, in whose place are others: ")
    assert f"{evicted}: Evicted, The node was low on resource: memory." in message
    assert ("Evicted,OutOfnvidiacomgpu", f"ReplicasFailing is True: {message}") in three.events
    assert len(three.word.seen[-1].replicas) == 3
    three.clock.turn(60)
    await three.reconciler.look()
    assert three.condition("ReplicasFailing")[:2] == ("False", "NoneFails")
    assert evicted in three.pods  # until somebody tidies up
