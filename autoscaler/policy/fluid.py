"""A fleet that is not there: what requests would have met with so many replicas, as a fluid.

Per replica r rows decode and a share p of the time goes to prompts; a step takes

    s = (A + r k) / (1 - p)         k = C + D context

and rows leave at r / (out s) a second. That falls short of r / (out A), and never gets above (1 - p) / (out k), which
is what makes a queue. One implicit step, over h seconds, of the rows of all n replicas, with λ arrivals a second,

    R' = R + h (λ - m R' / (K + R'))        m = n (1 - p) / (out k), K = n A / k

has a closed form, stays positive, and is stable however long h is. Prompts come first, as far as the budget of a step
goes; what is left waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoscaler.policy.work import Engine, Mix


@dataclass(frozen=True, slots=True)
class Flow:
    """What arrives in one look, and what it costs: the same for every fleet.

    Attributes:
        arrivals: requests a second.
        prefill: seconds of work a second.
        out, row_seconds: new tokens of a request; seconds of one row in one step (k of the module).
        base: seconds of a step with nothing in it.
        rows: most in one replica.
        step_prefill: seconds that a whole budget of prompt tokens takes in a step.
        own: seconds of prefill of one request.
    """

    arrivals: float
    prefill: float
    out: float
    row_seconds: float
    base: float
    rows: float
    step_prefill: float
    own: float


def flow_of(engine: Engine, mix: Mix, requests: float, prompt_tokens: float) -> Flow:
    budget = engine.step_tokens or 8192
    return Flow(
        arrivals=requests,
        prefill=engine.cost.per_prefill_token * prompt_tokens * (1 - mix.hit_share),
        out=mix.new_tokens,
        row_seconds=max(engine.row_seconds(mix), 1e-9),
        base=max(engine.cost.base, 1e-6),
        rows=min(engine.rows_for(mix), 1e9),
        step_prefill=max(engine.cost.per_prefill_token * budget, 1e-9),
        own=engine.prefill_seconds(mix),
    )


class Fluid:
    """The requests in a fleet.

    Attributes:
        rows: that decode, or would if there were room.
        prompts: seconds of prefill that wait.
        step: seconds between two tokens, as those see it who finish now.
        wait: seconds that one who arrives now waits for its prompt to be started.
    """

    __slots__ = ("prompts", "rows", "step", "wait")

    def __init__(self) -> None:
        self.rows = self.prompts = self.step = self.wait = 0.0

    def advance(self, flow: Flow, replicas: float, seconds: float) -> None:
        if replicas <= 0:
            self.rows += flow.arrivals * seconds
            self.prompts += flow.prefill * seconds
            self.wait += seconds
            return
        inside = min(self.rows / replicas, flow.rows)
        wanted = self.prompts / seconds + flow.prefill
        most = flow.step_prefill / (flow.step_prefill + flow.base + inside * flow.row_seconds) * 0.98 * replicas
        done = min(wanted, most)
        self.prompts = (wanted - done) * seconds
        started = (done / wanted) * flow.arrivals if wanted > 0 else flow.arrivals
        free = 1 - done / replicas
        serve = replicas * free / (flow.out * flow.row_seconds) * seconds
        half = replicas * flow.base / flow.row_seconds
        total = self.rows + started * seconds
        middle = total - half - serve
        self.rows = (middle + math.sqrt(middle * middle + 4 * total * half)) / 2
        room = flow.rows * replicas
        inside = min(self.rows, room) / replicas
        step = (flow.base + inside * flow.row_seconds) / free
        self.step += (step - self.step) * -math.expm1(-seconds / (flow.out * step))
        self.wait = self.prompts / most
        if self.rows > room:
            self.wait += (self.rows - room) * flow.out * step / room
