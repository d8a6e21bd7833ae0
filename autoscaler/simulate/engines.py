"""The engines of a simulated fleet: slots of the kernel's arrays, and the requests that they serve.

A slot is taken when a replica becomes ready and given back when it is gone or crashed. Requests that no engine takes
wait here, in the order of their arrival, those that a crash put back before all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

import autoscaler.simulate.kernel as kernel
from autoscaler.fleet import Counters, Load, StepCost
from autoscaler.simulate.curve import Curve
from autoscaler.simulate.options import Slo
from autoscaler.simulate.records import REPLICA, SHAPE, clear, new_requests
from autoscaler.simulate.traces import Trace

PAGE_TOKENS = 16
ALL_UP_TO = 32  # replicas that a request compares when nothing else is asked for, and how many of more
SOME = 4
COUNTERS = tuple(Counters.__dataclass_fields__)


class Engines:
    def __init__(self, trace: Trace, curve: Curve, slo: Slo, choices: int | None, seed: int) -> None:
        longest = int((trace.input_tokens + trace.output_tokens).max())
        if longest > curve.kv_tokens:
            raise ValueError(f"{trace.name}: a request of {longest} tokens; {curve.name} has KV for {curve.kv_tokens}")
        columns = trace.arrival_s, trace.input_tokens, trace.cached_tokens, trace.output_tokens
        self.requests = new_requests(*columns)
        self.now = 0.0
        self._preemptions = 0  # of engines that are closed
        self._curve, self._choices = curve, choices
        cost = curve.step_cost
        limits = curve.max_batch_size, curve.max_step_tokens, curve.kv_tokens, slo.ttft_seconds, slo.itl_seconds
        costs = cost.base, cost.per_prefill_token, cost.per_decode_row, cost.per_context_token
        self._shape = np.array([(*costs, *limits)], SHAPE)[0]
        self._random = np.array([seed], np.uint64)
        self._first = 0  # that nobody took yet
        self._put_back: list[int] = []
        self._accepting = np.zeros(0, np.int64)
        self._free: list[int] = []
        self._replicas, self._heaps = np.zeros(0, REPLICA), np.zeros((0, curve.max_batch_size), np.int64)

    # -- slots ---------------------------------------------------------------------------------------------------

    def open(self) -> int:
        """A slot with an engine that is idle and does not accept yet."""
        if not self._free:
            count = len(self._replicas)
            more = max(count, 8)
            self._replicas = np.concatenate([self._replicas, np.zeros(more, REPLICA)])
            self._heaps = np.concatenate([self._heaps, np.zeros((more, self._curve.max_batch_size), np.int64)])
            self._free.extend(reversed(range(count, count + more)))
        slot = self._free.pop()
        clear(self._replicas, slot, self.now)
        return slot

    def close(self, slot: int) -> Any:
        """Requests that the engine did not finish, in the order that they came to it. It accepts no more already."""
        out = np.zeros(max(int(self._replicas["outstanding"][slot]), 1), np.int64)
        count = kernel.evict(self.requests, self._replicas, self._heaps, slot, out)
        self._preemptions += int(self._replicas["preemptions"][slot])
        clear(self._replicas, slot, self.now)
        self._free.append(slot)
        out = out[:count]
        return out[np.argsort(self.requests["enqueued"][out], kind="stable")]

    def accept(self, slots: Sequence[int]) -> None:
        """From now on these get what arrives."""
        self._accepting = np.array(slots, np.int64)
        waiting, self._put_back = self._put_back, []
        self.put_back(waiting)

    def put_back(self, requests: Sequence[int]) -> None:
        """To whoever accepts now, or to wait for one."""
        for which in requests:
            if len(self._accepting):
                slot = kernel.least_outstanding(*self._state, self._accepting, self._fan_out, self._random, self.now)
                kernel.advance(*self._state, slot, self.now)
                kernel.push(self.requests, self._replicas, slot, which, self.now)
            else:
                self._put_back.append(int(which))

    def lose(self, requests: Any) -> None:
        self.requests["state"][requests] = kernel.LOST
        self.requests["finished"][requests] = self.now

    # -- time ----------------------------------------------------------------------------------------------------

    def run_to(self, until: float) -> None:
        """Hand out what arrives before that time."""
        state = self._state
        self._first = kernel.dispatch(
            *state, self._accepting, self._fan_out, self._random, self._first, self.now, until
        )
        self.now = until

    def look(self, slots: Sequence[int]) -> None:
        """Bring these up to now."""
        kernel.advance_all(*self._state, np.array(slots, np.int64), self.now)

    @property
    def _state(self) -> tuple[Any, Any, Any, Any]:
        return self.requests, self._replicas, self._heaps, self._shape

    @property
    def _fan_out(self) -> int:
        count = len(self._accepting)
        return self._choices or (count if count <= ALL_UP_TO else SOME)

    # -- what they say -------------------------------------------------------------------------------------------

    def outstanding(self, slots: Sequence[int]) -> list[int]:
        return list(self._replicas["outstanding"][np.array(slots, np.int64)].tolist())

    @property
    def preemptions(self) -> int:
        return self._preemptions + int(self._replicas["preemptions"].sum())

    def clock(self, slot: int) -> float:
        """When its latest step ended."""
        return float(self._replicas["clock"][slot])

    def waiting(self) -> tuple[int, float]:
        """How many requests no engine took yet, and when the oldest of them arrived (now, if there is none)."""
        arrived = int(np.searchsorted(self.requests["arrival"], self.now))
        oldest = self.requests["arrival"][self._first] if arrived > self._first else self.now
        for which in self._put_back:
            oldest = min(oldest, self.requests["arrival"][which])
        return arrived - self._first + len(self._put_back), float(oldest)

    def loads(self, slots: Sequence[int], cost: StepCost) -> list[Load]:
        """What engines that were brought up to now report, `cost` as theirs."""
        some = self._replicas[np.array(slots, np.int64)]
        computing = some["prompt"] != kernel.NONE
        held = (
            some["context"] + some["joining_tokens"] + np.where(computing, some["prompt_size"] - some["prompt_left"], 0)
        )
        oldest = np.where(some["queued"] > 0, self.now - self.requests["enqueued"][some["head"]], 0.0)
        limits = self._curve.max_batch_size, -(-self._curve.kv_tokens // PAGE_TOKENS), PAGE_TOKENS
        counters = zip(*(some[name].tolist() for name in COUNTERS), strict=True)
        figures = zip(
            some["queued"].tolist(),
            some["queued_tokens"].tolist(),
            oldest.tolist(),
            (some["outstanding"] - some["queued"]).tolist(),
            (-(-held // PAGE_TOKENS)).tolist(),
            counters,
            strict=True,
        )
        capacity, pages, page = limits
        budget = self._curve.max_step_tokens
        return [
            Load(queued, tokens, age, running, capacity, used, pages, page, budget, cost, Counters(*counts))
            for queued, tokens, age, running, used, counts in figures
        ]
