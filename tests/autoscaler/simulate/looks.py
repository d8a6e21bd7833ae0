"""Looks at made-up workloads, for tests of policies."""

from __future__ import annotations

from collections.abc import Sequence

from autoscaler.fleet import Counters, Load, Observation, Phase, Replica, StepCost

COST = StepCost(base=0.006, per_prefill_token=3e-5, per_decode_row=2.5e-5, per_context_token=6.5e-8)


def load(
    queued: int = 0,
    running: int = 0,
    *,
    queued_tokens: int = 0,
    kv_tokens: int = 0,
    counters: Counters | None = None,
    cost: StepCost = COST,
) -> Load:
    """Of an engine with 20 000 pages of 16 tokens, 256 rows, and steps of up to 4096 tokens."""
    return Load(
        queued_requests=queued,
        queued_tokens=queued_tokens,
        running_requests=running,
        capacity=256,
        kv_pages_used=kv_tokens // 16,
        kv_pages_total=20_000,
        kv_page_tokens=16,
        max_step_tokens=4096,
        step_cost=cost,
        counters=counters or Counters(),
    )


def look(
    at: float,
    loads: Sequence[Load | None],
    *,
    desired: int | None = None,
    pending: int = 0,
    loading: int = 0,
    draining: int = 0,
    held: int = 0,
) -> Observation:
    """Ready replicas with these loads (None: does not answer), and others; desired is what there is unless told."""
    replicas = [Replica(f"r{place}", Phase.READY, 0.0, each, at, ready_at=0.0) for place, each in enumerate(loads)]
    for phase, count in ((Phase.PENDING, pending), (Phase.LOADING, loading), (Phase.DRAINING, draining)):
        replicas += [Replica(f"{phase.value}{place}", phase, at) for place in range(count)]
    if desired is None:
        desired = len(loads) + pending + loading
    return Observation(at, desired, tuple(replicas), held_requests=held)
