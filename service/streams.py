"""Several streams read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def interleave(streams: Sequence[AsyncGenerator[T]], *, leads: bool = False) -> AsyncGenerator[tuple[int, T]]:
    """What all streams yield as it comes, each with the number of its stream; of what is there together the first
    stream comes first. A stream holds one event back at most while the reader is slow, and all are closed at the end.

    Args:
        leads: the others begin when the first event of the first one is there.
    """
    pending: dict[asyncio.Future[T | None], int] = {}
    try:
        if leads:
            yield 0, await anext(streams[0])
        pending = {asyncio.ensure_future(anext(stream, None)): number for number, stream in enumerate(streams)}
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in [each for each in pending if each in done]:
                number = pending.pop(task)
                if (event := task.result()) is not None:
                    yield number, event
                    pending[asyncio.ensure_future(anext(streams[number], None))] = number
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
