"""The rivals, by their published formulas and defaults, as policies of the same kind as ours.

Each file names its source, has the published defaults in a frozen dataclass `Parameters`, and says where it differs.
All of them see the same replicas as ours at the times at which they look, and none waits for Prometheus.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from autoscaler.decision import Policy
from autoscaler.settings import Settings
from autoscaler.simulate.baselines import dynamo, hpa, keda, kpa, ray, wva
from autoscaler.simulate.baselines.signals import filled

P = TypeVar("P")
# Parameters by name (those that are left out are the published ones), and the limits and promises of the workload.
Factory = Callable[[Mapping[str, Any], Settings], Policy]


def _factory(parameters: type[P], policy: Callable[[P, Settings], Policy]) -> Factory:
    return lambda values, settings: policy(filled(parameters, values), settings)


BASELINES: Mapping[str, Factory] = {
    "hpa": _factory(hpa.Parameters, hpa.Hpa),
    "keda": _factory(keda.Parameters, keda.Keda),
    "kpa": _factory(kpa.Parameters, kpa.Kpa),
    "wva": _factory(wva.Parameters, wva.Wva),
    "dynamo": _factory(dynamo.Parameters, dynamo.Dynamo),
    "ray": _factory(ray.Parameters, ray.RayServe),
}
