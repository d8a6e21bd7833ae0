"""How much work there may be one horizon from now: several answers, for who follows them to find out which is good.

level    what there is now, smoothed
trend    the level, and where its slope leads within the horizon

Each is held: the answer is the most that was said in the last seconds, so that a replica is given up only when nothing
has needed it for so long. Work in any unit a second.
"""

from __future__ import annotations

import math
from collections import deque

FAST, SLOW = 30.0, 240.0  # seconds of smoothing: of the level, and of what its slope is measured against
STEEPEST = 2.0  # times the level that a trend may foresee


class Smoothed:
    """An exponential mean that starts from what it sees first as a plain one."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.value = 0.0
        self._weight = 0.0

    def add(self, value: float, seconds: float) -> float:
        keep = math.exp(-seconds / self.seconds)
        self._weight = self._weight * keep + (1 - keep)
        if self._weight > 0:
            self.value += (value - self.value) * (1 - keep) / self._weight
        return self.value


class Most:
    """The most of the last `seconds`, which may change. Values closer than `grain` seconds are kept as one."""

    def __init__(self, seconds: float, grain: float = 0.0) -> None:
        self.seconds = seconds
        self._grain = grain
        self._kept: deque[tuple[float, float]] = deque()  # times grow, values fall

    def add(self, at: float, value: float) -> float:
        kept = self._kept
        while kept and kept[-1][1] <= value:
            kept.pop()
        if not kept or at - kept[-1][0] >= self._grain:
            kept.append((at, value))
        while len(kept) > 1 and kept[0][0] < at - self.seconds:
            kept.popleft()
        return kept[0][1]


class Forecasts:
    """See the module. `names` says what the values of `add` are, in their order."""

    def __init__(self) -> None:
        self._fast, self._slow = Smoothed(FAST), Smoothed(SLOW)
        self._held = [Most(0.0) for _ in range(5)]
        self.names = tuple(f"{kind} held {hold}" for kind in ("level", "trend") for hold in ("short", "long"))
        self.names += ("level held an hour",)

    @property
    def level(self) -> float:
        return self._fast.value

    @property
    def mean(self) -> float:
        """Work a second of the last minutes."""
        return self._slow.value

    def add(self, at: float, seconds: float, work: float, horizon: float) -> list[float]:
        level = self._fast.add(work, seconds)
        before = self._slow.add(work, seconds)
        slope = (level - before) / (SLOW - FAST)
        trend = min(max(level + slope * (horizon + FAST), level), STEEPEST * level)
        holds = max(horizon, 60.0), max(2 * horizon, 600.0)
        values = [(value, hold) for value in (level, trend) for hold in holds]
        values.append((level, max(4 * horizon, 3600.0)))
        held = []
        for most, (value, hold) in zip(self._held, values, strict=True):
            most.seconds = hold
            held.append(most.add(at, value))
        return held
