"""One run: a trace, a policy, a cluster, a seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from autoscaler.decision import Policy
from autoscaler.simulate.curve import Curve
from autoscaler.simulate.options import Slo, WorldOptions
from autoscaler.simulate.result import Result, Timeline, after_jumps, demand, gpu_hours, percentile, violations
from autoscaler.simulate.traces import Trace
from autoscaler.simulate.world import World

DEMAND_SECONDS = 60.0  # that the demand of the timeline is the mean of


def simulate(
    trace: Trace,
    policy: Policy,
    curve: Curve,
    slo: Slo | None = None,
    options: WorldOptions | None = None,
    seed: int = 0,
    name: str = "",
) -> Result:
    """Replay a trace against a policy, which must be a new one: it learns from what it sees.

    Args:
        seed: of cold starts, failures and dispatch; the same inputs give the same result.
        name: of the policy in the result; its type's where empty.

    Raises:
        ValueError: the trace ends within the warm-up, or has a request that no replica can hold.
    """
    slo, options = slo or Slo(), options or WorldOptions()
    if trace.duration_s <= options.warmup:
        raise ValueError(f"{trace.name}: lasts {trace.duration_s:.0f} s, and {options.warmup:.0f} s are the warm-up")
    world = World(trace, policy, curve, slo, options, seed)
    world.run()
    return score(world, trace, curve, slo, options, seed, name or type(policy).__name__)


def score(world: World, trace: Trace, curve: Curve, slo: Slo, options: WorldOptions, seed: int, name: str) -> Result:
    requests = world.engines.requests
    kinds = violations(requests, slo)
    bad = np.logical_or.reduce(kinds)
    scored = slice(int(np.searchsorted(trace.arrival_s, options.warmup)), None)
    horizon = options.cold_start_seconds + options.node_delay_seconds
    unscalable = bad & after_jumps(trace, curve, slo, horizon)
    late, slow, lost, unfinished = (float(kind[scored].mean()) for kind in kinds)
    waits, firsts, gaps = latencies(requests[scored])
    lives = world.lives
    return Result(
        policy=name,
        trace=trace.name,
        curve=curve.name,
        seed=seed,
        slo=slo,
        options=options,
        scored_requests=len(bad[scored]),
        violations=float(bad[scored].mean()),
        late_first_token=late,
        slow_tokens=slow,
        lost=lost,
        unfinished=unfinished,
        unscalable=float(unscalable[scored].mean()),
        wait_p50=percentile(waits, 50),
        wait_p99=percentile(waits, 99),
        ttft_p50=percentile(firsts, 50),
        ttft_p99=percentile(firsts, 99),
        itl_p99=percentile(gaps, 99),
        gpu_hours=gpu_hours(lives, options.warmup, trace.duration_s),
        scale_outs=world.scale_outs,
        scale_ins=world.scale_ins,
        max_ready=world.max_ready,
        crashes=world.crashes,
        failed_starts=world.failed_starts,
        preemptions=world.engines.preemptions,
        timeline=timeline(world, trace, curve, slo, bad),
        lives=lives,
        requests=requests,
    )


def latencies(requests: Any) -> tuple[Any, Any, Any]:
    """Waits until the prompt was computed, waits until the first token, mean times between tokens; of those that had
    them."""
    columns = (requests[name] for name in ("arrival", "started", "first_token", "finished"))
    arrival, started, first, finished = (np.ascontiguousarray(column) for column in columns)
    several = requests["output"] > 1
    with np.errstate(invalid="ignore"):  # the difference of two that never came
        gaps = (finished - first) / np.maximum(requests["output"] - 1, 1)
    waits, firsts = started - arrival, first - arrival
    return waits[np.isfinite(waits)], firsts[np.isfinite(firsts)], gaps[several & np.isfinite(gaps)]


def timeline(world: World, trace: Trace, curve: Curve, slo: Slo, bad: np.ndarray) -> Timeline:
    looks = world.looks
    at = np.array([look.at for look in looks], np.float64)
    names = "desired", "ready", "billed", "queued", "running"
    columns = {name: np.array([getattr(look, name) for look in looks], np.int64) for name in names}
    until = np.searchsorted(trace.arrival_s, at)
    counted = np.concatenate([[0], np.cumsum(bad)])[until]
    shares = np.diff(counted, prepend=0) / np.maximum(np.diff(until, prepend=0), 1)
    brought = demand(trace, curve, slo, at, DEMAND_SECONDS)
    return Timeline(at=at, demand=brought, violations=shares, **columns)
