"""Whether the policy's word is followed: the first that speaks against it decides."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.controller.status import Is
from autoscaler.controller.verdict import Verdict, held_back, judge
from autoscaler.decision import Decision, Limit
from autoscaler.resource import Spec, TargetRef
from autoscaler.settings import ScaleToZero, Settings

TARGET = TargetRef("apps/v1", "Deployment", "nemo")
SETTINGS = Settings(min_replicas=2, max_replicas=5)


def verdict(
    desired: int, *, asked: int = 3, rival: str | None = None, limit: Limit | None = None, **spec: Any
) -> Verdict:
    given = {"target": TARGET, "settings": SETTINGS} | spec
    return judge(Spec(**given), asked, Decision(desired, "load", limit), rival)


def told(verdict: Verdict) -> tuple[int, bool, str]:
    return verdict.desired, verdict.acts, verdict.active.reason


def test_the_policys_word_is_followed() -> None:
    found = verdict(4)
    assert told(found) == (4, True, "Deciding")
    assert (found.reason, found.active.status, found.limited.status) == ("load", Is.TRUE, Is.FALSE)


@pytest.mark.parametrize(("said", "done"), [(0, 2), (1, 2), (9, 5)])
def test_within_the_limits_whatever_it_says(said: int, done: int) -> None:
    assert verdict(said).desired == done


def test_another_scaler_is_left_alone_before_all_else() -> None:
    found = verdict(4, rival="HorizontalPodAutoscaler/x", pin=2, asked=0)
    assert told(found) == (4, False, "OtherScaler")
    assert "HorizontalPodAutoscaler/x scales Deployment/nemo too" in found.active.message
    assert found.active.warning


def test_a_pin_by_hand_holds_below_the_least_and_never_above_the_most() -> None:
    assert told(verdict(4, pin=0)) == (0, True, "Pinned")
    above = verdict(4, pin=9)
    assert told(above) == (5, True, "Pinned")
    assert above.limited.reason == "TooManyReplicas"
    assert above.reason == "pinned to 5 by spec.replicas; load alone would have 4"


def test_at_zero_by_hand_all_is_quiet_unless_zero_is_the_policys_business() -> None:
    assert told(verdict(4, asked=0)) == (0, False, "Paused")
    zero = Settings(min_replicas=0, max_replicas=5, scale_to_zero=ScaleToZero(enabled=True))
    assert told(verdict(1, asked=0, settings=zero)) == (1, True, "Deciding")
    assert told(verdict(0, settings=zero)) == (0, True, "Deciding")


def test_a_dry_run_says_and_does_nothing() -> None:
    assert told(verdict(4, dry_run=True)) == (4, False, "DryRun")
    assert told(verdict(4, dry_run=True, pin=1)) == (1, False, "Pinned")


def test_what_fails_asks_for_one_more_of_as_many_as_there_may_be_and_of_none_at_zero_or_beside_a_pin() -> None:
    zero = Settings(min_replicas=0, max_replicas=5, scale_to_zero=ScaleToZero(enabled=True))

    def with_spare(desired: int, **spec: Any) -> tuple[int, str]:
        given = {"target": TARGET, "settings": SETTINGS} | spec
        found = judge(Spec(**given), 3, Decision(desired, "load"), None, spare=1)
        return found.desired, found.reason

    assert with_spare(3) == (4, "load; 4 with one for what fails")
    assert with_spare(1)[0] == 3  # the least that there may be, and one
    assert with_spare(5) == (5, "load")
    assert with_spare(0, settings=zero) == (0, "load")
    assert with_spare(4, pin=3)[0] == 3


@pytest.mark.parametrize("limit", list(Limit))
def test_a_limit_is_a_condition(limit: Limit) -> None:
    limited = verdict(4, limit=limit).limited
    assert (limited.status, limited.reason) == (Is.TRUE, limit.value)
    assert limited.warning == (limit in (Limit.MAX_REPLICAS, Limit.NO_NODES))


def test_while_a_workload_rolls_out_there_are_no_fewer_and_it_says_so() -> None:
    for fewer in (verdict(2), verdict(4, pin=1)):
        found = held_back(fewer, 3)
        assert found.desired == 3
        assert found.reason == f"{fewer.reason}; still 3: none goes while a rollout is under way"
        assert found.limited.reason == "RolloutUnderWay"
    for other in (verdict(3), verdict(5), verdict(2, dry_run=True)):
        assert held_back(other, 3) == other
