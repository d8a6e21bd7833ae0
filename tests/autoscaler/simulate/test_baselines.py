"""KPA, WVA, Dynamo and Ray Serve, against numbers worked out by hand from the formulas of their sources."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoscaler.decision import Limit, Policy
from autoscaler.fleet import Counters, StepCost
from autoscaler.settings import ScaleToZero, Settings, Target
from autoscaler.simulate.baselines import BASELINES
from autoscaler.simulate.baselines.dynamo import Engine, Kalman, Mix
from autoscaler.simulate.baselines.wva import derived_capacity
from tests.autoscaler.simulate.looks import load, look

SETTINGS = Settings(min_replicas=1, max_replicas=50, target=Target(ttft_seconds=2.0, itl_seconds=0.06))


def made(name: str, settings: Settings = SETTINGS, **parameters: object) -> Policy:
    return BASELINES[name](parameters, settings)


@pytest.mark.parametrize("name", BASELINES)
def test_every_rival_stays_within_limits_and_repeats_itself(name: str) -> None:
    settings = Settings(min_replicas=2, max_replicas=6)
    looks = [
        look(
            15 * turn,
            [load(queue, 50, queued_tokens=queue * 900, kv_tokens=200_000)] * (2 + turn % 3),
            loading=turn % 2,
        )
        for turn, queue in enumerate([0, 50, 900, 900, 3, 0, 0, 0, 40, 0] * 4)
    ]
    runs = [[policy.decide(each).desired for each in looks] for policy in (made(name, settings), made(name, settings))]
    assert runs[0] == runs[1]
    assert all(2 <= desired <= 6 for desired in runs[0])


# -- Knative --------------------------------------------------------------------------------------------------------


def test_kpa_divides_the_mean_of_the_long_window_by_the_target() -> None:
    policy = made("kpa")
    for at in range(0, 60, 2):
        decision = policy.decide(look(at, [load(0, 100)]))
    assert decision.desired == 2  # ceil(100 / 70), and the short window asks for no more than that


def test_kpa_panics_at_twice_what_is_ready_and_does_not_scale_in_until_it_is_calm_again() -> None:
    policy = made("kpa")
    for at in range(0, 60, 2):
        policy.decide(look(at, [load(0, 70)]))
    for at in (60, 62, 64):  # the short window: 700 alone; the long one: (27 * 70 + 3 * 700) / 30 = 133
        decision = policy.decide(look(at, [load(600, 100)]))
    assert decision.desired == 10
    for at in range(66, 126, 2):  # calm: nothing is running, and the last time over the threshold was a bit after 64
        assert policy.decide(look(at, [load(0, 0)] * 10)).desired == 10, at
    for at in range(126, 140, 2):
        decision = policy.decide(look(at, [load(0, 0)] * 10))
    assert decision.desired == 5  # by half of what is ready at most


def test_kpa_may_delay_scaling_in() -> None:
    policy = made("kpa", scale_down_delay_seconds=100.0)
    for at in range(0, 62, 2):
        policy.decide(look(at, [load(0, 100)]))
    for at in range(62, 160, 2):
        assert policy.decide(look(at, [load(0, 1)] * 2)).desired == 2
    for at in range(160, 240, 2):
        decision = policy.decide(look(at, [load(0, 1)] * 2))
    assert decision.desired == 1


def test_kpa_leaves_the_last_for_the_grace_period() -> None:
    policy = made("kpa", Settings(min_replicas=0, max_replicas=5, scale_to_zero=ScaleToZero(enabled=True)))
    assert policy.decide(look(0, [load(0, 1)])).desired == 1
    desired = {at: policy.decide(look(at, [load()])).desired for at in range(2, 100, 2)}
    assert desired[60] == desired[86] == 1  # the window is empty from 60 on
    assert desired[90] == 0


# -- WVA ------------------------------------------------------------------------------------------------------------

# 10 000 tokens of 100 prompts came in, 4000 went out of 20 requests: 100 and 200 each
COUNTERS = Counters(arrived_requests=100, arrived_prompt_tokens=10_000, finished_requests=20, generated_tokens=4_000)


def seen_twice(policy: Policy, *, queued: int, kv_tokens: int, replicas: int = 4, loading: int = 0) -> int:
    """Desired at the second look: between the two, COUNTERS passed."""
    policy.decide(look(0, [load(queued, 50, kv_tokens=kv_tokens)] * replicas, loading=loading))
    loads = [load(queued, 50, kv_tokens=kv_tokens, counters=COUNTERS)] * replicas
    return policy.decide(look(15, loads, loading=loading)).desired


def test_wva_takes_the_capacity_from_the_limits_of_the_engine_where_nothing_queued_yet() -> None:
    # N = min(4096 * 200 / 300, 256) = 256 requests of 100 + 100 tokens
    assert derived_capacity(4096, 256, 100.0, 200.0) == 256 * 200
    # k1 = 0.8 * 320 000 = 256 000, k2 = 51 200. Demand 4 * 48 000; 192 000 / 0.85 - 204 800 = 21 082: one more
    assert seen_twice(made("wva"), queued=0, kv_tokens=48_000) == 5


def test_wva_counts_replicas_that_load_as_supply() -> None:
    assert seen_twice(made("wva"), queued=0, kv_tokens=48_000, loading=1) == 5


def test_wva_takes_what_is_in_use_for_the_capacity_where_requests_queue() -> None:
    # k2 = 160 000 in use; demand 4 * (160 000 + 10 * 100) = 644 000; / 0.85 - 640 000 = 117 647: one more
    assert seen_twice(made("wva"), queued=10, kv_tokens=160_000) == 5
    # With 200 in each queue: 4 * (160 000 + 200 * 100) = 720 000; / 0.85 - 640 000 = 207 059: two more
    assert seen_twice(made("wva"), queued=200, kv_tokens=160_000) == 6


def test_wva_removes_what_is_spare_rounded_down() -> None:
    # Demand 4 * 16 000; 204 800 - 64 000 / 0.70 = 113 371: two of 51 200
    assert seen_twice(made("wva", down_stabilization_seconds=0.0), queued=0, kv_tokens=16_000) == 2


def test_wva_remembers_the_peak_of_a_minute() -> None:
    policy = made("wva", down_stabilization_seconds=0.0)
    assert seen_twice(policy, queued=0, kv_tokens=48_000) == 5
    calm = [load(0, 1, kv_tokens=16_000, counters=COUNTERS)] * 5
    assert policy.decide(look(60, calm)).desired == 5
    # 192 000 of demand were there until 75: from then on 5 * 16 000; 256 000 - 114 286 = 141 714: two fewer
    assert policy.decide(look(75, calm)).desired == 3


# -- Dynamo ---------------------------------------------------------------------------------------------------------

ENGINE = Engine(StepCost(0.01, 1e-5, 0.0, 1e-6), step_tokens=1000, sequences=64, kv_tokens=100_000, mean_context=500.0)


def test_dynamo_estimates_the_first_token_by_chunks() -> None:
    mix = Mix(1.0, prompt_tokens=500.0, output_tokens=100.0)
    # 1500 queued and 500 own: two steps of 1000 beside 10 000 tokens of context, 0.01 + 0.01 + 0.01 each
    assert ENGINE.ttft(1500.0, 10_000.0, mix) == pytest.approx(0.06)
    # A prefix cache that has half of it leaves one
    assert ENGINE.ttft(1500.0, 10_000.0, Mix(1.0, 500.0, 100.0, hit_rate=0.5)) == pytest.approx(0.03)


def test_dynamo_takes_the_largest_batch_that_keeps_both_promises() -> None:
    mix = Mix(1.0, prompt_tokens=450.0, output_tokens=100.0)
    # A batch of b: context 500 b, prefill 4.5 b, so 0.01 + 4.5e-5 b + 5e-4 b seconds; 0.02 allows 18 (0.01981)
    assert ENGINE.best_rate(mix, ttft=9.0, itl=0.02) == pytest.approx(18 / (100 * 0.01981))
    # No more than the KV cache holds (200) and the sequences (64)
    assert ENGINE.best_rate(mix, ttft=9.0, itl=9.0) == pytest.approx(64 / (100 * (0.01 + 5.45e-4 * 64)))


def test_dynamo_takes_no_batch_that_prompts_cannot_follow() -> None:
    # 100 * 1000 / (1900 + 100) = 50 requests end as fast as prompts are computed in what they leave of a step
    large = replace(ENGINE, kv_tokens=10**6)
    step = 0.01 + 1e-5 * 19 * 50 + 1e-6 * 1950 * 50
    assert large.best_rate(Mix(1.0, 1900.0, 100.0), ttft=9.0, itl=9.0) == pytest.approx(50 / (100 * step))


def traffic(rate: float, seconds: float) -> Counters:
    count = round(rate * seconds)
    return Counters(count, 1000 * count, count, 1000 * count, 0, 200 * count)


def test_dynamo_sets_a_floor_from_throughput_every_three_minutes() -> None:
    policy = made("dynamo", load_scaling=False)
    for at in range(0, 181, 5):
        decision = policy.decide(look(at, [load(0, 30, kv_tokens=33_000, counters=traffic(40.0, at))]))
        assert at == 180 or decision.desired == 1
    # Batches up to the one with steps of 60 ms: 0.006 + b (3e-5 * 5 + 2.5e-5 + 6.5e-8 * 1100) allows 219, which do
    # 219 / (200 * 0.05999) = 18.25 requests per second: 40 need three
    assert decision.desired == 3


def test_dynamo_adds_one_when_all_are_late_and_holds_while_it_starts() -> None:
    policy = made("dynamo", throughput_scaling=False)
    late = load(200, 200, queued_tokens=200_000, kv_tokens=220_000, counters=traffic(40.0, 100))
    policy.decide(look(0, [load(), load()]))
    assert policy.decide(look(5, [late, late])).desired == 3
    assert policy.decide(look(10, [late, late], loading=1)).desired == 3
    assert policy.decide(look(12, [late, late], draining=1)).desired == 2
    assert policy.decide(look(15, [late, late, load()])).desired == 3  # one is idle: not all


def test_dynamo_removes_one_when_the_others_keep_the_promise_with_a_margin() -> None:
    policy = made("dynamo", throughput_scaling=False)
    calm = load(0, 20, kv_tokens=22_000, counters=traffic(4.0, 100))
    policy.decide(look(0, [load(), load()]))
    assert policy.decide(look(5, [calm, calm])).desired == 1
    full = load(0, 140, kv_tokens=154_000, counters=traffic(9.0, 100))
    policy = made("dynamo", throughput_scaling=False)
    policy.decide(look(0, [load(), load()]))
    assert policy.decide(look(5, [full, full])).desired == 2  # 308 000 tokens of 320 000 would be 80 ms


def test_kalman_follows_a_trend() -> None:
    predictor = Kalman(1.0, 0.1, 10.0)
    for value in range(0, 400, 10):
        predictor.add(float(value))
    assert predictor.next() == pytest.approx(400.0, abs=3.0)


# -- Ray Serve ------------------------------------------------------------------------------------------------------


def test_ray_waits_for_the_delay_before_it_scales_out() -> None:
    policy = made("ray", target_ongoing_requests=10.0)
    desired = [policy.decide(look(at, [load(0, 30)])).desired for at in range(0, 50, 10)]
    assert desired == [1, 1, 1, 3, 1]  # after 30 s; the counter starts anew


def test_ray_waits_ten_minutes_before_it_scales_in() -> None:
    policy = made("ray", target_ongoing_requests=10.0)
    desired = [policy.decide(look(at, [load(0, 5)] * 4)).desired for at in range(0, 620, 10)]
    assert desired == [4] * 60 + [2, 4]


def test_ray_smooths_by_its_factors_but_moves_by_one_at_least() -> None:
    fast = made("ray", target_ongoing_requests=10.0, upscaling_factor=0.5, upscale_delay_seconds=0.0)
    assert fast.decide(look(0, [load(0, 50)])).desired == 3  # 1 + 0.5 * (5 - 1)
    slow = made("ray", target_ongoing_requests=10.0, downscaling_factor=0.1, downscale_delay_seconds=0.0)
    assert slow.decide(look(0, [load(0, 5)] * 4)).desired == 3  # ceil(4 - 0.1 * 2) = 4 is stuck


def test_ray_starts_the_first_without_a_delay() -> None:
    policy = made("ray", Settings(min_replicas=0, max_replicas=5))
    assert policy.decide(look(0, [], desired=0, held=1)).desired == 1


def test_limits_are_told() -> None:
    assert made("ray", Settings(max_replicas=2)).decide(look(0, [load(99)], desired=9)).limit is Limit.MAX_REPLICAS
