"""Drafts: what is guessed, when it pays, what stands of it, and how the scheduler plans and commits it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import speculate
from engine.kv.pages import PagePool
from engine.request import FinishReason, Request, SamplingParams, TokenEvent
from engine.scheduler import Scheduler
from engine.speculate import (
    GRAMS,
    RETRY,
    Drafter,
    DraftSource,
    Guess,
    Patience,
    PromptLookup,
    Speculation,
    Step,
    standing,
)
from engine.step import LAST_SAMPLED, RowWork, SampledToken, StepPlan
from tests.engine.fake_drafts import Right, Wrong
from tests.engine.fake_runner import EOS, FakeRunner, engine_info, next_token

# -- the lookup ------------------------------------------------------------------------------------------------


def looked_up(tokens: list[int], limit: int, slots: int) -> Guess | None:
    """What PromptLookup means: walk back to the latest earlier n-gram in the slot of the last one. No tables."""

    def slot(gram: list[int]) -> int:
        return hash(tuple(gram)) % slots

    for n in GRAMS:
        last = tokens[-n:]
        for end in range(len(tokens) - 1, n - 1, -1):
            if slot(tokens[end - n : end]) != slot(last):
                continue
            if tokens[end - n : end] != last:
                break  # a later n-gram took the slot
            copied = list(tokens)
            for index in range(limit):
                copied.append(copied[end + index])
            return Guess(copied[len(tokens) :], n)
    return None


@settings(max_examples=400, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    slots=st.sampled_from([4, 16, 2**20]),
    data=st.data(),
)
def test_the_lookup_finds_what_a_walk_through_the_whole_text_finds(
    tokens: list[int], slots: int, data: st.DataObject
) -> None:
    lookup = PromptLookup(longest=2**18, most_slots=slots)
    length = 0
    while length < len(tokens):
        length += data.draw(st.integers(1, len(tokens) - length))
        limit = data.draw(st.integers(1, 9))
        known = tokens[:length]
        assert lookup.propose(known, limit) == looked_up(known, limit, slots)


def test_the_longest_match_wins_and_of_those_the_latest() -> None:
    lookup = PromptLookup(10_000)  # whose slots nothing shares
    assert lookup.propose([1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 9, 4, 7, 1, 2, 3, 4], 3) == Guess([5, 9, 2], 4)
    assert PromptLookup(10_000).propose([1, 2, 5, 1, 2, 6, 1, 2], 1) == Guess([6], 2)
    assert PromptLookup(10_000).propose([1, 2, 3, 4, 2], 1) is None  # one token alone is no match


def test_a_loop_is_guessed_round_and_round() -> None:
    assert PromptLookup(10_000).propose([7, 1, 2, 3, 1, 2], 8) == Guess([3, 1, 2, 3, 1, 2, 3, 1], 2)
    assert PromptLookup(10_000).propose([5, 5, 5], 4) == Guess([5, 5, 5, 5], 2)


def test_a_long_prompt_is_indexed_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculate, "INDEXED_AT_ONCE", 10)
    lookup, tokens = PromptLookup(10_000), [*range(25), 20, 21]
    assert [lookup.propose(tokens, 1) for _ in range(3)] == [None, None, Guess([22], 2)]


def test_memory_is_bounded_by_the_sequence_and_at_all() -> None:
    def table_bytes(longest: int) -> int:
        return sum(len(table) * table.itemsize for table in PromptLookup(longest)._ends.values())

    assert table_bytes(100) == 3 * 4 * 512
    assert table_bytes(10**6) == table_bytes(10**5) == 3 * 4 * 2**16


# -- what pays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "reading", "chances", "taken"),
    [
        (1, 1.0, [0.51, 0.51, 0.49], [True, True, False]),  # half of a step is reading: 1 token in the time of 2
        (1, 1.0, [0.49], [False]),
        (1, 99.0, [0.02, 0.02], [True, True]),
        (16, 4.0, [0.79, 0.81], [False, True]),  # 16 in the time of 20
        (512, 4.0, [0.99], [False]),
        (1, 0.0, [1.0], [False]),  # computing is all: no token is cheaper for being in a batch
    ],
)
def test_a_draft_is_taken_if_it_raises_the_rate_of_the_step(
    tokens: int, reading: float, chances: list[float], taken: list[bool]
) -> None:
    step = Step(tokens, reading)
    assert [step.take(chance) for chance in chances] == taken


class Scripted:
    """Guesses that a test gives, kind by kind."""

    def __init__(self, guesses: list[Guess | None]) -> None:
        self.guesses = guesses

    def propose(self, tokens: list[int], limit: int) -> Guess | None:
        guess = self.guesses.pop(0)
        return None if guess is None else Guess(guess.tokens[:limit], guess.kind)


def lengths(outcomes: list[tuple[Guess | None, list[int]]], reading: float) -> list[int]:
    """How many drafts are taken, where `outcomes` are guesses and what came instead."""
    drafter, tokens, found = Drafter(Scripted([guess for guess, _ in outcomes])), [0], []
    for _, came in outcomes:
        found.append(len(drafter.propose(tokens, 8, Step(1, reading))))
        tokens = tokens + came
    return found


RIGHT: tuple[Guess, list[int]] = (Guess([1] * 8, 4), [1])
WRONG: tuple[Guess, list[int]] = (Guess([1] * 8, 4), [2])


def test_drafts_grow_while_they_are_right_stop_when_they_are_not_and_come_again() -> None:
    found = lengths([RIGHT] * 30 + [WRONG] * 30 + [RIGHT] * 31, reading=2.0)
    grown, stopped, again = found[30], found[60], found[90]
    assert (found[0] < grown, grown, stopped, again) == (True, 8, 0, 8)
    assert sorted(found[:31]) == found[:31]


def test_a_kind_that_is_wrong_does_not_harm_the_others() -> None:
    other = (Guess([3] * 8, 2), [2])
    assert lengths([RIGHT, other] * 40 + [RIGHT], reading=2.0)[-1] == 8
    assert lengths([RIGHT, other] * 40, reading=2.0)[-1] == 0


def test_what_comes_behind_a_wrong_guess_teaches_nothing() -> None:
    assert lengths([(Guess([1, 5, 5, 5], 4), [2, 5, 5, 5])] * 40, reading=2.0)[-1] == 0


def test_of_each_row_the_tokens_stand_up_to_the_first_that_its_draft_did_not_say() -> None:
    work = [
        RowWork(3, 10, [5, 6, 7], [], True, drafts=2),
        RowWork(1, 0, [5, 6, 7], [], False),
        RowWork(0, 10, [5, 6, 7], [], True, drafts=2),
        RowWork(2, 10, [5, 6, 7], [], True, drafts=2),
        RowWork(4, 10, [5], [], True),
    ]
    sampled = [(3, 6), (3, 7), (3, 8), (0, 1), (0, 7), (0, 8), (2, 6), (2, 1), (2, 8), (4, 9)]
    stand = standing(work, [SampledToken(row, token) for row, token in sampled])
    assert [(token.row, token.token_id) for token in stand] == [(3, 6), (3, 7), (3, 8), (0, 1), (2, 6), (2, 1), (4, 9)]


# -- in the scheduler ------------------------------------------------------------------------------------------


class Engine:
    """A scheduler with drafts over the fake runner, whose hashes `Right` guesses."""

    def __init__(
        self, source: Callable[[int], DraftSource] = Right, most: int = 3, reading: float = math.inf, **sizes: int
    ) -> None:
        info = engine_info(**sizes)
        self.runner, self.pool = FakeRunner(info), PagePool(info.kv_pages)
        self.scheduler = Scheduler(
            self.pool,
            page_size=info.page_size,
            max_batch_size=info.max_batch_size,
            max_batch_tokens=info.max_batch_tokens,
            max_model_len=info.max_model_len,
            eos_token_ids=[EOS],
            speculation=Speculation(most, reading, source),
        )

    def submit(self, name: str, prompt: list[int], **sampling: object) -> None:
        params = SamplingParams(**({"temperature": 0.0, "ignore_eos": True} | sampling))
        self.scheduler.submit(Request(request_id=name, prompt_token_ids=prompt, sampling=params), seed=0, now=0.0)

    def step(self) -> list[TokenEvent]:
        plan = self.scheduler.plan(0.0)
        return self.scheduler.commit(plan, self.runner.run(plan), 0.0)

    def drafts(self) -> list[int]:
        """Of the rows of the last step."""
        return [work.drafts for work in self.runner.plans[-1].work]


def following(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, 0))
    return tokens[len(prompt) :]


def test_right_drafts_stand_with_the_token_after_them_in_one_event_and_are_counted() -> None:
    engine = Engine(most=3, page_size=64)
    engine.submit("a", [1, 2], max_tokens=20, logprobs=0)
    events = [engine.step()[0] for _ in range(3)]
    assert [event.token_ids for event in events] == [
        following([1, 2], 9)[:1],
        following([1, 2], 9)[1:5],
        following([1, 2], 9)[5:],
    ]
    assert [len(event.logprobs or []) for event in events] == [1, 4, 4]
    assert [event.timings is not None for event in events] == [True, False, False]
    scheduler = engine.scheduler
    assert (scheduler.generated_tokens, scheduler.draft_tokens, scheduler.accepted_draft_tokens) == (9, 6, 6)


def test_wrong_drafts_cost_their_computation_only() -> None:
    engine = Engine(Wrong, most=3, page_size=64)
    engine.submit("a", [1, 2], max_tokens=20)
    events = [engine.step()[0] for _ in range(3)]
    assert [token for event in events for token in event.token_ids] == following([1, 2], 3)
    scheduler = engine.scheduler
    assert (scheduler.generated_tokens, scheduler.draft_tokens, scheduler.accepted_draft_tokens) == (3, 6, 0)


@pytest.mark.parametrize("end", range(1, 10))
@pytest.mark.parametrize("why", ["stop", "length", "context"])
def test_whatever_ends_a_request_among_its_drafts_drops_the_rest(end: int, why: str) -> None:
    prompt = [1, 2]
    output = following(prompt, end)
    sampling: dict[str, object] = {"max_tokens": 50}
    sizes = {"page_size": 64}
    if why == "stop":
        stop = following(prompt, end + 1)[-1]
        end = output.index(stop) if stop in output else end
        sampling["stop_token_ids"] = (stop,)
    elif why == "length":
        sampling["max_tokens"] = end
    else:
        sizes["max_model_len"] = len(prompt) + end
    engine = Engine(most=5, **sizes)
    engine.submit("a", prompt, **sampling)
    events: list[TokenEvent] = []
    while engine.scheduler.has_work:
        events += engine.step()
    assert [token for event in events for token in event.token_ids] == output[:end]
    assert events[-1].finish_reason is (FinishReason.STOP if why == "stop" else FinishReason.LENGTH)
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert (engine.pool.num_used, engine.scheduler.generated_tokens) == (0, end)


def test_drafts_take_what_budget_and_logits_are_left_and_nothing_that_others_need() -> None:
    engine = Engine(most=3, max_batch_tokens=8, max_batch_size=3, page_size=64)
    engine.submit("a", [1], max_tokens=50)
    engine.submit("b", [2], max_tokens=50)
    engine.step()
    engine.step()
    assert engine.drafts() == [2, 0]  # logits for 4 rows: as many as one sequence with all its drafts has
    engine.submit("c", [3] * 20, max_tokens=50)
    engine.step()
    assert engine.drafts() == [0, 0, 0]  # the prompt has taken the budget


def test_drafts_leave_a_page_for_each_that_runs_and_preempt_nobody() -> None:
    engine = Engine(most=3, page_size=4, kv_pages=4, max_batch_size=2)
    engine.submit("a", [1, 2, 3], max_tokens=9)
    engine.step()
    engine.step()
    assert engine.drafts() == [3]  # into a second page: another is free for `a`
    engine.submit("b", [4, 5, 6], max_tokens=2)
    engine.step()
    assert (engine.drafts()[0], engine.pool.num_free, engine.scheduler.preemptions) == (0, 1, 0)


def test_a_request_with_penalties_gets_no_drafts() -> None:
    engine = Engine(most=3, max_batch_size=8, page_size=64)
    for name, penalty in {"a": "repetition_penalty", "b": "presence_penalty", "c": "frequency_penalty"}.items():
        engine.submit(name, [1], max_tokens=50, **{penalty: 1.5})
    engine.submit("d", [1], max_tokens=50, logit_bias={3: 1.0}, min_tokens=4)
    engine.step()
    engine.step()
    assert [drafts > 0 for drafts in engine.drafts()] == [False, False, False, True]


def test_a_full_batch_gets_no_drafts_where_computing_costs_more_than_reading() -> None:
    engine = Engine(most=3, reading=2.0, max_batch_size=8, page_size=64)
    for name in "abcdefgh":
        engine.submit(name, [ord(name) % 7], max_tokens=4 if name != "a" else 60)
    drafts = []
    while engine.scheduler.has_work:
        engine.step()
        drafts.append(sum(engine.drafts()) / max(1, len(engine.drafts())))
    assert drafts[1] == 0
    assert max(drafts) == 3  # when `a` is alone, and has been guessed right for a while


# -- with a step in flight -------------------------------------------------------------------------------------


def test_while_drafts_pay_nothing_is_planned_before_the_token_they_follow_is_known() -> None:
    engine = Engine(most=3, page_size=64)
    engine.submit("a", [1, 2], max_tokens=20)
    for drafts in (0, 3, 3):
        plan = engine.scheduler.plan(0.0)
        assert [work.drafts for work in plan.work] == [drafts]
        assert engine.scheduler.plan(0.0).is_empty
        engine.scheduler.commit(plan, engine.runner.run(plan), 0.0)


def test_drafts_in_flight_are_waited_for_even_if_they_do_not_pay_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(most=3, page_size=64, max_batch_size=8)
    engine.submit("a", [1, 2], max_tokens=20)
    engine.submit("never guessed", [3, 4], max_tokens=20, presence_penalty=1.0)
    engine.step()
    plan = engine.scheduler.plan(0.0)
    assert [work.drafts for work in plan.work] == [3, 0]
    monkeypatch.setattr(Patience, "wait", lambda self: False)
    assert engine.scheduler.plan(0.0).is_empty
    assert [len(event.token_ids) for event in engine.scheduler.commit(plan, engine.runner.run(plan), 0.0)] == [4, 1]


def test_where_drafts_fail_steps_are_planned_ahead_and_guesses_are_tried_again_after_a_while() -> None:
    engine = Engine(Wrong, most=3, page_size=64, kv_pages=64, max_model_len=400)
    engine.submit("a", [1, 2], max_tokens=300)
    in_flight: list[StepPlan] = []
    tokens: list[int] = []
    ahead = []
    while engine.scheduler.has_work:
        plan = engine.scheduler.plan(0.0)
        if not plan.is_empty:
            in_flight.append(plan)
            ahead.append(any(work.token_ids == [LAST_SAMPLED] for work in plan.work))
        if len(in_flight) > 1 or plan.is_empty:
            first = in_flight.pop(0)
            for event in engine.scheduler.commit(first, engine.runner.run(first), 0.0):
                tokens += event.token_ids
    assert tokens == following([1, 2], 300)
    first = ahead.index(True)
    assert 15 < first < 40  # so many failures are believed
    assert RETRY - 2 < ahead.index(False, first) - first <= RETRY


def test_patience_grows_where_a_try_succeeds() -> None:
    patience = Patience()
    assert patience.wait()
    while patience.wait():
        patience.learn(known=4, accepted=0)
    patience.learn(known=0, accepted=0)
    assert not patience.wait()
    patience.learn(known=4, accepted=4)
    assert patience.wait()
