"""What the rivals look at: sums and means over replicas, windows of the past, and counters as flows.

Every sample is as fresh as the look it came with. In a cluster HPA, KEDA and WVA read theirs through Prometheus, one
scrape (15 s to 30 s) later: the rivals see more here than they would there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TypeVar

from autoscaler.decision import Decision, Limit
from autoscaler.fleet import Counters, Load, Observation, Phase, Replica
from autoscaler.settings import Settings

P = TypeVar("P")


def queued(load: Load) -> float:
    """vllm:num_requests_waiting."""
    return float(load.queued_requests)


def concurrency(load: Load) -> float:
    """vllm:num_requests_waiting + vllm:num_requests_running; what Knative and Ray count."""
    return float(load.queued_requests + load.running_requests)


def kv_usage(load: Load) -> float:
    """vllm:kv_cache_usage_perc, NIM's gpu_cache_usage_perc."""
    return load.kv_pages_used / load.kv_pages_total if load.kv_pages_total else 0.0


METRICS: Mapping[str, Callable[[Load], float]] = {"queued": queued, "concurrency": concurrency, "kv_usage": kv_usage}


def total(observation: Observation, metric: Callable[[Load], float]) -> float:
    """Over ready replicas, and with the requests that wait for the first of them where the metric counts requests."""
    held = 0 if metric is kv_usage else observation.held_requests
    return held + sum(metric(each.load) for each in ready(observation) if each.load is not None)


def ready(observation: Observation) -> tuple[Replica, ...]:
    return observation.in_phase(Phase.READY)


def alive(observation: Observation) -> tuple[Replica, ...]:
    """`status.replicas` of a workload: all but those that end or have ended."""
    return observation.in_phase(Phase.PENDING, Phase.STARTING, Phase.LOADING, Phase.READY)


class Window:
    """Samples of the last so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._samples: deque[tuple[float, float]] = deque()

    def add(self, at: float, value: float) -> None:
        self._samples.append((at, value))
        while self._samples[0][0] <= at - self.seconds:
            self._samples.popleft()

    def _since(self, seconds: float | None) -> list[float]:
        if not self._samples:
            return []
        start = self._samples[-1][0] - (self.seconds if seconds is None else seconds)
        return [value for at, value in self._samples if at > start]

    def mean(self, seconds: float | None = None) -> float:
        """Of all samples, or of those of the last so many seconds; 0 of none."""
        values = self._since(seconds)
        return sum(values) / len(values) if values else 0.0

    def highest(self, seconds: float | None = None) -> float:
        return max(self._since(seconds), default=0.0)

    def lowest(self, seconds: float | None = None) -> float:
        return min(self._since(seconds), default=0.0)


@dataclass(frozen=True, slots=True)
class Flow:
    """What went through in a time."""

    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0
    finished_requests: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0

    @property
    def mean_input(self) -> float:
        return self.arrived_prompt_tokens / self.arrived_requests if self.arrived_requests else 0.0

    @property
    def mean_output(self) -> float:
        return self.generated_tokens / self.finished_requests if self.finished_requests else 0.0

    @property
    def hit_rate(self) -> float:
        prompt = self.computed_prompt_tokens + self.cached_prompt_tokens
        return self.cached_prompt_tokens / prompt if prompt else 0.0

    def __add__(self, other: Flow) -> Flow:
        return Flow(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Flow)))


def increase(now: Counters, before: Counters) -> Flow:
    """Between two looks at one replica. One that shrank is of an engine that started anew: it counts whole."""
    if now.arrived_requests < before.arrived_requests or now.generated_tokens < before.generated_tokens:
        before = Counters()
    return Flow(*(getattr(now, each.name) - getattr(before, each.name) for each in fields(Flow)))


class Flows:
    """Of a whole workload, from the counters of its replicas, whoever of them came and went in between."""

    def __init__(self) -> None:
        self._before: dict[str, Counters] = {}

    def since_last(self, observation: Observation) -> Flow:
        flow = Flow()
        seen = {each.name: each.load.counters for each in observation.replicas if each.load is not None}
        for name, counters in seen.items():
            flow += increase(counters, self._before.get(name, Counters()))
        self._before = seen
        return flow


def bounded(desired: int, settings: Settings, reason: str, figures: Mapping[str, float] | None = None) -> Decision:
    """Within the limits of the workload, which all rivals have."""
    limit = None
    if desired < settings.min_replicas:
        desired, limit = settings.min_replicas, Limit.MIN_REPLICAS
    elif desired > settings.max_replicas:
        desired, limit = settings.max_replicas, Limit.MAX_REPLICAS
    return Decision(desired, reason, limit, figures or {})


def filled(kind: type[P], values: Mapping[str, object]) -> P:
    """A dataclass of parameters from names and values.

    Raises:
        ValueError: for a name that it does not have, or a value of another kind than the published one.
    """
    known = {each.name: each.default for each in fields(kind)}  # type: ignore[arg-type]
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"{name}: no such parameter; there are {', '.join(known)}")
        default = known[name]
        if isinstance(default, bool):
            right = value in (0, 1)
        elif isinstance(default, str):
            right = isinstance(value, str)
        else:
            right = isinstance(value, int | float) and not isinstance(value, bool)
        if not right:
            raise ValueError(f"{name}: {value!r} is not of the kind of {default!r}")
        if isinstance(value, int | float) and value < 0:
            raise ValueError(f"{name}: {value!r} is less than 0")
    return kind(**values)
