"""Prometheus text, of our own server and of others, right and wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nemoserve.v1 import generation_pb2 as pb

from autoscaler.fleet import Counters, Load, Phase
from autoscaler.observe.answers import Answer, BrokenAnswerError, Waits, read_load
from autoscaler.observe.text import MAX_LINE, MAX_LINES, MAX_WANTED, NAMES, read_text
from engine import EngineStats
from engine.costs import StepCost
from tests.service.grpc.ports import drained
from tests.service.telemetry.observed import ask, observed

VLLM = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",engine="0",num_gpu_blocks="1000",sliding_window="None"} 1.0
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 9000.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e+09
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 3000.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 9500.0
vllm:generation_tokens_total{engine="0",model_name="m"} 4000.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 20.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 5.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.5",model_name="m"} 10.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="2.0",model_name="m"} 25.0
vllm:time_to_first_token_seconds_bucket{engine="0",le="+Inf",model_name="m"} 28.0
python_gc_objects_collected_total{generation="0"} 12345.0
"""


async def test_our_own_text_says_the_same_as_get_load() -> None:
    async with observed() as running:
        await drained(running.port.typed.Generate(ask("one prompt", max_tokens=5)))
        running.engine.stats = EngineStats(
            queued=3,
            queued_tokens=70,
            oldest_queued_seconds=1.5,
            running=2,
            max_batch_size=8,
            kv_pages_used=16,
            kv_pages_total=64,
            generated_tokens=5,
            prompt_tokens=10,
            prefix_cache_hit_tokens=1,
            step_cost=StepCost(0.006, 3e-5, 2e-5, 6e-8),
        )
        told = read_load((await running.port.typed.GetLoad(pb.GetLoadRequest())).load)
        text, _ = running.telemetry.metrics.exposition()
    assert told.phase is Phase.READY
    assert told.load.counters.first_tokens == 1
    assert read_text(text.decode()) == told


def test_vllm_is_read_as_far_as_it_tells() -> None:
    assert read_text(VLLM) == Answer(
        load=Load(
            queued_requests=2,
            running_requests=7,
            kv_pages_used=250,
            kv_pages_total=1000,
            kv_page_tokens=16,
            counters=Counters(
                arrived_requests=28,
                arrived_prompt_tokens=9500,
                finished_requests=25,
                computed_prompt_tokens=6000,
                cached_prompt_tokens=3000,
                generated_tokens=4000,
                first_tokens=28,
            ),
        ),
        waits=Waits((0.5, 2.0), (10, 15, 3)),
    )


def test_an_old_vllm_and_one_without_a_prefix_cache_too() -> None:
    lines = [line for line in VLLM.splitlines() if "prefix_cache" not in line]
    answer = read_text("\n".join(lines).replace("kv_cache_usage_perc", "gpu_cache_usage_perc"))
    assert answer.load == replace(
        read_text(VLLM).load,
        counters=replace(read_text(VLLM).load.counters, computed_prompt_tokens=9500, cached_prompt_tokens=0),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "up 1\n",
        "nemoserve_requests_queued -1\n",
        "nemoserve_requests_queued NaN\n",
        "nemoserve_requests_queued 1e300\n",
        "nemoserve_requests_queued many\n",
        'nemoserve_requests_queued{a="b 1\n',
        'nemoserve_requests_queued 1\nnemoserve_time_to_first_token_seconds_bucket{le="1"} 5\n',
        'nemoserve_requests_queued 1\nnemoserve_time_to_first_token_seconds_bucket{le="x"} 5\n',
        'nemoserve_requests_queued 1\nnemoserve_time_to_first_token_seconds_bucket{le="1"} 5\n'
        'nemoserve_time_to_first_token_seconds_bucket{le="+Inf"} 3\n',
        "nemoserve_requests_queued{a=" + '"' + "x" * MAX_LINE + '"} 1\n',
        "nemoserve_requests_queued 1\n" * (MAX_WANTED + 1),
        "\n" * (MAX_LINES + 1) + "nemoserve_requests_queued 1\n",
    ],
    ids=range(13),
)
def test_text_that_makes_no_sense_is_no_answer(text: str) -> None:
    with pytest.raises(BrokenAnswerError):
        read_text(text)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([*sorted(NAMES), "up", "#", "# TYPE nemoserve_phase"]),
            st.text(alphabet='{}=",\\le+Inf0123456789.eE- \t#\x00é', max_size=40),
        ).map("".join),
        max_size=8,
    ).map("\n".join)
)
def test_no_text_does_more_harm_than_to_be_no_answer(text: str) -> None:
    for each in (text, "nemoserve_requests_queued 1\n" + text):
        try:
            read_text(each)
        except BrokenAnswerError:
            pass


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_message_does_more_harm_than_to_be_no_answer(data: bytes) -> None:
    load = pb.Load()
    try:
        load.ParseFromString(data)
    except Exception:  # of protobuf, which gRPC answers for
        return
    try:
        read_load(load)
    except BrokenAnswerError:
        pass


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4), st.floats(0, 20), st.floats(0, 20))
def test_fewer_wait_longer(counts: list[int], one: float, other: float) -> None:
    waits = Waits((0.5, 2.0, 10.0), tuple(counts))
    assert waits.longer_than(min(one, other)) >= waits.longer_than(max(one, other))
    assert waits.longer_than(0.0) == sum(counts)
    assert waits.longer_than(10.0) == counts[-1]
