"""A replica that fails costs no capacity, and a fleet in which all that is made fails does not grow."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.cluster.objects import Pod
from autoscaler.cluster.objects import Scale as Asked
from autoscaler.controller.drain import TEMPLATE
from autoscaler.controller.drain import Scene as Seen
from autoscaler.controller.spare import HEALTHY_SECONDS, SICK_SECONDS, Spare
from autoscaler.controller.verdict import judge
from autoscaler.decision import Decision
from autoscaler.fleet import Phase, Replica
from autoscaler.resource import Spec, TargetRef
from autoscaler.settings import Settings
from tests.autoscaler.controller.scene import Scene

TARGET = TargetRef("apps/v1", "Deployment", "nemo")


class Fleet:
    """A workload in whose place as many replicas are as it is asked for, and a policy that wants `need`.

    Attributes:
        failing, new: numbers of replicas that fail, and that are of another template; all others are ready.
        ready_at: of each that fails.
        draining: numbers.
        told: in the status.
        seen: how many replicas the policy was shown that there are asked for, look by look.
    """

    def __init__(self, asked: int) -> None:
        self.asked = self.need = asked
        self.failing: set[int] = set()
        self.new: set[int] = set()
        self.draining: set[int] = set()
        self.ready_at: float | None = None
        self.spec: dict[str, Any] = {}
        self.told: int | None = None
        self.seen: list[int] = []
        self.now = 1_000_000.0
        self.spare = Spare()

    def look(self, seconds: float = 5.0) -> int:
        """How many are asked for then."""
        self.now += seconds
        scene = self._scene()
        self.spare.see(scene, self.now, self.told)
        self.seen.append(scene.wanted - self.spare.included)
        spec = Spec(TARGET, Settings(max_replicas=9), **self.spec)
        verdict = judge(spec, self.asked, Decision(self.need, "load"), None, spare=self.spare.due)
        self.spare.note(scene.wanted, verdict)
        self.told = self.spare.included
        self.asked = verdict.desired + len(self.draining)
        return self.asked

    def sick(self, *failing: int) -> int:
        """These fail, and for long."""
        self.failing = set(failing)
        self.look()
        return self.look(SICK_SECONDS)

    def _scene(self) -> Seen:
        replicas, pods = [], {}
        for number in range(self.asked):
            phase = Phase.FAILED if number in self.failing else Phase.READY
            phase = Phase.DRAINING if number in self.draining else phase
            labels = {TEMPLATE: "new" if number in self.new else "old"}
            pods[str(number)] = Pod(str(number), str(number), "1", phase, True, 1000.0, labels=labels)
            replicas.append(Replica(str(number), phase, 1000.0, ready_at=self.ready_at))
        draining = {str(number): 0.0 for number in self.draining}
        asked = Asked(self.asked, self.asked, "", "")
        return Seen(0.0, TARGET, asked, pods, tuple(replicas), (), draining, fresh_since=0.0)


async def test_one_more_is_asked_for_where_one_fails_for_long_and_everybody_is_told(three: Scene) -> None:
    three.word.desired = 3
    three.ears.failed = {three.pods[0]}
    await three.look()
    await three.look(SICK_SECONDS)
    await three.look(60)
    assert (three.asked, three.word.seen[-1].desired) == (4, 3)
    assert three.status["reason"] == "as the test wants; 4 with one for what fails"
    assert (three.status["desired"], three.status["spare"]) == (4, 1)
    three.reconciler = three.successor()
    three.ears.failed = set()
    await three.look()
    assert three.word.seen[-1].desired == 3
    assert "ScaledByHand" not in three.reasons


def test_what_ends_once_is_soon_up_again() -> None:
    fleet = Fleet(3)
    fleet.look()
    fleet.failing = {0}
    fleet.look()
    assert fleet.look(SICK_SECONDS - 1) == 3
    assert fleet.look(1) == 4


def test_it_is_one_however_many_fail() -> None:
    fleet = Fleet(3)
    fleet.look()
    assert fleet.sick(0) == 4
    assert fleet.sick(0, 2, 3) == 4


def test_the_only_one_is_made_up_for_if_it_has_served() -> None:
    fleet = Fleet(1)
    fleet.look()
    fleet.ready_at = 1000.0  # its creation: nobody knows
    assert fleet.sick(0) == 1
    fleet.ready_at = 1060.0
    assert [fleet.look() for _ in range(3)] == [2, 2, 2]
    assert set(fleet.seen) == {1}


def test_it_goes_some_time_after_the_last_failure_and_no_other_is_made_meanwhile() -> None:
    fleet = Fleet(3)
    fleet.look()
    for _ in range(3):
        assert fleet.sick(0) == 4
        fleet.failing = set()
        assert fleet.look(HEALTHY_SECONDS - 1) == 4
    assert fleet.look(1) == 3
    assert set(fleet.seen) == {3}  # else a policy would learn a larger fleet each time


@pytest.mark.parametrize("told", [True, False])
def test_who_leads_next_adds_no_other(told: bool) -> None:
    fleet = Fleet(3)
    fleet.look()
    fleet.sick(0)
    fleet.spare = Spare()
    fleet.told = fleet.told if told else None  # by an older definition of the resource
    assert [fleet.look(SICK_SECONDS) for _ in range(3)] == [4, 4, 4]
    assert set(fleet.seen) == {3}


def test_who_leads_next_takes_no_replica_for_made_up_for_that_fails_just_now() -> None:
    fleet = Fleet(3)
    fleet.look()
    fleet.spare, fleet.failing = Spare(), {0}
    fleet.look()
    assert fleet.seen == [3, 3]


def test_who_leads_next_never_takes_a_workload_for_one_at_zero() -> None:
    fleet = Fleet(3)
    fleet.draining, fleet.failing, fleet.ready_at, fleet.need = {1, 2}, {0}, 1060.0, 1
    fleet.look()
    assert fleet.seen == [1]


def test_what_another_hand_asks_for_is_where_the_next_decision_starts() -> None:
    fleet = Fleet(3)
    fleet.look()
    fleet.sick(0)
    fleet.asked = 6
    fleet.look()
    assert fleet.seen[-1] == 6


def test_a_pin_is_exact() -> None:
    fleet = Fleet(3)
    fleet.spec = {"pin": 3}
    fleet.look()
    assert fleet.sick(0) == 3


@pytest.mark.parametrize("why", ["none has served", "a rollout is under way"])
def test_a_template_that_fails_makes_no_fleet_grow(why: str) -> None:
    fleet = Fleet(3)
    fleet.look()
    fleet.new = {2} if why == "a rollout is under way" else set()
    assert fleet.sick(*(fleet.new or (0, 1, 2))) == 3
    assert fleet.look(60) == 3
    assert set(fleet.seen) == {3}
