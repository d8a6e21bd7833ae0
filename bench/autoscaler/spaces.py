"""Where rivals are tuned: the same number of configurations for each, the published defaults and a Latin hypercube.

Each axis is cut into as many strata as there are draws and every stratum is drawn once, so that the axis that matters
most (the target of a rival) is tried at as many places as there are configurations. Targets that count requests are
shares of what a replica of the machine runs at most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from autoscaler.simulate import Curve
from bench.autoscaler.protocol import CONFIGURATIONS

Parameters = Mapping[str, Any]
Axes = Sequence[float]  # numbers from 0 to below 1
FEWEST, MOST = 0.02, 0.75  # of the largest batch: concurrent requests per replica


def between(low: float, high: float, at: float) -> float:
    """Evenly in the logarithm, to three digits."""
    return float(f"{low * (high / low) ** at:.3g}")


def one_of(values: Sequence[Any], at: float) -> Any:
    return values[int(at * len(values))]


def concurrent(curve: Curve, at: float) -> float:
    return between(FEWEST * curve.max_batch_size, MOST * curve.max_batch_size, at)


def hpa(curve: Curve, at: Axes) -> Parameters:
    return {
        "target": concurrent(curve, at[0]),
        "form": one_of(("Pods", "External"), at[1]),
        "down_stabilization_seconds": one_of((60.0, 300.0, 900.0), at[2]),
        "tolerance": one_of((0.05, 0.1), at[3]),
    }


def keda(curve: Curve, at: Axes) -> Parameters:
    waiting = at[1] < 0.5
    return {
        "metric": "queued" if waiting else "concurrency",
        "threshold": between(0.3, 30.0, at[0]) if waiting else concurrent(curve, at[0]),
        "down_stabilization_seconds": one_of((60.0, 300.0, 900.0), at[2]),
    }


def kpa(curve: Curve, at: Axes) -> Parameters:
    return {
        "target": concurrent(curve, at[0]),
        "stable_window_seconds": one_of((30.0, 60.0, 180.0), at[1]),
        "panic_threshold": one_of((1.5, 2.0, 10.0), at[2]),
        "scale_down_delay_seconds": one_of((0.0, 120.0, 300.0, 900.0), at[3]),
    }


def wva(curve: Curve, at: Axes) -> Parameters:
    up = between(0.3, 0.95, at[1])
    return {
        "kv_threshold": between(0.15, 0.95, at[0]),
        "scale_up_threshold": up,
        "scale_down_boundary": float(f"{up * one_of((0.6, 0.75, 0.9), at[2]):.3g}"),
        "queue_threshold": one_of((1.0, 5.0, 20.0), at[3]),
        "down_stabilization_seconds": one_of((0.0, 120.0, 300.0), at[4]),
    }


def dynamo(curve: Curve, at: Axes) -> Parameters:
    # Where a step that is full of prompts takes long, more must be held back for those that wait behind it
    full_step = curve.max_step_tokens * curve.step_cost.per_prefill_token
    low, high = (0.15, 1.2) if full_step < 0.2 else (0.06, 0.48)
    return {
        "target_scale": between(low, high, at[0]),
        "throughput_interval_seconds": one_of((30.0, 60.0, 180.0), at[1]),
        "down_sensitivity": one_of((0.5, 0.65, 0.8), at[2]),
        "predictor": one_of(("constant", "kalman"), at[3]),
        "load_scaling": one_of((True, True, False), at[4]),
    }


def ray(curve: Curve, at: Axes) -> Parameters:
    return {
        "target_ongoing_requests": concurrent(curve, at[0]),
        "upscale_delay_seconds": one_of((0.0, 10.0, 30.0), at[1]),
        "downscale_delay_seconds": one_of((60.0, 300.0, 600.0, 1200.0), at[2]),
        "upscaling_factor": one_of((1.0, 1.5), at[3]),
        "look_back_seconds": one_of((10.0, 30.0), at[4]),
    }


SPACES: Mapping[str, Callable[[Curve, Axes], Parameters]] = {
    "hpa": hpa,
    "keda": keda,
    "kpa": kpa,
    "wva": wva,
    "dynamo": dynamo,
    "ray": ray,
}
AXES = 5


def configurations(policy: str, curve: Curve, count: int = CONFIGURATIONS, seed: int = 0) -> list[Parameters]:
    """The published defaults (no parameters) first; the same for the same seed."""
    drawn = count - 1
    random = np.random.default_rng([seed, sorted(SPACES).index(policy)])
    strata = np.stack([random.permutation(drawn) for _ in range(AXES)], axis=1)
    places = (strata + random.random((drawn, AXES))) / max(drawn, 1)
    return [{}, *(SPACES[policy](curve, [float(each) for each in place]) for place in places)]
