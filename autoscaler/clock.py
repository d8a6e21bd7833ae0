"""Time, as the parts that wait for it see it; tests turn their own."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    def wall(self) -> float:
        """Unix seconds: for people and for other programs. May jump, and differs from machine to machine."""

    def monotonic(self) -> float:
        """Seconds of this process alone, which never jump: for whatever is decided by time that goes by."""

    async def sleep(self, seconds: float) -> None: ...

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        """Until the event is set, for so long at most. Whether it is."""


class SystemClock:
    """`Clock` of this machine."""

    def wall(self) -> float:
        return time.time()

    def monotonic(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        return True
