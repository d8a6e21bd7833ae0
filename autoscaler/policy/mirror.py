"""What a real replica is worth beside one of the fluid, learnt from what real requests meet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoscaler.policy.fluid import Fluid
from autoscaler.policy.forecast import Smoothed
from autoscaler.policy.shadows import Look, Promise


class Mirror:
    """The shadow of the real fleet: what is late there, and is not here, is what the fluid does not know.

    Requests come in bursts within a look, prompts hold up the rows beside them, balancers do not balance. All of that
    makes a replica of the fluid worth more than a real one; `efficiency` is what a real one is worth, learnt so that
    as many are late here as there while there is more to do than usual. What is late while there is less to do than
    usual more replicas would not help: that is the `floor`, up to a limit, lest want of replicas is taken for it.
    """

    LEAST, MOST = 0.2, 1.08
    HARMLESS = 0.6  # of the share that may be late: below it nothing is learnt
    HIGHEST_FLOOR = 0.4  # of the share that may be late
    SECONDS = 4 * 3600.0  # in which efficiency changes e-fold if all is wrong: one bad hour is not what a replica is
    FORGETS = 6 * 3600.0  # in which it comes back to 1 by itself: with nobody late there is nothing to learn from
    # Over these seconds late requests are compared: the fluid's are late when they come, real ones when they go
    SMOOTH = 600.0
    USUAL = 3600.0  # seconds that make up what is usual

    def __init__(self) -> None:
        self.floor = 0.0  # share
        self._fluid = Fluid()
        self._log = 0.0
        self._usual = Smoothed(self.USUAL)
        self._low, self._high = _Tally(), _Tally()

    @property
    def efficiency(self) -> float:
        return math.exp(self._log)

    def advance(self, look: Look, promise: Promise) -> None:
        self._fluid.advance(look.flow, look.ready * self.efficiency, look.seconds)
        came = look.flow.arrivals * look.seconds
        busy = look.demands[0] / max(look.ready, 1)
        high = busy >= self._usual.add(busy, look.seconds)
        tally = self._high if high else self._low
        for each in (self._low, self._high):
            each.fade(math.exp(-look.seconds / self.SMOOTH))
        tally.add(came, look.late, look.slow, promise.late(self._fluid) * came)
        if not tally.came:
            return
        seen, expected = max(tally.late, tally.slow) / tally.came, tally.expected / tally.came + self.floor
        if high:
            allowed = promise.late_share * self.HARMLESS
            seen, expected = max(seen, allowed), max(expected, allowed)
            error = (seen - expected) / max(seen, expected)
            self._log -= error * look.seconds / self.SECONDS + self._log * look.seconds / self.FORGETS
            self._log = min(max(self._log, math.log(self.LEAST)), math.log(self.MOST))
        else:
            self.floor += (seen - expected) * look.seconds / self.SECONDS
            self.floor = min(max(self.floor, 0.0), self.HIGHEST_FLOOR * promise.late_share)


@dataclass(slots=True)
class _Tally:
    """Requests, forgetting: that came, that were late or slow (many are both), that were expected to be."""

    came: float = 0.0
    late: float = 0.0
    slow: float = 0.0
    expected: float = 0.0

    def fade(self, keep: float) -> None:
        self.came *= keep
        self.late *= keep
        self.slow *= keep
        self.expected *= keep

    def add(self, came: float, late: float, slow: float, expected: float) -> None:
        self.came += came
        self.late += late
        self.slow += slow
        self.expected += expected
