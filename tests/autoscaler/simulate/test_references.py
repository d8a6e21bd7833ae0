"""What policies are measured against: static provisioning, the clairvoyant, and the fluid amount of work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoscaler.simulate import ARITHMETIC, Slo, Trace, WorldOptions, load_trace, read_curve, trace
from autoscaler.simulate.oracle import SLOT_SECONDS, Plan, Search, schedule
from autoscaler.simulate.provision import fluid_gpu_hours, run_static, smallest_static

# Slow enough that few requests make a fleet: 1.06 s of work each, 1000 tokens in and 100 out
CURVE = replace(read_curve(ARITHMETIC), name="slow", max_batch_size=32)
CURVE = replace(CURVE, step_cost=replace(CURVE.step_cost, per_prefill_token=1e-3, per_decode_row=5e-4))
SLO = Slo(ttft_seconds=6.0, itl_seconds=0.2)
OPTIONS = WorldOptions(initial_replicas=1, max_replicas=64, cold_start_seconds=60.0, warmup_seconds=120.0)


def wave() -> Trace:
    return load_trace("ramps:rate=0.8,factor=6,every=450,hours=0.3,input=1000,output=100,spread=0.3", seed=3)


def test_fluid_hours_are_work_by_the_utilization_that_the_promise_allows() -> None:
    arrival = np.arange(0.0, 1200.0, 1.0)
    every = trace("even", arrival, np.full(1200, 1000), np.full(1200, 100))
    work = CURVE.work_seconds(1000, 0, 100)
    scored = 1200 - 120
    expected = scored * work / (1 - 0.006 / 0.2) / 3600
    assert fluid_gpu_hours(every, CURVE, SLO, OPTIONS) == pytest.approx(expected)
    # One replica at least, even if there is hardly any work
    idle = trace("idle", np.array([0.0, 3720.0]), np.full(2, 10), np.full(2, 10))
    assert fluid_gpu_hours(idle, CURVE, SLO, OPTIONS) == pytest.approx(1.0)


def test_static_is_the_fewest_replicas_that_keep_the_promise() -> None:
    replicas, result = smallest_static(wave(), CURVE, SLO, OPTIONS, seed=1)
    assert result.violations <= 0.01
    assert run_static(wave(), replicas, CURVE, SLO, OPTIONS, 1).violations == result.violations
    assert run_static(wave(), replicas - 1, CURVE, SLO, OPTIONS, 1).violations > 0.01
    assert result.gpu_hours == pytest.approx(replicas * (wave().duration_s - 120) / 3600)


def test_a_promise_that_no_fleet_keeps_is_refused_with_its_numbers() -> None:
    with pytest.raises(ValueError, match=r"% of prompts take more than 0\.5 s of slow"):
        smallest_static(wave(), CURVE, Slo(ttft_seconds=0.5, itl_seconds=0.2), OPTIONS, seed=1)


def test_a_schedule_asks_for_replicas_a_cold_start_before_they_are_needed() -> None:
    # 1 request per second, then 4 from 600 s on, then 1 again from 900 s on; a second of work each
    gaps = np.concatenate([np.full(600, 1.0), np.full(1200, 0.25), np.full(600, 1.0)])
    steps = trace("steps", np.cumsum(gaps), np.full(2400, 1000), np.full(2400, 1))
    options = replace(OPTIONS, cold_start_sigma=0.0)
    plan = Plan(window=10.0, cap=10, work_rate=1.2, factors=np.ones(1))
    asked = schedule(plan, steps, CURVE, options).asked
    work = 4 * float(CURVE.work_seconds(1000, 0, 1)) / 1.2
    most = int(np.ceil(work))
    grows, shrinks = (int(np.flatnonzero(asked == most)[place]) * SLOT_SECONDS for place in (0, -1))
    assert asked.max() == most
    assert 600 - 60 - 3 * SLOT_SECONDS <= grows <= 600 - 60
    assert 900 - 2 * SLOT_SECONDS <= shrinks <= 900
    assert schedule(replace(plan, cap=2), steps, CURVE, options).asked.max() == 2
    assert schedule(replace(plan, work_rate=1e9), steps, CURVE, options).asked.min() == 1


def test_the_clairvoyant_keeps_the_promise_for_less_than_static() -> None:
    options = replace(OPTIONS, max_replicas=16)
    static = smallest_static(wave(), CURVE, SLO, options, 1)
    found = Search(wave(), CURVE, SLO, options, 1, static).run()
    assert found.result.violations <= 0.01
    assert fluid_gpu_hours(wave(), CURVE, SLO, options) < found.result.gpu_hours < 0.9 * static[1].gpu_hours
    assert found.plan is not None
    # From a plan that is good it needs fewer tries, and does not end up far from it.
    search = Search(wave(), CURVE, SLO, options, 1, static)
    assert search.run(found.plan).result.gpu_hours <= 1.05 * found.result.gpu_hours
    assert search.tries < 10


def test_the_clairvoyant_is_static_where_nothing_can_be_saved() -> None:
    flat = load_trace("poisson:rate=0.5,hours=0.2,input=1000,output=100", seed=1)
    static = smallest_static(flat, CURVE, SLO, OPTIONS, 1)
    one = replace(static[1], gpu_hours=0.0)  # as if it were free
    found = Search(flat, CURVE, SLO, OPTIONS, 1, (static[0], one)).run()
    assert found.plan is None
    assert found.result is one
