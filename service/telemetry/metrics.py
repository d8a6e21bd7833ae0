"""Prometheus metrics of one server: what requests have added up to, and what its engine is doing when it is asked.

Counters and histograms of requests are added to as things happen, in the event loop of the served model, for about a
microsecond a token; everything else is read from the Host when somebody looks. There is one `Metrics` per server and
no state outside it. Names are stable: see `docs/observability.md`.

A label has few values, whatever clients send: models are those that are served (others are `_OTHER`), reasons and
outcomes are ours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from engine import EngineInfo, EngineStats
from engine.costs import BATCH_TOKENS, STEP_SECONDS
from engine.histogram import Histogram
from service.host import Cause, Host, Phase, info_of
from service.telemetry import aliases
from service.telemetry.families import counter, counters, distribution, gauge, histograms
from service.telemetry.numbers import COUNTERS, HISTOGRAMS, OUTCOMES, ModelNumbers, kv_usage, together
from service.version import VERSION

OTHER = "_OTHER"  # OpenTelemetry's word for a value that is not known beforehand
MAX_MODELS = 64  # that have series of their own, LoRA adapters that came and went included


class Metrics:
    """A Prometheus collector. Belongs to one event loop.

    Args:
        host: whose gauges are shown.
        aliases: also use the names of vLLM and NIM, which gateways, dashboards and autoscalers know.

    Attributes:
        calls: RPCs and HTTP requests that ended, by (protocol, method, code).
        rejected: requests that were refused by others than admission, by reason.
    """

    def __init__(self, host: Host, *, aliases: bool = True) -> None:
        self._host = host
        self._aliases = aliases
        self._models: dict[str, ModelNumbers] = {}
        self.calls: Counter[tuple[str, str, str]] = Counter()
        self.rejected: Counter[str] = Counter()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.of(host.model_name)

    def of(self, model: str) -> ModelNumbers:
        """The numbers of a served model or adapter by name; of all others together for another name."""
        if (found := self._models.get(model)) is not None:
            return found
        loras = self._host.loras
        served = model == self._host.model_name or (loras is not None and model in loras.loaded)
        name = model if served and len(self._models) < MAX_MODELS else OTHER
        return self._models.setdefault(name, ModelNumbers())

    @property
    def first_tokens(self) -> Histogram:
        """Seconds from arrival to first token, of all models together."""
        return together([each.first_token for each in self._models.values()])

    @property
    def per_token(self) -> Histogram:
        """Mean seconds from token to token of each request that ended, of all models together."""
        return together([each.per_token for each in self._models.values()])

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The text of all metrics, and its content type: Prometheus' or OpenMetrics', as the Accept header asks."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    # -- what the registry asks --------------------------------------------------------------------------------

    def describe(self) -> Iterator[Metric]:
        """Nothing: names are not looked up beforehand, so that nothing is asked before there is a model."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        host, stats = self._host, self._host.stats
        info = info_of(host)
        yield from self._server()
        yield from _load(stats)
        yield from self._requests()
        yield from _engine(stats, info)
        if self._aliases:
            yield from aliases.nim(stats)
            yield from aliases.vllm(host.model_name, stats, self._models)
            if info is not None:
                loras = host.loras
                adapters = {name: of for name, of in self._models.items() if loras is not None and name in loras.loaded}
                yield from aliases.vllm_sizes(info, None if loras is None else adapters)

    def _server(self) -> Iterator[Metric]:
        host = self._host
        yield InfoMetricFamily("nemoserve_build", "What runs.", {"version": VERSION, "model": host.model_name})
        phases = GaugeMetricFamily("nemoserve_phase", "1 for the phase that the server is in.", labels=["phase"])
        for phase in Phase:
            phases.add_metric([phase.value], float(host.status.phase is phase))
        yield phases
        restarts = {cause.value: host.restarts.get(cause, 0) for cause in Cause}
        yield counters("nemoserve_engine_restarts_total", "Engines started again, by why.", "cause", restarts)
        yield gauge("nemoserve_alive", "1 while loading makes progress or the engine's heart beats.", host.alive)
        yield gauge("nemoserve_start_time_seconds", "Unix time of the server's start.", host.started_at)
        calls = CounterMetricFamily(
            "nemoserve_calls_total", "RPCs and HTTP requests that ended.", labels=["protocol", "method", "code"]
        )
        for labels, count in sorted(self.calls.items()):
            calls.add_metric(labels, count)
        yield calls

    def _requests(self) -> Iterator[Metric]:
        models = self._models
        outcomes = CounterMetricFamily(
            "nemoserve_requests_total", "Requests that ended, by how.", labels=["model", "outcome"]
        )
        for name, each in models.items():
            for outcome in OUTCOMES:
                outcomes.add_metric([name, outcome], each.outcomes[outcome])
        yield outcomes
        queue = self._host.queue
        rejected = {reason.value: count for reason, count in queue.refused.items()} | self.rejected
        yield counters("nemoserve_requests_rejected_total", "Requests refused, by why.", "reason", rejected)
        for name, help, total in (
            ("requests_arrived", "Requests that were accepted, to wait or to run.", queue.arrived),
            ("prompt_tokens_arrived", "Tokens of the prompts of accepted requests.", queue.arrived_tokens),
            ("requests_finished", "Accepted requests that ended, whatever ended them.", queue.finished),
        ):
            yield counter(f"nemoserve_{name}_total", help, total)
        yield counter("nemoserve_slow_readers_total", "Requests ended, for nobody took them.", queue.slow_readers)
        for name, (help, count) in COUNTERS.items():
            yield counters(f"nemoserve_{name}_total", help, "model", {each: count(of) for each, of in models.items()})
        for name, (help, values) in HISTOGRAMS.items():
            found = {each: values(of) for each, of in models.items()}
            yield histograms(f"nemoserve_{name}_seconds", help, "model", found)


def _load(stats: EngineStats) -> Iterator[Metric]:
    for name, help, value in (
        ("requests_queued", "Admitted requests that are not scheduled yet.", stats.queued),
        ("tokens_queued", "Prompt tokens of the requests that wait.", stats.queued_tokens),
        ("queue_oldest_seconds", "Age of the oldest request that waits.", stats.oldest_queued_seconds),
        ("requests_running", "Requests in the batch.", stats.running),
        ("requests_capacity", "Most requests that run at once.", stats.max_batch_size),
        ("kv_cache_usage_ratio", "KV pages that requests hold, of all.", kv_usage(stats)),
    ):
        yield gauge(f"nemoserve_{name}", help, value)


def _engine(stats: EngineStats, info: EngineInfo | None) -> Iterator[Metric]:
    """`info` None: nothing is loaded."""
    for name, help, total in (
        ("engine_steps", "Steps of the engine: it moves while there is work.", stats.steps),
        ("preemptions", "Requests that lost their pages for a time.", stats.preemptions),
        ("corrupted_requests", "Requests that failed because their logits were not numbers.", stats.corrupted),
        ("draft_tokens", "Guessed tokens that were checked.", stats.draft_tokens),
        ("accepted_draft_tokens", "Guessed tokens that were right.", stats.accepted_draft_tokens),
    ):
        yield counter(f"nemoserve_{name}_total", help, total)
    times, tokens, cost = stats.step_times, stats.batch_tokens, stats.step_cost
    yield distribution("nemoserve_engine_step_seconds", "Time of a step that computed tokens.", STEP_SECONDS, times)
    yield distribution("nemoserve_batch_tokens", "Tokens of such a step.", BATCH_TOKENS, tokens)
    for name, help, seconds in (
        ("step_base_seconds", "Fitted cost of a step, whatever it computes.", cost.base),
        ("seconds_per_prefill_token", "Fitted cost of a token of a prompt.", cost.per_prefill_token),
        ("seconds_per_decode_row", "Fitted cost of a request that decodes, per step.", cost.per_decode_row),
        ("seconds_per_context_token", "Fitted cost of a token attended to, per step.", cost.per_context_token),
    ):
        yield gauge(f"nemoserve_{name}", help, seconds)
    if info is not None:
        sizes = ("page_size", "kv_pages", "max_model_len", "max_batch_tokens", "dtype", "device")
        found = {name: str(getattr(info, name)) for name in sizes}
        yield InfoMetricFamily("nemoserve_cache_config", "Sizes that were chosen for the engine.", found)
