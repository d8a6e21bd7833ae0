"""The simulated replica schedules as the engine does: the engine's own scheduler, on a clock that the curve moves."""

from __future__ import annotations

import secrets
from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from autoscaler.simulate import ARITHMETIC, Curve, Trace, read_curve, trace
from autoscaler.simulate.engines import Engines
from autoscaler.simulate.options import Slo
from engine.kv.pages import PagePool
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from engine.step import SampledToken, StepPlan, StepResult

CURVE = replace(read_curve(ARITHMETIC), max_batch_size=24, max_step_tokens=512)


def seconds(curve: Curve, plan: StepPlan) -> float:
    tokens = sum(len(work.token_ids) for work in plan.work)
    rows = sum(work.sample and len(work.token_ids) == 1 for work in plan.work)
    context = sum(work.start + len(work.token_ids) for work in plan.work)
    cost = curve.step_cost
    step = cost.base + cost.per_prefill_token * (tokens - rows)
    return step + cost.per_decode_row * rows + cost.per_context_token * context


def scheduled(curve: Curve, made: Trace) -> tuple[dict[int, float], dict[int, float], int]:
    """When the engine's scheduler has first tokens and ends, if steps take what the curve says; and pre-emptions."""
    scheduler = Scheduler(
        PagePool(curve.kv_tokens),
        page_size=1,
        max_batch_size=curve.max_batch_size,
        max_batch_tokens=curve.max_step_tokens,
        max_model_len=curve.kv_tokens,
        eos_token_ids=[],
        prefix_caching=False,
    )
    coming = deque(enumerate(zip(made.arrival_s, made.input_tokens, made.output_tokens, strict=True)))
    firsts: dict[int, float] = {}
    ends: dict[int, float] = {}
    now = 0.0
    while coming or scheduler.has_work:
        if not scheduler.has_work:
            now = max(now, coming[0][1][0])
        while coming and coming[0][1][0] <= now:
            which, (_, prompt, output) = coming.popleft()
            sampling = SamplingParams(max_tokens=int(output), ignore_eos=True)
            scheduler.submit(
                Request(request_id=str(which), prompt_token_ids=[1] * int(prompt), sampling=sampling), seed=0, now=now
            )
        plan = scheduler.plan(now)
        now += seconds(curve, plan) if plan.work else 0  # else it only gives rows back
        sampled = [SampledToken(work.row, 2) for work in plan.work if work.sample]
        for event in scheduler.commit(plan, StepResult(sampled), now):
            firsts.setdefault(int(event.request_id), now)
            if event.finish_reason is not None:
                ends[int(event.request_id)] = now
    return firsts, ends, scheduler.preemptions


@pytest.mark.parametrize("kv_tokens", [60_000, 6_000, 2_500])
@pytest.mark.parametrize("gap", [0.02, 0.1, 0.4])
def test_every_request_has_the_times_that_the_engine_would_give_it(gap: float, kv_tokens: int) -> None:
    seed = secrets.randbits(32)
    print("seed", seed)
    random, count = np.random.default_rng(seed), 100
    lengths = random.integers(2, 1200, count), random.integers(1, 200, count)
    made = trace("made up", np.cumsum(random.exponential(gap, count)), *lengths)
    curve = replace(CURVE, kv_tokens=kv_tokens)

    firsts, ends, preemptions = scheduled(curve, made)
    engines = Engines(made, curve, Slo(), None, seed=0)
    engines.accept([slot := engines.open()])
    engines.run_to(1e9)
    engines.look([slot])

    assert engines.preemptions == preemptions
    for name, times in (("first_token", firsts), ("finished", ends)):
        wanted = [times[which] for which in range(count)]
        np.testing.assert_allclose(engines.requests[name], wanted, rtol=0, atol=1e-6, err_msg=name)
