"""What an owner allows: by the clock, by window, by rate."""

from __future__ import annotations

from datetime import datetime

import pytest

from autoscaler.decision import Limit
from autoscaler.policy.limits import Limits
from autoscaler.settings import Behavior, Direction, Schedule, Settings


def limits(out: Direction | None = None, into: Direction | None = None, **changes: object) -> Limits:
    behavior = Behavior(scale_out=out or Direction(0.0), scale_in=into)
    return Limits(Settings(max_replicas=100, behavior=behavior, **changes))  # type: ignore[arg-type]


def time(text: str) -> float:
    return datetime.fromisoformat(text + "+00:00").timestamp()


def test_a_schedule_raises_the_least_from_its_time_on_for_as_long_as_it_says() -> None:
    here = limits(schedules=(Schedule("0 8 * * mon-fri", 3600.0, 5), Schedule("30 8 * * *", 600.0, 8)))
    seen = {text: here.bounds(time(f"2026-11-26T{text}"))[0] for text in ("07:59:50", "08:00:00", "08:29", "08:30:05")}
    assert seen == {"07:59:50": 1, "08:00:00": 5, "08:29": 5, "08:30:05": 8}
    assert [here.bounds(time(f"2026-11-26T{text}"))[0] for text in ("08:39:59", "08:40", "08:59:59", "09:00")] == [
        8,
        5,
        5,
        1,
    ]


def test_a_schedule_that_began_before_we_looked_holds() -> None:
    here = limits(schedules=(Schedule("0 8 * * *", 4 * 3600.0, 5),))
    assert here.bounds(time("2026-11-26T11:59"))[0] == 5


def test_a_schedule_never_asks_for_more_than_the_most() -> None:
    here = limits(schedules=(Schedule("* * * * *", 60.0, 500),))
    assert here.bounds(1000.0) == (100, 100)


@pytest.mark.parametrize(
    "settings",
    [
        Settings(min_replicas=3, max_replicas=2),
        Settings(min_replicas=0, max_replicas=0),
        Settings(schedules=(Schedule("* * *", 60.0, 1),)),
        Settings(schedules=(Schedule("* * * * *", 0.0, 1),)),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"replicas|cron|schedule"):
        Limits(settings)


def test_out_needs_to_be_needed_all_along_its_window() -> None:
    here = limits(out=Direction(30.0))
    assert here.apply(0, 2, 2)[0] == 2
    assert here.apply(5, 2, 6) == (2, Limit.RATE)
    assert here.apply(20, 2, 5) == (2, Limit.RATE)
    assert here.apply(35.1, 2, 7) == (5, Limit.RATE)
    assert here.apply(51, 5, 7) == (7, None)


def test_out_by_so_many_in_a_period() -> None:
    here = limits(out=Direction(0.0, max_step=3, period_seconds=60.0))
    assert here.apply(0, 1, 20) == (4, Limit.RATE)
    assert here.apply(30, 4, 20) == (4, Limit.RATE)
    assert here.apply(60, 4, 20) == (7, Limit.RATE)


def test_in_waits_for_the_most_of_its_window() -> None:
    here = limits(into=Direction(60.0))
    here.apply(0, 9, 9)
    assert here.apply(50, 9, 3) == (9, Limit.STABILIZING)
    assert here.apply(61, 9, 4)[0] == 4
    here.apply(70, 4, 7)
    assert here.apply(100, 7, 2) == (7, Limit.STABILIZING)


def test_in_without_a_window_of_its_own_waits_for_nothing_but_a_choice_by_hand() -> None:
    here = limits()
    here.apply(0, 9, 9)
    assert here.apply(5, 9, 3) == (3, None)
    here.restart(10, 9, 300)
    assert here.apply(300, 9, 3) == (9, Limit.STABILIZING)
    assert here.apply(311, 9, 3) == (3, None)


def test_in_by_so_many_in_a_period() -> None:
    here = limits(into=Direction(0.0, max_step=1, period_seconds=30.0))
    here.apply(0, 9, 9)
    assert here.apply(5, 9, 3)[0] == 8
    assert here.apply(10, 8, 3) == (8, Limit.RATE)
    assert here.apply(35, 8, 3)[0] == 7


def test_what_was_set_by_hand_lives_for_a_window() -> None:
    here = limits(into=Direction(60.0))
    here.apply(0, 2, 2)
    here.apply(100, 2, 2)
    here.restart(105, 8, 300)
    assert here.apply(105, 8, 2)[0] == 8
    assert here.apply(160, 8, 2)[0] == 8
    assert here.apply(166, 8, 2)[0] == 2
