"""Policies by name: `ours`, `static:8`, and those of `autoscaler.simulate.baselines`, perhaps with their parameters:
`hpa:concurrency=40`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autoscaler.decision import Decision, Policy
from autoscaler.fleet import Observation
from autoscaler.policy import QueuePolicy
from autoscaler.settings import ScaleToZero, Settings, Target
from autoscaler.simulate.baselines import BASELINES
from autoscaler.simulate.curve import Curve
from autoscaler.simulate.options import Slo, WorldOptions
from autoscaler.simulate.traces import Trace


@dataclass(frozen=True, slots=True)
class Setup:
    """All that a run is given. An honest policy takes the settings; only a clairvoyant one takes the trace."""

    trace: Trace
    curve: Curve
    slo: Slo
    options: WorldOptions

    @property
    def settings(self) -> Settings:
        target = Target(ttft_seconds=self.slo.ttft_seconds, itl_seconds=self.slo.itl_seconds)
        zero = ScaleToZero(enabled=self.options.min_replicas == 0)
        return Settings(self.options.min_replicas, self.options.max_replicas, target, scale_to_zero=zero)


class Static:
    """Always so many."""

    interval_seconds = 15.0

    def __init__(self, replicas: int) -> None:
        self._decision = Decision(replicas, f"always {replicas}")

    def decide(self, observation: Observation) -> Decision:
        return self._decision


def make_policy(name: str, setup: Setup) -> Policy:
    """A new policy. Raises ValueError that lists the names where there is none of this."""
    kind, _, rest = name.partition(":")
    if kind == "static" and rest:
        if not rest.isdigit() or not 1 <= int(rest) <= setup.options.max_replicas:
            raise ValueError(f"policy {name!r}: static:N takes N from 1 to max-replicas, {setup.options.max_replicas}")
        return Static(int(rest))
    if kind == "ours":
        return QueuePolicy(setup.settings)
    if kind not in BASELINES:
        raise ValueError(f"policy {name!r}: not one of {', '.join(['ours', 'static:N', *sorted(BASELINES)])}")
    return BASELINES[kind](parse_options(name, rest), setup.settings)


def parse_options(name: str, rest: str) -> dict[str, Any]:
    """`concurrency=40,window=60`: numbers where they read as such."""
    options: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ValueError(f"policy {name!r}: {part!r} is not name=value")
        try:
            options[key] = float(value) if "." in value or "e" in value else int(value)
        except ValueError:
            options[key] = value
    return options
