"""Prometheus metrics of one server: what requests have added up to, and what its engine is doing when it is asked.

Counters and histograms of requests are added to as things happen, in the event loop of the served model, and cost well
under a microsecond each; everything else is read from the Host when somebody looks. There is one `Metrics` per server
and no state outside it. Names are stable: see `docs/observability.md`.

A label has few values, whatever clients send: models are those that are served (others are `_OTHER`), reasons and
outcomes are ours.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from engine import EngineInfo
from engine.costs import BATCH_TOKENS, STEP_SECONDS
from engine.histogram import Distribution, Histogram
from service.errors import ServiceError
from service.host import Cause, Host, Phase
from service.version import VERSION

OTHER = "_OTHER"  # OpenTelemetry's word for a value that is not known beforehand
MAX_MODELS = 64  # that have series of their own, LoRA adapters that came and went included
OUTCOMES = ("stop", "length", "cancelled", "deadline", "rejected", "error")

_LATENCIES = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0),
)
# A 12B model in 8 bits makes a token in less than 10 ms on a large GPU: there a bucket is a millisecond wide.
_TOKEN_LATENCIES = (
    *(0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01, 0.012, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05),
    *(0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
)


def token_latencies() -> Histogram:
    """For seconds from token to token."""
    return Histogram(_TOKEN_LATENCIES)


def _latencies() -> Histogram:
    return Histogram(_LATENCIES)


@dataclass(slots=True)
class ModelMetrics:
    """What the requests of one model, or of one LoRA adapter, have added up to. `waiting` and `running` are now."""

    first_token: Histogram = field(default_factory=_latencies)
    between_tokens: Histogram = field(default_factory=token_latencies)
    queue: Histogram = field(default_factory=_latencies)
    prefill: Histogram = field(default_factory=_latencies)
    decode: Histogram = field(default_factory=_latencies)
    duration: Histogram = field(default_factory=_latencies)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    waiting: int = 0
    running: int = 0


class Metrics:
    """A Prometheus collector. Belongs to one event loop.

    Args:
        host: whose gauges are shown.
        aliases: also use the names of vLLM and NIM, which gateways, dashboards and autoscalers know.
    """

    def __init__(self, host: Host, *, aliases: bool = True) -> None:
        self._host = host
        self._aliases = aliases
        self._models: dict[str, ModelMetrics] = {}
        self.calls: Counter[tuple[str, str, str]] = Counter()  # (protocol, method, code)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.of(host.model_name)

    def of(self, model: str) -> ModelMetrics:
        """The numbers of a served model or adapter by name; of all others together for another name."""
        if (found := self._models.get(model)) is not None:
            return found
        loras = self._host.loras
        served = model == self._host.model_name or (loras is not None and model in loras.loaded)
        name = model if served and len(self._models) < MAX_MODELS else OTHER
        return self._models.setdefault(name, ModelMetrics())

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The text of all metrics, and its content type: Prometheus' or OpenMetrics', as the Accept header asks."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    @property
    def _info(self) -> EngineInfo | None:
        """None while there is no engine."""
        try:
            return self._host.info
        except ServiceError:
            return None

    # -- what the registry asks --------------------------------------------------------------------------------

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are not looked up beforehand, so that nothing is asked before there is a model."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield from self._server()
        yield from self._load()
        yield from self._requests()
        yield from self._engine()
        if self._aliases:
            yield from self._nim()
            yield from self._vllm()

    def _server(self) -> Iterator[Metric]:
        host = self._host
        yield InfoMetricFamily("nemoserve_build", "What runs.", {"version": VERSION, "model": host.model_name})
        phases = GaugeMetricFamily("nemoserve_phase", "1 for the phase that the server is in.", labels=["phase"])
        for phase in Phase:
            phases.add_metric([phase.value], float(host.status.phase is phase))
        yield phases
        restarts = CounterMetricFamily(
            "nemoserve_engine_restarts_total", "Engines that were lost and started again, by why.", labels=["cause"]
        )
        for cause in Cause:
            restarts.add_metric([cause.value], host.restarts.get(cause, 0))
        yield restarts
        yield _gauge("nemoserve_alive", "1 while loading makes progress or the engine's heart beats.", host.alive)
        yield _gauge("nemoserve_start_time_seconds", "Unix time of the server's start.", host.started_at)
        calls = CounterMetricFamily(
            "nemoserve_calls_total", "RPCs and HTTP requests that ended.", labels=["protocol", "method", "code"]
        )
        for labels, count in sorted(self.calls.items()):
            calls.add_metric(labels, count)
        yield calls

    def _load(self) -> Iterator[Metric]:
        stats = self._host.stats
        yield _gauge("nemoserve_requests_queued", "Admitted requests that are not scheduled yet.", stats.queued)
        yield _gauge("nemoserve_tokens_queued", "Prompt tokens of the requests that wait.", stats.queued_tokens)
        yield _gauge(
            "nemoserve_queue_oldest_seconds", "Age of the oldest request that waits.", stats.oldest_queued_seconds
        )
        yield _gauge("nemoserve_requests_running", "Requests in the batch.", stats.running)
        yield _gauge("nemoserve_requests_capacity", "Most requests that run at once.", stats.max_batch_size)
        yield _gauge("nemoserve_kv_cache_usage_ratio", "KV pages that requests hold, of all.", self._kv_usage)

    @property
    def _kv_usage(self) -> float:
        stats = self._host.stats
        return stats.kv_pages_used / stats.kv_pages_total if stats.kv_pages_total else 0.0

    def _requests(self) -> Iterator[Metric]:
        outcomes = CounterMetricFamily(
            "nemoserve_requests_total", "Requests that ended, by how.", labels=["model", "outcome"]
        )
        rejected = CounterMetricFamily(
            "nemoserve_requests_rejected_total", "Requests that were refused, by why.", labels=["model", "reason"]
        )
        for model, numbers in self._models.items():
            for outcome in OUTCOMES:
                outcomes.add_metric([model, outcome], numbers.outcomes[outcome])
            for reason, count in sorted(numbers.rejected.items()):
                rejected.add_metric([model, reason], count)
        yield outcomes
        yield rejected
        for name, help, values in (
            ("prompt_tokens", "Tokens of prompts whose first token was made.", "prompt_tokens"),
            ("generation_tokens", "Tokens that were generated.", "generated_tokens"),
            ("prefix_cache_hit_tokens", "Of the prompts' tokens those that needed no computation.", "cached_tokens"),
        ):
            yield self._counter(f"nemoserve_{name}_total", help, values, "model")
        for name, help, values in (
            ("time_to_first_token", "From a request's arrival to its first token.", "first_token"),
            ("inter_token_latency", "From token to token of a completion.", "between_tokens"),
            ("queue_time", "From a request's arrival to its first step.", "queue"),
            ("request_prefill", "From a request's first step to its first token.", "prefill"),
            ("request_decode", "From a request's first token to its end.", "decode"),
            ("request_duration", "From the arrival of a request that got a token to its end.", "duration"),
        ):
            yield self._histogram(f"nemoserve_{name}_seconds", help, values, "model")

    def _engine(self) -> Iterator[Metric]:
        stats = self._host.stats
        cost = stats.step_cost
        yield _counter(
            "nemoserve_engine_steps_total", "Steps of the engine: it moves while there is work.", stats.steps
        )
        yield _distribution(
            "nemoserve_engine_step_seconds", "Time of a step that computed tokens.", STEP_SECONDS, stats.step_times
        )
        yield _distribution("nemoserve_batch_tokens", "Tokens of such a step.", BATCH_TOKENS, stats.batch_tokens)
        yield _counter("nemoserve_preemptions_total", "Requests that lost their pages for a time.", stats.preemptions)
        yield _counter("nemoserve_draft_tokens_total", "Guessed tokens that were checked.", stats.draft_tokens)
        yield _counter(
            "nemoserve_accepted_draft_tokens_total", "Guessed tokens that were right.", stats.accepted_draft_tokens
        )
        yield _gauge("nemoserve_step_base_seconds", "Fitted cost of a step, whatever it computes.", cost.base)
        for name, help, value in (
            ("prefill_token", "Fitted cost of a token of a prompt.", cost.per_prefill_token),
            ("decode_row", "Fitted cost of a request that decodes, per step.", cost.per_decode_row),
            ("context_token", "Fitted cost of a token that a request attends to, per step.", cost.per_context_token),
        ):
            yield _gauge(f"nemoserve_seconds_per_{name}", help, value)
        if (info := self._info) is not None:
            sizes = {
                "page_size": str(info.page_size),
                "pages": str(info.kv_pages),
                "max_model_len": str(info.max_model_len),
                "max_batch_tokens": str(info.max_batch_tokens),
                "dtype": info.dtype,
                "device": info.device,
            }
            yield InfoMetricFamily("nemoserve_cache_config", "Sizes that were chosen for the engine.", sizes)

    # -- names of others ---------------------------------------------------------------------------------------

    def _nim(self) -> Iterator[Metric]:
        """NIM 1.x, which its operator's examples still scale on."""
        stats = self._host.stats
        yield _gauge("num_requests_waiting", "nemoserve_requests_queued.", stats.queued)
        yield _gauge("num_requests_running", "nemoserve_requests_running.", stats.running)
        yield _gauge("num_request_max", "nemoserve_requests_capacity.", stats.max_batch_size)
        yield _gauge("gpu_cache_usage_perc", "nemoserve_kv_cache_usage_ratio.", self._kv_usage)

    def _vllm(self) -> Iterator[Metric]:
        """What dashboards of vLLM and the Gateway API inference extension read; labels as theirs."""
        stats, model = self._host.stats, self._host.model_name
        gauges = (
            ("num_requests_waiting", "nemoserve_requests_queued.", stats.queued),
            ("num_requests_running", "nemoserve_requests_running.", stats.running),
            ("kv_cache_usage_perc", "nemoserve_kv_cache_usage_ratio.", self._kv_usage),
        )
        for name, help, value in gauges:
            gauge = GaugeMetricFamily(f"vllm:{name}", help, labels=["model_name"])
            gauge.add_metric([model], value)
            yield gauge
        counters = (
            ("num_preemptions", "nemoserve_preemptions_total.", stats.preemptions),
            ("prefix_cache_queries", "Tokens of prompts that were started.", stats.prefix_cache_query_tokens),
            ("prefix_cache_hits", "Of them those that needed no computation.", stats.prefix_cache_hit_tokens),
            ("spec_decode_num_draft_tokens", "nemoserve_draft_tokens_total.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "nemoserve_accepted_draft_tokens_total.", stats.accepted_draft_tokens),
        )
        for name, help, value in counters:
            counter = CounterMetricFamily(f"vllm:{name}_total", help, labels=["model_name"])
            counter.add_metric([model], value)
            yield counter
        success = CounterMetricFamily(
            "vllm:request_success_total", "nemoserve_requests_total.", labels=["model_name", "finished_reason"]
        )
        for name, numbers in self._models.items():
            for outcome in ("stop", "length"):
                success.add_metric([name, outcome], numbers.outcomes[outcome])
            success.add_metric([name, "abort"], numbers.outcomes["cancelled"] + numbers.outcomes["deadline"])
        yield success
        for name, values in (("prompt_tokens", "prompt_tokens"), ("generation_tokens", "generated_tokens")):
            yield self._counter(f"vllm:{name}_total", f"nemoserve_{name}_total.", values, "model_name")
        for name, ours, values in (
            ("time_to_first_token", "time_to_first_token", "first_token"),
            ("inter_token_latency", "inter_token_latency", "between_tokens"),
            ("e2e_request_latency", "request_duration", "duration"),
            ("request_queue_time", "queue_time", "queue"),
            ("request_prefill_time", "request_prefill", "prefill"),
            ("request_decode_time", "request_decode", "decode"),
        ):
            yield self._histogram(f"vllm:{name}_seconds", f"nemoserve_{ours}_seconds.", values, "model_name")
        yield _distribution("vllm:iteration_tokens_total", "nemoserve_batch_tokens.", BATCH_TOKENS, stats.batch_tokens)
        yield from self._vllm_infos()

    def _vllm_infos(self) -> Iterator[Metric]:
        if (info := self._info) is not None:
            sizes = GaugeMetricFamily(
                "vllm:cache_config_info", "nemoserve_cache_config_info.", labels=["block_size", "num_gpu_blocks"]
            )
            sizes.add_metric([str(info.page_size), str(info.kv_pages)], 1)
            yield sizes
            if self._host.loras is not None:
                labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
                loras = GaugeMetricFamily(
                    "vllm:lora_requests_info", "Adapters of requests; the time now.", labels=labels
                )
                adapters = {name: each for name, each in self._models.items() if name in self._host.loras.loaded}
                running = ",".join(sorted(name for name, each in adapters.items() if each.running))
                waiting = ",".join(sorted(name for name, each in adapters.items() if each.waiting))
                loras.add_metric([str(info.max_loras), running, waiting], time.time())
                yield loras

    def _counter(self, name: str, help: str, values: str, label: str) -> Metric:
        family = CounterMetricFamily(name, help, labels=[label])
        for model, numbers in self._models.items():
            family.add_metric([model], getattr(numbers, values))
        return family

    def _histogram(self, name: str, help: str, values: str, label: str) -> Metric:
        family = HistogramMetricFamily(name, help, labels=[label])
        for model, numbers in self._models.items():
            histogram: Histogram = getattr(numbers, values)
            family.add_metric([model], _buckets(histogram.bounds, histogram.counts), histogram.sum)
        return family


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, float(value))


def _counter(name: str, help: str, value: float) -> Metric:
    return CounterMetricFamily(name, help, value)


def _distribution(name: str, help: str, bounds: tuple[float, ...], found: Distribution) -> Metric:
    counts = found.counts or (0,) * (len(bounds) + 1)  # before the engine's first word
    return HistogramMetricFamily(name, help, _buckets(bounds, counts), found.sum)


def _buckets(bounds: tuple[float, ...], counts: tuple[int, ...] | list[int]) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus wants them."""
    buckets, total = [], 0
    for bound, count in zip((*bounds, float("inf")), counts, strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(total)))
    return buckets
