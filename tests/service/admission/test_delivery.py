"""Events on their way to their reader, with a source that a test writes down."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from engine import FinishReason
from service.admission import Delivery
from service.errors import Code, ServiceError
from service.generation import Delta, Finished, GenerationEvent, Started, Usage

STARTED = Started(request_id="r", prompt_tokens=5, cached_tokens=2, queue_seconds=0.5)
NEVER = 3600.0


class Source:
    """Yields what it was given, then waits for ever if it has no end. Knows whether it was closed."""

    def __init__(self, *events: GenerationEvent, endless: bool = False) -> None:
        self.closed = asyncio.Event()
        self.stream = self._stream(events, endless)

    async def _stream(self, events: tuple[GenerationEvent, ...], endless: bool) -> AsyncGenerator[GenerationEvent]:
        try:
            for event in events:
                yield event
            if endless:
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # as where an engine is told
            self.closed.set()


def delta(tokens: int, index: int = 0) -> Delta:
    return Delta(index=index, text="x" * tokens, token_ids=[1] * tokens)


def finished(index: int = 0) -> Finished:
    return Finished(index=index, reason=FinishReason.STOP, usage=Usage(prompt_tokens=5, completion_tokens=2))


def soon(seconds: float = 0.05) -> float:
    return asyncio.get_running_loop().time() + seconds


async def rest(delivery: Delivery) -> list[GenerationEvent]:
    events = []
    while (event := await delivery.next()) is not None:
        events.append(event)
    return events


async def test_events_pass_as_they_are_and_are_counted() -> None:
    given = [STARTED, delta(2), delta(3), finished()]
    delivery = Delivery(Source(*given).stream, 1, soon(NEVER), NEVER)
    assert await rest(delivery) == given
    assert (delivery.tokens, delivery.started, delivery.expired, delivery.abandoned) == (5, STARTED, False, False)
    assert await delivery.next() is None
    await delivery.close()


async def test_closing_it_ends_the_request() -> None:
    source = Source(STARTED, endless=True)
    delivery = Delivery(source.stream, 1, None, NEVER)
    await delivery.next()
    await delivery.close()
    assert source.closed.is_set()


async def test_what_has_not_ended_at_the_deadline_ends_with_it() -> None:
    source = Source(STARTED, delta(2), delta(1, index=1), finished(1), delta(4, index=2), endless=True)
    delivery = Delivery(source.stream, 3, soon(), NEVER)
    *_, first, last = await rest(delivery)
    assert [first, last] == [
        Finished(
            index=index,
            reason=FinishReason.DEADLINE,
            usage=Usage(prompt_tokens=5, completion_tokens=tokens, cached_tokens=2),
            queued_seconds=0.5,
        )
        for index, tokens in ((0, 2), (2, 4))
    ]
    assert (source.closed.is_set(), delivery.expired) == (True, True)


async def test_before_the_first_event_the_deadline_is_an_error() -> None:
    source = Source(endless=True)
    with pytest.raises(ServiceError, match="before the first token") as caught:
        await Delivery(source.stream, 1, soon(), NEVER).next()
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert source.closed.is_set()


async def test_a_source_that_never_waits_ends_at_the_deadline_too() -> None:
    delivery = Delivery(Source(STARTED, *[delta(1)] * 10**6, finished()).stream, 1, soon(), NEVER)
    events = await rest(delivery)
    assert len(events) < 10**6
    assert events[-1].reason is FinishReason.DEADLINE  # type: ignore[union-attr]


@pytest.mark.parametrize("why", ["deadline", "slow reader"])
async def test_a_request_ends_while_its_reader_is_busy(why: str) -> None:
    source = Source(STARTED, delta(1), endless=True)
    late = why == "deadline"
    delivery = Delivery(source.stream, 1, soon() if late else None, NEVER if late else 0.05)
    told = asyncio.Event()
    delivery.cut = told.set
    await delivery.next()
    await delivery.next()
    await asyncio.wait_for(source.closed.wait(), 10)
    await asyncio.wait_for(told.wait(), 10)
    assert (delivery.expired, delivery.abandoned) == (late, not late)
    if late:
        assert [event.reason for event in await rest(delivery) if isinstance(event, Finished)] == [
            FinishReason.DEADLINE
        ]
    else:
        with pytest.raises(ServiceError, match=r"not read for 0\.05 s"):
            await delivery.next()


async def test_a_reader_that_comes_back_while_its_request_is_ended_waits_for_that() -> None:
    source = Source(STARTED, endless=True)
    delivery = Delivery(source.stream, 1, soon(), NEVER)
    await delivery.next()
    delivery._look()  # nothing is late yet
    assert not delivery.expired
    delivery._deadline = soon(0)
    delivery._look()
    assert not source.closed.is_set()
    assert isinstance(await delivery.next(), Finished)
    assert source.closed.is_set()


async def test_a_reader_that_waits_is_not_slow_however_long() -> None:
    source = Source(STARTED, endless=True)
    delivery = Delivery(source.stream, 1, None, 0.02)
    await delivery.next()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(delivery.next(), 0.2)
    assert not delivery.abandoned


async def test_after_the_last_event_the_deadline_changes_nothing() -> None:
    delivery = Delivery(Source(STARTED, finished()).stream, 1, soon(0.02), NEVER)
    assert [await delivery.next(), await delivery.next()] == [STARTED, finished()]
    delivery._deadline = soon(-1)
    delivery._look()
    assert not delivery.expired
    await delivery.close()


async def test_what_the_source_raises_passes_through() -> None:
    async def failing() -> AsyncGenerator[GenerationEvent]:
        yield STARTED
        raise ServiceError(Code.UNAVAILABLE, "gone")

    delivery = Delivery(failing(), 1, soon(NEVER), NEVER)
    await delivery.next()
    with pytest.raises(ServiceError, match="gone"):
        await delivery.next()
