"""What the client of an RPC sends: one message is read ahead, all are kept until the answer starts, to be sent anew."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from autoscaler.activator.hold import Held
from autoscaler.activator.refused import Refused


class Inbox:
    """See the module.

    Args:
        read: the next message, or EOF.

    Attributes:
        repeatable: all of it could be sent anew.
    """

    def __init__(self, read: Callable[[], Awaitable[Any]], held: Held) -> None:
        self.repeatable = True
        self._read = read
        self._held = held
        self._messages: list[bytes] = []  # from number `_first` on
        self._first = 0
        self._ended = False
        self._reading: asyncio.Task[None] | None = None  # outlives an attempt, which may end while it waits

    async def first(self) -> None:
        """Until there is something to do.

        Raises:
            Refused: it did not come in time, or does not fit.
        """
        await self._held.until_here(self.get(0))

    async def get(self, number: int) -> bytes | None:
        """Message `number`; None: there is none. Numbers go up by one, and begin anew with each attempt."""
        if not self.repeatable:
            del self._messages[: number - self._first]
            self._first = number
        while (place := number - self._first) == len(self._messages):
            if self._ended:
                return None
            if self._reading is None or self._reading.done():
                self._reading = asyncio.ensure_future(self._next())
            await asyncio.shield(self._reading)
        return self._messages[place]

    def forget(self) -> None:
        """Nothing will be sent anew; what was not taken yet still can be."""
        self.repeatable = False
        self._held.forget()

    def close(self) -> None:
        if self._reading is not None and not self._reading.cancel() and not self._reading.cancelled():
            self._reading.exception()  # of a client that has gone, which nobody waits to hear

    async def _next(self) -> None:
        message = await self._read()
        if message is grpc.aio.EOF:
            self._ended = True
            return
        if self.repeatable:
            try:
                self._held.keep(len(message))
            except Refused:
                if not self._messages:
                    raise
                self.forget()  # a long one: it goes on, and only cannot be repeated
        self._messages.append(message)
