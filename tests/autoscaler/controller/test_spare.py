"""A replica that fails costs no capacity, and a fleet in which all that is made fails does not grow."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from autoscaler.cluster.face import QUEUE_AUTOSCALERS
from autoscaler.controller.drain import TEMPLATE
from autoscaler.controller.spare import HEALTHY_SECONDS, SICK_SECONDS
from tests.autoscaler.controller.scene import NAME, Scene, scene


@pytest.fixture
async def three(tmp_path: Path) -> AsyncIterator[Scene]:
    """Three replicas that serve, looked at once, and as many as load needs."""
    async with scene(tmp_path, replicas=3) as here:
        here.word.desired = 3
        await here.look()
        yield here


async def sick(three: Scene, count: int = 1) -> None:
    """So many of them fail, and for long."""
    three.ears.failed = set(three.pods[-count:])
    await three.look()
    await three.look(SICK_SECONDS)


async def test_one_more_is_asked_for_where_one_fails_for_long(three: Scene) -> None:
    three.ears.failed = {three.pods[0]}
    await three.look()
    await three.look(SICK_SECONDS - 1)
    assert three.asked == 3  # what ends once is soon up again
    await three.look(1)
    assert three.asked == 4
    assert three.status["reason"] == "as the test wants; 4 with one for what fails"
    await three.look(60)
    assert (three.asked, three.word.seen[-1].desired) == (4, 3)


async def test_the_only_one_is_made_up_for_if_it_has_served(tmp_path: Path) -> None:
    async with scene(tmp_path, replicas=1) as here:
        here.word.desired = 1
        await here.look()
        await sick(here)
        assert here.asked == 1  # nobody knows whether its template works
        here.ears.ready_at = {here.pods[0]: here.clock.wall()}
        for _ in range(3):
            await here.look()
        assert (here.asked, here.word.seen[-1].desired) == (2, 1)


async def test_one_however_many_fail(three: Scene) -> None:
    await sick(three)
    await sick(three, 3)
    assert len(three.ears.failed) == 3
    assert three.asked == 4


async def test_it_goes_some_time_after_the_last_failure_and_no_other_is_made_meanwhile(three: Scene) -> None:
    await sick(three)
    for _ in range(3):
        three.ears.failed = set()
        await three.look(HEALTHY_SECONDS - 60)
        await sick(three)
        assert three.asked == 4
    three.ears.failed = set()
    await three.look(HEALTHY_SECONDS)
    await three.look()
    assert three.asked == 3
    assert {each.desired for each in three.word.seen} == {3}
    assert "ScaledByHand" not in three.reasons


async def test_who_leads_next_adds_no_other(three: Scene) -> None:
    await sick(three)
    three.reconciler = three.successor()
    for _ in range(3):
        await three.look(SICK_SECONDS)
    assert three.asked == 4
    assert {each.desired for each in three.word.seen} == {3}


async def test_who_leads_next_never_takes_a_workload_for_one_at_zero(three: Scene) -> None:
    three.word.desired = 1
    three.ears.running = dict.fromkeys(three.pods, 1)
    await three.look()
    [stays] = three.serving
    three.ears.failed, three.ears.ready_at = {stays}, {stays: three.clock.wall()}
    three.reconciler = three.successor()
    await three.look()
    assert three.word.seen[-1].desired == 1


async def test_what_another_hand_asks_for_is_where_the_next_decision_starts(three: Scene) -> None:
    await sick(three)
    three.scale_by_hand(2)
    await three.settled()
    three.ears.failed = set(three.pods[:1])
    await three.look()
    assert three.word.seen[-1].desired == 2


async def test_a_pin_is_exact(three: Scene) -> None:
    three.change(QUEUE_AUTOSCALERS, NAME, replicas=3)
    await sick(three)
    assert three.asked == 3


@pytest.mark.parametrize("why", ["none has served", "a rollout is under way"])
async def test_a_template_that_fails_makes_no_fleet_grow(three: Scene, why: str) -> None:
    if why == "none has served":
        await sick(three, 3)
    else:
        three.label_pod(three.pods[-1], {TEMPLATE: "new"})
        await sick(three)
    await three.look(60)
    assert three.asked == 3
    assert {each.desired for each in three.word.seen} == {3}
