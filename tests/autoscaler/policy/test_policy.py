"""The whole policy in a small world: what holds whatever happens, and what it does in the cases that have names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import Phase as Stage
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.decision import Decision, Limit
from autoscaler.fleet import Counters, Observation, Phase, Replica, StepCost
from autoscaler.policy import QueuePolicy
from autoscaler.settings import Behavior, Direction, ScaleToZero, Schedule, Settings, Target
from tests.autoscaler.policy.scene import COST, PROMPT, REQUEST_SECONDS, World, ready
from tests.autoscaler.policy.scene import load as idle

WIDE = Settings(min_replicas=1, max_replicas=100)
TEN = 9.0 / REQUEST_SECONDS  # requests a second that take ten replicas
NO_SHRINKING = (Stage.explicit, Stage.reuse, Stage.generate)  # a smaller hour of a world takes as long


def policy(**changes: object) -> QueuePolicy:
    return QueuePolicy(replace(WIDE, **changes))  # type: ignore[arg-type]


# -- whatever happens ------------------------------------------------------------------------------------------------

counts = st.integers(0, 10**7)
loads = st.builds(
    lambda queued, running, cost, numbers, pages: (queued, running, cost, numbers, pages),
    st.integers(0, 10**6),
    st.integers(0, 256),
    st.sampled_from(
        [COST, StepCost(), StepCost(base=math.nan), StepCost(0.0, 0.0, 1e-5, 0.0), StepCost(1.0, 1.0, 1.0, 1.0)]
    ),
    st.builds(Counters, *[counts] * 9),
    st.integers(0, 20_000),
)
replicas = st.builds(
    lambda name, phase, age, old, load, stuck: (f"replica-{name}", phase, age, old, load, stuck),
    st.integers(0, 5),
    st.sampled_from(list(Phase)),
    st.floats(0, 1000),
    st.sampled_from([0.0, 0.0, 3.0, 100.0]),
    st.none() | loads,
    st.booleans(),
)
looks = st.lists(
    st.tuples(st.integers(0, 40), st.lists(replicas, max_size=6), st.integers(0, 3)), min_size=1, max_size=25
)


def seen(at: float, look: Any) -> Observation:
    desired, members, held = look
    made = {}
    for name, phase, age, old, told, stuck in members:
        load = None
        if told is not None:
            queued, running, cost, numbers, pages = told
            load = idle(
                queued_tokens=queued,
                queued_requests=queued // 100,
                oldest_queued_seconds=queued / 1e4,
                running_requests=running,
                step_cost=cost,
                counters=numbers,
                kv_pages_used=pages,
            )
        made[name] = Replica(
            name,
            phase,
            at - age,
            load,
            at - old,
            ready_at=at - age / 2 if phase is Phase.READY else None,
            unschedulable_since=at - age if stuck and phase is Phase.PENDING else None,
        )
    return Observation(at, desired, tuple(made.values()), held, float(held))


@settings(max_examples=40, deadline=None)
@given(looks, st.booleans(), st.booleans(), st.none() | st.integers(1, 5000))
def test_never_outside_the_bounds_and_always_the_same(
    sights: list[Any], zero: bool, timed: bool, tokens: int | None
) -> None:
    own = Settings(
        min_replicas=0 if zero else 2,
        max_replicas=30,
        target=Target(queued_tokens_per_replica=tokens),
        behavior=Behavior(Direction(10.0, 4, 30.0), Direction(20.0, 2, 30.0)),
        scale_to_zero=ScaleToZero(zero, 30.0),
        schedules=(Schedule("*/2 * * * *", 60.0, 7),) if timed else (),
    )
    one, other = QueuePolicy(own), QueuePolicy(own)
    for number, sight in enumerate(sights):
        observation = seen(1_000_020.0 + 5.0 * number, sight)
        decision = one.decide(observation)
        assert decision == other.decide(observation)
        floor = 7 if timed and observation.at % 120 < 60 else own.min_replicas
        paused = observation.desired == 0 and not zero
        assert floor <= decision.desired <= 30 or (paused and decision.desired == 0)
        assert decision.reason
        assert all(math.isfinite(value) for value in decision.figures.values())


@settings(max_examples=4, deadline=None, phases=NO_SHRINKING)
@given(st.floats(0.3, 12.0), st.sampled_from([30.0, 90.0]), st.integers(1, 20))
def test_constant_load_leads_to_a_constant_count_that_serves_it(work: float, cold: float, begin: int) -> None:
    world = World(policy(), lambda at: work / REQUEST_SECONDS, cold=cold, replicas=begin)
    asked = [decision.desired for decision in world.run(1.5 * 3600)]
    changes = [after - before for before, after in pairwise(asked[180:]) if after != before]
    turns = sum((before < 0) != (after < 0) for before, after in pairwise(changes))
    assert turns <= 3  # it learns how little is enough, and may have to take back a step
    assert sum(max(change, 0) for change in changes) <= 4
    # One that found too few takes half as many again as it seemed to need in its first minute, and keeps them for hours
    assert work / 0.9 <= asked[-1] <= max(begin, 2.3 * work / 0.9 + 2)


def after(world: World, change: Mapping[str, object], which: int) -> Decision:
    """What it says to what is there now, with a change of one replica."""
    look = world.look()
    members = list(look.replicas)
    changed = replace(members[which].load, **change)  # type: ignore[type-var]
    members[which] = replace(members[which], load=changed)
    return world.policy.decide(replace(look, replicas=tuple(members)))


@settings(max_examples=8, deadline=None, phases=NO_SHRINKING)
@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=2),
    st.sampled_from([60.0, 600.0, 1200.0]),
    st.sampled_from([0.0, 3.0]),
)
def test_more_in_the_queue_never_means_fewer(tokens: list[int], ran: float, waits: float) -> None:
    answers = []
    for queued in sorted(tokens):
        world = World(policy(), lambda at: TEN * (0.5 + 0.5 * math.sin(at / 300)), replicas=3)
        world.run(ran)
        change = {"queued_tokens": queued, "queued_requests": 10, "oldest_queued_seconds": waits}
        answers.append(after(world, change, 0).desired)
    assert answers == sorted(answers)


@settings(max_examples=6, deadline=None, phases=NO_SHRINKING)
@given(st.sets(st.integers(0, 11), max_size=12), st.integers(100, 240))
def test_samples_that_are_missing_never_scale_in(dropped: set[int], begin: int) -> None:
    silent_from = 1_000_000.0 + 5 * begin
    names = {f"replica-{number}" for number in dropped}
    world = World(policy(), lambda at: TEN, replicas=12)
    world.run(5.0 * begin)
    world.silent = lambda at, name: at >= silent_from and name in names
    before = world.desired
    assert all(decision.desired >= before for decision in world.run(600))


# -- cases that have names --------------------------------------------------------------------------------------------


def test_a_queue_that_waits_for_replicas_asks_for_no_more() -> None:
    world = World(policy(), lambda at: TEN, cold=120.0, replicas=2)
    asked = [decision.desired for decision in world.run(600)]
    assert max(asked) <= 25  # ten for what comes, the rest for what waited until they were there
    assert asked[12] >= 8  # within a minute, while none of them has come


def test_a_queue_says_nothing_of_what_steps_cost() -> None:
    world = World(policy(), lambda at: TEN, cold=120.0, replicas=1)
    ratios = [decision.figures.get("step_cost_ratio", 1.0) for decision in world.run(600)]
    assert min(ratios) > 0.9  # prompts that wait take no time yet
    assert max(ratios) < 1.1  # and those that are worked off do


def test_load_that_grows_is_met_before_it_is_there() -> None:
    world = World(policy(), lambda at: TEN * min(1.0, max(0.1, (at - 1_000_600) / 3000)), cold=120.0, replicas=3)
    world.run(3900)
    late = [server for server in world.servers.values() if (server.requests - server.done) / world.can > 2]
    assert not late


def test_all_samples_missing_hold_what_there_is() -> None:
    world = World(policy(), lambda at: TEN, replicas=12)
    world.run(600)
    world.silent = lambda at, name: True
    held = world.desired
    world.run(20)
    decisions = world.run(1800)
    assert {decision.desired for decision in decisions} == {held}
    assert decisions[-1].limit is Limit.BLIND
    assert "holding" in decisions[-1].reason


def test_pods_without_a_node_stop_growth_and_say_so() -> None:
    world = World(policy(target=Target(late_share=0.02)), lambda at: TEN, replicas=4, nodes=7)
    world.run(600)
    stuck = world.decisions[-1]
    assert stuck.limit is Limit.NO_NODES
    assert "no node for" in stuck.reason
    asked = world.desired
    assert {decision.desired for decision in world.run(300)} == {asked}
    world.rate = lambda at: TEN / 10
    world.run(2 * 3600)
    assert world.desired < asked  # and it can still shrink


def test_a_restart_keeps_what_is_there_until_it_has_a_history() -> None:
    world = World(policy(behavior=Behavior(scale_in=Direction(300.0))), lambda at: TEN / 5, replicas=20)
    assert {decision.desired for decision in world.run(300)} == {20}


def test_without_step_costs_slots_decide() -> None:
    world = World(policy(), lambda at: 100.0, replicas=2, cost=StepCost(), can=200.0)
    decision = world.run(120)[-1]
    assert "step costs unknown" in decision.reason
    assert decision.desired == math.ceil(2 * int(100.0 / 2 * 6) / (0.7 * 256))


def test_the_plain_rule_of_queued_tokens() -> None:
    plain = policy(target=Target(queued_tokens_per_replica=1000))
    members = (ready("a", queued_tokens=4500, running_requests=204), ready("b", running_requests=0))
    decision = plain.decide(Observation(0.0, 2, members))
    assert decision.desired == 6  # 4500 / 1000 and 204 / (0.8 · 256)


def test_pages_of_kv_ask_for_replicas() -> None:
    members = (ready("a", kv_pages_used=19_900), ready("b", kv_pages_used=19_000))
    decision = policy().decide(Observation(0.0, 2, members))
    assert decision.desired == 3
    assert "KV pages" in decision.reason


def test_by_hand_is_where_it_goes_on_from_and_lives_for_a_window() -> None:
    world = World(policy(behavior=Behavior(scale_in=Direction(300.0))), lambda at: TEN / 5, replicas=4)
    world.run(1800)
    world.scale(15)
    assert {decision.desired for decision in world.run(295)} == {15}
    world.run(60)
    assert world.desired < 15


def test_zero_by_hand_is_a_pause() -> None:
    decision = policy().decide(Observation(0.0, 0))
    assert decision.desired == 0
    assert "paused" in decision.reason


def test_nothing_to_do_leads_to_zero_and_a_request_to_one_at_once() -> None:
    own = policy(min_replicas=0, scale_to_zero=ScaleToZero(True, 300.0))
    world = World(own, lambda at: 1.0 if at < 1_000_600 else 0.0, replicas=1)
    assert all(decision.desired >= 1 for decision in world.run(880))
    world.run(60)
    assert world.desired == 0
    assert own.decide(world.look()).desired == 0
    held = replace(world.look(), held_requests=1, oldest_held_seconds=0.1)
    assert own.decide(held).desired == 1


def test_requests_that_reach_the_last_replica_while_it_drains_keep_it() -> None:
    """The activator passes them on to it, so that none is held."""
    own = policy(min_replicas=0, scale_to_zero=ScaleToZero(True, 300.0))
    world = World(own, lambda at: 1.0 if at < 1_000_600 else 0.0, replicas=1)
    world.run(880)
    world.run(60)
    assert world.desired == 0
    at, counted = world.at, Counters(arrived_requests=1_000, arrived_prompt_tokens=1_000 * PROMPT)

    def look(seconds: float, arrived: int, running: int) -> Observation:
        counters = replace(
            counted,
            arrived_requests=counted.arrived_requests + arrived,
            arrived_prompt_tokens=counted.arrived_prompt_tokens + arrived * PROMPT,
        )
        draining = replace(ready("last", at, counters=counters, running_requests=running), phase=Phase.DRAINING)
        return Observation(at + seconds, 0, (replace(draining, observed_at=at + seconds),))

    assert own.decide(look(0, 0, 1)).desired == 0
    assert own.decide(look(5, 0, 1)).desired == 0  # what it still finishes asks for none
    assert own.decide(look(10, 3, 3)).desired == 1


def test_a_schedule_keeps_from_zero() -> None:
    timed = (Schedule("* * * * *", 120.0, 2),)
    own = policy(min_replicas=0, scale_to_zero=ScaleToZero(True, 60.0), schedules=timed)
    world = World(own, lambda at: 0.0, replicas=2)
    world.run(600)
    assert world.desired == 2


def test_reasons_have_numbers() -> None:
    world = World(policy(), lambda at: TEN, replicas=9)
    world.run(30)
    reason = world.decisions[-1].reason
    for word in ("work", "s/s", "headroom", "→", "ready", "loading"):
        assert word in reason, reason
    told = {"demand_work_ratio", "headroom_ratio", "horizon_seconds", "cold_start_seconds", "replica_work_ratio"}
    assert told <= set(world.decisions[-1].figures)


@pytest.mark.parametrize("count", [10, 1000])
def test_a_look_at_many_replicas_decides(count: int) -> None:
    members = tuple(ready(f"replica-{number}", running_requests=10) for number in range(count))
    assert policy(max_replicas=2000).decide(Observation(0.0, count, members)).desired == count
