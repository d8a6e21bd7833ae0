"""Fleets that are not there, each led by the same rule with another parameter; the real one follows the cheapest that
would have kept the promise.

How much headroom a workload needs, and which forecast of it is any good, differs between workloads by more than any
constant can cover. But what each choice would have led to can be worked out as the load goes by: a shadow sees the same
arrivals, gets its replicas one cold start after it asked for them, pays for them from then on, and counts the requests
that it would have served late. Shares of late requests are forgotten over hours, and start from a belief that is worth
half an hour of what was seen: little headroom is bad.

The choice moves to a safer shadow at once, and to a cheaper one after a while.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from autoscaler.policy.fluid import Flow, Fluid

FACTORS = (1.0, 1.08, 1.17, 1.27, 1.4, 1.55, 1.75, 2.0, 2.4)
RECORD_FACTORS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5)
MEMORY = 6 * 3600.0  # seconds after which what happened has lost 63 % of its weight
BELIEF = 1800.0  # seconds that the belief is worth
SAFE = 0.6  # of the share that may be late, for a shadow to be followed
PATIENCE = 300.0  # seconds before a cheaper one is followed
CHEAPER = 0.98  # of the cost of the one that is followed
LOOSE = 1.06  # a replica goes only if the rest could take this much more
SOFT = (0.9, 1.1)  # of the promise: where the first are late, and where all are


@dataclass(frozen=True, slots=True)
class Promise:
    """What is late.

    Attributes:
        wait: seconds in the queue.
        step: seconds between two tokens.
        late_share: of requests that may be late.
    """

    wait: float
    step: float
    late_share: float

    def late(self, fluid: Fluid) -> float:
        """Share of those who come now that are late."""
        worst = max(fluid.wait / self.wait, fluid.step / self.step)
        return min(max((worst - SOFT[0]) / (SOFT[1] - SOFT[0]), 0.0), 1.0)


@dataclass(frozen=True, slots=True)
class Look:
    """What all shadows see.

    Attributes:
        most_work: seconds of work a second that one replica can take.
        efficiency: replicas of the fluid that a real one is worth.
    """

    at: float
    seconds: float
    flow: Flow
    demands: list[float]
    most_work: float
    horizon: float
    efficiency: float
    lowest: int
    highest: int


class Shadow:
    """One fleet. `signal` is the place of its forecast, `factor` its headroom."""

    __slots__ = ("_coming", "_fluid", "cost", "factor", "late", "ordered", "ready", "signal")

    def __init__(self, signal: int, factor: float) -> None:
        self.signal = signal
        self.factor = factor
        self.ordered = self.ready = 0
        self.late = 0.0  # requests, forgetting
        self.cost = 0.0  # replica-seconds, forgetting
        self._fluid = Fluid()
        self._coming: deque[tuple[float, int]] = deque()

    def need(self, look: Look) -> int:
        work = self.factor * look.demands[self.signal] / look.most_work
        need = math.ceil(work - 1e-6)
        if need < self.ordered:
            need = min(math.ceil(work * LOOSE - 1e-6), self.ordered)
        return min(max(need, look.lowest), look.highest)

    def start(self, look: Look) -> None:
        """Begin with what it needs, as if it had been there."""
        self.ordered = self.ready = self.need(look)
        self.cost = float(self.ordered)

    def advance(self, look: Look, promise: Promise, keep: float) -> None:
        coming = self._coming
        while coming and coming[0][0] <= look.at:
            self.ready += coming.popleft()[1]
        self._fluid.advance(look.flow, self.ready * look.efficiency, look.seconds)
        self.late = self.late * keep + promise.late(self._fluid) * look.flow.arrivals * look.seconds
        self.cost = self.cost * keep + self.ordered * look.seconds
        need = self.need(look)
        if need > self.ordered:
            coming.append((look.at + look.horizon, need - self.ordered))
        else:
            surplus = self.ordered - need
            while surplus and coming:  # those that load go first
                when, count = coming.pop()
                if count > surplus:
                    coming.append((when, count - surplus))
                    count = surplus
                surplus -= count
            self.ready -= surplus
        self.ordered = need


class Shadows:
    """All of them, and which is followed."""

    def __init__(self, names: Sequence[str]) -> None:
        """The last signal is the record, which is followed by smaller factors as well."""
        self._all = [Shadow(signal, factor) for signal in range(len(names) - 1) for factor in FACTORS]
        self._all += [Shadow(len(names) - 1, factor) for factor in RECORD_FACTORS]
        self._beliefs = [_belief(each.factor) for each in self._all]
        self._followed: Shadow | None = None
        self._since = 0.0
        self._seconds = 0.0  # forgetting
        self._requests = 0.0  # forgetting

    @property
    def followed(self) -> Shadow | None:
        return self._followed

    def advance(self, look: Look, promise: Promise) -> Shadow:
        if self._followed is None:
            for each in self._all:
                each.start(look)
        keep = math.exp(-look.seconds / MEMORY)
        self._seconds = self._seconds * keep + look.seconds
        self._requests = self._requests * keep + look.flow.arrivals * look.seconds
        for each in self._all:
            each.advance(look, promise, keep)
        return self._choose(look, promise.late_share * SAFE)

    def late_share(self, place: int) -> float:
        """Of the shadow at this place, with what was believed before anything was seen."""
        rate = self._requests / self._seconds if self._seconds else 0.0
        seen = self._all[place].late / rate if rate > 0 else 0.0
        return (seen + self._beliefs[place] * BELIEF) / (self._seconds + BELIEF)

    def _choose(self, look: Look, safe: float) -> Shadow:
        shares = [self.late_share(place) for place in range(len(self._all))]
        good = [place for place, share in enumerate(shares) if share <= safe]
        if not good:
            least = min(shares)
            good = [place for place, share in enumerate(shares) if share <= least * 1.05]
        best = self._all[min(good, key=lambda place: (self._all[place].cost, shares[place]))]
        now = self._followed
        if now is None or now is best:
            self._followed, self._since = best, look.at if now is None else self._since
            return best
        unsafe = all(self._all[place] is not now for place in good)
        if unsafe or (look.at - self._since >= PATIENCE and best.cost < CHEAPER * now.cost):
            self._followed, self._since = best, look.at
            return best
        return now


def _belief(factor: float) -> float:
    """Share that is late with this headroom, before anything was seen: 5 % without, a tenth of it with 30 %."""
    return 0.05 * 10 ** (-(factor - 1) / 0.3)
