"""Counts of values by size, as Prometheus understands them; also what distributions of the engine travel as."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import msgspec


class Distribution(msgspec.Struct, frozen=True):
    """A histogram at one moment: how many values fell into each bucket, and their sum."""

    counts: tuple[int, ...] = ()
    sum: float = 0.0


class Histogram:
    """Values go into the first bucket whose bound is not below them; one more bucket takes what is above all bounds."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def quantile(self, share: float) -> float:
        """The value that this share of all values does not exceed, as if they lay evenly within their bucket; 0.0 of
        none, and the last bound for what is above it."""
        rank, seen, low = share * sum(self.counts), 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count and seen + count >= rank:
                return low + (bound - low) * max(0.0, rank - seen) / count
            seen, low = seen + count, bound
        return low if seen < sum(self.counts) else 0.0

    @property
    def distribution(self) -> Distribution:
        return Distribution(tuple(self.counts), self.sum)
