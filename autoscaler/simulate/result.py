"""What came of a run. Times are seconds since the start of the trace, waits are seconds.

Scored is what happens from the end of the warm-up to the last arrival: requests that arrive in it, and GPUs from the
moment that a replica has one until it is gone, loading and draining included.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from autoscaler.simulate.curve import Curve
from autoscaler.simulate.kernel import FINISHED, LOST
from autoscaler.simulate.options import Slo, WorldOptions
from autoscaler.simulate.traces import Trace

JUMP_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Life:
    """Of a replica; None: did not happen."""

    name: str
    created: float
    node: float | None
    ready: float | None  # first
    gone: float | None


@dataclass(frozen=True, slots=True)
class Timeline:
    """At each look of the policy. `demand` is what the latest minute brought, in replicas whose steps take what the
    promise allows."""

    at: Any
    demand: Any
    desired: Any
    ready: Any
    billed: Any
    queued: Any
    running: Any
    violations: Any  # share of the requests that arrived since the look before

    def lists(self) -> dict[str, list[float]]:
        """As JSON has it."""
        return {each.name: np.round(getattr(self, each.name), 4).tolist() for each in fields(self)}


@dataclass(frozen=True)
class Result:
    policy: str
    trace: str
    curve: str  # the file
    seed: int
    slo: Slo
    options: WorldOptions
    scored_requests: int
    violations: float  # share of them: any of the next four
    late_first_token: float
    slow_tokens: float
    lost: float
    unfinished: float  # without an answer in the end, or with half of one
    unscalable: float  # violations of requests that arrived less than a cold start after a jump of demand: share of all
    wait_p50: float  # from arrival to the first step that computes the prompt
    wait_p99: float
    ttft_p50: float
    ttft_p99: float
    itl_p99: float
    gpu_hours: float
    scale_outs: int  # decisions that asked for more, from the start on
    scale_ins: int
    max_ready: int
    crashes: int
    failed_starts: int
    preemptions: int
    timeline: Timeline
    lives: tuple[Life, ...]
    requests: Any  # records of `autoscaler.simulate.records.REQUEST`

    def summary(self) -> dict[str, Any]:
        """All but the long parts, as JSON has it."""
        heavy = ("timeline", "lives", "requests", "slo", "options")
        out = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in heavy}
        return out | {"slo": asdict(self.slo), "options": asdict(self.options)}


def violations(requests: Any, slo: Slo) -> tuple[Any, Any, Any, Any]:
    """Of each request: is its first token late, are its tokens slow, is it lost, is it not finished."""
    state, first = requests["state"], np.ascontiguousarray(requests["first_token"])
    lost, done = state == LOST, state == FINISHED
    late = ~lost & (first - requests["arrival"] > slo.ttft_seconds)
    gaps = requests["output"] - 1
    with np.errstate(invalid="ignore"):  # the difference of two that never came
        slow = done & (requests["finished"] - first > slo.itl_seconds * np.maximum(gaps, 1)) & (gaps > 0)
    return late, slow, lost, ~lost & ~done


def demand(trace: Trace, curve: Curve, slo: Slo, at: Any, window: float) -> Any:
    """Replicas that would do the work which arrived in the window before each of these times."""
    each = curve.work_seconds(trace.input_tokens, trace.cached_tokens, trace.output_tokens)
    work = np.concatenate([[0.0], np.cumsum(each)])
    start = np.maximum(at - window, 0.0)
    arrived = work[np.searchsorted(trace.arrival_s, at)] - work[np.searchsorted(trace.arrival_s, start)]
    return arrived / np.maximum(at - start, 1e-9) / max(curve.utilization(slo.itl_seconds), 1e-9)


def after_jumps(trace: Trace, curve: Curve, slo: Slo, horizon: float) -> Any:
    """Of each request: did it arrive within the horizon after a jump?

    A jump is half a minute that brings half as much again as any did in the horizon before it, and half a replica more.
    Nobody who sees only the past has the replicas for it sooner, unless he held them all along.
    """
    grid = np.arange(0.0, trace.duration_s + 2 * JUMP_SECONDS, JUMP_SECONDS)
    level = demand(trace, curve, slo, grid, JUMP_SECONDS)
    level[0] = level[1]
    slots = max(int(np.ceil(horizon / JUMP_SECONDS)), 1)
    highest = np.lib.stride_tricks.sliding_window_view(np.concatenate([np.full(slots, level[0]), level]), slots)
    before = highest.max(axis=1)[: len(level)]
    jumped = (level > 1.5 * before) & (level - before > 0.5)
    # The level at a mark is that of the half minute before it, in which the jump began
    near = np.convolve(jumped, np.ones(slots + 1))[: len(level)] > 0
    return near[np.ceil(trace.arrival_s / JUMP_SECONDS).astype(int)]


def gpu_hours(lives: tuple[Life, ...], start: float, end: float) -> float:
    """That replicas had a node for, within these times."""
    total = 0.0
    for life in lives:
        if life.node is not None:
            total += max(min(end, end if life.gone is None else life.gone) - max(start, life.node), 0.0)
    return total / 3600


def percentile(values: Any, share: float) -> float:
    return float(np.percentile(values, share, method="lower")) if len(values) else 0.0
