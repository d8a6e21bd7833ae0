"""The compiled replica does, in leaps, what the reference does step by step."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from autoscaler.simulate import ARITHMETIC, Curve, Trace, read_curve, trace
from autoscaler.simulate.engines import Engines
from autoscaler.simulate.options import Slo
from autoscaler.simulate.reference import Request, run

CURVE = read_curve(ARITHMETIC)


def some_trace(random: np.random.Generator, count: int = 150) -> Trace:
    arrival = np.cumsum(random.exponential(random.choice([0.01, 0.1, 0.5]), count))
    inputs = random.integers(1, 1500, count)
    return trace(
        "made up", arrival, inputs, random.integers(1, 400, count), random.integers(0, 2, count) * (inputs // 3)
    )


def some_curve(random: np.random.Generator) -> Curve:
    rows, budget, kv = random.integers(1, 40), random.integers(41, 600), random.integers(2000, 9000)
    return replace(CURVE, max_batch_size=int(rows), max_step_tokens=int(budget), kv_tokens=int(kv))


def expected(curve: Curve, made: Trace) -> tuple[list[Request], int]:
    columns = (
        made.arrival_s,
        made.input_tokens,
        np.minimum(made.cached_tokens, made.input_tokens - 1),
        made.output_tokens,
    )
    requests = [Request(float(at), *map(int, lengths)) for at, *lengths in zip(*columns, strict=True)]
    return requests, run(curve, requests)


def served(curve: Curve, made: Trace, random: np.random.Generator) -> tuple[Any, int]:
    """By one engine that is looked at at random times."""
    engines = Engines(made, curve, Slo(), None, seed=0)
    slot = engines.open()
    engines.accept([slot])
    while engines.now <= made.duration_s:
        engines.run_to(engines.now + random.exponential(1.0))
        engines.look([slot])
    engines.run_to(1e9)
    engines.look([slot])
    assert engines.outstanding([slot]) == [0]
    assert len(engines.close(slot)) == 0
    return engines.requests, engines.preemptions


@pytest.mark.parametrize("turn", range(12))
def test_leaps_and_steps_give_the_same_times(turn: int) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    random = np.random.default_rng(seed)
    curve, made = some_curve(random), some_trace(random)
    requests, preemptions = expected(curve, made)
    records, also = served(curve, made, random)
    assert also == preemptions
    for name in ("started", "first_token", "finished"):
        wanted = [getattr(request, name) for request in requests]
        np.testing.assert_allclose(records[name], wanted, rtol=0, atol=1e-6, err_msg=name)


def test_a_row_that_kv_has_no_room_for_waits_and_still_gets_all_its_tokens() -> None:
    random = np.random.default_rng(5)
    curve, made = replace(CURVE, kv_tokens=2000), some_trace(random)
    records, preemptions = served(curve, made, random)
    assert preemptions > 0
    assert (records["finished"] >= records["first_token"]).all()


def test_a_request_that_no_replica_can_hold_is_refused_by_name() -> None:
    made = trace("long", [0.0], [500], [600])
    with pytest.raises(ValueError, match=r"a request of 1100 tokens; h100-arithmetic\.json has KV for 1000"):
        Engines(made, replace(CURVE, kv_tokens=1000), Slo(), None, seed=0)


def test_one_request_alone_takes_what_the_formula_says() -> None:
    engines = Engines(trace("one", [1.0], [1000], [3]), CURVE, Slo(), None, seed=0)
    slot = engines.open()
    engines.accept([slot])
    engines.run_to(100.0)
    engines.look([slot])
    cost, request = CURVE.step_cost, engines.requests[0]
    first = 1.0 + cost.base + 1000 * cost.per_prefill_token + 1000 * cost.per_context_token
    assert request["first_token"] == pytest.approx(first)
    two_more = 2 * (cost.base + cost.per_decode_row) + (1001 + 1002) * cost.per_context_token
    assert request["finished"] == pytest.approx(first + two_more)


def test_what_a_replica_says_of_itself_adds_up() -> None:
    made = some_trace(np.random.default_rng(3))
    engines = Engines(made, replace(CURVE, max_batch_size=8, kv_tokens=4000), Slo(0.5, 0.0065), None, seed=0)
    slots = [engines.open(), engines.open()]
    engines.accept(slots)
    for now in np.linspace(0.1, made.duration_s + 300, 50):
        engines.run_to(now)
        engines.look(slots)
        loads = engines.loads(slots, CURVE.step_cost)
        arrived = sum(load.counters.arrived_requests for load in loads)
        finished = sum(load.counters.finished_requests for load in loads)
        assert arrived == np.searchsorted(made.arrival_s, now)
        assert sum(load.queued_requests + load.running_requests for load in loads) == arrived - finished
        assert all(0 <= load.kv_pages_used <= load.kv_pages_total for load in loads)
        assert all(load.running_requests <= load.capacity for load in loads)
    assert sum(load.counters.generated_tokens for load in loads) == made.output_tokens.sum()
    assert sum(load.counters.first_tokens for load in loads) == len(made)
    late = engines.requests["first_token"] - engines.requests["enqueued"] > 0.5
    assert sum(load.counters.late_first_tokens for load in loads) == late.sum()
    decoding = engines.requests["finished"] - engines.requests["first_token"]
    slow = decoding > 0.0065 * (made.output_tokens - 1)
    assert 0 < sum(load.counters.slow_requests for load in loads) == slow.sum()
    assert all(load.queued_tokens == 0 and load.oldest_queued_seconds == 0 for load in loads)


def test_looks_change_nothing() -> None:
    made = some_trace(np.random.default_rng(8), 600)
    curve = replace(CURVE, max_batch_size=16, kv_tokens=6000)

    def run_through(ends: list[float]) -> Any:
        engines = Engines(made, curve, Slo(), None, seed=0)
        slots = [engines.open() for _ in range(4)]
        engines.accept(slots)
        for end in [*ends, 1e6]:
            engines.run_to(end)
            engines.look(slots)
        return engines.requests

    never, often = run_through([]), run_through(np.arange(0.0, made.duration_s, 0.01).tolist())
    assert never["replica"].tolist() == often["replica"].tolist()
    np.testing.assert_allclose(never["finished"], often["finished"], rtol=0, atol=1e-6)
    assert len(set(never["replica"].tolist())) == 4
