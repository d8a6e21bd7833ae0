"""Metrics beside what clients saw: the real gRPC port, served model and generator over a fake engine."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from nemoserve.v1 import generation_pb2 as pb
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from engine import EngineStats
from engine.costs import BATCH_TOKENS, STEP_SECONDS, StepCost
from engine.histogram import Histogram
from service.admission import Admission, QueueLimits
from service.security.access import Access
from service.served import ServedModel
from service.telemetry.metrics import OTHER
from service.telemetry.telemetry import Telemetry
from tests.service.fake_engine import INFO, FakeEngine
from tests.service.fakes import Gate
from tests.service.grpc.ports import drained, refusal, served
from tests.service.telemetry.observed import Observed, ask, observed
from tests.service.telemetry.reports import Scrape

PAGE = Path(__file__).parents[3] / "docs" / "observability.md"


@pytest.fixture
async def running() -> AsyncIterator[Observed]:
    async with observed() as each:
        yield each


async def test_counters_agree_with_what_clients_saw(running: Observed) -> None:
    asks = [ask("x" * (1 + i % 7), max_tokens=1 + i % 5, n=1 + i % 3, stop_token_ids=[99] * (i % 2)) for i in range(60)]
    answers = await asyncio.gather(*(drained(running.port.typed.Generate(each, timeout=10)) for each in asks))
    prompt = cached = generated = gaps = several = 0
    outcomes: Counter[str] = Counter()
    for responses in answers:
        [started] = [each.started for each in responses if each.HasField("started")]
        prompt += started.prompt_tokens
        cached += started.cached_tokens
        deltas = [each.delta for each in responses if each.HasField("delta")]
        generated += sum(len(delta.token_ids) for delta in deltas)
        here = sum(len(delta.token_ids) for delta in deltas) - len({delta.index for delta in deltas})
        gaps += here
        several += here > 0
        reasons = {each.finished.reason for each in responses if each.HasField("finished")}
        outcomes["length" if pb.FINISH_REASON_LENGTH in reasons else "stop"] += 1
    scrape = running.scrape()
    assert scrape.value("nemoserve_prompt_tokens_total", model="toy") == prompt
    assert scrape.value("nemoserve_prefix_cache_hit_tokens_total", model="toy") == cached
    assert scrape.value("nemoserve_generation_tokens_total", model="toy") == generated
    assert scrape.value("nemoserve_inter_token_latency_seconds_count", model="toy") == gaps
    assert scrape.value("nemoserve_time_per_output_token_seconds_count", model="toy") == several
    for name in ("time_to_first_token", "queue_time", "request_duration", "request_prefill", "request_decode"):
        assert scrape.value(f"nemoserve_{name}_seconds_count", model="toy") == len(asks)
    load = (await running.port.typed.GetLoad(pb.GetLoadRequest())).load
    assert scrape.value("nemoserve_requests_arrived_total") == load.arrived_requests == len(asks)
    assert sum(load.time_per_output_token.counts) == several
    assert scrape.value("nemoserve_requests_finished_total") == load.finished_requests == len(asks)
    assert scrape.value("nemoserve_prompt_tokens_arrived_total") == load.arrived_prompt_tokens == prompt
    assert len(outcomes) == 2
    for outcome, count in outcomes.items():
        assert scrape.value("nemoserve_requests_total", model="toy", outcome=outcome) == count
    assert sum(scrape.values("nemoserve_requests_total").values()) == len(asks)
    method = "nemoserve.v1.GenerationService/Generate"
    assert scrape.value("nemoserve_calls_total", protocol="grpc", method=method, code="ok") == len(asks)


async def test_every_way_to_end_is_counted_once(running: Observed) -> None:
    engine, port = running.engine, running.port
    assert (await refusal(port.typed.Generate(ask(temperature=-1)))).code() is grpc.StatusCode.INVALID_ARGUMENT
    engine.gate = Gate()
    waiting, going = port.typed.Generate(ask()), port.typed.Generate(ask())
    await engine.until(lambda: len(engine.requests) == 2)
    engine.gate.allow()
    await asyncio.wait({asyncio.ensure_future(each.read()) for each in (waiting, going)}, return_when="FIRST_COMPLETED")
    numbers = running.telemetry.metrics.of("toy")
    assert (numbers.waiting, numbers.running) == (1, 1)
    waiting.cancel()
    going.cancel()
    await engine.until(lambda: len(engine.cancelled) == 2)
    engine.gate, engine.fails_after = None, 1
    assert (await drained(port.typed.Generate(ask())))[-1].finished.reason == pb.FINISH_REASON_ERROR
    running.model.failed("lost")
    assert (await refusal(port.typed.Generate(ask()))).code() is grpc.StatusCode.UNAVAILABLE
    scrape = running.scrape()
    counted = {dict(labels)["outcome"]: value for labels, value in scrape.values("nemoserve_requests_total").items()}
    assert counted == {"rejected": 2, "cancelled": 2, "error": 1}
    refused = {dict(labels)["reason"] for labels in scrape.values("nemoserve_requests_rejected_total")}
    assert refused == {"invalid_argument", "unavailable"}
    codes = Counter({dict(labels)["code"]: n for labels, n in scrape.values("nemoserve_calls_total").items()})
    assert codes == {"invalid_argument": 1, "cancelled": 2, "ok": 1, "unavailable": 1}
    assert (numbers.waiting, numbers.running) == (0, 0)


async def test_what_admission_refuses_is_counted_by_its_reason() -> None:
    handed, queued, refused = INFO.max_batch_size + 1, 2, 5
    async with observed(admission=Admission(QueueLimits(max_requests=queued))) as running:
        engine, port = running.engine, running.port
        engine.gate = Gate()
        first = [asyncio.ensure_future(drained(port.typed.Generate(ask()))) for _ in range(handed)]
        await engine.until(lambda: len(engine.requests) == handed)
        more = [asyncio.ensure_future(drained(port.typed.Generate(ask()))) for _ in range(queued + refused)]
        ended = 0
        for each in asyncio.as_completed(more):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await each
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            if (ended := ended + 1) == refused:
                break
        scrape = running.scrape()
        assert scrape.value("nemoserve_requests_rejected_total", reason="queue_full") == refused
        assert scrape.value("nemoserve_requests_total", model="toy", outcome="rejected") == refused
        assert scrape.value("nemoserve_requests_queued") == queued
        assert scrape.value("nemoserve_tokens_queued") == queued * 3
        engine.gate.allow(100)
        await asyncio.gather(*first, *more, return_exceptions=True)
        assert running.scrape().value("nemoserve_requests_total", model="toy", outcome="length") == handed + queued


async def test_names_that_clients_make_up_are_no_labels(running: Observed) -> None:
    before = len(running.scrape().samples)
    for number in range(40):
        await refusal(running.port.typed.Generate(ask(model=f"model-{number}")))
        request = ask()
        request.adapter = f"adapter-{number}"
        await refusal(running.port.typed.Generate(request))
        unknown = running.port.channel.unary_unary(f"/nemoserve.v1.GenerationService/Method{number}")
        assert (await refusal(unknown(b""))).code() is grpc.StatusCode.UNIMPLEMENTED
    scrape = running.scrape()
    labels = {value for _, found in scrape.samples for _, value in found}
    assert not [value for value in labels if value[-1].isdigit() and value.startswith(("model-", "adapter-"))]
    assert scrape.value("nemoserve_requests_rejected_total", reason="not_found") == 40
    assert scrape.value("nemoserve_calls_total", protocol="grpc", method=OTHER, code="unimplemented") == 40
    one_model = len(
        [None for _, found in scrape.samples if ("model", OTHER) in found or ("model_name", OTHER) in found]
    )
    assert len(scrape.samples) - before <= one_model + 3  # a reason, and two codes of calls


async def test_not_even_those_of_methods_that_somebody_without_rights_calls() -> None:
    async with observed(access=Access(trusted=False)) as running:
        for number in range(10):
            unknown = running.port.channel.unary_unary(f"/made.Up/Method{number}")
            assert (await refusal(unknown(b""))).code() is grpc.StatusCode.PERMISSION_DENIED
        counted = running.scrape().values("nemoserve_calls_total")
    assert {(dict(labels)["method"], dict(labels)["code"]): n for labels, n in counted.items()} == {
        (OTHER, "permission_denied"): 10
    }


async def test_the_load_has_the_histogram_of_the_time_to_the_first_token(running: Observed) -> None:
    other = running.telemetry.metrics.of("another model")
    other.first_token.add(2.0)
    other.first_token.add(1e6)
    await drained(running.port.typed.Generate(ask()))
    told = (await running.port.typed.GetLoad(pb.GetLoadRequest())).load.time_to_first_token
    assert len(told.counts) == len(told.bounds) + 1
    assert list(told.bounds) == sorted(told.bounds)
    assert (sum(told.counts), told.counts[-1], told.counts[list(told.bounds).index(2.0)]) == (3, 1, 1)
    buckets = running.scrape().values("nemoserve_time_to_first_token_seconds_bucket")
    at_most_5 = sum(count for labels, count in buckets.items() if ("le", "5.0") in labels)
    assert at_most_5 == sum(n for bound, n in zip(told.bounds, told.counts, strict=False) if bound <= 5) == 2


async def test_gauges_are_those_of_the_engine_when_somebody_looks(running: Observed) -> None:
    times, tokens = Histogram(STEP_SECONDS), Histogram(BATCH_TOKENS)
    times.add(0.0045, 3)
    tokens.add(7, 3)
    running.engine.stats = EngineStats(
        steps=5,
        queued=3,
        queued_tokens=70,
        oldest_queued_seconds=1.5,
        running=2,
        max_batch_size=8,
        kv_pages_used=16,
        kv_pages_total=64,
        preemptions=4,
        corrupted=1,
        draft_tokens=10,
        accepted_draft_tokens=6,
        step_times=times.distribution,
        batch_tokens=tokens.distribution,
        step_cost=StepCost(0.006, 3e-5, 2e-5, 6e-8),
    )
    scrape = running.scrape()
    ours = {
        "requests_queued": 3,
        "tokens_queued": 70,
        "queue_oldest_seconds": 1.5,
        "requests_running": 2,
        "requests_capacity": 8,
        "kv_cache_usage_ratio": 0.25,
        "preemptions_total": 4,
        "corrupted_requests_total": 1,
        "engine_steps_total": 5,
        "draft_tokens_total": 10,
        "accepted_draft_tokens_total": 6,
        "step_base_seconds": 0.006,
        "seconds_per_prefill_token": 3e-5,
        "seconds_per_decode_row": 2e-5,
        "seconds_per_context_token": 6e-8,
        "engine_step_seconds_count": 3,
        "batch_tokens_sum": 21,
        "alive": 1,
    }
    assert {name: scrape.value(f"nemoserve_{name}") for name in ours} == ours
    assert scrape.value("nemoserve_engine_step_seconds_bucket", le="0.004") == 0
    assert scrape.value("nemoserve_engine_step_seconds_bucket", le="0.005") == 3
    assert scrape.value("nemoserve_phase", phase="ready") == 1
    assert sum(scrape.values("nemoserve_phase").values()) == 1
    for name, value in (("num_requests_waiting", 3), ("num_requests_running", 2)):
        assert scrape.value(name) == scrape.value(f"vllm:{name}", model_name="toy") == value
    assert scrape.value("gpu_cache_usage_perc") == scrape.value("vllm:kv_cache_usage_perc", model_name="toy") == 0.25
    assert scrape.value("vllm:cache_config_info", block_size="16", num_gpu_blocks="64") == 1


async def test_aliases_can_be_left_out(running: Observed) -> None:
    scrape = Scrape(Telemetry(running.model, aliases=False))
    assert {name.split("_")[0] for name in scrape.families} == {"nemoserve"}


async def test_the_scraper_gets_the_format_that_it_asks_for(running: Observed) -> None:
    await drained(running.port.typed.Generate(ask()))
    metrics = running.telemetry.metrics
    text, content_type = metrics.exposition("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_openmetrics(text.decode())}
    assert families["nemoserve_generation_tokens"].samples[0].value == 3
    assert metrics.exposition("text/plain")[1].startswith("text/plain; version=0.0.4")
    assert metrics.exposition("application/json;version=x")[1].startswith("text/plain")


async def test_a_server_that_loads_or_has_failed_is_scraped_all_the_same() -> None:
    model = ServedModel("toy")
    telemetry = Telemetry(model)
    assert Scrape(telemetry).value("nemoserve_phase", phase="loading") == 1
    model.failed("broken")
    scrape = Scrape(telemetry)
    assert (scrape.value("nemoserve_phase", phase="failed"), scrape.value("nemoserve_alive")) == (1, 0)
    assert scrape.value("nemoserve_engine_step_seconds_count") == 0


async def test_two_servers_in_one_process_count_for_themselves(running: Observed) -> None:
    other = Telemetry(served(FakeEngine(b"abc")))
    await drained(running.port.typed.Generate(ask()))
    assert running.scrape().value("nemoserve_generation_tokens_total", model="toy") == 3
    assert Scrape(other).value("nemoserve_generation_tokens_total", model="toy") == 0


async def test_the_page_about_metrics_names_all_that_there_are_and_no_others(running: Observed) -> None:
    await drained(running.port.typed.Generate(ask()))
    await refusal(running.port.typed.Generate(ask(temperature=-1)))
    told = set(re.findall(r"\bnemoserve_[a-z_]+", PAGE.read_text()))
    there = {name for name, _ in running.scrape().samples if name.startswith("nemoserve_")}
    endings = ("_bucket", "_count", "_sum")
    families = {name.removesuffix(next((end for end in endings if name.endswith(end)), "")) for name in there}
    shortened = {"nemoserve_seconds_per_decode_row", "nemoserve_seconds_per_context_token"}  # as `…_per_decode_row`
    assert {name.removesuffix("_bucket") for name in told} == families - shortened
