"""What arrives, from the counters of replicas that come, go, start anew and fall silent; and what the mean request is.

A rate of a replica is a difference of counters over the time between their samples: a look that is missed loses nothing
and a late one tells no lie. Between samples a replica keeps its latest rates. One whose sample is older than
`STALE_LOOKS` looks is silent: it has no rate, and who decides must not take that for the absence of load.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoscaler.fleet import Counters, Load, Observation, Phase, Replica
from autoscaler.policy.work import Mix

STALE_LOOKS = 3
MEMORY = 90.0  # seconds after which what requests were like has lost 63 % of its weight
ENOUGH = 300.0  # unless there were fewer of them than this
UNSEEN_TOKENS = 200.0  # new tokens of a request, until some have finished
UNSEEN_WEIGHT = 10.0  # requests that this guess counts as


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of one look.

    Attributes:
        seconds: since the look before; 0 on the first.
        requests: a second.
        prompt_tokens: a second, cached ones included.
        mix: mean request of the last minutes.
        silent: names of replicas that serve and do not say how much.
        heard: replicas that serve and say how much.
        ended: requests that ended since the look before.
        late: requests that had their first token since then, and had it too late.
        slow: of those that ended, the ones that had their tokens too slowly.
        tokens: that were generated since then.
        computed: tokens of prompts that were computed since then.
        row_seconds: that requests were in the batch since then, one with the next.
    """

    seconds: float
    requests: float
    prompt_tokens: float
    mix: Mix
    silent: frozenset[str] = frozenset()
    heard: tuple[Replica, ...] = ()
    ended: int = 0
    late: int = 0
    slow: int = 0
    tokens: int = 0
    computed: int = 0
    row_seconds: float = 0.0


@dataclass(slots=True)
class _Seen:
    at: float
    load: Load
    requests: float = 0.0
    prompt_tokens: float = 0.0


class ArrivalMeter:
    """See the module. Owns what it learnt; asked once a look."""

    def __init__(self, interval: float) -> None:
        self._stale = STALE_LOOKS * interval
        self._seen: dict[str, _Seen] = {}
        self._loading: dict[str, float] = {}  # names of those that were not serving yet, and when that was last so
        self._at: float | None = None
        self._requests = self._prompt = 0.0  # forgetting sums
        self._progress = self._generated = self._cached = self._computed = 0.0

    def observe(self, observation: Observation) -> Traffic:
        at = observation.at
        seconds = 0.0 if self._at is None else max(at - self._at, 0.0)
        self._at = at
        keep = max(0.0, 1 - min(seconds / MEMORY, self._progress * seconds / MEMORY / ENOUGH))
        for name in ("_requests", "_prompt", "_progress", "_generated", "_cached", "_computed"):
            setattr(self, name, getattr(self, name) * keep)

        heard: list[Replica] = []
        silent: set[str] = set()
        ended = late = slow = 0
        tokens, computed, row_seconds = 0, 0, 0.0
        serving = observation.in_phase(Phase.READY, Phase.DRAINING)
        for replica in serving:
            fresh = replica.load is not None and at - replica.observed_at < self._stale
            if replica.load is not None:
                before = self._seen.get(replica.name)
                rows = replica.load if before is None else before.load
                change, span = self._update(replica, replica.load)
                ended += change.finished_requests
                late += change.late_first_tokens
                slow += change.slow_requests
                row_seconds += span * (rows.running_requests + replica.load.running_requests) / 2
                tokens += change.generated_tokens
                computed += change.computed_prompt_tokens
            if not fresh:
                if replica.phase is Phase.READY:
                    silent.add(replica.name)
            else:
                heard.append(replica)
        names = {each.name for each in serving}
        self._seen = {name: seen for name, seen in self._seen.items() if name in names}
        self._loading = {each.name: at for each in observation.replicas if each.name not in names}
        rates = [self._seen[each.name] for each in heard]
        return Traffic(
            seconds=seconds,
            requests=sum(each.requests for each in rates),
            prompt_tokens=sum(each.prompt_tokens for each in rates),
            mix=self.mix,
            silent=frozenset(silent),
            heard=tuple(heard),
            ended=ended,
            late=late,
            slow=slow,
            tokens=tokens,
            computed=computed,
            row_seconds=row_seconds,
        )

    @property
    def mix(self) -> Mix:
        """Requests that run count as half finished: else their tokens would make all others look longer."""
        new_tokens = (self._generated + UNSEEN_TOKENS * UNSEEN_WEIGHT) / (max(self._progress, 0.0) + UNSEEN_WEIGHT)
        prompts = self._cached + self._computed
        return Mix(
            prompt_tokens=self._prompt / self._requests if self._requests else 0.0,
            new_tokens=max(new_tokens, 1.0),
            hit_share=self._cached / prompts if prompts else 0.0,
        )

    def _update(self, replica: Replica, load: Load) -> tuple[Counters, float]:
        """What changed since the sample before, and over how many seconds; nothing, if there is no newer one."""
        seen = self._seen.get(replica.name)
        if seen is None:
            # New to us. If it was seen before it served, all that it counts is new; else it may be of last week.
            started = self._loading.get(replica.name)
            if started is None:
                self._seen[replica.name] = _Seen(replica.observed_at, load)
                return Counters(), 0.0
            seen = _Seen(min(started, replica.observed_at), Load())
            self._seen[replica.name] = seen
        span = replica.observed_at - seen.at
        if span <= 0:
            return Counters(), 0.0
        change = _since(seen.load.counters, load.counters)
        self._progress += change.finished_requests + (load.running_requests - seen.load.running_requests) / 2
        self._requests += change.arrived_requests
        self._prompt += change.arrived_prompt_tokens
        self._generated += change.generated_tokens
        self._cached += change.cached_prompt_tokens
        self._computed += change.computed_prompt_tokens
        seen.at, seen.load = replica.observed_at, load
        seen.requests = change.arrived_requests / span
        seen.prompt_tokens = change.arrived_prompt_tokens / span
        return change, span


def _since(before: Counters, now: Counters) -> Counters:
    """What was counted between two samples; of an engine that started anew in between, all that it counted."""
    old, new = _values(before), _values(now)
    if any(n < o for n, o in zip(new, old, strict=True)):
        return Counters(*(max(n, 0) for n in new))
    return Counters(*(n - o for n, o in zip(new, old, strict=True)))


def _values(counters: Counters) -> tuple[int, ...]:
    return (
        counters.arrived_requests,
        counters.arrived_prompt_tokens,
        counters.finished_requests,
        counters.computed_prompt_tokens,
        counters.cached_prompt_tokens,
        counters.generated_tokens,
        counters.first_tokens,
        counters.late_first_tokens,
        counters.slow_requests,
    )
