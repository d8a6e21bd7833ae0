"""Rules that need no step costs: for who wants one that fits in a sentence, and until an engine has told its costs.

By queue:  as many as its tokens need at so many each, and as the requests that run need, at 80 % of their slots.
By slots:  as many as the requests that run and wait need, at 70 % of their slots.

The requests that run count in both: a rule that looks at the queue alone takes away the replicas that keep it empty.
Replicas that load are among those that these rules ask for, so that waiting for them asks for no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from autoscaler.fleet import Load

QUEUE_SLOTS, SLOTS = 0.8, 0.7


def by_queue(loads: Sequence[Load], tokens_each: int) -> tuple[int, str]:
    tokens = sum(load.queued_tokens for load in loads)
    running = sum(load.running_requests for load in loads)
    slots = _slots(loads)
    need = math.ceil(tokens / tokens_each + (running / (QUEUE_SLOTS * slots) if slots else 0.0))
    return need, f"{tokens} queued tokens at {tokens_each} each, {running} running"


def by_slots(loads: Sequence[Load]) -> tuple[int, str] | None:
    """None: nobody says how many requests run at the same time."""
    slots = _slots(loads)
    if not slots:
        return None
    requests = sum(load.running_requests + load.queued_requests for load in loads)
    return math.ceil(requests / (SLOTS * slots)), f"{requests} requests at {SLOTS * slots:.0f} each, step costs unknown"


def _slots(loads: Sequence[Load]) -> float:
    known = [load.capacity for load in loads if load.capacity > 0]
    return float(median(known)) if known else 0.0
