"""Time that a test turns, for as many processes as it wants, whose walls may show different times."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.autoscaler.controller.line import Line

START = 1_764_144_000.0  # 2025-11-26T08:00:00Z


@dataclass
class Time:
    now: float = 0.0
    sleepers: list[tuple[float, int, asyncio.Event]] = field(default_factory=list)
    numbers: itertools.count[int] = field(default_factory=itertools.count)
    lines: list[Line] = field(default_factory=list)  # of which a turn waits for the calls

    def busy(self) -> bool:
        return any(each.busy for each in self.lines)

    def pass_by(self, seconds: float) -> None:
        """Whoever's time has come wakes up, when the test lets other tasks run."""
        self.now += seconds
        while self.sleepers and self.sleepers[0][0] <= self.now + 1e-9:
            heapq.heappop(self.sleepers)[2].set()


class TurnedClock:
    """`autoscaler.clock.Clock`. `skew`: seconds by which the wall is wrong."""

    def __init__(self, time: Time | None = None, skew: float = 0.0) -> None:
        self.time = time or Time()
        self.skew = skew

    def wall(self) -> float:
        return START + self.skew + self.time.now

    def monotonic(self) -> float:
        return 1000.0 + self.skew % 7 + self.time.now

    async def sleep(self, seconds: float) -> None:
        await self.wait(asyncio.Event(), seconds)

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        if seconds <= 0:
            await asyncio.sleep(0)
            return event.is_set()
        due = asyncio.Event()
        heapq.heappush(self.time.sleepers, (self.time.now + seconds, next(self.time.numbers), due))
        waits = [asyncio.ensure_future(each.wait()) for each in (due, event)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
        return event.is_set()

    def turn(self, seconds: float) -> None:
        self.time.pass_by(seconds)

    async def turn_until(self, condition: Callable[[], bool], step: float = 1.0, most: float = 3600.0) -> None:
        """Let time go by, in steps, each with a moment for what it sets in motion, until `condition` holds."""
        end = self.time.now + most
        while not condition():
            assert self.time.now < end, "it never came to that"
            self.turn(step)
            await self.settle()

    async def settle(self) -> None:
        """Until whatever the last turn has set in motion is done."""
        quiet = 0
        while quiet < 3:
            for _ in range(10):
                await asyncio.sleep(0)
            quiet = 0 if self.time.busy() else quiet + 1
            if self.time.busy():
                await asyncio.sleep(0.0005)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Let other tasks go on until `condition` holds, at a time that stands still."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # conditions are of other processes too
            await asyncio.sleep(0.002)
