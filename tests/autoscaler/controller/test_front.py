"""While no replica takes requests a pod of the operator is their endpoint; there is always somebody to connect to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from autoscaler.activator import Room
from autoscaler.cluster.face import PODS, QUEUE_AUTOSCALERS
from autoscaler.controller.drain import SERVES
from autoscaler.controller.front import STANDS_IN, Front
from autoscaler.controller.tend import hand_over
from tests.autoscaler.controller.clock import until
from tests.autoscaler.controller.scene import NAME, Scene, scene

OPERATOR = "operator-0"


def operator_pod(name: str, **labels: str) -> dict[str, Any]:
    spec = {"containers": [{"name": "autoscaler", "image": "nemoserve-autoscaler"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


@pytest.fixture
async def zero(tmp_path: Path) -> AsyncIterator[Scene]:
    """One replica that serves, of a workload that may have none, and an activator."""
    async with scene(tmp_path, replicas=1, minReplicas=0, scaleToZero={"enabled": True}) as here:
        here.api.apply(operator_pod(OPERATOR))
        here.front = Front(NAME, OPERATOR, Room())
        here.reconciler = here.successor()
        await here.look()
        yield here


def takers(here: Scene) -> list[str]:
    assert here.front is not None
    return [each.name for each in here.front.room.replicas]


async def hold(here: Scene) -> asyncio.Task[str]:
    """A request comes to the activator; the name of the replica that it is handed to."""
    assert here.front is not None
    room = here.front.room

    async def ask() -> str:
        with room.enter() as held:
            return (await held.turn()).name

    before = room.held_requests
    task = asyncio.create_task(ask())
    await until(lambda: room.held_requests > before or task.done())
    return task


async def test_while_a_replica_serves_the_activator_is_not_in_the_way(zero: Scene) -> None:
    assert zero.serving == zero.pods
    assert takers(zero) == zero.pods


async def test_it_stands_in_before_the_last_one_drains_and_takes_its_requests_there_until_it_is_gone(
    zero: Scene,
) -> None:
    [last] = zero.pods
    zero.ears.running = {last: 1}
    zero.word.desired = 0
    await zero.look()
    assert zero.serving == [OPERATOR]
    patches = [call.request.name for call in zero.api.writes(resource="pods")]
    assert patches[-2:] == [OPERATOR, last]  # in this order
    assert takers(zero) == [last]
    zero.ears.running = {last: 0}
    await zero.look()
    assert (zero.asked, zero.pods, zero.serving) == (0, [], [OPERATOR])
    await zero.look()
    assert takers(zero) == []


async def test_a_request_at_zero_is_seen_by_the_policy_and_handed_to_the_first_that_is_ready(zero: Scene) -> None:
    zero.word.desired = 0
    await zero.look()
    await zero.look()
    await zero.look()
    assert zero.pods == []
    request = await hold(zero)
    zero.clock.turn(2)
    zero.word.desired = 1
    await zero.look()
    assert zero.word.seen[-1].held_requests == 1
    assert zero.status["heldRequests"] == 1
    await zero.look()
    assert await request == zero.pods[0]
    assert zero.serving == zero.pods


async def test_while_the_first_one_loads_the_activator_stays(tmp_path: Path) -> None:
    async with scene(tmp_path, replicas=1, nodes=0, minReplicas=0, scaleToZero={"enabled": True}) as here:
        here.api.apply(operator_pod(OPERATOR))
        here.front = Front(NAME, OPERATOR, Room())
        here.reconciler = here.successor()
        await here.look()
        assert OPERATOR in here.serving
        assert takers(here) == []
        assert "waiting for a node" in here.front.room.words


async def test_who_waits_is_told_that_the_only_replica_fails(zero: Scene) -> None:
    assert zero.front is not None
    zero.ears.failed = set(zero.pods)
    await zero.look()
    assert zero.front.room.words == "starting a replica, its container or its server has failed"


async def test_what_comes_is_held_while_the_only_replica_answers_nobody(tmp_path: Path) -> None:
    async with scene(tmp_path, replicas=1, nodes=0, minReplicas=0, scaleToZero={"enabled": True}) as here:
        here.api.apply(operator_pod(OPERATOR))
        here.front = Front(NAME, OPERATOR, Room())
        here.reconciler = here.successor()
        here.ears.busy = set(here.pods)
        await here.look()
        assert OPERATOR in here.serving
        assert takers(here) == []


async def test_who_led_before_stands_in_no_more(tmp_path: Path) -> None:
    async with scene(tmp_path, replicas=1, minReplicas=0, scaleToZero={"enabled": True}) as here:
        here.api.apply(operator_pod(OPERATOR), operator_pod("operator-1", **{SERVES: NAME, STANDS_IN: NAME}))
        here.front = Front(NAME, OPERATOR, Room())
        here.reconciler = here.successor()
        await here.look()
        assert here.serving == here.pods


@pytest.mark.parametrize("label", [SERVES, STANDS_IN])
async def test_at_zero_it_stands_in_again_though_somebody_took_a_label_off(zero: Scene, label: str) -> None:
    zero.word.desired = 0
    for _ in range(3):
        await zero.look()
    zero.label_pod(OPERATOR, {label: None})
    await zero.look(30)
    assert zero.serving == [OPERATOR]
    assert zero.api.get(PODS, OPERATOR)["metadata"]["labels"] == {SERVES: NAME, STANDS_IN: NAME}


async def test_at_zero_who_leads_now_is_an_endpoint_before_who_led_before_is_none(zero: Scene) -> None:
    zero.word.desired = 0
    for _ in range(3):
        await zero.look()
    zero.api.apply(operator_pod("operator-1"))
    zero.front = Front(NAME, "operator-1", Room())
    zero.reconciler = zero.successor()
    before = len(zero.api.writes(resource="pods"))
    await zero.look()
    assert zero.serving == ["operator-1"]
    assert [call.request.name for call in zero.api.writes(resource="pods")][before:] == ["operator-1", OPERATOR]


async def test_a_process_that_leads_no_more_hands_over_what_it_holds_and_writes_nothing(zero: Scene) -> None:
    """The one that leads now has made the replica ready."""
    assert zero.front is not None
    zero.front.room.serve(())
    request = await hold(zero)
    writes = len(zero.api.writes())
    bystander = asyncio.create_task(hand_over(zero.front, zero.successor(), zero.clock))
    await zero.clock.turn_until(request.done)
    bystander.cancel()
    assert await request == zero.pods[0]
    assert len(zero.api.writes()) == writes


async def test_a_process_that_does_not_lead_passes_what_it_holds_on_to_the_one_that_stands_in(zero: Scene) -> None:
    """Else nobody would start a replica for it, as who leads sees no more than what it holds itself."""
    zero.word.desired = 0
    for _ in range(3):
        await zero.look()
    zero.api.apply(operator_pod("operator-1"))
    zero.report_ready("operator-1", "10.0.0.9")
    writes = len(zero.api.writes())
    other = Front(NAME, "operator-1", Room())
    zero.front = other
    request = await hold(zero)
    bystander = asyncio.create_task(hand_over(other, zero.successor(), zero.clock))
    for _ in range(3):
        zero.clock.turn(5)
        await zero.clock.settle()
    assert not request.done()  # who stands in is not an endpoint yet
    zero.report_ready(OPERATOR, "10.0.0.8")
    await zero.clock.turn_until(request.done)
    bystander.cancel()
    assert await request == OPERATOR
    assert [each.host for each in other.room.replicas] == ["10.0.0.8"]
    assert len(zero.api.writes()) == writes


async def test_this_process_stands_in_no_more_when_the_resource_is_gone(zero: Scene) -> None:
    zero.word.desired = 0
    await zero.look()
    assert OPERATOR in zero.serving
    await zero.reconciler.end()
    assert OPERATOR not in zero.serving
    assert SERVES not in zero.api.get(PODS, OPERATOR)["metadata"]["labels"]
    assert takers(zero) == []


async def test_in_a_dry_run_it_stands_in_for_nobody_and_hands_over_what_it_holds(zero: Scene) -> None:
    zero.word.desired = 0
    for _ in range(3):
        await zero.look()
    assert (zero.pods, zero.serving) == ([], [OPERATOR])
    request = await hold(zero)
    zero.change(QUEUE_AUTOSCALERS, NAME, dryRun=True)
    zero.scale_by_hand(1)
    await zero.settled()
    await zero.look()
    assert zero.serving == zero.pods
    await until(request.done)
    assert await request == zero.pods[0]
