"""Counters of replicas that come, go, start anew and fall silent."""

from __future__ import annotations

from dataclasses import replace

import pytest

from autoscaler.fleet import Counters, Observation, Phase, Replica
from autoscaler.policy.arrivals import ArrivalMeter, Traffic
from tests.autoscaler.policy.scene import load


def counted(requests: int, prompt: int = 100, new: int = 20) -> Counters:
    return Counters(
        requests,
        requests * prompt,
        requests,
        requests * prompt,
        0,
        requests * new,
        requests,
        requests // 10,
        requests // 25,
    )


def replica(name: str, at: float, requests: int, seen: float | None = None) -> Replica:
    return Replica(name, Phase.READY, 0.0, load(counters=counted(requests)), at if seen is None else seen, ready_at=1.0)


class Meter:
    def __init__(self) -> None:
        self.meter = ArrivalMeter(5.0)

    def look(self, at: float, *replicas: Replica) -> Traffic:
        return self.meter.observe(Observation(at, len(replicas), replicas))


def test_what_was_counted_before_we_looked_is_not_load() -> None:
    here = Meter()
    assert here.look(100, replica("a", 100, 10_000)).requests == 0
    traffic = here.look(105, replica("a", 105, 10_050))
    assert (traffic.requests, traffic.prompt_tokens) == (10, 1000)
    assert (traffic.ended, traffic.late, traffic.slow) == (50, 5, 2)
    assert (traffic.tokens, traffic.computed) == (1000, 5000)


def test_a_look_that_is_missed_loses_nothing() -> None:
    here = Meter()
    here.look(100, replica("a", 100, 0))
    assert here.look(105, replica("a", 105, 50)).requests == 10
    assert here.look(110, replica("a", 110, 50, seen=105)).requests == 10  # no newer sample: as before
    assert here.look(115, replica("a", 115, 250)).requests == 20


def test_all_that_a_new_replica_counts_is_new() -> None:
    here = Meter()
    here.look(100, Replica("a", Phase.LOADING, 50.0))
    assert here.look(105, replica("a", 105, 40)).requests == 8


def test_an_engine_that_started_anew_counts_from_nothing() -> None:
    here = Meter()
    here.look(100, replica("a", 100, 1000))
    assert here.look(105, replica("a", 105, 30)).requests == 6


def test_one_that_goes_takes_its_rate_along_and_comes_back_as_new() -> None:
    here = Meter()
    here.look(100, replica("a", 100, 0), replica("b", 100, 0))
    assert here.look(105, replica("a", 105, 50), replica("b", 105, 50)).requests == 20
    assert here.look(110, replica("a", 110, 100)).requests == 10
    assert here.look(115, replica("a", 115, 150), replica("b", 115, 5000)).requests == 10


def test_one_whose_sample_is_old_is_silent_and_not_idle() -> None:
    here = Meter()
    here.look(100, replica("a", 100, 0), replica("b", 100, 0))
    here.look(105, replica("a", 105, 50), replica("b", 105, 50))
    traffic = here.look(120, replica("a", 120, 200), replica("b", 120, 50, seen=105))
    assert traffic.silent == {"b"}
    assert [each.name for each in traffic.heard] == ["a"]
    assert traffic.requests == 10
    never = here.look(125, replica("a", 125, 250), Replica("c", Phase.READY, 0.0))
    assert never.silent == {"c"}


def test_the_mean_request_is_learnt_and_follows() -> None:
    here = Meter()
    requests = 0
    for step in range(200):
        here.look(100 + 5 * step, replica("a", 100 + 5 * step, requests))
        requests += 100
    assert here.meter.mix.new_tokens == pytest.approx(20, rel=0.06)
    assert here.meter.mix.prompt_tokens == pytest.approx(100)


def test_requests_that_run_do_not_make_the_others_look_longer() -> None:
    here = Meter()
    first = replica("a", 100, 0)
    here.look(100, first)
    half = Counters(1000, 100_000, 0, 100_000, 0, 1000 * 50, 1000, 0)  # all have half of their 100 tokens
    running = load(counters=half, running_requests=1000)
    here.look(105, replace(first, load=running, observed_at=105.0))
    assert here.meter.mix.new_tokens == pytest.approx(100, rel=0.05)


def test_the_share_of_the_prefix_cache_is_learnt() -> None:
    here = Meter()
    here.look(100, replica("a", 100, 0))
    hit = Counters(100, 10_000, 100, 2_500, 7_500, 2_000, 100, 0)
    here.look(105, replace(replica("a", 105, 0), load=load(counters=hit)))
    assert here.meter.mix.hit_share == pytest.approx(0.75)
