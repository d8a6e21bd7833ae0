"""The scheduler: one rule, seen from its plans; and properties under random arrivals, cancels and page shortage."""

from __future__ import annotations

import math
import zlib
from collections import deque
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapters import Adapters, LoadedAdapter
from engine.errors import InvalidRequestError
from engine.kv.pages import PagePool
from engine.request import (
    AdapterInfo,
    EngineInfo,
    FinishReason,
    Request,
    SamplingParams,
    TokenEvent,
    TokenLogprob,
    validate_request,
)
from engine.scheduler import Scheduler
from engine.speculate import PromptLookup, Speculation
from engine.step import SampledToken, StepPlan, StepResult
from tests.engine.fake_drafts import SOURCES
from tests.engine.fake_runner import (
    EOS,
    NAN,
    FakeAdapter,
    FakePending,
    FakeRunner,
    engine_info,
    expected,
    prompt_logprob,
)

ADAPTERS = ("a", "b", "c", "d")
BEGINNINGS = ([1, 2, 3, 4, 5, 6] * 4, [1, 2, 3, 4] * 6)  # of prompts; equal up to the fourth token


def make(
    info: EngineInfo,
    adapters: Adapters | None = None,
    prefix_caching: bool = True,
    speculation: Speculation | None = None,
) -> tuple[Scheduler, PagePool]:
    pool = PagePool(info.kv_pages)
    scheduler = Scheduler(
        pool,
        page_size=info.page_size,
        max_batch_size=info.max_batch_size,
        max_batch_tokens=info.max_batch_tokens,
        max_model_len=info.max_model_len,
        eos_token_ids=[EOS],
        adapters=adapters,
        prefix_caching=prefix_caching,
        speculation=speculation,
    )
    return scheduler, pool


def request(name: str, prompt: int, max_tokens: int = 100, priority: int = 0) -> Request:
    """Prompts of different names have nothing in common."""
    sampling = SamplingParams(max_tokens=max_tokens)
    tokens = [zlib.crc32(name.encode())] * prompt
    return Request(request_id=name, prompt_token_ids=tokens, sampling=sampling, priority=priority)


class Driver:
    """A scheduler whose sampled tokens are always `token`; rows are named by the request that holds them."""

    def __init__(
        self, token: int = 9, adapters: Adapters | None = None, prefix_caching: bool = True, **sizes: int
    ) -> None:
        self.scheduler, self.pool = make(engine_info(**sizes), adapters, prefix_caching)
        self.token = token
        self.now = 0.0
        self.plan = StepPlan([])

    def submit(self, *requests: Request, adapter: LoadedAdapter | None = None) -> None:
        for each in requests:
            self.scheduler.submit(each, seed=0, now=self.now, adapter=adapter)

    def step(self) -> list[TokenEvent]:
        self.plan = self.scheduler.plan(self.now)
        sampled = [SampledToken(work.row, self.token) for work in self.plan.work if work.sample]
        targets = {
            work.row: [TokenLogprob(token, -1.0, 1) for token in work.targets.token_ids]
            for work in self.plan.work
            if work.targets is not None
        }
        return self.scheduler.commit(self.plan, StepResult(sampled, targets), self.now)

    def work(self) -> dict[int, tuple[int, int, bool]]:
        """Of the last plan, by row: first position, number of tokens, whether it samples."""
        return {work.row: (work.start, len(work.token_ids), work.sample) for work in self.plan.work}


def test_a_long_prompt_is_computed_in_chunks_and_samples_after_the_last() -> None:
    driver = Driver(max_batch_tokens=16)
    driver.submit(request("a", 40))
    assert [(len(driver.step()), driver.work()[0]) for _ in range(4)] == [
        (0, (0, 16, False)),
        (0, (16, 16, False)),
        (1, (32, 8, True)),
        (1, (40, 1, True)),
    ]


def test_decodes_come_first_and_a_prefill_takes_what_they_leave() -> None:
    driver = Driver(max_batch_tokens=16)
    driver.submit(request("a", 4), request("b", 4))
    driver.step()
    driver.submit(request("urgent", 100, max_tokens=1, priority=-1))
    driver.step()
    assert driver.work() == {0: (4, 1, True), 1: (4, 1, True), 2: (0, 14, False)}
    driver.step()
    assert driver.work() == {0: (5, 1, True), 1: (5, 1, True), 2: (14, 14, False)}


def test_a_small_request_does_not_overtake_a_large_one_of_its_priority() -> None:
    driver = Driver(page_size=4, kv_pages=8, max_batch_tokens=100)
    driver.submit(request("running", 16), request("large", 20, max_tokens=1), request("small", 1, max_tokens=1))
    driver.step()
    assert (driver.scheduler.num_running, len(driver.scheduler.waiting)) == (1, 2)


def test_a_lower_priority_number_is_admitted_first() -> None:
    driver = Driver(max_batch_size=1, max_batch_tokens=100)
    driver.submit(request("normal", 1, max_tokens=1), request("urgent", 1, max_tokens=1, priority=-5))
    assert [driver.step()[0].request_id for _ in range(2)] == ["urgent", "normal"]


def test_when_pages_run_out_the_newest_of_the_lowest_priority_gives_way_and_resumes_with_its_tokens() -> None:
    driver = Driver(page_size=4, kv_pages=6, max_batch_tokens=100)
    driver.submit(request("normal", 5), request("urgent", 5, priority=-1))
    for _ in range(8):
        driver.step()
    driver.submit(request("late", 1, max_tokens=1))
    assert (driver.scheduler.preemptions, driver.pool.num_free) == (0, 0)  # three pages each, and both full

    driver.step()
    assert (driver.plan.released, driver.work()) == ([1], {0: (12, 1, True)})  # `normal` gives way to `urgent`
    assert driver.pool.num_free == 2  # `late` would fit, but `normal` keeps its place
    assert driver.scheduler.waiting.first.request.request_id == "normal"

    driver.scheduler.cancel("urgent", now=0.0)
    driver.step()
    init = driver.plan.admitted[0]
    assert (len(init.prompt_token_ids), init.output_token_ids) == (5, [9] * 8)
    assert driver.work()[init.row] == (8, 5, True)  # its third page went to `urgent`, the others it finds again


def test_a_victim_that_was_planned_already_gives_its_budget_back() -> None:
    driver = Driver(page_size=1, kv_pages=22, max_batch_tokens=4)
    driver.submit(request("a", 2), request("b", 2))
    driver.step()
    driver.submit(request("urgent", 12, priority=-1))
    while driver.scheduler.preemptions == 0:
        driver.step()
    # The decodes came first, then pages lacked for `urgent`: `b` went, and with it its token of this step.
    assert driver.plan.released == [1]
    assert driver.work() == {0: (6, 1, True), 2: (8, 3, False)}


def test_a_newcomer_leaves_one_page_for_each_that_runs() -> None:
    driver = Driver(page_size=4, kv_pages=4, max_batch_tokens=100)
    driver.submit(request("a", 8, max_tokens=2), request("b", 8, max_tokens=1))
    driver.step()
    assert driver.scheduler.num_running == 1  # two pages are free, and `a` will want one of them
    driver.step()
    assert driver.scheduler.num_running == 0
    assert driver.step()[0].request_id == "b"  # alone it needs no reserve


@pytest.mark.parametrize(
    ("sampled", "params", "token_ids", "reason", "stop_token_id"),
    [
        ([4, EOS], SamplingParams(), [4], FinishReason.STOP, EOS),
        ([4, 5], SamplingParams(stop_token_ids=(5,)), [4], FinishReason.STOP, 5),
        ([4, 5, EOS], SamplingParams(stop_token_ids=(5,), min_tokens=2), [4, 5], FinishReason.STOP, EOS),
        ([EOS, 4, 5], SamplingParams(stop_token_ids=(5,), ignore_eos=True), [EOS, 4], FinishReason.STOP, 5),
        ([4, EOS], SamplingParams(ignore_eos=True, max_tokens=2), [4, EOS], FinishReason.LENGTH, None),
        ([4, 5, 6], SamplingParams(max_tokens=3), [4, 5, 6], FinishReason.LENGTH, None),
        ([4, 5], SamplingParams(max_tokens=99), [4, 5], FinishReason.LENGTH, None),  # 6 of prompt + 2 = max_model_len
        ([EOS], SamplingParams(), [], FinishReason.STOP, EOS),
    ],
)
def test_a_request_ends_for_the_right_reason(
    sampled: list[int], params: SamplingParams, token_ids: list[int], reason: FinishReason, stop_token_id: int | None
) -> None:
    driver = Driver(max_model_len=8 if params.max_tokens == 99 else 100)
    driver.submit(Request(request_id="a", prompt_token_ids=[1] * 6, sampling=params))
    events = []
    for driver.token in sampled:
        events += driver.step()
    assert [token for event in events for token in event.token_ids] == token_ids
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert (events[-1].finish_reason, events[-1].stop_token_id) == (reason, stop_token_id)
    assert driver.pool.num_used == 0


def test_a_row_that_fails_ends_alone() -> None:
    driver = Driver()
    driver.submit(request("a", 2), request("b", 2))
    driver.step()
    plan = driver.scheduler.plan(0.0)
    broken = StepResult([SampledToken(0, -1, failed="not numbers"), SampledToken(1, 9)])
    first, second = driver.scheduler.commit(plan, broken, 0.0)
    assert (first.request_id, first.finish_reason, first.error) == ("a", FinishReason.ERROR, "not numbers")
    assert (second.request_id, second.finish_reason, second.token_ids) == ("b", None, [9])
    assert driver.scheduler.corrupted == 1
    driver.step()
    assert (driver.plan.released, list(driver.work())) == ([0], [1])


@pytest.mark.parametrize(("steps", "where"), [(0, "waiting"), (1, "prefilling"), (3, "decoding")])
def test_cancelling_frees_pages_and_row_before_the_next_step(steps: int, where: str) -> None:
    driver = Driver(max_batch_tokens=16)
    driver.submit(request("a", 40))
    for _ in range(steps):
        driver.step()
    event = driver.scheduler.cancel("a", now=3.0)
    assert event is not None
    assert event.finish_reason is FinishReason.CANCELLED
    assert (driver.pool.num_used, len(driver.scheduler.waiting), driver.scheduler.num_running) == (0, 0, 0)
    assert driver.scheduler.cancel("a", now=3.0) is None
    assert driver.scheduler.has_work == (where != "waiting")  # a row is to be released
    driver.step()
    assert not driver.scheduler.has_work


def test_an_id_in_flight_is_refused_and_free_again_after_the_end() -> None:
    driver = Driver()
    driver.submit(request("a", 1, max_tokens=1))
    with pytest.raises(InvalidRequestError, match="request_id: a is in flight already"):
        driver.submit(request("a", 1))
    driver.step()
    driver.submit(request("a", 1))


def test_timings_count_from_arrival_on_the_clock_that_is_given() -> None:
    driver = Driver(max_batch_size=1)
    driver.now = 10.0
    driver.submit(request("a", 1, max_tokens=1), request("b", 1, max_tokens=2))
    driver.step()
    for driver.now in (12.0, 15.0):
        [event] = driver.step()
    assert event.timings is not None
    assert (event.timings.queued, event.timings.first_token, event.timings.finished) == (2.0, 2.0, 5.0)


# -- properties ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """A request that is submitted before step `at` and cancelled before step `at + cancel_after`."""

    request: Request
    at: int
    cancel_after: int | None


@st.composite
def engines(draw: st.DrawFn) -> EngineInfo:
    batch = draw(st.integers(1, 5))
    return engine_info(
        page_size=draw(st.integers(1, 6)),
        kv_pages=draw(st.integers(1, 16)),
        max_batch_size=batch,
        max_batch_tokens=batch + draw(st.integers(0, 12)),
        max_model_len=draw(st.integers(2, 40)),
        max_loras=draw(st.integers(1, 3)),
    )


@st.composite
def speculations(draw: st.DrawFn) -> Speculation | None:
    """None, or drafts wherever there is room for them or where they seem to pay, right or wrong."""
    source = draw(st.sampled_from([None, PromptLookup, *SOURCES]))
    return (
        None if source is None else Speculation(draw(st.integers(1, 9)), draw(st.sampled_from([math.inf, 4.0])), source)
    )


@st.composite
def arrivals(draw: st.DrawFn) -> list[Arrival]:
    made = []
    for number in range(draw(st.integers(1, 10))):
        max_tokens = draw(st.integers(1, 20))
        sampling = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=draw(st.integers(0, max_tokens)),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=number,
            ignore_eos=draw(st.booleans()),
            stop_token_ids=draw(st.sampled_from([(), (3, 5, 11)])),
            prompt_logprobs=draw(st.sampled_from([None, None, 0])),
        )
        begin = BEGINNINGS[draw(st.integers(0, 1))][: draw(st.integers(0, 20))]
        prompt = begin + draw(st.lists(st.integers(0, NAN), min_size=1, max_size=8))  # NAN: some fail
        made.append(
            Arrival(
                Request(
                    request_id=str(number),
                    prompt_token_ids=prompt,
                    sampling=sampling,
                    priority=draw(st.integers(-1, 1)),
                    adapter=draw(st.sampled_from([None, *ADAPTERS])),
                    cache_salt=draw(st.sampled_from(["", "tenant"])),
                ),
                at=draw(st.integers(0, 20)),
                cancel_after=draw(st.none() | st.integers(0, 15)),
            )
        )
    return made


class Run:
    """All arrivals through a scheduler and the fake runner, which checks rows, pages and the budget of every plan.

    Up to `lookahead` steps are in flight when one is planned; a late runner has computed none of them by then.
    """

    def __init__(
        self,
        info: EngineInfo,
        all_arrivals: list[Arrival],
        prefix_caching: bool,
        speculation: Speculation | None,
        lookahead: int,
        late: bool,
    ) -> None:
        self.info = info
        self.adapters = Adapters(info.max_loras)
        self.scheduler, self.pool = make(info, self.adapters, prefix_caching, speculation)
        self.events: dict[str, list[TokenEvent]] = {}
        self.submitted: list[Arrival] = []
        runner = FakeRunner(info, late=late)
        in_flight: deque[tuple[StepPlan, FakePending]] = deque()
        assert runner.adapters is not None
        for name in ADAPTERS:
            added = self.adapters.add(AdapterInfo(name=name, rank=1, nbytes=1))
            runner.adapters.keep(added.number, FakeAdapter(name))
        for step in range(2000):
            for arrival in all_arrivals:
                name = arrival.request.request_id
                if arrival.at == step and self._fits(arrival.request):
                    wanted = arrival.request.adapter
                    adapter = None if wanted is None else self.adapters.find(wanted)
                    self.scheduler.submit(arrival.request, arrival.request.sampling.seed or 0, float(step), adapter)
                    self.submitted.append(arrival)
                if arrival.cancel_after is not None and arrival.at + arrival.cancel_after == step:
                    event = self.scheduler.cancel(name, float(step))
                    self._note([event] if event is not None else [])
            if step > 40 and not self.scheduler.has_work and not in_flight:
                return
            plan = self.scheduler.plan(float(step))
            drafts = 0 if speculation is None else speculation.max_tokens
            logits = sum(1 + work.drafts for work in plan.work if work.sample)
            assert logits <= max(info.max_batch_size, 1 + drafts), "more logits than there is memory for"
            if not plan.is_empty:
                in_flight.append((plan, runner.launch(plan)))
            if len(in_flight) > lookahead or (plan.is_empty and in_flight):
                first, pending = in_flight.popleft()
                self._note(self.scheduler.commit(first, pending.result(), float(step)))
            self.scheduler.check()
        raise AssertionError("it does not end")

    def _fits(self, each: Request) -> bool:
        try:
            validate_request(each, self.info)
        except InvalidRequestError:
            return False
        return True

    def _note(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events.setdefault(event.request_id, []).append(event)


@settings(max_examples=400, deadline=None)
@given(
    info=engines(),
    all_arrivals=arrivals(),
    prefix_caching=st.booleans(),
    speculation=speculations(),
    lookahead=st.integers(0, 1),
    late=st.booleans(),
)
def test_whatever_arrives_nothing_leaks_all_end_once_in_turn_and_with_the_same_tokens(
    info: EngineInfo,
    all_arrivals: list[Arrival],
    prefix_caching: bool,
    speculation: Speculation | None,
    lookahead: int,
    late: bool,
) -> None:
    run = Run(info, all_arrivals, prefix_caching, speculation, lookahead, late)

    assert run.pool.num_used == 0
    assert (run.scheduler.num_running, len(run.scheduler.waiting), run.scheduler.waiting.num_tokens) == (0, 0, 0)
    assert all((adapter.requests, adapter.rows) == (0, 0) for adapter in map(run.adapters.find, ADAPTERS))
    started: dict[tuple[int, bool], float] = {}
    for arrival in run.submitted:
        events = run.events[arrival.request.request_id]
        assert [event.finish_reason is not None for event in events] == [False] * (len(events) - 1) + [True]
        tokens = [token for event in events for token in event.token_ids]
        oracle, last = expected(arrival.request, info), events[-1]
        scores = [each for event in events for each in event.prompt_logprobs or []]
        prompt = arrival.request.prompt_token_ids
        wanted = [prompt_logprob(prompt[:at], prompt[at]) for at in range(1, len(prompt))]
        if arrival.request.sampling.prompt_logprobs is None:
            assert not scores
        else:
            assert scores == (wanted if tokens else wanted[: len(scores)])
        if last.finish_reason is FinishReason.CANCELLED:
            assert tokens == oracle.token_ids[: len(tokens)]
        else:
            assert (tokens, last.finish_reason, last.stop_token_id) == (
                oracle.token_ids,
                oracle.reason,
                oracle.stop_token_id,
            )
        assert last.timings is not None
        if tokens:  # it ran; in its priority, after those that came before it and ran, with an adapter or without
            start, line = arrival.at + last.timings.queued, (arrival.request.priority, arrival.request.adapter is None)
            assert start >= started.get(line, 0.0)
            started[line] = start
    if all(arrival.cancel_after is None for arrival in run.submitted):
        computed = sum(len(expected(arrival.request, info).token_ids) for arrival in run.submitted)
        assert run.scheduler.generated_tokens == computed
