"""Fleets that are not there, each led by another rule; the real one follows the cheapest that kept the promise.

How much headroom a workload needs, and which forecast of it is any good, differs between workloads by more than any
constant can cover. But what each choice would have led to can be worked out as the load goes by: a shadow sees the same
arrivals, gets its replicas one cold start after it asked for them, pays for them from then on, and counts the requests
that it would have served late. There are two kinds: those that follow a forecast, with some headroom, and those that
never change. The latter are what a fleet of constant size would have cost, known as the load goes by.

Before anything was seen there are beliefs: the less headroom, the longer a shadow must have done well before it is
followed; the fleet that was found is thought to have its reasons. How long that is follows from what it costs to be
wrong: a jump that surprises makes late for a horizon and a little more, and it takes `1 / late_share` times as long
with nobody late to make up for it. A belief is forgotten as what was seen is.

Where a shadow has as many replicas as the real fleet, what real requests met counts and not what was worked out; with
more, no more were late than there, with fewer no fewer.

The choice moves to a safer shadow at once, and to a cheaper one after a while.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from autoscaler.policy.fluid import Flow, Fluid

FACTORS = (1.0, 1.06, 1.12, 1.18, 1.24, 1.3, 1.36, 1.5, 1.7, 2.0, 2.4)
MEMORY = 24 * 3600.0  # seconds after which what was late has lost 63 % of its weight
PAID = 3600.0  # the same of what was paid: what is cheap at night is not at noon
AMPLE = 1.5  # times the load: what a constant fleet must bear if the one that was found cannot bear the load
AFTERMATH = 60.0  # seconds that a jump makes late beyond a horizon: until it stands out, and until its queue has gone
# Surprises that are believed to have been met with, of constant fleets as large as the one that was found, as large as
# was guessed in its place, and of smaller ones; 1 is just safe
FOUND, GUESSED, FEWER = 0.8, 1.0, 6.0
SAFE = 0.9  # of the share that may be late, for a shadow to be followed
FORESEEN = 4 / 3  # what was worked out counts as so much more than what was seen
SPELL = 300.0  # seconds of real requests that are held against a shadow's: there they are late when they come, here
# when they go
PATIENCE = 300.0  # seconds before a cheaper one is followed
CHEAPER = 0.98  # of the cost of the one that is followed
LOOSE = 1.06  # a replica goes only if the rest could take this much more
SPREAD = 0.2  # of the logarithm of what requests meet, around what the fluid does: see `Promise.late`
PENALTY = 2.0  # how much dearer a shadow counts for each time that it has used up what may be late


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
        """Share of those who come now that are late: the fluid is a mean, requests are log-normal around it."""
        worst = max(fluid.wait / self.wait, fluid.step / self.step)
        if worst < 0.4:
            return 0.0
        return 0.5 * math.erfc(-math.log(worst) / (SPREAD * math.sqrt(2)))


@dataclass(frozen=True, slots=True)
class Look:
    """What all shadows see.

    Attributes:
        mean: work a second of the last minutes.
        most_work: seconds of work a second that one replica can take, as far as is known.
        efficiency: share of a replica of the fluid that a real one is worth.
        ready, real: replicas of the real fleet that serve; the same, or how many are asked for, if that has not grown
            for a horizon: replicas that it lost since then are what a fleet of that size meets with.
        late, slow: requests of the real fleet that were late since the look before, and those that ended and were slow
            (many are both).
    """

    at: float
    seconds: float
    flow: Flow
    mean: float
    demands: Sequence[float]
    most_work: float
    horizon: float
    efficiency: float
    ready: int
    real: int
    late: int
    slow: int
    lowest: int
    highest: int


class Shadow:
    """One fleet.

    Attributes:
        signal, factor: the place of the forecast that it follows, and its headroom.
        constant: replicas that it always has; None: it follows the forecast.
        belief: surprises that it is thought to have met with, before anything was seen.
        ordered: replicas that it pays for.
        proved: late requests up to the spell that goes on, forgetting.
        cost: replica-seconds, forgetting sooner.
    """

    __slots__ = (
        "_coming",
        "_fewer",
        "_fluid",
        "_foreseen",
        "_more",
        "_ready",
        "belief",
        "constant",
        "cost",
        "factor",
        "ordered",
        "proved",
        "signal",
    )

    def __init__(self, signal: int, factor: float, constant: int | None = None) -> None:
        self.signal = signal
        self.factor = factor
        self.constant = constant
        self.belief = 1.0
        self.ordered = self._ready = 0
        self.proved = self.cost = 0.0
        self._foreseen = 0.0  # late in this spell, by the fluid
        self._more = self._fewer = True  # than the real fleet, or as many, all through this spell
        self._fluid = Fluid()
        self._coming: deque[tuple[float, int]] = deque()

    def need(self, look: Look) -> int:
        if self.constant is not None:
            return min(max(self.constant, look.lowest), look.highest)
        work = self.factor * look.demands[self.signal] / (look.most_work * look.efficiency)
        need = math.ceil(work - 1e-6)
        if need < self.ordered:
            need = min(math.ceil(work * LOOSE - 1e-6), self.ordered)
        return min(max(need, look.lowest), look.highest)

    def start(self, look: Look, found: int) -> None:
        """Begin with what it needs, as if it had been there."""
        self.ordered = self._ready = self.need(look)
        self.cost = float(self.ordered)
        if self.constant is None:
            self.belief = 1.5 + 5 * math.exp(-(self.factor - 1) / 0.35)
            return
        bears = found * look.most_work >= look.mean
        enough = found if bears else AMPLE * look.mean / look.most_work
        self.belief = FEWER if self.constant < enough else FOUND if bears else GUESSED

    def advance(self, look: Look, promise: Promise, keep: float, keep_cost: float) -> None:
        coming = self._coming
        while coming and coming[0][0] <= look.at:
            self._ready += coming.popleft()[1]
        self._fluid.advance(look.flow, self._ready * look.efficiency, look.seconds)
        self.proved *= keep
        self._foreseen = self._foreseen * keep + promise.late(self._fluid) * look.flow.arrivals * look.seconds
        self._more &= self._ready >= look.real
        self._fewer &= self._ready <= look.real
        self.cost = self.cost * keep_cost + self.ordered * look.seconds
        need = self.need(look)
        if need > self.ordered:
            coming.append((look.at + look.horizon, need - self.ordered))
        elif need < self.ordered:
            surplus = self.ordered - need
            while surplus and coming:  # those that load go first
                when, count = coming.pop()
                if count > surplus:
                    coming.append((when, count - surplus))
                    count = surplus
                surplus -= count
            self._ready -= surplus
        self.ordered = need

    def late(self, real: float) -> float:
        """Requests, forgetting. `real` is how many of the real fleet's were late in this spell: with more replicas no
        more would have been, with fewer no fewer."""
        spell = self._foreseen * FORESEEN
        if self._more:
            spell = min(spell, real)
        if self._fewer:
            spell = max(spell, real)
        return self.proved + spell

    def settle(self, real: float) -> None:
        """The spell is over."""
        self.proved = self.late(real)
        self._foreseen, self._more, self._fewer = 0.0, True, True


class Shadows:
    """All of them, and which is followed."""

    def __init__(self, names: Sequence[str], highest: int) -> None:
        """`names` of forecasts; `highest` count that may be asked for."""
        self._all = [Shadow(signal, factor) for signal in range(len(names)) for factor in FACTORS]
        self._all += [Shadow(0, 0.0, count) for count in _counts(highest)]
        self._followed: Shadow | None = None
        self._since = 0.0
        self._believed = 1.0  # share of what was believed that is not forgotten
        self._seconds = 0.0  # forgetting
        self._requests = 0.0  # forgetting
        self._spell = 0.0  # seconds
        self._late = self._slow = self._hopeless = 0.0  # requests of the real fleet in this spell

    def advance(self, look: Look, promise: Promise, found: int, floor: float = 0.0) -> Shadow:
        """The one to follow. `found` is the count of real replicas that there were meant to be at first, `floor` the
        share that is late whatever one does."""
        if self._followed is None:
            for each in self._all:
                each.start(look, found)
        keep, keep_cost = math.exp(-look.seconds / MEMORY), math.exp(-look.seconds / PAID)
        self._believed *= keep
        self._seconds = self._seconds * keep + look.seconds
        self._requests = self._requests * keep + look.flow.arrivals * look.seconds
        if self._spell >= SPELL:
            for each in self._all:
                each.settle(self._real)
            self._spell = self._late = self._slow = self._hopeless = 0.0
        self._spell += look.seconds
        self._late += look.late
        self._slow += look.slow
        self._hopeless += floor * look.flow.arrivals * look.seconds
        for each in self._all:
            each.advance(look, promise, keep, keep_cost)
        return self._choose(look, max(promise.late_share * SAFE - floor, promise.late_share * SAFE / 4))

    @property
    def _real(self) -> float:
        """Requests that were late in this spell and that other replicas could have helped."""
        return max(max(self._late, self._slow) - self._hopeless, 0.0)

    def late_share(self, shadow: Shadow, safe: float, horizon: float) -> float:
        """With what was believed before anything was seen: `belief` surprises, in the time that makes up for one."""
        rate = self._requests / self._seconds if self._seconds else 0.0
        seen = shadow.late(self._real) / rate if rate > 0 else 0.0
        believed = (horizon + AFTERMATH) * self._believed
        return (seen + shadow.belief * believed) / (self._seconds + believed / safe)

    def _choose(self, look: Look, safe: float) -> Shadow:
        def price(shadow: Shadow) -> tuple[bool, float, float]:
            """The good ones first, by their cost; the others by theirs, and by how much is late."""
            share = self.late_share(shadow, safe, look.horizon)
            if share <= safe:
                return False, shadow.cost, share
            return True, shadow.cost * (1 + PENALTY * (share / safe - 1)), share

        best = min(self._all, key=price)
        now = self._followed
        if now is None:
            self._followed, self._since = best, look.at
        elif best is not now:
            (bad, cost, share), (was_bad, was, had) = price(best), price(now)
            safer = was_bad and share < had
            cheaper = bad == was_bad and look.at - self._since >= PATIENCE and cost < CHEAPER * was
            if safer or cheaper:
                self._followed, self._since = best, look.at
        return self._followed or best


def _counts(highest: int) -> Iterator[int]:
    """1, 2, 3 … and from 32 on in steps of a sixteenth."""
    count = 1
    while count <= highest:
        yield count
        count += max(1, count // 16)
