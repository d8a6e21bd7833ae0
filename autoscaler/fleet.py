"""What is seen of a workload at one moment: its replicas, their load, and what waits for the first of them.

Times are Unix seconds of one clock, durations are seconds. Counters grow from the start of a replica's engine: a look
that is missed loses nothing, and a counter that shrinks is one of an engine that started anew.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Phase(enum.Enum):
    """Of a replica, in the order of its life."""

    PENDING = "pending"  # no node has it yet
    STARTING = "starting"  # on a node, and its server does not answer yet: image, volumes, process
    LOADING = "loading"  # its server answers and has no model yet
    READY = "ready"
    DRAINING = "draining"  # finishes what it accepted, takes nothing new
    FAILED = "failed"  # and comes by no waiting: its container cannot run, or ends again and again


@dataclass(frozen=True, slots=True)
class StepCost:
    """A step of the engine takes base + per_prefill_token · p + per_decode_row · d + per_context_token · c seconds to
    compute p tokens of prompts and one token of each of d requests, where all of them attend to c tokens (`Load` of
    nemoserve/v1/generation.proto). All 0: not known."""

    base: float = 0.0
    per_prefill_token: float = 0.0
    per_decode_row: float = 0.0
    per_context_token: float = 0.0


@dataclass(frozen=True, slots=True)
class Counters:
    """Of one engine since it started."""

    arrived_requests: int = 0
    arrived_prompt_tokens: int = 0  # of those
    finished_requests: int = 0  # for whatever reason
    computed_prompt_tokens: int = 0  # without those that the prefix cache had
    cached_prompt_tokens: int = 0  # those that it had
    generated_tokens: int = 0
    first_tokens: int = 0  # requests that had their first token
    late_first_tokens: int = 0  # of those, the ones that waited longer for it than the target says
    slow_requests: int = 0  # of the finished ones, those whose mean time between tokens was longer than the target says


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica says of itself."""

    queued_requests: int = 0
    queued_tokens: int = 0  # prompt tokens that are not computed yet
    oldest_queued_seconds: float = 0.0
    running_requests: int = 0
    capacity: int = 0  # most requests that run at the same time; 0: not known
    kv_pages_used: int = 0
    kv_pages_total: int = 0
    kv_page_tokens: int = 0  # tokens that a page holds; 0: not known
    max_step_tokens: int = 0  # token budget of a step; 0: not known
    step_cost: StepCost = field(default_factory=StepCost)
    counters: Counters = field(default_factory=Counters)


@dataclass(frozen=True, slots=True)
class Replica:
    name: str
    phase: Phase
    created_at: float
    # When `load` was true. A replica that did not answer keeps its last load, which grows old.
    load: Load | None = None
    observed_at: float = 0.0
    ready_at: float | None = None  # when it became ready first; `created_at` where it was, and nobody saw when
    unschedulable_since: float | None = None  # no node has room for it
    eta_seconds: float | None = None  # until it is ready, as it says itself while it loads


@dataclass(frozen=True, slots=True)
class Observation:
    at: float
    desired: int  # replicas that the workload is asked for now: spec.replicas of its scale
    replicas: tuple[Replica, ...] = ()
    # Requests that wait for the first replica, in the activator
    held_requests: int = 0
    oldest_held_seconds: float = 0.0

    def in_phase(self, *phases: Phase) -> tuple[Replica, ...]:
        return tuple(each for each in self.replicas if each.phase in phases)
