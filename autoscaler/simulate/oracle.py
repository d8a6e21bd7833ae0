"""The clairvoyant: a schedule made with the whole trace in view, under the same cold starts as everybody's.

It is a reference and not a proven optimum. A schedule is a number of replicas for each slot of time,

    need(t) = min(cap, ceil(work that arrives around t, over `window` seconds / (u(t) seconds of work per second)))
    asked(t) = the most that is needed from t until a replica that is asked for at t is ready

where work is `Curve.work_seconds`. `search` looks for the cheapest that keeps the promise: u, the same at all times, by
bisection for each of two windows; then u by parts of the trace, more where little was late and less where much was, by
simulation in turns; never above what static provisioning costs. Cold starts vary, and their draws are not foreseen,
only their distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autoscaler.decision import Decision
from autoscaler.fleet import Observation
from autoscaler.simulate.curve import Curve
from autoscaler.simulate.options import Slo, WorldOptions
from autoscaler.simulate.provision import LATE_SHARE
from autoscaler.simulate.result import Result, violations
from autoscaler.simulate.run import simulate
from autoscaler.simulate.traces import Trace
from autoscaler.simulate.world import EPOCH

SLOT_SECONDS = 5.0
WINDOWS = (30.0, 10.0)
UTILIZATIONS = (0.5, 1.15)  # of what the promise allows the mean step: where u is looked for
AROUND = 0.06  # of a u that was good under another seed: likewise
PART_SECONDS = 120.0  # that have one u
BISECTIONS = 4
TURNS = 8
FIRST_STEP, DECAY = 0.04, 0.85  # of u, from turn to turn


@dataclass(frozen=True)
class Plan:
    """What a schedule is made from."""

    window: float  # seconds that work is averaged over
    cap: int
    work_rate: float  # seconds of work that a replica gets per second: u
    factors: Any  # of u, by parts of the trace
    lead_sigmas: float = 1.0  # cold starts up to so many sigmas above their median are waited for


class Schedule:
    """A policy that knows the numbers, and looks at the clock alone."""

    interval_seconds = SLOT_SECONDS

    def __init__(self, asked: Any) -> None:
        self.asked = asked

    def decide(self, observation: Observation) -> Decision:
        slot = round((observation.at - EPOCH) / SLOT_SECONDS)
        return Decision(int(self.asked[min(slot, len(self.asked) - 1)]), "foreseen")


def schedule(plan: Plan, trace: Trace, curve: Curve, options: WorldOptions) -> Schedule:
    """Replicas to ask for at the start of each slot."""
    count = int(trace.duration_s / SLOT_SECONDS) + 2
    middle = (np.arange(count) + 0.5) * SLOT_SECONDS
    work = np.concatenate(
        [[0.0], np.cumsum(curve.work_seconds(trace.input_tokens, trace.cached_tokens, trace.output_tokens))]
    )
    start, end = np.maximum(middle - plan.window / 2, 0.0), middle + plan.window / 2
    arrived = work[np.searchsorted(trace.arrival_s, end)] - work[np.searchsorted(trace.arrival_s, start)]
    factors = plan.factors[np.minimum((middle / PART_SECONDS).astype(int), len(plan.factors) - 1)]
    need = np.ceil(arrived / (end - start) / (plan.work_rate * factors))
    need = np.clip(need, max(options.min_replicas, 1), plan.cap).astype(np.int64)
    median = options.cold_start_seconds + options.node_delay_seconds
    lead = median * math.exp(plan.lead_sigmas * options.cold_start_sigma)
    ahead = math.ceil(lead / SLOT_SECONDS) + 1
    padded = np.concatenate([need, np.full(ahead, need[-1])])
    return Schedule(np.lib.stride_tricks.sliding_window_view(padded, ahead + 1).max(axis=1))


@dataclass(frozen=True)
class Found:
    result: Result
    plan: Plan | None  # None: static provisioning is the best that was found


class Search:
    """For the cheapest schedule of one trace and one seed."""

    def __init__(
        self, trace: Trace, curve: Curve, slo: Slo, options: WorldOptions, seed: int, static: tuple[int, Result]
    ) -> None:
        self._trace, self._curve, self._slo, self._options, self._seed = trace, curve, slo, options, seed
        self._cap, self.best = static[0], Found(static[1], None)
        self.tries = 0

    def run(self, start: Plan | None = None) -> Found:
        """From a plan that was good under another seed, or from nothing."""
        if start is not None:
            self._bisect(start.window, start.work_rate * (1 - AROUND), start.work_rate * (1 + AROUND), BISECTIONS - 1)
        else:
            limit = self._curve.utilization(self._slo.itl_seconds)
            for window in WINDOWS:
                self._bisect(window, UTILIZATIONS[0] * limit, UTILIZATIONS[1] * limit, BISECTIONS)
        if self.best.plan is not None:
            self._refine(self.best.plan, self.best.result, TURNS if start is None else TURNS // 2)
        return self.best

    def _try(self, plan: Plan) -> Result:
        """Keeps it if it is the cheapest so far that keeps the promise."""
        self.tries += 1
        policy = schedule(plan, self._trace, self._curve, self._options)
        options = replace(self._options, initial_replicas=int(policy.asked[0]), max_replicas=self._cap)
        result = simulate(self._trace, policy, self._curve, self._slo, options, self._seed, name="oracle")
        if result.violations <= LATE_SHARE and result.gpu_hours < self.best.result.gpu_hours:
            self.best = Found(result, plan)
        return result

    def _bisect(self, window: float, low: float, high: float, times: int) -> None:
        """The highest u with this window that keeps the promise: between one that does and one that does not."""
        parts = np.ones(int(self._trace.duration_s / PART_SECONDS) + 1)
        for _ in range(times):
            middle = (low + high) / 2
            if self._try(Plan(window, self._cap, middle, parts)).violations > LATE_SHARE:
                high = middle
            else:
                low = middle

    def _refine(self, plan: Plan, result: Result, turns: int) -> None:
        """Turn by turn: where fewer requests than the allowed share were late, u goes up, while the whole has fewer.

        Where the whole has more it goes down by twice as much in parts that were late, and up by half in the others.
        """
        factors = plan.factors
        for turn in range(turns):
            step, failed = FIRST_STEP * DECAY**turn, result.violations > LATE_SHARE
            up, down = (step / 2, 2 * step) if failed else (step, 0.0)
            factors = factors * np.where(self._late_shares(result, len(factors)) <= LATE_SHARE, 1 + up, 1 - down)
            result = self._try(replace(plan, factors=factors))

    def _late_shares(self, result: Result, parts: int) -> Any:
        """By part, with the one after it: what is late there was short before."""
        bad = np.logical_or.reduce(violations(result.requests, self._slo))
        part = np.minimum((result.requests["arrival"] / PART_SECONDS).astype(int), parts - 1)
        total, late = np.bincount(part, minlength=parts), np.bincount(part, weights=bad, minlength=parts)
        share = late / np.maximum(total, 1)
        return np.maximum(share, np.append(share[1:], 0.0) * 0.5)
