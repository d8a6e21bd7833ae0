"""The core and its loop, over the fake runner and a clock that the test moves."""

from __future__ import annotations

import threading

import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import InvalidRequestError
from engine.loop import HEARTBEAT_SECONDS, READING_SECONDS, Cancel, Command, LoadAdapter, StepOutput, Submit, run_core
from engine.request import FinishReason, Request, SamplingParams, TokenEvent
from engine.step import StepPlan
from tests.engine.fake_runner import CRASH, FakeRunner, engine_info, expected

CONFIG = EngineConfig(model_path="-", seed=1)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def request(name: str, prompt: int = 4, **sampling: object) -> Request:
    params = SamplingParams(**({"max_tokens": 5, "ignore_eos": True} | sampling))
    return Request(request_id=name, prompt_token_ids=[1] * prompt, sampling=params)


def run_to_end(core: EngineCore) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while core.has_work:
        for event in core.step():
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens


def test_a_request_that_could_never_fit_is_refused_with_its_numbers_and_leaves_nothing() -> None:
    core = EngineCore(FakeRunner(engine_info(page_size=4, kv_pages=5, max_model_len=128)), CONFIG)
    with pytest.raises(InvalidRequestError) as caught:
        core.add(request("a", prompt=10, max_tokens=12))
    assert str(caught.value) == (
        "max_tokens: 12 with a prompt of 10 tokens needs 6 KV pages of 4 tokens, but there are 5"
    )
    assert not core.has_work
    core.add(request("a", prompt=10, max_tokens=11))  # the last of 21 tokens is never computed
    assert len(run_to_end(core)["a"]) == 11


def test_requests_without_a_seed_differ_and_repeat_with_the_seed_of_the_engine() -> None:
    def outputs(config: EngineConfig) -> list[list[int]]:
        core = EngineCore(FakeRunner(engine_info()), config)
        for name in ("a", "b"):
            core.add(request(name, max_tokens=12))
        core.add(request("seeded", max_tokens=12, seed=5))
        return list(run_to_end(core).values())

    first, again, other = outputs(CONFIG), outputs(CONFIG), outputs(EngineConfig(model_path="-"))
    assert first == again
    assert len({tuple(tokens) for tokens in [*first, *other]}) == 5  # only the seeded one repeats
    assert first[2] == other[2]


def test_stats_tell_the_time_of_steps_and_of_the_model_in_them_but_not_that_of_idling() -> None:
    clock = Clock()

    def step_takes(plan: StepPlan) -> None:
        clock.now += 0.5

    core = EngineCore(FakeRunner(engine_info(), step_takes), CONFIG, clock)
    for idle in (10.0, 1000.0):
        clock.now += idle
        core.add(request("a", max_tokens=3))
        while core.has_work:
            core.step()
            clock.now += 0.125  # sends events
    stats = core.stats()
    assert (stats.steps, stats.model_seconds) == (8, 2.0)  # three tokens, and the release of the row
    assert stats.step_seconds == 2 * (4 * 0.5 + 3 * 0.125)


def test_stats_tell_the_load_and_the_rates_of_prefill_and_decode() -> None:
    clock = Clock()

    def step_takes(plan: StepPlan) -> None:
        clock.now += 0.5

    info = engine_info(page_size=4, kv_pages=64, max_batch_size=1, max_batch_tokens=16)
    core = EngineCore(FakeRunner(info, step_takes), CONFIG, clock)
    core.add(request("a", prompt=32, max_tokens=100))
    core.add(request("b", prompt=20))
    clock.now += 3.0
    before = core.stats()
    assert (before.queued, before.queued_tokens, before.oldest_queued_seconds, before.running) == (2, 52, 3.0, 0)
    for _ in range(2):
        core.step()
    stats = core.stats()
    assert (stats.steps, stats.running, stats.max_batch_size) == (2, 1, 1)
    assert (stats.queued, stats.queued_tokens, stats.oldest_queued_seconds) == (1, 20, 4.0)
    assert (stats.kv_pages_used, stats.kv_pages_total) == (8, 64)
    assert (stats.prompt_tokens, stats.generated_tokens) == (32, 1)
    assert stats.prefill_tokens_per_second == pytest.approx(32.0)
    assert (stats.prefix_cache_query_tokens, stats.prefix_cache_hit_tokens) == (32, 0)
    for _ in range(60):
        core.step()
    assert core.stats().decode_tokens_per_second == pytest.approx(2.0, rel=0.01)
    assert core.stats().prefill_tokens_per_second < 0.1  # moving: what was long ago has faded


def test_a_preempted_request_is_queued_since_its_preemption() -> None:
    clock = Clock()
    info = engine_info(page_size=1, kv_pages=12, max_batch_size=2, max_batch_tokens=16)
    core = EngineCore(FakeRunner(info), CONFIG, clock)
    core.add(request("a", prompt=4, max_tokens=9))
    core.add(request("b", prompt=4, max_tokens=9))
    while core.stats().preemptions == 0:
        clock.now += 1.0
        core.step()
    assert core.stats().oldest_queued_seconds == 0.0
    clock.now += 1.0
    assert (core.stats().queued, core.stats().oldest_queued_seconds) == (1, 1.0)


def test_what_the_runner_raises_is_not_swallowed() -> None:
    core = EngineCore(FakeRunner(engine_info()), CONFIG)
    core.add(Request(request_id="a", prompt_token_ids=[CRASH]))
    with pytest.raises(RuntimeError, match="on fire"):
        core.step()


class Script:
    """An inbox that holds, for each turn of the loop, the commands that arrive; and what the loop says."""

    def __init__(self, *turns: list[Command]) -> None:
        self.turns = list(turns)
        self.waits: list[float] = []
        self.outputs: list[StepOutput] = []

    def receive(self, timeout: float) -> list[Command] | None:
        self.waits.append(timeout)
        return self.turns.pop(0) if self.turns else None

    @property
    def events(self) -> list[TokenEvent]:
        return [event for output in self.outputs for event in output.events]


def test_an_idle_loop_beats_and_a_busy_one_does_not_wait() -> None:
    script = Script([], [], [Submit(request("a", max_tokens=2))], [], [], [])
    run_core(EngineCore(FakeRunner(engine_info()), CONFIG), script.receive, script.outputs.append)
    idle, busy = HEARTBEAT_SECONDS, 0.0
    # Two tokens, then a step in which the runner learns that the row is free.
    assert script.waits == [idle, idle, idle, busy, busy, idle, idle]
    assert [len(output.events) for output in script.outputs] == [0, 0, 1, 1, 0, 0]


def test_who_looks_for_what_others_make_says_nothing_while_there_is_nothing_to_say() -> None:
    runner = FakeRunner(engine_info(max_loras=1))
    assert runner.adapters is not None
    gate = runner.adapters.gate = threading.Event()
    looks = round(2 * HEARTBEAT_SECONDS / READING_SECONDS)
    script = Script([LoadAdapter(1, "a", "a")], *[[] for _ in range(looks)])
    run_core(EngineCore(runner, CONFIG), script.receive, script.outputs.append)
    gate.set()
    assert script.waits[1:] == [READING_SECONDS] * (looks + 1)
    assert 2 <= len(script.outputs) <= 3  # an answer to the command, and a beat a second


def test_a_cancel_is_answered_and_its_pages_are_free_in_the_same_turn() -> None:
    script = Script([Submit(request("a", max_tokens=50))], [], [Cancel("a")], [Cancel("a")])
    run_core(EngineCore(FakeRunner(engine_info()), CONFIG), script.receive, script.outputs.append)
    assert [event.finish_reason for event in script.events] == [None, None, FinishReason.CANCELLED]
    assert [output.stats.kv_pages_used for output in script.outputs] == [1, 2, 0, 0]


def test_an_idle_loop_does_not_go_on_with_a_page_that_is_lost() -> None:
    core = EngineCore(FakeRunner(engine_info()), CONFIG)
    assert core._pool.take(1) is not None
    script = Script([Submit(request("a", max_tokens=2))], [], [], [])
    with pytest.raises(AssertionError, match="a page is lost"):
        run_core(core, script.receive, script.outputs.append)
    assert [len(output.events) for output in script.outputs] == [1, 1, 0]


def test_a_request_that_the_core_refuses_is_answered_all_the_same() -> None:
    script = Script([Submit(request("a", prompt=500)), Submit(request("b", seed=3))], *[[] for _ in range(5)])
    info = engine_info()
    run_core(EngineCore(FakeRunner(info), CONFIG), script.receive, script.outputs.append)
    refused, *others = script.events
    assert (refused.request_id, refused.finish_reason) == ("a", FinishReason.ERROR)
    assert (refused.refused, refused.error) == ("prompt", "500 tokens must be fewer than the context of 128 tokens")
    tokens = [token for event in others for token in event.token_ids]
    assert tokens == expected(request("b", seed=3), info).token_ids
