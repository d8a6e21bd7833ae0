"""One step planned while the one before it runs: what may be assumed of a token that nobody has seen, and what not.

The runner is a fake that computes nothing before its result is asked for, so that whatever is used too early is wrong.
That tokens are the same with real models is in test_invariance, and everything at random in test_scheduler.
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.request import FinishReason, Request, SamplingParams, TokenEvent
from engine.step import LAST_SAMPLED, Masks, StepPlan, StepResult
from tests.engine.fake_runner import EOS, NAN, FakePending, FakeRunner, engine_info, expected

AHEAD = EngineConfig(model_path="-", seed=1, lookahead=1, max_draft_tokens=0)


def request(name: str, prompt: int = 4, **sampling: object) -> Request:
    """Prompts of other names begin otherwise, so that no pages are shared."""
    params = SamplingParams(**({"max_tokens": 5, "ignore_eos": True, "temperature": 0} | sampling))
    return Request(request_id=name, prompt_token_ids=[20 + ord(name[0]) % 25] * prompt, sampling=params)


class Ahead:
    """A core that looks ahead, over a runner that is late."""

    def __init__(self, *requests: Request, **sizes: int) -> None:
        self.runner = FakeRunner(engine_info(**sizes), late=True)
        self.core = EngineCore(self.runner, AHEAD)
        self.events: dict[str, list[TokenEvent]] = {}
        self.add(*requests)

    def add(self, *requests: Request) -> None:
        for each in requests:
            self.core.add(each)
            self.events[each.request_id] = []

    def step(self) -> None:
        self.note(self.core.step())

    def note(self, events: list[TokenEvent]) -> None:
        for event in events:
            self.events[event.request_id].append(event)

    def cancel(self, name: str) -> None:
        event = self.core.cancel(name)
        self.note([] if event is None else [event])

    def run(self) -> None:
        while self.core.has_work:
            self.step()
        assert (self.core.stats().kv_pages_used, self.core.stats().running) == (0, 0)

    def tokens(self, name: str) -> list[int]:
        return [token for event in self.events[name] for token in event.token_ids]

    def ended(self, name: str) -> list[FinishReason]:
        return [event.finish_reason for event in self.events[name] if event.finish_reason is not None]

    def said(self, each: Request) -> bool:
        """It ended once, and as it would have alone."""
        wanted = expected(each, self.runner.info)
        return (self.tokens(each.request_id), self.ended(each.request_id)) == (wanted.token_ids, [wanted.reason])

    def work(self, step: int) -> dict[int, tuple[int, list[int]]]:
        """Of the plan of a step, counted from 0: start and tokens by row."""
        return {work.row: (work.start, work.token_ids) for work in self.runner.plans[step].work}


def test_a_step_is_launched_before_the_result_of_the_one_before_it_is_asked_for() -> None:
    order: list[str] = []

    class Logged(FakeRunner):
        def launch(self, plan: StepPlan, masks: Masks | None = None) -> FakePending:
            order.append(f"launch {len(self.plans)}")
            return super().launch(plan, masks)

        def result_of(self, pending: FakePending) -> StepResult:
            order.append(f"result {self.plans.index(pending.plan)}")
            return super().result_of(pending)

    def order_of(lookahead: int) -> list[str]:
        order.clear()
        core = EngineCore(Logged(engine_info()), replace(AHEAD, lookahead=lookahead))
        core.add(request("a", max_tokens=3))
        while core.has_work:
            core.step()
        return list(order)

    # The last step is the runner's, which learns that the row is free.
    assert order_of(0) == [f"{what} {step}" for step in range(4) for what in ("launch", "result")]
    assert order_of(1) == [
        "launch 0",
        "launch 1",
        "result 0",
        "launch 2",
        "result 1",
        "result 2",
        "launch 3",
        "result 3",
    ]


def test_what_a_row_is_about_to_sample_is_planned_as_such_and_known_tokens_as_they_are() -> None:
    ahead = Ahead(request("a", prompt=20, max_tokens=3), max_batch_tokens=16)
    ahead.run()
    assert [ahead.work(step) for step in range(4)] == [
        {0: (0, [42] * 16)},
        {0: (16, [42] * 4)},
        {0: (20, [LAST_SAMPLED])},
        {0: (21, [LAST_SAMPLED])},
    ]
    assert ahead.said(request("a", prompt=20, max_tokens=3))


@pytest.mark.parametrize(("max_tokens", "context"), [(1, 100), (4, 100), (50, 9)])
def test_a_row_that_the_coming_token_ends_for_its_length_is_not_computed_again(max_tokens: int, context: int) -> None:
    each = request("a", prompt=6, max_tokens=max_tokens)
    ahead = Ahead(each, max_model_len=context)
    ahead.run()
    assert ahead.said(each)
    assert sum(plan.num_tokens for plan in ahead.runner.plans) == 6 + len(ahead.tokens("a")) - 1


def test_an_end_that_only_the_token_tells_is_seen_one_step_late_and_what_was_computed_since_is_dropped() -> None:
    natural = expected(request("a", max_tokens=30), engine_info()).token_ids
    end = next(index for index in range(3, 9) if natural[index] not in natural[:index])
    stopped = request("a", max_tokens=30, stop_token_ids=(natural[end],))
    other = request("b", prompt=3, max_tokens=12)
    ahead = Ahead(stopped, other)
    ahead.run()
    assert ahead.said(stopped)
    assert ahead.said(other)
    computed = [step for step in range(len(ahead.runner.plans)) if 0 in ahead.work(step)]
    assert len(computed) == end + 1 + 1  # its tokens, the one that stops it, and one for nothing
    assert ahead.core.stats().generated_tokens == end + 12


@pytest.mark.parametrize("token", [EOS, NAN])
def test_a_row_that_fails_or_ends_while_its_next_step_is_in_flight_has_one_terminal_event(token: int) -> None:
    each = Request(request_id="a", prompt_token_ids=[token, 2, 3], sampling=SamplingParams(max_tokens=40, seed=5))
    other = request("b", max_tokens=12)
    ahead = Ahead(each, other)
    ahead.run()
    assert ahead.said(each)
    assert ahead.said(other)


def test_pages_of_a_request_that_ended_go_to_the_next_one_while_its_last_step_is_in_flight() -> None:
    gone, follows = request("gone", prompt=8, max_tokens=8), request("follows", prompt=10, max_tokens=6)
    ahead = Ahead(gone, page_size=4, kv_pages=4, max_batch_size=1)
    ahead.step()
    ahead.step()
    ahead.add(follows)
    ahead.cancel("gone")
    assert ahead.core.stats().kv_pages_used == 0
    ahead.step()  # launched before the step that still writes for `gone` has been computed
    last = ahead.runner.plans[-1]
    assert (last.released, [init.row for init in last.admitted]) == ([0], [0])
    used = {page for plan in ahead.runner.plans[:2] for page in plan.work[0].new_pages}
    assert used & set(last.work[0].new_pages)
    ahead.run()
    assert ahead.said(follows)
    assert ahead.ended("gone") == [FinishReason.CANCELLED]


def test_what_comes_for_a_request_that_was_preempted_since_counts_and_it_is_not_admitted_before() -> None:
    requests = [request(name, prompt=4, max_tokens=14) for name in ("a", "b")]
    ahead = Ahead(*requests, page_size=1, kv_pages=20, max_batch_size=2)
    while ahead.core.stats().preemptions == 0:
        ahead.step()
    assert ahead.core.stats().running == 1
    computed = len([plan for plan in ahead.runner.plans if any(work.row == 1 for work in plan.work)])
    assert len(ahead.tokens("b")) == computed  # the last of them came after the pre-emption
    ahead.run()
    assert all(map(ahead.said, requests))
    [again] = [init for plan in ahead.runner.plans[1:] for init in plan.admitted]
    assert len(again.output_token_ids) == computed


def test_whoever_was_preempted_is_not_admitted_before_what_is_in_flight_for_it_has_come() -> None:
    each = request("a")
    ahead = Ahead(each)
    ahead.step()
    scheduler = ahead.core._scheduler
    scheduler._preempt(scheduler._holdings.running[0], now=0.0)
    ahead.step()
    assert (ahead.runner.plans[1].released, ahead.runner.plans[1].admitted) == ([0], [])
    ahead.step()
    assert [init.output_token_ids for init in ahead.runner.plans[2].admitted] == [ahead.tokens("a")]
    ahead.run()
    assert ahead.said(each)


def test_a_request_may_end_by_the_token_that_comes_after_its_preemption() -> None:
    for max_tokens in range(2, 14):
        requests = [request("a", prompt=4, max_tokens=14), request("b", prompt=4, max_tokens=max_tokens)]
        ahead = Ahead(*requests, page_size=1, kv_pages=20, max_batch_size=2)
        ahead.run()
        assert all(map(ahead.said, requests))


def test_a_cancel_at_any_moment_ends_one_request_and_no_token_of_the_others_changes() -> None:
    requests = [request("a", prompt=9), request("b", prompt=2, max_tokens=8), request("c", prompt=17)]
    for name in "abc":
        for moment in range(12):
            ahead = Ahead(*requests, page_size=2, kv_pages=20, max_batch_size=3, max_batch_tokens=8)
            for _ in range(moment):
                ahead.step()
            ahead.cancel(name)
            ahead.run()
            assert len(ahead.ended(name)) == 1
            assert all(ahead.said(each) for each in requests if each.request_id != name)
            wanted = expected(next(each for each in requests if each.request_id == name), ahead.runner.info).token_ids
            assert ahead.tokens(name) == wanted[: len(ahead.tokens(name))]


def test_no_more_steps_are_in_flight_than_two() -> None:
    ahead = Ahead(*(request(str(n), prompt=3 + n, max_tokens=9) for n in range(6)))
    ahead.run()
    assert ahead.runner.most_in_flight == 2


@pytest.mark.parametrize(("device", "lookahead"), [("cpu", 0), ("cuda", 1)])
def test_a_gpu_looks_ahead_and_a_cpu_does_not_unless_told(device: str, lookahead: int) -> None:
    config = EngineConfig(model_path="-")
    assert config.lookahead_on(device) == lookahead
    assert EngineConfig(model_path="-", lookahead=1 - lookahead).lookahead_on(device) == 1 - lookahead
