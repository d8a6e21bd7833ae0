"""The asynchronous half of an engine, shared by `engine.local` and `engine.remote`: one mailbox for each request.

A mailbox holds at most one event. What arrives before the reader comes back is merged into it, so that a slow reader
costs no more memory than its own tokens, and gets them in one piece.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable

from msgspec.structs import replace

from engine.errors import AdapterNotFoundError, EngineDeadError, InvalidRequestError, error_of
from engine.loop import AdapterAnswer, Cancel, Command, LoadAdapter, SetVocabulary, StepOutput, Submit, UnloadAdapter
from engine.request import (
    AdapterInfo,
    EngineInfo,
    EngineStats,
    Request,
    TokenEvent,
    Vocabulary,
    validate_request,
)


class Mailbox:
    """Where the events of one request wait for their reader.

    Args:
        ended: called when the last one arrives, read or not.
    """

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Future[None] | None = None  # what the reader waits for; an Event's takes twice as long
        self._event: TokenEvent | None = None
        self._failure: str | None = None

    def put(self, event: TokenEvent) -> None:
        self._event = event if self._event is None else merge(self._event, event)
        self._wake()
        if event.finish_reason is not None:
            self._ended()

    def fail(self, reason: str) -> None:
        self._failure = reason
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)

    async def get(self) -> TokenEvent:
        """All that has arrived since the last call; waits for the first. There is one reader.

        Raises:
            EngineDeadError: the engine died; what had arrived before is returned first.
        """
        if self._event is None and self._failure is None:
            self._arrived = self._loop.create_future()
            await self._arrived
        event, self._event = self._event, None
        if event is None:
            assert self._failure is not None
            raise EngineDeadError(self._failure)
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
        self._adapters: dict[str, AdapterInfo] = {}  # what the core has, as far as it has said
        self._loaded_by: dict[str, int] = {}  # the call of each
        self._loads: dict[int, asyncio.Future[AdapterInfo]] = {}
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

    async def generate(self, request: Request, ended: Callable[[], None] = lambda: None) -> AsyncGenerator[TokenEvent]:
        """See `engine.face.Engine.generate`."""
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        validate_request(request, self._info)
        if request.adapter is not None:
            self._check_adapter(request.adapter)
        # Inside, requests have numbers: events of a cancelled request can never reach its namesake.
        inner = str(next(self._numbers))
        mailbox = self._mailboxes[inner] = Mailbox(ended)
        last = False
        try:
            self._send(Submit(replace(request, request_id=inner)))
            while not last:
                event = await mailbox.get()
                last = event.finish_reason is not None
                if event.refused is not None:
                    raise InvalidRequestError(event.refused, event.error or "is refused")
                yield replace(event, request_id=request.request_id)
        finally:
            del self._mailboxes[inner]
            if not last and self._failure is None:
                self._send(Cancel(inner))

    def set_vocabulary(self, vocabulary: Vocabulary) -> None:
        """See `engine.face.Engine.set_vocabulary`."""
        self._send(SetVocabulary(vocabulary))

    @property
    def adapters(self) -> tuple[AdapterInfo, ...]:
        """See `engine.face.Engine.adapters`."""
        return tuple(self._adapters[name] for name in sorted(self._adapters))

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """See `engine.face.Engine.load_adapter`."""
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        call = next(self._numbers)
        loaded: asyncio.Future[AdapterInfo] = asyncio.get_running_loop().create_future()
        self._loads[call] = loaded
        self._send(LoadAdapter(call, name, path))
        return await loaded

    def unload_adapter(self, name: str) -> None:
        """See `engine.face.Engine.unload_adapter`."""
        if self._failure is not None:
            raise EngineDeadError(self._failure)
        self._check_adapter(name)
        del self._adapters[name]
        self._send(UnloadAdapter(self._loaded_by.pop(name), name))

    def _check_adapter(self, name: str) -> None:
        if name not in self._adapters:
            raise AdapterNotFoundError(name, self._adapters)

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
        for answer in output.answers:
            self._answer(answer)

    def _answer(self, answer: AdapterAnswer) -> None:
        """An adapter is there even if the caller has gone away meanwhile."""
        if answer.info is not None:
            self._adapters[answer.info.name] = answer.info
            self._loaded_by[answer.info.name] = answer.call
        loaded = self._loads.pop(answer.call)
        if loaded.done():
            return
        if answer.info is not None:
            loaded.set_result(answer.info)
        else:
            loaded.set_exception(error_of(answer.kind, answer.message))

    def _die(self, reason: str) -> None:
        """Called in the event loop when the core is gone; the first reason stays."""
        if self._failure is None:
            self._failure = reason
            for mailbox in self._mailboxes.values():
                mailbox.fail(reason)
            for loaded in self._loads.values():
                if not loaded.done():
                    loaded.set_exception(EngineDeadError(reason))
