"""What is measured, written down before anything was: traces to tune on, other traces to score on, what is promised.

- A policy is tuned on `TUNING` and scored once on `HELD_OUT`: other traces, other days, other seeds.
- Each rival has the same number of configurations to choose from (`bench.autoscaler.spaces`), the published defaults
  among them, and one choice per machine: an owner tunes for what he runs. Ours has one default for all.
- Every policy takes over the fleet that static provisioning has, may go up to twice as many, and sees the same cold
  starts. Static provisioning is the smallest that keeps the promise on the very requests that are scored.
- A request is a violation if its first token is late, its tokens are slow on average, or it is lost.
- The cost of a configuration is the mean over runs of its GPU-hours relative to static, and `PENALTY` for every unit of
  violations above `LATE_SHARE`: one percentage point too many weighs as much as a quarter of static's GPU-hours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoscaler.simulate import ARITHMETIC, Curve, Slo, Trace
from autoscaler.simulate.provision import LATE_SHARE

RESULTS = Path(__file__).resolve().parent.parent / "results"
# By the name that tables have for a machine. The arithmetic one is no measurement: its file says so.
CURVES = {"h100": ARITHMETIC, "cpu": RESULTS / "step-costs-smollm2-135m-epyc-zen5-1core.json"}
COLD_STARTS = (30.0, 120.0, 300.0)  # seconds, median
TUNING_SEEDS = (1,)
SEEDS = (11, 12, 13, 14, 15)  # of the score: of traces that are drawn, of cold starts, of dispatch
CONFIGURATIONS = 16
MAX_FACTOR = 2  # of static's replicas
PENALTY = 25.0

READING_SECONDS = 0.2  # per token: the pace at which people read, what a small machine is asked for
PROMPTS = 2  # its first token may take as long as so many prompts of the 99th percentile take alone


@dataclass(frozen=True, slots=True)
class Scenario:
    """A trace of `autoscaler.simulate.load_trace` on a machine, at a rate for which static has 3 to 20 replicas."""

    name: str
    trace: str
    curve: str  # of CURVES
    ttft_seconds: float = 2.0  # on the H100

    def slo(self, trace: Trace, curve: Curve) -> Slo:
        """2 s and 60 ms on the H100, with 5 s where prompts have 15 000 tokens. On the CPU by a rule: two prompts of
        the 99th percentile, in whole halves of seconds, at least 1 s; and the pace of reading."""
        if self.curve == "h100":
            return Slo(self.ttft_seconds, 0.06)
        cost = curve.step_cost
        seconds = PROMPTS * (cost.base + cost.per_prefill_token * float(np.percentile(trace.input_tokens, 99)))
        return Slo(max(1.0, math.ceil(2 * seconds) / 2), READING_SECONDS)


TUNING = (
    Scenario("azure chat", "azure:12", "h100"),
    Scenario("servegen day 3", "servegen-m-small:days=3,hours=8-9,rate=240", "h100"),
    Scenario("spikes A", "spikes:rate=50,factor=2.5,every=1800,length=300,hours=2", "h100"),
    Scenario("ramps A", "ramps:rate=30,factor=4,every=1800,hours=2", "h100"),
    Scenario("azure chat", "azure:1", "cpu"),
    Scenario("servegen day 5", "servegen-m-small:days=5,hours=6-14,rate=12", "cpu"),
    Scenario("spikes A", "spikes:rate=2.5,factor=2.5,every=1800,length=300,hours=2", "cpu"),
    Scenario("ramps A", "ramps:rate=1.5,factor=4,every=1800,hours=2", "cpu"),
)
HELD_OUT = (
    Scenario("mooncake", "mooncake-synthetic:2", "h100", ttft_seconds=5.0),
    Scenario("servegen day 11", "servegen-m-small:days=11,hours=9-10,rate=240", "h100"),
    Scenario("deepseek-r1", "servegen-deepseek-r1:days=1,hours=6-14,rate=6", "h100"),
    Scenario("spikes B", "spikes:rate=40,factor=3,every=2400,length=480,hours=2", "h100"),
    Scenario("flat", "poisson:rate=80,hours=1", "h100"),
    Scenario("servegen day 12", "servegen-m-small:days=12,hours=6-14,rate=8", "cpu"),
    Scenario("diurnal", "diurnal:rate=1.5,factor=4,hours=12", "cpu"),
    Scenario("spikes B", "spikes:rate=2,factor=3,every=2400,length=480,hours=2", "cpu"),
)


def cost(relative_gpu_hours: float, violations: float) -> float:
    """Of one run of a configuration; lower is better."""
    return relative_gpu_hours + PENALTY * max(0.0, violations - LATE_SHARE)
