"""Seconds of engine work: Little's law, its bounds, and figures that cannot be."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.fleet import StepCost
from autoscaler.policy.fluid import Fluid, flow_of
from autoscaler.policy.work import LEAST, MOST, Calibration, Engine, Mix, engine_of, scaled
from tests.autoscaler.policy.scene import COST, NEW, PROMPT, REQUEST_SECONDS, load

MIX = Mix(PROMPT, NEW)


def test_a_request_costs_its_prompt_and_its_rows() -> None:
    assert Engine(COST).request_seconds(MIX) == pytest.approx(REQUEST_SECONDS)
    half = replace(MIX, hit_share=0.5)
    assert Engine(COST).request_seconds(half) == pytest.approx(REQUEST_SECONDS - PROMPT / 2 * 3e-5)


def test_the_promise_on_the_step_says_how_much_a_replica_can_take() -> None:
    assert Engine(COST).most_work(MIX, 0.06) == pytest.approx(0.9)
    assert Engine(COST).most_work(MIX, 0.012) == pytest.approx(0.5)
    assert Engine(COST).most_work(MIX, 100.0) == MOST
    assert Engine(COST).most_work(MIX, 0.001) == LEAST


@pytest.mark.parametrize("engine", [Engine(COST, rows=8), Engine(COST, kv_tokens=int(8 * 1100 / 0.95))])
def test_few_rows_or_pages_bound_it(engine: Engine) -> None:
    most = engine.most_work(MIX, 0.06)
    step = COST.base / (1 - most)
    assert most / REQUEST_SECONDS * NEW * step == pytest.approx(8, rel=0.01)  # Little: rate · time = rows


@given(st.floats(0.05, 0.85), st.floats(1.0, 50.0), st.floats(0.5, 10.0))
def test_a_fluid_fleet_settles_where_littles_law_says(load_each: float, replicas: float, look: float) -> None:
    rate = load_each * replicas / REQUEST_SECONDS
    flow = flow_of(Engine(COST), MIX, rate, rate * PROMPT)
    fluid = Fluid()
    for _ in range(400):
        fluid.advance(flow, replicas, look)
    assert fluid.step == pytest.approx(COST.base / (1 - load_each), rel=0.02)
    assert fluid.rows == pytest.approx(rate * NEW * fluid.step, rel=0.02)
    assert fluid.wait == 0


def test_a_fluid_fleet_that_is_too_small_falls_behind_without_end() -> None:
    rate = 1.2 / REQUEST_SECONDS
    engine, fluid = Engine(COST, rows=256, step_tokens=4096), Fluid()
    flow = flow_of(engine, MIX, rate, rate * PROMPT)
    waits = []
    for _ in range(400):
        fluid.advance(flow, 1.0, 5.0)
        waits.append(fluid.wait)
    assert waits == sorted(waits)
    assert waits[-1] > 100


def test_figures_that_cannot_be_count_as_not_known() -> None:
    odd = [StepCost(), replace(COST, base=math.nan), replace(COST, per_decode_row=-1.0), replace(COST, base=math.inf)]
    assert engine_of([load(step_cost=cost) for cost in odd]) is None
    engine = engine_of([load(step_cost=cost) for cost in [*odd, COST]])
    assert engine is not None
    assert engine.cost == COST


def test_costs_that_are_said_wrong_are_put_right_by_the_steps_that_are_seen() -> None:
    real, said = Engine(COST), scaled(Engine(COST), 0.7)
    calibration = Calibration()
    rate, rows = 0.6 / REQUEST_SECONDS, 60.0
    step = (COST.base + rows * real.row_seconds(MIX)) / (1 - rate * real.prefill_seconds(MIX))
    for _ in range(720):
        calibration.add(said, MIX, rate * said.prefill_seconds(MIX), rows, rows * 5.0 / step, 5.0)
    assert calibration.factor == pytest.approx(1 / 0.7, rel=0.03)
    assert scaled(said, calibration.factor).cost.base == pytest.approx(COST.base, rel=0.03)


def test_steps_that_nobody_took_say_nothing() -> None:
    calibration = Calibration()
    for rows, tokens in ((0.0, 100.0), (10.0, 0.0)):
        calibration.add(Engine(COST), MIX, 0.1, rows, tokens, 5.0)
    assert calibration.factor == 1.0
