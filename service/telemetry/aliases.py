"""The same numbers under the names of others, for gateways, autoscalers and dashboards that look for those."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, Metric

from engine import EngineInfo, EngineStats
from engine.costs import BATCH_TOKENS
from service.telemetry.families import counter, counters, distribution, gauge, histograms
from service.telemetry.numbers import COUNTERS, HISTOGRAMS, ModelNumbers, kv_usage

COUNTED = ("prompt_tokens", "generation_tokens")  # vLLM's names are ours
TIMED = {
    "time_to_first_token": "time_to_first_token",
    "inter_token_latency": "inter_token_latency",
    "request_time_per_output_token": "time_per_output_token",
    "e2e_request_latency": "request_duration",
    "request_queue_time": "queue_time",
    "request_prefill_time": "request_prefill",
    "request_decode_time": "request_decode",
}
"""vLLM's name -> ours."""
T = TypeVar("T")


def nim(stats: EngineStats) -> Iterator[Metric]:
    """NIM 1.x, which the examples of its operator still scale on."""
    yield gauge("num_requests_waiting", "nemoserve_requests_queued.", stats.queued)
    yield gauge("num_requests_running", "nemoserve_requests_running.", stats.running)
    yield gauge("num_request_max", "nemoserve_requests_capacity.", stats.max_batch_size)
    yield gauge("gpu_cache_usage_perc", "nemoserve_kv_cache_usage_ratio.", kv_usage(stats))


def vllm(model: str, stats: EngineStats, models: Mapping[str, ModelNumbers]) -> Iterator[Metric]:
    """What dashboards of vLLM and the Gateway API inference extension read; labels as theirs."""
    for name, ours, value in (
        ("num_requests_waiting", "requests_queued", stats.queued),
        ("num_requests_running", "requests_running", stats.running),
        ("kv_cache_usage_perc", "kv_cache_usage_ratio", kv_usage(stats)),
    ):
        yield gauge(f"vllm:{name}", f"nemoserve_{ours}.", value, model_name=model)
    for name, help, total in (
        ("num_preemptions", "nemoserve_preemptions_total.", stats.preemptions),
        ("prefix_cache_queries", "Tokens of prompts that were started.", stats.prefix_cache_query_tokens),
        ("prefix_cache_hits", "Of them those that needed no computation.", stats.prefix_cache_hit_tokens),
        ("spec_decode_num_draft_tokens", "nemoserve_draft_tokens_total.", stats.draft_tokens),
        ("spec_decode_num_accepted_tokens", "nemoserve_accepted_draft_tokens_total.", stats.accepted_draft_tokens),
    ):
        yield counter(f"vllm:{name}_total", help, total, model_name=model)
    for name in COUNTED:
        _, count = COUNTERS[name]
        yield counters(f"vllm:{name}_total", f"nemoserve_{name}_total.", "model_name", _each(models, count))
    yield _success(models)
    for name, ours in TIMED.items():
        _, values = HISTOGRAMS[ours]
        yield histograms(f"vllm:{name}_seconds", f"nemoserve_{ours}_seconds.", "model_name", _each(models, values))
    yield distribution("vllm:iteration_tokens_total", "nemoserve_batch_tokens.", BATCH_TOKENS, stats.batch_tokens)


def vllm_sizes(info: EngineInfo, adapters: Mapping[str, ModelNumbers] | None) -> Iterator[Metric]:
    """Of a loaded model.

    Args:
        adapters: the loaded LoRA adapters that have had requests; None if none are served.
    """
    sizes = {"block_size": str(info.page_size), "num_gpu_blocks": str(info.kv_pages)}
    yield gauge("vllm:cache_config_info", "nemoserve_cache_config_info.", 1, **sizes)
    if adapters is not None:
        labels = {
            "max_lora": str(info.max_loras),
            "running_lora_adapters": ",".join(sorted(name for name, each in adapters.items() if each.running)),
            "waiting_lora_adapters": ",".join(sorted(name for name, each in adapters.items() if each.waiting)),
        }
        yield gauge("vllm:lora_requests_info", "Adapters that have requests; the time now.", time.time(), **labels)


def _each(models: Mapping[str, ModelNumbers], value: Callable[[ModelNumbers], T]) -> dict[str, T]:
    return {name: value(of) for name, of in models.items()}


def _success(models: Mapping[str, ModelNumbers]) -> Metric:
    family = CounterMetricFamily(
        "vllm:request_success_total", "nemoserve_requests_total.", labels=["model_name", "finished_reason"]
    )
    for name, each in models.items():
        for reason in ("stop", "length"):
            family.add_metric([name, reason], each.outcomes[reason])
        family.add_metric([name, "abort"], each.outcomes["cancelled"] + each.outcomes["deadline"])
    return family
