"""Load in seconds of engine time: what a request costs, and how much of it one replica can take.

A step takes A + B p + C d + D c seconds (`StepCost`). A request of `in` prompt tokens, of which a share `hit` is in the
prefix cache, and of `out` new tokens adds

    w = B in (1 - hit) + out (C + D (in + out / 2))

seconds to the steps that it takes part in; A is shared by all who are in a step. A replica that gets u seconds of work
per second spends the share u of its time on it and the rest on A, so that a step takes

    s = A / (1 - u)                                                     (Little's law: rows = rate · out · s)

which is the time between two tokens. The promise on that time therefore gives the most work that a replica can take:

    u* = 1 - A / itl

Rows and KV pages bound it too. In rows · w / (out · s) seconds of work per second all rows are in use; with
s = A / (1 - u) that is u = r / (1 + r) where r = rows · w / (out · A). The smallest of the three is what a replica can
take.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from autoscaler.fleet import Load, StepCost

MOST = 0.95  # of its time that a replica may work: above, a queue grows from nothing but chance
LEAST = 0.3  # where one request alone is slower than the promise, replicas cannot help: be useful, at least


@dataclass(frozen=True, slots=True)
class Mix:
    """The mean request, and what of it is computed."""

    prompt_tokens: float
    new_tokens: float
    hit_share: float = 0.0

    @property
    def context(self) -> float:
        """Mean tokens that a row attends to."""
        return self.prompt_tokens + self.new_tokens / 2


@dataclass(frozen=True, slots=True)
class Engine:
    """What a replica is.

    Attributes:
        rows: most requests that run at the same time; 0: not known.
        kv_tokens: that its pages hold; 0: not known.
        step_tokens: budget of a step; 0: not known.
    """

    cost: StepCost
    rows: int = 0
    kv_tokens: int = 0
    step_tokens: int = 0

    def row_seconds(self, mix: Mix) -> float:
        """Of one row in one step."""
        return self.cost.per_decode_row + self.cost.per_context_token * mix.context

    def prefill_seconds(self, mix: Mix) -> float:
        return self.cost.per_prefill_token * mix.prompt_tokens * (1 - mix.hit_share)

    def request_seconds(self, mix: Mix) -> float:
        """w of the module."""
        return self.prefill_seconds(mix) + mix.new_tokens * self.row_seconds(mix)

    def rows_for(self, mix: Mix) -> float:
        """Rows of this mix that fit, by count and by KV pages; infinite where neither is known."""
        rows = float(self.rows) if self.rows else math.inf
        if self.kv_tokens:
            rows = min(rows, 0.95 * self.kv_tokens / max(mix.context, 1.0))
        return max(rows, 1.0)

    def most_work(self, mix: Mix, itl_seconds: float) -> float:
        """Seconds of work per second that one replica can take and keep the promise."""
        most = min(max(1 - self.cost.base / itl_seconds, LEAST), MOST)
        rows = self.rows_for(mix)
        if math.isfinite(rows) and self.cost.base > 0 and mix.new_tokens > 0:
            ratio = rows * self.request_seconds(mix) / (mix.new_tokens * self.cost.base)
            most = min(most, ratio / (1 + ratio))
        return most


class Calibration:
    """How much longer steps take than their costs say: the fit of an engine may be of other times, or of another mix.

    Rows that were in the batch, over the tokens that they got, are the time of a step, whatever is said of it.
    """

    MEMORY = 600.0  # seconds after which what was seen has lost 63 % of its weight
    PRIOR = 1000.0  # seconds of rows that the costs themselves are worth
    LEAST, MOST = 0.5, 2.0

    def __init__(self) -> None:
        self._took = self._expected = self.PRIOR

    @property
    def factor(self) -> float:
        return min(max(self._took / self._expected, self.LEAST), self.MOST)

    def add(self, engine: Engine, mix: Mix, prefill: float, rows: float, tokens: float, seconds: float) -> None:
        """Of one replica on average. `prefill` is seconds of work per second by the costs as they are said, `rows` and
        `tokens` are those of this time."""
        fade = 1 - math.exp(-seconds / self.MEMORY)
        self._took += (self.PRIOR - self._took) * fade
        self._expected += (self.PRIOR - self._expected) * fade
        free = 1 - prefill * self.factor
        if rows > 0 and tokens > 0 and free > 0.1:
            step = (engine.cost.base + rows * engine.row_seconds(mix)) / free
            self._took += rows * seconds
            self._expected += tokens * step


def scaled(engine: Engine, factor: float) -> Engine:
    """One whose steps take that many times as long."""
    cost = engine.cost
    return replace(
        engine,
        cost=StepCost(
            cost.base * factor,
            cost.per_prefill_token * factor,
            cost.per_decode_row * factor,
            cost.per_context_token * factor,
        ),
    )


def engine_of(loads: Iterable[Load]) -> Engine | None:
    """The middle one of replicas that know what their steps cost; None while there is none.

    Figures that cannot be (negative, infinite, NaN) count as not known.
    """
    known = [load for load in loads if _possible(load.step_cost)]
    if not known:
        return None
    costs = [load.step_cost for load in known]
    return Engine(
        cost=StepCost(
            base=median(cost.base for cost in costs),
            per_prefill_token=median(cost.per_prefill_token for cost in costs),
            per_decode_row=median(cost.per_decode_row for cost in costs),
            per_context_token=median(cost.per_context_token for cost in costs),
        ),
        rows=int(median(load.capacity for load in known)),
        kv_tokens=int(median(load.kv_pages_total * load.kv_page_tokens for load in known)),
        step_tokens=int(median(load.max_step_tokens for load in known)),
    )


def _possible(cost: StepCost) -> bool:
    terms = (cost.base, cost.per_prefill_token, cost.per_decode_row, cost.per_context_token)
    return all(math.isfinite(term) and term >= 0 for term in terms) and sum(terms[1:]) > 0
