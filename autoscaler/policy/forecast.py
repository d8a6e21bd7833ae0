"""How much work there may be one horizon from now: several answers, for who follows them to find out which is good.

level    what there is now, smoothed
trend    the level, and where its slope leads within the horizon
day      the level, and how much it grew within the horizon at this time of the day before

Each is held: the answer is the most that was said in the last seconds, so that a replica is given up only when nothing
has needed it for so long. Work in any unit a second.
"""

from __future__ import annotations

import math
from collections import deque

DAY = 86400.0
FAST, SLOW = 30.0, 240.0  # seconds of smoothing: of the level, and of what its slope is measured against
STEEPEST = 2.0  # times the level that a trend or a day may foresee
BUCKET = 600.0  # seconds of a day's profile


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


class DayProfile:
    """Mean level by time of day, of the latest day."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._bucket: int | None = None
        self._sum = self._seconds = 0.0

    def add(self, at: float, value: float, seconds: float) -> None:
        bucket = int(at // BUCKET)
        if bucket != self._bucket:
            if self._bucket is not None and self._seconds > 0:
                self._means[self._bucket] = self._sum / self._seconds
                self._means.pop(self._bucket - 2 * int(DAY / BUCKET), None)
            self._bucket, self._sum, self._seconds = bucket, 0.0, 0.0
        self._sum += value * seconds
        self._seconds += seconds

    def growth(self, at: float, horizon: float) -> float:
        """Most of the day before within the horizon, over what it was then; 1 where that is not known."""
        then = at - DAY
        base = self._at(then)
        if base is None or base <= 0:
            return 1.0
        steps = max(1, math.ceil(horizon / (BUCKET / 2)))
        ahead = [self._at(then + horizon * step / steps) for step in range(1, steps + 1)]
        return max((value / base for value in ahead if value is not None), default=1.0)

    def _at(self, time: float) -> float | None:
        """Between the middles of two buckets."""
        place = time / BUCKET - 0.5
        first = math.floor(place)
        low, high = self._means.get(first), self._means.get(first + 1)
        if low is None or high is None:
            return low if high is None else high
        return low + (high - low) * (place - first)


class Forecasts:
    """See the module. `names` says what the values of `add` are, in their order."""

    def __init__(self) -> None:
        self._fast, self._slow = Smoothed(FAST), Smoothed(SLOW)
        self._profile = DayProfile()
        self._held = [Most(0.0) for _ in range(7)]
        self.names = tuple(f"{kind} held {hold}" for kind in ("level", "trend", "day") for hold in ("short", "long"))
        self.names += ("level held an hour",)

    @property
    def level(self) -> float:
        return self._fast.value

    def add(self, at: float, seconds: float, work: float, horizon: float) -> list[float]:
        level = self._fast.add(work, seconds)
        before = self._slow.add(work, seconds)
        self._profile.add(at, work, seconds)
        slope = (level - before) / (SLOW - FAST)
        trend = min(max(level + slope * (horizon + FAST), level), STEEPEST * level)
        day = level * min(max(self._profile.growth(at, horizon), 1.0), STEEPEST)
        holds = max(horizon, 60.0), max(2 * horizon, 600.0)
        values = [(value, hold) for value in (level, trend, day) for hold in holds]
        values.append((level, max(4 * horizon, 3600.0)))
        held = []
        for most, (value, hold) in zip(self._held, values, strict=True):
            most.seconds = hold
            held.append(most.add(at, value))
        return held
