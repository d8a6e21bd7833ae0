"""What each tenant has in the queue and with the engine, and what it may have."""

from __future__ import annotations

from collections import Counter

from service.admission.flight import Flight
from service.admission.limits import Allowance, LimitsOf


class Tenants:
    """Holds something of a tenant only while it has requests or has used up some of its tokens per minute."""

    def __init__(self, limits_of: LimitsOf) -> None:
        self.limits_of = limits_of
        self._running: Counter[str] = Counter()  # completions
        self._allowances: dict[str, Allowance] = {}

    def may_run(self, flight: Flight) -> bool:
        """Within its max_running; one of more completions than that may run alone."""
        most, running = self.limits_of(flight.tenant).max_running, self._running.get(flight.tenant, 0)
        return most is None or not running or running + flight.slots <= most

    def room(self, tenant: str) -> int | None:
        """Completions that may still run; None = any number."""
        most = self.limits_of(tenant).max_running
        return None if most is None else max(0, most - self._running.get(tenant, 0))

    def runs(self, flight: Flight, change: int) -> None:
        count = self._running.pop(flight.tenant, 0) + change
        if count:
            self._running[flight.tenant] = count

    def seconds_to_wait(self, tenant: str, now: float) -> float:
        """Until its tokens per minute allow another request."""
        allowance = self._allowance(tenant, now)
        return 0.0 if allowance is None else allowance.seconds_to_wait(now)

    def use(self, flight: Flight, tokens: float, now: float) -> None:
        """What the request is known to cost by now."""
        change, flight.used = tokens - flight.used, tokens
        allowance = self._allowance(flight.tenant, now)
        if allowance is not None:
            allowance.use(change, now)

    def _allowance(self, tenant: str, now: float) -> Allowance | None:
        per_minute = self.limits_of(tenant).tokens_per_minute
        if per_minute is None:
            self._allowances.pop(tenant, None)
            return None
        allowance = self._allowances.setdefault(tenant, Allowance(per_minute, now))
        allowance.set_rate(per_minute, now)
        return allowance
