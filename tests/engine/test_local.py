"""The asynchronous face, over a core in a thread and the fake runner."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from engine.config import EngineConfig
from engine.errors import CheckpointError, EngineDeadError, InvalidRequestError
from engine.face import Done, LoadProgress
from engine.local import LocalEngine
from engine.mailbox import merge
from engine.request import EngineInfo, FinishReason, Request, SamplingParams, Timings, TokenEvent, TokenLogprob
from engine.step import StepPlan
from tests.engine.fake_runner import CRASH, NAN, FakeRunner, engine_info, expected

CONFIG = EngineConfig(model_path="-", seed=1)


class Gate:
    """Lets some steps pass and holds the core in the next until it is opened."""

    def __init__(self, passing: int) -> None:
        self.passing = passing
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, plan: StepPlan) -> None:
        if self.passing > 0:
            self.passing -= 1
            return
        self.entered.set()
        assert self.opened.wait(30)


@asynccontextmanager
async def engine_with(runner: FakeRunner) -> AsyncIterator[LocalEngine]:
    engine = await LocalEngine.start(CONFIG, load=lambda config, progress: runner)
    try:
        yield engine
    finally:
        await engine.close()


def request(name: str, max_tokens: int = 10, prompt: list[int] | None = None, **sampling: object) -> Request:
    params = SamplingParams(**({"max_tokens": max_tokens, "ignore_eos": True, "seed": 3} | sampling))
    return Request(request_id=name, prompt_token_ids=prompt or [1, 2, 3], sampling=params)


async def collect(engine: LocalEngine, each: Request) -> list[TokenEvent]:
    return [event async for event in engine.generate(each)]


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


async def test_many_requests_at_once_get_their_own_tokens_and_one_end_each() -> None:
    info = engine_info(page_size=1, kv_pages=24)
    requests = [request(f"r{n}", n + 1, [n + 1] * (n % 7 + 1), seed=n) for n in range(NAN - 1)] * 3  # ids repeat
    async with engine_with(FakeRunner(info)) as engine:
        results = await asyncio.gather(*(collect(engine, each) for each in requests))
        assert engine.stats.preemptions > 0
        assert (engine.stats.running, engine.stats.queued, engine.stats.kv_pages_used) == (0, 0, 0)
    for each, events in zip(requests, results, strict=True):
        assert tokens_of(events) == expected(each, info).token_ids
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish_reason is FinishReason.LENGTH
        assert {event.request_id for event in events} == {each.request_id}


async def test_a_request_that_is_wrong_is_refused_before_anything_is_computed() -> None:
    runner = FakeRunner(engine_info())
    async with engine_with(runner) as engine:
        with pytest.raises(InvalidRequestError, match="temperature: nan must be between 0 and 100"):
            await collect(engine, request("a", temperature=float("nan")))
        assert runner.plans == []


async def test_closing_the_iterator_frees_the_pages() -> None:
    gate = Gate(passing=1)
    async with engine_with(FakeRunner(engine_info(), gate)) as engine:
        stream = engine.generate(request("a", 100))
        await anext(stream)
        await stream.aclose()
        gate.opened.set()
        await collect(engine, request("b", 1))  # its last event comes after the cancel
        assert (engine.stats.running, engine.stats.kv_pages_used) == (0, 0)


async def test_cancelling_the_task_of_a_reader_frees_the_pages() -> None:
    gate = Gate(passing=1)
    async with engine_with(FakeRunner(engine_info(), gate)) as engine:
        began = asyncio.Event()

        async def read() -> None:
            async for _ in engine.generate(request("a", 100)):
                began.set()

        task = asyncio.create_task(read())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.opened.set()
        await collect(engine, request("b", 1))
        assert (engine.stats.running, engine.stats.kv_pages_used) == (0, 0)


async def test_what_a_slow_reader_missed_comes_in_one_piece() -> None:
    gate = Gate(passing=1)
    async with engine_with(FakeRunner(engine_info(), gate)) as engine:
        slow = request("slow", 30, logprobs=0)
        stream = engine.generate(slow)
        first = await anext(stream)
        gate.opened.set()
        await collect(engine, request("other", 60))  # submitted later and longer: `slow` has ended when it ends
        last = await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
    assert last.finish_reason is FinishReason.LENGTH
    tokens = tokens_of([first, last])
    assert tokens == expected(slow, engine.info).token_ids
    logprobs = [*(first.logprobs or []), *(last.logprobs or [])]
    assert [logprob.token_id for logprob in logprobs] == tokens


async def test_the_end_of_a_request_is_told_though_nobody_reads_its_events() -> None:
    gate = Gate(passing=1)
    async with engine_with(FakeRunner(engine_info(), gate)) as engine:
        ended = asyncio.Event()
        stream = engine.generate(request("unread", 30), ended.set)
        await anext(stream)
        assert not ended.is_set()
        gate.opened.set()
        await asyncio.wait_for(ended.wait(), 30)
        assert (await anext(stream)).finish_reason is FinishReason.LENGTH


async def test_the_end_of_a_cancelled_request_is_not_told() -> None:
    gate = Gate(passing=1)
    async with engine_with(FakeRunner(engine_info(), gate)) as engine:
        ended = asyncio.Event()
        stream = engine.generate(request("a", 30), ended.set)
        await anext(stream)
        await stream.aclose()
        gate.opened.set()
        await collect(engine, request("b", 40))
        assert not ended.is_set()


def test_merged_events_say_what_both_said() -> None:
    timings = Timings(queued=0.0, first_token=1.0, finished=1.0)
    first = TokenEvent(
        request_id="a", token_ids=[1], logprobs=[TokenLogprob(1, -1.0, 1)], prompt_tokens=3, timings=timings
    )
    last = TokenEvent(request_id="a", finish_reason=FinishReason.STOP, stop_token_id=7, prompt_tokens=3)
    assert merge(first, last) == TokenEvent(
        request_id="a",
        token_ids=[1],
        logprobs=[TokenLogprob(1, -1.0, 1)],
        finish_reason=FinishReason.STOP,
        stop_token_id=7,
        prompt_tokens=3,
        timings=timings,
    )


async def test_a_row_that_fails_ends_its_request_alone() -> None:
    async with engine_with(FakeRunner(engine_info())) as engine:
        good = request("good")
        bad, events = await asyncio.gather(collect(engine, request("bad", prompt=[NAN])), collect(engine, good))
        assert [event.finish_reason for event in bad] == [FinishReason.ERROR]
        assert bad[0].error == "the logits are not numbers"
        assert tokens_of(events) == expected(good, engine.info).token_ids
        assert engine.failure is None


async def test_a_runner_that_raises_ends_all_requests_and_the_engine() -> None:
    async with engine_with(FakeRunner(engine_info(max_batch_size=2))) as engine:
        requests = [request("running", 100), request("crash", prompt=[CRASH]), request("queued", 100)]
        results = await asyncio.gather(*(collect(engine, each) for each in requests), return_exceptions=True)
        assert [type(result) for result in results] == [EngineDeadError] * 3
        assert engine.failure == "the engine failed: RuntimeError"
        with pytest.raises(EngineDeadError, match="the engine failed: RuntimeError"):
            await collect(engine, request("late"))


async def test_closing_waits_for_the_step_and_fails_what_was_in_flight() -> None:
    gate = Gate(passing=0)
    async with engine_with(FakeRunner(engine_info(), gate)) as engine:
        reader = asyncio.create_task(collect(engine, request("a")))
        await asyncio.to_thread(gate.entered.wait, 30)
        closing = asyncio.create_task(engine.close())
        done, _ = await asyncio.wait([closing], timeout=0.05)
        assert not done
        gate.opened.set()
        await closing
        with pytest.raises(EngineDeadError, match="the engine was closed"):
            await reader
        await engine.close()  # again: nothing happens


async def test_a_load_error_is_raised_by_start_and_progress_is_passed_on() -> None:
    seen: list[tuple[str, Done]] = []

    def load(config: EngineConfig, progress: LoadProgress) -> FakeRunner:
        progress("read weights", Done(0.5, 4, 8))
        raise CheckpointError(f"{config.model_path} is truncated")

    with pytest.raises(CheckpointError, match="- is truncated"):
        await LocalEngine.start(CONFIG, lambda phase, done: seen.append((phase, done)), load)
    assert seen == [("read weights", Done(0.5, 4, 8))]


async def test_the_heart_beats_with_every_step() -> None:
    info: EngineInfo = engine_info()
    async with engine_with(FakeRunner(info)) as engine:
        before = engine.stats.steps
        await collect(engine, request("a", 5))
        assert engine.stats.steps >= before + 5
        assert engine.heartbeat_age < 1.0
