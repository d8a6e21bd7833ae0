"""Events of one request on their way to who reads them, with a limit for both sides: the deadline, until which the
request may run, and how long an event may wait to be taken.

There is no task in between, and no queue: the reader's own task waits for the next event, and one timer of the request
looks after it. What nobody takes for too long is ended while its reader is still busy with something else; the reader
learns of it when it comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

from engine import FinishReason
from service.errors import Code, ServiceError
from service.generation import Delta, Finished, GenerationEvent, Started, Usage


class Delivery:
    """See the module. Used by one task.

    Args:
        events: of a request with `completions`; closed by this when it ends early.
        deadline: on the loop's clock, which is time.monotonic(); None = no limit.
        patience: seconds that an event may wait to be taken.

    Attributes:
        cut: called when the request has been ended while its reader was busy.
        started: the first event, once it is there.
        tokens: new tokens of all completions so far.
        expired: it was ended by its deadline.
        abandoned: it was ended because an event was not taken in time.
    """

    def __init__(
        self,
        events: AsyncGenerator[GenerationEvent],
        completions: int,
        deadline: float | None,
        patience: float,
    ) -> None:
        self.cut: Callable[[], None] = lambda: None
        self.started: Started | None = None
        self.tokens = 0
        self.expired = self.abandoned = False
        self._events = events
        self._deadline = deadline
        self._patience = patience
        self._open = dict.fromkeys(range(completions), 0)  # completions that have not ended, and their tokens
        self._loop = asyncio.get_running_loop()
        self._offered: float | None = None  # when the reader got the event that it is busy with
        self._closing: asyncio.Task[None] | None = None
        self._timer = self._look_again()

    async def next(self) -> GenerationEvent | None:
        """The next event, None when there is no more. After the deadline: a Finished for each completion that had not
        ended.

        Raises:
            ServiceError: DEADLINE_EXCEEDED, the deadline passed before the first event, or an event was not taken in
                time; what the source raises.
        """
        self._offered = None
        if self._closing is not None:
            await asyncio.wait([self._closing])
        elif not self.expired:
            try:
                event = await self._of_source()
            except TimeoutError:
                self.expired = True
                await self._events.aclose()
            else:
                self._note(event)
                return event
        if self.abandoned:
            message = f"its events were not read for {self._patience:g} s, so the request was ended"
            raise ServiceError(Code.DEADLINE_EXCEEDED, message)
        return self._ending()

    async def close(self) -> None:
        """Nobody reads any more; ends the request if it has not ended."""
        self._stop_looking()
        if self._closing is not None:
            await asyncio.wait([self._closing])
        else:
            await self._events.aclose()

    async def _of_source(self) -> GenerationEvent | None:
        """Raises TimeoutError at the deadline."""
        if self._deadline is None:
            return await anext(self._events, None)
        if self._loop.time() >= self._deadline:  # where events are always there, nothing is waited for
            raise TimeoutError
        async with asyncio.timeout_at(self._deadline):
            return await anext(self._events, None)

    def _note(self, event: GenerationEvent | None) -> None:
        self._offered = self._loop.time()
        match event:
            case Delta():
                count = len(event.token_ids)
                self._open[event.index] += count
                self.tokens += count
            case Finished():
                del self._open[event.index]
            case Started():
                self.started = event
            case None:
                self._stop_looking()

    def _ending(self) -> Finished | None:
        """How the next completion ended that the deadline has ended."""
        if self.started is None:
            raise ServiceError(Code.DEADLINE_EXCEEDED, "the deadline passed before the first token was there")
        if not self._open:
            return None
        index = min(self._open)
        return Finished(
            index=index,
            reason=FinishReason.DEADLINE,
            usage=Usage(
                prompt_tokens=self.started.prompt_tokens,
                completion_tokens=self._open.pop(index),
                cached_tokens=self.started.cached_tokens,
            ),
            queued_seconds=self.started.queue_seconds,
        )

    # -- while the reader is busy ------------------------------------------------------------------------------

    def _look(self) -> None:
        now = self._loop.time()
        if self._offered is not None:
            self.expired = self._deadline is not None and now >= self._deadline and bool(self._open)
            self.abandoned = not self.expired and now - self._offered >= self._patience
        if self.expired or self.abandoned:
            self._closing = asyncio.create_task(self._close_early(), name="cut-off")
        else:
            self._timer = self._look_again()

    def _look_again(self) -> asyncio.TimerHandle:
        """At the first moment at which something could be too late."""
        now = self._loop.time()
        at = (now if self._offered is None else self._offered) + self._patience
        if self._deadline is not None and now < self._deadline < at:
            at = self._deadline
        return self._loop.call_at(at, self._look)

    def _stop_looking(self) -> None:
        self._timer.cancel()

    async def _close_early(self) -> None:
        await self._events.aclose()
        self.cut()
