"""What may wait, and what a tenant may use up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from service.admission import QueueLimits
from service.admission.limits import Allowance
from service.admission.pace import FEW, Pace
from service.admission.room import look_ahead
from tests.service.fake_engine import INFO


def test_what_is_not_said_follows_from_the_batch_and_the_context() -> None:
    assert QueueLimits().bounds(replace(INFO, max_batch_size=32)) == (256, 256 * 2048)
    assert QueueLimits(max_requests=3).bounds(INFO) == (3, 3 * 2048)
    assert QueueLimits(max_requests=0).bounds(replace(INFO, max_model_len=5000)) == (0, 5000)
    assert QueueLimits(max_requests=7, max_tokens=9).bounds(INFO) == (7, 9)


@pytest.mark.parametrize(("rows", "ahead"), [(1, 1), (8, 1), (32, 4), (256, 32)])
def test_the_engine_gets_an_eighth_of_its_rows_ahead(rows: int, ahead: int) -> None:
    assert look_ahead(rows) == ahead


@given(
    per_minute=st.integers(1, 10**6),
    costs=st.lists(st.integers(1, 10**5), min_size=1, max_size=50),
)
def test_who_waits_as_told_gets_the_average_and_one_burst_and_one_request(per_minute: int, costs: list[int]) -> None:
    now, used = 0.0, 0
    allowance = Allowance(per_minute, now)
    for cost in costs:
        now += allowance.seconds_to_wait(now)
        assert allowance.seconds_to_wait(now) == pytest.approx(0, abs=1e-6)
        allowance.use(cost, now)
        used += cost
        assert used <= per_minute * (1 + now / 60) * (1 + 1e-9) + max(costs)


def test_what_a_request_did_not_need_comes_back_up_to_a_minutes_worth() -> None:
    allowance = Allowance(60, 0.0)
    allowance.use(80, 0.0)
    assert allowance.seconds_to_wait(0.0) == pytest.approx(21)
    allowance.use(-30, 0.0)
    assert allowance.seconds_to_wait(0.0) == 0
    allowance.use(-1000, 0.0)
    allowance.use(60, 0.0)
    assert allowance.seconds_to_wait(0.0) == pytest.approx(1)


def test_a_changed_rate_holds_from_then_on() -> None:
    allowance = Allowance(600, 0.0)
    allowance.set_rate(60, 0.0)
    allowance.use(61, 0.0)
    assert allowance.seconds_to_wait(0.0) == pytest.approx(2)
    assert allowance.seconds_to_wait(1.5) == pytest.approx(0.5)


def test_the_pace_is_measured_only_while_somebody_waits_and_not_before_there_is_something_to_tell() -> None:
    pace = Pace()
    pace.moved(5.0)
    assert pace.seconds is None
    now = 100.0
    for _ in range(FEW):
        pace.waiting(now)
        assert pace.seconds is None
        now += 2
        pace.moved(now)
    assert pace.seconds == pytest.approx(2)
    pace.pause()
    pace.waiting(now + 1000)
    pace.moved(now + 1002)
    assert pace.seconds == pytest.approx(2)
