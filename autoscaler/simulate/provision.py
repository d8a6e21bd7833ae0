"""Provisioning for the peak: the fewest replicas that never change and keep the promise. The price to beat."""

from __future__ import annotations

import math
from dataclasses import replace

from autoscaler.simulate.curve import Curve
from autoscaler.simulate.options import Slo, WorldOptions
from autoscaler.simulate.policies import Static
from autoscaler.simulate.result import Result
from autoscaler.simulate.run import simulate
from autoscaler.simulate.traces import Trace

LATE_SHARE = 0.01  # of requests, that may be violations
MOST = 1024


def fluid_gpu_hours(trace: Trace, curve: Curve, slo: Slo, options: WorldOptions) -> float:
    """What the scored work takes of replicas whose steps last exactly what the promise allows, if it could be spread
    evenly and replicas came in parts and at once.

    No bound in the strict sense: a policy may lose the dearest requests within its 1 %, and a replica that decodes
    nothing for a while may be busier than this. No policy tried came near it.
    """
    scored = trace.arrival_s >= options.warmup
    work = curve.work_seconds(trace.input_tokens, trace.cached_tokens, trace.output_tokens)[scored].sum()
    seconds = float(work) / max(curve.utilization(slo.itl_seconds), 1e-9)
    return max(seconds, options.min_replicas * (trace.duration_s - options.warmup)) / 3600


def run_static(trace: Trace, replicas: int, curve: Curve, slo: Slo, options: WorldOptions, seed: int) -> Result:
    """As many from before the start of the trace until after its end."""
    fixed = replace(options, initial_replicas=replicas, min_replicas=replicas, max_replicas=replicas)
    return simulate(trace, Static(replicas), curve, slo, fixed, seed, name="static")


def smallest_static(
    trace: Trace, curve: Curve, slo: Slo, options: WorldOptions, seed: int, late_share: float = LATE_SHARE
) -> tuple[int, Result]:
    """The fewest replicas with which no more than this share of requests are violations, and how they did.

    Found by bisection: that more replicas do not do worse is taken for granted.

    Raises:
        ValueError: where more replicas do not help: too many prompts take too long by themselves.
    """
    alone = curve.step_cost.base + curve.step_cost.per_prefill_token * (trace.input_tokens - trace.cached_tokens)
    hopeless = float((alone > slo.ttft_seconds)[trace.arrival_s >= options.warmup].mean())
    if hopeless > late_share:
        raise ValueError(
            f"{trace.name}: {hopeless:.1%} of prompts take more than {slo.ttft_seconds:g} s of {curve.name}"
        )
    hours = max((trace.duration_s - options.warmup) / 3600, 1e-9)
    low = 0
    high = max(1, math.ceil(fluid_gpu_hours(trace, curve, slo, options) / hours))
    while (best := run_static(trace, high, curve, slo, options, seed)).violations > late_share:
        if high >= MOST:
            raise ValueError(f"{trace.name}: {best.violations:.1%} of requests are violations with {high} replicas")
        low, high = high, min(high + max(1, high // 2), MOST)
    while high - low > 1:
        middle = (low + high) // 2
        tried = run_static(trace, middle, curve, slo, options, seed)
        if tried.violations > late_share:
            low = middle
        else:
            high, best = middle, tried
    return high, best
