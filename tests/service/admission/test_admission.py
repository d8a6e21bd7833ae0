"""What every request goes through between its adapter and the engine: bounds, order, limits, classes, what is told."""

from __future__ import annotations

import time
from typing import Any

import pytest
from msgspec.structs import replace

from engine import FinishReason, Grammar
from service.admission import QueueLimits, Refusal
from service.caller import TenantLimits
from service.errors import Code, ServiceError
from service.generation import Finished, Started
from tests.service.admission.scene import HANDED, ends, refused, scene, until

# -- grammars --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"sampling": {"grammar": Grammar(kind="json_object")}}, {"adapter": "legal"}])
async def test_what_waits_for_its_grammar_or_a_slot_keeps_nobody_from_a_row(fields: dict[str, Any]) -> None:
    async with scene() as here:
        await here.engine.load_adapter("legal", "-")
        await here.fill(**fields)
        here.ask("queued")
        assert here.model.queue.queued == 0
        await until(lambda: here.model.queue.queued == 1)
        here.engine.stats = replace(here.engine.stats, blocked=HANDED)
        await here.ask_in_turn("abcdefghi")
        assert set(here.reached[HANDED:]) == {"queued", *"abcdefgh"}
        assert here.model.queue.queued == 1


@pytest.mark.parametrize("fields", [{"sampling": {"grammar": Grammar(kind="json_object")}}, {"adapter": "legal"}])
async def test_a_tenants_many_grammars_or_adapters_keep_no_other_tenant_from_the_engine(fields: dict[str, Any]) -> None:
    async with scene() as here:
        await here.engine.load_adapter("legal", "-")
        await here.fill(tenant="many", **fields)
        here.engine.stats = replace(here.engine.stats, blocked=HANDED)
        await here.ask_in_turn("gh", tenant="many", **fields)
        await here.ask_in_turn("p", tenant="other")
        assert (here.reached[HANDED:], here.model.queue.queued) == (["p"], 2)
        here.engine.stats = replace(here.engine.stats, blocked=HANDED - 1)
        await here.ask_in_turn("q", tenant="other")
        assert sorted(here.reached[HANDED + 1 :]) == ["g", "h", "q"]


# -- the bounds ------------------------------------------------------------------------------------------------------


async def test_exactly_those_are_refused_that_do_not_fit() -> None:
    async with scene(QueueLimits(max_requests=4)) as here:
        for number in range(HANDED + 4 + 10):
            here.ask(str(number))
        await until(lambda: sum(task.done() for task in here.tasks.values()) == 10)
        assert (len(here.reached), here.model.queue.queued, here.model.in_flight) == (HANDED, 4, HANDED + 4)
        results = await here.end()
        errors = [error for error in results.values() if isinstance(error, ServiceError)]
        assert [error.code for error in errors] == [Code.RESOURCE_EXHAUSTED] * 10
        assert all(error.retry_after_ms for error in errors)
        assert here.model.queue.refused[Refusal.QUEUE_FULL] == 10
        assert sum(ends(each) == {0: FinishReason.LENGTH} for each in results.values() if isinstance(each, list)) == 13


async def test_by_default_eight_batches_wait() -> None:
    async with scene() as here:
        for number in range(HANDED + 64 + 1):
            here.ask(str(number))
        await until(lambda: any(task.done() for task in here.tasks.values()))
        assert here.model.queue.queued == 64
        assert (
            await refused(here.tasks[str(HANDED + 64)])
        ).message == "the queue is full: 64 requests wait; retry later"


async def test_nothing_is_made_of_a_prompt_that_finds_the_queue_full() -> None:
    async with scene(QueueLimits(max_requests=0)) as here:
        await here.fill()
        assert (await refused(here.ask("bad", []))).code is Code.RESOURCE_EXHAUSTED
        await here.end()
        assert (await refused(here.ask("as bad", []))).code is Code.INVALID_ARGUMENT


async def test_what_is_wrong_with_a_request_is_said_before_it_waits() -> None:
    async with scene() as here:
        await here.fill()
        for name, prompt, fields in (
            ("long", [1] * 128, {}),
            ("never fits", [1], {"sampling": {"max_tokens": 0}}),
            ("n", [1], {"n": 10**9}),
            ("stop", [1], {"stop": ("",)}),
        ):
            assert (await refused(here.ask(name, prompt, **fields))).code is Code.INVALID_ARGUMENT
        assert (await refused(here.ask("lora", adapter="none"))).code is Code.NOT_FOUND
        assert here.model.queue.queued == 0


async def test_tokens_that_wait_are_bounded_and_what_can_run_is_not_asked() -> None:
    async with scene(QueueLimits(max_tokens=100)) as here:
        await here.fill(HANDED - 1)
        here.ask("runs", [1] * 120)
        await until(lambda: "runs" in here.reached)
        here.ask("waits", [1] * 60)
        await until(lambda: here.model.queue.queued_tokens == 60)
        error = await refused(here.ask("too many", [1] * 41))
        assert error.message == (
            "the queue is full: 60 tokens wait, with this request's 41 too many for the limit of 100; retry later"
        )
        here.ask("just enough", [1] * 40)
        await until(lambda: here.model.queue.queued_tokens == 100)
        assert here.model.queue.refused[Refusal.QUEUE_TOKENS] == 1
        await here.end()
        assert set(here.reached) >= {"waits", "just enough"}


async def test_n_completions_wait_as_one_and_run_as_n() -> None:
    async with scene(QueueLimits(max_requests=1)) as here:
        await here.fill(HANDED - 1)
        here.ask("four", n=4)
        await until(lambda: "four#3" in here.reached)  # one place was free: the batch is not emptied to gather four
        assert here.model.queue.handed == HANDED + 3
        here.ask("next")
        await until(lambda: here.model.queue.queued == 1)
        assert ends((await here.end())["four"]) == dict.fromkeys(range(4), FinishReason.LENGTH)


async def test_the_engine_gets_no_more_than_it_has_pages_for_and_one() -> None:
    async with scene() as here:
        here.engine.stats = replace(here.engine.stats, kv_pages_used=58, running=2)
        for number in range(6):
            here.ask(str(number))  # two pages each, of four that are left
        await until(lambda: here.model.queue.queued == 4)
        assert here.reached == ["0", "1"]
        here.gate.allow()  # the first one starts: its pages are in use now
        here.engine.stats = replace(here.engine.stats, kv_pages_used=62, running=2)
        await until(lambda: len(here.reached) == 2 and here.model.queue.queued == 4)
        here.engine.stats = replace(here.engine.stats, kv_pages_used=0, running=0)
        results = await here.end()
        assert all(ends(each) == {0: FinishReason.LENGTH} for each in results.values())


# -- the order -------------------------------------------------------------------------------------------------------


async def test_those_that_wait_reach_the_engine_in_their_order_as_places_become_free() -> None:
    async with scene() as here:
        await here.fill()
        await here.ask_in_turn("abcd")
        assert here.model.queue.queued == 4
        await here.end()
        assert here.reached[HANDED:] == list("abcd")


async def test_better_classes_go_first_and_to_the_engine_at_once_where_it_gives_way() -> None:
    async with scene() as here:
        await here.fill()
        await here.ask_in_turn("ab")
        here.ask("low", priority=1)
        await until(lambda: here.model.queue.queued == 3)
        here.ask("urgent", priority=-1)
        await until(lambda: "urgent" in here.reached)
        assert here.model.queue.queued == 3
        await here.end()
        assert here.reached[HANDED:] == ["urgent", "a", "b", "low"]


async def test_what_the_engine_gives_way_to_is_bounded_too() -> None:
    async with scene() as here:
        await here.fill(priority=0)
        for number in range(40):
            here.ask(f"class {number}", priority=-1 - number)
        await until(lambda: here.model.queue.queued + len(here.reached) == HANDED + 40)
        assert len(here.reached) == 2 * HANDED
        await here.end()


async def test_tenants_take_turns_however_many_one_of_them_sends() -> None:
    async with scene() as here:
        await here.fill(tenant="flood")
        await here.ask_in_turn("abcdef", tenant="flood")
        await here.ask_in_turn("xyz", tenant="guest")
        await here.end()
        assert "".join(here.reached[HANDED:]) == "xaybzcdef"


async def test_the_last_places_of_the_queue_are_for_tenants_that_have_few_there() -> None:
    async with scene(QueueLimits(max_requests=16)) as here:
        await here.fill(tenant="flood")
        for number in range(20):
            here.ask(f"flood {number}", tenant="flood")
        await until(lambda: here.model.queue.queued == 14 and sum(t.done() for t in here.tasks.values()) == 6)
        for number in range(3):
            here.ask(f"guest {number}", tenant="guest")
        await until(lambda: here.model.queue.queued == 16 and sum(t.done() for t in here.tasks.values()) == 7)


# -- limits of a tenant ----------------------------------------------------------------------------------------------


async def test_a_tenant_at_its_running_limit_waits_and_others_pass() -> None:
    async with scene(tenants={"small": TenantLimits(max_running=2)}) as here:
        await here.ask_in_turn("abcd", tenant="small")
        await here.ask_in_turn("xy", tenant="other")
        assert (here.reached, here.model.queue.queued) == (list("abxy"), 2)
        results = await here.end()
        assert all(isinstance(each, list) for each in results.values())
        assert here.reached == list("abxycd")


async def test_more_completions_than_a_tenant_may_run_run_alone() -> None:
    async with scene(tenants={"small": TenantLimits(max_running=2)}) as here:
        here.ask("three", n=3, tenant="small")
        await until(lambda: len(here.reached) == 3)
        await here.ask_in_turn("a", tenant="small")
        assert here.model.queue.queued == 1
        await here.end()


async def test_a_tenant_has_a_queue_limit_of_its_own() -> None:
    async with scene(tenants={"small": TenantLimits(max_running=1, max_queued=2)}) as here:
        for name in "abcde":
            here.ask(name, tenant="small")
        await until(lambda: sum(task.done() for task in here.tasks.values()) == 2)
        assert (here.reached, here.model.queue.queued) == (["a"], 2)
        assert here.model.queue.refused[Refusal.TENANT_QUEUE] == 2
        here.ask("other")
        await until(lambda: "other" in here.reached)


async def test_who_has_used_its_tokens_per_minute_is_told_when_to_come_back() -> None:
    async with scene(tenants={"small": TenantLimits(tokens_per_minute=60)}) as here:
        here.gate.allow(10_000)
        await here.answer(here.request("a", [1] * 60, tenant="small"))  # 63: three in debt, and one to begin
        error = await refused(here.ask("b", tenant="small"))
        assert error.code is Code.RESOURCE_EXHAUSTED
        assert error.retry_after_ms is not None
        assert 3000 <= error.retry_after_ms <= 6100
        assert here.model.queue.refused[Refusal.TENANT_TOKENS] == 1
        await here.answer(here.request("c", tenant="other"))


# -- what is told ----------------------------------------------------------------------------------------------------


async def test_load_is_the_sum_of_both_queues_and_waiting_is_part_of_a_requests_times() -> None:
    async with scene() as here:
        here.engine.stats = replace(here.engine.stats, queued=2, queued_tokens=7, oldest_queued_seconds=0.0)
        await here.fill()
        began = time.monotonic()
        await here.ask_in_turn("a")
        assert (here.model.stats.queued, here.model.stats.queued_tokens) == (3, 10)
        await until(lambda: here.model.stats.oldest_queued_seconds > 0.01)
        events = (await here.end())["a"]
        assert isinstance(events, list)
        started, finished = events[0], events[-1]
        assert isinstance(started, Started)
        assert isinstance(finished, Finished)
        assert 0.26 <= started.queue_seconds <= 0.25 + time.monotonic() - began
        assert finished.queued_seconds == started.queue_seconds
        assert 0.01 <= finished.first_token_seconds <= finished.finished_seconds


async def test_retry_hints_grow_with_the_queue_and_shrink_with_its_pace() -> None:
    async with scene(QueueLimits(max_requests=10)) as here:
        await here.fill()
        await here.ask_in_turn("abcdefghij")
        hints = []
        for pace in (None, 0.5, 100.0, 1e-6):
            for _ in range(1000 if pace else 0):
                here.model.admission._pace._since = 0.0
                here.model.admission._pace.moved(pace or 0.0)
            error = await refused(here.ask("over"))
            assert error.retry_after_ms is not None
            hints.append(error.retry_after_ms)
        unknown, steady, slow, fast = hints
        assert 1000 <= unknown <= 1500
        assert 4900 <= steady <= 7600
        assert (slow, fast) == (60_000, 100)


# -- classes -----------------------------------------------------------------------------------------------------------


async def test_a_tenant_may_not_ask_for_a_better_class_than_its_best() -> None:
    async with scene(tenants={"a": TenantLimits(best_priority=-1)}) as here:
        with pytest.raises(ServiceError) as refused:
            await here.answer(here.request("x", tenant="a", priority=-2))
        assert (refused.value.code, refused.value.field) == (Code.PERMISSION_DENIED, "priority")
        assert refused.value.message == "priority: -2 must be at least -1, the best class of this tenant"
        for name, priority in (("y", -1), ("z", 7)):
            here.ask(name, tenant="a", priority=priority)
        here.ask("w", tenant="b", priority=-9)
        ends = await here.end()
        assert not [each for each in ends.values() if isinstance(each, BaseException)]


# -- what has arrived --------------------------------------------------------------------------------------------------


async def test_what_is_accepted_has_arrived_whether_it_waits_or_runs_and_what_is_refused_has_not() -> None:
    async with scene(QueueLimits(max_requests=2)) as here:
        await here.fill()
        await here.ask_in_turn("ab", prompt=[1] * 10)
        error = await refused(here.ask("one too many"))
        assert error.code is Code.RESOURCE_EXHAUSTED
        queue = here.model.queue
        assert (queue.arrived, queue.finished) == (HANDED + 2, 0)
        tokens = sum(len(request.prompt_token_ids) for request in here.engine.requests)
        assert queue.arrived_tokens == tokens + 20
        here.tasks.pop("a").cancel()
        await until(lambda: here.model.queue.finished == 1)
        await here.end()
        queue = here.model.queue
        assert (queue.arrived, queue.finished, queue.arrived_tokens) == (HANDED + 2, HANDED + 2, tokens + 20)


async def test_completions_of_one_request_arrive_once() -> None:
    async with scene() as here:
        here.ask("three", prompt=[1] * 10, n=3)
        await here.end()
        assert (here.model.queue.arrived, here.model.queue.arrived_tokens) == (1, 10)


async def test_too_many_tokens_have_not_arrived() -> None:
    async with scene(QueueLimits(max_tokens=15)) as here:
        await here.fill()
        before = here.model.queue.arrived_tokens
        await here.ask_in_turn("a", prompt=[1] * 10)
        assert (await refused(here.ask("too long", prompt=[1] * 10))).code is Code.RESOURCE_EXHAUSTED
        assert (here.model.queue.arrived, here.model.queue.arrived_tokens) == (HANDED + 1, before + 10)
