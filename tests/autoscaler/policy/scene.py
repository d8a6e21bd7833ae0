"""A small world for policies: replicas that come after a cold start, share what arrives, and count it.

What a replica can do is a rate of requests; above it they wait. No engine, so that a test says what it means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from autoscaler.decision import Decision, Policy
from autoscaler.fleet import Counters, Load, Observation, Phase, Replica, StepCost

COST = StepCost(base=0.006, per_prefill_token=3e-5, per_decode_row=2.5e-5, per_context_token=6.5e-8)
PROMPT, NEW = 1000, 200
# Seconds of work: 1000 · 30 µs + 200 · (25 µs + 0.065 µs · 1100)
REQUEST_SECONDS = PROMPT * 3e-5 + NEW * (2.5e-5 + 6.5e-8 * (PROMPT + NEW / 2))


def load(**changes: object) -> Load:
    whole = Load(capacity=256, kv_pages_total=20_000, kv_page_tokens=16, max_step_tokens=4096, step_cost=COST)
    return replace(whole, **changes)  # type: ignore[arg-type]


def ready(name: str, at: float = 0.0, cold: float = 60.0, **changes: object) -> Replica:
    return Replica(
        name, Phase.READY, created_at=at - 1000 - cold, load=load(**changes), observed_at=at, ready_at=at - 1000
    )


@dataclass
class Server:
    created: float
    ready: float
    requests: float = 0.0  # that arrived
    done: float = 0.0
    late: float = 0.0
    seen: tuple[float, Load] | None = None


@dataclass
class World:
    """Attributes:
    rate: requests a second, by time.
    can: requests a second that a replica can do.
    silent: names of replicas that do not answer, by time.
    nodes: that there are.
    """

    policy: Policy
    rate: Callable[[float], float]
    can: float = 0.9 / REQUEST_SECONDS
    cold: float = 60.0
    replicas: int = 1
    nodes: int = 10_000
    silent: Callable[[float, str], bool] = lambda at, name: False
    at: float = 1_000_000.0
    cost: StepCost = COST
    servers: dict[str, Server] = field(default_factory=dict)
    born: int = 0
    desired: int = 0
    decisions: list[Decision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.desired = self.replicas
        for _ in range(self.replicas):
            self._create(self.at - self.cold - 1)

    def _create(self, at: float) -> None:
        self.servers[f"replica-{self.born}"] = Server(at, at + self.cold)
        self.born += 1

    def look(self) -> Observation:
        replicas = []
        for number, (name, server) in enumerate(self.servers.items()):
            if number >= self.nodes:
                server.ready = self.at + self.cold
                replicas.append(Replica(name, Phase.PENDING, server.created, unschedulable_since=server.created))
                continue
            if server.ready > self.at:
                replicas.append(Replica(name, Phase.STARTING, server.created))
                continue
            if server.seen is None or not self.silent(self.at, name):
                server.seen = self.at, self._load(server)
            when, seen = server.seen
            replicas.append(Replica(name, Phase.READY, server.created, seen, when, ready_at=server.ready))
        return Observation(self.at, self.desired, tuple(replicas))

    def _load(self, server: Server) -> Load:
        waiting, arrived, done = server.requests - server.done, int(server.requests), int(server.done)
        rate = self.rate(self.at) / max(sum(each.ready <= self.at for each in self.servers.values()), 1)
        step = COST.base / (1 - min(rate, self.can) * REQUEST_SECONDS) if self.can * REQUEST_SECONDS < 1 else 0.03
        return load(
            step_cost=self.cost,
            queued_requests=int(waiting),
            queued_tokens=int(waiting * PROMPT),
            oldest_queued_seconds=waiting / self.can,
            running_requests=int(min(rate, self.can) * NEW * step),
            counters=Counters(arrived, arrived * PROMPT, done, done * PROMPT, 0, done * NEW, done, int(server.late)),
        )

    def run(self, seconds: float) -> list[Decision]:
        """Decisions of this time, which are followed at once."""
        decisions = []
        until = self.at + seconds
        while self.at < until:
            decision = self.policy.decide(self.look())
            decisions.append(decision)
            self.scale(decision.desired)
            step = self.policy.interval_seconds
            serving = [each for each in self.servers.values() if each.ready <= self.at]
            for server in serving:
                server.requests += self.rate(self.at) * step / len(serving)
                done = min(server.requests, server.done + self.can * step)
                if server.requests - done > 2 * self.can:
                    server.late += done - server.done
                server.done = done
            self.at += step
        self.decisions += decisions
        return decisions

    def scale(self, count: int) -> None:
        self.desired = count
        while len(self.servers) < count:
            self._create(self.at)
        for name in list(self.servers)[count:]:
            del self.servers[name]
