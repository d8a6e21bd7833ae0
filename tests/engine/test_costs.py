"""Step costs: the online fit beside least squares of a library, and histograms beside counting."""

from __future__ import annotations

import itertools
import random

import numpy
import pytest

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.costs import BATCH_TOKENS, HALVING_STEPS, REFIT_STEPS, StepCost, StepCosts
from engine.histogram import Histogram
from engine.request import Request, SamplingParams
from engine.step import StepPlan
from tests.engine.fake_runner import FakeRunner, engine_info

Step = tuple[float, int, int, int]  # seconds, tokens, rows that decode, context


def reference(steps: list[Step]) -> list[float]:
    """Weighted least squares of the relative error, none of the coefficients negative: every choice of those that are
    not 0 is tried."""
    with_prefill, rows, weights = [step[1] > step[2] for step in steps], [], []
    for number, (seconds, tokens, decodes, context) in enumerate(steps):
        kind = [prefill for prefill in with_prefill if prefill == with_prefill[number]]
        place = sum(prefill == with_prefill[number] for prefill in with_prefill[:number])
        halvings = len(kind) // HALVING_STEPS - place // HALVING_STEPS
        weights.append(0.5 ** (halvings / 2))
        rows.append([1 / seconds, (tokens - decodes) / seconds, decodes / seconds, context / seconds])
    matrix, target = numpy.array(rows) * numpy.array(weights)[:, None], numpy.array(weights)
    best, best_error = [0.0] * 4, float("inf")
    for size in range(1, 5):
        for used in itertools.combinations(range(4), size):
            found = numpy.linalg.lstsq(matrix[:, used], target, rcond=None)[0]
            error = float(numpy.sum((matrix[:, used] @ found - target) ** 2))
            if found.min() >= 0 and error < best_error:
                best, best_error = [0.0] * 4, error
                for i, value in zip(used, found, strict=True):
                    best[i] = float(value)
    return best


def some_steps(cost: StepCost, count: int, *, noise: float, seed: int) -> list[Step]:
    draw, steps = random.Random(seed), []
    for _ in range(count):
        decodes, prefill = draw.randrange(0, 33), draw.choice((0, 0, draw.randrange(1, 512)))
        if decodes + prefill == 0:
            prefill = 1
        context = draw.randrange(100, 40_000)
        seconds = (
            cost.base
            + cost.per_prefill_token * prefill
            + cost.per_decode_row * decodes
            + cost.per_context_token * context
        )
        steps.append((seconds * (1 + noise * draw.gauss(0, 1)), prefill + decodes, decodes, context))
    return steps


def fitted(steps: list[Step]) -> StepCost:
    costs = StepCosts()
    for step in steps:
        costs.add(*step)
    return costs.cost


TRUE = StepCost(base=0.006, per_prefill_token=30e-6, per_decode_row=25e-6, per_context_token=0.065e-6)


def test_nothing_is_claimed_before_there_are_enough_steps() -> None:
    assert fitted(some_steps(TRUE, REFIT_STEPS - 1, noise=0, seed=1)) == StepCost()


def test_the_costs_of_steps_without_noise_are_found() -> None:
    found = fitted(some_steps(TRUE, REFIT_STEPS, noise=0, seed=1))
    for name in ("base", "per_prefill_token", "per_decode_row", "per_context_token"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [REFIT_STEPS * 2, HALVING_STEPS * 5])
def test_the_fit_is_what_least_squares_of_all_steps_says(seed: int, count: int) -> None:
    steps = some_steps(TRUE, count, noise=0.05, seed=seed)
    found, expected = fitted(steps), reference(steps)
    assert [found.base, found.per_prefill_token, found.per_decode_row, found.per_context_token] == pytest.approx(
        expected, rel=0.01
    )


def test_a_cost_that_least_squares_would_make_negative_is_nothing() -> None:
    steps = [(0.01 - 1e-7 * context, 8, 8, context) for context in range(1000, 1000 + 50 * REFIT_STEPS, 50)]
    found, expected = fitted(steps), reference(steps)
    assert found.per_context_token == expected[3] == 0
    assert found.base + 8 * found.per_decode_row == pytest.approx(expected[0] + 8 * expected[2], rel=1e-3)


def test_long_decoding_does_not_make_it_forget_what_a_prompt_costs() -> None:
    mixed = some_steps(TRUE, 4 * REFIT_STEPS, noise=0, seed=3)
    decodes = [(TRUE.base + 8 * TRUE.per_decode_row + c * TRUE.per_context_token, 8, 8, c) for c in range(100, 20_100)]
    assert fitted([*mixed, *decodes]).per_prefill_token == pytest.approx(TRUE.per_prefill_token, rel=0.01)


def test_a_change_of_the_machine_is_followed() -> None:
    slower = StepCost(*(2 * getattr(TRUE, name) for name in TRUE.__struct_fields__))
    steps = some_steps(TRUE, 2000, noise=0, seed=4) + some_steps(slower, 20 * HALVING_STEPS, noise=0, seed=5)
    assert fitted(steps).base == pytest.approx(slower.base, rel=0.01)


def test_a_bound_belongs_to_its_bucket_and_what_is_above_all_to_the_last() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 1), (1.5, 2), (2.0, 1), (9.0, 3)):
        histogram.add(value, times)
    assert histogram.counts == [2, 3, 3]
    assert histogram.sum == 0.5 + 1 + 3 + 2 + 27


def test_quantiles_lie_in_the_bucket_of_the_value() -> None:
    draw = random.Random(6)
    histogram, values = Histogram((0.1, 0.2, 0.5, 1.0)), sorted(draw.random() for _ in range(999))
    for value in values:
        histogram.add(value)
    for share in (0.01, 0.5, 0.9, 0.99):
        true, found = values[int(share * len(values))], histogram.quantile(share)
        limits = (0.0, *histogram.bounds)
        assert sum(limit < true for limit in limits) == sum(limit < found for limit in limits)
    assert Histogram((1.0,)).quantile(0.5) == 0.0
    histogram.add(50.0, 100_000)
    assert histogram.quantile(0.99) == 1.0


def test_the_core_tells_how_many_tokens_its_steps_computed() -> None:
    seen: list[int] = []

    def note(plan: StepPlan) -> None:
        if plan.num_tokens:
            seen.append(plan.num_tokens)

    core = EngineCore(FakeRunner(engine_info(), note), EngineConfig(model_path="-", seed=1))
    for name, prompt in (("a", 3), ("b", 20), ("c", 1)):
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        core.add(Request(request_id=name, prompt_token_ids=[1] * prompt, sampling=params))
    while core.has_work:
        core.step()
    stats = core.stats()
    expected = Histogram(BATCH_TOKENS)
    for tokens in seen:
        expected.add(tokens)
    assert stats.batch_tokens == expected.distribution
    assert sum(stats.step_times.counts) == len(seen)
    assert 0 < stats.step_times.sum <= stats.step_seconds
