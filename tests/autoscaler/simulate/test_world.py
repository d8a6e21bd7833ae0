"""The cluster around the engines: nothing gets lost, everything is paid for, and chance is a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from autoscaler.decision import Decision
from autoscaler.fleet import Observation, Phase
from autoscaler.simulate import ARITHMETIC, Result, Slo, Static, Trace, WorldOptions, load_trace, read_curve, simulate
from autoscaler.simulate.kernel import FINISHED, LOST
from autoscaler.simulate.world import EPOCH

CURVE = read_curve(ARITHMETIC)
DURATION = 900.0


class Rule:
    """Desired replicas by a function of what is seen; keeps all looks."""

    def __init__(self, rule: Callable[[Observation], int], interval_seconds: float) -> None:
        self.interval_seconds = interval_seconds
        self.looks: list[Observation] = []
        self._rule = rule

    def decide(self, observation: Observation) -> Decision:
        self.looks.append(observation)
        return Decision(self._rule(observation), "a rule")


def seconds(observation: Observation) -> float:
    return observation.at - EPOCH


def wobble(observation: Observation) -> int:
    return 3 + int(seconds(observation) / 40) * 7 % 5


@pytest.fixture(scope="module")
def traffic() -> Trace:
    return load_trace("spikes:rate=20,hours=0.25,factor=3,every=200", seed=1)


def ran(
    traffic: Trace, rule: Callable[[Observation], int], seed: int = 0, interval: float = 5.0, **options: Any
) -> tuple[Result, Rule]:
    policy = Rule(rule, interval)
    world = WorldOptions(**({"initial_replicas": 3, "max_replicas": 10, "cold_start_seconds": 30} | options))
    return simulate(traffic, policy, CURVE, Slo(), world, seed), policy


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mtbf_seconds": 100},
        {"mtbf_seconds": 100, "retry": False, "provisioning_failure": 0.3},
        {"node_delay_seconds": 40, "schedulable": 4, "drain_seconds": 1, "victims": "random"},
        {"min_replicas": 0, "initial_replicas": 0, "metric_lag_seconds": 12.5},
    ],
)
def test_every_request_finishes_is_lost_or_still_waits_and_every_gpu_is_paid_for(
    traffic: Trace, options: dict[str, Any]
) -> None:
    result, policy = ran(traffic, wobble, **options)
    state = result.requests["state"]
    assert len(state) == len(traffic)
    assert ((state == FINISHED) | (state == LOST)).all()
    assert np.isfinite(result.requests["finished"]).all()
    if options.get("retry", True):
        assert result.lost == 0
    answered = result.requests[state == FINISHED]
    assert (answered["arrival"] <= answered["enqueued"]).all()
    assert (answered["enqueued"] <= answered["started"]).all()
    assert (answered["started"] < answered["first_token"]).all()
    assert (answered["first_token"] <= answered["finished"]).all()

    start, end = result.options.warmup, traffic.duration_s
    paid = sum(
        max(min(end, life.gone or end) - max(start, life.node), 0) for life in result.lives if life.node is not None
    )
    assert result.gpu_hours == pytest.approx(paid / 3600)
    # What was seen at each look is what is paid for
    seen = [sum(each.phase is not Phase.PENDING for each in look.replicas) for look in policy.looks]
    scored = [count for count, look in zip(seen, policy.looks, strict=True) if seconds(look) > start]
    assert result.gpu_hours * 3600 / (end - start) == pytest.approx(np.mean(scored), rel=0.1)


def test_a_seed_is_all_the_chance_there_is(traffic: Trace) -> None:
    one, two, other = (ran(traffic, wobble, seed, mtbf_seconds=200)[0] for seed in (1, 1, 2))
    assert one.summary() == two.summary()
    assert (one.requests == two.requests).all()
    assert one.summary() != other.summary()


def test_desired_is_held_within_the_limits(traffic: Trace) -> None:
    result, _ = ran(traffic, lambda look: 99 if seconds(look) < 500 else -7, max_replicas=5, min_replicas=2)
    assert set(result.timeline.desired.tolist()) == {5, 2}
    assert (result.scale_outs, result.scale_ins) == (1, 1)


def test_a_new_replica_goes_through_its_phases_in_order_and_takes_a_cold_start(traffic: Trace) -> None:
    result, policy = ran(traffic, lambda look: 4, node_delay_seconds=30, cold_start_seconds=60)
    phases = [look.replicas[-1].phase for look in policy.looks if len(look.replicas) == 4]
    order = [Phase.PENDING, Phase.STARTING, Phase.LOADING, Phase.READY]
    assert phases == sorted(phases, key=order.index)
    assert set(phases) == set(order)
    life = result.lives[-1]
    assert life.node is not None
    assert life.ready is not None
    assert life.node - life.created == pytest.approx(30, rel=0.6)
    assert life.ready - life.node == pytest.approx(60, rel=0.6)


def test_what_has_no_gpu_says_so_and_is_not_paid_for(traffic: Trace) -> None:
    result, policy = ran(traffic, lambda look: 6, schedulable=4)
    waiting = [each for each in policy.looks[-1].replicas if each.phase is Phase.PENDING]
    assert len(waiting) == 2
    assert all(each.unschedulable_since is not None for each in waiting)
    assert sum(life.node is None for life in result.lives) == 2


def test_replicas_that_are_not_ready_go_first_the_newest_before_others(traffic: Trace) -> None:
    def more_and_fewer(look: Observation) -> int:
        return 4 if seconds(look) < 10 else 6 if seconds(look) < 20 else 4

    result, _ = ran(traffic, more_and_fewer, cold_start_seconds=200)
    gone = [life for life in result.lives if life.gone is not None]
    assert [(life.created, life.ready) for life in gone] == [(10.0, None), (10.0, None)]
    assert sum(life.created == 5.0 for life in result.lives) == 1


def test_a_victim_finishes_what_it_accepted_and_the_idlest_is_chosen(traffic: Trace) -> None:
    result, policy = ran(traffic, lambda look: 3 if seconds(look) < 400 else 1, drain_seconds=300)
    assert result.lost == 0
    assert (result.requests["attempts"] == 1).all()
    assert any(each.phase is Phase.DRAINING for look in policy.looks for each in look.replicas)
    assert sum(life.gone is not None for life in result.lives) == 2


def test_a_drain_that_takes_too_long_loses_what_is_left(traffic: Trace) -> None:
    result, _ = ran(traffic, lambda look: 3 if seconds(look) < 400 else 1, drain_seconds=0, retry=False)
    assert result.lost > 0


def test_a_drain_that_is_reversed_keeps_the_replica(traffic: Trace) -> None:
    def there_and_back(look: Observation) -> int:
        return 1 if 400 <= seconds(look) < 400.5 else 3

    result, _ = ran(traffic, there_and_back, interval=0.5, drain_seconds=300)
    assert len(result.lives) == 3
    assert all(life.gone is None for life in result.lives)


def test_requests_are_held_while_there_is_no_replica(traffic: Trace) -> None:
    options = {"min_replicas": 0, "initial_replicas": 0}
    result, policy = ran(traffic, lambda look: 3 if seconds(look) > 60 else 0, **options)
    held = [look for look in policy.looks if look.held_requests]
    assert held[0].replicas == ()
    assert held[-1].oldest_held_seconds > 60
    assert (result.requests["state"] == FINISHED).all()


def test_a_policy_sees_loads_that_are_as_old_as_the_lag(traffic: Trace) -> None:
    _, policy = ran(traffic, lambda look: 3, metric_lag_seconds=12.0)
    ages = {round(look.at - each.observed_at, 3) for look in policy.looks[5:] for each in look.replicas}
    assert ages == {12.0}


def test_a_sample_that_does_not_come_is_the_one_before(traffic: Trace) -> None:
    _, policy = ran(traffic, lambda look: 3, sample_loss=0.4)
    ages = np.array([round(look.at - each.observed_at) for look in policy.looks[10:] for each in look.replicas])
    assert (ages % 5 == 0).all()
    assert (ages > 0).mean() == pytest.approx(0.4, abs=0.1)


def test_replicas_report_costs_with_the_error_that_is_asked_for(traffic: Trace) -> None:
    _, policy = ran(traffic, lambda look: 3, step_cost_error=1.5)
    load = policy.looks[-1].replicas[0].load
    assert load is not None
    assert load.step_cost.base == pytest.approx(1.5 * CURVE.step_cost.base)


def test_more_replicas_serve_better_and_cost_more(traffic: Trace) -> None:
    few, many = (
        simulate(traffic, Static(count), CURVE, Slo(), WorldOptions(initial_replicas=count), 0) for count in (2, 8)
    )
    assert few.violations > many.violations
    assert few.gpu_hours < many.gpu_hours
    assert few.wait_p99 > many.wait_p99
    assert many.timeline.ready.tolist() == [8] * len(many.timeline.at)


def test_the_warm_up_is_not_scored(traffic: Trace) -> None:
    result, _ = ran(traffic, lambda look: 3)
    assert result.scored_requests == (traffic.arrival_s >= 300).sum()
    short = load_trace("poisson:hours=0.05", seed=1)
    with pytest.raises(ValueError, match="320 s are the warm-up"):
        ran(short, lambda look: 3, cold_start_seconds=200)
