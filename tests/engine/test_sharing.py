"""Requests that begin alike share pages; higher classes go first. Seen from the scheduler's plans."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from engine.adapters import Adapters
from engine.errors import InvalidRequestError
from engine.request import (
    MAX_CACHE_SALT,
    AdapterInfo,
    FinishReason,
    Request,
    SamplingParams,
    TokenEvent,
    validate_request,
)
from engine.step import SampledToken, StepResult
from tests.engine.fake_runner import engine_info
from tests.engine.test_scheduler import Driver, request

TEXT = list(range(100, 200))


def ask(name: str, tokens: list[int], **fields: object) -> Request:
    params = SamplingParams(max_tokens=fields.pop("max_tokens", 100))  # type: ignore[arg-type]
    return Request(request_id=name, prompt_token_ids=tokens, sampling=params, **fields)  # type: ignore[arg-type]


def starts(driver: Driver) -> list[int]:
    """Of the last plan: at which position the work of each row begins."""
    return [work.start for work in driver.plan.work]


# -- prefixes ----------------------------------------------------------------------------------------------------------


def test_who_begins_as_an_earlier_one_computes_only_the_rest_and_is_told_so() -> None:
    driver = Driver(page_size=4, max_batch_tokens=100)
    driver.submit(ask("first", TEXT[:10], max_tokens=1))
    [event] = driver.step()
    assert (event.prompt_tokens, event.cached_tokens) == (10, 0)
    driver.submit(ask("second", [*TEXT[:9], 7], max_tokens=2))
    [event] = driver.step()
    assert (starts(driver), event.cached_tokens) == ([8], 8)
    [event] = driver.step()
    assert (event.finish_reason, event.prompt_tokens, event.cached_tokens) == (FinishReason.LENGTH, 10, 8)
    assert (driver.scheduler.prefix_query_tokens, driver.scheduler.prefix_hit_tokens) == (20, 8)
    assert driver.scheduler.prompt_tokens == 10 + 2  # what is found is not computed


def test_who_arrives_together_shares_what_the_first_computes_in_the_same_step() -> None:
    driver = Driver(page_size=4, max_batch_tokens=100)
    driver.submit(*(ask(name, TEXT[:13]) for name in "abcd"))
    events = driver.step()
    assert [event.cached_tokens for event in events] == [0, 12, 12, 12]
    assert starts(driver) == [0, 12, 12, 12]
    pages = [work.new_pages for work in driver.plan.work]
    assert [each[:3] for each in pages] == [pages[0][:3]] * 4
    assert len({each[3] for each in pages}) == 4
    assert driver.pool.num_used == 3 + 4
    driver.scheduler.check()


def test_who_comes_while_the_first_is_in_the_middle_shares_what_is_there() -> None:
    driver = Driver(page_size=4, max_batch_tokens=10)
    driver.submit(ask("first", TEXT[:30]))
    driver.step()
    driver.submit(ask("second", TEXT[:30]))
    driver.step()
    driver.step()
    assert driver.work() == {0: (20, 10, True)}
    driver.step()
    assert driver.work() == {0: (30, 1, True), 1: (28, 2, True)}


@pytest.mark.parametrize("length", [7, 8, 9])
def test_the_last_known_token_is_always_computed(length: int) -> None:
    driver = Driver(page_size=4, max_batch_tokens=100)
    for name in ("first", "second"):
        driver.submit(ask(name, TEXT[:length], max_tokens=1))
        driver.step()
    assert starts(driver) == [(length - 1) // 4 * 4]


def test_the_next_turn_of_a_conversation_finds_the_answer_too() -> None:
    driver = Driver(token=9, page_size=4, max_batch_tokens=100)
    driver.submit(ask("turn", TEXT[:6], max_tokens=8))
    for _ in range(8):
        driver.step()
    driver.submit(ask("next", [*TEXT[:6], *[9] * 8, *TEXT[50:55]]))
    driver.step()
    assert starts(driver) == [12]  # the last token of the answer was never computed, so that its page is not full


def test_without_prefix_caching_nothing_is_found() -> None:
    driver = Driver(prefix_caching=False, page_size=4, max_batch_tokens=100)
    driver.submit(*(ask(name, TEXT[:13]) for name in "ab"))
    driver.step()
    assert (starts(driver), driver.pool.num_used) == ([0, 0], 8)
    assert driver.scheduler.prefix_hit_tokens == 0


def test_salts_and_adapters_keep_apart_and_an_adapter_that_is_loaded_again_is_another_one() -> None:
    adapters = Adapters(slots=4)
    old = adapters.add(AdapterInfo(name="a", rank=1, nbytes=1))
    driver = Driver(adapters=adapters, page_size=4, max_batch_size=16, max_batch_tokens=100)
    driver.submit(
        ask("plain", TEXT[:9]), ask("salted", TEXT[:9], cache_salt="x"), ask("other", TEXT[:9], cache_salt="y")
    )
    driver.submit(ask("adapted", TEXT[:9]), adapter=old)
    driver.step()
    assert starts(driver) == [0, 0, 0, 0]
    new = adapters.add(AdapterInfo(name="a", rank=1, nbytes=1))
    driver.submit(ask("plain again", TEXT[:9]), ask("salted again", TEXT[:9], cache_salt="x"))
    driver.submit(ask("loaded again", TEXT[:9]), adapter=new)
    driver.step()
    assert starts(driver)[4:] == [8, 8, 0]


def test_who_wants_logprobs_of_its_prompt_computes_all_of_it_and_others_find_it() -> None:
    driver = Driver(page_size=4, max_batch_tokens=100)
    driver.submit(ask("first", TEXT[:9], max_tokens=1))
    driver.step()
    sampling = SamplingParams(prompt_logprobs=0)
    driver.submit(Request(request_id="scored", prompt_token_ids=TEXT[:13], sampling=sampling))
    driver.step()
    assert [(work.start, work.targets is not None) for work in driver.plan.work] == [(0, True)]
    driver.submit(ask("third", TEXT[:13]))
    driver.step()
    assert driver.work()[1] == (12, 1, True)
    driver.scheduler.check()


def test_shared_pages_count_once_at_admission_so_that_more_requests_fit() -> None:
    driver = Driver(page_size=4, kv_pages=9, max_batch_tokens=100)
    driver.submit(*(ask(name, TEXT[:17]) for name in "abc"))  # five pages each, four of them the same
    driver.step()
    assert (driver.scheduler.num_running, driver.pool.num_used) == (3, 7)
    unshared = Driver(prefix_caching=False, page_size=4, kv_pages=9, max_batch_tokens=100)
    unshared.submit(*(ask(name, TEXT[:17]) for name in "abc"))
    unshared.step()
    assert unshared.scheduler.num_running == 1


def test_nobody_overtakes_for_finding_its_pages() -> None:
    driver = Driver(page_size=4, kv_pages=8, max_batch_tokens=100)
    driver.submit(ask("running", TEXT[:17]), request("large", 20), ask("found", TEXT[:17]))
    driver.step()
    assert (driver.scheduler.num_running, len(driver.scheduler.waiting)) == (1, 2)


def test_pages_that_only_the_dead_held_are_used_up_before_anyone_is_pre_empted() -> None:
    driver = Driver(page_size=4, kv_pages=8, max_batch_tokens=100)
    for name in "abcdef":
        driver.submit(request(name, 25, max_tokens=1))
        driver.step()
        driver.scheduler.check()
    assert driver.scheduler.preemptions == 0


def test_the_pages_of_one_whose_numbers_are_wrong_are_not_found() -> None:
    driver = Driver(page_size=4, max_batch_tokens=100)
    driver.submit(ask("broken", TEXT[:9]))
    plan = driver.scheduler.plan(0.0)
    driver.scheduler.commit(plan, StepResult([SampledToken(0, -1, failed="not numbers")]), 0.0)
    driver.submit(ask("next", TEXT[:9]))
    driver.step()
    assert starts(driver) == [0]


def test_nor_are_those_of_one_that_was_pre_empted_before_its_numbers_were_known() -> None:
    driver = Driver(page_size=4, max_batch_tokens=100)
    driver.submit(ask("broken", TEXT[:8]), request("other", 1))
    plan = driver.scheduler.plan(0.0)
    driver.scheduler._preempt(driver.scheduler._holdings.running[0], now=0.0)
    driver.scheduler.commit(plan, StepResult([SampledToken(0, -1, failed="not numbers"), SampledToken(1, 9)]), 0.0)
    driver.scheduler.check()
    driver.submit(ask("next", [*TEXT[:8], 1]))
    driver.step()
    assert starts(driver) == [1, 0]
    driver.scheduler.check()


def test_a_page_is_not_found_if_the_step_that_should_have_filled_it_was_not_done() -> None:
    driver = Driver(token=9, page_size=1, kv_pages=18, max_batch_tokens=5)
    driver.submit(ask("other", [*TEXT[:2], 7]))
    driver.step()
    scored = SamplingParams(max_tokens=100, prompt_logprobs=0)  # it has pages of its own, which are not found
    driver.submit(Request(request_id="victim", prompt_token_ids=TEXT[:2], sampling=scored))
    driver.step()
    driver.submit(request("urgent", 8, priority=-1))
    while driver.scheduler.preemptions == 0:
        computed = driver.scheduler._by_id["victim"].computed
        driver.step()
    victim = driver.scheduler.waiting.first
    assert len(victim.tokens) == computed + 1  # what it has not computed was planned, and taken out of the step
    driver.submit(ask("next", [*victim.tokens, 1]))
    assert len(driver.scheduler._holdings.found(driver.scheduler._by_id["next"])) <= computed


def test_a_pre_empted_request_finds_its_pages_again_and_says_what_it_found_first() -> None:
    driver = Driver(page_size=4, kv_pages=16, max_batch_size=1, max_batch_tokens=100)
    driver.submit(ask("low", TEXT[:13], max_tokens=3, priority=1))
    driver.step()
    driver.submit(request("high", 4, max_tokens=1))
    driver.step()
    events: list[TokenEvent] = []
    while driver.scheduler.has_work and not events:
        events = driver.step()
    assert driver.work() == {0: (12, 2, True)}
    assert (driver.scheduler.preemptions, events[0].request_id, events[0].cached_tokens) == (1, "low", 0)
    assert driver.scheduler.prefix_query_tokens == 13 + 4


# -- classes -----------------------------------------------------------------------------------------------------------


def test_a_higher_class_takes_the_rows_of_the_last_of_lower_ones_at_once() -> None:
    driver = Driver(max_batch_size=3, max_batch_tokens=100)
    driver.submit(request("a", 4), request("b", 4, priority=1), request("c", 4, priority=1))
    driver.step()
    driver.submit(request("urgent", 4, priority=-1), request("normal", 4), request("low", 4, priority=1))
    driver.step()
    assert (driver.plan.released, driver.scheduler.preemptions) == ([2, 1], 2)
    assert driver.work() == {0: (4, 1, True), 1: (0, 4, True), 2: (0, 4, True)}
    driver.submit(request("another", 4))
    driver.step()
    assert driver.scheduler.preemptions == 2  # none is of a lower class than it


def test_a_higher_class_takes_pages_of_lower_ones() -> None:
    driver = Driver(page_size=4, kv_pages=6, max_batch_tokens=100)
    driver.submit(request("low", 9, priority=1), request("lower", 5, priority=2))
    driver.step()
    driver.submit(request("high", 8))
    driver.step()
    assert (driver.plan.released, driver.scheduler.num_running) == ([1], 2)
    assert driver.work() == {0: (9, 1, True), 1: (0, 8, True)}


def test_nobody_gives_way_in_vain() -> None:
    driver = Driver(page_size=4, kv_pages=8, max_batch_tokens=100)
    driver.submit(request("high", 17), request("low", 5, priority=1))
    driver.step()
    driver.submit(request("large", 16))  # with the two pages of `low` there are three
    driver.step()
    assert (driver.scheduler.preemptions, driver.scheduler.num_running) == (0, 2)


def test_a_higher_class_does_not_wait_for_a_long_prompt_of_a_lower_one() -> None:
    driver = Driver(max_batch_tokens=16)
    driver.submit(request("long", 100, priority=1))
    driver.step()
    driver.submit(request("high", 10), request("same", 10, priority=1))
    driver.step()
    assert driver.work() == {0: (16, 6, False), 1: (0, 10, True)}


def test_a_lower_class_waits_as_long_as_higher_ones_fill_the_batch_and_then_goes_on_where_it_was() -> None:
    driver = Driver(max_batch_size=1, max_batch_tokens=100)
    driver.submit(request("low", 4, max_tokens=4, priority=1))
    driver.step()
    done = []
    for number in range(5):
        driver.submit(request(f"high {number}", 4, max_tokens=2))
        done += [event.request_id for _ in range(2) for event in driver.step()]
    assert set(done) == {f"high {number}" for number in range(5)}
    [event] = driver.step()
    assert (event.request_id, driver.plan.admitted[0].output_token_ids) == ("low", [9])


def test_one_that_waits_for_a_slot_takes_nobodys_row() -> None:
    adapters = Adapters(slots=1)
    first, second = (adapters.add(AdapterInfo(name=name, rank=1, nbytes=1)) for name in "ab")
    driver = Driver(adapters=adapters, max_batch_size=2, max_batch_tokens=100)
    driver.submit(request("holder", 4), adapter=first)
    driver.submit(request("low", 4, priority=1))
    driver.step()
    driver.submit(request("waiter", 4), adapter=second)
    driver.step()
    driver.submit(request("behind it", 4), adapter=first)  # its slot is there, but it may not pass
    driver.step()
    assert driver.scheduler.preemptions == 0
    driver.submit(request("plain", 4))
    driver.step()
    assert driver.scheduler.preemptions == 1  # it may overtake: it needs no slot
    driver.scheduler.check()


def test_the_salt_has_a_limit() -> None:
    asked = replace(ask("a", [1]), cache_salt="s" * MAX_CACHE_SALT)
    validate_request(asked, engine_info())
    with pytest.raises(InvalidRequestError, match="cache_salt: 257 characters must have at most 256"):
        validate_request(replace(asked, cache_salt="s" * (MAX_CACHE_SALT + 1)), engine_info())
