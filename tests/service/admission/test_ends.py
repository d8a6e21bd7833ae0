"""Requests that do not go through to their end: deadlines, clients that leave or stop reading, engines that die."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest

from engine import FinishReason
from service.admission import QueueLimits, Refusal
from service.caller import TenantLimits
from service.errors import Code, ServiceError
from service.generation import Delta, Finished, Started
from tests.service.admission.scene import HANDED, Scene, Task, ends, refused, scene, until
from tests.service.fake_engine import FakeEngine, toy_text
from tests.service.fakes import Gate

# -- deadlines -------------------------------------------------------------------------------------------------------


async def test_a_deadline_that_has_passed_is_refused_at_once() -> None:
    async with scene() as here:
        error = await refused(here.ask("late", [], deadline=time.monotonic() - 1))
        assert (error.code, error.message) == (Code.DEADLINE_EXCEEDED, "the deadline has passed")
        assert here.model.queue.refused[Refusal.DEADLINE] == 1


async def test_a_deadline_that_passes_in_the_queue_never_reaches_the_engine() -> None:
    async with scene() as here:
        await here.fill()
        here.ask("waits")
        error = await refused(here.ask("late", deadline=time.monotonic() + 0.05))
        assert error.code is Code.DEADLINE_EXCEEDED
        assert (here.model.queue.queued, here.model.queue.refused[Refusal.DEADLINE_IN_QUEUE]) == (1, 1)
        await here.end()
        assert "late" not in here.reached


async def test_a_deadline_before_the_first_token_ends_the_request_with_an_error() -> None:
    async with scene() as here:
        error = await refused(here.ask("late", deadline=time.monotonic() + 0.05))
        assert error.code is Code.DEADLINE_EXCEEDED
        assert (here.engine.cancelled, here.model.queue.expired) == (["late"], 1)


async def test_a_deadline_after_it_ends_each_completion_with_what_it_has() -> None:
    async with scene() as here:
        stream = here.model.generate(here.request("late", n=3, deadline=time.monotonic() + 0.2))
        here.gate.allow(4)
        events = [event async for event in stream]
        assert isinstance(events[0], Started)
        tokens = Counter[int]()
        for event in events:
            if isinstance(event, Delta):
                tokens[event.index] += len(event.token_ids)
        finished = [event for event in events if isinstance(event, Finished)]
        assert [event.reason for event in finished] == [FinishReason.DEADLINE] * 3
        assert {event.index: event.usage.completion_tokens for event in finished} == {i: tokens[i] for i in range(3)}
        assert {event.usage.prompt_tokens for event in finished} == {3}
        assert sorted(here.engine.cancelled) == ["late#0", "late#1", "late#2"]
        assert here.model.queue.expired == 1


async def test_a_deadline_ends_what_runs_though_its_reader_is_busy() -> None:
    async with scene() as here:
        stream = here.model.generate(here.request("late", deadline=time.monotonic() + 0.1))
        here.gate.allow()
        assert isinstance(await anext(stream), Started)
        await here.engine.until(lambda: here.engine.cancelled == ["late"])  # while nobody asks for the next event
        await until(lambda: here.model.queue.handed == 0)
        assert [event.reason async for event in stream if isinstance(event, Finished)] == [FinishReason.DEADLINE]


async def test_a_deadline_that_the_queue_cannot_meet_for_certain_is_refused_at_once() -> None:
    async with scene() as here:
        await here.fill()
        await here.ask_in_turn("abcdefghijklmnop")
        for _ in range(16):
            here.model.admission._pace._since = time.monotonic() - 10  # so slowly has it moved
            here.model.admission._pace.moved(time.monotonic())
        error = await refused(here.ask("late", deadline=time.monotonic() + 20))
        assert (error.code, here.model.queue.refused[Refusal.DEADLINE]) == (Code.DEADLINE_EXCEEDED, 1)
        here.ask("of another tenant", deadline=time.monotonic() + 20, tenant="new")  # its turn may come next
        here.ask("patient", deadline=time.monotonic() + 200)
        await until(lambda: here.model.queue.queued == 18)


# -- who goes away ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1])
async def test_a_thousand_cancellations_at_random_moments_leave_nothing(seed: int) -> None:
    random_, cancelled = random.Random(seed), list[Task]()
    async with scene(QueueLimits(max_requests=40), {"b": TenantLimits(max_running=3, max_queued=20)}) as here:
        for number in range(1500):
            here.ask(
                str(number),
                n=random_.choice([1, 1, 1, 3]),
                priority=random_.choice([0, 0, 0, -1, 1]),
                tenant=random_.choice(["", "a", "b"]),
                deadline=None if random_.random() < 0.9 else time.monotonic() + random_.random() * 0.01,
            )
            if random_.random() < 0.3:
                here.gate.allow(random_.randrange(4))
            for _ in range(random_.randrange(4)):
                await asyncio.sleep(0)
            if len(here.tasks) > 60 or random_.random() < 0.5:
                task = here.tasks.pop(random_.choice(list(here.tasks)))
                task.cancel()
                cancelled.append(task)
            assert here.model.queue.queued <= 40
        for task in here.tasks.values():
            task.cancel()
        await asyncio.gather(*cancelled, *here.tasks.values(), return_exceptions=True)
        assert here.model.queue.refused[Refusal.DEADLINE_IN_QUEUE] > 0
        assert len(here.reached) > 100
        assert 100 < here.model.queue.arrived == here.model.queue.finished < 1500


async def test_one_that_is_cancelled_while_its_turn_comes_gives_its_place_back() -> None:
    async with scene() as here:
        await here.fill()
        await here.ask_in_turn("ab")
        here.tasks["a"].cancel()  # it has not heard of it yet
        here.tasks["full 0"].cancel()
        await until(lambda: "b" in here.reached)
        assert "a" not in here.reached
        await here.end()


# -- slow readers ----------------------------------------------------------------------------------------------------


async def test_a_reader_that_stops_is_cut_off_and_the_others_keep_their_pace() -> None:
    async with scene(QueueLimits(slow_reader_seconds=0.1)) as here:
        stream = here.model.generate(here.request("slow"))
        here.gate.allow(10_000)
        assert isinstance(await anext(stream), Started)
        for number in range(20):
            assert ends(await here.answer(here.request(str(number)))) == {0: FinishReason.LENGTH}
        await here.engine.until(lambda: here.engine.cancelled == ["slow"])
        await until(lambda: here.model.in_flight == 0)
        assert (here.model.queue.handed, here.model.queue.slow_readers) == (0, 1)
        with pytest.raises(ServiceError, match=r"not read for 0\.1 s") as caught:
            await anext(stream)
        assert caught.value.code is Code.DEADLINE_EXCEEDED


async def test_a_reader_that_waits_for_the_engine_is_not_slow() -> None:
    async with scene(QueueLimits(slow_reader_seconds=0.05)) as here:
        task = here.ask("patient")
        await asyncio.wait({task}, timeout=0.2)
        here.gate.allow(3)
        assert ends(await task) == {0: FinishReason.LENGTH}


# -- an engine that dies ---------------------------------------------------------------------------------------------


async def next_engine(here: Scene) -> FakeEngine:
    engine = FakeEngine(b"xyz")
    engine.gate = Gate()
    here.model.ready(engine, toy_text())
    return engine


async def test_what_had_no_token_and_what_waits_runs_on_the_next_engine() -> None:
    async with scene() as here:
        await here.ask_in_turn("s")
        here.gate.allow()
        await here.engine.until(lambda: here.engine.produced == 1)
        await here.ask_in_turn("abcdefgh")
        await here.ask_in_turn("ijk")
        assert here.model.queue.queued == 3
        here.engine.die()
        assert (await refused(here.tasks["s"])).code is Code.UNAVAILABLE
        await until(lambda: here.model.queue.queued == 11)
        late = here.ask("late", deadline=time.monotonic() + 0.05)
        assert (await refused(late)).code is Code.DEADLINE_EXCEEDED  # time goes on while there is no engine
        engine = await next_engine(here)
        await engine.until(lambda: len(engine.requests) == HANDED)
        assert {request.request_id for request in engine.requests[:8]} == set("abcdefgh")
        assert engine.requests[8].request_id == "i"
        engine.die("again")
        for name in "abcdefgh":
            assert (await refused(here.tasks[name])).code is Code.UNAVAILABLE  # the second time
        await until(lambda: here.model.queue.queued == 3)
        last = await next_engine(here)
        assert last.gate is not None
        last.gate.allow(100)
        for name in "ijk":
            assert ends(await here.tasks[name]) == {0: FinishReason.LENGTH}
        assert here.model.queue.arrived == here.model.queue.finished == 13  # nobody has arrived twice


async def test_who_waits_learns_that_there_will_be_no_engine() -> None:
    async with scene() as here:
        await here.fill()
        await here.ask_in_turn("ab")
        here.model.failed("gone")
        here.engine.die()
        for task in here.tasks.values():
            assert (await refused(task)).code is Code.UNAVAILABLE


async def test_a_closed_gate_keeps_the_queue_and_says_when_the_engine_has_nothing_left() -> None:
    async with scene() as here:
        await here.ask_in_turn("ab")
        here.model.admission.close()
        await here.ask_in_turn("c")
        settled = asyncio.create_task(here.model.admission.settled())
        here.gate.allow(6)
        await asyncio.wait_for(settled, 10)
        await asyncio.wait_for(asyncio.gather(here.tasks["a"], here.tasks["b"]), 10)
        assert (here.reached, here.model.queue.queued, here.model.in_flight) == (["a", "b"], 1, 1)
        here.model.admission.open(here.engine)
        here.gate.allow(3)
        assert ends(await here.tasks["c"]) == {0: FinishReason.LENGTH}
