"""Metric families from plain numbers: what all names that metrics have are made with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from engine.histogram import Distribution, Histogram


def gauge(name: str, help: str, value: float, **labels: str) -> Metric:
    family = GaugeMetricFamily(name, help, labels=[*labels])
    family.add_metric([*labels.values()], float(value))
    return family


def counter(name: str, help: str, value: float, **labels: str) -> Metric:
    family = CounterMetricFamily(name, help, labels=[*labels])
    family.add_metric([*labels.values()], value)
    return family


def counters(name: str, help: str, label: str, values: Mapping[str, float]) -> Metric:
    """By the values of one label."""
    family = CounterMetricFamily(name, help, labels=[label])
    for each, value in values.items():
        family.add_metric([each], value)
    return family


def histograms(name: str, help: str, label: str, values: Mapping[str, Histogram]) -> Metric:
    """By the values of one label."""
    family = HistogramMetricFamily(name, help, labels=[label])
    for each, histogram in values.items():
        family.add_metric([each], _cumulative(histogram.bounds, histogram.counts), histogram.sum)
    return family


def distribution(name: str, help: str, bounds: Sequence[float], found: Distribution) -> Metric:
    """Of the engine; empty before its first word."""
    counts = found.counts or (0,) * (len(bounds) + 1)
    return HistogramMetricFamily(name, help, _cumulative(bounds, counts), found.sum)


def _cumulative(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Buckets as Prometheus wants them."""
    buckets, total = [], 0
    for bound, count in zip(bounds, counts, strict=False):
        total += count
        buckets.append((repr(float(bound)), float(total)))
    return [*buckets, ("+Inf", float(total + counts[-1]))]
