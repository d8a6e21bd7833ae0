"""How much may wait, of everybody and of each tenant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from engine import EngineInfo
from service.caller import TenantLimits

QUEUED_BATCHES = 8  # that the queue holds: who would wait longer is better served by another replica
TOKENS_PER_REQUEST = 2048  # of prompts that wait, on average; as many as the KV cache has by default
SLOW_READER_SECONDS = 30.0  # a phone that changes its network is back by then


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """Of all requests together.

    Attributes:
        max_requests: that wait; None = QUEUED_BATCHES for each place in the batch.
        max_tokens: of their prompts; None = TOKENS_PER_REQUEST for each of them, and at least one whole context.
        slow_reader_seconds: after which a request is ended whose events nobody takes.
    """

    max_requests: int | None = None
    max_tokens: int | None = None
    slow_reader_seconds: float = SLOW_READER_SECONDS

    def bounds(self, info: EngineInfo) -> tuple[int, int]:
        """Requests and tokens that may wait for an engine."""
        requests = QUEUED_BATCHES * info.max_batch_size if self.max_requests is None else self.max_requests
        tokens = max(requests * TOKENS_PER_REQUEST, info.max_model_len) if self.max_tokens is None else self.max_tokens
        return requests, tokens


LimitsOf = Callable[[str], TenantLimits]
"""What holds for a tenant now, by its name; asked for every request, so that a change takes effect at once."""

UNLIMITED = TenantLimits()


class Allowance:
    """Tokens that a tenant may still use: they come back evenly, up to one minute's worth.

    A request is accepted while any are left, whatever it costs: a long one leads into debt, which the next ones wait
    for. So no request is too large for ever, and the average holds.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = per_minute
        self._left = float(per_minute)
        self._at = now

    def set_rate(self, per_minute: int, now: float) -> None:
        self._refill(now)
        self._per_minute = per_minute
        self._left = min(self._left, per_minute)

    def seconds_to_wait(self, now: float) -> float:
        """Until a request is accepted; 0 = now."""
        self._refill(now)
        return 0.0 if self._left >= 1 else (1 - self._left) * 60 / self._per_minute

    def use(self, tokens: float, now: float) -> None:
        """Fewer than none: give back."""
        self._refill(now)
        self._left = min(self._left - tokens, self._per_minute)

    def _refill(self, now: float) -> None:
        passed, self._at = now - self._at, now
        self._left = min(self._left + passed * self._per_minute / 60, self._per_minute)
