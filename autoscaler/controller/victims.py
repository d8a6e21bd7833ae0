"""Which replicas go when there are to be fewer. Pure.

First what serves nobody, then what drains already, then the idlest: so it is never the busiest that goes while another
stays. Among those that serve nobody the order is the one in which a ReplicaSet deletes pods (no node, no container, not
ready), as that looks at `pod-deletion-cost` only among pods of the same state: what is chosen here is what goes there.
A StatefulSet takes the highest ordinals, and there is nothing to choose.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from autoscaler.fleet import Phase, Replica

ORDER = (Phase.PENDING, Phase.STARTING, Phase.FAILED, Phase.LOADING, Phase.DRAINING, Phase.READY)
SERVING = (Phase.READY, Phase.DRAINING)  # may have requests
BUSY = (1, 0, 0, 0)


def choose(
    replicas: Sequence[Replica],
    count: int,
    *,
    fresh_since: float,
    ordered: bool = False,
    unready: Collection[str] = (),
) -> list[Replica]:
    """`count` of them, whoever goes first is first.

    Args:
        fresh_since: Unix seconds; a load that was seen before is not known any more, and counts as the busiest.
        ordered: they go by their ordinals.
        unready: names of pods that are not ready, whatever their servers say. Such a one that serves gets nothing new,
            and a ReplicaSet deletes it before all that are ready: so it drains before them.
    """
    if count <= 0:
        return []
    if ordered:
        return sorted(replicas, key=lambda each: ordinal(each.name), reverse=True)[:count]

    def order(each: Replica) -> tuple[int, bool, tuple[int, int, int, int], float]:
        cut_off = each.phase in SERVING and each.name in unready
        phase = Phase.DRAINING if cut_off else each.phase
        return ORDER.index(phase), not cut_off, _work(each, fresh_since), -each.created_at

    return sorted(replicas, key=order)[:count]


def drained(replica: Replica, since: float) -> bool:
    """Nothing that it accepted is left, by a look later than `since` (Unix seconds)."""
    if replica.phase not in SERVING:
        return True
    load = replica.load
    return load is not None and replica.observed_at >= since and not load.running_requests + load.queued_requests


def ordinal(name: str) -> int:
    """The number that a StatefulSet gave this pod; -1 for a name without one."""
    number = name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _work(replica: Replica, fresh_since: float) -> tuple[int, int, int, int]:
    load = replica.load
    if load is None or replica.observed_at < fresh_since:
        return BUSY
    return (0, load.running_requests + load.queued_requests, load.queued_tokens, load.kv_pages_used)
