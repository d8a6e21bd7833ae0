"""How long a replica takes to come: learnt from those that came, and the horizon that everything else looks ahead."""

from __future__ import annotations

from collections import deque

from autoscaler.fleet import Phase, Replica

UNKNOWN = 120.0  # seconds, until one has come
FASTEST = 1.0  # what is ready at once was not started: somebody made it up, or adopted it
NODE = 300.0  # seconds that a node may take to come; what waits longer waits for want of one
REMEMBERED = 30
QUANTILE = 0.9


class ColdStart:
    """Quantiles of created → ready, without what goes beyond `NODE` of the time that no node had room.

    The first starts that are seen may be those of before this policy: times of creation and readiness are facts of the
    replicas, so that nothing is lost by a restart.
    """

    def __init__(self) -> None:
        self._taken: deque[float] = deque(maxlen=REMEMBERED)
        self._known: dict[str, float] = {}  # names of the ready, so that each counts once
        self._waited: dict[str, float] = {}  # seconds that no node had room, by name

    def observe(self, at: float, replicas: tuple[Replica, ...]) -> None:
        present = {each.name: each for each in replicas}
        for name in [name for name in self._known if name not in present]:
            del self._known[name]
        self._waited = {name: seconds for name, seconds in self._waited.items() if name in present}
        for each in replicas:
            if each.unschedulable_since is not None:
                self._waited[each.name] = max(at - each.created_at, 0.0)
            if each.ready_at is not None and each.name not in self._known:
                self._known[each.name] = each.ready_at
                taken = each.ready_at - each.created_at - max(self._waited.get(each.name, 0.0) - NODE, 0.0)
                if taken >= FASTEST:
                    self._taken.append(taken)

    @property
    def seconds(self) -> float | None:
        """What nine of ten stay below; None until one has come."""
        if not self._taken:
            return None
        ordered = sorted(self._taken)
        return ordered[min(int(QUANTILE * len(ordered)), len(ordered) - 1)]

    def horizon(self, at: float, replicas: tuple[Replica, ...]) -> float:
        """Seconds until a replica that is asked for now is ready.

        One that takes longer than all before says that they do take longer.
        """
        horizon = UNKNOWN if self.seconds is None else self.seconds
        for each in replicas:
            if each.phase in (Phase.STARTING, Phase.LOADING) and each.ready_at is None:
                horizon = max(horizon, self._age(at, each) + (each.eta_seconds or 0.0))
        return horizon

    def remaining(self, at: float, replica: Replica) -> float:
        """Seconds until this one is ready: what it says itself, else what others took."""
        if replica.eta_seconds is not None:
            return max(replica.eta_seconds, 0.0)
        expected = UNKNOWN if self.seconds is None else self.seconds
        if replica.ready_at is not None:  # and loads anew: nothing tells since when
            return expected
        age = self._age(at, replica)
        return max(expected - age, 0.1 * age, 1.0)

    def _age(self, at: float, replica: Replica) -> float:
        return max(at - replica.created_at - max(self._waited.get(replica.name, 0.0) - NODE, 0.0), 0.0)
