from __future__ import annotations

from autoscaler.fleet import Phase, Replica
from autoscaler.policy.coldstart import UNKNOWN, ColdStart


def came(number: int, seconds: float) -> Replica:
    return Replica(f"came-{number}", Phase.READY, 100.0, ready_at=100.0 + seconds)


def test_nothing_is_known_before_one_came() -> None:
    assert ColdStart().horizon(0.0, ()) == UNKNOWN


def test_nine_of_ten_are_faster_than_what_is_learnt() -> None:
    cold = ColdStart()
    cold.observe(1000, tuple(came(number, 30.0 + number) for number in range(20)))
    assert cold.seconds == 48.0
    assert cold.horizon(1000, ()) == 48.0


def test_each_counts_once_and_old_ones_are_forgotten() -> None:
    cold = ColdStart()
    for _ in range(100):
        cold.observe(1000, (came(0, 300.0), came(1, 40.0)))
    assert cold.seconds == 300.0
    for number in range(2, 40):
        cold.observe(1000 + number, (came(number, 40.0),))
    assert cold.seconds == 40.0


def test_one_that_takes_longer_says_that_they_do() -> None:
    cold = ColdStart()
    cold.observe(1000, (came(0, 40.0),))
    late = Replica("late", Phase.STARTING, 100.0)
    assert cold.horizon(300.0, (late,)) == 200.0
    assert cold.remaining(300.0, late) == 20.0


def test_time_without_a_node_is_none_of_a_cold_start() -> None:
    cold = ColdStart()
    cold.observe(1000, (Replica("a", Phase.PENDING, 100.0, unschedulable_since=100.0),))
    cold.observe(740, (Replica("a", Phase.READY, 100.0, ready_at=740.0),))
    assert cold.seconds == 40.0


def test_a_replica_knows_best_itself() -> None:
    assert ColdStart().remaining(50.0, Replica("a", Phase.LOADING, 0.0, eta_seconds=7.0)) == 7.0


def test_the_age_of_a_replica_that_loads_anew_tells_nothing_of_this_start() -> None:
    cold = ColdStart()
    cold.observe(1000, (came(0, 40.0),))
    assert cold.remaining(90_000.0, Replica("a", Phase.LOADING, 0.0, ready_at=40.0)) == 40.0
