"""HPA and KEDA, against numbers worked out by hand from the formulas of their sources."""

from __future__ import annotations

import pytest

from autoscaler.decision import Limit, Policy
from autoscaler.settings import ScaleToZero, Settings
from autoscaler.simulate.baselines import BASELINES
from tests.autoscaler.simulate.looks import load, look

SETTINGS = Settings(min_replicas=1, max_replicas=50)


def hpa(**parameters: object) -> Policy:
    return BASELINES["hpa"]({"target": 10.0} | parameters, SETTINGS)


@pytest.mark.parametrize(
    ("queued", "running", "desired"),
    [
        (0, 11, 4),  # ratio 1.1: within the tolerance of 0.1
        (2, 10, 5),  # ratio 1.2: ceil(1.2 * 4)
        (20, 0, 8),  # ratio 2: ceil(2 * 4)
        (0, 9, 4),  # ratio 0.9: within it
    ],
)
def test_pods_metric_scales_by_the_ratio_of_the_mean_to_the_target(queued: int, running: int, desired: int) -> None:
    assert hpa().decide(look(0, [load(queued, running)] * 4)).desired == desired


def test_replicas_that_start_count_as_idle_when_more_are_wanted() -> None:
    # Four ready at 20 each: ratio 2. With four that load: 80 / 8 / 10 = 1, within the tolerance.
    assert hpa().decide(look(0, [load(20)] * 4, pending=4)).desired == 8
    # With two: 80 / 6 / 10 = 1.33, ceil(1.33 * 6) = 8.
    assert hpa().decide(look(0, [load(20)] * 4, pending=2)).desired == 8
    # Ten at 21 each: ratio 2.1, but 210 / 20 / 10 = 1.05 is within the tolerance.
    assert hpa().decide(look(0, [load(21)] * 10, pending=10)).desired == 20


def test_replicas_that_do_not_answer_are_at_their_target_when_fewer_are_wanted() -> None:
    # Two tell 2 each: ratio 0.2. With two at 10: 24 / 4 / 10 = 0.6, ceil(0.6 * 4) = 3.
    policy = hpa(down_stabilization_seconds=0.0)
    assert policy.decide(look(0, [load(2), load(2), None, None])).desired == 3
    # Running but not ready is one that does not answer.
    assert hpa(down_stabilization_seconds=0.0).decide(look(0, [load(2), load(2)], loading=2)).desired == 3


def test_replicas_that_do_not_answer_are_idle_when_more_are_wanted() -> None:
    # 20 each of two, nothing of the other two: 40 / 4 / 10 = 1: no change.
    assert hpa().decide(look(0, [load(20), load(20), None, None])).desired == 4


def test_it_holds_when_nobody_answers() -> None:
    assert hpa().decide(look(0, [None, None])).desired == 2


def test_external_metric_divides_the_sum_and_knows_pending_replicas() -> None:
    policy = hpa(form="External")
    assert policy.decide(look(0, [load(20)] * 4)).desired == 8  # 80 / 10
    assert policy.decide(look(15, [load(20)] * 4, pending=4)).desired == 8  # 80 / (10 * 8): within the tolerance
    assert policy.decide(look(30, [load(20)] * 4, pending=4, held=15)).desired == 10  # ceil(95 / 10)


def test_it_scales_out_by_four_or_to_the_double_within_15_seconds() -> None:
    policy = hpa()
    first = policy.decide(look(0, [load(90)]))
    assert (first.desired, first.limit) == (5, Limit.RATE)  # 9 are wanted; max(1 + 4, 1 * 2)
    again = policy.decide(look(5, [load(90)] + [load(0)] * 4, desired=5))
    assert again.desired == 5  # the period started with 1
    assert policy.decide(look(16, [load(90)] * 5)).desired == 10  # max(5 + 4, 5 * 2)


def test_it_scales_in_to_the_most_of_the_last_five_minutes() -> None:
    policy = hpa()
    assert policy.decide(look(0, [load(20)] * 4)).desired == 8
    for at in range(15, 300, 15):
        decision = policy.decide(look(at, [load(1)] * 8))
        assert (decision.desired, decision.limit) == (8, Limit.STABILIZING)
    assert policy.decide(look(300, [load(1)] * 8)).desired == 1


def test_scale_out_may_be_stabilised_too() -> None:
    policy = hpa(up_stabilization_seconds=30.0)
    assert policy.decide(look(0, [load(10)] * 2)).desired == 2
    assert policy.decide(look(15, [load(20)] * 2)).desired == 2
    assert policy.decide(look(31, [load(20)] * 2)).desired == 4


def test_it_keeps_the_limits_of_the_workload() -> None:
    policy = BASELINES["hpa"]({}, Settings(min_replicas=2, max_replicas=3))
    assert policy.decide(look(0, [load(99)] * 2)).desired == 3
    assert policy.decide(look(0, [load(99)] * 2)).limit is Limit.MAX_REPLICAS
    assert policy.decide(look(900, [load(0)] * 2)).desired == 2


def test_a_paused_workload_is_left_alone() -> None:
    assert hpa().decide(look(0, [], desired=0, held=5)).desired == 0


def keda(**parameters: object) -> Policy:
    settings = Settings(min_replicas=0, max_replicas=50, scale_to_zero=ScaleToZero(enabled=True))
    return BASELINES["keda"](parameters, settings)


def test_keda_wakes_the_first_at_a_poll_and_leaves_the_rest_to_its_hpa() -> None:
    policy = keda()
    assert policy.decide(look(0, [], desired=0)).desired == 0
    assert policy.decide(look(15, [], desired=0, held=40)).desired == 0  # the next poll is at 30
    assert policy.decide(look(30, [], desired=0, held=40)).desired == 1
    assert policy.decide(look(45, [load(40, 100)], desired=1)).desired == 5  # ceil(40 / 5) = 8, at most 4 more


def test_keda_counts_what_waits_and_not_what_runs() -> None:
    policy = keda(down_stabilization_seconds=0.0)
    assert policy.decide(look(0, [load(0, 200)] * 4)).desired == 1


def test_keda_goes_to_zero_when_it_was_idle_for_the_cooldown() -> None:
    policy = keda(cooldown_seconds=60.0)
    assert policy.decide(look(0, [load(1)])).desired == 1
    assert policy.decide(look(30, [load(0)])).desired == 1
    assert policy.decide(look(60, [load(0)])).desired == 1
    assert policy.decide(look(90, [load(0)])).desired == 0


def test_parameters_that_do_not_exist_or_fit_are_refused_by_name() -> None:
    for values, name in (({"targets": 3}, "targets"), ({"target": "a"}, "target"), ({"metric": "cpu"}, "metric")):
        with pytest.raises(ValueError, match=name):
            BASELINES["hpa"](values, SETTINGS)
