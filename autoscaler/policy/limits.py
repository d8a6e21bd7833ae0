"""What an owner allows, whatever the load: least and most, by the clock too, and how fast replicas come and go."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from autoscaler.decision import Limit
from autoscaler.policy.cron import read_cron
from autoscaler.policy.forecast import Most
from autoscaler.settings import Direction, Schedule, Settings


class Schedules:
    """The least replicas by the clock. Raises ValueError where a schedule is not one."""

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        for each in schedules:
            if not (each.duration_seconds > 0 and each.min_replicas >= 0):
                raise ValueError(
                    f"schedule {each.cron!r}: duration_seconds is {each.duration_seconds} and min_replicas "
                    f"{each.min_replicas}; it must last, and ask for 0 or more"
                )
        self._schedules = [(each, read_cron(each.cron, each.timezone)) for each in schedules]
        self._starts = [-math.inf for _ in schedules]  # when it began last
        self._looked: float | None = None

    def least(self, at: float) -> int:
        """Replicas that a schedule asks for now; 0 where none does."""
        least = 0
        for place, (schedule, cron) in enumerate(self._schedules):
            minute = at - at % 60
            oldest = at - schedule.duration_seconds
            if self._looked is not None:
                oldest = max(oldest, self._looked)
            while minute > oldest and minute > self._starts[place]:
                if cron.names(minute):
                    self._starts[place] = minute
                    break
                minute -= 60
            if at < self._starts[place] + schedule.duration_seconds:
                least = max(least, schedule.min_replicas)
        self._looked = at - at % 60
        return least


class Pace:
    """How fast the count may go one way: it must have been needed all along a window, and so many in a period."""

    def __init__(self, sign: int, direction: Direction) -> None:
        """`sign` is 1 for out, -1 for in."""
        self._sign = sign
        self._direction = direction
        self._needs = Most(direction.window_seconds)
        self._steps: deque[tuple[float, int]] = deque()

    @property
    def window_seconds(self) -> float:
        return self._needs.seconds

    @window_seconds.setter
    def window_seconds(self, seconds: float) -> None:
        self._needs.seconds = seconds

    def note(self, at: float, need: int) -> int:
        """What has been needed all along the window: the least of it for out, the most for in."""
        return -self._sign * int(self._needs.add(at, -self._sign * need))

    def room(self, at: float) -> float:
        """Replicas that may still come, or go, in this period."""
        if self._direction.max_step is None:
            return math.inf
        while self._steps and self._steps[0][0] <= at - self._direction.period_seconds:
            self._steps.popleft()
        return max(self._direction.max_step - sum(count for _, count in self._steps), 0)

    def spend(self, at: float, count: int) -> None:
        if count > 0 and self._direction.max_step is not None:
            self._steps.append((at, count))


class Limits:
    """See the module. Remembers what it was told, so ask once a look, with times that grow."""

    def __init__(self, settings: Settings) -> None:
        """Raises ValueError that names what in the settings cannot be."""
        if not 0 <= settings.min_replicas <= settings.max_replicas or settings.max_replicas < 1:
            raise ValueError(
                f"min_replicas is {settings.min_replicas} and max_replicas {settings.max_replicas}; "
                "they must be 0 <= min <= max, and max at least 1"
            )
        self._settings = settings
        self._schedules = Schedules(settings.schedules)
        behavior = settings.behavior
        self._own_window = behavior.scale_in is None
        self._out = Pace(1, behavior.scale_out)
        self._in = Pace(-1, behavior.scale_in or Direction(window_seconds=0.0))
        self._known_since: float | None = None
        self._by_hand = -math.inf  # until when a count that somebody chose stays

    def bounds(self, at: float) -> tuple[int, int]:
        """Least and most replicas now."""
        least = max(self._settings.min_replicas, self._schedules.least(at))
        return min(least, self._settings.max_replicas), self._settings.max_replicas

    def restart(self, at: float, current: int, horizon: float) -> None:
        """Somebody else has chosen the count: it stays for a window."""
        self._by_hand = at + (horizon if self._own_window else self._in.window_seconds)
        self._in.note(at, current)

    def apply(self, at: float, current: int, need: int) -> tuple[int, Limit | None]:
        """What of this need may be followed now."""
        if self._known_since is None:
            self._known_since = at
            self._in.note(at, current)
        all_along, no_more_than = self._out.note(at, need), self._in.note(at, need)
        if need > current:
            allowed = min(max(all_along, current), current + self._out.room(at))
            self._out.spend(at, int(allowed) - current)
            return int(allowed), Limit.RATE if allowed < need else None
        if need < current:
            early = at < self._by_hand or at - self._known_since < self._in.window_seconds
            steady = current if early else min(max(no_more_than, need), current)
            allowed = max(steady, current - self._in.room(at))
            self._in.spend(at, current - int(allowed))
            if allowed > need:
                return int(allowed), Limit.STABILIZING if steady > need else Limit.RATE
        return need, None
