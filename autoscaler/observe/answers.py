"""An answer of a server, in the words of `autoscaler.fleet`, checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from nemoserve.v1 import generation_pb2 as pb

from autoscaler.fleet import Counters, Load, Phase, StepCost

LARGEST = 2.0**53  # of any number: beyond it not all integers are floats, and nothing here comes near
MAX_BUCKETS = 256
PHASES = {
    pb.PHASE_LOADING: Phase.LOADING,
    pb.PHASE_READY: Phase.READY,
    pb.PHASE_DRAINING: Phase.DRAINING,
    pb.PHASE_FAILED: Phase.FAILED,
    pb.PHASE_UNLOADED: Phase.FAILED,  # by somebody's order: it will serve nobody, however long one waits
}


class BrokenAnswerError(Exception):
    """It makes no sense. The message names the field and its value."""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long something took: `counts[i]` times at most `bounds[i]` seconds, and more than the bound before; the last
    of `counts`, which has one more, longer than all. Nothing is known of a server without buckets."""

    bounds: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()

    def longer_than(self, seconds: float) -> int:
        """As if they lay evenly within their bucket; all above the last bound are longer than any time."""
        if not self.counts:
            return 0
        late, low = float(self.counts[-1]), 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if bound > seconds:
                late += count * (bound - max(low, seconds)) / (bound - low)
            low = bound
        return round(late)


@dataclass(frozen=True, slots=True)
class Answer:
    """Attributes:
    load: without `late_first_tokens` and `slow_requests`, which depend on what is promised.
    phase: None: it does not say.
    eta_seconds: until it is ready; None: it is, or does not say.
    """

    load: Load
    phase: Phase | None = None
    eta_seconds: float | None = None
    waits: Waits = field(default_factory=Waits)  # for first tokens
    gaps: Waits = field(default_factory=Waits)  # between the tokens of a request, its mean


def read_load(load: pb.Load) -> Answer:
    """Raises BrokenAnswerError."""
    for each, value in load.ListFields():
        if isinstance(value, int | float):
            check(each.name, value)
    phase = PHASES.get(load.phase)
    waits, gaps = (
        read_waits(each.bounds, each.counts) for each in (load.time_to_first_token, load.time_per_output_token)
    )
    return Answer(
        load=Load(
            queued_requests=load.queued_requests,
            queued_tokens=load.queued_tokens,
            oldest_queued_seconds=load.oldest_queued_seconds,
            running_requests=load.running_requests,
            capacity=load.capacity,
            kv_pages_used=load.kv_pages_used,
            kv_pages_total=load.kv_pages_total,
            kv_page_tokens=load.kv_page_tokens,
            max_step_tokens=load.max_step_tokens,
            step_cost=StepCost(
                load.step_base_seconds,
                load.seconds_per_prefill_token,
                load.seconds_per_decode_row,
                load.seconds_per_context_token,
            ),
            counters=Counters(
                arrived_requests=load.arrived_requests,
                arrived_prompt_tokens=load.arrived_prompt_tokens,
                finished_requests=load.finished_requests,
                computed_prompt_tokens=load.prompt_tokens,
                cached_prompt_tokens=load.prefix_cache_hit_tokens,
                generated_tokens=load.generated_tokens,
                first_tokens=sum(waits.counts),
            ),
        ),
        phase=phase,
        eta_seconds=load.eta_seconds or None if phase is Phase.LOADING else None,
        waits=waits,
        gaps=gaps,
    )


def read_waits(bounds: Sequence[float], counts: Sequence[int]) -> Waits:
    """Raises BrokenAnswerError."""
    if not counts and not bounds:
        return Waits()
    if len(counts) != len(bounds) + 1 or len(counts) > MAX_BUCKETS:
        raise BrokenAnswerError(f"a histogram has {len(bounds)} bounds and {len(counts)} counts")
    for value in (*bounds, *counts):
        check("histogram", value)
    if any(low >= high for low, high in pairwise((0.0, *bounds))):
        raise BrokenAnswerError("the bounds of a histogram do not ascend")
    return Waits(tuple(bounds), tuple(counts))


def check(name: str, value: float) -> None:
    """Raises BrokenAnswerError for what is no number of anything."""
    if not (math.isfinite(value) and 0 <= value <= LARGEST):
        raise BrokenAnswerError(f"{name} is {value!r}, must be from 0 to {LARGEST:g}")


class Totals:
    """Counters of one replica that do not shrink when its engine or its server starts anew, each with its own from 0:
    who compares two looks finds what has happened in between."""

    def __init__(self) -> None:
        self._server, self._engine = _Sums(), _Sums()

    def add(self, answer: Answer) -> tuple[Counters, Waits, Waits]:
        """Of all answers until now, in their order; how long first tokens took, and the others."""
        told, waits, gaps = answer.load.counters, answer.waits, answer.gaps
        arrived, prompts, finished, *rest = self._server.add(
            (told.arrived_requests, told.arrived_prompt_tokens, told.finished_requests, *waits.counts, *gaps.counts)
        )
        waited, between = tuple(rest[: len(waits.counts)]), tuple(rest[len(waits.counts) :])
        computed, cached, generated = self._engine.add(
            (told.computed_prompt_tokens, told.cached_prompt_tokens, told.generated_tokens)
        )
        counters = Counters(arrived, prompts, finished, computed, cached, generated, first_tokens=sum(waited))
        return counters, Waits(waits.bounds, waited), Waits(gaps.bounds, between)


class _Sums:
    """Of counters that start anew together."""

    def __init__(self) -> None:
        self._last: tuple[int, ...] = ()
        self._sums: tuple[int, ...] = ()

    def add(self, values: tuple[int, ...]) -> tuple[int, ...]:
        if len(values) != len(self._last):  # another program: nothing can be compared
            self._sums = values
        elif any(new < old for new, old in zip(values, self._last, strict=True)):
            self._sums = tuple(map(operator.add, self._sums, values))
        else:
            self._sums = tuple(s + new - old for s, new, old in zip(self._sums, values, self._last, strict=True))
        self._last = values
        return self._sums
