"""Prometheus text as an answer: of our own server where gRPC is not to be had, or of vLLM and whoever uses its names.

vLLM tells less: neither tokens in its queue nor what a step costs, and a request counts as arrived when it has its
first token. Only counters that never shrink are used, one or the difference of two that are counted together.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping

from prometheus_client.parser import text_string_to_metric_families

from autoscaler.fleet import Counters, Load, Phase, StepCost
from autoscaler.observe.answers import Answer, BrokenAnswerError, Waits, check, read_waits

OURS, VLLM = "nemoserve_", "vllm:"
MAX_LINES, MAX_WANTED = 100_000, 10_000  # a server with 64 adapters has some 20,000, of which 3,000 are wanted
MAX_LINE = 4_096  # characters
WANTED = (
    *("requests_queued", "tokens_queued", "queue_oldest_seconds", "requests_running", "requests_capacity"),
    *("kv_cache_usage_ratio", "cache_config_info", "phase", "requests_arrived_total", "prompt_tokens_arrived_total"),
    *("requests_finished_total", "prompt_tokens_total", "prefix_cache_hit_tokens_total", "generation_tokens_total"),
    *(
        "time_to_first_token_seconds_bucket",
        "time_per_output_token_seconds_bucket",
        "step_base_seconds",
        "seconds_per_prefill_token",
    ),
    *("seconds_per_decode_row", "seconds_per_context_token"),
)
WANTED_OF_VLLM = (
    *("num_requests_waiting", "num_requests_running", "kv_cache_usage_perc", "gpu_cache_usage_perc"),
    *("cache_config_info", "request_success_total", "prompt_tokens_total", "prefix_cache_queries_total"),
    *("prefix_cache_hits_total", "generation_tokens_total", "time_to_first_token_seconds_bucket"),
    *("request_time_per_output_token_seconds_bucket",),
)
NAMES = frozenset((*(OURS + name for name in WANTED), *(VLLM + name for name in WANTED_OF_VLLM)))
Labels = Mapping[str, str]


def read_text(text: str) -> Answer:
    """Raises BrokenAnswerError: it is no such text, or not of an inference server."""
    samples = _Samples(text)
    if samples.has(OURS + "requests_queued"):
        return _of_ours(samples)
    if samples.has(VLLM + "num_requests_waiting"):
        return _of_vllm(samples)
    raise BrokenAnswerError(f"neither {OURS}requests_queued nor {VLLM}num_requests_waiting is among the metrics")


class _Samples:
    """By name; labels that tell apart models, adapters or engines of one replica are summed over."""

    def __init__(self, text: str) -> None:
        self._found: dict[str, list[tuple[Labels, float]]] = {}
        try:
            for family in text_string_to_metric_families("".join(_lines(text))):
                for sample in family.samples:
                    check(sample.name, sample.value)
                    self._found.setdefault(sample.name, []).append((sample.labels, sample.value))
        except (ValueError, LookupError, TypeError) as error:
            raise BrokenAnswerError(f"the metrics cannot be read: {str(error)[:200]}") from None

    def has(self, name: str) -> bool:
        return name in self._found

    def sum(self, name: str) -> float:
        return sum(value for _, value in self._found.get(name, ()))

    def count(self, name: str) -> int:
        return round(self.sum(name))

    def labels(self, name: str) -> Labels:
        """Of the first sample."""
        return next((labels for labels, _ in self._found.get(name, ())), {})

    def one(self, name: str, label: str) -> str:
        """Value of a label where the sample is 1."""
        return next((labels.get(label, "") for labels, value in self._found.get(name, ()) if value == 1), "")

    def waits(self, name: str) -> Waits:
        cumulative: dict[float, float] = {}
        for labels, value in self._found.get(name, ()):
            try:
                bound = float(labels.get("le", ""))
            except ValueError:
                raise BrokenAnswerError(f"{name} has the bound {labels.get('le')!r}") from None
            cumulative[bound] = cumulative.get(bound, 0.0) + value
        bounds = sorted(cumulative)
        if not bounds:
            return Waits()
        if bounds[-1] != float("inf"):
            raise BrokenAnswerError(f"{name} has no bucket +Inf")
        totals = [round(cumulative[bound]) for bound in bounds]
        return read_waits(bounds[:-1], [here - below for here, below in zip(totals, [0, *totals], strict=False)])


def _lines(text: str) -> Iterator[str]:
    """Those that are wanted: a parser in Python takes 10 us for each."""
    taken = 0
    for number, line in enumerate(io.StringIO(text)):
        name = line[:128].partition("{")[0].partition(" ")[0]
        taken += name in NAMES
        if taken > MAX_WANTED or number >= MAX_LINES:
            raise BrokenAnswerError(f"the metrics have more than {MAX_LINES} lines, or {MAX_WANTED} of ours")
        if name in NAMES:
            if len(line) > MAX_LINE:
                raise BrokenAnswerError(f"{name} has a line of more than {MAX_LINE} letters")
            yield line


def _of_ours(samples: _Samples) -> Answer:
    def count(name: str) -> int:
        return samples.count(OURS + name)

    def seconds(name: str) -> float:
        return samples.sum(OURS + name)

    sizes = samples.labels(OURS + "cache_config_info")
    pages = _size(sizes, "kv_pages")
    waits = samples.waits(OURS + "time_to_first_token_seconds_bucket")
    cached = count("prefix_cache_hit_tokens_total")
    phase = samples.one(OURS + "phase", "phase")
    phases = {each.value: each for each in Phase} | {"unloaded": Phase.FAILED}
    return Answer(
        load=Load(
            queued_requests=count("requests_queued"),
            queued_tokens=count("tokens_queued"),
            oldest_queued_seconds=seconds("queue_oldest_seconds"),
            running_requests=count("requests_running"),
            capacity=count("requests_capacity"),
            kv_pages_used=round(pages * min(1.0, samples.sum(OURS + "kv_cache_usage_ratio"))),
            kv_pages_total=pages,
            kv_page_tokens=_size(sizes, "page_size"),
            max_step_tokens=_size(sizes, "max_batch_tokens"),
            step_cost=StepCost(
                seconds("step_base_seconds"),
                seconds("seconds_per_prefill_token"),
                seconds("seconds_per_decode_row"),
                seconds("seconds_per_context_token"),
            ),
            counters=Counters(
                arrived_requests=count("requests_arrived_total"),
                arrived_prompt_tokens=count("prompt_tokens_arrived_total"),
                finished_requests=count("requests_finished_total"),
                computed_prompt_tokens=max(0, count("prompt_tokens_total") - cached),
                cached_prompt_tokens=cached,
                generated_tokens=count("generation_tokens_total"),
                first_tokens=sum(waits.counts),
            ),
        ),
        phase=phases.get(phase),
        waits=waits,
        gaps=samples.waits(OURS + "time_per_output_token_seconds_bucket"),
    )


def _of_vllm(samples: _Samples) -> Answer:
    def count(name: str) -> int:
        return samples.count(VLLM + name)

    sizes = samples.labels(VLLM + "cache_config_info")
    pages = _size(sizes, "num_gpu_blocks")
    usage = "kv_cache_usage_perc" if samples.has(VLLM + "kv_cache_usage_perc") else "gpu_cache_usage_perc"  # of old
    waits = samples.waits(VLLM + "time_to_first_token_seconds_bucket")
    prompts, cached = count("prompt_tokens_total"), count("prefix_cache_hits_total")
    queries = count("prefix_cache_queries_total")
    return Answer(
        load=Load(
            queued_requests=count("num_requests_waiting"),
            running_requests=count("num_requests_running"),
            kv_pages_used=round(pages * min(1.0, samples.sum(VLLM + usage))),
            kv_pages_total=pages,
            kv_page_tokens=_size(sizes, "block_size"),
            counters=Counters(
                arrived_requests=sum(waits.counts),
                arrived_prompt_tokens=prompts,
                finished_requests=count("request_success_total"),
                computed_prompt_tokens=max(0, queries - cached) if queries else prompts,
                cached_prompt_tokens=cached,
                generated_tokens=count("generation_tokens_total"),
                first_tokens=sum(waits.counts),
            ),
        ),
        waits=waits,
        gaps=samples.waits(VLLM + "request_time_per_output_token_seconds_bucket"),
    )


def _size(labels: Labels, name: str) -> int:
    """A label that is a number; 0: it is not known."""
    text = labels.get(name, "")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
