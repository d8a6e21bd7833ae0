"""Fleets that are not there: what they are late, what they cost, which is followed."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from autoscaler.policy.fluid import Fluid, flow_of
from autoscaler.policy.mirror import Mirror
from autoscaler.policy.shadows import PAID, SAFE, Look, Promise, Shadow, Shadows
from autoscaler.policy.work import Engine, Mix
from tests.autoscaler.policy.scene import COST, NEW, PROMPT, REQUEST_SECONDS

PROMISE = Promise(wait=2.0, step=0.06, late_share=0.01)
LOOSER = Promise(wait=2.0, step=0.06, late_share=0.02)  # experience counts sooner
ENGINE, MIX = Engine(COST, rows=256, step_tokens=4096), Mix(PROMPT, NEW)
STEP = 5.0


def look(at: float, work: float, *, efficiency: float = 1.0, ready: int = 1000, late: int = 0, slow: int = 0) -> Look:
    """One forecast, which is what there is. The real fleet is so large that it tells nothing of smaller ones."""
    rate = work / REQUEST_SECONDS
    return Look(
        at=at,
        seconds=STEP,
        flow=flow_of(ENGINE, MIX, rate, rate * PROMPT),
        mean=work,
        demands=[work],
        most_work=0.9,
        horizon=120.0,
        efficiency=efficiency,
        ready=ready,
        real=ready,
        late=late,
        slow=slow,
        lowest=1,
        highest=100,
    )


def test_a_fluid_that_meets_the_promise_with_room_is_late_for_nobody() -> None:
    fluid = Fluid()
    fluid.step = 0.02
    assert PROMISE.late(fluid) == 0
    fluid.step = 0.06
    assert PROMISE.late(fluid) == pytest.approx(0.5)
    fluid.wait = 60.0
    assert PROMISE.late(fluid) == pytest.approx(1.0)


def test_a_shadow_gets_what_it_asked_for_one_cold_start_later_and_pays_at_once() -> None:
    shadow = Shadow(0, 1.0)
    shadow.start(look(0.0, 1.8), 2)
    assert shadow.ordered == 2
    late = []
    for number in range(1, 241):
        shadow.advance(look(STEP * number, 4.0), PROMISE, 1.0, math.exp(-STEP / PAID))
        late.append(shadow.late(0.0))
    assert shadow.ordered == 5
    # What it asks for is paid from the next look on; what was paid is forgotten
    assert shadow.cost == pytest.approx(5 * PAID * (1 - math.exp(-1200 / PAID)), rel=0.01)
    assert late[24] > 60 * 4.0 / REQUEST_SECONDS  # of the first two minutes most
    assert late[-1] - late[-60] < 10  # and hardly anybody when they are there and have caught up


def followed(
    work: Callable[[float], float], hours: float, found: int, promise: Promise = PROMISE
) -> list[tuple[int, Shadow]]:
    shadows = Shadows(["level"], 100)
    out = []
    for number in range(int(hours * 3600 / STEP)):
        at = STEP * number
        shadow = shadows.advance(look(at, work(at)), promise, found)
        out.append((shadow.ordered, shadow))
    return out


def test_the_fleet_that_was_found_is_followed_until_another_did_as_well_for_less() -> None:
    steady = followed(lambda at: 3.0, 9.0, found=8, promise=LOOSER)
    assert steady[0][0] == 8
    assert steady[-1][0] == 4
    counts = [count for count, _ in steady]
    assert counts == sorted(counts, reverse=True)


def test_what_a_surprise_costs_says_how_long_the_fleet_that_was_found_is_trusted() -> None:
    def calm(late_share: float) -> int:
        fleets = followed(lambda at: 3.0, 1.2, 12, Promise(2.0, 0.06, late_share))
        return next(number for number, (count, _) in enumerate(fleets) if count < 12)

    assert calm(0.06) == pytest.approx(calm(0.03) / 2, rel=0.1)  # twice as many may be late: half as long


def test_load_that_jumps_time_and_again_is_met_by_a_fleet_that_stays() -> None:
    counts = [count for count, _ in followed(lambda at: 3.0 if at % 1800 < 900 else 7.5, 5.0, found=10)]
    assert min(counts) >= 9
    assert max(counts) <= 11


def test_load_that_goes_up_and_down_slowly_is_followed() -> None:
    wave = followed(lambda at: 6 - 4 * math.cos(2 * math.pi * at / 14400), 12.0, 12, LOOSER)
    last = [count for count, _ in wave[-2880:]]
    assert min(last) <= 5
    assert max(last) >= 11
    assert sum(last) / len(last) < 9.5


def shares(real: int, late: float, work: float = 3.7) -> dict[int, float]:
    """Of constant fleets, after an hour in which this share was late of a fleet of `real`. The fluid thinks that most
    are late with 4, none with 8."""
    shadows = Shadows(["level"], 10)
    arrived, owed = work / REQUEST_SECONDS * STEP, 0.0
    for number in range(720):
        owed += late * arrived
        count = int(owed)
        owed -= count
        shadows.advance(look(STEP * number, work, ready=real, late=count), PROMISE, 10)
    fleets = {each.constant: each for each in shadows._all if each.constant}
    return {count: each.late(shadows._real) / (arrived * 720) for count, each in fleets.items()}


def test_what_real_requests_met_counts_for_fleets_of_that_size_and_bounds_the_others() -> None:
    foreseen = shares(1000, 0.0)
    assert foreseen[4] > 0.5
    assert foreseen[8] == 0
    well = shares(4, 0.0)
    assert max(well[4], well[5], well[8]) == 0
    assert well[3] == foreseen[3]
    badly = shares(6, 0.1)
    assert badly[6] == pytest.approx(0.1, rel=0.05)
    assert badly[8] == 0
    assert badly[5] >= badly[6]


def test_a_fleet_that_cannot_bear_the_load_vouches_for_none() -> None:
    few = Shadows(["level"], 20).advance(look(0.0, 5.0), PROMISE, 1)
    assert few.constant == 9
    enough = Shadows(["level"], 20).advance(look(0.0, 5.0), PROMISE, 6)
    assert enough.constant == 6


def test_a_floor_leaves_less_to_be_late() -> None:
    shadows = Shadows(["level"], 10)
    shadow = shadows.advance(look(0.0, 3.0), PROMISE, 8)
    assert shadows.late_share(shadow, PROMISE.late_share * SAFE, 120.0) <= PROMISE.late_share * SAFE


def test_more_late_requests_than_the_fluid_knows_of_make_a_replica_worth_less() -> None:
    mirror = Mirror()
    for number in range(1440):
        work = 3.0 if number % 120 < 60 else 4.0
        arrived = work / REQUEST_SECONDS * STEP
        slow = int(0.05 * arrived) if work > 3 else 0
        mirror.advance(look(STEP * number, work, ready=6, slow=slow), PROMISE)
    assert mirror.efficiency < 0.9
    assert mirror.floor < 0.001


def test_what_is_late_with_little_to_do_is_no_want_of_replicas() -> None:
    mirror = Mirror()
    for number in range(4 * 1440):
        work = 2.0 if number % 120 < 60 else 3.0
        slow = round(0.003 * work / REQUEST_SECONDS * STEP)
        mirror.advance(look(STEP * number, work, ready=6, slow=slow), PROMISE)
    assert mirror.floor == pytest.approx(0.003, abs=0.001)
    assert mirror.efficiency > 0.7
