"""A fleet that is autoscaled, simulated: the same policies as in the cluster, against recorded and made-up traffic.

    python -m autoscaler.simulate azure:12 --policy ours --policy static:8

    from autoscaler.simulate import ARITHMETIC, Slo, Static, WorldOptions, load_trace, read_curve, simulate

    trace = load_trace("spikes:rate=40", seed=3)                # or a CSV file; recorded ones need folder=
    options = WorldOptions(initial_replicas=6, max_replicas=12, cold_start_seconds=120)
    result = simulate(trace, Static(6), read_curve(ARITHMETIC), Slo(ttft_seconds=2, itl_seconds=0.06), options, seed=1)
    result.violations, result.gpu_hours, result.wait_p99, result.timeline.ready

    traces ──► Trace ─┐
    curve ──► Curve ──┼─► run.simulate ─► world ─► engines ─► kernel        requests through replicas, compiled
    Policy ───────────┘        │            └────► Policy.decide(Observation) each interval
                               └────────► result.Result ─► plot

`Policy` is `autoscaler.decision.Policy`; each run needs a new one. What the simulator knows of a replica is its curve
alone. Needs numpy and numba, which are not in the image of the operator.
"""

from autoscaler.simulate.curve import ARITHMETIC, Curve, read_curve
from autoscaler.simulate.options import Slo, WorldOptions
from autoscaler.simulate.policies import Setup, Static, make_policy
from autoscaler.simulate.result import Life, Result, Timeline
from autoscaler.simulate.run import simulate
from autoscaler.simulate.traces import Trace, load_trace, trace

__all__ = [
    "ARITHMETIC",
    "Curve",
    "Life",
    "Result",
    "Setup",
    "Slo",
    "Static",
    "Timeline",
    "Trace",
    "WorldOptions",
    "load_trace",
    "make_policy",
    "read_curve",
    "simulate",
    "trace",
]
