"""What the requests of one model add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine import EngineStats
from engine.histogram import Histogram

OUTCOMES = ("stop", "length", "cancelled", "deadline", "rejected", "error")

_LATENCIES = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0),
)
# A 12B model in 8 bits makes a token in less than 10 ms on a large GPU: there a bucket is a millisecond wide.
_TOKEN_LATENCIES = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01, 0.012, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)


def token_latencies() -> Histogram:
    """For seconds from token to token."""
    return Histogram(_TOKEN_LATENCIES)


def _latencies() -> Histogram:
    return Histogram(_LATENCIES)


def together(latencies: Sequence[Histogram]) -> Histogram:
    """Of one or more that have the same buckets."""
    total = Histogram(latencies[0].bounds)
    for each in latencies:
        total.counts = [a + b for a, b in zip(total.counts, each.counts, strict=True)]
        total.sum += each.sum
    return total


@dataclass(slots=True)
class ModelNumbers:
    """What the requests of one model, or of one LoRA adapter, have added up to. `waiting` and `running` are now."""

    first_token: Histogram = field(default_factory=_latencies)
    between_tokens: Histogram = field(default_factory=token_latencies)
    per_token: Histogram = field(default_factory=token_latencies)
    queue: Histogram = field(default_factory=_latencies)
    prefill: Histogram = field(default_factory=_latencies)
    decode: Histogram = field(default_factory=_latencies)
    duration: Histogram = field(default_factory=_latencies)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    running: int = 0


COUNTERS: Mapping[str, tuple[str, Callable[[ModelNumbers], int]]] = {
    "prompt_tokens": ("Tokens of prompts whose first token was made.", lambda of: of.prompt_tokens),
    "generation_tokens": ("Tokens that were generated.", lambda of: of.generated_tokens),
    "prefix_cache_hit_tokens": ("Of the prompts' tokens those that were found computed.", lambda of: of.cached_tokens),
}
HISTOGRAMS: Mapping[str, tuple[str, Callable[[ModelNumbers], Histogram]]] = {
    "time_to_first_token": ("From a request's arrival to its first token.", lambda of: of.first_token),
    "inter_token_latency": ("From token to token of a completion.", lambda of: of.between_tokens),
    "time_per_output_token": ("Mean from token to token of a request that ended.", lambda of: of.per_token),
    "queue_time": ("From a request's arrival to its first step.", lambda of: of.queue),
    "request_prefill": ("From a request's first step to its first token.", lambda of: of.prefill),
    "request_decode": ("From a request's first token to its end.", lambda of: of.decode),
    "request_duration": ("From the arrival of a request that got a token to its end.", lambda of: of.duration),
}
"""By the name between `nemoserve_` and `_total` or `_seconds`: what it means, and where it is."""


def kv_usage(stats: EngineStats) -> float:
    """KV pages that requests hold, of all: 0 to 1."""
    return stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0
