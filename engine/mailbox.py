"""The asynchronous half of an engine, shared by `engine.local` and `engine.remote`: one mailbox for each request.

A mailbox holds at most one event. What arrives before the reader comes back is merged into it, so that a slow reader
costs no more memory than its own tokens, and gets them in one piece.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator

from msgspec.structs import replace

from engine.errors import EngineDeadError
from engine.loop import Cancel, Command, StepOutput, Submit
from engine.request import EngineInfo, EngineStats, Request, TokenEvent, validate_request


class Mailbox:
    """Where the events of one request wait for their reader."""

    def __init__(self) -> None:
        self._arrived = asyncio.Event()
        self._event: TokenEvent | None = None
        self._failure: str | None = None

    def put(self, event: TokenEvent) -> None:
        self._event = event if self._event is None else merge(self._event, event)
        self._arrived.set()

    def fail(self, reason: str) -> None:
        self._failure = reason
        self._arrived.set()

    async def get(self) -> TokenEvent:
        """All that has arrived since the last call; waits for the first.

        Raises:
            EngineDeadError: the engine died; what had arrived before is returned first.
        """
        await self._arrived.wait()
        event, self._event = self._event, None
        if event is None:
            assert self._failure is not None
            raise EngineDeadError(self._failure)
        if self._failure is None:
            self._arrived.clear()
        return event


def merge(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    """One event that says what two consecutive events of a request said."""
    logprobs = [*(first.logprobs or []), *(second.logprobs or [])]
    prompt_logprobs = [*(first.prompt_logprobs or []), *(second.prompt_logprobs or [])]
    return replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs or None,
        prompt_logprobs=prompt_logprobs or None,
        prompt_tokens=max(first.prompt_tokens, second.prompt_tokens),
        cached_tokens=max(first.cached_tokens, second.cached_tokens),
        timings=second.timings or first.timings,
    )


class MailboxEngine(ABC):
    """`engine.face.Engine` over any way of sending commands to a core. Belongs to one event loop."""

    def __init__(self, info: EngineInfo) -> None:
        self._info = info
        self._stats = EngineStats(max_batch_size=info.max_batch_size, kv_pages_total=info.kv_pages)
        self._last_beat = time.monotonic()
        self._failure: str | None = None
        self._mailboxes: dict[str, Mailbox] = {}
        self._numbers = itertools.count(1)

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def heartbeat_age(self) -> float:
        return time.monotonic() - self._last_beat

    @property
    def failure(self) -> str | None:
        return self._failure

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent]:
        """See `engine.face.Engine.generate`."""
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        validate_request(request, self._info)
        # Inside, requests have numbers: events of a cancelled request can never reach its namesake.
        inner = str(next(self._numbers))
        mailbox = self._mailboxes[inner] = Mailbox()
        ended = False
        try:
            self._send(Submit(replace(request, request_id=inner)))
            while not ended:
                event = await mailbox.get()
                ended = event.finish_reason is not None
                yield replace(event, request_id=request.request_id)
        finally:
            del self._mailboxes[inner]
            if not ended and self._failure is None:
                self._send(Cancel(inner))

    @abstractmethod
    def _send(self, command: Command) -> None:
        """Hand a command to the core; never waits."""

    @abstractmethod
    async def close(self) -> None:
        """See `engine.face.Engine.close`."""

    def _deliver(self, output: StepOutput) -> None:
        """Called in the event loop with what each step did."""
        self._last_beat = time.monotonic()
        self._stats = output.stats
        for event in output.events:
            if (mailbox := self._mailboxes.get(event.request_id)) is not None:
                mailbox.put(event)

    def _die(self, reason: str) -> None:
        """Called in the event loop when the core is gone; the first reason stays."""
        if self._failure is None:
            self._failure = reason
            for mailbox in self._mailboxes.values():
                mailbox.fail(reason)
